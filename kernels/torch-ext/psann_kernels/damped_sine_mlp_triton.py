"""Triton twin of damped_sine_mlp and linear_damped_sine, for calls with fused=True. Read damped_sine_mlp.py and
damped_sine_triton.py first.

Forward is a matrix product whose epilogue takes the sine, so that z is written only if a backward will read it: 2 * tokens * F
bytes saved beside a product and a sine, and a second time without gradients. The MLP's backward makes dz, db1 and the three sine
gradients in the epilogue of dy @ w2, whose output is then never written; sums over tokens are a row of partial sums a tile of
tokens and one small sum, in a fixed order. The other products are torch's own.

An epilogue takes its tile in PARTS, ranges of columns one after another, so that only one part's numbers are in registers beside
the product. On sm_90 and sm_100 the products read by descriptors, elsewhere, and where a row repeats, through pointers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .damped_sine_mlp import offer_fused
from .damped_sine_triton import damped_sine_triton_backward, gradients_of_sine, sine_of
from .descriptor_triton import described, has_tma, is_describable
from .library import cast_dtype, define, without_autocast
from .rope_attention_tiles_triton import load_operand
from .triton_support import (
    INTERPRET,
    Configuration,
    as_rows,
    narrow,
    refuses_device,
    split_turns,
    widen,
)

# Through pointers: 64 KiB in four stages, which every target holds; backward's tiles are half as wide, as its epilogue keeps six
# numbers an element.
FORWARD = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "PARTS": 4, "num_warps": 8, "num_stages": 4}
BACKWARD = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "PARTS": 2, "num_warps": 8, "num_stages": 4}
# By descriptors: 96 KiB and so few registers that a multiprocessor of sm_90 holds two programs (the gate asserts it), of which one
# can multiply while the other is in its epilogue. Tiles of 128 by 256 would read less, but fill a multiprocessor (192 KiB, more
# than 220 registers), whose tensor cores are then idle in every epilogue: by arithmetic, not measured, a large share of a product
# over the few columns for which fusing is meant.
DESCRIBED_FORWARD = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "PARTS": 4, "num_warps": 8, "num_stages": 3}
DESCRIBED_BACKWARD = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "PARTS": 4, "num_warps": 4, "num_stages": 4}
# Row tiles that run beside each other over all column tiles, so that the second-level cache serves both operands again.
GROUP = 8
# Widths are a multiple of this many elements, so that every row begins at whole 32 bytes and tiles are read 16 bytes at a time.
WHOLE = 16


@triton.jit
def _tile(rows, features, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Row tile, first row and first column of this program, int64."""
    program = tl.program_id(0).to(tl.int64)
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M).to(tl.int64), tl.cdiv(features, BLOCK_N).to(tl.int64)
    first = program // (GROUP * column_tiles) * GROUP
    count = tl.minimum(row_tiles - first, GROUP)
    within = program % (GROUP * column_tiles)
    row_tile = first + within % count
    return row_tile, row_tile * BLOCK_M, within // count * BLOCK_N


@triton.jit
def _product(
    a_ptr, b_ptr, row, column, rows, features, inner, a_stride, b_stride, IS_TRANSPOSED: tl.constexpr, IS_DESCRIBED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile (BLOCK_M, BLOCK_N) from `row` and `column` on, float32, of a (rows, inner) times b (inner, features).

    a_ptr, b_ptr    pointers, or with IS_DESCRIBED descriptors
    IS_TRANSPOSED   b lies in memory as (features, inner)
    """
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if IS_DESCRIBED:
        r, c = row.to(tl.int32), column.to(tl.int32)
        for k in range(0, inner, BLOCK_K):
            a = a_ptr.load([r, k])
            b = b_ptr.load([c, k]).T if IS_TRANSPOSED else b_ptr.load([k, c])
            if INTERPRET:
                a, b = widen(a), widen(b)
            total = tl.dot(a, b, total, input_precision="ieee")
    else:
        r, c = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        b_inner, b_column = (1, b_stride) if IS_TRANSPOSED else (b_stride, 1)
        k = tl.arange(0, BLOCK_K).to(tl.int64)
        for _ in range(0, inner, BLOCK_K):
            a = load_operand(a_ptr + r[:, None] * a_stride + k[None, :], (r < rows)[:, None] & (k < inner)[None, :])
            b = load_operand(b_ptr + k[:, None] * b_inner + c[None, :] * b_column, (k < inner)[:, None] & (c < features)[None, :])
            total = tl.dot(a, b, total, input_precision="ieee")
            k += BLOCK_K
    return total


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of x (ROWS, COLUMNS)."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _finish_forward(
    z, row, column, bias_ptr, amplitude_ptr, frequency_ptr, damping_ptr, z_ptr, y_ptr, rows, features,
    MODE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Bias and sine of a tile z (ROWS, COLUMNS), from `row` and `column` on, in PARTS column ranges one after another."""
    if PARTS > 1:
        left, right = _halves(z, ROWS, COLUMNS)
        _finish_forward(
            left, row, column, bias_ptr, amplitude_ptr, frequency_ptr, damping_ptr, z_ptr, y_ptr, rows, features,
            MODE, ROWS, COLUMNS // 2, PARTS // 2,
        )  # fmt: skip
        _finish_forward(
            right, row, column + COLUMNS // 2, bias_ptr, amplitude_ptr, frequency_ptr, damping_ptr, z_ptr, y_ptr, rows, features,
            MODE, ROWS, COLUMNS // 2, PARTS // 2,
        )  # fmt: skip
    else:
        dtype: tl.constexpr = y_ptr.dtype.element_ty
        r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        inside = c < features
        here = (r < rows)[:, None] & inside[None, :]
        if bias_ptr is not None:
            z += widen(tl.load(bias_ptr + c, mask=inside, other=0.0))[None, :]
        # Rounded even where it is not kept, so that asking for gradients does not change the result.
        rounded = narrow(z, dtype)
        if z_ptr is not None:
            tl.store(z_ptr + r[:, None] * features + c[None, :], rounded, mask=here)

        amplitude = tl.load(amplitude_ptr + c, mask=inside, other=0.0)[None, :]
        damping = tl.load(damping_ptr + c, mask=inside, other=0.0)[None, :]
        high, low = split_turns(tl.load(frequency_ptr + c, mask=inside, other=0.0)[None, :])
        y = sine_of(widen(rounded), amplitude, high, low, damping, MODE, dtype)
        tl.store(y_ptr + r[:, None] * features + c[None, :], narrow(y, dtype), mask=here)


@triton.jit
def _forward_kernel(
    x_ptr, w_ptr, bias_ptr, amplitude_ptr, frequency_ptr, damping_ptr, z_ptr, y_ptr, rows, features, inner, x_stride, w_stride,
    MODE: tl.constexpr, IS_DESCRIBED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    _, row, column = _tile(rows, features, BLOCK_M, BLOCK_N, GROUP)
    z = _product(
        x_ptr, w_ptr, row, column, rows, features, inner, x_stride, w_stride, True, IS_DESCRIBED, BLOCK_M, BLOCK_N, BLOCK_K
    )  # fmt: skip
    _finish_forward(
        z, row, column, bias_ptr, amplitude_ptr, frequency_ptr, damping_ptr, z_ptr, y_ptr, rows, features,
        MODE, BLOCK_M, BLOCK_N, PARTS,
    )  # fmt: skip


@triton.jit
def _finish_backward(
    dh, row, column, z_ptr, amplitude_ptr, frequency_ptr, damping_ptr, dz_ptr, partial_ptr, rows, features,
    MODE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dz and the sums over rows of a tile dh (ROWS, COLUMNS), as _finish_forward. partial_ptr is this row tile's (4, features)."""
    if PARTS > 1:
        left, right = _halves(dh, ROWS, COLUMNS)
        _finish_backward(
            left, row, column, z_ptr, amplitude_ptr, frequency_ptr, damping_ptr, dz_ptr, partial_ptr, rows, features,
            MODE, ROWS, COLUMNS // 2, PARTS // 2,
        )  # fmt: skip
        _finish_backward(
            right, row, column + COLUMNS // 2, z_ptr, amplitude_ptr, frequency_ptr, damping_ptr, dz_ptr, partial_ptr, rows,
            features, MODE, ROWS, COLUMNS // 2, PARTS // 2,
        )  # fmt: skip
    else:
        dtype: tl.constexpr = dz_ptr.dtype.element_ty
        r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        inside = c < features
        here = (r < rows)[:, None] & inside[None, :]
        amplitude = tl.load(amplitude_ptr + c, mask=inside, other=0.0)[None, :]
        frequency = tl.load(frequency_ptr + c, mask=inside, other=0.0)[None, :]
        damping = tl.load(damping_ptr + c, mask=inside, other=0.0)[None, :]
        high, low = split_turns(frequency)
        z = widen(tl.load(z_ptr + r[:, None] * features + c[None, :], mask=here, other=0.0))
        dz, ps, pc, g = gradients_of_sine(dh, z, high, low, damping, amplitude * frequency, amplitude * damping, MODE, dtype)
        tl.store(dz_ptr + r[:, None] * features + c[None, :], narrow(dz, dtype), mask=here)

        partial = partial_ptr + c
        tl.store(partial, tl.sum(ps, 0), mask=inside)
        tl.store(partial + features, tl.sum(z * pc, 0), mask=inside)
        tl.store(partial + features + features, tl.sum(g * ps, 0), mask=inside)
        tl.store(partial + features + features + features, tl.sum(dz, 0), mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr, w_ptr, z_ptr, amplitude_ptr, frequency_ptr, damping_ptr, dz_ptr, partial_ptr, rows, features, inner, dy_stride,
    w_stride, MODE: tl.constexpr, IS_DESCRIBED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # w is (inner, features); partial_ptr is (row tiles, 4, features): of amplitude, frequency, damping, bias.
    row_tile, row, column = _tile(rows, features, BLOCK_M, BLOCK_N, GROUP)
    dh = _product(
        dy_ptr, w_ptr, row, column, rows, features, inner, dy_stride, w_stride, False, IS_DESCRIBED, BLOCK_M, BLOCK_N, BLOCK_K
    )  # fmt: skip
    _finish_backward(
        dh, row, column, z_ptr, amplitude_ptr, frequency_ptr, damping_ptr, dz_ptr, partial_ptr + row_tile * 4 * features, rows,
        features, MODE, BLOCK_M, BLOCK_N, PARTS,
    )  # fmt: skip


def grid(rows: int, features: int, tile: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(features, tile["BLOCK_N"]),)


def chosen(by_pointers: dict[str, int], by_descriptors: dict[str, int], a: Tensor, b: Tensor) -> tuple[dict[str, int], bool]:
    """The tile for a product of two matrices, and whether it reads them by descriptors."""
    is_described = has_tma(a.device) and is_describable(a) and is_describable(b)
    return (by_descriptors if is_described else by_pointers), is_described


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
        tile, is_described = chosen(FORWARD, DESCRIBED_FORWARD, x, w)
        _forward_kernel[grid(rows, features, tile)](
            described(x, [tile["BLOCK_M"], tile["BLOCK_K"]]) if is_described else x,
            described(w, [tile["BLOCK_N"], tile["BLOCK_K"]]) if is_described else w,
            None if b is None else b.contiguous(), amplitude.contiguous(), frequency.contiguous(), damping.contiguous(),
            z if keeps_z else None, y, rows, features, x.shape[1], x.stride(0), w.stride(0),
            MODE=mode, IS_DESCRIBED=is_described, GROUP=GROUP, **tile, enable_fp_fusion=True,
        )  # fmt: skip
    return y, z


def _hidden_fake(
    x: Tensor, w: Tensor, b: Tensor | None, a: Tensor, f: Tensor, d: Tensor, mode: str, keeps_z: bool
) -> tuple[Tensor, Tensor]:
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
    dy, w2 = aligned(dy), aligned(w2)
    tile, is_described = chosen(BACKWARD, DESCRIBED_BACKWARD, dy, w2)
    partial = torch.empty((triton.cdiv(rows, tile["BLOCK_M"]), 4, features), dtype=torch.float32, device=z.device)
    if z.numel():
        _backward_kernel[grid(rows, features, tile)](
            described(dy, [tile["BLOCK_M"], tile["BLOCK_K"]]) if is_described else dy,
            described(w2, [tile["BLOCK_K"], tile["BLOCK_N"]]) if is_described else w2,
            z, amplitude.contiguous(), frequency.contiguous(), damping.contiguous(), dz, partial, rows, features, dy.shape[1],
            dy.stride(0), w2.stride(0), MODE=mode, IS_DESCRIBED=is_described, GROUP=GROUP, **tile, enable_fp_fusion=True,
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
    f"damped_sine_mlp_triton_backward(Tensor dy, Tensor w2, Tensor z, {_SINE}, str mode)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _mlp_backward,
    lambda dy, w2, z, a, f, d, mode: (z.new_empty(z.shape), *(z.new_empty(z.shape[1:], dtype=torch.float32) for _ in range(4))),
)


def _mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, a: Tensor, f: Tensor, d: Tensor, w2: Tensor, b2: Tensor | None, mode: str,
    keeps_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    h, z = _hidden(x, w1, b1, a, f, d, mode, keeps_z)
    with without_autocast(x.device):
        y = torch.nn.functional.linear(h, w2, b2)
    return y, h if keeps_z else h.new_empty(0), z


def _mlp_fake(
    x: Tensor, w1: Tensor, b1: Tensor | None, a: Tensor, f: Tensor, d: Tensor, w2: Tensor, b2: Tensor | None, mode: str,
    keeps_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kept = (x.shape[0], w1.shape[0]) if keeps_z else (0,)
    return x.new_empty((x.shape[0], w2.shape[0])), x.new_empty(kept), x.new_empty(kept)


mlp = define(
    f"damped_sine_mlp_triton(Tensor x, Tensor w1, Tensor? b1, {_SINE}, Tensor w2, Tensor? b2, str mode, bool keeps_z)"
    " -> (Tensor, Tensor, Tensor)",
    _mlp, _mlp_fake, _differentiate_mlp, _setup_mlp,
)  # fmt: skip


def configurations() -> list[Configuration]:
    """With z and without, the widest envelope; float16 compiles like bfloat16. Where most calls read by descriptors, the form
    through pointers is listed once in each direction, with z."""
    types = {f"{parameter}_ptr": "*fp32:16" for parameter in ("amplitude", "frequency", "damping", "partial")} | {"rows": "i32"}
    tma, others = ("sm_90", "sm_100"), ("sm_80", "sm_120", "gfx942")

    def one(
        kernel: Any, name: str, tile: dict[str, int], targets: tuple[str, ...] | None, blocks: dict[str, str] | None = None,
        **absent: None,
    ) -> Configuration:  # fmt: skip
        constants = {"MODE": "abs", "IS_DESCRIBED": blocks is not None, "GROUP": GROUP, **tile, **absent}
        launch = {option: constants.pop(option) for option in ("num_warps", "num_stages")}
        own = types
        for argument, sides in (blocks or {}).items():
            own = own | {argument: f"tensordesc<bf16[{','.join(str(tile['BLOCK_' + side]) for side in sides)}]>"}
        signature = {
            argument: own.get(argument, "*bf16:16" if argument.endswith("_ptr") else "i32:16")
            for argument in kernel.arg_names
            if argument not in constants
        }
        form = "" if blocks is None else " by descriptors"
        return Configuration(kernel, signature, constants, name=f"damped_sine_mlp {name}{form}", targets=targets, **launch)

    forward, backward = {"x_ptr": "MK", "w_ptr": "NK"}, {"dy_ptr": "MK", "w_ptr": "KN"}
    return [
        one(_forward_kernel, "forward bf16", FORWARD, None),
        one(_forward_kernel, "forward bf16 without z", FORWARD, others, z_ptr=None),
        one(_backward_kernel, "backward bf16", BACKWARD, None),
        one(_forward_kernel, "forward bf16", DESCRIBED_FORWARD, tma, forward),
        one(_forward_kernel, "forward bf16 without z", DESCRIBED_FORWARD, tma, forward, z_ptr=None),
        one(_backward_kernel, "backward bf16", DESCRIBED_BACKWARD, tma, backward),
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
