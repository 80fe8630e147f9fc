"""Native twin of linear_cross_entropy: csrc/cpu/cross_entropy.cpp between torch's products.
Read linear_cross_entropy_chunks.py first.

A row of logits is read once and its gradient written over it, while it lies in a core's first cache.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .linear_cross_entropy import OP
from .linear_cross_entropy_chunks import define_ops, serve
from .native import TYPES, address, launch, refuses_dtype


def turn(
    logits: Tensor, targets: Tensor, losses: Tensor, dloss: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float,
    soft_cap: float | None, wants_gradient: bool,
) -> None:  # fmt: skip
    """`Turn` by the native kernel. logits and losses are contiguous; targets were checked."""
    targets, dloss = targets.contiguous(), None if dloss is None else dloss.float().contiguous()
    launch(
        "cross_entropy", logits,
        logits.data_ptr(), targets.data_ptr(), losses.data_ptr(), address(dloss), *logits.shape, ignore_index, label_smoothing,
        z_loss, soft_cap or 0.0, wants_gradient, TYPES[logits.dtype],
    )  # fmt: skip


OPS = define_ops("native", turn)


def refuses(x: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}; the native kernel of linear_cross_entropy runs on a CPU"
    return refuses_dtype("x", x)


@OP.offer("native", refuses, is_partial=True)
def _serve(x: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return serve(OPS, x, weight, targets, **options)
