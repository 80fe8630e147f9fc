"""Triton twin of rms_norm. Read rms_norm.py first.

Rows up to MAX_TILE features are read once in each direction: forward reads x (and residual) and writes y (and h); backward
reads h and dy (and dh) and writes one gradient, which serves x and residual alike. Wider rows are read twice in each
direction. Backward keeps h alone: the quotient is recomputed, because the row is in registers anyway. The weight's gradient
reduces in two passes, a row of partial sums per program and one small sum, because atomics would let scheduling change it.

With q = 1 / sqrt(mean(h^2) + eps) and g = dy * weight:  dx = q * g - q^3 * mean(g * h) * h + dh,  dweight = sum(dy * h * q).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .library import define
from .rms_norm import OP
from .triton_support import Configuration, as_rows, narrow, refuses_device, refuses_dtype, widen

# Row programs whose partial sums the backward keeps: enough for any GPU, few enough that the second sum is small.
MAX_ROW_PROGRAMS = 512
# Features of a row that one program holds at once: 16 a thread and tensor in 16 warps, so that backward does not spill.
MAX_TILE = 8192
WIDE_TILE = 2048


@triton.jit
def _normalized(x_ptr, residual_ptr, x_offsets, residual_offsets, here):
    """What is normalized, in x's dtype: x, or x + residual rounded, because that is what backward and the next layer read."""
    x = tl.load(x_ptr + x_offsets, mask=here, other=0.0)
    if residual_ptr is not None:
        x = narrow(widen(x) + widen(tl.load(residual_ptr + residual_offsets, mask=here, other=0.0)), x_ptr.dtype.element_ty)
    return x


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, h_ptr, rows, features, x_stride, residual_stride, eps,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    r = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    c = tl.arange(0, BLOCK_F)[None, :]
    here = (r < rows) & (c < features)

    weight = widen(tl.load(weight_ptr + c, mask=c < features, other=0.0))
    rounded = _normalized(x_ptr, residual_ptr, r * x_stride + c, r * residual_stride + c, here)

    h = widen(rounded)
    q = tl.rsqrt(tl.sum(h * h, 1) / features + eps)[:, None]

    if residual_ptr is not None:
        tl.store(h_ptr + r * features + c, rounded, mask=here)
    tl.store(y_ptr + r * features + c, narrow(h * q * weight, y_ptr.dtype.element_ty), mask=here)


@triton.jit
def _forward_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, h_ptr, features, x_stride, residual_stride, eps,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    # One row a program, read once for its mean square and once more for the quotient.
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    if residual_ptr is not None:
        residual_ptr += row * residual_stride

    squares = tl.zeros((BLOCK_F,), tl.float32)
    c = tl.arange(0, BLOCK_F)
    for _ in range(0, features, BLOCK_F):
        h = widen(_normalized(x_ptr, residual_ptr, c, c, c < features))
        squares += h * h
        c += BLOCK_F
    q = tl.rsqrt(tl.sum(squares, 0) / features + eps)

    c = tl.arange(0, BLOCK_F)
    for _ in range(0, features, BLOCK_F):
        rounded = _normalized(x_ptr, residual_ptr, c, c, c < features)
        y = widen(rounded) * q * widen(tl.load(weight_ptr + c, mask=c < features, other=0.0))
        if residual_ptr is not None:
            tl.store(h_ptr + row * features + c, rounded, mask=c < features)
        tl.store(y_ptr + row * features + c, narrow(y, y_ptr.dtype.element_ty), mask=c < features)
        c += BLOCK_F


@triton.jit
def _backward_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, dx_ptr, partial_ptr, rows, features, dy_stride, dh_stride, h_stride, eps,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # The weight stays while row tiles stream past; partial_ptr is (row programs, features).
    program = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_F)[None, :]
    weight = widen(tl.load(weight_ptr + c, mask=c < features, other=0.0))

    sum_weight = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    r = (program * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    for _ in range(program, tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        here = (r < rows) & (c < features)
        h = widen(tl.load(h_ptr + r * h_stride + c, mask=here, other=0.0))
        dy = widen(tl.load(dy_ptr + r * dy_stride + c, mask=here, other=0.0))

        g = dy * weight
        q = tl.rsqrt(tl.sum(h * h, 1) / features + eps)[:, None]
        slope = q * q * q * (tl.sum(g * h, 1)[:, None] / features)
        sum_weight += dy * h * q
        dx = q * g - slope * h
        if dh_ptr is not None:
            dx += widen(tl.load(dh_ptr + r * dh_stride + c, mask=here, other=0.0))
        tl.store(dx_ptr + r * features + c, narrow(dx, dx_ptr.dtype.element_ty), mask=here)
        r += tl.num_programs(0).to(tl.int64) * BLOCK_R

    c = tl.arange(0, BLOCK_F)
    tl.store(partial_ptr + program * features + c, tl.sum(sum_weight, 0), mask=c < features)


@triton.jit
def _slopes_kernel(
    dy_ptr, h_ptr, weight_ptr, slopes_ptr, features, dy_stride, h_stride, eps, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # q and the factor of h in dx, for one row a program; slopes_ptr is (rows, 2).
    row = tl.program_id(0).to(tl.int64)
    h_ptr += row * h_stride
    dy_ptr += row * dy_stride

    squares = tl.zeros((BLOCK_F,), tl.float32)
    products = tl.zeros((BLOCK_F,), tl.float32)
    c = tl.arange(0, BLOCK_F)
    for _ in range(0, features, BLOCK_F):
        h = widen(tl.load(h_ptr + c, mask=c < features, other=0.0))
        dy = widen(tl.load(dy_ptr + c, mask=c < features, other=0.0))
        squares += h * h
        products += dy * widen(tl.load(weight_ptr + c, mask=c < features, other=0.0)) * h
        c += BLOCK_F

    q = tl.rsqrt(tl.sum(squares, 0) / features + eps)
    tl.store(slopes_ptr + row * 2, q)
    tl.store(slopes_ptr + row * 2 + 1, q * q * q * (tl.sum(products, 0) / features))


@triton.jit
def _backward_wide_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, slopes_ptr, dx_ptr, partial_ptr, rows, features, dy_stride, dh_stride, h_stride,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    # As _backward_kernel, over a tile of the columns, with each row's two numbers from _slopes_kernel.
    program = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    weight = widen(tl.load(weight_ptr + c, mask=c < features, other=0.0))

    sum_weight = tl.zeros((BLOCK_F,), tl.float32)
    row = program
    for _ in range(program, rows, tl.num_programs(0)):
        h = widen(tl.load(h_ptr + row * h_stride + c, mask=c < features, other=0.0))
        dy = widen(tl.load(dy_ptr + row * dy_stride + c, mask=c < features, other=0.0))
        q = tl.load(slopes_ptr + row * 2)
        slope = tl.load(slopes_ptr + row * 2 + 1)

        dx = q * (dy * weight) - slope * h
        if dh_ptr is not None:
            dx += widen(tl.load(dh_ptr + row * dh_stride + c, mask=c < features, other=0.0))
        tl.store(dx_ptr + row * features + c, narrow(dx, dx_ptr.dtype.element_ty), mask=c < features)

        sum_weight += dy * h * q
        row += tl.num_programs(0).to(tl.int64)

    tl.store(partial_ptr + program * features + c, sum_weight, mask=c < features)


def tile(features: int) -> tuple[int, int, int]:
    """(BLOCK_R, BLOCK_F, num_warps) where a row fits a tile: at least 1024 elements a program, 8 to 16 a thread."""
    block_f = triton.next_power_of_2(features)
    block_r = max(1, 1024 // block_f)
    return block_r, block_f, min(16, max(4, block_r * block_f // 512))


def _forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return _add_forward(x, None, weight, eps, dtype)[0]


def _add_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    h = y if residual is None else torch.empty_like(y, dtype=x.dtype)
    if x.numel() == 0:
        return y, h
    x_rows = as_rows(x)
    residual_rows = None if residual is None else as_rows(residual)
    rows, features = x_rows.shape
    strides = x_rows.stride(0), 0 if residual_rows is None else residual_rows.stride(0)
    if features > MAX_TILE:
        _forward_wide_kernel[(rows,)](
            x_rows, residual_rows, weight.contiguous(), y, h, features, *strides, eps,
            BLOCK_F=WIDE_TILE, enable_fp_fusion=True,
        )  # fmt: skip
        return y, h
    block_r, block_f, num_warps = tile(features)
    _forward_kernel[(triton.cdiv(rows, block_r),)](
        x_rows, residual_rows, weight.contiguous(), y, h, rows, features, *strides, eps,
        BLOCK_R=block_r, BLOCK_F=block_f, num_warps=num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return y, h


def _backward(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if h.numel() == 0:
        return dx, torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    h_rows, dy_rows = as_rows(h), as_rows(dy)
    dh_rows = None if dh is None else as_rows(dh)
    weight = weight.contiguous()
    rows, features = h_rows.shape
    strides = dy_rows.stride(0), 0 if dh_rows is None else dh_rows.stride(0), h_rows.stride(0)
    if features > MAX_TILE:
        slopes = torch.empty((rows, 2), dtype=torch.float32, device=h.device)
        _slopes_kernel[(rows,)](
            dy_rows, h_rows, weight, slopes, features, strides[0], strides[2], eps, BLOCK_F=WIDE_TILE, enable_fp_fusion=True
        )
        programs = min(rows, MAX_ROW_PROGRAMS)
        partial = torch.empty((programs, features), dtype=torch.float32, device=h.device)
        _backward_wide_kernel[(programs, triton.cdiv(features, WIDE_TILE))](
            dy_rows, dh_rows, h_rows, weight, slopes, dx, partial, rows, features, *strides,
            BLOCK_F=WIDE_TILE, enable_fp_fusion=True,
        )  # fmt: skip
    else:
        block_r, block_f, num_warps = tile(features)
        programs = min(triton.cdiv(rows, block_r), MAX_ROW_PROGRAMS)
        partial = torch.empty((programs, features), dtype=torch.float32, device=h.device)
        _backward_kernel[(programs,)](
            dy_rows, dh_rows, h_rows, weight, dx, partial, rows, features, *strides, eps,
            BLOCK_R=block_r, BLOCK_F=block_f, num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *rms_norm_triton_backward(dy, None, *ctx.saved_tensors, ctx.eps), None, None


def _add_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, residual, weight, ctx.eps, _ = inputs
    ctx.dtype = residual.dtype
    # A gradient that nobody sent stays None, so that it is not read.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight)


def _add_differentiate(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return dh, None if dh is None else dh.to(ctx.dtype), None, None, None
    dx, dweight = rms_norm_triton_backward(dy, dh, *ctx.saved_tensors, ctx.eps)
    return dx, dx.to(ctx.dtype), dweight, None, None


rms_norm_triton_backward = define(
    "rms_norm_triton_backward(Tensor dy, Tensor? dh, Tensor h, Tensor weight, float eps) -> (Tensor, Tensor)",
    _backward,
    lambda dy, dh, h, weight, eps: (h.new_empty(h.shape), weight.new_empty(weight.shape)),
)
rms_norm_triton = define(
    "rms_norm_triton(Tensor x, Tensor weight, float eps, ScalarType dtype) -> Tensor",
    _forward,
    lambda x, weight, eps, dtype: x.new_empty(x.shape, dtype=dtype),
    _differentiate,
    _setup_context,
)
add_rms_norm_triton = define(
    "add_rms_norm_triton(Tensor x, Tensor residual, Tensor weight, float eps, ScalarType dtype) -> (Tensor, Tensor)",
    _add_forward,
    lambda x, residual, weight, eps, dtype: (x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape)),
    _add_differentiate,
    _add_setup_context,
)


def refuses(x: Tensor, weight: Tensor, **options: Any) -> str | None:
    return refuses_device(x) or refuses_dtype("x", x)


@OP.offer("triton", refuses)
def _serve(
    x: Tensor, weight: Tensor, *, residual: Tensor | None = None, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    dtype = dtype or x.dtype
    return rms_norm_triton(x, weight, eps, dtype) if residual is None else add_rms_norm_triton(x, residual, weight, eps, dtype)


def configurations() -> list[Configuration]:
    """What dispatch can choose, at the widths where the tile or the number of warps changes."""
    found = []
    for dtype, features in (("bf16", 1024), ("bf16", 96), ("bf16", MAX_TILE), ("fp32", MAX_TILE)):
        block_r, block_f, num_warps = tile(features)
        for kernel, optional in ((_forward_kernel, "residual_ptr"), (_backward_kernel, "dh_ptr")):
            constants = dict(BLOCK_R=block_r, BLOCK_F=block_f)
            found.append(_configuration(kernel, dtype, features, constants, num_warps))
            if features == 1024 and dtype == "bf16":
                found.append(_configuration(kernel, dtype, features, constants | {optional: None}, num_warps))
    for kernel in (_forward_wide_kernel, _slopes_kernel, _backward_wide_kernel):
        found.append(_configuration(kernel, "bf16", 2 * MAX_TILE, dict(BLOCK_F=WIDE_TILE), 4))
    return found


def _configuration(kernel: Any, dtype: str, features: int, constants: dict[str, Any], num_warps: int) -> Configuration:
    types = {"weight_ptr": "*fp32:16", "slopes_ptr": "*fp32:16", "partial_ptr": "*fp32:16", "rows": "i32", "eps": "fp32"}
    signature = {
        name: types.get(name, f"*{dtype}:16" if name.endswith("_ptr") else "i32:16")
        for name in kernel.arg_names
        if name not in constants
    }
    absent = "".join(f" without {name.removesuffix('_ptr')}" for name, value in constants.items() if value is None)
    name = f"rms_norm {kernel.__name__.strip('_').removesuffix('_kernel')} {dtype} {features}{absent}"
    return Configuration(kernel, signature, constants, num_warps, name=name)
