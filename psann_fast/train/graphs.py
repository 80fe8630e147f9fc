"""Forward and backward of a training step as CUDA graphs; clipping and the optimizer, a few launches, stay outside.

A graph is of one shape of micro-batch, captured when it first comes. Gradients are added to memory that stays, and is set to zero
before each step, so that a step may have any number of micro-batches. Where an epoch ends with a smaller one, that runs without.
The capture has not run on a device yet; the tests put a recording of the operations in its place.
"""

from __future__ import annotations

from typing import Callable, Sequence

import torch
from torch import Tensor, nn

from ..config import TrainConfig

# (input_ids, targets, document_starts or None, count) -> () tensor: adds the gradients of the loss over `count`, and returns that.
MicroBatch = Callable[[Tensor, Tensor, "Tensor | None", "int | Tensor"], Tensor]
Inputs = tuple[Tensor, Tensor, "Tensor | None"]


def refuses(config: TrainConfig, device: torch.device, processes: int) -> str | None:
    """Why the steps of such a run cannot be captured, or None."""
    if device.type != "cuda":
        return f"the model is on {device}, and graphs are CUDA's"
    if processes > 1:
        return "several processes exchange gradients during backward, which these graphs do not hold"
    if config.activation_checkpointing:
        return "activation_checkpointing saves random states on the host during forward"
    if config.amp == "fp16":
        return "amp is 'fp16', whose gradient scale these graphs do not follow; use amp='bf16'"
    return None


class StepGraphs:
    """Runs the micro-batches of a step.

    run      MicroBatch
    learning the parameters; their gradients stay where they are from now on
    rows     examples of a whole micro-batch
    capture  cuda_graphs.CUDACapture, or what stands in for it
    """

    def __init__(
        self,
        run: MicroBatch,
        learning: Sequence[nn.Parameter],
        rows: int,
        capture: Callable[[Callable[[], None]], Callable[[], None]],
    ) -> None:
        self._run, self._rows, self._capture = run, rows, capture
        self._dtype = torch.promote_types(learning[0].dtype, torch.float32)
        self._gradients = [torch.zeros_like(p) for p in learning]
        for parameter, gradient in zip(learning, self._gradients):
            parameter.grad = gradient
        self._graphs: dict[tuple[torch.Size, bool], _Graph] = {}

    def step(self, batches: Sequence[Inputs], count: int) -> Tensor:
        """The sum of the micro-batches' losses over `count`, (), and that one's gradients in each parameter's grad.

        Raises CaptureError where a micro-batch cannot be captured.
        """
        # Before the gradients are set to zero: a capture leaves something in them.
        graphs = [self._graph_of(inputs) for inputs in batches]
        torch._foreach_zero_(self._gradients)
        parts = []
        for graph, inputs in zip(graphs, batches):
            parts.append(self._run(*inputs, count) if graph is None else graph(inputs, count).clone())
        return torch.stack(parts).sum()

    def _graph_of(self, inputs: Inputs) -> _Graph | None:
        ids, _, starts = inputs
        if len(ids) != self._rows:
            return None
        key = ids.shape, starts is not None
        if key not in self._graphs:
            self._graphs[key] = _Graph(self._run, inputs, self._dtype, self._capture)
        return self._graphs[key]


class _Graph:
    def __init__(
        self, run: MicroBatch, inputs: Inputs, dtype: torch.dtype, capture: Callable[[Callable[[], None]], Callable[[], None]]
    ) -> None:
        self._inputs = [None if t is None else t.clone() for t in inputs]
        # Of the loss's dtype, so that the quotient is too.
        self._count, self._loss = (torch.ones((), dtype=dtype, device=inputs[0].device) for _ in range(2))
        self._replay = capture(lambda: self._loss.copy_(run(*self._inputs, self._count)))

    def __call__(self, inputs: Inputs, count: int) -> Tensor:
        for mine, given in zip(self._inputs, inputs):
            if mine is not None:
                mine.copy_(given)
        self._count.fill_(count)
        self._replay()
        return self._loss
