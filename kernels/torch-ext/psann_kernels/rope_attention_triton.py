"""Triton twin of rope_attention. Read rope_attention.py first; rope_attention_tiles_triton.py has the parts that both directions
share, rope_attention_backward_triton.py the gradients.

Where the GPU and the strides allow it, the loops read their tiles by descriptors, elsewhere through pointers (`chosen`).

Forward turns K in a pass of its own (reads and writes K once) and Q inside the kernel, once per tile: turning K in the loop
would put it through registers for every tile of queries.  One program per tile of queries and head walks the keys that the
tile needs, softmax online, and writes o and the log-sum-exp (base 2); scores never reach memory.  Tiles that every query of
the program sees whole need no mask.  Backward keeps q, the turned k, v, o and the log-sum-exp.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rope_attention_backward_triton as backward
from .documents import document_bounds
from .library import define
from .rope_attention import OP
from .rope_attention_tiles_triton import (
    Tile,
    Tiles,
    angles,
    chosen,
    configuration,
    distance,
    features,
    load_operand,
    load_rows,
    memory,
    narrowing,
    operand,
    query_tile,
    rotate_kernel,
    rotated,
    rows_per_program,
    skipping,
    turn,
    variant,
    with_unit_stride,
)
from .triton_support import LOG2_E, Configuration, narrow, refuses_device, refuses_dtype


@triton.jit
def _attend(
    m, l, acc, q, k_ptr, v_ptr, b, kv_head, k_t, v_t, c_k, inside_k, c_v, inside_v, position, origin, first, slope, scale, low,
    high, skip_low, skip_high, keys,
    DTYPE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, IS_BOUNDED: tl.constexpr,
    HAS_ALIBI: tl.constexpr, IS_DESCRIBED: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys low to high, less skip_low to skip_high. m is in units of log2; l, acc sum 2^(score - m)."""
    for step in range(low, high - (skip_high - skip_low), BLOCK_N):
        at = skipping(step, skip_low, skip_high)
        n = at + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, b, kv_head, at, keys, k_t, c_k, inside_k, BLOCK_N, BLOCK_D, IS_DESCRIBED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if HAS_ALIBI:
            s = s * scale + slope * distance(n[None, :], position[:, None], origin)
        if MASKED:
            seen = n[None, :] <= position[:, None]
            if IS_BOUNDED:
                seen &= n[None, :] >= first[:, None]
            s = tl.where(seen, s, float("-inf"))

        # The scale is positive, so the largest product is the largest score, and scaling joins the subtraction in one FMA.
        top = tl.max(s, 1)
        if not HAS_ALIBI:
            top *= scale
        m_next = tl.maximum(m, top)
        # A row that has seen no key yet has maximum -inf; shifting by it would give NaN, so such rows shift by 0.
        shift = tl.where(m_next == float("-inf"), 0.0, m_next) if MASKED else m_next
        if HAS_ALIBI:
            p = tl.exp2(s - shift[:, None])
        else:
            p = tl.exp2(s * scale - shift[:, None])
        fade = tl.exp2(m - shift)

        # V is masked too: p is 0 past the end, but 0 * NaN is NaN.
        v = load_rows(v_ptr, b, kv_head, at, keys, v_t, c_v, inside_v, BLOCK_N, BLOCK_D, IS_DESCRIBED)
        l = l * fade + tl.sum(p, 1)
        acc = tl.dot(operand(p, DTYPE), v, acc * fade[:, None], input_precision="ieee")
        m = m_next
    return m, l, acc


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, start_ptr, slope_ptr, o_ptr, lse_ptr, softmax_scale,
    queries, keys, rows, heads, group, max_position, window, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_ALIBI: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_DESCRIBED: tl.constexpr,
):  # fmt: skip
    row, b, h, i, position, start, first, origin, low, full_low, full_high, high = query_tile(
        queries, keys, rows, heads, start_ptr, window, BLOCK_M, BLOCK_N, HAS_DOCUMENTS, HAS_WINDOW
    )
    c_k, inside_k = features(D, BLOCK_D, ROTARY)
    c_v, inside_v = features(D, BLOCK_D, "none")
    kv_head = h // group
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    if not IS_DESCRIBED:
        k_ptr += b * k_b + kv_head * k_h
        v_ptr += b * v_b + kv_head * v_h

    q = load_operand(q_ptr + b * q_b + h * q_h + i[:, None] * q_t + c_k[None, :], (i < queries)[:, None] & inside_k[None, :])
    if ROTARY != "none":
        cos, sin = angles(cos_ptr, sin_ptr, position - start, i < queries, max_position, D, BLOCK_D)
        q = operand(turn(q.to(tl.float32), cos, sin, BLOCK_M, BLOCK_D, ROTARY), dtype)
    scale = softmax_scale * LOG2_E
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slope_ptr + h) * LOG2_E
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    m, l, acc = _attend(
        m, l, acc, q, k_ptr, v_ptr, b, kv_head, k_t, v_t, c_k, inside_k, c_v, inside_v, position, origin, first, slope, scale,
        full_low, full_high, 0, 0, keys, dtype, BLOCK_D, BLOCK_N, False, False, HAS_ALIBI, IS_DESCRIBED,
    )  # fmt: skip
    m, l, acc = _attend(
        m, l, acc, q, k_ptr, v_ptr, b, kv_head, k_t, v_t, c_k, inside_k, c_v, inside_v, position, origin, first, slope, scale,
        low, high, full_low, full_high, keys, dtype, BLOCK_D, BLOCK_N, True, HAS_DOCUMENTS or HAS_WINDOW, HAS_ALIBI,
        IS_DESCRIBED,
    )  # fmt: skip

    # Queries without a key have l = 0: o is 0, and an infinite log-sum-exp makes their probabilities 0 in backward.
    is_empty = l == 0
    l = tl.where(is_empty, 1.0, l)
    o = acc / l[:, None]
    lse = tl.where(is_empty, float("inf"), m + tl.log2(l))
    out = ((b * queries + i) * heads + h)[:, None] * D + c_v[None, :]
    tl.store(o_ptr + out, narrow(o, o_ptr.dtype.element_ty), mask=(i < queries)[:, None] & inside_v[None, :])
    tl.store(lse_ptr + row * queries + i, lse, mask=i < queries)


# Chosen by compiling: no spilled registers on sm_80 and sm_90, and at most 99 KB of shared memory, which is what the small GPUs of
# each generation have.
TILES: Tiles = {
    (16, False): Tile(128, 64, 4, 3),
    (32, False): Tile(128, 64, 4, 3),
    (64, False): Tile(128, 64, 8, 3),
    (128, False): Tile(128, 64, 8, 2),
    (256, False): Tile(64, 32, 8, 2),
    (16, True): Tile(64, 32, 8, 1),
    (32, True): Tile(64, 32, 8, 1),
    (64, True): Tile(32, 32, 8, 1),
    (128, True): Tile(32, 32, 8, 1),
    (256, True): Tile(16, 16, 8, 2),
}
WARP_TILES: Tiles = {(128, False): Tile(128, 32, 8, 2)}
# Of heads of 64, two programs share a multiprocessor (at most 128 registers a thread without options); of heads of 128 one has it
# alone, and may have more shared memory than small GPUs have.
DESCRIBED_TILES: Tiles = {(64, False): Tile(128, 64, 8, 3), (128, False): Tile(128, 128, 8, 2)}
# On sm_100, tiles of 128 by 128 spill (Triton 3.9: 56 to 256 bytes a thread by descriptors, 104 to 424 through pointers), those of
# 128 by 64 do not by descriptors (Triton 3.6 and 3.9), and by 8 bytes through pointers:
# so the tile is changed, not the way to read.
SM_100_TILES: Tiles = {**DESCRIBED_TILES, (128, False): Tile(128, 64, 8, 2)}


def described_tiles(device: torch.device) -> Tiles:
    """The rows of which descriptors are made on `device`."""
    is_sm_100 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10
    return SM_100_TILES if is_sm_100 else DESCRIBED_TILES


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, start: Tensor | None, end: Tensor | None,
    alibi_slopes: Tensor | None, interleaved: bool, softmax_scale: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    width = narrowing(window, keys)
    q, k, v = (with_unit_stride(t) for t in (q, k, v))
    turned_k = k.new_empty(0) if cos is None else rotated(k, cos, sin, start, 0, interleaved)
    k = k if cos is None else turned_k
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return o, lse, turned_k
    constants = variant(head_dim, cos, interleaved, start, width, alibi_slopes)
    tile, is_described = chosen(TILES, WARP_TILES, described_tiles(q.device), constants["ROTARY"], k, v)
    (k, v), strides = memory(tile.keys, is_described, k, v)
    _forward_kernel[(triton.cdiv(queries, tile.queries) * batch * heads,)](
        q, k, v, cos, sin, start, alibi_slopes, o, lse, softmax_scale,
        queries, keys, batch * heads, heads, heads // kv_heads, 0 if cos is None else cos.shape[0], width,
        *q.stride()[:3], *strides, **constants, **tile.options(), IS_DESCRIBED=is_described,
    )  # fmt: skip
    return o, lse, turned_k


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, start: Tensor | None, end: Tensor | None,
    alibi_slopes: Tensor | None, interleaved: bool, softmax_scale: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, queries, heads, _ = q.shape
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    return q.new_empty(q.shape), lse, k.new_empty((0,) if cos is None else k.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, cos, sin, start, end, alibi_slopes, *ctx.options = inputs
    o, lse, turned_k = output
    ctx.save_for_backward(q, k if cos is None else turned_k, v, o, lse, cos, sin, start, end, alibi_slopes)
    ctx.mark_non_differentiable(lse, turned_k)


def _differentiate(ctx: Any, do: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *backward.rope_attention_triton_backward(do, *ctx.saved_tensors, *ctx.options), *[None] * 8


rope_attention_triton = define(
    "rope_attention_triton(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor? start, Tensor? end,"
    " Tensor? alibi_slopes, bool interleaved, float softmax_scale, SymInt? window) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _differentiate,
    _setup_context,
)


def configurations() -> list[Configuration]:
    """Every row of the tables with all options on, which takes most registers, and the plain call at the usual widths.

    Which options are on is the caller's choice; float16 compiles like bfloat16. Left out are rows whose tile is the next width's
    too, as that takes more of everything, and the plain call through pointers where only odd strides keep it from descriptors.
    """
    full = dict(ROTARY="halves", HAS_DOCUMENTS=True, HAS_WINDOW=True, HAS_ALIBI=True)
    plain = dict(ROTARY="pairs", HAS_DOCUMENTS=False, HAS_WINDOW=False, HAS_ALIBI=False)
    found = []
    for kernel, tiles, warp_tiles, described_tiles in (
        (_forward_kernel, TILES, WARP_TILES, DESCRIBED_TILES),
        (backward.dk_dv_kernel, backward.KEY_TILES, backward.WARP_KEY_TILES, backward.DESCRIBED_KEY_TILES),
        (backward.dq_kernel, backward.QUERY_TILES, {}, backward.DESCRIBED_QUERY_TILES),
    ):
        for (width, _), tile in described_tiles.items():
            arguments = ("q_ptr", "do_ptr") if kernel is backward.dk_dv_kernel else ("k_ptr", "v_ptr")
            on_sm_100 = SM_100_TILES[(width, False)] if kernel is _forward_kernel else tile
            both = [("", tile, ("sm_90", "sm_100"))]
            if on_sm_100 != tile:
                both = [("", tile, ("sm_90",)), (" on sm_100", on_sm_100, ("sm_100",))]
            for where, own, targets in both:
                rows = dict.fromkeys(arguments, own.queries if kernel is backward.dk_dv_kernel else own.keys)
                for form, options in (("full", full), ("plain", plain)):
                    name = f"{form} by descriptors{where}"
                    found.append(configuration(kernel, name, "bf16", width, own, options, targets, described=rows))
        for (width, is_float32), tile in tiles.items():
            dtype = "fp32" if is_float32 else "bf16"
            own = warp_tiles.get((width, is_float32))
            targets = None if own is None else ("sm_90", "sm_100", "gfx942")
            if tiles.get((2 * width, is_float32)) != tile:
                found.append(configuration(kernel, "full", dtype, width, tile, full, targets))
            if own is not None:
                found.append(configuration(kernel, "full by warp", dtype, width, own, full, ("sm_80", "sm_120")))
            if dtype == "bf16" and width in (64, 128):
                targets = ("sm_80", "sm_120", "gfx942") if own is None else ("gfx942",)
                found.append(configuration(kernel, "plain", dtype, width, tile, plain, targets))
    documents = dict(ROTARY="pairs", HAS_DOCUMENTS=True)
    return [
        *found,
        configuration(rotate_kernel, "pairs", "bf16", 64, None, documents | dict(BLOCK_R=rows_per_program(64))),
        configuration(rotate_kernel, "halves", "fp32", 128, None, documents | dict(ROTARY="halves", BLOCK_R=rows_per_program(128))),
        configuration(backward.delta_kernel, "plain", "bf16", 64, None, dict(BLOCK_R=rows_per_program(64))),
    ]


def refuses(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, **options: Any) -> str | None:
    if q.shape[-1] > 256:
        return f"head_dim is {q.shape[-1]}; the kernel serves at most 256"
    return refuses_device(q) or refuses_dtype("q", q)


@OP.offer("triton", refuses)
def _serve(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, *, cu_seqlens: Tensor | None = None,
    interleaved: bool = True, softmax_scale: float, window: int | None = None, alibi_slopes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    start, end = None, None
    if cu_seqlens is not None:
        start, end = document_bounds(cu_seqlens, k.shape[0] * k.shape[1], row_length=k.shape[1])
    # The kernels count offsets in whole tables; halves of one table, as other libraries keep them, have rows further apart.
    cos, sin, alibi_slopes = (None if t is None else t.contiguous() for t in (cos, sin, alibi_slopes))
    o, _, _ = rope_attention_triton(q, k, v, cos, sin, start, end, alibi_slopes, interleaved, softmax_scale, window)
    return o
