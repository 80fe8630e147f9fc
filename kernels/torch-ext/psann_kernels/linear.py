"""Linear layer whose weights may be narrower than its input: what decoding reads most.

    y = (x @ weight^T) * scale + bias
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

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
    if not is_dynamo_compiling() and (y := OP.at_once(backend, x, weight, scale, bias)) is not NotImplemented:
        return y
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
    # A call of a small layer takes tens of microseconds: what is absent is not looked at.
    dtype, other, shape = x.dtype, weight.dtype, weight.shape
    if not dtype.is_floating_point or x.dim() == 0:
        raise ValueError(f"linear: x has shape {tuple(x.shape)} and dtype {dtype}; it must be floating point, (..., K)")
    if len(shape) != 2 or shape[1] != x.shape[-1]:
        raise ValueError(
            f"linear: weight has shape {tuple(shape)}, but x has {x.shape[-1]} inputs (x is {tuple(x.shape)}); "
            f"pass (N, {x.shape[-1]})"
        )
    if other != dtype and other not in WEIGHT_DTYPES:
        raise ValueError(f"linear: weight is {other}; it must be {', '.join(map(str, WEIGHT_DTYPES))} or x's {dtype}")
    if (scale is None) == (other == torch.int8):
        raise ValueError(
            f"linear: weight is {other} and scale is {'missing' if scale is None else 'given'}; an int8 weight has one scale "
            f"per row, shape ({shape[0]},), and no other weight has any"
        )
    _check_device("weight", weight, x)
    if scale is not None:
        _check_vector("scale", scale, x, shape[0], (torch.float32,))
    if bias is not None:
        _check_vector("bias", bias, x, shape[0], (torch.float32, dtype))


def _check_vector(name: str, t: Tensor, x: Tensor, outputs: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if t.shape != (outputs,) or t.dtype not in dtypes:
        raise ValueError(
            f"linear: {name} is {t.dtype} {tuple(t.shape)}; pass {' or '.join(map(str, dtypes))} ({outputs},), one per output"
        )
    _check_device(name, t, x)


def _check_device(name: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"linear: {name} is on {t.device} and x on {x.device}; put them on one device")
