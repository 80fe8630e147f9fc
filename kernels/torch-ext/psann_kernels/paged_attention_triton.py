"""Triton twins of paged_append and paged_attention. Read paged_attention.py first.

paged_append is one launch that reads k and v and writes the slots: 4 * T * Hkv * D * itemsize bytes.

paged_attention reads each key and value of a sequence once for all new tokens and query heads that share them, where there are
few new tokens: 2 * Hkv * D * itemsize bytes a cached token; rows of a tile are (new token, query head of the group) pairs. A
sequence with few new tokens is cut into splits, a program each, whose partial results a second launch merges in a fixed
order; one with many is cut into tiles of rows. Both kinds may stand in one call: each sequence is served by the launch for its
own number of new tokens, read on the device, and the other launches pass it by.

What a sequence gets depends on its own tokens alone, bit for bit: where its splits lie follows from its own length, neither
from who shares the call nor from the width of the table. Lengths are never read on the host, so a CUDA graph can capture this.

A float8 cache comes as uint8 with its scales; keys and values are widened to q's dtype, which holds them exactly, on their way to
the products, and the scales join the factors of scores and output.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .float8_triton import FLOAT8_UNIT, from_float8, to_float8
from .library import define
from .paged_attention import APPEND, ATTENTION, FLOAT8
from .rope_attention_tiles_triton import angles, block_d, features, load_operand, operand, turn, with_unit_stride
from .triton_support import LOG2_E, Configuration, narrow, refuses_device, refuses_dtype, widen

# A split is at least this many keys, so that its partial result (float32, written and read back) is small beside them. A
# multiple of every tile's keys.
MIN_SPLIT = 256
# Enough programs for one sequence on a large GPU, few enough that one program merges them in registers.
MAX_SPLITS = 32
# Sequences with at most this many rows (new tokens times query heads of a group) are split; and never above 16 new tokens.
SPLIT_ROWS = 64
# The window of a call without one: more than any position, and no overflow when a few tokens are added.
UNBOUNDED = 2**30


@triton.jit
def _append_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slot_ptr, position_ptr, cos_ptr, sin_ptr, k_scale_ptr, v_scale_ptr, heads, max_position,
    k_t, k_h, v_t, v_h, k_cache_b, k_cache_s, k_cache_h, v_cache_b, v_cache_s, v_cache_h,
    BLOCK_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + t)
    if slot < 0:
        return
    h = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    c, inside = features(D, BLOCK_D, ROTARY)
    here = (h < heads)[:, None] & inside[None, :]
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE

    k = widen(tl.load(k_ptr + t * k_t + h[:, None] * k_h + c[None, :], mask=here, other=0.0))
    v = tl.load(v_ptr + t * v_t + h[:, None] * v_h + c[None, :], mask=here, other=0.0)
    if ROTARY != "none":
        position = tl.load(position_ptr + t) + tl.zeros((1,), tl.int64)
        cos, sin = angles(cos_ptr, sin_ptr, position, position >= 0, max_position, D, BLOCK_D)
        k = turn(k, cos, sin, BLOCK_H, BLOCK_D, ROTARY)

    k_slot = k_cache_ptr + block * k_cache_b + offset * k_cache_s
    v_slot = v_cache_ptr + block * v_cache_b + offset * v_cache_s
    if k_scale_ptr is not None:
        k = to_float8(k, tl.load(k_scale_ptr + h, mask=h < heads, other=1.0)[:, None])
        v = to_float8(widen(v), tl.load(v_scale_ptr + h, mask=h < heads, other=1.0)[:, None])
    else:
        k = narrow(k, k_cache_ptr.dtype.element_ty)
    tl.store(k_slot + h[:, None] * k_cache_h + c[None, :], k, mask=here)
    tl.store(v_slot + h[:, None] * v_cache_h + c[None, :], v, mask=here)


@triton.jit
def _rows_of_tile(tile, new, length, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of a tile of one sequence's rows: each row's new token, head in the group and position, and whether it exists; then
    the positions of the first and of the last row that exists."""
    start = tile * tl.full((), BLOCK_M, tl.int64)
    rows = new.to(tl.int64) * GROUP
    r = start + tl.arange(0, BLOCK_M)
    oldest = length - new
    first = oldest + (start // GROUP).to(tl.int32)
    last = oldest + ((tl.minimum(start + BLOCK_M, rows) - 1) // GROUP).to(tl.int32)
    return r // GROUP, r % GROUP, oldest + (r // GROUP).to(tl.int32), r < rows, first, last


@triton.jit
def _load_cached(pointers, mask, scale_ptr, dtype: tl.constexpr):
    """A tile of a cache as an operand of tl.dot beside one of `dtype`; with a scale, float8 in units of FLOAT8_UNIT * scale."""
    if scale_ptr is None:
        x = load_operand(pointers, mask)
    else:
        x = operand(from_float8(tl.load(pointers, mask=mask, other=0)), dtype)
    return x


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, table_ptr, cos_ptr, sin_ptr, slope_ptr, k_scale_ptr, v_scale_ptr, start, position, token, head, exists,
    low, high, softmax_scale, window, max_position, q_t, q_h, k_b, k_s, v_b, v_s,
    BLOCK_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of one sequence's rows over its keys low to high: the output, and the base-2 logarithm of the sum of
    exponentials of the scores. k_ptr, v_ptr and the scales are at the head that the rows share, table_ptr at the sequence's row."""
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    c_k, inside_k = features(D, BLOCK_D, ROTARY)
    c_v, inside_v = features(D, BLOCK_D, "none")
    q_row = (start + token) * q_t + head * q_h
    q = load_operand(q_ptr + q_row[:, None] + c_k[None, :], exists[:, None] & inside_k[None, :])
    if ROTARY != "none":
        cos, sin = angles(cos_ptr, sin_ptr, position, exists, max_position, D, BLOCK_D)
        q = operand(turn(q.to(tl.float32), cos, sin, BLOCK_M, BLOCK_D, ROTARY), dtype)
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + head, mask=exists, other=0.0) * LOG2_E
    scale = softmax_scale * LOG2_E
    if k_scale_ptr is not None:
        scale *= tl.load(k_scale_ptr) * FLOAT8_UNIT

    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    n = low + tl.arange(0, BLOCK_N)
    for _ in range(low, high, BLOCK_N):
        # Entries past the last block and slots past the last token may hold anything, so they are never read.
        known = n < high
        block = tl.load(table_ptr + n // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
        offset = (n % BLOCK_SIZE).to(tl.int64)
        k_row = block * k_b + offset * k_s
        k = _load_cached(k_ptr + k_row[:, None] + c_k[None, :], known[:, None] & inside_k[None, :], k_scale_ptr, dtype)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        distance = position[:, None] - n[None, :]
        if slope_ptr is not None:
            s -= slope[:, None] * distance.to(tl.float32)
        # Keys at and past `high` need no mask of their own: they begin a tile of the next split, or no row sees them.
        s = tl.where((distance >= 0) & (distance < window), s, float("-inf"))

        m_next = tl.maximum(m, tl.max(s, 1))
        # A row that has seen no key yet has maximum -inf; shifting by it would give NaN, so such rows shift by 0.
        shift = tl.where(m_next == float("-inf"), 0.0, m_next)
        p = tl.exp2(s - shift[:, None])
        fade = tl.exp2(m - shift)
        # V is masked too: p is 0 past the end, but 0 * NaN is NaN.
        v_row = block * v_b + offset * v_s
        v = _load_cached(v_ptr + v_row[:, None] + c_v[None, :], known[:, None] & inside_v[None, :], v_scale_ptr, dtype)
        l = l * fade + tl.sum(p, 1)
        acc = tl.dot(operand(p, dtype), v, acc * fade[:, None], input_precision="ieee")
        m = m_next
        n += BLOCK_N

    sees = l > 0
    l = tl.where(sees, l, 1.0)
    if v_scale_ptr is not None:
        acc *= tl.load(v_scale_ptr) * FLOAT8_UNIT
    return acc / l[:, None], tl.where(sees, m + tl.log2(l), float("-inf"))


@triton.jit
def _split_size(span, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys in each split of a sequence that sees `span` keys: whole tiles, and at most MAX_SPLITS splits."""
    return tl.maximum(tl.cdiv(tl.cdiv(span.to(tl.int64), MAX_SPLITS), BLOCK_N) * BLOCK_N, MIN_SPLIT)


@triton.jit
def _split_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, bound_ptr, cos_ptr, sin_ptr, slope_ptr, k_scale_ptr, v_scale_ptr, o_ptr,
    partial_ptr, lse_ptr,
    softmax_scale, window, max_position, heads, splits, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, table_b,
    GROUP: tl.constexpr, FEW: tl.constexpr, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program per (sequence, key head, split). partial_ptr is (rows of q, heads, splits, D), lse_ptr the same without D.
    b, kv, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    if k_scale_ptr is not None:
        k_scale_ptr += kv
        v_scale_ptr += kv
    start = tl.load(bound_ptr + b)
    new = tl.load(bound_ptr + b + 1) - start
    length = tl.load(length_ptr + b)
    oldest = tl.maximum(length - new - window + 1, 0)
    size = _split_size(length - oldest, MIN_SPLIT, MAX_SPLITS, BLOCK_N)
    low, high = (oldest + split * size).to(tl.int32), (oldest + split * size + size).to(tl.int32)
    # Padding, of length 0, gets its zeros from split 0.
    if (new > FEW) | ((split > 0) & (low >= length)):
        return
    is_whole = length - oldest <= size
    # Rows of partial results are packed as q's are, or FEW a sequence, whichever needs less room.
    partial = tl.minimum(start.to(tl.int64), b * FEW)
    c, inside = features(D, BLOCK_D, "none")

    # Without disable_licm the compiler keeps the addresses of the first keys in registers across tiles: 255 instead of 154.
    for tile in tl.range(0, tl.cdiv(new * GROUP, BLOCK_M), disable_licm=True):
        token, head, position, exists, _, last = _rows_of_tile(tile, new, length, GROUP, BLOCK_M)
        head += kv * GROUP
        o, lse = _attend(
            q_ptr, k_ptr + kv * k_h, v_ptr + kv * v_h, table_ptr + b * table_b, cos_ptr, sin_ptr, slope_ptr, k_scale_ptr,
            v_scale_ptr, start, position, token, head, exists, low, tl.minimum(high, last + 1),
            softmax_scale, window, max_position, q_t, q_h, k_b, k_s, v_b, v_s,
            BLOCK_SIZE, D, BLOCK_D, ROTARY, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        here = exists[:, None] & inside[None, :]
        if is_whole:
            row = (start + token) * heads + head
            tl.store(o_ptr + row[:, None] * D + c[None, :], narrow(o, o_ptr.dtype.element_ty), mask=here)
        else:
            row = ((partial + token) * heads + head) * splits + split
            tl.store(partial_ptr + row[:, None] * D + c[None, :], o, mask=here)
            tl.store(lse_ptr + row, lse, mask=exists)


@triton.jit
def _merge_kernel(
    length_ptr, bound_ptr, partial_ptr, lse_ptr, o_ptr, window, heads, splits,
    FEW: tl.constexpr, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program per (sequence, query head).
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    start = tl.load(bound_ptr + b)
    new = tl.load(bound_ptr + b + 1) - start
    length = tl.load(length_ptr + b)
    span = length - tl.maximum(length - new - window + 1, 0)
    size = _split_size(span, MIN_SPLIT, MAX_SPLITS, BLOCK_N)
    if (new > FEW) | (span <= size):
        return
    # Always MAX_SPLITS rows, masked, so that the order of summation is the same for a table of any width.
    split = tl.arange(0, MAX_SPLITS)
    used = split < tl.cdiv(span, size)
    c, inside = features(D, BLOCK_D, "none")
    partial = tl.minimum(start.to(tl.int64), b * FEW)

    for i in range(0, new):
        row = ((partial + i) * heads + h) * splits + split
        lse = tl.load(lse_ptr + row, mask=used, other=float("-inf"))
        o = tl.load(partial_ptr + row[:, None] * D + c[None, :], mask=used[:, None] & inside[None, :], other=0.0)

        top = tl.max(lse, 0)
        weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
        total = tl.sum(weight, 0)
        o = tl.sum(weight[:, None] * o, 0) / tl.where(total > 0, total, 1.0)

        row = (start.to(tl.int64) + i) * heads + h
        tl.store(o_ptr + row * D + c, narrow(o, o_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tile_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, bound_ptr, cos_ptr, sin_ptr, slope_ptr, k_scale_ptr, v_scale_ptr, o_ptr,
    softmax_scale, window, max_position, heads, sequences, halvings, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, table_b,
    GROUP: tl.constexpr, FEW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program per (tile of rows, key head). Sequence b's tiles begin at `its rows before b // BLOCK_M + b`: a whole number
    # known to every program, and far enough from the next sequence's for all its tiles.
    program, kv = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if k_scale_ptr is not None:
        k_scale_ptr += kv
        v_scale_ptr += kv
    b, end = tl.full((), 0, tl.int64), tl.full((), sequences, tl.int64)
    for _ in range(0, halvings):
        middle = (b + end) // 2
        is_before = tl.load(bound_ptr + middle).to(tl.int64) * GROUP // BLOCK_M + middle <= program
        b = tl.where(is_before, middle, b)
        end = tl.where(is_before, end, middle)
    start = tl.load(bound_ptr + b)
    new = tl.load(bound_ptr + b + 1) - start
    length = tl.load(length_ptr + b)
    tile = program - start.to(tl.int64) * GROUP // BLOCK_M - b
    if (new <= FEW) | (tile * BLOCK_M >= new * GROUP):
        return
    token, head, position, exists, first, last = _rows_of_tile(tile, new, length, GROUP, BLOCK_M)
    head += kv * GROUP

    o, _ = _attend(
        q_ptr, k_ptr + kv * k_h, v_ptr + kv * v_h, table_ptr + b * table_b, cos_ptr, sin_ptr, slope_ptr, k_scale_ptr, v_scale_ptr,
        start, position, token, head, exists, tl.maximum(first - window + 1, 0), last + 1,
        softmax_scale, window, max_position, q_t, q_h, k_b, k_s, v_b, v_s,
        BLOCK_SIZE, D, BLOCK_D, ROTARY, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    c, inside = features(D, BLOCK_D, "none")
    row = (start + token) * heads + head
    tl.store(o_ptr + row[:, None] * D + c[None, :], narrow(o, o_ptr.dtype.element_ty), mask=exists[:, None] & inside[None, :])


def _few(group: int) -> int:
    """New tokens up to which a sequence is split. A function of the model alone, never of a batch."""
    return max(1, min(16, SPLIT_ROWS // group))


def _tile(head_dim: int, itemsize: int, rows: int) -> dict[str, int]:
    """A program's tile for at most `rows` rows: as large as compiles for sm_80 and sm_90 without spilling registers."""
    columns = block_d(head_dim)
    if head_dim % 16:  # loads are of single elements then, each with an address of its own
        return dict(BLOCK_M=min(rows, 32), BLOCK_N=max(16, min(32, 2048 // columns)), num_warps=8, num_stages=3)
    # Products of float32 run on the ordinary units, out of registers.
    keys = max(16, min(64, (8192 if itemsize == 2 else 2048) // columns))
    is_wide = columns > 128 or (columns == 128 and itemsize == 2)
    return dict(BLOCK_M=min(rows, 64 if itemsize == 2 else 32), BLOCK_N=keys, num_warps=8 if is_wide else 4, num_stages=3)


def _split_options(head_dim: int, itemsize: int, group: int) -> dict[str, int]:
    options = _tile(head_dim, itemsize, max(16, triton.next_power_of_2(group)))
    return options if head_dim % 16 else options | dict(num_warps=4)


def _tile_options(head_dim: int, itemsize: int) -> dict[str, int]:
    return _tile(head_dim, itemsize, 64)


def _rotary(cos: Tensor | None, interleaved: bool) -> str:
    return "none" if cos is None else "pairs" if interleaved else "halves"


def _append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, positions: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool, k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:  # fmt: skip
    tokens, heads, head_dim = k.shape
    if k.numel() == 0:
        return
    k, v = with_unit_stride(k), with_unit_stride(v)
    block_h = _heads_per_program(heads, head_dim)
    _append_kernel[(tokens, triton.cdiv(heads, block_h))](
        k, v, k_cache, v_cache, *_whole(slot_mapping, positions, cos, sin, k_scale, v_scale), heads,
        0 if cos is None else len(cos), *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        BLOCK_SIZE=k_cache.shape[1], D=head_dim, BLOCK_D=block_d(head_dim), ROTARY=_rotary(cos, interleaved), BLOCK_H=block_h,
    )  # fmt: skip


def _heads_per_program(heads: int, head_dim: int) -> int:
    """Eight elements a thread."""
    return min(triton.next_power_of_2(heads), max(1, 1024 // block_d(head_dim)))


def _whole(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool, softmax_scale: float, window: int, alibi_slopes: Tensor | None, k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.numel() == 0:
        return o
    if block_table.numel() == 0 or k_cache.numel() == 0:
        return o.zero_()
    q, block_table = with_unit_stride(q), with_unit_stride(block_table)
    seq_lens, cu_seqlens_q, *others = _whole(seq_lens, cu_seqlens_q, cos, sin, alibi_slopes, k_scale, v_scale)
    total_q, heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    sequences, group = len(seq_lens), heads // kv_heads
    few = _few(group)

    inputs = (q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, *others)
    sizes = (softmax_scale, window, 0 if cos is None else len(cos), heads)
    strides = (*q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], block_table.stride(0))
    variant = dict(
        GROUP=group, FEW=few, BLOCK_SIZE=block_size, D=head_dim, BLOCK_D=block_d(head_dim), ROTARY=_rotary(cos, interleaved),
    )  # fmt: skip

    if total_q > few:
        options = _tile_options(head_dim, q.element_size())
        tiles = total_q * group // options["BLOCK_M"] + sequences
        halvings = (sequences - 1).bit_length()
        _tile_kernel[(tiles, kv_heads)](*inputs, o, *sizes, sequences, halvings, *strides, **variant, **options)

    options = _split_options(head_dim, q.element_size(), group)
    limits = dict(MIN_SPLIT=MIN_SPLIT, MAX_SPLITS=MAX_SPLITS)
    longest = min(block_table.shape[1] * block_size, window + few - 1)
    splits = min(triton.cdiv(longest, MIN_SPLIT), MAX_SPLITS)
    rows = min(total_q, sequences * few) if splits > 1 else 0
    partial = torch.empty((rows, heads, splits, head_dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((rows, heads, splits), dtype=torch.float32, device=q.device)
    _split_kernel[(sequences, kv_heads, splits)](*inputs, o, partial, lse, *sizes, splits, *strides, **variant, **limits, **options)
    if splits > 1:
        _merge_kernel[(sequences, heads)](
            seq_lens, cu_seqlens_q, partial, lse, o, window, heads, splits,
            FEW=few, D=head_dim, BLOCK_D=block_d(head_dim), BLOCK_N=options["BLOCK_N"], **limits,
        )  # fmt: skip
    return o


def configurations() -> list[Configuration]:
    """What dispatch can choose. Block size, group and head_dim are the model's: those at which tiles change, and awkward ones."""
    found = []
    for dtype, head_dim, rotary, block_size, group, has_alibi, is_float8 in (
        ("bf16", 64, "pairs", 16, 1, False, False), ("bf16", 128, "pairs", 16, 8, False, False),
        ("bf16", 256, "halves", 64, 1, False, False), ("bf16", 40, "halves", 1, 3, True, False),
        ("fp16", 33, "none", 48, 71, True, False), ("fp32", 64, "pairs", 16, 1, False, False),
        ("fp32", 128, "halves", 16, 4, True, False), ("fp32", 256, "pairs", 16, 2, False, False),
        ("bf16", 128, "pairs", 16, 8, False, True),
    ):  # fmt: skip
        model = dict(BLOCK_SIZE=block_size, D=head_dim, BLOCK_D=block_d(head_dim), ROTARY=rotary)
        model |= {} if is_float8 else dict(k_scale_ptr=None, v_scale_ptr=None)
        if rotary == "none":
            model |= dict(cos_ptr=None, sin_ptr=None)
        attention = model | dict(GROUP=group, FEW=_few(group)) | ({} if has_alibi else dict(slope_ptr=None))
        limits = dict(MIN_SPLIT=MIN_SPLIT, MAX_SPLITS=MAX_SPLITS)
        itemsize = 4 if dtype == "fp32" else 2
        split = _split_options(head_dim, itemsize, group)
        found += [
            _configuration(_split_kernel, dtype, attention | limits | split),
            _configuration(_tile_kernel, dtype, attention | _tile_options(head_dim, itemsize)),
        ]
        if dtype == "bf16" and (is_float8 or head_dim != 64):
            found.append(_configuration(_append_kernel, dtype, model | dict(BLOCK_H=_heads_per_program(8, head_dim))))
        if dtype == "bf16" and head_dim in (40, 256):
            merge = dict(FEW=_few(group), D=head_dim, BLOCK_D=block_d(head_dim), BLOCK_N=split["BLOCK_N"])
            found.append(_configuration(_merge_kernel, dtype, limits | merge))
    return found


def _configuration(kernel: Any, dtype: str, constexprs: dict[str, Any]) -> Configuration:
    launch = {option: constexprs.pop(option) for option in ("num_warps", "num_stages") if option in constexprs}
    types = {"slot_ptr": "*i64:16", "position_ptr": "*i64:16", "softmax_scale": "fp32", "table_b": "i32"}
    types |= {f"{whole}_ptr": "*i32:16" for whole in ("table", "length", "bound")}
    types |= {f"{wide}_ptr": "*fp32:16" for wide in ("cos", "sin", "slope", "k_scale", "v_scale", "partial", "lse")}
    types |= {number: "i32" for number in ("window", "max_position", "heads", "sequences", "halvings", "splits")}
    is_float8 = "k_scale_ptr" in kernel.arg_names and "k_scale_ptr" not in constexprs
    if is_float8:
        cache = ("k_cache_ptr", "v_cache_ptr") if "k_cache_ptr" in kernel.arg_names else ("k_ptr", "v_ptr")
        types |= dict.fromkeys(cache, "*u8:16")
    stride = "i32" if constexprs["D"] % 16 else "i32:16"
    signature = {
        name: types.get(name, f"*{dtype}:16" if name.endswith("_ptr") else stride)
        for name in kernel.arg_names
        if name not in constexprs
    }
    role = kernel.__name__.strip("_").removesuffix("_kernel")
    shape = " ".join(f"{name}={constexprs[name]}" for name in ("D", "ROTARY", "BLOCK_SIZE", "GROUP") if name in constexprs)
    extra = (" ALiBi" if "slope_ptr" in signature else "") + (" float8" if is_float8 else "")
    return Configuration(kernel, signature, constexprs, name=f"paged_attention {role} {dtype} {shape}{extra}", **launch)


paged_append_triton = define(
    "paged_append_triton(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, Tensor? positions,"
    " Tensor? cos, Tensor? sin, bool interleaved, Tensor? k_scale, Tensor? v_scale) -> ()",
    _append,
    lambda *inputs: None,
)
paged_attention_triton = define(
    "paged_attention_triton(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, Tensor cu_seqlens_q,"
    " Tensor? cos, Tensor? sin, bool interleaved, float softmax_scale, int window, Tensor? alibi_slopes, Tensor? k_scale,"
    " Tensor? v_scale) -> Tensor",
    _attention,
    lambda q, *rest: q.new_empty(q.shape),
)


def _refuses_cache(x: Tensor, k_cache: Tensor, v_cache: Tensor) -> str | None:
    if x.shape[2] > 256:
        return f"head_dim is {x.shape[2]}; the kernel serves at most 256"
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.shape[3] > 1 and cache.stride(3) != 1:
            return f"{name} has strides {cache.stride()}; the kernel needs the features of a head side by side, stride 1"
    return None


def refuses_append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, **options: Any
) -> str | None:
    return refuses_device(k) or refuses_dtype("k", k) or _refuses_cache(k, k_cache, v_cache)


def refuses_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, **options: Any
) -> str | None:
    return refuses_device(q) or refuses_dtype("q", q) or _refuses_cache(q, k_cache, v_cache)


def _bits(cache: Tensor) -> Tensor:
    """A float8 cache as uint8, which every GPU can load."""
    return cache.view(torch.uint8) if cache.dtype == FLOAT8 else cache


@APPEND.offer("triton", refuses_append)
def _serve_append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, *, positions: Tensor | None = None,
    cos: Tensor | None = None, sin: Tensor | None = None, interleaved: bool = True, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    k_cache, v_cache = _bits(k_cache), _bits(v_cache)
    paged_append_triton(k, v, k_cache, v_cache, slot_mapping, positions, cos, sin, interleaved, k_scale, v_scale)


@ATTENTION.offer("triton", refuses_attention)
def _serve_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, *,
    cos: Tensor | None = None, sin: Tensor | None = None, interleaved: bool = True, softmax_scale: float | None = None,
    window: int | None = None, alibi_slopes: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    window = UNBOUNDED if window is None else min(window, UNBOUNDED)
    return paged_attention_triton(
        q, _bits(k_cache), _bits(v_cache), block_table, seq_lens, cu_seqlens_q, cos, sin, interleaved, softmax_scale, window,
        alibi_slopes, k_scale, v_scale,
    )  # fmt: skip
