"""The wave branch: a causal, depthwise, dilated convolution over time followed by the damped sine.

    c[t] = bias + sum_j weight[:, j] * x[t - (K - 1 - j) * dilation]
    y[t] = amplitude * exp(-damping * g(c[t])) * sin(frequency * c[t])

with g as in damped_sine. The inputs before a document's first token are 0, or come from `state`.
"""

from __future__ import annotations

from typing import Iterator

import torch
from torch import Tensor

from .damped_sine import check_sine
from .damped_sine import reference as damped_sine_reference
from .documents import check_cu_seqlens, document_bounds
from .registry import Op

OP = Op("wave_conv")


def wave_conv(
    x: Tensor,
    weight: Tensor,
    amplitude: Tensor,
    frequency: Tensor,
    damping: Tensor,
    *,
    bias: Tensor | None = None,
    dilation: int = 1,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    mode: str = "abs",
    backend: str = "auto",
) -> Tensor:
    """Convolve each feature over its document's past, then apply the damped sine.

    x           (B, T, F)     float16, bfloat16, float32 or float64; any strides; each row is a document, or several
                (total, F)    with cu_seqlens: documents end to end
    weight      (F, K)        x's dtype, or float32 beside a narrower x; weight[:, K - 1] meets the newest token
    amplitude   (F,)          float32 (float64 beside a float64 x); frequency and damping alike; as in damped_sine
    bias        (F,)          as weight; None: 0
    dilation                  >= 1, tokens between taps
    cu_seqlens  (documents + 1,) int32   document i owns tokens cu_seqlens[i] to cu_seqlens[i + 1]; beside (B, T, F) it counts in
                              the B * T tokens row after row, and each row begins a document anyway
    state       (B or documents, (K - 1) * dilation, F) in x's dtype: the inputs just before each document's first token here,
                              oldest first, as wave_state gives them. A constant: no gradient flows into it. With (B, T, F)
                              and no cu_seqlens, or with (total, F)
    mode                      "abs", "relu" or "none": what the damping multiplies
    backend                   "auto", "triton", "native" or "torch"

    Returns x's shape and dtype. Output t depends on tokens up to t of its own document. Computed in float32 at least and rounded
    once. Differentiable in x, weight, bias, amplitude, frequency and damping; parameter gradients are reduced in a fixed order.
    Raises ValueError for other shapes or dtypes; BackendError if `backend` was named and cannot serve.
    Source: dilated causal convolutions, van den Oord et al. 2016, arXiv:1609.03499; the sine as in damped_sine.
    """
    _check(x, weight, amplitude, frequency, damping, bias, dilation, cu_seqlens, state, mode)
    arguments = (x, weight, amplitude, frequency, damping)
    options = dict(bias=bias, dilation=dilation, cu_seqlens=cu_seqlens, state=state, mode=mode)
    return OP.select(backend, *arguments, **options)(*arguments, **options)


@OP.specify
def reference(
    x: Tensor,
    weight: Tensor,
    amplitude: Tensor,
    frequency: Tensor,
    damping: Tensor,
    *,
    bias: Tensor | None = None,
    dilation: int = 1,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    mode: str = "abs",
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, kernel_size = weight.to(wide), weight.shape[1]
    c = x.new_zeros((), dtype=wide) if bias is None else bias.to(wide)
    # Not F.conv1d or conv2d: dilated, their backward takes 2 to 10 times as long on a CPU (2048 tokens, 512 features, 4
    # taps), and autocast and TF32 would make them narrow.
    for j, tap in enumerate(_taps(x.to(wide), kernel_size, dilation, cu_seqlens, state)):
        c = torch.addcmul(c, weight[:, j], tap)
    return damped_sine_reference(c, amplitude, frequency, damping, mode=mode).to(x.dtype)


def wave_state(
    x: Tensor, state: Tensor | None, *, kernel_size: int, dilation: int = 1, cu_seqlens: Tensor | None = None
) -> Tensor:
    """What wave_conv's `state` must be after x was consumed: each document's last (kernel_size - 1) * dilation inputs.

    x            (B, T, F), or (total, F) with cu_seqlens; as given to wave_conv
    state        (B or documents, (kernel_size - 1) * dilation, F) in x's dtype: what wave_conv was given; None: zeros, the
                 documents began with x
    kernel_size  K, the width of wave_conv's weight
    cu_seqlens   (documents + 1,) int32, beside (total, F)

    Returns a new tensor shaped as state, without gradient. A document with fewer new tokens than the state is long (none,
    too) keeps the newest of its old inputs. Nothing is read on the host.
    Raises ValueError for other shapes or dtypes.
    """
    _check_sequence("wave_state", x, kernel_size, dilation, cu_seqlens, state)
    if x.dim() == 3 and cu_seqlens is not None:
        raise ValueError("wave_state: cu_seqlens came with x of 3 dimensions; pass x as (total, features)")
    length = (kernel_size - 1) * dilation
    x = x.detach()
    if state is None:
        documents = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = x.new_zeros(documents, length, x.shape[-1])
    if cu_seqlens is None:
        newest = x[:, max(0, x.shape[1] - length) :]
        return torch.cat((state.detach()[:, newest.shape[1] :], newest), 1)
    if x.shape[0] == 0:
        return state.detach().clone()
    # Document i's old and new inputs form one sequence of length + n; its last `length` are kept, counted here from x's start.
    begin, end = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    from_x = end - length + torch.arange(length, device=x.device)
    from_state = (from_x - begin + length).clamp(max=max(0, length - 1))[..., None].expand(-1, -1, x.shape[-1])
    return torch.where((from_x >= begin)[..., None], x[from_x.clamp(min=0)], state.detach().gather(1, from_state))


def _taps(x: Tensor, kernel_size: int, dilation: int, cu_seqlens: Tensor | None, state: Tensor | None) -> Iterator[Tensor]:
    """For j = 0 .. K - 1 the input (K - 1 - j) * dilation tokens back, at every token; shaped as x."""
    length = (kernel_size - 1) * dilation
    if cu_seqlens is None:
        rows, tokens, features = x.shape
        before = x.new_zeros(rows, length, features) if state is None else state.detach().to(x.dtype)
        padded = torch.cat((before, x), 1)
        for j in range(kernel_size):
            yield padded[:, j * dilation : j * dilation + tokens]
        return
    flat = x.reshape(-1, x.shape[-1])
    total = flat.shape[0]
    token = torch.arange(total, device=x.device)
    start, _ = document_bounds(cu_seqlens, total, x.shape[1] if x.dim() == 3 else None)
    document = torch.searchsorted(cu_seqlens, token, right=True) - 1
    padded = torch.cat((flat.new_zeros(length, flat.shape[1]), flat))
    for j in range(kernel_size):
        distance = (kernel_size - 1 - j) * dilation
        before = x.new_zeros(())
        if state is not None and distance > 0:
            before = state.detach()[document, (length + token - start - distance).clamp(max=length - 1)].to(x.dtype)
        # Chosen, not multiplied by 0, so that another document's NaN stays there.
        is_inside = (token - distance >= start)[:, None]
        yield torch.where(is_inside, padded[j * dilation : j * dilation + total], before).reshape(x.shape)


def _check(
    x: Tensor,
    weight: Tensor,
    amplitude: Tensor,
    frequency: Tensor,
    damping: Tensor,
    bias: Tensor | None,
    dilation: int,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    mode: str,
) -> None:
    if weight.dim() != 2:
        raise ValueError(f"wave_conv: weight has shape {tuple(weight.shape)}; it must be (features, taps)")
    _check_sequence("wave_conv", x, weight.shape[1], dilation, cu_seqlens, state)
    check_sine("wave_conv", x, amplitude, frequency, damping, mode)
    features = x.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    for name, parameter, shape in (("weight", weight, (features, weight.shape[1])), ("bias", bias, (features,))):
        if parameter is None:
            continue
        if parameter.shape != shape:
            raise ValueError(
                f"wave_conv: {name} has shape {tuple(parameter.shape)}, but x has {features} features (x is {tuple(x.shape)}); "
                f"pass shape {shape}"
            )
        if parameter.dtype not in (x.dtype, wide):
            raise ValueError(f"wave_conv: {name} is {parameter.dtype} beside a {x.dtype} x; pass it as {x.dtype} or {wide}")
        if parameter.device != x.device:
            raise ValueError(f"wave_conv: {name} is on {parameter.device} and x on {x.device}; put them on one device")


def _check_sequence(op: str, x: Tensor, kernel_size: int, dilation: int, cu_seqlens: Tensor | None, state: Tensor | None) -> None:
    """Raise ValueError unless x, its documents and the state fit together; `op` opens the message."""
    if x.dim() not in (2, 3) or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)} and dtype {x.dtype}; it must be a floating-point tensor (rows, tokens, features), "
            "or (tokens, features) with cu_seqlens, of at least one feature"
        )
    if x.dim() == 2 and cu_seqlens is None:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)} and no cu_seqlens; pass the documents' offsets, or x as (rows, tokens, features)"
        )
    if kernel_size < 1:
        raise ValueError(f"{op}: kernel_size is {kernel_size}; a convolution has at least one tap")
    if dilation < 1:
        raise ValueError(f"{op}: dilation is {dilation}; it must be at least 1")
    if cu_seqlens is not None:
        check_cu_seqlens(op, cu_seqlens, x.shape[:-1].numel(), x.device)
    if state is None:
        return
    if x.dim() == 3 and cu_seqlens is not None:
        raise ValueError(
            f"{op}: state came with cu_seqlens and x of 3 dimensions; pass x as (total, features), or leave cu_seqlens out"
        )
    documents = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wanted = (documents, (kernel_size - 1) * dilation, x.shape[-1])
    if state.shape != wanted or state.dtype != x.dtype or state.device != x.device:
        raise ValueError(
            f"{op}: state is {tuple(state.shape)} {state.dtype} on {state.device}; pass the inputs before each document, "
            f"{wanted} {x.dtype} on {x.device} (documents, (kernel_size - 1) * dilation, features)"
        )
