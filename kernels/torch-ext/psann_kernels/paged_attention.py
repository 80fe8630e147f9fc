"""A key/value cache in blocks: writing new tokens into it, and attention of new tokens over it.

The cache of one layer is a pool of blocks of `block_size` slots. A sequence owns any blocks, in any order, and lists them
in its row of the block table: token t lives in block `table[t // block_size]`, at offset `t % block_size`; its *slot* is
`block * block_size + offset`. Keys are stored rotated, so a key is turned once, when it is written.

    o[i] = sum_j p[j] v[j],   p = softmax_j(softmax_scale * q[i].k[j] - slope * (i - j))   over j <= i, i - j < window
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import Op

APPEND = Op("paged_append")
ATTENTION = Op("paged_attention")


def paged_append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, *, positions: Tensor | None = None,
    cos: Tensor | None = None, sin: Tensor | None = None, interleaved: bool = True, backend: str = "auto",
) -> None:  # fmt: skip
    """Write the keys and values of new tokens into their slots of the cache, in place.

    k, v          (T, Hkv, D)                       float16, bfloat16, float32 or float64; any strides
    k_cache       (num_blocks, block_size, Hkv, D)  k's dtype, v_cache alike; only the slots named below change
    slot_mapping  (T,) int64                        block * block_size + offset of each token; -1: skip this token
    positions     (T,) int32 or int64               each token's position in its sequence; needed with cos and sin
    cos, sin      (max_position, D / 2) float32     given: k arrives unrotated and is rotated at `positions`
    interleaved                                     True turns adjacent pairs of k, False turns its halves
    backend                                         "auto", "triton", "native" or "torch"

    Returns None. No two tokens may name the same slot. Not differentiable. Slots and positions are checked for being in
    range where that needs no synchronisation: on CPU tensors, outside torch.compile.
    Raises ValueError for other shapes, dtypes or values; BackendError if `backend` was named and cannot serve.
    Source: PagedAttention, Kwon et al. 2023, arXiv:2309.06180; rotary positions, Su et al. 2021, arXiv:2104.09864.
    """
    options = {"positions": positions, "cos": cos, "sin": sin, "interleaved": interleaved}
    _check_append(k, v, k_cache, v_cache, slot_mapping, positions, cos, sin)
    function = APPEND.select(backend, k, v, k_cache, v_cache, slot_mapping, **options)
    function(k, v, k_cache, v_cache, slot_mapping, **options)


@APPEND.specify
def reference_append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, *, positions: Tensor | None = None,
    cos: Tensor | None = None, sin: Tensor | None = None, interleaved: bool = True,
) -> None:  # fmt: skip
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    k, v = k[kept], v[kept]
    if cos is not None:
        from .rope_attention import rotate

        k = rotate(k, cos, sin, positions=positions[kept], interleaved=interleaved)
    block_size = k_cache.shape[1]
    blocks, offsets = slots // block_size, slots % block_size
    k_cache[blocks, offsets] = k
    v_cache[blocks, offsets] = v


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, *,
    cos: Tensor | None = None, sin: Tensor | None = None, interleaved: bool = True, softmax_scale: float | None = None,
    window: int | None = None, alibi_slopes: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Attention of the newest tokens of each sequence over that sequence's blocks.

    q             (total_q, H, D)                   float16, bfloat16, float32 or float64; the new tokens of all sequences,
                                                    end to end; any strides
    k_cache       (num_blocks, block_size, Hkv, D)  same dtype, v_cache alike; rotated keys; H is a multiple of Hkv
    block_table   (B, max_blocks) int32             token t of sequence b lives in block block_table[b, t // block_size]
    seq_lens      (B,) int32                        tokens attended to, the new ones included
    cu_seqlens_q  (B + 1,) int32                    sequence b owns rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] of q
    cos, sin      (max_position, D / 2) float32     given: q arrives unrotated and is rotated here
    interleaved                                     True turns adjacent pairs of q, False turns its halves
    softmax_scale                                   default D ** -0.5
    window                                          tokens that a query sees at most, itself included; None: all of them
    alibi_slopes  (H,) float32                      given: slope * distance in tokens is taken off each score
    backend                                         "auto", "triton", "native" or "torch"

    New token i of n sits at position seq_lens - n + i and sees keys up to itself.  Decoding, speculative steps and chunked
    prefill are this one call.  Returns (total_q, H, D) in q's dtype.  Never reads table entries past the last block, nor slots
    past the last token.  A sequence may have no new token, and one whose seq_lens is 0 is padding: its rows are 0, and so are
    rows past cu_seqlens_q[B].  Not differentiable: it is for inference.  Values are checked for being in range where that
    needs no synchronisation: on CPU tensors, outside torch.compile.
    Raises ValueError for other shapes, dtypes or values, and where a gradient would be needed; BackendError if `backend` was
    named and cannot serve.
    Source: PagedAttention, Kwon et al. 2023, arXiv:2309.06180; online softmax accumulated in float32.
    """
    _check_attention(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, cos, sin, window, alibi_slopes)
    arguments = (q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q)
    options = {
        "cos": cos, "sin": sin, "interleaved": interleaved, "softmax_scale": softmax_scale, "window": window,
        "alibi_slopes": alibi_slopes,
    }  # fmt: skip
    return ATTENTION.select(backend, *arguments, **options)(*arguments, **options)


@ATTENTION.specify
def reference_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, *,
    cos: Tensor | None = None, sin: Tensor | None = None, interleaved: bool = True, softmax_scale: float | None = None,
    window: int | None = None, alibi_slopes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    block_size = k_cache.shape[1]
    o = torch.zeros_like(q)
    bounds = cu_seqlens_q.tolist()
    # One sequence at a time, so that what a sequence gets does not depend, to the last bit, on who shares the call.
    for b, length in enumerate(seq_lens.tolist()):
        start, stop = bounds[b], bounds[b + 1]
        if start == stop or length == 0:
            continue
        q_positions = torch.arange(length - (stop - start), length, device=q.device)
        q_b = q[start:stop]
        if cos is not None:
            from .rope_attention import rotate

            q_b = rotate(q_b, cos, sin, positions=q_positions, interleaved=interleaved)

        oldest = 0 if window is None else max(0, length - (stop - start) - window + 1)
        first_block = oldest // block_size
        blocks = block_table[b, first_block : -(-length // block_size)].long()
        k_positions = torch.arange(first_block * block_size, length, device=q.device)
        k_b = k_cache[blocks].flatten(0, 1)[: len(k_positions)]
        v_b = v_cache[blocks].flatten(0, 1)[: len(k_positions)]
        o[start:stop] = _attend(q_b, k_b, v_b, q_positions, k_positions, softmax_scale, window, alibi_slopes)
    return o


def _attend(
    q: Tensor, k: Tensor, v: Tensor, q_positions: Tensor, k_positions: Tensor, softmax_scale: float, window: int | None,
    alibi_slopes: Tensor | None,
) -> Tensor:  # fmt: skip
    """Causal attention of one sequence: q (n, H, D), k and v (S, Hkv, D), positions (n,) and (S,). Returns (n, H, D)."""
    n, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    # (Hkv, group * n, D): the query heads that share a key head stand side by side, so each key is read once.
    q = q.transpose(0, 1).reshape(num_kv_heads, -1, head_dim).to(wide)
    scores = (q @ k.permute(1, 2, 0).to(wide) * softmax_scale).view(num_heads, n, -1)

    distance = q_positions[:, None] - k_positions
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(wide)[:, None, None] * distance
    unseen = distance < 0 if window is None else (distance < 0) | (distance >= window)
    p = torch.softmax(scores.masked_fill(unseen, float("-inf")), -1)

    o = p.view(num_kv_heads, -1, len(k)) @ v.transpose(0, 1).to(wide)
    return o.view(num_heads, n, head_dim).transpose(0, 1)


def _check_cache(op: str, like: str, x: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """x is `like`, the tensor (tokens, heads, D) whose dtype, device and head_dim the caches must share."""
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"{op}: {like} has shape {tuple(x.shape)} and dtype {x.dtype}; it must be floating-point (tokens, heads, D)")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4 or cache.shape[1] == 0:
            raise ValueError(
                f"{op}: {name} has shape {tuple(cache.shape)}; it must be (num_blocks, block_size, num_kv_heads, head_dim)"
            )
        if cache.dtype != x.dtype or cache.device != x.device:
            raise ValueError(
                f"{op}: {name} is {cache.dtype} on {cache.device} beside a {like} of {x.dtype} on {x.device}; "
                f"allocate the cache with {like}'s dtype and device"
            )
    if k_cache.shape != v_cache.shape:
        raise ValueError(f"{op}: k_cache has shape {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)}; they must be equal")
    if k_cache.shape[3] != x.shape[2]:
        raise ValueError(f"{op}: {like} has head_dim {x.shape[2]} and the caches {k_cache.shape[3]}; they must be equal")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, k_cache, v_cache)):
        raise ValueError(f"{op}: {like} or a cache requires grad, and this op is not differentiable; call it under torch.no_grad()")


def _check_index(op: str, name: str, t: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if t.shape != shape or t.dtype not in dtypes or t.device != device:
        raise ValueError(
            f"{op}: {name} is {t.dtype} {tuple(t.shape)} on {t.device}; it must be {' or '.join(map(str, dtypes))} {shape} on {device}"
        )


def _check_rotary(op: str, like: str, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise ValueError(f"{op}: {'cos' if sin is None else 'sin'} is given without its partner; pass both cos and sin, or neither")
    head_dim = x.shape[-1]
    if head_dim % 2:
        raise ValueError(f"{op}: {like} has head_dim {head_dim}; rotary positions turn pairs, so head_dim must be even")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 2 or table.shape[1] != head_dim // 2 or table.shape != cos.shape:
            raise ValueError(f"{op}: {name} has shape {tuple(table.shape)}; it must be (max_position, {head_dim // 2}), cos and sin alike")
        if table.dtype not in (torch.float32, torch.promote_types(x.dtype, torch.float32)) or table.device != x.device:
            raise ValueError(f"{op}: {name} is {table.dtype} on {table.device}; rotary tables are torch.float32 on {x.device}")


def _values_are_readable(t: Tensor) -> bool:
    """Reading costs no synchronisation and is not being traced."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, positions: Tensor | None, cos: Tensor | None,
    sin: Tensor | None,
) -> None:  # fmt: skip
    op = "paged_append"
    _check_cache(op, "k", k, k_cache, v_cache)
    if v.shape != k.shape or v.dtype != k.dtype or v.device != k.device:
        raise ValueError(f"{op}: v is {v.dtype} {tuple(v.shape)} on {v.device} and k {k.dtype} {tuple(k.shape)} on {k.device}; they must agree")
    if torch.is_grad_enabled() and v.requires_grad:
        raise ValueError(f"{op}: v requires grad, and this op is not differentiable; call it under torch.no_grad()")
    if k.shape[1] != k_cache.shape[2]:
        raise ValueError(f"{op}: k has {k.shape[1]} heads and the caches {k_cache.shape[2]}; they must be equal")
    tokens = (k.shape[0],)
    _check_index(op, "slot_mapping", slot_mapping, tokens, (torch.int64,), k.device)
    _check_rotary(op, "k", k, cos, sin)
    if positions is not None:
        _check_index(op, "positions", positions, tokens, (torch.int32, torch.int64), k.device)
    elif cos is not None:
        raise ValueError(f"{op}: cos and sin are given without positions; pass each token's position, int64 {tokens}")
    if k.shape[0] == 0 or not _values_are_readable(slot_mapping):
        return

    num_slots = k_cache.shape[0] * k_cache.shape[1]
    lowest, highest = (int(x) for x in slot_mapping.aminmax())
    if lowest < -1 or highest >= num_slots:
        raise ValueError(
            f"{op}: slot_mapping reaches from {lowest} to {highest}, but the cache has {num_slots} slots "
            f"({k_cache.shape[0]} blocks of {k_cache.shape[1]}); a slot is -1 (skip) or 0 to {num_slots - 1}"
        )
    if cos is not None:
        used = positions if lowest >= 0 else positions[slot_mapping >= 0]
        _check_positions(op, used, len(cos))


def _check_positions(op: str, positions: Tensor, max_position: int) -> None:
    if len(positions) == 0:
        return
    lowest, highest = (int(x) for x in positions.aminmax())
    if lowest < 0 or highest >= max_position:
        raise ValueError(
            f"{op}: positions reach from {lowest} to {highest}, but cos and sin have rows 0 to {max_position - 1}; "
            f"compute longer rotary tables"
        )


def _check_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, cos: Tensor | None,
    sin: Tensor | None, window: int | None, alibi_slopes: Tensor | None,
) -> None:  # fmt: skip
    op = "paged_attention"
    _check_cache(op, "q", q, k_cache, v_cache)
    num_heads, num_kv_heads = q.shape[1], k_cache.shape[2]
    if num_kv_heads == 0 or num_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"{op}: q has {num_heads} heads, which is no multiple of the caches' {num_kv_heads} key/value heads")
    if block_table.dim() != 2:
        raise ValueError(f"{op}: block_table has shape {tuple(block_table.shape)}; it must be (B, max_blocks) int32")
    sequences = block_table.shape[0]
    _check_index(op, "block_table", block_table, tuple(block_table.shape), (torch.int32,), q.device)
    _check_index(op, "seq_lens", seq_lens, (sequences,), (torch.int32,), q.device)
    _check_index(op, "cu_seqlens_q", cu_seqlens_q, (sequences + 1,), (torch.int32,), q.device)
    _check_rotary(op, "q", q, cos, sin)
    if window is not None and window < 1:
        raise ValueError(f"{op}: window is {window}; a query sees at least itself, so window is None or at least 1")
    if alibi_slopes is not None and (
        alibi_slopes.shape != (num_heads,)
        or alibi_slopes.dtype not in (torch.float32, torch.promote_types(q.dtype, torch.float32))
        or alibi_slopes.device != q.device
    ):
        raise ValueError(
            f"{op}: alibi_slopes is {alibi_slopes.dtype} {tuple(alibi_slopes.shape)} on {alibi_slopes.device}; "
            f"it must be torch.float32 ({num_heads},) on {q.device}, one slope per query head"
        )
    if _values_are_readable(q):
        _check_attention_values(op, q, k_cache, block_table, seq_lens, cu_seqlens_q, cos)


def _check_attention_values(
    op: str, q: Tensor, k_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, cos: Tensor | None
) -> None:
    num_blocks, block_size = k_cache.shape[:2]
    capacity = block_table.shape[1] * block_size
    bounds = cu_seqlens_q.tolist()
    if bounds[0] != 0 or bounds[-1] > q.shape[0]:
        raise ValueError(
            f"{op}: cu_seqlens_q runs from {bounds[0]} to {bounds[-1]}; it must start at 0 and end at or before the {q.shape[0]} rows of q"
        )
    for b, length in enumerate(seq_lens.tolist()):
        new = bounds[b + 1] - bounds[b]
        if new < 0:
            raise ValueError(f"{op}: cu_seqlens_q falls from {bounds[b]} to {bounds[b + 1]} at sequence {b}; it must not decrease")
        if length < 0 or length > capacity:
            raise ValueError(
                f"{op}: seq_lens[{b}] is {length}, but block_table has room for 0 to {capacity} tokens "
                f"({block_table.shape[1]} blocks of {block_size})"
            )
        if new > length > 0:
            raise ValueError(
                f"{op}: sequence {b} has {new} new tokens and seq_lens[{b}] is {length}; seq_lens counts the new tokens too"
            )
        if cos is not None and length > len(cos):
            raise ValueError(
                f"{op}: seq_lens[{b}] is {length}, but cos and sin have {len(cos)} rows; compute longer rotary tables"
            )
    last_block = (seq_lens + (block_size - 1)) // block_size
    used = torch.arange(block_table.shape[1]) < last_block[:, None]
    wrong = used & ((block_table < 0) | (block_table >= num_blocks))
    if wrong.any():
        b, i = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: block_table[{b}, {i}] is {int(block_table[b, i])}, but the cache has blocks 0 to {num_blocks - 1}, "
            f"and sequence {b} needs {int(last_block[b])} blocks"
        )
