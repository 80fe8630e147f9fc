"""What closes a residual branch that has a weight of its own: h = x + alpha * branch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .registry import Op

OP = Op("scaled_add")


def scaled_add(x: Tensor, branch: Tensor, alpha: Tensor, *, backend: str = "auto") -> Tensor:
    """x + alpha * branch, rounded once.

    x        any shape  float16, bfloat16, float32 or float64
    branch              shaped as x, in x's dtype or, beside a float32 x, a half, as products give under torch.autocast
    alpha    (1,)       x's dtype, or float32 beside a narrower x
    backend             "auto", "native" or "torch"

    Returns x's shape and dtype. Differentiable in all three; alpha's gradient is reduced in a fixed order.
    Raises ValueError for other shapes or dtypes; BackendError if `backend` was named and cannot serve.
    Source: weights of residual branches, Bachlechner et al. 2020, arXiv:2003.04887.
    """
    if not is_dynamo_compiling() and (h := OP.at_once(backend, x, branch, alpha)) is not NotImplemented:
        return h
    _check(x, branch, alpha)
    return OP.select(backend, x, branch, alpha)(x, branch, alpha)


@OP.specify
def reference(x: Tensor, branch: Tensor, alpha: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) + alpha.to(wide) * branch.to(wide)).to(x.dtype)


def _check(x: Tensor, branch: Tensor, alpha: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"scaled_add: x is {x.dtype}; it must be floating point")
    fitting = (x.dtype, torch.bfloat16, torch.float16) if x.dtype == torch.float32 else (x.dtype,)
    if branch.shape != x.shape or branch.dtype not in fitting or branch.device != x.device:
        raise ValueError(
            f"scaled_add: branch is {tuple(branch.shape)} {branch.dtype} on {branch.device} and x is {tuple(x.shape)} {x.dtype} on "
            f"{x.device}; pass both in one shape, dtype and device (beside a float32 x a branch may be a half)"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    if alpha.shape != (1,) or alpha.dtype not in (x.dtype, wide) or alpha.device != x.device:
        raise ValueError(
            f"scaled_add: alpha is {tuple(alpha.shape)} {alpha.dtype} on {alpha.device}; beside x, {x.dtype} on {x.device}, pass "
            f"one number, shape (1,), in {x.dtype} or {wide}, on that device"
        )
