"""Root-mean-square normalization of rows, with an optional residual addition in front.

    h = x + residual
    y = h / sqrt(mean(h^2) + eps) * weight
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .registry import Op

OP = Op("rms_norm")


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalize every row of x to a root mean square of 1, then scale each feature.

    x         (..., F)  float16, bfloat16, float32 or float64; any strides; F >= 1
    weight    (F,)      x's dtype, or float32 beside a narrower x
    residual            shaped as x, in x's dtype or, beside a float32 x, a half; given: h = x + residual, rounded to x's dtype, is
                        what gets normalized
    eps                 > 0, added to the mean square, in x's unit squared
    dtype               of y: None, x's; or, beside a float32 x, a half, as the products that read y want under torch.autocast
    backend             "auto", "triton", "native" or "torch"

    Returns y (..., F); with a residual the pair (y, h), h in x's dtype. The mean and the quotient are computed in float32 at
    least and rounded once. Differentiable in x, weight and residual; the weight's gradient is reduced in a fixed order.
    Raises ValueError for other shapes or dtypes; BackendError if `backend` was named and cannot serve.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    if not is_dynamo_compiling() and (y := OP.at_once(backend, x, weight, residual, eps, dtype)) is not NotImplemented:
        return y
    dtype = x.dtype if dtype is None else dtype
    _check(x, weight, residual, eps, dtype)
    options = {"residual": residual, "eps": eps, "dtype": dtype}
    return OP.select(backend, x, weight, **options)(x, weight, **options)


@OP.specify
def reference(
    x: Tensor, weight: Tensor, *, residual: Tensor | None = None, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    y = y.to(dtype or x.dtype)
    return y if residual is None else (y, h)


def _check(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, dtype: torch.dtype) -> None:
    if x.dim() == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(
            f"rms_norm: x has shape {tuple(x.shape)} and dtype {x.dtype}; it must be a floating-point tensor (..., features) of at "
            "least one feature"
        )
    features = x.shape[-1]
    if weight.shape != (features,):
        raise ValueError(
            f"rms_norm: weight has shape {tuple(weight.shape)}, but x has {features} features (x is {tuple(x.shape)}); "
            f"pass one weight per feature, shape ({features},)"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    if weight.dtype not in (x.dtype, wide):
        raise ValueError(f"rms_norm: weight is {weight.dtype} beside a {x.dtype} x; pass it as {x.dtype} or {wide}")
    if weight.device != x.device:
        raise ValueError(f"rms_norm: weight is on {weight.device} and x on {x.device}; put them on one device")
    fitting = (x.dtype, torch.bfloat16, torch.float16) if x.dtype == torch.float32 else (x.dtype,)
    if residual is not None and (residual.shape != x.shape or residual.dtype not in fitting or residual.device != x.device):
        raise ValueError(
            f"rms_norm: residual is {tuple(residual.shape)} {residual.dtype} on {residual.device} and x is {tuple(x.shape)} "
            f"{x.dtype} on {x.device}; they are added, so pass both in one shape, dtype and device (beside a float32 x a residual "
            "may be a half)"
        )
    if dtype not in fitting:
        raise ValueError(f"rms_norm: dtype is {dtype}; of a {x.dtype} x, y can have {' or '.join(map(str, fitting))}")
    if not eps > 0:
        raise ValueError(f"rms_norm: eps is {eps}; it must be positive, or a row of zeros has no quotient")
