"""The forward of rope_attention for sm_90 in Gluon, Triton's language of layouts, barriers and asynchronous products. The gradients
are in rope_attention_backward_kernel_gluon.py.

It has not run on a GPU. What is known of it is that it compiles for sm_90 (tests/kernels/gluon_gate.py) and that, executed by a
stand-in of the language with hostile interleavings (tests/kernels/gluon_emulator.py), it computes the attention.

One warp, the producer, has the tensor memory accelerator (TMA) fetch tiles of K and V into two rings in shared memory. Two
consumers of four warps each own half of a tile of queries. A slot of a ring has two barriers: `ready` completes when its bytes have
arrived, `free` when both consumers are done with them. A consumer starts the product of its queries with the next keys, then that
of its weights with the values before, and computes the next weights while the latter runs, so that the tensor cores need not wait
for exponentials. It walks the keys from the last, which need a mask, to the first.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

# The name changed between Triton 3.6 and 3.9.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

STAGES = gl.constexpr(2)
CONSUMERS = gl.constexpr(2)
# Registers a thread of the second consumer and of the producer; what is left of the multiprocessor's is the first consumer's.
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_tile, k_ring, v_ring, q_ready, k_ready, k_free, v_ready, v_free, b, h, kv_head, first, steps,
    BLOCK_N: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Fetches both consumers' queries once, then `steps` tiles of keys and values, the last first."""
    ROWS: gl.constexpr = q_tile.shape[3]
    for part in gl.static_range(CONSUMERS):
        mbarrier.expect(q_ready.index(part), ROWS * D * 2)
        load_tile(q_desc, [b, h, first + part * ROWS, 0], q_ready.index(part), q_tile.index(part))
    for t in range(0, steps):
        slot = t % STAGES
        # A barrier that was never completed counts as one that completed its phase 1: the first round finds the slots free.
        phase = (t // STAGES + 1) & 1
        n = (steps - 1 - t) * BLOCK_N
        mbarrier.wait(k_free.index(slot), phase)
        mbarrier.expect(k_ready.index(slot), BLOCK_N * D * 2)
        load_tile(k_desc, [b, kv_head, n, 0], k_ready.index(slot), k_ring.index(slot))
        mbarrier.wait(v_free.index(slot), phase)
        mbarrier.expect(v_ready.index(slot), BLOCK_N * D * 2)
        load_tile(v_desc, [b, kv_head, n, 0], v_ready.index(slot), v_ring.index(slot))


@gluon.jit
def _weigh(s, m, l, position, n, scale, MASKED: gl.constexpr):
    """A step of the online softmax: the weights of scores s, the new maximum (in log2) and sum, and what fades the older sums."""
    if MASKED:
        s = gl.where(n[None, :] <= position[:, None], s, float("-inf"))
    m_next = gl.maximum(m, gl.max(s, 1) * scale)
    # A row that has seen no key yet has maximum -inf; shifting by it would give NaN, so such rows shift by 0.
    shift = gl.where(m_next == float("-inf"), 0.0, m_next) if MASKED else m_next
    p = gl.exp2(s * scale - shift[:, None])
    fade = gl.exp2(m - shift)
    return p, m_next, l * fade + gl.sum(p, 1), fade


@gluon.jit
def _walk(
    q, k_ring, v_ring, k_ready, k_free, v_ready, v_free, acc, p, m, l, position, scale, low, high, steps,
    BLOCK_N: gl.constexpr, D: gl.constexpr, MASKED: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """Steps low to high: the scores of step t beside the product of the weights of step t - 1, which arrive as p and leave so."""
    ROWS: gl.constexpr = q.shape[0]
    for t in range(low, high):
        slot = t % STAGES
        before = (t - 1) % STAGES
        mbarrier.wait(k_ready.index(slot), (t // STAGES) & 1)
        k = k_ring.index(slot).reshape([BLOCK_N, D])
        nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
        s = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(before), ((t - 1) // STAGES) & 1)
        v = v_ring.index(before).reshape([BLOCK_N, D])
        acc = warpgroup_mma(p, v, acc, is_async=True)

        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_free.index(slot))
        n = (steps - 1 - t) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
        weights, m, l, fade = _weigh(s, m, l, position, n, scale, MASKED)

        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        mbarrier.arrive(v_free.index(before))
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, o_layout))[:, None]
        p = gl.convert_layout(weights.to(v.dtype), gl.DotOperandLayout(0, o_layout, 2))
    return acc, p, m, l


@gluon.jit
def _consume(
    o_ptr, lse_ptr, q_tile, k_ring, v_ring, q_ready, k_ready, k_free, v_ready, v_free, b, h, first, steps, queries, keys,
    heads, softmax_scale,
    PART: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Attention of one consumer's queries, which are rows PART * ROWS on of the program's."""
    ROWS: gl.constexpr = q_tile.shape[3]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    scale = softmax_scale * 1.4426950408889634  # log2(e)
    i0 = first + PART * ROWS
    i = i0 + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    position = i + (keys - queries)
    # Tiles below `full` hold only keys that every query here sees.
    full = gl.maximum(i0 + (keys - queries) + 1, 0) // BLOCK_N
    q = q_tile.index(PART).reshape([ROWS, D])

    # The first step has no weights before it whose product could run beside its scores.
    mbarrier.wait(q_ready.index(PART), 0)
    mbarrier.wait(k_ready.index(0), 0)
    k = k_ring.index(0).reshape([BLOCK_N, D])
    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    s = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_free.index(0))
    n = (steps - 1) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, s_layout))
    weights, m, l, _ = _weigh(s, m, l, position, n, scale, True)
    p = gl.convert_layout(weights.to(k.dtype), gl.DotOperandLayout(0, o_layout, 2))
    acc = gl.zeros([ROWS, D], gl.float32, o_layout)

    masked = gl.maximum(steps - full, 1)
    acc, p, m, l = _walk(
        q, k_ring, v_ring, k_ready, k_free, v_ready, v_free, acc, p, m, l, position, scale, 1, masked, steps, BLOCK_N, D, True,
        s_layout, o_layout,
    )  # fmt: skip
    acc, p, m, l = _walk(
        q, k_ring, v_ring, k_ready, k_free, v_ready, v_free, acc, p, m, l, position, scale, masked, steps, steps, BLOCK_N, D,
        False, s_layout, o_layout,
    )  # fmt: skip

    slot = (steps - 1) % STAGES
    mbarrier.wait(v_ready.index(slot), ((steps - 1) // STAGES) & 1)
    acc = warpgroup_mma(p, v_ring.index(slot).reshape([BLOCK_N, D]), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])

    # Queries without a key have l = 0: o is 0, and an infinite log-sum-exp makes their probabilities 0 in backward.
    is_empty = l == 0
    lse = gl.where(is_empty, float("inf"), m + gl.log2(l))
    gl.store(lse_ptr + (b * heads + h).to(gl.int64) * queries + i, lse, mask=i < queries)
    share = gl.convert_layout(gl.where(is_empty, 0.0, 1.0 / gl.where(is_empty, 1.0, l)), gl.SliceLayout(1, o_layout))
    o = (acc * share[:, None]).to(o_ptr.dtype.element_ty)
    row = i0 + gl.arange(0, ROWS, gl.SliceLayout(1, o_layout))
    column = gl.arange(0, D, gl.SliceLayout(0, o_layout))
    offset = ((b.to(gl.int64) * queries + row) * heads + h) * D
    gl.store(o_ptr + offset[:, None] + column[None, :], o, mask=(row < queries)[:, None])


@gluon.jit
def forward_kernel(
    q_desc, k_desc, v_desc, o_ptr, lse_ptr, softmax_scale, queries, keys, rows, heads, group,
    D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """o and lse of BLOCK_M queries of one head. Q and K arrive turned, as descriptors of (B, heads, T, D); rows is B * H."""
    # The last queries see most keys, so their tiles come first.
    program = gl.program_id(0)
    row = program % rows
    first = ((queries + BLOCK_M - 1) // BLOCK_M - 1 - program // rows) * BLOCK_M
    b = row // heads
    h = row % heads
    # As many tiles as the last query needs; one of keys that nobody sees where it has none, so that the walk has a first step.
    seen = gl.minimum(first + BLOCK_M, queries) + keys - queries
    steps = gl.maximum((seen + BLOCK_N - 1) // BLOCK_N, 1)

    dtype: gl.constexpr = q_desc.dtype
    q_tile = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, BLOCK_M // CONSUMERS, D], q_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for part in gl.static_range(CONSUMERS):
        mbarrier.init(q_ready.index(part), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(slot), count=1)
        mbarrier.init(v_ready.index(slot), count=1)
        mbarrier.init(k_free.index(slot), count=CONSUMERS)
        mbarrier.init(v_free.index(slot), count=CONSUMERS)

    gl.warp_specialize(
        [
            (_consume, (
                o_ptr, lse_ptr, q_tile, k_ring, v_ring, q_ready, k_ready, k_free, v_ready, v_free, b, h, first, steps, queries,
                keys, heads, softmax_scale, gl.constexpr(0), BLOCK_N, D,
            )),
            (_consume, (
                o_ptr, lse_ptr, q_tile, k_ring, v_ring, q_ready, k_ready, k_free, v_ready, v_free, b, h, first, steps, queries,
                keys, heads, softmax_scale, gl.constexpr(1), BLOCK_N, D,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_tile, k_ring, v_ring, q_ready, k_ready, k_free, v_ready, v_free, b, h, h // group,
                first, steps, BLOCK_N, D,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
