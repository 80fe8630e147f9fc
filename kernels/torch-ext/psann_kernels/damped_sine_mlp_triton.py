"""Triton twin of damped_sine_mlp and linear_damped_sine, for calls with fused=True. Read damped_sine_mlp.py and damped_sine_triton.py first.

Forward is a matrix product whose epilogue takes the sine, so that z is written only if a backward will read it: 2 * tokens * F bytes
saved beside a product and a sine, and a second time without gradients. The MLP's backward makes dz, db1 and the three sine gradients in
the epilogue of dy @ w2, whose output is then never written; sums over tokens are a row of partial sums a tile of tokens and one small
sum, in a fixed order. The other products are torch's own. Tiles in four stages take 64 KiB at most, which every target holds; backward's
are half as wide, because its epilogue keeps six numbers an element.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .damped_sine_mlp import offer_fused
from .damped_sine_triton import damped_sine_triton_backward, gradients_of_sine, sine_of
from .library import cast_dtype, define
from .rope_attention_tiles_triton import load_operand
from .triton_support import (
    Configuration,
    as_rows,
    narrow,
    refuses_device,
    split_turns,
    widen,
)

FORWARD = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}
BACKWARD = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}
LAUNCH = {"num_warps": 8, "num_stages": 4}
# Row tiles that run beside each other over all column tiles, so that the second-level cache serves both operands again.
GROUP = 8
# Widths are a multiple of this many elements, so that every row begins at whole 32 bytes and tiles are read 16 bytes at a time.
WHOLE = 16


@triton.jit
def _tile(rows, features, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Row tile, rows (BLOCK_M,), columns (BLOCK_N,) of this program."""
    program = tl.program_id(0).to(tl.int64)
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M).to(tl.int64), tl.cdiv(features, BLOCK_N).to(tl.int64)
    first = program // (GROUP * column_tiles) * GROUP
    count = tl.minimum(row_tiles - first, GROUP)
    within = program % (GROUP * column_tiles)
    row_tile = first + within % count
    return row_tile, row_tile * BLOCK_M + tl.arange(0, BLOCK_M), within // count * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def _product(
    a_ptr, b_ptr, r, c, rows, features, inner, a_stride, b_inner, b_column, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows r of a (rows, inner) times columns c of b, whose element (k, c) lies at k * b_inner + c * b_column."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    for _ in range(0, inner, BLOCK_K):
        a = load_operand(a_ptr + r[:, None] * a_stride + k[None, :], (r < rows)[:, None] & (k < inner)[None, :])
        b = load_operand(b_ptr + k[:, None] * b_inner + c[None, :] * b_column, (k < inner)[:, None] & (c < features)[None, :])
        total = tl.dot(a, b, total, input_precision="ieee")
        k += BLOCK_K
    return total


@triton.jit
def _forward_kernel(
    x_ptr, w_ptr, bias_ptr, amplitude_ptr, frequency_ptr, damping_ptr, z_ptr, y_ptr, rows, features, inner, x_stride, w_stride,
    MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    _, r, c = _tile(rows, features, BLOCK_M, BLOCK_N, GROUP)
    inside = c < features
    here = (r < rows)[:, None] & inside[None, :]
    dtype: tl.constexpr = y_ptr.dtype.element_ty

    z = _product(x_ptr, w_ptr, r, c, rows, features, inner, x_stride, 1, w_stride, BLOCK_M, BLOCK_N, BLOCK_K)
    if bias_ptr is not None:
        z += widen(tl.load(bias_ptr + c, mask=inside, other=0.0))[None, :]
    # Rounded even where it is not kept, so that asking for gradients does not change the result.
    rounded = narrow(z, dtype)
    if z_ptr is not None:
        tl.store(z_ptr + r[:, None] * features + c[None, :], rounded, mask=here)

    amplitude = tl.load(amplitude_ptr + c, mask=inside, other=0.0)[None, :]
    damping = tl.load(damping_ptr + c, mask=inside, other=0.0)[None, :]
    high, low = split_turns(tl.load(frequency_ptr + c, mask=inside, other=0.0)[None, :])
    z = widen(rounded)
    y = sine_of(z, amplitude, high, low, damping, MODE, dtype)
    tl.store(y_ptr + r[:, None] * features + c[None, :], narrow(y, dtype), mask=here)


@triton.jit
def _backward_kernel(
    dy_ptr, w_ptr, z_ptr, amplitude_ptr, frequency_ptr, damping_ptr, dz_ptr, partial_ptr, rows, features, inner, dy_stride, w_stride,
    MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # w is (inner, features); partial_ptr is (row tiles, 4, features): of amplitude, frequency, damping, bias.
    row_tile, r, c = _tile(rows, features, BLOCK_M, BLOCK_N, GROUP)
    inside = c < features
    here = (r < rows)[:, None] & inside[None, :]
    dtype: tl.constexpr = dz_ptr.dtype.element_ty

    dh = _product(dy_ptr, w_ptr, r, c, rows, features, inner, dy_stride, w_stride, 1, BLOCK_M, BLOCK_N, BLOCK_K)

    amplitude = tl.load(amplitude_ptr + c, mask=inside, other=0.0)[None, :]
    frequency = tl.load(frequency_ptr + c, mask=inside, other=0.0)[None, :]
    damping = tl.load(damping_ptr + c, mask=inside, other=0.0)[None, :]
    high, low = split_turns(frequency)
    z = widen(tl.load(z_ptr + r[:, None] * features + c[None, :], mask=here, other=0.0))
    dz, ps, pc, g = gradients_of_sine(dh, z, high, low, damping, amplitude * frequency, amplitude * damping, MODE, dtype)
    tl.store(dz_ptr + r[:, None] * features + c[None, :], narrow(dz, dtype), mask=here)

    partial = partial_ptr + row_tile * 4 * features + c
    tl.store(partial, tl.sum(ps, 0), mask=inside)
    tl.store(partial + features, tl.sum(z * pc, 0), mask=inside)
    tl.store(partial + features + features, tl.sum(g * ps, 0), mask=inside)
    tl.store(partial + features + features + features, tl.sum(dz, 0), mask=inside)


def grid(rows: int, features: int, tile: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(features, tile["BLOCK_N"]),)


def aligned(t: Tensor) -> Tensor:
    """t (rows, columns) with rows of unit stride that begin at whole 16 bytes; copied only where it has another form."""
    t = as_rows(t)
    return t if t.stride(0) % WHOLE == 0 and t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format)


def _hidden(
    x: Tensor, w: Tensor, b: Tensor | None, amplitude: Tensor, frequency: Tensor, damping: Tensor, mode: str, keeps_z: bool
) -> tuple[Tensor, Tensor]:
    """y (rows, F) of x (rows, K), and z, which is (0,) unless it is to be kept."""
    rows, features = x.shape[0], w.shape[0]
    y = torch.empty((rows, features), dtype=x.dtype, device=x.device)
    z = torch.empty((rows, features) if keeps_z else (0,), dtype=x.dtype, device=x.device)
    if y.numel():
        x, w = aligned(x), aligned(w)
        _forward_kernel[grid(rows, features, FORWARD)](
            x, w, None if b is None else b.contiguous(), amplitude.contiguous(), frequency.contiguous(), damping.contiguous(),
            z if keeps_z else None, y, rows, features, x.shape[1], x.stride(0), w.stride(0), MODE=mode, GROUP=GROUP, **FORWARD, **LAUNCH,
            enable_fp_fusion=True,
        )  # fmt: skip
    return y, z


def _hidden_fake(x: Tensor, w: Tensor, b: Tensor | None, a: Tensor, f: Tensor, d: Tensor, mode: str, keeps_z: bool) -> tuple[Tensor, Tensor]:
    shape = x.shape[0], w.shape[0]
    return x.new_empty(shape), x.new_empty(shape if keeps_z else (0,))


def _setup_hidden(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w, b, *parameters, ctx.mode, ctx.keeps_z = inputs
    ctx.has_bias = b is not None
    ctx.save_for_backward(x, w, *parameters, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate_hidden(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.keeps_z:
        raise RuntimeError("linear_damped_sine_triton: a gradient is asked for, but keeps_z was False")
    x, w, *parameters, z = ctx.saved_tensors
    dz, *d_parameters = damped_sine_triton_backward(dy, z, *parameters, ctx.mode)
    db = dz.sum(0, dtype=torch.float32).to(dz.dtype) if ctx.has_bias else None
    return dz @ w, dz.t() @ x, db, *d_parameters, None, None


def _mlp_backward(
    dy: Tensor, w2: Tensor, z: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, mode: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dz (rows, F) and the gradients of amplitude, frequency, damping and b1, each (F,) float32."""
    rows, features = z.shape
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    tiles = triton.cdiv(rows, BACKWARD["BLOCK_M"])
    partial = torch.empty((tiles, 4, features), dtype=torch.float32, device=z.device)
    if z.numel():
        dy, w2 = aligned(dy), aligned(w2)
        _backward_kernel[grid(rows, features, BACKWARD)](
            dy, w2, z, amplitude.contiguous(), frequency.contiguous(), damping.contiguous(), dz, partial, rows, features, dy.shape[1],
            dy.stride(0), w2.stride(0), MODE=mode, GROUP=GROUP, **BACKWARD, **LAUNCH, enable_fp_fusion=True,
        )  # fmt: skip
    sums = partial.sum(0)
    return dz, sums[0].clone(), amplitude * sums[1], -amplitude * sums[2], sums[3].clone()


def _setup_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, w1, b1, *parameters, w2, b2, ctx.mode, ctx.keeps_z = inputs
    ctx.has_biases = b1 is not None, b2 is not None
    _, h, z = output
    ctx.save_for_backward(x, w1, *parameters, w2, h, z)
    ctx.mark_non_differentiable(h, z)


def _differentiate_mlp(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.keeps_z:
        raise RuntimeError("damped_sine_mlp_triton: a gradient is asked for, but keeps_z was False")
    x, w1, *parameters, w2, h, z = ctx.saved_tensors
    dz, d_amplitude, d_frequency, d_damping, db1 = mlp_backward(dy, w2, z, *parameters, ctx.mode)
    db1 = db1.to(x.dtype) if ctx.has_biases[0] else None
    db2 = dy.sum(0, dtype=torch.float32).to(x.dtype) if ctx.has_biases[1] else None
    return dz @ w1, dz.t() @ x, db1, d_amplitude, d_frequency, d_damping, dy.t() @ h, db2, None, None


_SINE = "Tensor amplitude, Tensor frequency, Tensor damping"
hidden = define(
    f"linear_damped_sine_triton(Tensor x, Tensor w, Tensor? b, {_SINE}, str mode, bool keeps_z) -> (Tensor, Tensor)",
    _hidden, _hidden_fake, _differentiate_hidden, _setup_hidden,
)  # fmt: skip
mlp_backward = define(
    f"damped_sine_mlp_triton_backward(Tensor dy, Tensor w2, Tensor z, {_SINE}, str mode) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _mlp_backward,
    lambda dy, w2, z, a, f, d, mode: (z.new_empty(z.shape), *(z.new_empty(z.shape[1:], dtype=torch.float32) for _ in range(4))),
)


def _mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, a: Tensor, f: Tensor, d: Tensor, w2: Tensor, b2: Tensor | None, mode: str, keeps_z: bool
) -> tuple[Tensor, Tensor, Tensor]:
    h, z = _hidden(x, w1, b1, a, f, d, mode, keeps_z)
    with torch.autocast(x.device.type, enabled=False):
        y = torch.nn.functional.linear(h, w2, b2)
    return y, h if keeps_z else h.new_empty(0), z


def _mlp_fake(
    x: Tensor, w1: Tensor, b1: Tensor | None, a: Tensor, f: Tensor, d: Tensor, w2: Tensor, b2: Tensor | None, mode: str, keeps_z: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kept = (x.shape[0], w1.shape[0]) if keeps_z else (0,)
    return x.new_empty((x.shape[0], w2.shape[0])), x.new_empty(kept), x.new_empty(kept)


mlp = define(
    f"damped_sine_mlp_triton(Tensor x, Tensor w1, Tensor? b1, {_SINE}, Tensor w2, Tensor? b2, str mode, bool keeps_z)"
    " -> (Tensor, Tensor, Tensor)",
    _mlp, _mlp_fake, _differentiate_mlp, _setup_mlp,
)  # fmt: skip


def configurations() -> list[Configuration]:
    """With z and without, the widest envelope; float16 compiles like bfloat16."""
    types = {f"{parameter}_ptr": "*fp32:16" for parameter in ("amplitude", "frequency", "damping", "partial")} | {"rows": "i32"}

    def one(kernel: Any, name: str, tile: dict[str, int], **absent: None) -> Configuration:
        constants = {"MODE": "abs", "GROUP": GROUP, **tile, **absent}
        signature = {
            argument: types.get(argument, "*bf16:16" if argument.endswith("_ptr") else "i32:16")
            for argument in kernel.arg_names
            if argument not in constants
        }
        return Configuration(kernel, signature, constants, name=f"damped_sine_mlp {name}", **LAUNCH)

    return [
        one(_forward_kernel, "forward bf16", FORWARD),
        one(_forward_kernel, "forward bf16 without z", FORWARD, z_ptr=None),
        one(_backward_kernel, "backward bf16", BACKWARD),
    ]


def refuses(x: Tensor, w: Tensor, b: Tensor | None, *rest: Any, mode: str = "abs") -> str | None:
    if (dtype := cast_dtype(x)) not in (torch.float16, torch.bfloat16):
        return f"x is {dtype} and fused=True; the fused kernels serve float16 and bfloat16"
    widths = (*w.shape, *(rest[3].shape if len(rest) > 3 else ()))
    if any(width % WHOLE or width == 0 for width in widths):
        return f"the weights' widths are {widths} and fused=True; the fused kernels serve multiples of {WHOLE}"
    return refuses_device(x)


def _prepared(*tensors: Tensor | None) -> tuple[bool, list[Tensor | None]]:
    """Whether any of them needs a gradient, and the tensors as autocast has them."""
    keeps = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    dtype = cast_dtype(tensors[0])
    return keeps, [None if t is None else t.to(dtype) for t in tensors]


def _serve_linear(x: Tensor, w: Tensor, b: Tensor | None, *parameters: Tensor, mode: str) -> Tensor:
    keeps, (rows, w, b) = _prepared(x, w, b)
    keeps = keeps or (torch.is_grad_enabled() and any(t.requires_grad for t in parameters))
    return hidden(rows.reshape(-1, x.shape[-1]), w, b, *parameters, mode, keeps)[0].reshape(*x.shape[:-1], w.shape[0])


def _serve_mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, a: Tensor, f: Tensor, d: Tensor, w2: Tensor, b2: Tensor | None, *, mode: str
) -> Tensor:
    keeps, (rows, w1, b1, w2, b2) = _prepared(x, w1, b1, w2, b2)
    keeps = keeps or (torch.is_grad_enabled() and any(t.requires_grad for t in (a, f, d)))
    return mlp(rows.reshape(-1, x.shape[-1]), w1, b1, a, f, d, w2, b2, mode, keeps)[0].reshape(*x.shape[:-1], w2.shape[0])


offer_fused(refuses, _serve_linear, _serve_mlp)
