"""The gradients of rope_attention for sm_90 in Gluon. Read rope_attention_kernel_gluon.py first.

    P = 2^(S - lse)    dV = P^T dO    dP = dO V^T    dS = P (dP - delta)    dQ = scale dS K    dK = scale dS^T Q

It has not run on a GPU; what is known of it is what is known of the forward. One kernel with 5 products where the plain Triton twin
takes two with 7. A program owns a tile of keys and walks the queries that see it, of all heads of the group, so that dK and dV are
sums in registers. Two consumers of four warps own half of the keys each and compute S^T = K Q^T and dP^T = V dO^T, whose results
are the left factors of dV and dK as they lie in registers. For dQ they exchange dS through shared memory, and each makes half of
its columns for all keys.

dQ is summed in global memory, in the same order in every run: the program of the last keys adds first, and a counter per tile of
queries says how many have added. One warp, the turn taker, waits for the program's turn and passes it on, so that no consumer waits
for global memory. Programs take their keys by a ticket, the last keys first: whoever waits does so for one that has started, in
whatever order a GPU starts them. With the last keys first nobody waits where programs begin together, for each reaches a tile of
queries one step after the one before it. The price is that the longest programs begin last.

Spills cost more here than instructions, and registers are full: 128 of sums and 64 of scores of the 240 a thread. So what a row of
queries needs (log-sum-exp, delta, the last key that it sees, its row of dQ) lies in shared memory, where the producer puts it, and
tiles that stay are indexed anew in each step (see `zero`).
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .rope_attention_kernel_gluon import CONSUMER_REGISTERS, CONSUMERS, PRODUCER_REGISTERS, STAGES, load_tile


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, do_desc, lse_ptr, delta_ptr, k_tile, v_tile, q_ring, do_ring, lse_ring, delta_ring, sight_ring, dq_ring,
    kv_ready, q_ready, do_ready, rows_ready, free, b, kv_head, n, group, first, tiles, queries, row, shift,
    BLOCK_M: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Fetches the program's keys and values once, then the tiles of queries and of dO, and what else each query needs.

    row     the row of lse and delta, (B * H, queries), of the group's first head
    shift   what makes of a query's index the last key that it sees, counted from the program's first
    """
    ROWS: gl.constexpr = k_tile.shape[3]
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mbarrier.expect(kv_ready.index(0), 2 * CONSUMERS * ROWS * D * 2)
    for part in gl.static_range(CONSUMERS):
        load_tile(k_desc, [b, kv_head, n + part * ROWS, 0], kv_ready.index(0), k_tile.index(part))
        load_tile(v_desc, [b, kv_head, n + part * ROWS, 0], kv_ready.index(0), v_tile.index(part))
    for t in range(0, group * tiles):
        slot = t % STAGES
        # A barrier that was never completed counts as one that completed its phase 1: the first round finds the slots free.
        phase = (t // STAGES + 1) & 1
        h = kv_head * group + t // tiles
        m = (first + t % tiles) * BLOCK_M
        mbarrier.wait(free.index(slot), phase)
        mbarrier.expect(q_ready.index(slot), BLOCK_M * D * 2)
        load_tile(q_desc, [b, h, m, 0], q_ready.index(slot), q_ring.index(slot))
        mbarrier.expect(do_ready.index(slot), BLOCK_M * D * 2)
        load_tile(do_desc, [b, h, m, 0], do_ready.index(slot), do_ring.index(slot))
        i = m + gl.arange(0, BLOCK_M, layout)
        at = (row + t // tiles).to(gl.int64) * queries + i
        # Queries past the end have an infinite log-sum-exp, so probability 0.
        lse_ring.index(slot).store(gl.load(lse_ptr + at, mask=i < queries, other=float("inf")))
        delta_ring.index(slot).store(gl.load(delta_ptr + at, mask=i < queries, other=0.0))
        sight_ring.index(slot).store(i + shift)
        dq_ring.index(slot).store((row + t // tiles) * ((first + tiles) * BLOCK_M) + i)
        mbarrier.arrive(rows_ready.index(slot))


@gluon.jit
def _take_turns(
    counter_ptr, turn, added, kv_tile, group, first, tiles, queries, shift,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Lets the consumers add to a tile of dQ when the `before` programs that come first have, and says when they are done."""
    for t in range(0, group * tiles):
        m = (first + t % tiles) * BLOCK_M
        before = (gl.minimum(m + BLOCK_M, queries) + shift - 1) // BLOCK_N - kv_tile
        counter = counter_ptr + t + t // tiles * first
        done = gl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        while done != before:
            done = gl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        mbarrier.arrive(turn.index(0))
        mbarrier.wait(added.index(0), t & 1)
        gl.atomic_add(counter, 1, sem="release", scope="gpu")


@gluon.jit
def _consume(
    dq_ptr, dk_ptr, dv_ptr, k_tile, v_tile, q_ring, do_ring, lse_ring, delta_ring, sight_ring, dq_ring, ds_tile, kv_ready, q_ready,
    do_ready, rows_ready, free, ds_ready, ds_free, turn, added, steps, softmax_scale,
    PART: gl.constexpr, BLOCK_M: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """dK and dV of one consumer's keys, which are rows PART * ROWS on of the program's, and half of the columns of dQ."""
    ROWS: gl.constexpr = k_tile.shape[3]
    COLUMNS: gl.constexpr = D // CONSUMERS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    q_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16])
    dtype: gl.constexpr = k_tile.dtype
    scale = softmax_scale * 1.4426950408889634  # log2(e)
    dk = gl.zeros([ROWS, D], gl.float32, kv_layout)
    dv = gl.zeros([ROWS, D], gl.float32, kv_layout)

    mbarrier.wait(kv_ready.index(0), 0)
    for t in range(0, steps):
        slot = t % STAGES
        phase = (t // STAGES) & 1
        # 0, which the compiler cannot know: what it takes for the same in each step, such as the descriptors of 24 products' tiles,
        # it computes once and then spills.
        zero = gl.minimum(t + steps, 0)

        k = k_tile.index(zero + PART).reshape([ROWS, D])
        v = v_tile.index(zero + PART).reshape([ROWS, D])
        nothing = gl.zeros([ROWS, BLOCK_M], gl.float32, s_layout)
        mbarrier.wait(q_ready.index(slot), phase)
        q = q_ring.index(slot).reshape([BLOCK_M, D])
        s = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(do_ready.index(slot), phase)
        do = do_ring.index(slot).reshape([BLOCK_M, D])
        dp = warpgroup_mma(v, do.permute((1, 0)), nothing, use_acc=False, is_async=True)

        # Weights while the other product runs. Here and below the rows are keys and the columns queries.
        mbarrier.wait(rows_ready.index(slot), phase)
        s = warpgroup_mma_wait(1, deps=[s])
        lse = lse_ring.index(slot).load(gl.SliceLayout(0, s_layout))
        p = gl.exp2(s * scale - lse[None, :])
        sight = sight_ring.index(slot).load(gl.SliceLayout(0, s_layout))
        row = PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
        # Keys past the last are hidden too: no query sees them.
        p = gl.where(row[:, None] <= sight[None, :], p, 0.0)
        weights = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, kv_layout, 2))
        dv = warpgroup_mma(weights, do, dv, is_async=True)

        dp = warpgroup_mma_wait(1, deps=[dp])
        delta = delta_ring.index(slot).load(gl.SliceLayout(0, s_layout))
        ds = (p * (dp - delta[None, :])).to(dtype)

        # Both consumers' dS, for dQ; their own keys' share of dK needs none of the other's.
        mbarrier.wait(ds_free.index(0), (t + 1) & 1)
        ds_tile.index(zero + PART).store(ds)
        fence_async_shared()
        mbarrier.arrive(ds_ready.index(0))
        grads = gl.convert_layout(ds, gl.DotOperandLayout(0, kv_layout, 2))
        dk = warpgroup_mma(grads, q, dk, is_async=True)
        mbarrier.wait(ds_ready.index(0), t & 1)
        dq = gl.zeros([BLOCK_M, COLUMNS], gl.float32, q_layout)
        for part in gl.static_range(CONSUMERS):
            columns = k_tile.index(zero + part).reshape([ROWS, D]).slice(PART * COLUMNS, COLUMNS, 1)
            dq = warpgroup_mma(ds_tile.index(zero + part).permute((1, 0)), columns, dq, use_acc=part > 0, is_async=True)

        dv, dk, weights, grads = warpgroup_mma_wait(CONSUMERS, deps=[dv, dk, weights, grads])
        row = dq_ring.index(slot).load(gl.SliceLayout(1, q_layout)).to(gl.int64)
        mbarrier.arrive(free.index(slot))
        dq = warpgroup_mma_wait(0, deps=[dq])
        mbarrier.arrive(ds_free.index(0))
        mbarrier.wait(turn.index(0), t & 1)
        column = gl.arange(0, COLUMNS, gl.SliceLayout(0, q_layout))
        gl.atomic_add(dq_ptr + PART * COLUMNS + row[:, None] * D + column[None, :], dq, sem="relaxed", scope="gpu")
        mbarrier.arrive(added.index(0))

    row = PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, kv_layout))  # those past the last key are 0
    column = gl.arange(0, D, gl.SliceLayout(0, kv_layout))
    gl.store(dk_ptr + row[:, None] * D + column[None, :], dk)
    gl.store(dv_ptr + row[:, None] * D + column[None, :], dv.to(dtype))


# One form for every size: of a size that is 1 the compiler would know too much for `zero`.
@gluon.jit(do_not_specialize=["queries", "keys", "rows", "kv_heads", "group"])
def backward_kernel(
    q_desc, k_desc, v_desc, do_desc, lse_ptr, delta_ptr, counter_ptr, dq_ptr, dk_ptr, dv_ptr, softmax_scale, queries, keys, rows,
    kv_heads, group,
    D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Adds to dq (B, H, queries, D) and writes dk and dv (B, Hkv, keys, D), queries and keys padded to whole tiles.

    q, k, v and do arrive as descriptors of (B, heads, T, D), q and k turned; dq, a sum that begins as 0, and dk leave float32, not
    scaled and not turned back. counter is 0 at first: the next ticket, then one for each tile of queries. rows is B * Hkv.
    """
    program = gl.atomic_add(counter_ptr, 1, sem="relaxed", scope="gpu")
    row = program % rows
    kv_tiles = (keys + BLOCK_N - 1) // BLOCK_N
    kv_tile = kv_tiles - 1 - program // rows
    b = row // kv_heads
    kv_head = row % kv_heads
    n = kv_tile * BLOCK_N
    shift = keys - queries
    # Tiles of queries: all, the first that sees some of the keys, and from there to the end.
    all_tiles = (queries + BLOCK_M - 1) // BLOCK_M
    first = gl.maximum(n - shift, 0) // BLOCK_M
    tiles = all_tiles - first
    q_tile = row.to(gl.int64) * group * all_tiles + first
    kv_offset = (row.to(gl.int64) * kv_tiles + kv_tile) * (BLOCK_N * D)

    dtype: gl.constexpr = q_desc.dtype
    ROWS: gl.constexpr = BLOCK_N // CONSUMERS
    ds_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    row_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_tile = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, D], k_desc.layout)
    v_tile = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, D], v_desc.layout)
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, D], q_desc.layout)
    do_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, D], do_desc.layout)
    ds_tile = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, BLOCK_M], ds_layout)
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], row_layout)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], row_layout)
    dq_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_M], row_layout)
    sight_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_M], row_layout)
    kv_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    rows_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ds_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    ds_free = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    added = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_ready.index(0), count=1)
    mbarrier.init(ds_ready.index(0), count=CONSUMERS)
    mbarrier.init(ds_free.index(0), count=CONSUMERS)
    mbarrier.init(turn.index(0), count=1)
    mbarrier.init(added.index(0), count=CONSUMERS)
    for slot in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(slot), count=1)
        mbarrier.init(do_ready.index(slot), count=1)
        mbarrier.init(rows_ready.index(slot), count=1)
        mbarrier.init(free.index(slot), count=CONSUMERS)

    gl.warp_specialize(
        [
            (_consume, (
                dq_ptr, dk_ptr + kv_offset, dv_ptr + kv_offset, k_tile, v_tile, q_ring, do_ring, lse_ring, delta_ring, sight_ring,
                dq_ring, ds_tile, kv_ready, q_ready, do_ready, rows_ready, free, ds_ready, ds_free, turn, added,
                group * tiles, softmax_scale, gl.constexpr(0), BLOCK_M, D,
            )),
            (_consume, (
                dq_ptr, dk_ptr + kv_offset, dv_ptr + kv_offset, k_tile, v_tile, q_ring, do_ring, lse_ring, delta_ring, sight_ring,
                dq_ring, ds_tile, kv_ready, q_ready, do_ready, rows_ready, free, ds_ready, ds_free, turn, added,
                group * tiles, softmax_scale, gl.constexpr(1), BLOCK_M, D,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, do_desc, lse_ptr, delta_ptr, k_tile, v_tile, q_ring, do_ring, lse_ring, delta_ring,
                sight_ring, dq_ring, kv_ready, q_ready, do_ready, rows_ready, free, b, kv_head, n, group, first, tiles,
                queries, row * group, shift - n, BLOCK_M, D,
            )),
            (_take_turns, (
                counter_ptr + 1 + q_tile, turn, added, kv_tile, group, first, tiles, queries, shift, BLOCK_M, BLOCK_N,
            )),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
