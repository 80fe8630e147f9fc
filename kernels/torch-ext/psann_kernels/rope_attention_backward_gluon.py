"""Gradients of rope_attention on Hopper: rope_attention_backward_kernel_gluon.py and what must happen before and after it.

Before: Q is turned, delta = row sums of dO * O is made, and the sum of dQ and its counters begin as 0. After: dQ and dK, which the
kernel leaves in float32, are scaled, turned back and rounded by a pass each, and dV gets the order of v. Beside the results there
are 4 bytes for each element of dQ and dK, and 2 for each of dV, for as long as that takes.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import triton
from torch import Tensor

from .descriptor_gluon import described, descriptor_type
from .library import define
from .rope_attention_backward_triton import delta_of
from .rope_attention_tiles_triton import rotated, with_unit_stride
from .triton_support import Configuration

BLOCK_M, BLOCK_N = 64, 128  # queries and keys of a tile
CONSUMERS = 2  # of the kernel, between which a tile's keys are divided


def _kernel() -> Any:
    # Not imported with the package, like the forward's.
    return importlib.import_module(".rope_attention_backward_kernel_gluon", __package__).backward_kernel


def _k_swizzle(head_dim: int) -> int:
    # Each consumer takes half of K's columns for its part of dQ: as many bytes as must lie together.
    return head_dim // CONSUMERS * 2


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """k is turned already, and dk is the gradient of what it was before."""
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    shift, dtype, device = keys - queries, q.dtype, q.device
    do = with_unit_stride(do)
    if cos is not None:
        q = rotated(q, cos, sin, None, shift, interleaved)
    delta = delta_of(o, do)

    q_tiles, kv_tiles = triton.cdiv(queries, BLOCK_M), triton.cdiv(keys, BLOCK_N)
    dq = torch.zeros((batch, heads, q_tiles * BLOCK_M, head_dim), dtype=torch.float32, device=device)
    dk = torch.empty((batch, kv_heads, kv_tiles * BLOCK_N, head_dim), dtype=torch.float32, device=device)
    dv = torch.empty(dk.shape, dtype=dtype, device=device)
    counters = torch.zeros(1 + batch * heads * q_tiles, dtype=torch.int32, device=device)
    part = BLOCK_N // CONSUMERS
    _kernel()[(kv_tiles * batch * kv_heads,)](
        described(q, BLOCK_M), described(k, part, _k_swizzle(head_dim)), described(v, part), described(do, BLOCK_M),
        lse, delta, counters, dq, dk, dv, softmax_scale, queries, keys, batch * kv_heads, kv_heads, heads // kv_heads,
        D=head_dim, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4,
    )  # fmt: skip
    dq, dk, dv = (t[:, :, :tokens].transpose(1, 2) for t, tokens in ((dq, queries), (dk, keys), (dv, keys)))
    if cos is None:
        dq, dk = (torch.mul(t, softmax_scale, out=torch.empty(t.shape, dtype=dtype, device=device)) for t in (dq, dk))
    else:
        # The scale rides on the tables, and -sin turns back.
        cos, sin = cos * softmax_scale, sin * -softmax_scale
        dq, dk = (rotated(t, cos, sin, None, place, interleaved, dtype) for t, place in ((dq, shift), (dk, 0)))
    return dq, dk, dv.contiguous()


def _backward_fake(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


rope_attention_gluon_backward = define(
    "rope_attention_gluon_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? cos, Tensor? sin,"
    " bool interleaved, float softmax_scale) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def configurations() -> list[Configuration]:
    """All forms in bfloat16, and one in float16: the kernel is not specialized for sizes."""
    found = []
    for dtype, head_dim in (("bf16", 64), ("bf16", 128), ("fp16", 128)):
        kernel = _kernel()
        constants = dict(D=head_dim, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
        signature = {argument: "i32" for argument in kernel.arg_names if argument not in constants}
        part = BLOCK_N // CONSUMERS
        for argument, tile in (("q_desc", BLOCK_M), ("v_desc", part), ("do_desc", BLOCK_M)):
            signature[argument] = descriptor_type(dtype, tile, head_dim)
        signature["k_desc"] = descriptor_type(dtype, part, head_dim, _k_swizzle(head_dim))
        signature |= {f"{name}_ptr": "*fp32:16" for name in ("lse", "delta", "dq", "dk")}
        signature |= {"counter_ptr": "*i32:16", "dv_ptr": f"*{dtype}:16", "softmax_scale": "fp32"}
        name = f"rope_attention gluon backward {dtype} D={head_dim}"
        found.append(Configuration(kernel, signature, constants, num_warps=4, num_stages=1, name=name, targets=("sm_90",)))
    return found
