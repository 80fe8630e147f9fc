"""Native twin of wave_conv: csrc/cpu/wave_conv.cpp. Read wave_conv.py first.

Forward reads x once, its taps come from the caches, and writes y; a step of one token reads the rest of its taps from the state.
Backward recomputes the convolution, keeps its gradient in float32 (4 bytes an element, released at the end) and reads that
for dx. Parameter gradients are added up in blocks that follow from the number of tokens alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .damped_sine import MODES
from .direct import shortcut
from .library import define
from .native import NATIVE, TYPES, address, launch, refuses_device, refuses_dtype, rows_of
from .wave_conv import OP


def _described(x: Tensor, weight: Tensor, *tensors_and_options: Any) -> tuple[tuple[int, ...], list[Tensor | None]]:
    """What both kernels take, in the order of csrc's WaveConv, and the tensors that must outlive the call."""
    bias, amplitude, frequency, damping, cu_seqlens, state, dilation, mode = tensors_and_options
    memory, rows, stride = rows_of(x)
    keep = [memory, state, weight.float(), None if bias is None else bias.float(), amplitude, frequency, damping, cu_seqlens]
    keep[1:] = [None if t is None else t.contiguous() for t in keep[1:]]
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    row_length = x.shape[1] if x.dim() == 3 else 0
    numbers = (rows, x.shape[-1], weight.shape[1], dilation, documents, row_length, stride, TYPES[x.dtype], MODES.index(mode))
    return (*map(address, keep), *numbers), keep


def _forward(x: Tensor, *rest: Any) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return y
    conv, keep = _described(x, *rest)
    launch("wave_conv_forward", x, conv, y.data_ptr())
    return y


def _backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = x.new_empty(weight.shape, dtype=torch.float32)
    sums = [x.new_empty(weight.shape[:1], dtype=torch.float32) for _ in ("bias", "amplitude", "frequency", "damping")]
    if x.numel() == 0:
        for t in (dweight, *sums):
            t.zero_()
    else:
        conv, keep = _described(x, weight, bias, *rest)
        dy_memory, _, dy_stride = rows_of(dy)
        launch(
            "wave_conv_backward", x, conv,
            dy_memory.data_ptr(), dx.data_ptr(), dweight.data_ptr(), *[t.data_ptr() for t in sums], dy_stride,
            scratch=lambda cuda: x.numel() + cuda.wave_conv_partials(conv[8]) * (weight.shape[1] + 4) * x.shape[-1],
        )  # fmt: skip
    sums[0] = sums[0].to((weight if bias is None else bias).dtype)
    return dx, dweight.to(weight.dtype), *sums


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.dilation, ctx.mode = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    gradients = list(_call_backward(dy, *ctx.saved_tensors, ctx.dilation, ctx.mode))
    if ctx.saved_tensors[2] is None:
        gradients[2] = None
    return *gradients, None, None, None, None


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor amplitude, Tensor frequency, Tensor damping, Tensor? cu_seqlens, Tensor? state, "
    "int dilation, str mode"
)
wave_conv_native_backward = define(
    f"wave_conv_native_backward(Tensor dy, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    lambda dy, x, weight, bias, amplitude, frequency, damping, *rest: (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        (weight if bias is None else bias).new_empty(weight.shape[:1]),
        *(t.new_empty(t.shape) for t in (amplitude, frequency, damping)),
    ),
)
wave_conv_native = define(
    f"wave_conv_native({_ARGUMENTS}) -> Tensor", _forward, lambda x, *rest: x.new_empty(x.shape), _differentiate, _setup_context
)
_call_backward = shortcut(wave_conv_native_backward, _backward)
_call = shortcut(wave_conv_native, _forward, _differentiate, _setup_context)


def refuses(x: Tensor, weight: Tensor, *parameters: Tensor, **options: Any) -> str | None:
    if weight.shape[1] > NATIVE.wave_conv_max_taps:
        return f"weight has {weight.shape[1]} taps; the kernel serves at most {NATIVE.wave_conv_max_taps}"
    if x.is_cuda and x.shape[:-1].numel() >= 2**31:
        return f"x has {x.shape[:-1].numel()} tokens; the CUDA kernel serves fewer than 2^31"
    return refuses_device(x) or refuses_dtype("x", x)


@OP.offer("native", refuses)
def _serve(
    x: Tensor, weight: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, *, bias: Tensor | None = None,
    dilation: int = 1, cu_seqlens: Tensor | None = None, state: Tensor | None = None, mode: str = "abs",
) -> Tensor:  # fmt: skip
    return _call(x, weight, bias, amplitude, frequency, damping, cu_seqlens, state, dilation, mode)
