"""Linear layer and damped sine as one op, and the MLP of one hidden layer around it.

    linear_damped_sine:  y = damped_sine(x @ w^T + b)
    damped_sine_mlp:     y = damped_sine(x @ w1^T + b1) @ w2^T + b2
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .damped_sine import OP as SINE
from .damped_sine import check_sine
from .library import cast_dtype
from .registry import Op


def _is_fused(*arguments: Any, fused: bool = False, **options: Any) -> bool:
    return fused


# The self-test tries the fused kernels; the parts answer for themselves, as damped_sine.
LINEAR = Op("linear_damped_sine", _is_fused)
MLP = Op("damped_sine_mlp", _is_fused)


def linear_damped_sine(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    amplitude: Tensor,
    frequency: Tensor,
    damping: Tensor,
    *,
    mode: str = "abs",
    fused: bool = False,
    backend: str = "auto",
) -> Tensor:
    """One layer of a SIREN: damped sine of x @ w^T + b.

    x                               (..., K)  float16, bfloat16, float32 or float64
    w                               (F, K)    x's dtype (anything that torch.autocast brings there)
    b                               (F,)      as w; None: 0
    amplitude, frequency, damping   (F,)      as in damped_sine, for x's dtype
    mode                                      "abs", "relu" or "none"
    fused                                     True: the sine is computed in the epilogue of one Triton matrix product ("triton",
                                              float16 and bfloat16); False: the product is torch's own and damped_sine follows
    backend                                   "auto", "triton", "native" or "torch"

    Returns (..., F) in x's dtype; the product is rounded to it before the sine, fused or not. Differentiable in all tensors.
    Which of the two is faster on which GPU has not been measured; by arithmetic (H200) fusing pays below about K = 2048.
    Raises ValueError for other shapes or dtypes; BackendError if `backend` was named, or fused asked for, and nothing can serve.
    Source: Sitzmann et al. 2020, arXiv:2006.09661.
    """
    _check_linear("linear_damped_sine", x, "w", w, "b", b)
    check_sine("linear_damped_sine", _like_hidden(x, w), amplitude, frequency, damping, mode)
    arguments, options = (x, w, b, amplitude, frequency, damping), {"mode": mode, "fused": fused}
    return LINEAR.select(_named(backend, fused), *arguments, **options)(*arguments, **options)


def damped_sine_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    amplitude: Tensor,
    frequency: Tensor,
    damping: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    *,
    mode: str = "abs",
    fused: bool = False,
    backend: str = "auto",
) -> Tensor:
    """linear -> damped sine -> linear.

    x                               (..., K)  float16, bfloat16, float32 or float64
    w1, b1                          (F, K), (F,) or None    x's dtype (anything that torch.autocast brings there)
    amplitude, frequency, damping   (F,)                    as in damped_sine, for x's dtype
    w2, b2                          (O, F), (O,) or None    as w1
    mode, fused, backend            as in linear_damped_sine; fused makes the gradient of the sine and of b1 in the epilogue of w2's
                                    product

    Returns (..., O) in x's dtype. Differentiable in all tensors; keeps the input of each product and of the sine.
    Raises as linear_damped_sine.
    """
    _check_linear("damped_sine_mlp", x, "w1", w1, "b1", b1)
    hidden = _like_hidden(x, w1)
    check_sine("damped_sine_mlp", hidden, amplitude, frequency, damping, mode)
    _check_linear("damped_sine_mlp", hidden, "w2", w2, "b2", b2)
    arguments, options = (x, w1, b1, amplitude, frequency, damping, w2, b2), {"mode": mode, "fused": fused}
    return MLP.select(_named(backend, fused), *arguments, **options)(*arguments, **options)


@LINEAR.specify
def linear_reference(
    x: Tensor, w: Tensor, b: Tensor | None, amplitude: Tensor, frequency: Tensor, damping: Tensor, *,
    mode: str = "abs", fused: bool = False,
) -> Tensor:  # fmt: skip
    return SINE.implementations["torch"].function(F.linear(x, w, b), amplitude, frequency, damping, mode=mode)


@MLP.specify
def mlp_reference(
    x: Tensor, w1: Tensor, b1: Tensor | None, amplitude: Tensor, frequency: Tensor, damping: Tensor, w2: Tensor,
    b2: Tensor | None, *, mode: str = "abs", fused: bool = False,
) -> Tensor:  # fmt: skip
    return F.linear(linear_reference(x, w1, b1, amplitude, frequency, damping, mode=mode), w2, b2)


def offer_parts(backend: str) -> None:
    """Serve both ops by torch's products around `backend`'s damped_sine, wherever that serves."""

    def refuses(x: Tensor, w: Tensor, b: Tensor | None, *rest: Any, mode: str = "abs", fused: bool = False) -> str | None:
        if fused:
            return "fused=True is served by the Triton kernels alone"
        return SINE.refusal(backend, _like_hidden(x, w), *rest[:3], mode=mode)

    def sine(z: Tensor, *parameters: Tensor, mode: str) -> Tensor:
        return SINE.implementations[backend].function(z, *parameters, mode=mode)

    @LINEAR.offer(backend, refuses)
    def linear(x: Tensor, w: Tensor, b: Tensor | None, *parameters: Tensor, mode: str = "abs", fused: bool = False) -> Tensor:
        return sine(F.linear(x, w, b), *parameters, mode=mode)

    @MLP.offer(backend, refuses)
    def mlp(
        x: Tensor, w1: Tensor, b1: Tensor | None, a: Tensor, f: Tensor, d: Tensor, w2: Tensor, b2: Tensor | None, *,
        mode: str = "abs", fused: bool = False,
    ) -> Tensor:  # fmt: skip
        return F.linear(sine(F.linear(x, w1, b1), a, f, d, mode=mode), w2, b2)


def offer_fused(refuses: Callable[..., str | None], linear: Callable[..., Tensor], mlp: Callable[..., Tensor]) -> None:
    """Serve fused calls of backend "triton" by these functions, and leave the others to the parts."""
    for op, function in ((LINEAR, linear), (MLP, mlp)):
        parts = op.implementations["triton"]
        op.offer("triton", _either(refuses, parts.refuses))(_either(function, parts.function))


def _either(when_fused: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    def chosen(*arguments: Any, mode: str = "abs", fused: bool = False) -> Any:
        return when_fused(*arguments, mode=mode) if fused else otherwise(*arguments, mode=mode)

    return chosen


def _named(backend: str, fused: bool) -> str:
    """A call that asks for the fused kernels names their backend by that, so that it is served by them or raises."""
    return "triton" if fused and backend == "auto" else backend


def _like_hidden(x: Tensor, w: Tensor) -> Tensor:
    """No rows of what x @ w^T will be: its device, dtype and width, for checks and refusals that read no more."""
    return x.new_empty((0, w.shape[0]), dtype=cast_dtype(x))


def _check_linear(op: str, x: Tensor, weight_name: str, weight: Tensor, bias_name: str, bias: Tensor | None) -> None:
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"{op}: x has shape {tuple(x.shape)} and dtype {x.dtype}; it must be floating point, (..., K)")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: {weight_name} has shape {tuple(weight.shape)}, but its input has {x.shape[-1]} features; "
            f"pass (outputs, {x.shape[-1]})"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: {bias_name} has shape {tuple(bias.shape)}; pass one per output, ({weight.shape[0]},), or None")
    for name, t in ((weight_name, weight), (bias_name, bias)):
        if t is not None and cast_dtype(t) != cast_dtype(x):
            raise ValueError(f"{op}: {name} is {t.dtype} beside a {x.dtype} x; pass it as {x.dtype}")
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: {name} is on {t.device} and x on {x.device}; put them on one device")


for _backend in ("triton", "native"):
    offer_parts(_backend)
