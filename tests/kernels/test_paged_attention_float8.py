"""The float8 cache of paged_append and paged_attention: every number by its bits,
and attention against float64 of what the bits say."""

import pytest
import torch
from paged_cases import dense, make_case, rotary_tables, rotated
from psann_kernels import BackendError, explain, paged_append, paged_attention
from psann_kernels.paged_attention import ATTENTION, FLOAT8
from witness import BACKENDS, FORWARD, Budget, poisoned_allocations

SERVING = [backend for backend in BACKENDS if backend != "native"]  # which refuses float8
ONES = torch.ones(1)
# The number that each of the 256 patterns stands for; NaN twice.
WORTH = torch.arange(256, dtype=torch.uint8).view(FLOAT8).double()


@pytest.fixture(autouse=True)
def short_splits(monkeypatch):
    """Splits of a tile, so that short sequences have several."""
    if "triton" in ATTENTION.implementations:
        from psann_kernels import paged_attention_triton

        monkeypatch.setattr(paged_attention_triton, "MIN_SPLIT", 16)
        monkeypatch.setattr(paged_attention_triton, "MAX_SPLITS", 4)


def serving(backend):
    case = make_case([3], [1], block_size=2, options=("float8",))
    if (reason := ATTENTION.refusal(backend, *case.arguments, **case.options)) is not None:
        pytest.skip(f"{backend}: {reason}")


def bits(cache):
    return cache.view(torch.uint8)


def nearest(x):
    """The pattern of the float8 nearest to x (float64), ties to the even one, found by looking at all; x is no NaN."""
    magnitudes, x = WORTH[:127], x.clamp(-448, 448)
    distance = (x.abs()[:, None] - magnitudes).abs()
    best = distance == distance.amin(1, keepdim=True)
    is_even = torch.arange(127) % 2 == 0
    chosen = torch.where(best.sum(1) > 1, (best & is_even).int().argmax(1), best.int().argmax(1))
    return (chosen + 128 * torch.signbit(x)).to(torch.uint8)


def append_one(backend, x, scale=ONES):
    """The patterns that appending x (n,) writes, as keys and as values; n is split into heads of 64."""
    heads = torch.nn.functional.pad(x, (0, -len(x) % 64)).view(-1, 1, 64)
    caches = [torch.full((len(heads), 1, 1, 64), float("nan")).to(FLOAT8) for _ in range(2)]
    paged_append(heads, heads, *caches, torch.arange(len(heads)), k_scale=scale, v_scale=2 * scale, backend=backend)
    return [bits(cache).flatten()[: len(x)] for cache in caches]


@pytest.mark.parametrize("backend", SERVING)
def test_every_number_is_rounded_to_the_nearest(backend):
    serving(backend)
    numbers = WORTH[:127].float()
    halfway = (numbers[1:] + numbers[:-1]) / 2
    infinity = torch.tensor(float("inf"))
    x = torch.cat((
        numbers, halfway, halfway.nextafter(infinity), halfway.nextafter(-infinity),
        torch.tensor([449.0, 463.9, 464.0, 465.0, 1e30]), torch.tensor([1e-30, 1e-45]), infinity[None],
        torch.randn(300, generator=torch.Generator().manual_seed(0)) * 3,
    ))  # fmt: skip
    x = torch.cat((x, -x))
    assert torch.equal(append_one(backend, x)[0], nearest(x.double()))
    scale = torch.tensor([0.37])
    keys, values = append_one(backend, x[x.isfinite()], scale)
    # The quotient is rounded to float32 first; where that makes a tie the definition decides.
    quotient = x[x.isfinite()] / scale
    assert torch.equal(keys, nearest(quotient.double())) and torch.equal(values, nearest(quotient.double() / 2))
    assert WORTH[append_one(backend, torch.tensor([float("nan"), 1.0]))[0].long()].isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", SERVING)
def test_every_pattern_is_read_as_its_number(backend, dtype):
    serving(backend)
    v_cache = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).view(FLOAT8)
    index = lambda *values: torch.tensor(values, dtype=torch.int32)  # noqa: E731 (three uses on the next lines)
    q, k_cache = torch.ones(1, 1, 256, dtype=dtype), torch.zeros(1, 1, 1, 256).to(FLOAT8)
    arguments = q, k_cache, v_cache, index(0).view(1, 1), index(1), index(0, 1)
    o = paged_attention(*arguments, k_scale=ONES, v_scale=0.5 * ONES, backend=backend).flatten()
    expected = (WORTH / 2).to(dtype)
    assert torch.equal(o.isnan(), expected.isnan()) and torch.equal(o.nan_to_num(), expected.nan_to_num())


WITNESSED = [(torch.float32, ("pairs",)), (torch.float16, ("halves", "window")), (torch.bfloat16, ("pairs", "window", "alibi"))]


@pytest.mark.parametrize("dtype, options", WITNESSED, ids=lambda value: "+".join(value) if isinstance(value, tuple) else str(value))
@pytest.mark.parametrize("backend", SERVING)
def test_three_witnesses(backend, dtype, options):
    serving(backend)
    budget = Budget(f"{backend} o", FORWARD)
    for block_size, lengths, new, num_kv_heads in ((8, [1, 9, 70, 0, 33], [1, 0, 1, 1, 33], 2), (16, [40, 16, 90], [5, 16, 17], 1)):
        case = make_case(lengths, new, block_size=block_size, num_kv_heads=num_kv_heads, dtype=dtype, options=(*options, "float8"))
        with poisoned_allocations():
            o = paged_attention(*case.arguments, **case.options, backend=backend)
        budget.add(o, dense(case, dtype), dense(case, torch.float64))
    assert budget.elements >= 128
    budget.check()


@pytest.mark.parametrize("dtype, rotary", [(torch.float32, "pairs"), (torch.bfloat16, "halves"), (torch.float16, "none")], ids=str)
@pytest.mark.parametrize("backend", SERVING)
def test_append_divides_by_the_scale_of_each_head_and_rounds_once(backend, dtype, rotary):
    serving(backend)
    g = torch.Generator().manual_seed(1)
    fused = torch.randn(9, 7, 24, generator=g).to(dtype)
    k, v = fused[:, :3], fused[:, 4:]
    pool = torch.full((5, 2, 4, 3, 24), float("nan")).to(FLOAT8)
    slots, positions = torch.randperm(20, generator=g)[:9], torch.randint(0, 50, (9,), generator=g)
    slots[[0, 4]] = -1
    k_scale, v_scale = torch.rand(3, generator=g) / 50 + 0.001, torch.rand(3, generator=g) / 50 + 0.001
    cos, sin = rotary_tables(50, 24)
    options = {} if rotary == "none" else dict(positions=positions, cos=cos, sin=sin, interleaved=rotary == "pairs")
    paged_append(k, v, pool[:, 0], pool[:, 1], slots, **options, k_scale=k_scale, v_scale=v_scale, backend=backend)

    kept = slots >= 0
    block, offset = slots[kept] // 4, slots[kept] % 4
    truth = k[kept].double()
    if rotary != "none":
        truth = rotated(truth, cos[positions[kept]].double(), sin[positions[kept]].double(), rotary == "pairs")
    for place, x, scale in ((0, truth, k_scale), (1, v[kept].double(), v_scale)):
        expected = (x / scale.double()[:, None]).clamp(-448, 448)
        error = (pool[block, place, offset].double() - expected).abs()
        # Half a step: of four bits, or beside the smallest numbers 2^-10; and what float32 turns and divides by.
        assert (error <= (expected.abs() / 16).clamp(min=2**-10) * (1 + 1e-5) + 1e-5).all()
        assert (error > 0).any()
    pool[block, :, offset] = torch.full((), float("nan")).to(FLOAT8)
    assert pool.float().isnan().all()


@pytest.mark.parametrize("backend", SERVING)
def test_compiles_without_graph_break(backend):
    serving(backend)
    case = make_case([17, 3, 0], [17, 1, 1], block_size=8, num_kv_heads=1, options=("pairs", "window", "float8"))
    k = torch.randn(len(case.q), 1, 24, generator=torch.Generator().manual_seed(5))
    scales = {name: case.options[name] for name in ("k_scale", "v_scale")}

    def step(k_cache, v_cache, slots):
        paged_append(k, k, k_cache, v_cache, slots, **scales, backend=backend)
        return paged_attention(case.q, k_cache, v_cache, *case.arguments[3:], **case.options, backend=backend)

    slots = torch.full((len(k),), -1)
    slots[-1] = case.block_table[0, 0] * 8 + 1
    caches = [(case.k_cache.clone(), case.v_cache.clone()) for _ in range(2)]
    eager = step(*caches[0], slots)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*caches[1], slots)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)
    for c, e, before in zip(*caches, (case.k_cache, case.v_cache)):
        assert torch.equal(bits(c), bits(e)) and not torch.equal(bits(c), bits(before))


def test_triton_library_ops():
    serving("triton")
    from psann_kernels.paged_attention_triton import paged_append_triton, paged_attention_triton

    case = make_case([5, 20], [2, 1], block_size=8, num_kv_heads=1, options=("float8",), junk=0.0)
    scales = case.options["k_scale"], case.options["v_scale"]
    caches = bits(case.k_cache), bits(case.v_cache)
    # What else opcheck asks, and takes seconds for, does not depend on the scales; test_paged_attention asks it.
    cheap = dict(test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(
        paged_attention_triton, (case.q, *caches, *case.arguments[3:], None, None, True, 0.2, 9, None, *scales), **cheap
    )
    k, slots = torch.randn(3, 1, 24), torch.tensor([3, -1, 9])
    torch.library.opcheck(
        paged_append_triton, (k, k, *(c.clone() for c in caches), slots, None, None, None, True, *scales), **cheap
    )


def test_native_refuses():
    case = make_case([3], [1], block_size=2, options=("float8",))
    with pytest.raises(BackendError, match="k_cache is torch.float8_e4m3fn; the kernel serves caches|native"):
        paged_attention(*case.arguments, **case.options, backend="native")
    with pytest.raises(BackendError, match="k_cache is torch.float8_e4m3fn; the kernel serves caches|native"):
        new = torch.ones(1, 2, 24)
        scales = {name: case.options[name] for name in ("k_scale", "v_scale")}
        paged_append(new, new, case.k_cache, case.v_cache, torch.zeros(1).long(), **scales, backend="native")
    rows = explain("paged_attention", *case.arguments, **case.options)
    assert {row["backend"] for row in rows if row["serves"] == "yes"} >= {"torch"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k_scale": None}, r"k_scale is missing and the caches are torch.float8_e4m3fn; .* float32 \(2,\)"),
        ({"v_scale": None}, "v_scale is missing"),
        ({"v_scale": torch.ones(3)}, r"v_scale is torch.float32 \(3,\) on cpu; it must be torch.float32 \(2,\)"),
        ({"k_scale": torch.ones(2).double()}, "k_scale is torch.float64"),
        ({"k_scale": torch.tensor([1.0, 0.0])}, r"k_scale is \[1.0, 0.0\]; a scale is finite and above 0"),
        ({"v_scale": torch.tensor([float("inf"), 1.0])}, "v_scale is .*; a scale is finite and above 0"),
        ({"v_cache": None}, "k_cache is torch.float8_e4m3fn and v_cache torch.float32; they must agree"),
        ({"k_cache": None, "v_cache": None}, "k_scale is given and the caches are torch.float32"),
    ],
)
def test_bad_input(change, message):
    case = make_case([3], [1], block_size=2, options=("float8",))
    wide = case.k_cache.float()
    arguments = dict(zip(("q", "k_cache", "v_cache", "block_table", "seq_lens", "cu_seqlens_q"), case.arguments)) | case.options
    with pytest.raises(ValueError, match=f"paged_attention: {message}"):
        paged_attention(**arguments | {name: wide if name.endswith("cache") else value for name, value in change.items()})
    new = dict(k=torch.ones(1, 2, 24), v=torch.ones(1, 2, 24), slot_mapping=torch.zeros(1).long())
    new |= {name: arguments[name] for name in ("k_cache", "v_cache", "k_scale", "v_scale")}
    with pytest.raises(ValueError, match=f"paged_append: {message}"):
        paged_append(**new | {name: wide if name.endswith("cache") else value for name, value in change.items()})


@pytest.mark.parametrize("backend", SERVING)
def test_what_no_token_owns_is_never_read(backend):
    serving(backend)
    nan, huge = (
        make_case([1, 16, 17, 53], [1, 3, 17, 1], block_size=16, junk=junk, options=("pairs", "float8"))
        for junk in (float("nan"), 448.0)
    )
    o = paged_attention(*nan.arguments, **nan.options, backend=backend)
    assert torch.equal(o, paged_attention(*huge.arguments, **huge.options, backend=backend)) and o.isfinite().all()
