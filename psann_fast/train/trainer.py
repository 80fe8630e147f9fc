"""The training loop."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Any, Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import TrainConfig
from ..data.packing import IGNORED, Examples
from .guard import Guard, TrainingDiverged, check_weights
from .optim import build_optimizer, learning_rate, warmup_length
from .precision import autocast, resolve_amp
from .progress import Progress
from .run_folder import RunFolder

_LOG = logging.getLogger("psann_fast")


@dataclass
class Plan:
    """How many examples, micro-batches and optimizer steps a call of fit takes."""

    rows: int
    steps_per_epoch: int
    total_steps: int

    @classmethod
    def of(cls, examples: Examples, config: TrainConfig) -> Plan:
        rows = max(1, config.batch_tokens // examples.window)
        steps_per_epoch = math.ceil(math.ceil(len(examples) / rows) / config.grad_accum_steps)
        total = steps_per_epoch * config.epochs
        return cls(rows, steps_per_epoch, total if config.max_steps is None else min(total, config.max_steps))


def train(
    module: nn.Module,
    examples: Examples,
    config: TrainConfig,
    *,
    val_examples: Examples | None = None,
    run: RunFolder | None = None,
    save: Callable[[str], None] | None = None,
    history: list[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Train `module` in place on its own device; returns the rows of metrics (every log interval, and the last step).

    save     save(name) writes a checkpoint: "last" every save_interval_steps and at the end, "best" at each new lowest validation loss
    history  the list that receives the rows, so that those of a run that is interrupted are not lost (default: a new one)

    Raises ValueError for options that this device cannot serve, TrainingDiverged at NaN or infinity.
    """
    device = next(module.parameters()).device
    dtype = check(config, device)
    plan = Plan.of(examples, config)
    warmup = warmup_length(config, plan.total_steps)
    optimizer = build_optimizer(module, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    guard = Guard(optimizer, scaler, config, device)
    learning = [p for p in module.parameters() if p.requires_grad]
    history = [] if history is None else history
    best, tokens_seen, began = math.inf, 0, time.perf_counter()
    logged_at, logged_tokens = began, 0
    bar = Progress(plan.total_steps, shown=config.progress)
    forked = [device] if device.type == "cuda" else []
    module.train()
    with torch.random.fork_rng(devices=forked):
        torch.manual_seed(config.seed)
        try:
            for step, batches in enumerate(_steps(examples, plan, config)):
                rate = learning_rate(step, plan.total_steps, warmup, config)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                # The denominator counts the tokens of the whole step: micro-batches of few tokens must not weigh more.
                targets = sum(int((batch["targets"] != IGNORED).sum()) for batch in batches)
                loss = torch.zeros((), device=device)
                for batch in batches:
                    with autocast(dtype, device):
                        part = batch_loss(module, batch, device, config.label_smoothing) / targets
                    scaler.scale(part).backward()
                    loss += part.detach()
                scaler.unscale_(optimizer)  # before clipping, which must see true norms
                norm = nn.utils.clip_grad_norm_(learning, config.grad_clip if config.grad_clip > 0 else math.inf)
                is_last = step + 1 == plan.total_steps
                is_logged = is_last or step % config.log_interval_steps == 0
                guard.step(step + 1, loss, norm)
                optimizer.zero_grad(set_to_none=True)
                tokens_seen += targets
                bar.step()
                is_saved = save is not None and (is_last or (step + 1) % config.save_interval_steps == 0)
                is_validated = val_examples is not None and (is_last or (step + 1) % config.eval_interval_steps == 0)
                skipped = guard.check() if is_logged or is_validated or is_saved else 0
                if is_logged or is_validated:
                    now = time.perf_counter()
                    row = {
                        "step": step + 1,
                        "epoch": 1 + step // plan.steps_per_epoch,
                        "loss": loss.item(),
                        "val_loss": None,
                        "lr": rate,
                        "grad_norm": norm.item(),
                        "skipped_steps": skipped,
                        "tokens": tokens_seen,
                        "tokens_per_second": (tokens_seen - logged_tokens) / max(now - logged_at, 1e-9),
                        "seconds": now - began,
                    }
                    bar.note(loss=f"{row['loss']:.3f}", **{"tokens/s": f"{row['tokens_per_second']:,.0f}"})
                    if is_validated:
                        row["val_loss"] = evaluate(module, val_examples, plan.rows, dtype)
                        bar.note(val=f"{row['val_loss']:.3f}")
                        if row["val_loss"] < best:
                            best = row["val_loss"]
                            if save is not None:
                                check_weights(module, step + 1)
                                save("best")
                    history.append(row)
                    if run is not None:
                        run.add(row)
                    # After the validation, whose time is not training's.
                    logged_at, logged_tokens = time.perf_counter(), tokens_seen
                if is_saved:
                    check_weights(module, step + 1)
                    save("last")
        finally:
            bar.close()
            module.eval()
    return history


def check(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """The autocast dtype, or None. Raises ValueError for options that `device` cannot serve, before anything is touched."""
    if config.ddp == "on":
        raise ValueError("ddp is 'on', but this version trains in one process; use ddp='auto' or 'off'")
    return resolve_amp(config.amp, device)


def batch_loss(module: nn.Module, batch: dict[str, Tensor], device: torch.device, label_smoothing: float = 0.0) -> Tensor:
    """Sum over the targets of a batch of their cross-entropy in nats, float32 (float64 for a float64 model)."""
    starts = batch["document_starts"]
    # Rows of one document each need no mask; seen here, where the batch is still on the host.
    starts = starts.to(device, non_blocking=True) if bool(starts[:, 1:].any()) else None
    logits = module(batch["input_ids"].to(device, non_blocking=True), starts)
    logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    targets = batch["targets"].to(device, non_blocking=True).flatten()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=label_smoothing, reduction="sum")


@torch.no_grad()
def evaluate(
    module: nn.Module, examples: Examples, rows: int, dtype: torch.dtype | None = None, *, count_separators: bool = True
) -> float:
    """Mean cross-entropy in nats per target token over all of `examples`; the module's mode is left as it was.

    count_separators  whether the separator after each document counts as a target
    """
    device = next(module.parameters()).device
    was_training = module.training
    module.eval()
    total, targets = 0.0, 0
    for first in range(0, len(examples), rows):
        batch = examples.batch(np.arange(first, min(first + rows, len(examples))))
        if not count_separators:
            batch["targets"][batch["targets"] == examples.eos_id] = IGNORED
        with autocast(dtype, device):
            total += batch_loss(module, batch, device).item()
        targets += int((batch["targets"] != IGNORED).sum())
    module.train(was_training)
    return total / targets


def _steps(examples: Examples, plan: Plan, config: TrainConfig) -> Iterator[list[dict[str, Tensor]]]:
    """The micro-batches of each optimizer step."""
    done, rows = 0, plan.rows * config.grad_accum_steps
    for epoch in range(config.epochs):
        order, offset = examples.order(epoch), examples.offset(epoch)
        for first in range(0, len(order), rows):
            if done == plan.total_steps:
                return
            chosen = order[first : first + rows]
            yield [examples.batch(chosen[cut : cut + plan.rows], offset) for cut in range(0, len(chosen), plan.rows)]
            done += 1
