"""Linear layer whose weights may be narrower than its input: what decoding reads most.

    y = (x @ weight^T) * scale + bias
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import Op

OP = Op("linear")
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def linear(x: Tensor, weight: Tensor, *, scale: Tensor | None = None, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Multiply every row of x with a matrix, one scale per output row of an int8 one.

    x        (..., K)  float16, bfloat16, float32 or float64; any strides
    weight   (N, K)    x's dtype, float32, bfloat16, float16 or int8
    scale    (N,)      float32; what one unit of an int8 weight's row is worth; needed with int8, and with nothing else
    bias     (N,)      float32 or x's dtype; None: 0
    backend            "auto", "triton", "native" or "torch"

    Returns (..., N) in x's dtype. Products are summed in float32 at least, then scaled, then rounded once. Differentiable in x,
    in bias and in a floating-point weight.
    Raises ValueError for other shapes or dtypes; BackendError if `backend` was named and cannot serve.
    Source: weight-only quantization by output row, Dettmers et al. 2022, arXiv:2208.07339, without its outliers.
    """
    _check(x, weight, scale, bias)
    return OP.select(backend, x, weight, scale=scale, bias=bias)(x, weight, scale=scale, bias=bias)


@OP.specify
def reference(x: Tensor, weight: Tensor, *, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.to(wide).t()
    if scale is not None:
        y = y * scale.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K), floating point, as (int8 (N, K), scale (N,) float32): each row's largest magnitude becomes 127.

    A row of zeros gets scale 1. The error of a weight is at most half its row's scale.
    """
    largest = weight.detach().float().abs().amax(1)
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    return torch.round(weight.detach().float() / scale[:, None]).to(torch.int8), scale


def _check(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"linear: x has shape {tuple(x.shape)} and dtype {x.dtype}; it must be floating point, (..., K)")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"linear: weight has shape {tuple(weight.shape)}, but x has {x.shape[-1]} inputs (x is {tuple(x.shape)}); pass (N, {x.shape[-1]})"
        )
    if weight.dtype not in (*WEIGHT_DTYPES, x.dtype):
        raise ValueError(f"linear: weight is {weight.dtype}; it must be {', '.join(map(str, WEIGHT_DTYPES))} or x's {x.dtype}")
    if (scale is None) == (weight.dtype == torch.int8):
        raise ValueError(
            f"linear: weight is {weight.dtype} and scale is {'missing' if scale is None else 'given'}; an int8 weight has one scale "
            f"per row, shape ({weight.shape[0]},), and no other weight has any"
        )
    for name, t, dtypes in (("scale", scale, (torch.float32,)), ("bias", bias, (torch.float32, x.dtype))):
        if t is not None and (t.shape != weight.shape[:1] or t.dtype not in dtypes):
            raise ValueError(
                f"linear: {name} is {t.dtype} {tuple(t.shape)}; pass {' or '.join(map(str, dtypes))} ({weight.shape[0]},), one per output"
            )
    for name, t in (("weight", weight), ("scale", scale), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise ValueError(f"linear: {name} is on {t.device} and x on {x.device}; put them on one device")
