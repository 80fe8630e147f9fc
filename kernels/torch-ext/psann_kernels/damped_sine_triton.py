"""Triton twin of damped_sine. Read damped_sine.py first.

Forward reads z and writes y: 2 * z.numel() * itemsize bytes.  Backward reads z and dy and writes dz; it keeps only z and
recomputes exp, sin and cos, because y holds one product of them and not the cosine.  The phase is reduced in turns
(triton_support), so float32 results hold to 1e5 rad and beyond where torch's own float32 product has lost three digits.
Parameter gradients reduce in two passes, a row of partial sums per program and one small kernel, because atomics would let
scheduling change the result.  For each element on sm_90 (tests/kernels/gate.py counts them): forward 23 instructions, of them 2 of
the special function unit, in half precision, 31 and 1 in float32; backward 34 and 3, 48 and 1; memory allows 31, 62, 46 and 93.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .damped_sine import MODES, OP
from .library import define
from .triton_support import (
    LOG2_E,
    Configuration,
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

# 64 columns are whole cache lines, and a thread's 8 columns of a half tensor keep their parameters in registers for 4 rows.
BLOCK_F = 64
# A tile's three sums take 24 registers a thread; two more tiles are on their way from memory meanwhile.
BACKWARD = {"BLOCK_R": 16, "BLOCK_F": BLOCK_F, "STAGES": 3}
REDUCE = {"BLOCK_P": 128, "BLOCK_F": 16}
# Programs of the backward: one wave of a large GPU; each leaves a row of partial sums, few beside what it has read.
PROGRAMS = 1024


@triton.jit
def envelope(z, damping, MODE: tl.constexpr):
    """exp(-damping g(z)) and g(z), for MODE "abs", "relu" or "none"."""
    if MODE == "abs":
        g = tl.abs(z)
        e = tl.exp2(-damping * LOG2_E * g)
    elif MODE == "relu":
        g = tl.maximum(z, 0.0)
        e = tl.exp2(-damping * LOG2_E * g)
    else:
        g = tl.zeros_like(z)
        e = tl.full(z.shape, 1.0, tl.float32)
    return e, g


@triton.jit
def sine_of(z, amplitude, high, low, damping, MODE: tl.constexpr, dtype: tl.constexpr):
    """The damped sine of z; high and low as split_turns gives them of the frequency, `dtype` as in sine_of_turns."""
    e, _ = envelope(z, damping, MODE)
    return amplitude * e * sine_of_turns(turns_of(z, high, low), dtype)


@triton.jit
def gradients_of_sine(dy, z, high, low, damping, rise, fall, MODE: tl.constexpr, dtype: tl.constexpr):
    """dz where rise is amplitude * frequency and fall amplitude * damping; and what dz shares with the parameters' gradients: dy
    times envelope and sine, dy times envelope and cosine, and g(z)."""
    e, g = envelope(z, damping, MODE)
    turns = turns_of(z, high, low)
    p = dy * e
    ps = p * sine_of_turns(turns, dtype)
    pc = p * cosine_of_turns(turns, dtype)
    dz = rise * pc
    # At z = 0 the slope of |z| counts as 0, as in torch; nothing needs to be done for it, because ps is 0 there.
    if MODE == "abs":
        dz -= fall * tl.where(z < 0, -ps, ps)
    elif MODE == "relu":
        dz -= fall * tl.where(z > 0, ps, 0.0)
    return dz, ps, pc, g


@triton.jit
def _tile(BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
    """Row program, rows (BLOCK_R,), columns (BLOCK_F,) of this program. Neighbours share rows, so that memory is read in order."""
    program = tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * tl.num_programs(1).to(tl.int64)
    return program, program * BLOCK_R + tl.arange(0, BLOCK_R), tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)


@triton.jit
def _forward_kernel(
    z_ptr, amplitude_ptr, frequency_ptr, damping_ptr, y_ptr, rows, features, z_stride,
    MODE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    _, r, c = _tile(BLOCK_R, BLOCK_F)
    inside = c < features
    here = (r < rows)[:, None] & inside[None, :]
    dtype: tl.constexpr = y_ptr.dtype.element_ty

    amplitude = tl.load(amplitude_ptr + c, mask=inside, other=0.0)[None, :]
    damping = tl.load(damping_ptr + c, mask=inside, other=0.0)[None, :]
    high, low = split_turns(tl.load(frequency_ptr + c, mask=inside, other=0.0)[None, :])
    z = widen(tl.load(z_ptr + r[:, None] * z_stride + c[None, :], mask=here, other=0.0))

    y = sine_of(z, amplitude, high, low, damping, MODE, dtype)

    tl.store(y_ptr + r[:, None] * features + c[None, :], narrow(y, dtype), mask=here)


@triton.jit(do_not_specialize=["row_programs"])
def _backward_kernel(
    z_ptr, dy_ptr, amplitude_ptr, frequency_ptr, damping_ptr, dz_ptr, partial_ptr, rows, features, z_stride, dy_stride,
    row_programs, MODE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Columns stay while row tiles stream past; partial_ptr is (row programs, 3, features).
    program, r, c = _tile(BLOCK_R, BLOCK_F)
    inside = c < features
    dtype: tl.constexpr = dz_ptr.dtype.element_ty
    amplitude = tl.load(amplitude_ptr + c, mask=inside, other=0.0)[None, :]
    frequency = tl.load(frequency_ptr + c, mask=inside, other=0.0)[None, :]
    damping = tl.load(damping_ptr + c, mask=inside, other=0.0)[None, :]
    high, low = split_turns(frequency)

    # Sums stay apart until the rows have passed: a sum over a tile in every round would cost more than its sines.
    sum_amplitude = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    sum_frequency = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    sum_damping = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    for _ in tl.range(program, tl.cdiv(rows, BLOCK_R), row_programs, num_stages=STAGES):
        here = (r < rows)[:, None] & inside[None, :]
        z = widen(tl.load(z_ptr + r[:, None] * z_stride + c[None, :], mask=here, other=0.0))
        dy = widen(tl.load(dy_ptr + r[:, None] * dy_stride + c[None, :], mask=here, other=0.0))

        dz, ps, pc, g = gradients_of_sine(dy, z, high, low, damping, amplitude * frequency, amplitude * damping, MODE, dtype)
        tl.store(dz_ptr + r[:, None] * features + c[None, :], narrow(dz, dtype), mask=here)

        sum_amplitude += ps
        sum_frequency += z * pc
        if MODE != "none":
            sum_damping += g * ps
        r += row_programs.to(tl.int64) * BLOCK_R

    partial = partial_ptr + program * 3 * features + c
    tl.store(partial, tl.sum(sum_amplitude, 0), mask=inside)
    tl.store(partial + features, tl.sum(sum_frequency, 0), mask=inside)
    tl.store(partial + features + features, tl.sum(sum_damping, 0), mask=inside)


@triton.jit(do_not_specialize=["row_programs"])
def _reduce_kernel(
    partial_ptr, amplitude_ptr, d_amplitude_ptr, d_frequency_ptr, d_damping_ptr, row_programs, features,
    BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = c < features
    amplitude = tl.load(amplitude_ptr + c, mask=inside, other=0.0)

    sum_amplitude = tl.zeros((BLOCK_P, BLOCK_F), tl.float32)
    sum_frequency = tl.zeros((BLOCK_P, BLOCK_F), tl.float32)
    sum_damping = tl.zeros((BLOCK_P, BLOCK_F), tl.float32)
    p = tl.arange(0, BLOCK_P).to(tl.int64)
    for _ in range(0, row_programs, BLOCK_P):
        here = (p < row_programs)[:, None] & inside[None, :]
        partial = partial_ptr + p[:, None] * 3 * features + c[None, :]
        sum_amplitude += tl.load(partial, mask=here, other=0.0)
        sum_frequency += tl.load(partial + features, mask=here, other=0.0)
        sum_damping += tl.load(partial + features + features, mask=here, other=0.0)
        p += BLOCK_P

    tl.store(d_amplitude_ptr + c, tl.sum(sum_amplitude, 0), mask=inside)
    tl.store(d_frequency_ptr + c, amplitude * tl.sum(sum_frequency, 0), mask=inside)
    tl.store(d_damping_ptr + c, -amplitude * tl.sum(sum_damping, 0), mask=inside)


def forward_options(itemsize: int) -> dict[str, int]:
    """Tile of the forward: 8 KiB of z, 64 bytes to a thread."""
    return {"BLOCK_R": 128 // itemsize, "BLOCK_F": BLOCK_F}


def grid(row_tiles: int, features: int) -> tuple[int, int, int]:
    """Column tiles first; row tiles over two axes, because CUDA ends the second and third at 65535.
    Surplus programs find no row."""
    return triton.cdiv(features, BLOCK_F), min(row_tiles, 65535), triton.cdiv(row_tiles, 65535)


def row_programs(rows: int, features: int) -> int:
    """Row programs of the backward, a function of the shape alone, so that sums are ordered alike on every device."""
    return max(1, min(triton.cdiv(rows, BACKWARD["BLOCK_R"]), PROGRAMS // triton.cdiv(features, BLOCK_F)))


def _forward(z: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, mode: str) -> Tensor:
    y = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if z.numel() == 0:
        return y
    rows, options = as_rows(z), forward_options(z.element_size())
    _forward_kernel[grid(triton.cdiv(rows.shape[0], options["BLOCK_R"]), rows.shape[1])](
        rows, amplitude.contiguous(), frequency.contiguous(), damping.contiguous(), y, *rows.shape, rows.stride(0),
        MODE=mode, **options, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def _backward(
    dy: Tensor, z: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, mode: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if z.numel() == 0:
        return dz, torch.zeros_like(amplitude), torch.zeros_like(frequency), torch.zeros_like(damping)
    rows, dy_rows, amplitude = as_rows(z), as_rows(dy), amplitude.contiguous()
    features = rows.shape[1]
    programs = row_programs(*rows.shape)
    partial = torch.empty((programs, 3, features), dtype=torch.float32, device=z.device)
    d_amplitude, d_frequency, d_damping = (torch.empty_like(amplitude) for _ in range(3))
    _backward_kernel[grid(programs, features)](
        rows, dy_rows, amplitude, frequency.contiguous(), damping.contiguous(), dz, partial, *rows.shape,
        rows.stride(0), dy_rows.stride(0), programs, MODE=mode, **BACKWARD, enable_fp_fusion=True,
    )  # fmt: skip
    _reduce_kernel[(triton.cdiv(features, REDUCE["BLOCK_F"]),)](
        partial, amplitude, d_amplitude, d_frequency, d_damping, programs, features, **REDUCE, enable_fp_fusion=True
    )
    return dz, d_amplitude, d_frequency, d_damping


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.mode = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *damped_sine_triton_backward(dy, *ctx.saved_tensors, ctx.mode), None


damped_sine_triton_backward = define(
    "damped_sine_triton_backward(Tensor dy, Tensor z, Tensor amplitude, Tensor frequency, Tensor damping, str mode)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    lambda dy, z, a, f, d, mode: (
        z.new_empty(z.shape),
        *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a, f, d)),
    ),
)
damped_sine_triton = define(
    "damped_sine_triton(Tensor z, Tensor amplitude, Tensor frequency, Tensor damping, str mode) -> Tensor",
    _forward,
    lambda z, amplitude, frequency, damping, mode: z.new_empty(z.shape),
    _differentiate,
    _setup_context,
)


def configurations() -> list[Configuration]:
    """What the launchers above can choose. float16 and bfloat16 differ in conversions alone, so bfloat16 stands for both; the modes
    differ in the envelope alone, so the two that have one are listed once, and "none", which leaves it out, is not. Rows that are
    no multiple of 16 elements long are read an element at a time."""
    found = []
    for kind, mode, is_aligned in (
        ("bf16", "abs", True), ("bf16", "relu", True), ("fp32", "abs", True), ("bf16", "abs", False),
    ):  # fmt: skip
        name = f"{kind} {mode}{'' if is_aligned else ' unaligned'}"
        z, size = f"*{kind}:16", "i32:16" if is_aligned else "i32"
        parameters = {f"{parameter}_ptr": "*fp32:16" for parameter in ("amplitude", "frequency", "damping")}
        forward = {"z_ptr": z, **parameters, "y_ptr": z, "rows": "i32", "features": size, "z_stride": size}
        backward = {"z_ptr": z, "dy_ptr": z, **parameters, "dz_ptr": z, "partial_ptr": "*fp32:16", "rows": "i32"}
        backward |= {"features": size, "z_stride": size, "dy_stride": size, "row_programs": "i32"}
        options = {"MODE": mode, **forward_options(4 if kind == "fp32" else 2)}
        found.append(Configuration(_forward_kernel, forward, options, name=f"damped_sine forward {name}"))
        found.append(Configuration(_backward_kernel, backward, {"MODE": mode, **BACKWARD}, name=f"damped_sine backward {name}"))
    pointers = ("partial", "amplitude", "d_amplitude", "d_frequency", "d_damping")
    sums = {f"{pointer}_ptr": "*fp32:16" for pointer in pointers} | {"row_programs": "i32", "features": "i32:16"}
    return [*found, Configuration(_reduce_kernel, sums, REDUCE, name="damped_sine reduce")]


def refuses(z: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, *, mode: str = "abs") -> str | None:
    return refuses_device(z) or refuses_dtype("z", z)


@OP.offer("triton", refuses)
def _serve(z: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, *, mode: str = "abs") -> Tensor:
    return damped_sine_triton(z, amplitude, frequency, damping, mode)
