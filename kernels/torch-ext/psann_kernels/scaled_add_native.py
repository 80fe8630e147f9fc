"""Native twin of scaled_add: csrc/cpu/scaled_add.cpp. Read scaled_add.py first.

Forward reads x and branch and writes h; backward reads the gradient and branch, writes the branch's gradient, and adds up alpha's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .direct import shortcut
from .library import define
from .native import NATIVE, TYPES, launch, refuses_dtype
from .scaled_add import OP


def _forward(x: Tensor, branch: Tensor, alpha: Tensor) -> Tensor:
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, branch, alpha = x.contiguous(), branch.contiguous(), alpha.float()
    launch(
        "scaled_add", x,
        x.data_ptr(), branch.data_ptr(), alpha.data_ptr(), h.data_ptr(), x.numel(), TYPES[x.dtype], TYPES[branch.dtype],
    )  # fmt: skip
    return h


def _backward(dh: Tensor, branch: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    dbranch = torch.empty_like(branch, memory_format=torch.contiguous_format)
    dalpha = torch.empty_like(alpha, dtype=torch.float32)
    dh, branch, wide = dh.contiguous(), branch.contiguous(), alpha.float()
    launch(
        "scaled_add_backward", dh,
        dh.data_ptr(), branch.data_ptr(), wide.data_ptr(), dbranch.data_ptr(), dalpha.data_ptr(), dh.numel(), TYPES[dh.dtype],
        TYPES[branch.dtype],
    )  # fmt: skip
    return dbranch, dalpha.to(alpha.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate(ctx: Any, dh: Tensor) -> tuple[Tensor, ...]:
    return dh, *_call_backward(dh, *ctx.saved_tensors)


scaled_add_native_backward = define(
    "scaled_add_native_backward(Tensor dh, Tensor branch, Tensor alpha) -> (Tensor, Tensor)",
    _backward,
    lambda dh, branch, alpha: (branch.new_empty(branch.shape), alpha.new_empty(alpha.shape)),
)
scaled_add_native = define(
    "scaled_add_native(Tensor x, Tensor branch, Tensor alpha) -> Tensor",
    _forward,
    lambda x, branch, alpha: x.new_empty(x.shape),
    _differentiate,
    _setup_context,
)
_call_backward = shortcut(scaled_add_native_backward, _backward)
_call = shortcut(scaled_add_native, _forward, _differentiate, _setup_context)


def refuses(x: Tensor, branch: Tensor, alpha: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}; the native kernel of scaled_add runs on a CPU"
    return refuses_dtype("x", x)


OP.offer("native", refuses, is_partial=True, at_once=NATIVE.scaled_add_at_once)(_call)
