"""Cross-entropy of a linear layer's outputs, without ever holding all of them.

    logits = x @ weight^T + bias,  capped = soft_cap * tanh(logits / soft_cap),  lse = logsumexp(capped)
    loss = lse - (1 - label_smoothing) * capped[target] - label_smoothing * mean(capped) + z_loss * lse^2

The (tokens, vocabulary) matrix is most of what a language model's training step holds.
Here it exists for a chunk of tokens at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .library import cast_dtype
from .registry import Op

OP = Op("linear_cross_entropy")
REDUCTIONS = ("sum", "mean", "none")


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    reduction: str = "mean",
    chunk: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy, in nats, of targets under the softmax of x @ weight^T + bias.

    x                (..., K)  float16, bfloat16, float32 or float64; any strides
    weight           (V, K)    x's dtype, or float32 beside a narrower x; V classes
    targets          (...)     int64, x's shape without its last; 0 to V - 1, or ignore_index
    bias             (V,)      typed as weight may be; None: 0
    ignore_index     tokens with this target give no loss and no gradient
    label_smoothing  0 <= s < 1, weight of the uniform distribution in the target
    z_loss           >= 0, weight of lse^2, which keeps the softmax's denominator near 1
    soft_cap         > 0, bounds the logits' magnitude; None: they are not bounded
    reduction        "sum" over tokens, "mean" over those that are not ignored (NaN if there is none), or "none": one loss a token
    chunk            tokens whose logits exist at a time; None: as many as suit the device
    backend          "auto", "triton", "native" or "torch"

    Returns () or targets' shape, float32 (float64 for a float64 x). The product is rounded to x's dtype, everything after it and
    the sum of the weight's gradient over tokens is float32 at least. Differentiable in x, weight and bias, once. "sum" and "mean"
    compute the gradients together with the loss and keep them, in x's size and in weight's in float32; "none" computes the logits
    again in backward. Same bits every run. Under torch.autocast x is taken in autocast's dtype.
    A target out of range is a ValueError on a CPU; on a GPU, which nothing here waits for, its loss is NaN.
    Raises ValueError for other shapes, dtypes or options; BackendError if `backend` was named and cannot serve.
    Source: chunks, Hsu et al. 2024, arXiv:2410.10989; z-loss, Chowdhery et al. 2022, arXiv:2204.02311; soft-cap, Gemma 2,
    arXiv:2408.00118; label smoothing, Szegedy et al. 2016, arXiv:1512.00567.
    """
    _check(x, weight, targets, bias, label_smoothing, z_loss, soft_cap, reduction, chunk)
    x = x.to(cast_dtype(x))
    options = dict(
        bias=bias, ignore_index=ignore_index, label_smoothing=float(label_smoothing), z_loss=float(z_loss),
        soft_cap=None if soft_cap is None else float(soft_cap), reduction=reduction, chunk=chunk,
    )  # fmt: skip
    return OP.select(backend, x, weight, targets, **options)(x, weight, targets, **options)


def definition(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """What linear_cross_entropy is, with all logits at once; autograd differentiates it. Backend "torch" computes it in chunks."""
    logits = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    logits = logits.to(torch.promote_types(x.dtype, torch.float32))
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    is_counted = targets != ignore_index
    lse = logits.logsumexp(-1)
    loss = lse - (1 - label_smoothing) * logits.gather(-1, targets.where(is_counted, 0).unsqueeze(-1)).squeeze(-1)
    if label_smoothing:
        loss = loss - label_smoothing * logits.mean(-1)
    if z_loss:
        loss = loss + z_loss * lse.square()
    loss = loss.where(is_counted, 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / is_counted.sum()


def _check(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, label_smoothing: float, z_loss: float, soft_cap: float | None,
    reduction: str, chunk: int | None,
) -> None:  # fmt: skip
    if x.dim() == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(
            f"linear_cross_entropy: x has shape {tuple(x.shape)} and dtype {x.dtype}; "
            "it must be floating point, (..., K) with K >= 1"
        )
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"linear_cross_entropy: weight has shape {tuple(weight.shape)}, but x has {x.shape[-1]} features (x is "
            f"{tuple(x.shape)}); pass one row per class, (V, {x.shape[-1]}) with V >= 1"
        )
    if targets.shape != x.shape[:-1] or targets.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: targets is {targets.dtype} {tuple(targets.shape)} and x is {tuple(x.shape)}; "
            f"pass one class per token, torch.int64 {tuple(x.shape[:-1])}"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype not in (x.dtype, wide, cast_dtype(x)):
            raise ValueError(f"linear_cross_entropy: {name} is {t.dtype} beside a {x.dtype} x; pass it as {x.dtype} or {wide}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_cross_entropy: bias has shape {tuple(bias.shape)}; pass one per class, ({weight.shape[0]},)")
    for name, t in (("weight", weight), ("targets", targets), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise ValueError(f"linear_cross_entropy: {name} is on {t.device} and x on {x.device}; put them on one device")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"linear_cross_entropy: label_smoothing is {label_smoothing}; it must be at least 0 and below 1")
    if not z_loss >= 0:
        raise ValueError(f"linear_cross_entropy: z_loss is {z_loss}; it must be at least 0")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"linear_cross_entropy: soft_cap is {soft_cap}; it must be above 0, or None for no bound")
    if reduction not in REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction is {reduction!r}; choose one of {', '.join(map(repr, REDUCTIONS))}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"linear_cross_entropy: chunk is {chunk}; it must be at least 1 token, or None")
