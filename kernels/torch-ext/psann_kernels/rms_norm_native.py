"""Native twin of rms_norm: csrc/cpu/rms_norm.cpp. Read rms_norm.py first.

Forward reads x (and residual) and writes y (and h); backward reads h and dy (and the gradient of h itself) and writes one
gradient, which serves x and residual alike. The root is recomputed while the row is in the first cache. The weight's gradient
is added up in blocks that follow from the number of rows alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .direct import shortcut
from .library import define
from .native import NATIVE, TYPES, address, launch, refuses_device, refuses_dtype, rows_of
from .rms_norm import OP


def _add_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    h = None if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return y, h
    memory, rows, stride = rows_of(x)
    added, _, added_stride = (None, 0, 0) if residual is None else rows_of(residual)
    weight = weight.contiguous()
    launch(
        "rms_norm_forward", x,
        memory.data_ptr(), address(added), weight.data_ptr(), y.data_ptr(), address(h), rows, x.shape[-1], stride,
        added_stride, eps, TYPES[x.dtype], TYPES[weight.dtype], TYPES[(x if added is None else added).dtype], TYPES[dtype],
    )  # fmt: skip
    return y, h


def _forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return _add_forward(x, None, weight, eps, dtype)[0]


def _backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, of the residual, whose dtype is given, and of the weight. The residual's is (0,) where x's serves it."""
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    dresidual = dx.new_empty((0,)) if dtype == h.dtype else torch.empty_like(dx, dtype=dtype)
    dweight = torch.empty_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)
    if h.numel() == 0:
        return dx, dresidual, dweight.zero_().to(weight.dtype)
    (memory, rows, stride), (dy_memory, _, dy_stride) = rows_of(h), rows_of(dy)
    dh_memory, _, dh_stride = (None, 0, 0) if dh is None else rows_of(dh)
    weight = weight.contiguous()
    launch(
        "rms_norm_backward", h,
        memory.data_ptr(), dy_memory.data_ptr(), address(dh_memory), weight.data_ptr(), dx.data_ptr(),
        0 if dtype == h.dtype else dresidual.data_ptr(), dweight.data_ptr(), rows, h.shape[-1], stride, dy_stride, dh_stride, eps,
        TYPES[h.dtype], TYPES[weight.dtype], TYPES[dtype], TYPES[dy.dtype],
        scratch=lambda cuda: cuda.rms_norm_partials(rows) * h.shape[-1],
    )  # fmt: skip
    return dx, dresidual, dweight.to(weight.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    h, weight = ctx.saved_tensors
    dx, _, dweight = _call_backward(dy, None, h, weight, ctx.eps, h.dtype)
    return dx, dweight, None, None


def _add_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, residual, weight, ctx.eps, _ = inputs
    ctx.dtype = residual.dtype
    # A gradient that nobody sent stays None, so that it is not read.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight)


def _add_differentiate(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return dh, None if dh is None else dh.to(ctx.dtype), None, None, None
    h, weight = ctx.saved_tensors
    dx, dresidual, dweight = _call_backward(dy, dh, h, weight, ctx.eps, ctx.dtype)
    return dx, dx if ctx.dtype == h.dtype else dresidual, dweight, None, None


rms_norm_native_backward = define(
    "rms_norm_native_backward(Tensor dy, Tensor? dh, Tensor h, Tensor weight, float eps, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    lambda dy, dh, h, weight, eps, dtype: (
        h.new_empty(h.shape), h.new_empty((0,) if dtype == h.dtype else h.shape, dtype=dtype), weight.new_empty(weight.shape)
    ),
)  # fmt: skip
rms_norm_native = define(
    "rms_norm_native(Tensor x, Tensor weight, float eps, ScalarType dtype) -> Tensor",
    _forward,
    lambda x, weight, eps, dtype: x.new_empty(x.shape, dtype=dtype),
    _differentiate,
    _setup_context,
)
add_rms_norm_native = define(
    "add_rms_norm_native(Tensor x, Tensor residual, Tensor weight, float eps, ScalarType dtype) -> (Tensor, Tensor)",
    _add_forward,
    lambda x, residual, weight, eps, dtype: (x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape)),
    _add_differentiate,
    _add_setup_context,
)
_call_backward = shortcut(rms_norm_native_backward, _backward)
_call = shortcut(rms_norm_native, _forward, _differentiate, _setup_context)
_call_add = shortcut(add_rms_norm_native, _add_forward, _add_differentiate, _add_setup_context)


def refuses(
    x: Tensor, weight: Tensor, *, residual: Tensor | None = None, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> str | None:  # fmt: skip
    dtypes = {x.dtype, dtype or x.dtype, x.dtype if residual is None else residual.dtype}
    if x.is_cuda and len(dtypes) > 1:
        return f"the CUDA kernel reads and writes one dtype, and x, residual and y have {', '.join(sorted(map(str, dtypes)))}"
    return refuses_device(x) or refuses_dtype("x", x)


@OP.offer("native", refuses, at_once=NATIVE.rms_norm_at_once)
def _serve(
    x: Tensor, weight: Tensor, *, residual: Tensor | None = None, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    dtype = dtype or x.dtype
    return _call(x, weight, eps, dtype) if residual is None else _call_add(x, residual, weight, eps, dtype)
