"""Gradients of rope_attention's Triton twin. Read rope_attention_triton.py first.

    P = 2^(S - lse)    dV = P^T dO    dP = dO V^T    dS = P (dP - delta)    dQ = scale dS K    dK = scale dS^T Q

with delta the row sums of dO * O, made by a pass of its own; another pass turns Q, which the key kernel's loop could not do
(see the forward).  Two kernels, one per tile of keys for dK and dV, one per tile of queries for dQ: scores are computed
twice, 7 products where 5 would do, and in exchange nothing is added by atomics, so gradients have the same bits in every
run.  The key kernel computes S^T = K Q^T and dP^T = V dO^T, because transposing the result of a product that lives in
registers is miscompiled on Hopper by Triton 3.4 to 3.7.  It walks the queries of all heads of its group, so grouped heads
need no second sum.  dQ and dK are turned back in the epilogues.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .library import define
from .rope_attention_tiles_triton import (
    Tile,
    Tiles,
    angles,
    block_d,
    chosen,
    distance,
    document_start,
    features,
    load_operand,
    load_rows,
    memory,
    narrowing,
    operand,
    query_tile,
    rotated,
    rows_per_program,
    skipping,
    turn,
    variant,
    whole_tiles,
    with_unit_stride,
)
from .triton_support import LOG2_E, narrow, widen


@triton.jit
def delta_kernel(
    o_ptr, do_ptr, delta_ptr, rows, tokens, heads, do_b, do_t, do_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # o is contiguous (B, T, H, D), delta (B, H, T).
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    b, t, h = r // heads // tokens, r // heads % tokens, r % heads
    c, inside = features(D, BLOCK_D, "none")
    here = (r < rows)[:, None] & inside[None, :]

    o = widen(tl.load(o_ptr + r[:, None] * D + c[None, :], mask=here, other=0.0))
    do = widen(tl.load(do_ptr + (b * do_b + t * do_t + h * do_h)[:, None] + c[None, :], mask=here, other=0.0))

    tl.store(delta_ptr + (b * heads + h) * tokens + t, tl.sum(o * do, 1), mask=r < rows)


@triton.jit
def _past_last_query(
    n, exists, b, queries, keys, end_ptr, window, HAS_DOCUMENTS: tl.constexpr, HAS_WINDOW: tl.constexpr
):  # fmt: skip
    """One past the last query that sees key n (a block of keys or one) of row b, int32."""
    until = n * 0 + queries
    if HAS_DOCUMENTS:
        until = (tl.load(end_ptr + b * keys + n, mask=exists, other=0) - b * keys).to(tl.int32)
    if HAS_WINDOW:
        until = tl.minimum(until, n + window - (keys - queries))
    return until


@triton.jit
def _add_queries(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, b, h, q_t, do_t, c_k, inside_k, c_v, inside_v, n, origin, until, slope, scale,
    low, high, skip_low, skip_high, queries, keys,
    DTYPE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, IS_BOUNDED: tl.constexpr,
    HAS_ALIBI: tl.constexpr, IS_DESCRIBED: tl.constexpr,
):  # fmt: skip
    """What queries low to high of one head, less skip_low to skip_high, add to dk and dv of the keys n.

    Scores are transposed, (keys, queries). `until` is one past the last query that sees each key.
    """
    for step in range(low, high - (skip_high - skip_low), BLOCK_M):
        at = skipping(step, skip_low, skip_high)
        i = at + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, b, h, at, queries, q_t, c_k, inside_k, BLOCK_M, BLOCK_D, IS_DESCRIBED)
        # Rows past the end have an infinite log-sum-exp, so probability 0.
        lse = tl.load(lse_ptr + i, mask=i < queries, other=float("inf"))
        position = i + keys - queries
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
        if HAS_ALIBI:
            s += slope * distance(n[:, None], position[None, :], origin)
        p = tl.exp2(s - lse[None, :])
        if MASKED:
            seen = n[:, None] <= position[None, :]
            if IS_BOUNDED:
                seen &= i[None, :] < until[:, None]
            p = tl.where(seen, p, 0.0)

        do = load_rows(do_ptr, b, h, at, queries, do_t, c_v, inside_v, BLOCK_M, BLOCK_D, IS_DESCRIBED)
        delta = tl.load(delta_ptr + i, mask=i < queries, other=0.0)
        dv = tl.dot(operand(p, DTYPE), do, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
        dk = tl.dot(operand(ds, DTYPE), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, cos_ptr, sin_ptr, start_ptr, end_ptr, slope_ptr, dk_ptr, dv_ptr,
    softmax_scale, queries, keys, rows, kv_heads, group, max_position, window,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_ALIBI: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_DESCRIBED: tl.constexpr,
):  # fmt: skip
    # rows is B * Hkv. The first keys are seen by most queries, so their tiles start first, as they should.
    program = tl.program_id(0).to(tl.int64)
    tile, row = program // rows, program % rows
    b, kv_head = row // kv_heads, row % kv_heads
    n64 = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    n = n64.to(tl.int32)
    c_k, inside_k = features(D, BLOCK_D, ROTARY)
    c_v, inside_v = features(D, BLOCK_D, "none")
    k = load_operand(k_ptr + b * k_b + kv_head * k_h + n64[:, None] * k_t + c_k[None, :], (n < keys)[:, None] & inside_k[None, :])
    v = load_operand(v_ptr + b * v_b + kv_head * v_h + n64[:, None] * v_t + c_v[None, :], (n < keys)[:, None] & inside_v[None, :])
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    scale = softmax_scale * LOG2_E

    # The queries that see some of the keys, low to high, and those that see all of them, full_low to full_high.
    first_n = (tile * BLOCK_N).to(tl.int32)
    last_n = tl.minimum(first_n + BLOCK_N, keys) - 1
    shift = keys - queries
    low = tl.maximum(first_n - shift, 0)
    full_low = low + whole_tiles(last_n - shift - low + BLOCK_M - 1, BLOCK_M)
    until = _past_last_query(n, n < keys, b, queries, keys, end_ptr, window, HAS_DOCUMENTS, HAS_WINDOW)
    high = _past_last_query(last_n, last_n < keys, b, queries, keys, end_ptr, window, HAS_DOCUMENTS, HAS_WINDOW)
    full_high = tl.maximum(full_low, high)
    if HAS_DOCUMENTS or HAS_WINDOW:
        seen_by_all = _past_last_query(first_n, first_n < keys, b, queries, keys, end_ptr, window, HAS_DOCUMENTS, HAS_WINDOW)
        full_high = full_low + whole_tiles(seen_by_all - full_low, BLOCK_M)

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for member in range(0, group):
        h = kv_head * group + member
        q_head, do_head = q_ptr, do_ptr
        if not IS_DESCRIBED:
            q_head += b * q_b + h * q_h
            do_head += b * do_b + h * do_h
        lse_head = lse_ptr + (b * kv_heads * group + h) * queries
        delta_head = delta_ptr + (b * kv_heads * group + h) * queries
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(slope_ptr + h) * LOG2_E
        dk, dv = _add_queries(
            dk, dv, k, v, q_head, do_head, lse_head, delta_head, b, h, q_t, do_t, c_k, inside_k, c_v, inside_v, n, first_n, until,
            slope, scale, low, high, full_low, full_high, queries, keys,
            dtype, BLOCK_D, BLOCK_M, True, HAS_DOCUMENTS or HAS_WINDOW, HAS_ALIBI, IS_DESCRIBED,
        )  # fmt: skip
        dk, dv = _add_queries(
            dk, dv, k, v, q_head, do_head, lse_head, delta_head, b, h, q_t, do_t, c_k, inside_k, c_v, inside_v, n, first_n, until,
            slope, scale, full_low, full_high, 0, 0, queries, keys,
            dtype, BLOCK_D, BLOCK_M, False, False, HAS_ALIBI, IS_DESCRIBED,
        )  # fmt: skip

    out = ((b * keys + n64) * kv_heads + kv_head)[:, None] * D
    tl.store(dv_ptr + out + c_v[None, :], narrow(dv, dv_ptr.dtype.element_ty), mask=(n < keys)[:, None] & inside_v[None, :])
    dk *= softmax_scale
    if ROTARY != "none":
        start = document_start(n, b, keys, start_ptr, n < keys, HAS_DOCUMENTS)
        cos, sin = angles(cos_ptr, sin_ptr, n - start, n < keys, max_position, D, BLOCK_D)
        dk = turn(dk, cos, -sin, BLOCK_N, BLOCK_D, ROTARY)
    tl.store(dk_ptr + out + c_k[None, :], narrow(dk, dk_ptr.dtype.element_ty), mask=(n < keys)[:, None] & inside_k[None, :])


@triton.jit
def _add_keys(
    dq, q, do, lse, delta, k_ptr, v_ptr, b, kv_head, k_t, v_t, c_k, inside_k, c_v, inside_v, position, origin, first, slope, scale,
    low, high, skip_low, skip_high, keys,
    DTYPE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, IS_BOUNDED: tl.constexpr,
    HAS_ALIBI: tl.constexpr, IS_DESCRIBED: tl.constexpr,
):  # fmt: skip
    """What keys low to high, less skip_low to skip_high, add to dq of a tile of queries."""
    for step in range(low, high - (skip_high - skip_low), BLOCK_N):
        at = skipping(step, skip_low, skip_high)
        n = at + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, b, kv_head, at, keys, k_t, c_k, inside_k, BLOCK_N, BLOCK_D, IS_DESCRIBED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_ALIBI:
            s += slope * distance(n[None, :], position[:, None], origin)
        p = tl.exp2(s - lse[:, None])

        v = load_rows(v_ptr, b, kv_head, at, keys, v_t, c_v, inside_v, BLOCK_N, BLOCK_D, IS_DESCRIBED)
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        if MASKED:
            seen = n[None, :] <= position[:, None]
            if IS_BOUNDED:
                seen &= n[None, :] >= first[:, None]
            ds = tl.where(seen, ds, 0.0)
        dq = tl.dot(operand(ds, DTYPE), k, dq, input_precision="ieee")
    return dq


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, cos_ptr, sin_ptr, start_ptr, slope_ptr, dq_ptr, softmax_scale,
    queries, keys, rows, heads, group, max_position, window, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_ALIBI: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_DESCRIBED: tl.constexpr,
):  # fmt: skip
    row, b, h, i, position, start, first, origin, low, full_low, full_high, high = query_tile(
        queries, keys, rows, heads, start_ptr, window, BLOCK_M, BLOCK_N, HAS_DOCUMENTS, HAS_WINDOW
    )
    c_k, inside_k = features(D, BLOCK_D, ROTARY)
    c_v, inside_v = features(D, BLOCK_D, "none")
    here_k, here_v = (i < queries)[:, None] & inside_k[None, :], (i < queries)[:, None] & inside_v[None, :]
    kv_head = h // group
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    if not IS_DESCRIBED:
        k_ptr += b * k_b + kv_head * k_h
        v_ptr += b * v_b + kv_head * v_h

    q = load_operand(q_ptr + b * q_b + h * q_h + i[:, None] * q_t + c_k[None, :], here_k)
    do = load_operand(do_ptr + b * do_b + h * do_h + i[:, None] * do_t + c_v[None, :], here_v)
    lse = tl.load(lse_ptr + row * queries + i, mask=i < queries, other=float("inf"))
    delta = tl.load(delta_ptr + row * queries + i, mask=i < queries, other=0.0)
    scale = softmax_scale * LOG2_E
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slope_ptr + h) * LOG2_E
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    dq = _add_keys(
        dq, q, do, lse, delta, k_ptr, v_ptr, b, kv_head, k_t, v_t, c_k, inside_k, c_v, inside_v, position, origin, first, slope,
        scale, full_low, full_high, 0, 0, keys, dtype, BLOCK_D, BLOCK_N, False, False, HAS_ALIBI, IS_DESCRIBED,
    )  # fmt: skip
    dq = _add_keys(
        dq, q, do, lse, delta, k_ptr, v_ptr, b, kv_head, k_t, v_t, c_k, inside_k, c_v, inside_v, position, origin, first, slope,
        scale, low, high, full_low, full_high, keys, dtype, BLOCK_D, BLOCK_N, True, HAS_DOCUMENTS or HAS_WINDOW, HAS_ALIBI,
        IS_DESCRIBED,
    )  # fmt: skip

    dq *= softmax_scale
    if ROTARY != "none":
        cos, sin = angles(cos_ptr, sin_ptr, position - start, i < queries, max_position, D, BLOCK_D)
        dq = turn(dq, cos, -sin, BLOCK_M, BLOCK_D, ROTARY)
    out = ((b * queries + i) * heads + h)[:, None] * D
    tl.store(dq_ptr + out + c_k[None, :], narrow(dq, dq_ptr.dtype.element_ty), mask=here_k)


# Chosen like the forward's TILES.
KEY_TILES: Tiles = {
    (16, False): Tile(64, 128, 8, 2),
    (32, False): Tile(64, 128, 8, 2),
    (64, False): Tile(32, 128, 8, 2),
    (128, False): Tile(32, 64, 8, 2),
    (256, False): Tile(32, 32, 8, 1),
    (16, True): Tile(64, 32, 8, 1),
    (32, True): Tile(64, 32, 8, 1),
    (64, True): Tile(32, 32, 8, 1),
    (128, True): Tile(16, 16, 8, 1),
    (256, True): Tile(16, 16, 8, 1),
}
WARP_KEY_TILES: Tiles = {
    (16, False): Tile(32, 128, 8, 2),
    (32, False): Tile(64, 128, 8, 1),
    (64, False): Tile(32, 128, 8, 1),
    (128, False): Tile(16, 64, 8, 2),
}
QUERY_TILES: Tiles = {
    (16, False): Tile(128, 64, 4, 2),
    (32, False): Tile(128, 64, 8, 2),
    (64, False): Tile(128, 64, 8, 2),
    (128, False): Tile(64, 64, 8, 2),
    (256, False): Tile(32, 32, 8, 1),
    (16, True): Tile(64, 32, 8, 1),
    (32, True): Tile(32, 32, 8, 1),
    (64, True): Tile(32, 32, 8, 1),
    (128, True): Tile(16, 16, 8, 1),
    (256, True): Tile(16, 16, 8, 2),
}

# More queries than these spill registers in the key kernel, by descriptors too.
DESCRIBED_KEY_TILES: Tiles = {(64, False): Tile(32, 128, 8, 2), (128, False): Tile(32, 64, 8, 2)}
DESCRIBED_QUERY_TILES: Tiles = {(64, False): Tile(128, 64, 8, 2), (128, False): Tile(128, 64, 8, 2)}


def delta_of(o: Tensor, do: Tensor) -> Tensor:
    """Row sums of do * o, both (B, T, H, D): (B, H, T) float32."""
    batch, queries, heads, head_dim = o.shape
    delta = torch.empty((batch, heads, queries), dtype=torch.float32, device=o.device)
    rows, block_r = batch * queries * heads, rows_per_program(head_dim)
    delta_kernel[(triton.cdiv(rows, block_r),)](
        o, do, delta, rows, queries, heads, *do.stride()[:3], D=head_dim, BLOCK_D=block_d(head_dim), BLOCK_R=block_r
    )
    return delta


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cos: Tensor | None, sin: Tensor | None,
    start: Tensor | None, end: Tensor | None, alibi_slopes: Tensor | None, interleaved: bool, softmax_scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """k is turned already, and dk is the gradient of what it was before."""
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, k, v, do = (with_unit_stride(t) for t in (q, k, v, do))
    if cos is not None:
        q = rotated(q, cos, sin, start, keys - queries, interleaved)
    delta = delta_of(o, do)

    width = narrowing(window, keys)
    constants = variant(head_dim, cos, interleaved, start, width, alibi_slopes)
    sizes = (heads // kv_heads, 0 if cos is None else cos.shape[0], width)
    q_strides, kv_strides, do_strides = q.stride()[:3], (*k.stride()[:3], *v.stride()[:3]), do.stride()[:3]
    tile, is_described = chosen(KEY_TILES, WARP_KEY_TILES, DESCRIBED_KEY_TILES, constants["ROTARY"], q, do)
    (read_q, read_do), strides = memory(tile.queries, is_described, q, do)
    dk_dv_kernel[(triton.cdiv(keys, tile.keys) * batch * kv_heads,)](
        read_q, k, v, read_do, lse, delta, cos, sin, start, end, alibi_slopes, dk, dv, softmax_scale,
        queries, keys, batch * kv_heads, kv_heads, *sizes, *strides[:3], *kv_strides, *strides[3:],
        **constants, **tile.options(), IS_DESCRIBED=is_described,
    )  # fmt: skip
    tile, is_described = chosen(QUERY_TILES, {}, DESCRIBED_QUERY_TILES, constants["ROTARY"], k, v)
    (read_k, read_v), strides = memory(tile.keys, is_described, k, v)
    dq_kernel[(triton.cdiv(queries, tile.queries) * batch * heads,)](
        q, read_k, read_v, do, lse, delta, cos, sin, start, alibi_slopes, dq, softmax_scale,
        queries, keys, batch * heads, heads, *sizes, *q_strides, *strides, *do_strides,
        **constants, **tile.options(), IS_DESCRIBED=is_described,
    )  # fmt: skip
    return dq, dk, dv


def _backward_fake(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


rope_attention_triton_backward = define(
    "rope_attention_triton_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? cos, Tensor? sin,"
    " Tensor? start, Tensor? end, Tensor? alibi_slopes, bool interleaved, float softmax_scale, SymInt? window)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
