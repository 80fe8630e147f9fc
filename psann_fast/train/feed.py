"""The micro-batches of every optimizer step, from any step on, for one of several processes."""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Iterator

import numpy as np
import torch
from torch import Tensor

from ..config import TrainConfig
from ..data.packing import Examples

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """How many examples, micro-batches and optimizer steps a run takes.

    rows             examples of a micro-batch in each process
    steps_per_epoch  optimizer steps; the last of an epoch may have fewer examples
    total_steps      of the whole run
    """

    rows: int
    steps_per_epoch: int
    total_steps: int

    @classmethod
    def of(cls, examples: Examples, config: TrainConfig, processes: int = 1) -> Plan:
        rows = max(1, config.batch_tokens // examples.window)
        steps_per_epoch = math.ceil(math.ceil(len(examples) / (rows * processes)) / config.grad_accum_steps)
        total = steps_per_epoch * config.epochs
        return cls(rows, steps_per_epoch, total if config.max_steps is None else min(total, config.max_steps))


@dataclass(frozen=True)
class StepData:
    """What one optimizer step trains on: the targets of all processes together, and this process's micro-batches.

    Every process has as many micro-batches as the others; where the examples do not suffice, one of a padding row.
    """

    targets: int
    batches: list[Batch]


def steps(
    examples: Examples, plan: Plan, config: TrainConfig, *, first: int = 0, rank: int = 0, processes: int = 1
) -> Iterator[StepData]:
    """The steps from number `first` (from 0) to the last: each example once an epoch, whatever the number of processes."""
    rows = plan.rows * processes
    epoch, done = divmod(first, plan.steps_per_epoch)
    number = first
    while number < plan.total_steps:
        order, offset = examples.order(epoch), examples.offset(epoch)
        for start in range(done * rows * config.grad_accum_steps, len(order), rows * config.grad_accum_steps):
            if number == plan.total_steps:
                return
            chosen = order[start : start + rows * config.grad_accum_steps]
            batches = []
            for cut in range(0, len(chosen), rows):
                mine = np.array_split(chosen[cut : cut + rows], processes)[rank]
                batches.append(examples.batch(mine, offset) if len(mine) else examples.blank())
            yield StepData(examples.count_targets(chosen), batches)
            number += 1
        epoch, done = epoch + 1, 0


def pinned(source: Iterator[StepData], depth: int = 2) -> Iterator[StepData]:
    """`source`, read ahead in a thread into pinned memory, from where copies to a GPU run beside its work."""

    def read() -> StepData | None:
        step = next(source, None)
        if step is None:
            return None
        return StepData(step.targets, [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in step.batches])

    with ThreadPoolExecutor(1, "feed") as pool:
        waiting = deque(pool.submit(read) for _ in range(depth))
        while (step := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(read))
            yield step


def on_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """(input_ids, targets, document_starts or None) of a batch. None where no row holds two documents,
    so that nothing is masked."""
    starts = batch["document_starts"]
    # Seen here, where the batch is still on the host.
    needed = bool(starts[:, 1:].any())
    move = lambda tensor: tensor.to(device, non_blocking=True)  # noqa: E731 (three uses on the next line)
    return move(batch["input_ids"]), move(batch["targets"]), move(starts) if needed else None
