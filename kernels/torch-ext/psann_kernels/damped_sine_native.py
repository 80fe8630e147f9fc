"""Native twin of damped_sine: csrc/cpu/damped_sine.cpp. Read damped_sine.py first.

Forward reads z and writes y: 2 * z.numel() * itemsize bytes.  Backward reads z and dy and writes dz; it keeps only z and
recomputes exp, sin and cos.  Parameter gradients are added up in blocks that follow from the number of rows alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .damped_sine import MODES, OP
from .direct import shortcut
from .library import define
from .native import TYPES, launch, refuses_device, refuses_dtype, rows_of


def _forward(z: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, mode: str) -> Tensor:
    y = torch.empty_like(z, memory_format=torch.contiguous_format)
    if z.numel() == 0:
        return y
    memory, rows, stride = rows_of(z)
    amplitude, frequency, damping = (t.contiguous() for t in (amplitude, frequency, damping))
    launch(
        "damped_sine_forward", z,
        memory.data_ptr(), amplitude.data_ptr(), frequency.data_ptr(), damping.data_ptr(), y.data_ptr(), rows, z.shape[-1], stride,
        TYPES[z.dtype], MODES.index(mode),
    )  # fmt: skip
    return y


def _backward(
    dy: Tensor, z: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, mode: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (amplitude, frequency, damping)]
    if z.numel() == 0:
        return dz, *(t.zero_() for t in gradients)
    (memory, rows, stride), (dy_memory, _, dy_stride) = rows_of(z), rows_of(dy)
    amplitude, frequency, damping = (t.contiguous() for t in (amplitude, frequency, damping))
    launch(
        "damped_sine_backward", z,
        memory.data_ptr(), dy_memory.data_ptr(), amplitude.data_ptr(), frequency.data_ptr(), damping.data_ptr(), dz.data_ptr(),
        *[t.data_ptr() for t in gradients], rows, z.shape[-1], stride, dy_stride,
        TYPES[z.dtype], MODES.index(mode), scratch=lambda cuda: cuda.damped_sine_partials(rows) * 3 * z.shape[-1],
    )  # fmt: skip
    return dz, *gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.mode = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_call_backward(dy, *ctx.saved_tensors, ctx.mode), None


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
_call_backward = shortcut(damped_sine_native_backward, _backward)
_call = shortcut(damped_sine_native, _forward, _differentiate, _setup_context)


def refuses(z: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, *, mode: str = "abs") -> str | None:
    return refuses_device(z) or refuses_dtype("z", z)


@OP.offer("native", refuses)
def _serve(z: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, *, mode: str = "abs") -> Tensor:
    return _call(z, amplitude, frequency, damping, mode)
