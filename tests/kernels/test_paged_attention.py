"""paged_append and paged_attention: every backend against float64 and against the whole sequence, poison around every token."""

import random

import pytest
import torch
from paged_cases import dense, make_case, offsets, rotary_tables, rotated
from psann_kernels import BackendError, explain, paged_append, paged_attention, rope_attention
from psann_kernels.paged_attention import APPEND, ATTENTION
from witness import BACKENDS, FORWARD, Budget, assert_within_budget, judge, poisoned_allocations

BLOCK_SIZES = [1, 8, 16, 64]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONS = [("pairs",), ("halves", "window"), ("alibi", "scale"), ("pairs", "window", "alibi")]


@pytest.fixture(autouse=True)
def short_splits(monkeypatch):
    """Splits of a tile and at most 4 of them, so that short sequences have several and long ones larger splits."""
    if ATTENTION.has("triton") and "triton" in ATTENTION.implementations:
        from psann_kernels import paged_attention_triton

        monkeypatch.setattr(paged_attention_triton, "MIN_SPLIT", 16)
        monkeypatch.setattr(paged_attention_triton, "MAX_SPLITS", 4)


def serving(backend, op=ATTENTION):
    case = make_case([3], [1], block_size=2)
    arguments = case.arguments if op is ATTENTION else (case.q, case.q, case.k_cache, case.v_cache, torch.zeros(1).long())
    if op.refusal(backend, *arguments) is not None:
        pytest.skip(f"{backend}: {op.refusal(backend, *arguments)}")


def run(case, backend, **changes):
    with poisoned_allocations():
        return paged_attention(*case.arguments, **case.options | changes, backend=backend)


def boundary_lengths(block_size):
    return [1, block_size - 1, block_size, block_size + 1, block_size + 5, 3 * block_size]


def new_tokens(lengths, seed):
    """Of each kind: one, none, few (16 is the most that is split), more than that, or all; one token of padding."""
    rng = random.Random(seed)
    return [min(rng.choice([1, 1, 0, 5, 16, 17, 40]), length) if length else 1 for length in lengths]


WITNESSED = [(torch.float32, options) for options in OPTIONS]
WITNESSED += [(torch.float16, OPTIONS[0]), (torch.float16, OPTIONS[2]), (torch.bfloat16, OPTIONS[1]), (torch.bfloat16, OPTIONS[3])]


@pytest.mark.parametrize("dtype, options", WITNESSED, ids=lambda value: "+".join(value) if isinstance(value, tuple) else str(value))
@pytest.mark.parametrize("backend", BACKENDS)
def test_three_witnesses(backend, dtype, options):
    serving(backend)
    budget = Budget(f"{backend} o", FORWARD)
    for block_size in BLOCK_SIZES:
        lengths, num_kv_heads = boundary_lengths(block_size), 2 if block_size == 8 else 1
        case = make_case(
            lengths, new_tokens(lengths, block_size), block_size=block_size, num_kv_heads=num_kv_heads, dtype=dtype, options=options
        )
        budget.add(run(case, backend), dense(case, dtype), dense(case, torch.float64))
    assert budget.elements >= 128
    budget.check()


@pytest.mark.parametrize("head_dim, group, num_kv_heads", [(1, 1, 1), (33, 8, 1), (128, 1, 2), (256, 5, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_dimensions_and_groups(backend, head_dim, group, num_kv_heads):
    serving(backend)
    case = make_case(
        [70, 9, 40], [1, 9, 8], block_size=8, head_dim=head_dim, group=group, num_kv_heads=num_kv_heads,
        options=("alibi",) if head_dim % 2 else ("halves",),
    )  # fmt: skip
    what = f"{backend} D={head_dim}"
    if head_dim == 1:  # too few elements for a maximum to mean much
        torch.testing.assert_close(run(case, backend), dense(case, torch.float64).float(), rtol=1e-6, atol=1e-6)
    else:
        assert_within_budget(what, run(case, backend), dense(case, torch.float32), dense(case, torch.float64), FORWARD)


def test_the_specification_in_float64():
    lengths = boundary_lengths(8)
    for options in OPTIONS:
        case = make_case(lengths, new_tokens(lengths, 3), block_size=8, dtype=torch.float64, options=options)
        for name in ("cos", "sin", "alibi_slopes"):
            if name in case.options:
                case.options[name] = case.options[name].double()
        torch.testing.assert_close(run(case, "torch"), dense(case, torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_no_token_owns_is_never_read(backend):
    serving(backend)
    lengths, new = [1, 16, 17, 53], [1, 3, 17, 1]
    nan, huge = (make_case(lengths, new, block_size=16, junk=junk, options=("pairs",)) for junk in (float("nan"), 1e30))
    assert torch.equal(run(nan, backend), run(huge, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_renumbering_blocks_changes_nothing(backend):
    serving(backend)
    cases = [make_case([5, 40, 33], [2, 1, 20], block_size=8, numbering=n, options=("halves",)) for n in (0, 1)]
    assert not torch.equal(cases[0].block_table, cases[1].block_table)
    assert torch.equal(run(cases[0], backend), run(cases[1], backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_company_changes_nothing(backend):
    """A sequence alone, beside others, and with a wider table: the same bits."""
    serving(backend)
    lengths, new = [5, 70, 33, 0, 64], [2, 1, 20, 1, 16]
    case = make_case(lengths, new, block_size=8, num_kv_heads=1, options=("halves",), spare_columns=4)
    together = run(case, backend)
    for b, length in enumerate(lengths):
        start, stop = case.cu_seqlens_q[b : b + 2].tolist()
        alone = paged_attention(
            case.q[start:stop], case.k_cache, case.v_cache, case.block_table[b : b + 1, : -(-length // 8)],
            case.seq_lens[b : b + 1], offsets([stop - start]), **case.options, backend=backend,
        )  # fmt: skip
        assert torch.equal(alone, together[start:stop]), f"sequence {b}"


@pytest.mark.parametrize("options", [("pairs",), ("halves",), ("alibi", "window")], ids="+".join)
@pytest.mark.parametrize("backend, dtype", [("torch", torch.float64), *((backend, torch.float32) for backend in BACKENDS)])
def test_appending_and_attending_in_steps_is_attention_of_the_whole(backend, dtype, options):
    """Prefill in one piece or in several, decode, speculate: each token's output is that of one pass over the sequence."""
    serving(backend)
    lengths, block_size, heads, kv_heads, head_dim = [26, 26], 8, 3, 1, 24
    wide = lambda d, to: {k: v.to(to) if isinstance(v, torch.Tensor) else v for k, v in d.items()}  # noqa: E731 (two uses)

    def pool(budgets, draw):
        g = torch.Generator().manual_seed(draw)
        whole = [[torch.randn(1, t, h, head_dim, generator=g).to(dtype) for h in (heads, kv_heads, kv_heads)] for t in lengths]
        tables = dict(zip(("cos", "sin"), (t.to(dtype) for t in rotary_tables(26, head_dim)))) if "alibi" not in options else {}
        rotary = tables | {"interleaved": "pairs" in options}
        extra = dict(alibi_slopes=torch.rand(heads, generator=g).to(dtype), window=9) if "alibi" in options else {}
        truth = [
            rope_attention(*(t.double() for t in qkv), **wide(rotary | extra, torch.float64), backend="torch")[0] for qkv in whole
        ]

        for steps in ([[26, 26]], [[5, 3], [1, 1], [1, 0], [3, 5], [16, 17]]):
            k_cache, v_cache = (torch.full((8, block_size, kv_heads, head_dim), float("nan"), dtype=dtype) for _ in range(2))
            block_table = torch.randperm(8, generator=g).view(2, 4).int()
            done, outputs = [0, 0], [[], []]
            for new in steps:
                ends = [d + n for d, n in zip(done, new)]
                q, k, v = (torch.cat([qkv[i][0, d:e] for qkv, d, e in zip(whole, done, ends)]) for i in range(3))
                positions = torch.cat([torch.arange(d, e) for d, e in zip(done, ends)])
                owner = torch.repeat_interleave(torch.arange(2), torch.tensor(new))
                slots = block_table[owner, positions // block_size].long() * block_size + positions % block_size
                paged_append(k, v, k_cache, v_cache, slots, positions=positions, **rotary, backend=backend)
                o = paged_attention(
                    q, k_cache, v_cache, block_table, torch.tensor(ends).int(), offsets(new), **rotary, **extra, backend=backend
                )
                for out, piece in zip(outputs, o.split(new)):
                    out.append(piece)
                done = ends
            assert done == lengths
            for b in range(2):
                got = torch.cat(outputs[b])
                if dtype == torch.float64:
                    torch.testing.assert_close(got, truth[b], rtol=0, atol=1e-14)
                else:
                    plain = rope_attention(*whole[b], **rotary, **extra, backend="torch")[0]
                    budget = budgets.setdefault(len(steps), Budget(f"{backend} in {len(steps)} steps", FORWARD))
                    budget.add(got, plain, truth[b])

    judge(pool)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend):
    serving(backend)
    for lengths, new in (([], []), ([0], [1]), ([0, 5], [0, 0]), ([0, 0], [20, 1])):
        case = make_case(lengths, new, block_size=4, spare_columns=0, options=("pairs",))
        assert torch.equal(run(case, backend), torch.zeros(case.q.shape))


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_layout_does_not_matter(backend):
    serving(backend)
    case = make_case([20, 9], [3, 9], block_size=8, options=("pairs",))
    expected = run(case, backend)
    rows, heads, head_dim = case.q.shape
    fused = torch.full((rows, heads + 4, head_dim), float("nan"))
    fused[:, :heads] = case.q
    case.q = fused[:, :heads]
    layers = torch.full((2, *case.k_cache.shape[:1], 2, *case.k_cache.shape[1:]), float("nan"))
    layers[1, :, 0], layers[1, :, 1] = case.k_cache, case.v_cache
    case.k_cache, case.v_cache = layers[1, :, 0], layers[1, :, 1]
    wide = torch.full((2, 9), 10**6, dtype=torch.int32)
    wide[:, : case.block_table.shape[1]] = case.block_table
    case.block_table = wide[:, : case.block_table.shape[1]]
    assert torch.equal(run(case, backend), expected)
    case.q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    cos, sin = torch.cat((case.options["cos"], case.options["sin"]), -1).chunk(2, -1)
    assert torch.equal(run(case, backend, cos=cos, sin=sin), expected)


def append_inputs(dtype=torch.float32, tokens=9, num_kv_heads=3, head_dim=24, num_blocks=5, block_size=4):
    """k and v are parts of one fused tensor, the caches parts of another, all of its other elements NaN."""
    g = torch.Generator().manual_seed(1)
    fused = torch.randn(tokens, num_kv_heads * 2 + 1, head_dim, generator=g).to(dtype)
    pool = torch.full((num_blocks, 2, block_size, num_kv_heads, head_dim), float("nan"), dtype=dtype)
    slots = torch.randperm(num_blocks * block_size, generator=g)[:tokens]
    positions = torch.randint(0, 50, (tokens,), generator=g)
    return fused[:, :num_kv_heads], fused[:, num_kv_heads + 1 :], pool, slots, positions


@pytest.mark.parametrize("rotary", ["none", "pairs", "halves"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_append_writes_the_named_slots_and_no_other(backend, dtype, rotary):
    serving(backend, APPEND)
    k, v, pool, slots, positions = append_inputs(dtype)
    slots[[0, 4]] = -1
    positions[4] = 10**6  # of a token that is skipped
    kept = slots >= 0
    cos, sin = rotary_tables(50, 24)
    options = {} if rotary == "none" else dict(positions=positions, cos=cos, sin=sin, interleaved=rotary == "pairs")
    truth, plain = k[kept].double(), k[kept]
    if rotary != "none":
        truth, plain = (rotated(x, cos[positions[kept]], sin[positions[kept]], rotary == "pairs") for x in (truth, plain))

    paged_append(k, v, pool[:, 0], pool[:, 1], slots, **options, backend=backend)

    block, offset = slots[kept] // 4, slots[kept] % 4
    if rotary == "none":
        assert torch.equal(pool[block, 0, offset], plain)
    else:
        assert_within_budget(f"{backend} k", pool[block, 0, offset], plain, truth, FORWARD)
    assert torch.equal(pool[block, 1, offset], v[kept])
    pool[block, :, offset] = float("nan")
    assert torch.isnan(pool).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_append_of_nothing(backend):
    serving(backend, APPEND)
    k, v, pool, slots, positions = append_inputs()
    before = pool.clone().nan_to_num(7.0)
    cos, sin = rotary_tables(50, 24)
    for skipped in (torch.full_like(slots, -1), slots[:0]):
        n = len(skipped)
        paged_append(
            k[:n], v[:n], pool[:, 0], pool[:, 1], skipped, positions=torch.full((n,), -5), cos=cos, sin=sin, backend=backend
        )
        assert torch.equal(pool.nan_to_num(7.0), before)


def test_append_takes_positions_of_either_integer():
    k, v, pool, slots, positions = append_inputs()
    cos, sin = rotary_tables(50, 24)
    caches = []
    for backend in ("torch", "triton"):
        for dtype in (torch.int32, torch.int64):
            if APPEND.refusal(backend, k, v, pool[:, 0], pool[:, 1], slots) is None:
                cache = pool.clone()
                paged_append(
                    k, v, cache[:, 0], cache[:, 1], slots, positions=positions.to(dtype), cos=cos, sin=sin, backend=backend
                )
                caches.append(cache.nan_to_num(7.0))
    for cache in caches[1:]:
        torch.testing.assert_close(cache, caches[0], rtol=0, atol=1e-6)


def test_triton_library_ops():
    serving("triton")
    from psann_kernels.paged_attention_triton import paged_append_triton, paged_attention_triton

    case = make_case([5, 20], [2, 1], block_size=8, num_kv_heads=1, options=("pairs", "alibi"), junk=0.0)
    cos, sin, slopes = (case.options[name] for name in ("cos", "sin", "alibi_slopes"))
    torch.library.opcheck(paged_attention_triton, (*case.arguments, cos, sin, True, 0.2, 2**30, slopes, None, None))
    nothing = case.q[:0], *case.arguments[1:5], torch.zeros(3).int()
    torch.library.opcheck(paged_attention_triton, (*nothing, None, None, True, 0.2, 9, None, None, None))
    k, v, pool, slots, positions = append_inputs(tokens=3, num_kv_heads=1)
    pool = pool.nan_to_num(0.0)
    cos, sin = rotary_tables(50, 24)
    for rotary in ((None, None, None, True), (positions, cos, sin, False)):
        torch.library.opcheck(paged_append_triton, (k, v, pool[:, 0].clone(), pool[:, 1].clone(), slots, *rotary, None, None))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_break(backend):
    serving(backend)
    case = make_case([17, 3, 0], [17, 1, 1], block_size=8, num_kv_heads=1, options=("pairs", "window", "alibi"))
    k = torch.randn(len(case.q), 1, 24, generator=torch.Generator().manual_seed(5))
    positions = torch.ones(len(k), dtype=torch.int64)
    rotary = {name: case.options[name] for name in ("cos", "sin", "interleaved")}

    def step(k_cache, v_cache, slots):
        paged_append(k, k, k_cache, v_cache, slots, positions=positions, **rotary, backend=backend)
        return paged_attention(case.q, k_cache, v_cache, *case.arguments[3:], **case.options, backend=backend)

    compiled_step = torch.compile(step, fullgraph=True, backend="aot_eager")
    none = torch.full((len(k),), -1)
    last = torch.where(torch.arange(len(k)) == len(k) - 1, case.block_table[0, 0] * 8 + 1, none)
    for slots in (last, none):
        caches = [(case.k_cache.clone(), case.v_cache.clone()) for _ in range(2)]
        eager, compiled = step(*caches[0], slots), compiled_step(*caches[1], slots)
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)
        for c, e in zip(*caches):
            assert torch.equal(c.nan_to_num(7.0), e.nan_to_num(7.0))


def test_a_named_backend_serves_or_raises():
    case = make_case([3], [1], block_size=2, head_dim=288)
    with pytest.raises(BackendError, match=r"paged_attention\(backend='triton'\): .*(head_dim is 288|needs a GPU|not installed)"):
        run(case, "triton")
    k, v, pool, slots, _ = append_inputs()
    sideways = pool.transpose(-1, -2).contiguous().transpose(-1, -2)
    with pytest.raises(BackendError, match=r"paged_append\(backend='triton'\): .*(k_cache has strides|needs a GPU|not installed)"):
        paged_append(k, v, sideways[:, 0], sideways[:, 1], slots, backend="triton")
    paged_append(k, v, sideways[:, 0], sideways[:, 1], slots)
    assert torch.equal(sideways[slots // 4, 1, slots % 4], v)
    with pytest.raises(ValueError, match="backend is 'cuda'; choose one of 'auto'"):
        run(case, "cuda")
    rows = {row["backend"]: row["serves"] for row in explain("paged_attention", *case.arguments)}
    assert rows["torch"] == "yes" and rows["triton"] == "no"


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache"])
def test_gradients_are_refused(name):
    case = make_case([3], [1], block_size=2)
    getattr(case, name).requires_grad_()
    with pytest.raises(ValueError, match="not differentiable; call it under torch.no_grad"):
        run(case, "torch")
    with torch.no_grad():
        assert not run(case, "torch").requires_grad


ONE = torch.ones(1, dtype=torch.int32)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.ones(4, 6, 24).int()}, r"q has shape \(4, 6, 24\) and dtype torch.int32; it must be floating-point"),
        ({"q": torch.ones(4, 6)}, r"q has shape \(4, 6\)"),
        ({"q": torch.ones(4, 6, 8)}, "q has head_dim 8 and the caches 24"),
        ({"q": torch.ones(4, 5, 24)}, "q has 5 heads, which is no multiple of the caches' 2"),
        ({"k_cache": torch.ones(5, 2, 24)}, r"k_cache has shape \(5, 2, 24\); it must be \(num_blocks, block_size"),
        ({"v_cache": torch.ones(9, 8, 2, 24).half()}, "v_cache is torch.float16 on cpu beside a q of torch.float32"),
        ({"v_cache": torch.ones(9, 8, 1, 24)}, r"k_cache has shape .* and v_cache \(9, 8, 1, 24\); they must be equal"),
        ({"block_table": torch.zeros(3, 2).long()}, "block_table is torch.int64 .*; it must be torch.int32"),
        ({"block_table": torch.zeros(3).int()}, r"block_table has shape \(3,\); it must be \(B, max_blocks\) int32"),
        ({"block_table": torch.full((3, 3), -1).int()}, r"block_table\[0, 0\] is -1, but the cache has blocks 0 to 8"),
        ({"seq_lens": ONE}, r"seq_lens is torch.int32 \(1,\) on cpu; it must be torch.int32 \(3,\)"),
        ({"seq_lens": torch.tensor([5, 25, 0]).int()}, r"seq_lens\[1\] is 25, but block_table has room for 0 to 24 tokens"),
        ({"seq_lens": torch.tensor([1, 17, 0]).int()}, r"sequence 0 has 2 new tokens and seq_lens\[0\] is 1"),
        ({"cu_seqlens_q": torch.tensor([0, 2, 3, 5]).int()}, "cu_seqlens_q runs from 0 to 5; it must run from 0 to 4"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 2, 4]).int()}, "cu_seqlens_q falls from 3 to 2 at sequence 1"),
        ({"window": 0}, "window is 0; a query sees at least itself"),
        ({"window": True}, "window is True; a query sees at least itself"),
        ({"alibi_slopes": torch.ones(5)}, r"alibi_slopes, one per query head, is torch.float32 \(5,\) on cpu; it must be"),
        ({"cos": torch.ones(17, 12)}, "sin is None but cos is given; pass both or neither"),
        ({"cos": torch.ones(17, 24), "sin": torch.ones(17, 24)}, r"cos has shape \(17, 24\); it must be \(max_position, 12\)"),
        ({"cos": torch.ones(17, 12).half(), "sin": torch.ones(17, 12)}, "cos is torch.float16 on cpu; beside a q of torch.float32"),
        ({"cos": torch.ones(16, 12), "sin": torch.ones(16, 12)}, r"seq_lens\[1\] is 17, but cos and sin have 16 rows"),
    ],
)
def test_bad_input(change, message):
    case = make_case([5, 17, 0], [2, 1, 1], block_size=8, spare_columns=0)
    names = ("q", "k_cache", "v_cache", "block_table", "seq_lens", "cu_seqlens_q")
    arguments = dict(zip(names, case.arguments)) | {"k_cache": torch.ones(9, 8, 2, 24), "v_cache": torch.ones(9, 8, 2, 24)}
    with pytest.raises(ValueError, match=f"paged_attention: {message}"):
        paged_attention(**arguments | change)


def test_odd_head_dim_takes_no_rotary():
    case = make_case([5], [1], block_size=8, head_dim=5)
    with pytest.raises(ValueError, match="q has head_dim 5; rotary positions turn pairs"):
        run(case, "torch", cos=torch.ones(9, 2), sin=torch.ones(9, 2))


@pytest.mark.parametrize("capacity", [8, 24])
def test_capacity_is_usable_to_the_last_token(capacity):
    full = make_case([capacity], [1], block_size=8, spare_columns=0)
    torch.testing.assert_close(run(full, "torch"), dense(full, torch.float32))
    full.seq_lens += 1
    with pytest.raises(ValueError, match=rf"seq_lens\[0\] is {capacity + 1}, but block_table has room for 0 to {capacity} tokens"):
        run(full, "torch")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"v": torch.ones(9, 3, 24).half()}, r"v is torch.float16 .* and k torch.float32"),
        ({"v": torch.ones(9, 3, 24, requires_grad=True)}, "v requires grad"),
        ({"k": torch.ones(9, 2, 24), "v": torch.ones(9, 2, 24)}, "k has 2 heads and the caches 3"),
        ({"slot_mapping": torch.arange(9).int()}, r"slot_mapping is torch.int32 \(9,\) on cpu; it must be torch.int64 \(9,\)"),
        ({"slot_mapping": torch.arange(12, 21)}, "slot_mapping reaches from 12 to 20, but the cache has 20 slots"),
        ({"slot_mapping": torch.arange(-2, 7)}, "slot_mapping reaches from -2 to 6"),
        ({"positions": None}, "cos and sin are given without positions"),
        ({"positions": torch.arange(9).float()}, "positions is torch.float32 .*; it must be torch.int32 or torch.int64"),
        ({"positions": torch.arange(42, 51)}, "positions reach from 42 to 50, but cos and sin have rows 0 to 49"),
        ({"sin": None}, "sin is None but cos is given; pass both or neither"),
    ],
)
def test_append_bad_input(change, message):
    k, v, pool, slots, positions = append_inputs()
    cos, sin = rotary_tables(50, 24)
    arguments = dict(
        k=k, v=v, k_cache=pool[:, 0], v_cache=pool[:, 1], slot_mapping=slots, positions=positions, cos=cos, sin=sin
    )
    with pytest.raises(ValueError, match=f"paged_append: {message}"):
        paged_append(**arguments | change)
    assert torch.isnan(pool).all()
