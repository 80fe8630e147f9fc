"""Native twin of damped_sine: csrc/cpu/damped_sine.cpp. Read damped_sine.py first.

Forward reads z and writes y: 2 * z.numel() * itemsize bytes.  Backward reads z and dy and writes dz; it keeps only z and
recomputes exp, sin and cos.  Parameter gradients are added up in blocks that follow from the number of rows alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .damped_sine import MODES, OP
from .library import define
from .native import NATIVE, TYPES, as_rows, refuses_device, refuses_dtype


def _forward(z: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, mode: str) -> Tensor:
    y = torch.empty(z.shape, dtype=z.dtype)
    if z.numel() == 0:
        return y
    rows = as_rows(z)
    amplitude, frequency, damping = (t.contiguous() for t in (amplitude, frequency, damping))
    NATIVE.damped_sine_forward(
        rows.data_ptr(), amplitude.data_ptr(), frequency.data_ptr(), damping.data_ptr(), y.data_ptr(), *rows.shape, rows.stride(0),
        TYPES[z.dtype], MODES.index(mode), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _backward(
    dy: Tensor, z: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, mode: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dz = torch.empty(z.shape, dtype=z.dtype)
    gradients = [torch.empty(t.shape) for t in (amplitude, frequency, damping)]
    if z.numel() == 0:
        return dz, *(t.zero_() for t in gradients)
    rows, dy_rows = as_rows(z), as_rows(dy)
    amplitude, frequency, damping = (t.contiguous() for t in (amplitude, frequency, damping))
    NATIVE.damped_sine_backward(
        rows.data_ptr(), dy_rows.data_ptr(), amplitude.data_ptr(), frequency.data_ptr(), damping.data_ptr(), dz.data_ptr(),
        *(t.data_ptr() for t in gradients), *rows.shape, rows.stride(0), dy_rows.stride(0),
        TYPES[z.dtype], MODES.index(mode), torch.get_num_threads(),
    )  # fmt: skip
    return dz, *gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.mode = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *damped_sine_native_backward(dy, *ctx.saved_tensors, ctx.mode), None


damped_sine_native_backward = define(
    "damped_sine_native_backward(Tensor dy, Tensor z, Tensor amplitude, Tensor frequency, Tensor damping, str mode)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    lambda dy, z, a, f, d, mode: (z.new_empty(z.shape), *(t.new_empty(t.shape) for t in (a, f, d))),
)
damped_sine_native = define(
    "damped_sine_native(Tensor z, Tensor amplitude, Tensor frequency, Tensor damping, str mode) -> Tensor",
    _forward,
    lambda z, amplitude, frequency, damping, mode: z.new_empty(z.shape),
    _differentiate,
    _setup_context,
)


def refuses(z: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, *, mode: str = "abs") -> str | None:
    return refuses_device(z) or refuses_dtype("z", z)


@OP.offer("native", refuses)
def _serve(z: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, *, mode: str = "abs") -> Tensor:
    return damped_sine_native(z, amplitude, frequency, damping, mode)
