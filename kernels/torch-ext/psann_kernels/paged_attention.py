"""A key/value cache in blocks: writing new tokens into it, and attention of new tokens over it.

The cache of one layer is a pool of blocks of `block_size` slots. A sequence owns any blocks, in any order, and lists them
in its row of the block table: token t lives in block `table[t // block_size]`, at offset `t % block_size`; its *slot* is
`block * block_size + offset`. Keys are stored rotated, so a key is turned once, when it is written.

    o[i] = sum_j p[j] v[j],   p = softmax_j(softmax_scale * q[i].k[j] - slope * (i - j))   over j <= i, i - j < window

A cache of torch.float8_e4m3fn takes half the memory of a half-precision one, and its reading half the time. Each key/value head has
a scale for its keys and one for its values: an element stands for itself times the scale, so a scale is the largest magnitude
expected over 448. One a head, because heads differ in size, and it joins the kernel's other factors without a further product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .documents import are_values_known
from .registry import Op
from .rope_attention import rotate

APPEND = Op("paged_append")
ATTENTION = Op("paged_attention")
FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0  # of FLOAT8


def paged_append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, *, positions: Tensor | None = None,
    cos: Tensor | None = None, sin: Tensor | None = None, interleaved: bool = True, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None, backend: str = "auto",
) -> None:  # fmt: skip
    """Write the keys and values of new tokens into their slots of the cache, in place.

    k, v          (T, Hkv, D)                       float16, bfloat16, float32 or float64; any strides
    k_cache       (num_blocks, block_size, Hkv, D)  k's dtype or torch.float8_e4m3fn, v_cache alike; only the slots named below
                                                    change
    slot_mapping  (T,) int64                        block * block_size + offset of each token; -1: skip this token
    positions     (T,) int32 or int64               each token's position in its sequence; needed with cos and sin
    cos, sin      (max_position, D / 2) float32     given: k arrives unrotated and is rotated at `positions`; float64 beside a
                                                    float64 k
    interleaved                                     True turns adjacent pairs of k, False turns its halves
    k_scale       (Hkv,) float32                    for float8 caches, and for no other: what 1 in k_cache is worth, above 0;
                                                    v_scale alike. Magnitudes beyond 448 * scale become that; NaN stays NaN
    backend                                         "auto", "triton", "native" or "torch"

    Returns None. No two tokens may name the same slot. Not differentiable. Slots and positions are checked for being in
    range where that needs no synchronisation: on CPU tensors, outside torch.compile.
    Raises ValueError for other shapes, dtypes or values; BackendError if `backend` was named and cannot serve.
    Source: PagedAttention, Kwon et al. 2023, arXiv:2309.06180; rotary positions, Su et al. 2021, arXiv:2104.09864; float8,
    Micikevicius et al. 2022, arXiv:2209.05433.
    """
    if not is_dynamo_compiling():
        rest = (positions, cos, sin, interleaved, k_scale, v_scale)
        if APPEND.at_once(backend, k, v, k_cache, v_cache, slot_mapping, *rest) is None:
            return
    options = {
        "positions": positions, "cos": cos, "sin": sin, "interleaved": interleaved, "k_scale": k_scale, "v_scale": v_scale,
    }  # fmt: skip
    _check_append(k, v, k_cache, v_cache, slot_mapping, positions, cos, sin, k_scale, v_scale)
    function = APPEND.select(backend, k, v, k_cache, v_cache, slot_mapping, **options)
    function(k, v, k_cache, v_cache, slot_mapping, **options)


@APPEND.specify
def reference_append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, *, positions: Tensor | None = None,
    cos: Tensor | None = None, sin: Tensor | None = None, interleaved: bool = True, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    if len(slot_mapping) == 0 or k_cache.numel() == 0:
        return
    kept = slot_mapping >= 0
    if k_scale is not None:
        # Turned and divided in float32, so that only the last step rounds.
        k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
    if cos is not None:
        k = rotate(k, cos, sin, positions=torch.where(kept, positions, 0), interleaved=interleaved)
    if k_scale is not None:
        k, v = ((x / scale[:, None]).clamp(-LARGEST, LARGEST).to(FLOAT8) for x, scale in ((k, k_scale), (v, v_scale)))
    # A skipped token writes what the first kept one writes, in the same place; if none is kept, slot 0 gets its own content.
    # Dropping the skipped tokens would need their number, which a GPU or a trace does not know.
    first_kept = kept.to(torch.int8).argmax(0, keepdim=True)
    is_any_kept = kept[first_kept].view(1, 1, 1)
    source = torch.where(kept, torch.arange(len(kept), device=k.device), first_kept)
    slot = slot_mapping[source].clamp(min=0)
    block, offset = slot // k_cache.shape[1], slot % k_cache.shape[1]
    for cache, x in ((k_cache, k), (v_cache, v)):
        cache[block, offset] = torch.where(is_any_kept, x[source], cache[0, 0])


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, *,
    cos: Tensor | None = None, sin: Tensor | None = None, interleaved: bool = True, softmax_scale: float | None = None,
    window: int | None = None, alibi_slopes: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Attention of the newest tokens of each sequence over that sequence's blocks.

    q             (total_q, H, D)                   float16, bfloat16, float32 or float64; the new tokens of all sequences,
                                                    end to end; any strides
    k_cache       (num_blocks, block_size, Hkv, D)  q's dtype or torch.float8_e4m3fn, v_cache alike; rotated keys; H is a
                                                    multiple of Hkv
    block_table   (B, max_blocks) int32             token t of sequence b lives in block block_table[b, t // block_size]
    seq_lens      (B,) int32                        tokens attended to, the new ones included
    cu_seqlens_q  (B + 1,) int32                    sequence b owns rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] of q
    cos, sin      (max_position, D / 2) float32     given: q arrives unrotated and is rotated here; float64 beside a float64 q
    interleaved                                     True turns adjacent pairs of q, False turns its halves
    softmax_scale                                   default D ** -0.5
    window                                          tokens that a query sees at most, itself included; None: all of them
    alibi_slopes  (H,) float32                      given: slope * distance in tokens is taken off each score; float64 beside a
                                                    float64 q
    k_scale       (Hkv,) float32                    for float8 caches, and for no other: what 1 in k_cache is worth, above 0;
                                                    v_scale alike
    backend                                         "auto", "triton", "native" or "torch"

    New token i of n sits at position seq_lens - n + i and sees keys up to itself.  Decoding, speculative steps and chunked
    prefill are this one call.  Returns (total_q, H, D) in q's dtype.  Never reads table entries past the last block, nor slots
    past the last token.  A sequence may have no new token; one whose seq_lens is 0 is padding, and its rows are 0.
    Not differentiable: it is for inference.  Values are checked for being in range where that needs no synchronisation, on
    CPU tensors outside torch.compile; elsewhere values out of range are the caller's mistake, and what is computed is undefined.
    Raises ValueError for other shapes, dtypes or values, and where a gradient would be needed; BackendError if `backend` was
    named and cannot serve.
    Source: PagedAttention, Kwon et al. 2023, arXiv:2309.06180; online softmax accumulated in float32; float8, Micikevicius et
    al. 2022, arXiv:2209.05433.
    """
    arguments = (q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q)
    if not is_dynamo_compiling():
        rest = (cos, sin, interleaved, softmax_scale, window, alibi_slopes, k_scale, v_scale)
        if (o := ATTENTION.at_once(backend, *arguments, *rest)) is not NotImplemented:
            return o
    _check_attention(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, cos, sin, window, alibi_slopes, k_scale, v_scale)
    options = {
        "cos": cos, "sin": sin, "interleaved": interleaved, "softmax_scale": softmax_scale, "window": window,
        "alibi_slopes": alibi_slopes, "k_scale": k_scale, "v_scale": v_scale,
    }  # fmt: skip
    return ATTENTION.select(backend, *arguments, **options)(*arguments, **options)


@ATTENTION.specify
def reference_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, *,
    cos: Tensor | None = None, sin: Tensor | None = None, interleaved: bool = True, softmax_scale: float | None = None,
    window: int | None = None, alibi_slopes: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if q.numel() == 0 or block_table.numel() == 0 or k_cache.numel() == 0:
        return q.new_zeros(q.shape)
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    is_traced = torch.compiler.is_compiling()
    if cos is not None or is_traced:
        # Row r of q belongs to sequence owner[r]. Positions below 0 are those of padding.
        row = torch.arange(len(q), dtype=torch.int32, device=q.device)
        owner = torch.searchsorted(cu_seqlens_q[1:], row, right=True)
        position = row + (seq_lens - cu_seqlens_q[1:])[owner]
    if cos is not None:
        q = rotate(q, cos, sin, positions=position.clamp(min=0), interleaved=interleaved)
    if is_traced:
        return _attend_rows(
            q, k_cache, v_cache, block_table[owner], position, softmax_scale, window, alibi_slopes, k_scale, v_scale
        )
    lengths, bounds = seq_lens.tolist(), cu_seqlens_q.tolist()
    return _attend_sequences(
        q, k_cache, v_cache, block_table, lengths, bounds, softmax_scale, window, alibi_slopes, k_scale, v_scale
    )


def _worth(x: Tensor, scale: Tensor | None) -> Tensor:
    """Elements (..., Hkv, D) of a cache as the numbers that they stand for."""
    return x if scale is None else x.to(torch.float32) * scale[:, None]


def _attend_rows(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, position: Tensor, softmax_scale: float, window: int | None,
    alibi_slopes: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """Each row gathers the whole of its own sequence: wasteful, but of shapes that a trace knows.

    block_table  (total_q, max_blocks)  of the sequence that owns each row
    position     (total_q,)             of each row; its keys are those at and before it
    """
    block_size = k_cache.shape[1]
    key = torch.arange(block_table.shape[1] * block_size, device=q.device)
    seen = key <= position[:, None]
    # Beyond a sequence's last block the table may hold anything: such keys come from block 0.
    block = torch.where(seen[:, ::block_size], block_table, 0)
    k, v = (_worth(cache[block].flatten(1, 2), scale) for cache, scale in ((k_cache, k_scale), (v_cache, v_scale)))
    v = v.masked_fill(~seen[:, :, None, None], 0.0)  # 0 * nan is nan, and unseen slots may hold it
    p = _weights(q.unsqueeze(1), k, (position[:, None] - key).unsqueeze(1), softmax_scale, window, alibi_slopes)
    return _mix(p, v, q.unsqueeze(1)).squeeze(1).masked_fill((position < 0)[:, None, None], 0.0)


# Queries of one sequence that share a product: their scores, (H, rows, keys), should not outgrow the cache they read.
ROWS = 256


def _attend_sequences(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: list[int], cu_seqlens_q: list[int],
    softmax_scale: float, window: int | None, alibi_slopes: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """One sequence at a time, because a sequence fits the processor's cache, where a padded batch of them does not, and
    because what it gets is then the same, to the last bit, whoever shares the call."""
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    # index_select of whole blocks is four times as fast as indexing.
    k_blocks, v_blocks = (cache.view(len(cache), -1) if cache.is_contiguous() else cache for cache in (k_cache, v_cache))

    def keys_or_values(cache: Tensor, scale: Tensor | None, b: int, oldest: int, last: int) -> Tensor:
        first_block = oldest // block_size
        blocks = block_table[b, first_block : -(-last // block_size)]
        tokens = cache.index_select(0, blocks).view(-1, num_kv_heads, head_dim)
        return _worth(tokens[oldest - first_block * block_size : last - first_block * block_size], scale)

    o = q.new_zeros(q.shape)
    for b, length in enumerate(seq_lens):
        end = cu_seqlens_q[b + 1]
        for start in range(max(cu_seqlens_q[b], end - length), end, ROWS):
            stop = min(start + ROWS, end)
            first, last = length - end + start, length - end + stop  # positions of the rows: first to last - 1
            oldest = 0 if window is None else max(0, first - window + 1)
            distance = None
            if stop - start > 1 or alibi_slopes is not None:
                distance = torch.arange(first, last, device=q.device)[:, None] - torch.arange(oldest, last, device=q.device)
            # The keys are dropped before the values are gathered: twice the memory made this call four times as slow.
            k = keys_or_values(k_blocks, k_scale, b, oldest, last)
            p = _weights(q[start:stop], k, distance, softmax_scale, window, alibi_slopes)
            del k
            o[start:stop] = _mix(p, keys_or_values(v_blocks, v_scale, b, oldest, last), q[start:stop])
    return o


def _weights(
    q: Tensor, k: Tensor, distance: Tensor | None, softmax_scale: float, window: int | None, alibi_slopes: Tensor | None
) -> Tensor:
    """Softmax over the keys of one sequence, or with leading dimensions of several: (..., Hkv, H / Hkv * n, S), float32 at least.

    q         (..., n, H, D)
    k         (..., S, Hkv, D)
    distance  (..., n, S)  position of the query less that of the key; None: every query sees every key, and there is no ALiBi
    """
    lead, (n, num_heads, head_dim) = q.shape[:-3], q.shape[-3:]
    wide = torch.promote_types(q.dtype, torch.float32)
    # The query heads that share a key head stand side by side, so each key is read once.
    grouped = q.transpose(-3, -2).reshape(*lead, k.shape[-2], -1, head_dim).to(wide)
    scores = grouped @ k.to(wide).transpose(-3, -2).mT * softmax_scale

    if distance is not None:
        shape = scores.shape
        scores, distance = scores.view(*lead, num_heads, n, -1), distance.unsqueeze(-3)
        if alibi_slopes is not None:
            scores = scores - alibi_slopes.view(-1, 1, 1) * distance
        unseen = distance < 0 if window is None else (distance < 0) | (distance >= window)
        scores = scores.masked_fill(unseen, float("-inf")).view(shape)
    return torch.softmax(scores, -1)


def _mix(p: Tensor, v: Tensor, q: Tensor) -> Tensor:
    """The values v (..., S, Hkv, D) mixed by p, as _weights gives it; in q's shape (..., n, H, D) and dtype."""
    o = p @ v.to(p.dtype).transpose(-3, -2)
    return o.view(*q.shape[:-3], q.shape[-2], q.shape[-3], q.shape[-1]).transpose(-3, -2).to(q.dtype)


def _check_cache(
    op: str, like: str, x: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    """x is `like`, the tensor (tokens, heads, D) whose device, head_dim and, float8 aside, dtype the caches must share."""
    if x.dim() != 3 or not x.is_floating_point() or x.itemsize == 1:
        raise ValueError(
            f"{op}: {like} has shape {tuple(x.shape)} and dtype {x.dtype}; it must be floating-point of 16 bits or more, "
            f"(tokens, heads, head_dim)"
        )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4 or cache.shape[1] == 0:
            raise ValueError(
                f"{op}: {name} has shape {tuple(cache.shape)}; it must be (num_blocks, block_size, num_kv_heads, head_dim)"
            )
        if cache.dtype not in (x.dtype, FLOAT8) or cache.device != x.device:
            raise ValueError(
                f"{op}: {name} is {cache.dtype} on {cache.device} beside a {like} of {x.dtype} on {x.device}; "
                f"allocate the cache with {like}'s dtype, or {FLOAT8}, and device"
            )
    if k_cache.dtype != v_cache.dtype:
        raise ValueError(f"{op}: k_cache is {k_cache.dtype} and v_cache {v_cache.dtype}; they must agree")
    if k_cache.shape != v_cache.shape:
        raise ValueError(f"{op}: k_cache has shape {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)}; they must be equal")
    if k_cache.shape[3] != x.shape[2]:
        raise ValueError(f"{op}: {like} has head_dim {x.shape[2]} and the caches {k_cache.shape[3]}; they must be equal")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, k_cache, v_cache)):
        raise ValueError(f"{op}: {like} or a cache requires grad, and this op is not differentiable; call it under torch.no_grad()")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is None) == (k_cache.dtype == FLOAT8):
            raise ValueError(
                f"{op}: {name} is {'missing' if scale is None else 'given'} and the caches are {k_cache.dtype}; caches of {FLOAT8} "
                f"need one scale for each key/value head, float32 ({k_cache.shape[2]},), and no others take any"
            )
        if scale is not None:
            _check_small(op, name, scale, (k_cache.shape[2],), x.device, torch.float32)
            if are_values_known(scale) and not bool(((scale > 0) & scale.isfinite()).all()):
                raise ValueError(f"{op}: {name} is {scale.tolist()}; a scale is finite and above 0")


def _check_small(op: str, name: str, t: Tensor, shape: tuple[int, ...], device: torch.device, *dtypes: torch.dtype) -> None:
    if t.shape != shape or t.dtype not in dtypes or t.device != device:
        wanted = " or ".join(map(str, dtypes))
        raise ValueError(f"{op}: {name} is {t.dtype} {tuple(t.shape)} on {t.device}; it must be {wanted} {shape} on {device}")


def _check_rotary(op: str, like: str, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        missing, given = ("cos", "sin") if cos is None else ("sin", "cos")
        raise ValueError(f"{op}: {missing} is None but {given} is given; pass both or neither")
    head_dim = x.shape[-1]
    if head_dim % 2:
        raise ValueError(f"{op}: {like} has head_dim {head_dim}; rotary positions turn pairs, so head_dim must be even")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 2 or table.shape[1] != head_dim // 2 or table.shape != cos.shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(table.shape)}; it must be (max_position, {head_dim // 2}), cos and sin alike"
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        if table.dtype != wide or table.device != x.device:
            raise ValueError(
                f"{op}: {name} is {table.dtype} on {table.device}; beside a {like} of {x.dtype} it must be {wide} on {x.device}"
            )


def _check_append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, positions: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:  # fmt: skip
    op = "paged_append"
    _check_cache(op, "k", k, k_cache, v_cache, k_scale, v_scale)
    if v.shape != k.shape or v.dtype != k.dtype or v.device != k.device:
        raise ValueError(
            f"{op}: v is {v.dtype} {tuple(v.shape)} on {v.device} and k {k.dtype} {tuple(k.shape)} on {k.device}; they must agree"
        )
    if torch.is_grad_enabled() and v.requires_grad:
        raise ValueError(f"{op}: v requires grad, and this op is not differentiable; call it under torch.no_grad()")
    if k.shape[1] != k_cache.shape[2]:
        raise ValueError(f"{op}: k has {k.shape[1]} heads and the caches {k_cache.shape[2]}; they must be equal")
    tokens = (k.shape[0],)
    _check_small(op, "slot_mapping", slot_mapping, tokens, k.device, torch.int64)
    _check_rotary(op, "k", k, cos, sin)
    if positions is not None:
        _check_small(op, "positions", positions, tokens, k.device, torch.int32, torch.int64)
    elif cos is not None:
        raise ValueError(f"{op}: cos and sin are given without positions; pass each token's position, int64 {tokens}")
    if k.shape[0] == 0 or not are_values_known(slot_mapping):
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
    sin: Tensor | None, window: int | None, alibi_slopes: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:  # fmt: skip
    op = "paged_attention"
    _check_cache(op, "q", q, k_cache, v_cache, k_scale, v_scale)
    num_heads, num_kv_heads = q.shape[1], k_cache.shape[2]
    if num_kv_heads == 0 or num_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"{op}: q has {num_heads} heads, which is no multiple of the caches' {num_kv_heads} key/value heads")
    if block_table.dim() != 2:
        raise ValueError(f"{op}: block_table has shape {tuple(block_table.shape)}; it must be (B, max_blocks) int32")
    sequences = block_table.shape[0]
    _check_small(op, "block_table", block_table, tuple(block_table.shape), q.device, torch.int32)
    _check_small(op, "seq_lens", seq_lens, (sequences,), q.device, torch.int32)
    _check_small(op, "cu_seqlens_q", cu_seqlens_q, (sequences + 1,), q.device, torch.int32)
    _check_rotary(op, "q", q, cos, sin)
    if window is not None and (isinstance(window, bool) or window < 1):
        raise ValueError(f"{op}: window is {window!r}; a query sees at least itself, so window is None or at least 1")
    if alibi_slopes is not None:
        wide = torch.promote_types(q.dtype, torch.float32)
        _check_small(op, "alibi_slopes, one per query head,", alibi_slopes, (num_heads,), q.device, wide)
    if are_values_known(q):
        _check_attention_values(op, q, k_cache, block_table, seq_lens, cu_seqlens_q, cos)


def _check_attention_values(
    op: str, q: Tensor, k_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, cos: Tensor | None
) -> None:
    num_blocks, block_size = k_cache.shape[:2]
    capacity = block_table.shape[1] * block_size
    bounds = cu_seqlens_q.tolist()
    if bounds[0] != 0 or bounds[-1] != q.shape[0]:
        raise ValueError(
            f"{op}: cu_seqlens_q runs from {bounds[0]} to {bounds[-1]}; it must run from 0 to {q.shape[0]}, the number of rows of q"
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
    if block_table.numel() == 0:
        return
    lowest, highest = block_table.aminmax()
    if lowest >= 0 and highest < num_blocks:
        return
    last_block = (seq_lens + (block_size - 1)) // block_size
    used = torch.arange(block_table.shape[1]) < last_block[:, None]
    wrong = used & ((block_table < 0) | (block_table >= num_blocks))
    if wrong.any():
        b, i = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: block_table[{b}, {i}] is {int(block_table[b, i])}, but the cache has blocks 0 to {num_blocks - 1}, "
            f"and sequence {b} needs {int(last_block[b])} blocks"
        )
