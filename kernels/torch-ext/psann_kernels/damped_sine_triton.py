"""Triton twin of damped_sine. Read damped_sine.py first.

Forward reads z and writes y: 2 * z.numel() * itemsize bytes.  Backward reads z and dy and writes dz; it keeps only z and
recomputes exp, sin and cos, because y holds one product of them and not the cosine.  The phase is reduced in turns
(triton_support), so float32 results hold to 1e5 rad and beyond where torch's own float32 product has lost three digits.
Parameter gradients reduce in two passes, a row of partial sums per program and one small sum, because atomics would let
scheduling change the result.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .damped_sine import OP
from .library import define
from .triton_support import (
    LOG2_E,
    as_rows,
    cosine_of_turns,
    narrow,
    refuses_device,
    refuses_dtype,
    sine_of_turns,
    split_turns,
    turns_of,
    widen,
)

# Row blocks whose partial sums the backward keeps: enough programs for any GPU, few enough that the second sum is small.
MAX_ROW_PROGRAMS = 512


@triton.jit
def envelope(z, damping, MODE: tl.constexpr):
    """exp(-damping g(z)) and g(z), for MODE "abs", "relu" or "none"."""
    if MODE == "abs":
        g = tl.abs(z)
    elif MODE == "relu":
        g = tl.where(z > 0, z, 0.0)
    else:
        g = tl.zeros_like(z)
    return tl.exp2(-damping * LOG2_E * g), g


@triton.jit
def _forward_kernel(
    z_ptr, amplitude_ptr, frequency_ptr, damping_ptr, y_ptr, rows, features, z_stride,
    MODE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    here = (r < rows)[:, None] & (c < features)[None, :]

    amplitude = tl.load(amplitude_ptr + c, mask=c < features, other=0.0)[None, :]
    damping = tl.load(damping_ptr + c, mask=c < features, other=0.0)[None, :]
    high, low = split_turns(tl.load(frequency_ptr + c, mask=c < features, other=0.0)[None, :])
    z = widen(tl.load(z_ptr + r[:, None] * z_stride + c[None, :], mask=here, other=0.0))

    e, _ = envelope(z, damping, MODE)
    y = amplitude * e * sine_of_turns(turns_of(z, high, low))

    tl.store(y_ptr + r[:, None] * features + c[None, :], narrow(y, y_ptr.dtype.element_ty), mask=here)


@triton.jit
def _backward_kernel(
    z_ptr, dy_ptr, amplitude_ptr, frequency_ptr, damping_ptr, dz_ptr, partial_ptr, rows, features, z_stride, dy_stride,
    MODE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # Columns stay while row tiles stream past; partial_ptr is (row programs, 3, features).
    program = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = c < features
    amplitude = tl.load(amplitude_ptr + c, mask=inside, other=0.0)[None, :]
    frequency = tl.load(frequency_ptr + c, mask=inside, other=0.0)[None, :]
    damping = tl.load(damping_ptr + c, mask=inside, other=0.0)[None, :]
    high, low = split_turns(frequency)

    sum_amplitude = tl.zeros((BLOCK_F,), tl.float32)
    sum_frequency = tl.zeros((BLOCK_F,), tl.float32)
    sum_damping = tl.zeros((BLOCK_F,), tl.float32)
    r = program * BLOCK_R + tl.arange(0, BLOCK_R)
    for _ in range(program, tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        here = (r < rows)[:, None] & inside[None, :]
        z = widen(tl.load(z_ptr + r[:, None] * z_stride + c[None, :], mask=here, other=0.0))
        dy = widen(tl.load(dy_ptr + r[:, None] * dy_stride + c[None, :], mask=here, other=0.0))

        e, g = envelope(z, damping, MODE)
        turns = turns_of(z, high, low)
        p = dy * e
        ps = p * sine_of_turns(turns)
        pc = p * cosine_of_turns(turns)
        dz = frequency * pc
        if MODE == "abs":
            dz -= damping * tl.where(z > 0, ps, tl.where(z < 0, -ps, 0.0))
        elif MODE == "relu":
            dz -= damping * tl.where(z > 0, ps, 0.0)
        tl.store(dz_ptr + r[:, None] * features + c[None, :], narrow(amplitude * dz, dz_ptr.dtype.element_ty), mask=here)

        sum_amplitude += tl.sum(ps, 0)
        sum_frequency += tl.sum(z * pc, 0)
        sum_damping += tl.sum(g * ps, 0)
        r += tl.num_programs(0).to(tl.int64) * BLOCK_R

    partial = partial_ptr + program * 3 * features + c
    tl.store(partial, sum_amplitude, mask=inside)
    tl.store(partial + features, sum_frequency, mask=inside)
    tl.store(partial + 2 * features, sum_damping, mask=inside)


def tile(rows: int, features: int) -> tuple[int, int]:
    """(BLOCK_R, BLOCK_F): 1024 elements a program, wide before tall, so that accesses along a row are whole cache lines."""
    block_f = min(triton.next_power_of_2(features), 256)
    return max(1, 1024 // block_f), block_f


def _forward(z: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, mode: str) -> Tensor:
    y = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if z.numel() == 0:
        return y
    rows = as_rows(z)
    block_r, block_f = tile(*rows.shape)
    grid = (triton.cdiv(rows.shape[0], block_r), triton.cdiv(rows.shape[1], block_f))
    _forward_kernel[grid](
        rows, amplitude.contiguous(), frequency.contiguous(), damping.contiguous(), y, *rows.shape, rows.stride(0),
        MODE=mode, BLOCK_R=block_r, BLOCK_F=block_f,
    )  # fmt: skip
    return y


def _backward(
    dy: Tensor, z: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, mode: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if z.numel() == 0:
        return dz, torch.zeros_like(amplitude), torch.zeros_like(frequency), torch.zeros_like(damping)
    rows, dy_rows = as_rows(z), as_rows(dy)
    block_r, block_f = tile(*rows.shape)
    programs = min(triton.cdiv(rows.shape[0], block_r), MAX_ROW_PROGRAMS)
    partial = torch.empty((programs, 3, rows.shape[1]), dtype=torch.float32, device=z.device)
    _backward_kernel[(programs, triton.cdiv(rows.shape[1], block_f))](
        rows, dy_rows, amplitude.contiguous(), frequency.contiguous(), damping.contiguous(), dz, partial, *rows.shape,
        rows.stride(0), dy_rows.stride(0), MODE=mode, BLOCK_R=block_r, BLOCK_F=block_f,
    )  # fmt: skip
    sums = partial.sum(0)
    return dz, sums[0].clone(), amplitude * sums[1], -amplitude * sums[2]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.mode = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *damped_sine_triton_backward(dy, *ctx.saved_tensors, ctx.mode), None


damped_sine_triton_backward = define(
    "damped_sine_triton_backward(Tensor dy, Tensor z, Tensor amplitude, Tensor frequency, Tensor damping, str mode)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    lambda dy, z, a, f, d, mode: (z.new_empty(z.shape), *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a, f, d))),
)
damped_sine_triton = define(
    "damped_sine_triton(Tensor z, Tensor amplitude, Tensor frequency, Tensor damping, str mode) -> Tensor",
    _forward,
    lambda z, amplitude, frequency, damping, mode: z.new_empty(z.shape),
    _differentiate,
    _setup_context,
)


def refuses(z: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, *, mode: str = "abs") -> str | None:
    return refuses_device(z) or refuses_dtype("z", z)


@OP.offer("triton", refuses)
def _serve(z: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, *, mode: str = "abs") -> Tensor:
    return damped_sine_triton(z, amplitude, frequency, damping, mode)
