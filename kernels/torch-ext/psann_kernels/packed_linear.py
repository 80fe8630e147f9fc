"""Linear layer for inference whose weight was packed once for the native kernel, fast for one row and for thousands.

The same product as linear.py's; csrc/cpu/packed_linear.cpp says how. A row's result is bit for bit the one that it gets alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import define
from .linear import WEIGHT_DTYPES
from .linear_native import WEIGHT_TYPES
from .native import NATIVE, TYPES, WHY_NOT, address, launch, rows_of

PANEL = 16  # as csrc/kernels.h has it; a test compares


def pack(weight: Tensor) -> Tensor:
    """weight (N, K) as (panels, K, PANEL), contiguous: output n is [n // PANEL, :, n % PANEL], zeros stand past the last.

    Raises ValueError for another number of dimensions or a dtype that the kernel does not read.
    """
    if weight.dim() != 2 or weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"pack: weight has shape {tuple(weight.shape)} and dtype {weight.dtype}; "
            f"pass (N, K) of {', '.join(map(str, WEIGHT_DTYPES))}"
        )
    outputs, inputs = weight.shape
    panels = -(-outputs // PANEL)
    whole = weight.new_zeros(panels * PANEL, inputs)
    whole[:outputs] = weight.detach()
    return whole.view(panels, PANEL, inputs).transpose(1, 2).contiguous()


def packed_linear(x: Tensor, packed: Tensor, outputs: int, *, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Multiply every row of x with a packed matrix.

    x        (..., K)  float16, bfloat16 or float32, on a CPU; any strides
    packed   (panels, K, PANEL)  as `pack` gives it
    outputs  N, the rows that the matrix had
    scale    (N,)      float32; what one unit of an int8 weight's row is worth; needed with int8, and with nothing else
    bias     (N,)      float32; None: 0

    Returns (..., N) in x's dtype, summed in float32 and rounded once. It has no derivative.
    Raises ValueError for other shapes, dtypes or devices, and where a gradient would have to be recorded; RuntimeError where the
    native kernels are missing, saying why.
    """
    if NATIVE is None:
        raise RuntimeError(f"packed_linear: {WHY_NOT}")
    _check(x, packed, outputs, scale, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, packed, scale, bias)):
        raise ValueError(
            "packed_linear: it has no derivative, but x, packed, scale or bias requires a gradient; use linear, or torch.no_grad()"
        )
    return _packed_linear(x, packed, outputs, scale, bias)


def _forward(x: Tensor, packed: Tensor, outputs: int, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    inputs = packed.shape[1]
    y = x.new_empty((*x.shape[:-1], outputs))
    if y.numel() == 0:
        return y
    if inputs == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    memory, rows, stride = rows_of(x)
    packed = packed.contiguous()
    scale, bias = (None if t is None else t.contiguous() for t in (scale, bias))
    launch(
        "packed_linear", x,
        memory.data_ptr(), packed.data_ptr(), address(scale), address(bias), y.data_ptr(), rows, inputs, outputs, stride,
        TYPES[x.dtype], WEIGHT_TYPES[packed.dtype],
    )  # fmt: skip
    return y


_packed_linear = define(
    "packed_linear(Tensor x, Tensor packed, int outputs, Tensor? scale, Tensor? bias) -> Tensor",
    _forward,
    lambda x, packed, outputs, scale, bias: x.new_empty((*x.shape[:-1], outputs)),
)


def _check(x: Tensor, packed: Tensor, outputs: int, scale: Tensor | None, bias: Tensor | None) -> None:
    if x.dtype not in TYPES or x.dim() == 0 or x.device.type != "cpu":
        raise ValueError(
            f"packed_linear: x has shape {tuple(x.shape)}, {x.dtype} on {x.device}; "
            "it must be (..., K), float16, bfloat16 or float32 on a CPU"
        )
    panels = -(-outputs // PANEL)
    if packed.shape != (panels, x.shape[-1], PANEL) or packed.dtype not in WEIGHT_TYPES or packed.device != x.device:
        raise ValueError(
            f"packed_linear: packed has shape {tuple(packed.shape)}, {packed.dtype} on {packed.device}; "
            f"with x {tuple(x.shape)} and {outputs} "
            f"outputs it must be ({panels}, {x.shape[-1]}, {PANEL}) on {x.device}, as pack gives it"
        )
    if (scale is None) == (packed.dtype == torch.int8):
        raise ValueError(
            f"packed_linear: packed is {packed.dtype} and scale is {'missing' if scale is None else 'given'}; "
            f"an int8 weight has one scale per output, shape ({outputs},), and no other weight has any"
        )
    for name, t in (("scale", scale), ("bias", bias)):
        if t is not None and (t.shape != (outputs,) or t.dtype != torch.float32 or t.device != x.device):
            raise ValueError(
                f"packed_linear: {name} is {t.dtype} {tuple(t.shape)} on {t.device}; pass torch.float32 ({outputs},) on {x.device}"
            )
