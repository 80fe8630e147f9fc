"""Tiles that the tensor memory accelerator (TMA) of sm_90 and sm_100 reads: one instruction a tile, with addresses and edges made
in hardware, so that a loop holds neither pointers nor masks in registers.

Descriptors are made on the host, once a launch; what lies outside the tensor is read as 0. Where a tensor has no descriptor the
kernels read through pointers: `is_describable` says which do, from device, dtype, shape, strides and the first element's address.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def has_tma(device: torch.device) -> bool:
    """Whether kernels on `device` may read by descriptors. The interpreter may; sm_120 could, but none of the tiles is its own."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)


def is_describable(t: Tensor) -> bool:
    """Whether t, of at most five dimensions, has a descriptor: it has elements, of which the last dimension's are adjacent, the
    others' whole 16 bytes apart, the first on such an address, and no dimension repeats one element (stride 0)."""
    size = t.element_size()
    outer = [stride * size for length, stride in zip(t.shape[:-1], t.stride()[:-1]) if length != 1]
    return (
        t.data_ptr() % 16 == 0
        and t.stride(-1) == 1
        and all(0 < length < 2**31 for length in t.shape)
        and all(0 < stride < 2**40 and stride % 16 == 0 for stride in outer)
    )


def described(t: Tensor, block: list[int]) -> TensorDescriptor:
    """The descriptor of t, which must be describable, read in tiles of shape `block`."""
    # The stride of a dimension of one entry is never used and may be anything, but a descriptor takes whole 16 bytes alone.
    whole = 16 // t.element_size()
    strides = [whole if length == 1 else stride for length, stride in zip(t.shape[:-1], t.stride()[:-1])]
    return TensorDescriptor(t, list(t.shape), [*strides, 1], block)
