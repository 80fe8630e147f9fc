"""Tiles that a Gluon kernel reads by the tensor memory accelerator (TMA).

Gluon is imported by the functions: on a Triton that the backend refuses it may lack these names.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .descriptor_triton import is_describable


def layout(swizzle: int) -> Any:
    """Of a tile (1, 1, rows, D) of 16-bit elements in shared memory; `swizzle` bytes of a row lie together."""
    language = importlib.import_module("triton.experimental.gluon.language")
    return language.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=16, rank=4)


def described(t: Tensor, rows: int, swizzle: int = 128) -> Any:
    """The descriptor of t (B, T, H, D) as (B, H, T, D), read in tiles of `rows` tokens of one head; outside of it are zeros."""
    descriptor = importlib.import_module("triton.experimental.gluon.nvidia.hopper").TensorDescriptor
    if not is_describable(t):
        t = t.clone(memory_format=torch.contiguous_format)
    t = t.transpose(1, 2)
    # The stride of a dimension of one entry is never used and may be anything, but a descriptor takes whole 16 bytes alone.
    strides = [8 if length == 1 else stride for length, stride in zip(t.shape[:-1], t.stride()[:-1])]
    return descriptor(t, list(t.shape), [*strides, 1], [1, 1, rows, t.shape[-1]], layout(swizzle))


def descriptor_type(dtype: str, rows: int, head_dim: int, swizzle: int = 128) -> str:
    """How a signature names such a descriptor of "bf16" or "fp16"."""
    return f"tensordesc<{dtype}[1,1,{rows},{head_dim}],{layout(swizzle)!r}>"
