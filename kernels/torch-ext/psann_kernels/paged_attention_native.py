"""Native twin of paged_attention: csrc/cpu/paged_attention.cpp. Read paged_attention.py first.

Attention of one new token reads its sequence's keys and values once, 2 * seq_len * num_kv_heads * head_dim * itemsize bytes, which
is all its time; the queries that share a key/value head share what is read, and long sequences are split among threads at fixed
positions. How many new tokens a sequence has in the call may change a query's roundings; what the others are, or hold, does not.
On an x86 processor that multiplies bfloat16 (instruction set "avx512_bf16") rotated queries and probabilities of bfloat16 are
rounded to it, sums stay float32, and denormals count as 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .direct import shortcut
from .library import define
from .native import CUDA, NATIVE, TYPES, address, launch, refuses_device, refuses_dtype
from .paged_attention import ATTENTION, FLOAT8


def unit_heads(t: Tensor) -> Tensor:
    """t (..., D) with unit stride along D; copied only where it has another."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def tables(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor | None, Tensor | None, int]:
    """The rotary tables as the kernels read them, and the positions that they hold."""
    return (None, None, 0) if cos is None else (cos.contiguous(), sin.contiguous(), cos.shape[0])


def _forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool, softmax_scale: float, window: int, alibi_slopes: Tensor | None,
) -> Tensor:  # fmt: skip
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    if q.numel() == 0:
        return o
    q, seq_lens, cu_seqlens_q = unit_heads(q), seq_lens.contiguous(), cu_seqlens_q.contiguous()
    if block_table.stride(-1) != 1:
        block_table = block_table.contiguous()
    cos, sin, max_position = tables(cos, sin)
    alibi_slopes = None if alibi_slopes is None else alibi_slopes.contiguous()
    rows, heads, head_dim = q.shape
    num_blocks, block_size, kv_heads, _ = k_cache.shape
    sequences, max_blocks = block_table.shape
    launch(
        "paged_attention", q,
        q.data_ptr(), k_cache.data_ptr(), k_cache.stride()[:3], v_cache.data_ptr(), v_cache.stride()[:3], block_table.data_ptr(),
        seq_lens.data_ptr(), cu_seqlens_q.data_ptr(), address(alibi_slopes), o.data_ptr(), address(cos), address(sin), interleaved,
        rows, sequences, heads, kv_heads, head_dim, block_size, num_blocks, max_blocks, max_position, block_table.stride(0),
        *q.stride()[:2], window, softmax_scale, TYPES[q.dtype],
        scratch=lambda cuda: cuda.paged_attention_partials(rows, heads, head_dim, max_blocks * block_size),
    )  # fmt: skip
    return o


paged_attention_native = define(
    "paged_attention_native(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, Tensor cu_seqlens_q, "
    "Tensor? cos, Tensor? sin, bool interleaved, float softmax_scale, int window, Tensor? alibi_slopes) -> Tensor",
    _forward,
    lambda q, *arguments: q.new_empty(q.shape),
)
_call = shortcut(paged_attention_native, _forward)


def refuses_cache(k_cache: Tensor, v_cache: Tensor) -> str | None:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype == FLOAT8:
            return f"{name} is {FLOAT8}; the kernel serves caches of the new tokens' own dtype"
        if cache.stride(-1) != 1 and cache.shape[-1] > 1:
            return f"{name} has stride {cache.stride(-1)} along head_dim; the kernel reads heads whose features stand side by side"
    return None


def refuses(q: Tensor, k_cache: Tensor, v_cache: Tensor, *indices: Tensor, **options: object) -> str | None:
    reason = refuses_device(q) or refuses_dtype("q", q) or refuses_cache(k_cache, v_cache)
    return _refuses_cuda(q, indices[0]) if reason is None and q.is_cuda else reason


def _refuses_cuda(q: Tensor, block_table: Tensor) -> str | None:
    """Beside short ones, a sequence with more new tokens than that is served too, slowly: no shape shows it."""
    most = CUDA.paged_attention_max_tokens
    if q.shape[0] > most * block_table.shape[0]:
        sequences = block_table.shape[0]
        return f"q has {q.shape[0]} tokens of {sequences} sequences; the CUDA kernel serves at most {most} new tokens of each"
    if q.shape[-1] > 256:
        return f"head_dim is {q.shape[-1]}; the CUDA kernel serves at most 256"
    return None


@ATTENTION.offer("native", refuses, at_once=NATIVE.paged_attention_at_once)
def _serve(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, *,
    cos: Tensor | None = None, sin: Tensor | None = None, interleaved: bool = True, softmax_scale: float | None = None,
    window: int | None = None, alibi_slopes: Tensor | None = None, k_scale: None = None, v_scale: None = None,
) -> Tensor:  # fmt: skip
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _call(
        q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, cos, sin, interleaved, softmax_scale, window or 0, alibi_slopes
    )
