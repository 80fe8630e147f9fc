"""Native twin of linear for few rows: csrc/cpu/linear.cpp. Read linear.py first.

With one row the time is that of reading the weights once, N * K * itemsize bytes. Every output is summed over the inputs in one
order, whatever the number of rows, so a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .direct import shortcut
from .library import define
from .linear import OP
from .native import NATIVE, TYPES, address, launch, refuses_device, refuses_dtype, rows_of

WEIGHT_TYPES = {**TYPES, torch.int8: 3}
MAX_ROWS = NATIVE.linear_max_rows


def _forward(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    (outputs, inputs), shape = weight.shape, x.shape
    # Decoding has one kernel after another wait for this function: the usual two dimensions are not taken apart.
    y = x.new_empty((shape[0], outputs) if len(shape) == 2 else (*shape[:-1], outputs))
    if y.numel() == 0:
        return y
    if inputs == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    memory, rows, stride = rows_of(x)
    weight_stride = inputs
    if not weight.is_contiguous():
        weight, _, weight_stride = rows_of(weight)
    scale = None if scale is None else scale.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    launch(
        "linear", x,
        memory.data_ptr(), weight.data_ptr(), address(scale), address(bias), y.data_ptr(), rows, inputs, outputs, stride,
        weight_stride, TYPES[x.dtype], WEIGHT_TYPES[weight.dtype],
    )  # fmt: skip
    return y


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale, bias = ctx.saved_tensors
    wide = dy.float()
    scaled = wide if scale is None else wide * scale
    dx = (scaled @ weight.float()).to(x.dtype)
    dweight = dbias = None
    if weight.is_floating_point():
        dweight = (
            (wide.flatten(0, -2).t() @ x.float().flatten(0, -2)).to(weight.dtype)
            if x.dim() > 1
            else torch.outer(wide, x.float()).to(weight.dtype)
        )
    if bias is not None:
        dbias = wide.reshape(-1, wide.shape[-1]).sum(0).to(bias.dtype)
    return dx, dweight, None, dbias


linear_native = define(
    "linear_native(Tensor x, Tensor weight, Tensor? scale, Tensor? bias) -> Tensor",
    _forward,
    lambda x, weight, scale, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
    _differentiate,
    _setup_context,
)
_call = shortcut(linear_native, _forward, _differentiate, _setup_context)


def refuses(x: Tensor, weight: Tensor, *, scale: Tensor | None = None, bias: Tensor | None = None) -> str | None:
    # Two dimensions are the usual case, and cost a decoding step least.
    rows = x.shape[0] if x.dim() == 2 else x.shape[:-1].numel()
    if rows > MAX_ROWS:
        return f"x has {rows} rows; the kernel serves 1 to {MAX_ROWS}, more are a matter for a matrix product"
    if weight.dtype not in WEIGHT_TYPES:
        return f"weight is {weight.dtype}; the kernel serves float32, bfloat16, float16 and int8"
    if x.is_cpu:
        return refuses_dtype("x", x)
    if x.is_cuda:
        return f"the tensors are on {x.device}; the kernel runs on the CPU, a GPU multiplies few rows fast by itself"
    return refuses_device(x)


@OP.offer("native", refuses, at_once=NATIVE.linear_at_once)
def _serve(x: Tensor, weight: Tensor, *, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return _call(x, weight, scale, bias)
