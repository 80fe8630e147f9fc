"""damped_sine_mlp and linear_damped_sine: their parts on every backend, and the fused kernels, against float64."""

import random
from unittest import mock

import pytest
import torch
from psann_kernels import BackendError, DampedSineMLP, damped_sine, damped_sine_mlp, explain, linear_damped_sine
from psann_kernels.damped_sine import MODES
from psann_kernels.damped_sine_mlp import LINEAR, MLP, linear_reference, mlp_reference
from torch.nn import functional as F
from witness import BACKENDS, FORWARD, GRADIENT, Budget, judge, poisoned_allocations, strided_copies

# (tokens, K, F, O): beside a tile of 64 or 128 rows and columns and of 32 or 64 products, less and more than one.
SHAPES = [(0, 16, 32, 16), (1, 16, 16, 16), (130, 80, 80, 32), (33, 16, 144, 80)]
NAMES = ("y", "dx", "dw1", "db1", "damplitude", "dfrequency", "ddamping", "dw2", "db2")
VARIANTS = [(backend, False) for backend in BACKENDS] + [("triton", True)]
VARIED = pytest.mark.parametrize("backend, fused", VARIANTS, ids=lambda v: v if isinstance(v, str) else ("fused" if v else "parts"))


def inputs(shape, dtype, seed=0):
    tokens, inner, features, outputs = shape
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inner, generator=g)
    w1, b1 = torch.randn(features, inner, generator=g) * 2 / inner**0.5, torch.randn(features, generator=g)
    w2, b2 = torch.randn(outputs, features, generator=g) / features**0.5, torch.randn(outputs, generator=g)
    sine = torch.randn(features, generator=g) + 1, torch.rand(features, generator=g) * 4, torch.rand(features, generator=g) * 0.5
    x, w1, b1, w2, b2 = (t.to(dtype) for t in (x, w1, b1, w2, b2))
    return (x, w1, b1, *sine, w2, b2), torch.randn(tokens, outputs, generator=g).to(dtype)


def run(function, tensors, dy):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    gradients = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    return y.detach(), *(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients))


def ours(backend, fused, mode="abs"):
    return lambda *a: damped_sine_mlp(*a, mode=mode, fused=fused, backend=backend)


def plain(x, w1, b1, amplitude, frequency, damping, w2, b2, mode):
    """Each step in x's dtype, by the op's own rule for the sine, whose bound is judged elsewhere (sine_bound.py)."""
    return F.linear(damped_sine(F.linear(x, w1, b1), amplitude, frequency, damping, mode=mode, backend="torch"), w2, b2)


def serving(backend, fused, dtype=torch.bfloat16):
    tensors, _ = inputs((2, 16, 16, 16), dtype)
    if (reason := MLP.refusal(backend, *tensors, fused=fused)) is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "backend, fused, dtype",
    [(b, f, d) for b, f in VARIANTS for d in (torch.float32, torch.float16, torch.bfloat16) if not (f and d == torch.float32)],
)
def test_three_witnesses(backend, fused, dtype, mode):
    serving(backend, fused, dtype)
    budgets = [Budget(f"{backend} {name}", FORWARD if name == "y" else GRADIENT) for name in NAMES]
    for shape in SHAPES:
        tensors, dy = inputs(shape, dtype)
        with poisoned_allocations():
            fast = run(ours(backend, fused, mode), tensors, dy)
        working = run(lambda *a: plain(*a, mode), tensors, dy)
        truth = run(lambda *a: mlp_reference(*a, mode=mode), [t.double() for t in tensors], dy.double())
        for budget, f, w, t in zip(budgets, fast, working, truth):
            budget.add(f, w, t)
    for budget in budgets:
        assert budget.elements >= 128
        budget.check()


@pytest.fixture
def described_tensors(monkeypatch):
    """Tensors of which a descriptor was made are listed."""
    serving("triton", True)
    from psann_kernels import damped_sine_mlp_triton

    made, describe = [], damped_sine_mlp_triton.described
    monkeypatch.setattr(damped_sine_mlp_triton, "described", lambda t, block: made.append(t) or describe(t, block))
    return made


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_three_witnesses_through_pointers(dtype, described_tensors, monkeypatch):
    from psann_kernels import damped_sine_mlp_triton

    tensors, dy = inputs(SHAPES[-1], dtype)
    run(ours("triton", True), tensors, dy)
    assert len(described_tensors) == 4  # so test_three_witnesses is about descriptors
    described_tensors.clear()
    monkeypatch.setattr(damped_sine_mlp_triton, "has_tma", lambda device: False)
    test_three_witnesses("triton", True, dtype, "abs")
    assert not described_tensors


def test_rows_that_repeat_are_read_through_pointers(described_tensors):
    (x, w1, b1, *sine, w2, b2), dy = inputs((70, 80, 48, 16), torch.bfloat16)
    # Forward reads x and w1, backward dy and w2.
    for place, count in ((0, 2), (1, 2), (6, 2), (None, 4)):
        tensors = [x, w1, b1, *sine, w2, b2]
        if place is not None:
            tensors[place] = tensors[place][:1].expand(tensors[place].shape)
        described_tensors.clear()
        fast = run(ours("triton", True), tensors, dy)
        assert len(described_tensors) == count
        working = run(lambda *a: plain(*a, "abs"), tensors, dy)
        truth = run(lambda *a: mlp_reference(*a), [t.double() for t in tensors], dy.double())
        for name, f, w, t in zip(NAMES, fast, working, truth):
            if f.numel() >= 128:
                budget = Budget(f"{name} where {place} repeats", FORWARD if name == "y" else GRADIENT)
                budget.add(f, w, t)
                budget.check()


def test_ways_of_reading_parts_and_orders_of_tiles_give_the_same_bits(described_tensors, monkeypatch):
    from psann_kernels import damped_sine_mlp_triton

    tensors, dy = inputs((200, 80, 144, 80), torch.float16)
    expected = None
    for is_described in (True, False):
        monkeypatch.setattr(damped_sine_mlp_triton, "has_tma", lambda device: is_described)
        # Seven tiles of rows in one group, and in groups of which the last is not full.
        for group, parts in ((8, 1), (3, 2), (2, 4)):
            small = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "PARTS": parts, "num_warps": 4, "num_stages": 1}
            monkeypatch.setattr(damped_sine_mlp_triton, "GROUP", group)
            for table in ("FORWARD", "DESCRIBED_FORWARD", "BACKWARD", "DESCRIBED_BACKWARD"):
                monkeypatch.setattr(damped_sine_mlp_triton, table, small)
            described_tensors.clear()
            got = run(ours("triton", True), tensors, dy)
            assert len(described_tensors) == (4 if is_described else 0)
            expected = expected or got
            for name, g, e in zip(NAMES, got, expected):
                assert torch.equal(g, e), (name, is_described, group, parts)


@VARIED
def test_one_layer(backend, fused):
    serving(backend, fused)
    (x, w, b, *sine, _, _), _ = inputs((40, 32, 48, 16), torch.bfloat16)
    dy = torch.randn(40, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    fast = run(lambda *a: linear_damped_sine(*a, fused=fused, backend=backend), (x, w, b, *sine), dy)
    working = run(linear_reference, (x, w, b, *sine), dy)
    truth = run(linear_reference, [t.double() for t in (x, w, b, *sine)], dy.double())
    pooled = Budget("b and the sine", GRADIENT)
    for name, f, w_, t in zip(NAMES, fast, working, truth):
        if f.dim() == 1 and f.dtype == torch.float32:
            pooled.add(f, w_, t)
        else:
            budget = Budget(name, FORWARD if name == "y" else GRADIENT)
            budget.add(f, w_, t)
            budget.check()
    pooled.check()


@VARIED
def test_without_biases_and_with_leading_dimensions(backend, fused):
    serving(backend, fused)
    (x, w1, b1, *sine, w2, b2), _ = inputs((12, 16, 32, 16), torch.bfloat16)
    zero = damped_sine_mlp(x, w1, torch.zeros_like(b1), *sine, w2, torch.zeros_like(b2), fused=fused, backend=backend)
    assert torch.equal(
        damped_sine_mlp(x.view(3, 4, 16), w1, None, *sine, w2, None, fused=fused, backend=backend), zero.view(3, 4, 16)
    )
    assert torch.equal(damped_sine_mlp(x[0], w1, None, *sine, w2, None, fused=fused, backend=backend), zero[0]) or not fused
    x = x.requires_grad_()
    (dx,) = torch.autograd.grad(damped_sine_mlp(x, w1, None, *sine, w2, None, fused=fused, backend=backend).sum(), x)
    assert dx.isfinite().all() and dx.any()


def test_the_fused_result_does_not_depend_on_gradients_memory_or_the_run():
    serving("triton", True)
    tensors, dy = inputs((70, 32, 48, 16), torch.bfloat16)
    expected = run(ours("triton", True), tensors, dy)
    with torch.no_grad():
        assert torch.equal(damped_sine_mlp(*tensors, fused=True), expected[0])
    for x in strided_copies(tensors[0]).values():
        for w1, w2, dy_copy in zip(*(strided_copies(t).values() for t in (tensors[1], tensors[6], dy))):
            got = run(ours("triton", True), (x, w1, *tensors[2:6], w2, tensors[7]), dy_copy)
            assert all(torch.equal(g, e) for g, e in zip(got, expected))


def test_autocast_brings_float32_weights_to_the_fused_kernels():
    serving("triton", True)
    tensors, dy = inputs((20, 16, 32, 16), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(ours("auto", True), tensors, dy.bfloat16())
    narrow = [t.bfloat16() if place in (0, 1, 2, 6, 7) else t for place, t in enumerate(tensors)]
    expected = run(ours("triton", True), narrow, dy.bfloat16())
    for g, e, t in zip(got, expected, (expected[0], *tensors)):
        assert g.dtype == t.dtype and torch.equal(g, e.to(t.dtype))


def test_autocast_leaves_float64_alone():
    tensors, _ = inputs((4, 16, 32, 16), torch.float32)
    wide = [t.double() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(damped_sine_mlp(*wide), mlp_reference(*wide))
        with pytest.raises(ValueError, match="w1 is torch.float32 beside a torch.float64 x"):
            damped_sine_mlp(wide[0], *tensors[1:3], *wide[3:])
        with pytest.raises(BackendError, match="x is torch.float64 and fused=True"):
            damped_sine_mlp(*wide, fused=True)


def test_the_module_asks_for_the_fused_kernels():
    serving("triton", True)
    torch.manual_seed(0)
    parts, fused = (DampedSineMLP(16, 32, mode="relu", fused=fused, backend="triton").bfloat16() for fused in (False, True))
    fused.load_state_dict(parts.state_dict())
    x = torch.randn(5, 16).bfloat16()
    torch.testing.assert_close(fused(x), parts(x))
    with pytest.raises(BackendError, match="damped_sine_mlp.*x is torch.float32 and fused=True"):
        fused.float()(x.float())


def test_what_the_fused_kernels_refuse():
    tensors, _ = inputs((4, 16, 32, 16), torch.float32)
    with pytest.raises(
        BackendError, match="damped_sine_mlp.*'triton'.*x is torch.float32 and fused=True; the fused kernels serve float16"
    ):
        damped_sine_mlp(*tensors, fused=True)
    odd, _ = inputs((4, 16, 33, 16), torch.bfloat16)
    with pytest.raises(
        BackendError, match=r"widths are \(33, 16, 16, 33\) and fused=True; the fused kernels serve multiples of 16"
    ):
        damped_sine_mlp(*odd, fused=True, backend="triton")
    with pytest.raises(BackendError, match="fused=True is served by the Triton kernels alone"):
        damped_sine_mlp(*tensors, fused=True, backend="native")
    rows = {row["backend"]: row for row in explain("linear_damped_sine", *tensors[:6])}
    assert rows["torch"]["serves"] == "yes"


def test_gradients_of_the_specification():
    (x, w1, b1, *sine, w2, b2), _ = inputs((3, 2, 4, 2), torch.float32)
    leaves = [t.double().requires_grad_() for t in (x, w1, b1, *sine, w2, b2)]
    for mode in MODES:
        assert torch.autograd.gradcheck(lambda *a: mlp_reference(*a, mode=mode), leaves)
        assert torch.autograd.gradcheck(lambda *a: linear_reference(*a, mode=mode), leaves[:6])


def test_library_ops():
    serving("triton", True)
    from psann_kernels.damped_sine_mlp_triton import hidden, mlp

    for tokens in (4, 1, 0):
        tensors, _ = inputs((tokens, 16, 32, 16), torch.float16)
        x = tensors[0]
        leaves = [t.detach().requires_grad_() for t in (x.t().contiguous().t(), *tensors[1:])]
        torch.library.opcheck(mlp, (*leaves, "abs", True), atol=1e-2, rtol=1e-2)
        torch.library.opcheck(hidden, (*leaves[:6], "abs", True), atol=1e-2, rtol=1e-2)


@VARIED
def test_compiles_without_graph_break(backend, fused):
    serving(backend, fused)
    tensors, dy = inputs((20, 16, 32, 16), torch.bfloat16)
    compiled = torch.compile(ours(backend, fused), fullgraph=True, backend="aot_eager")
    for c, e in zip(run(compiled, tensors, dy), run(ours(backend, fused), tensors, dy)):
        assert torch.equal(c, e)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"w1": torch.ones(6, 4)}, r"w1 has shape \(6, 4\), but its input has 5 features; pass \(outputs, 5\)"),
        ({"b2": torch.ones(4)}, r"b2 has shape \(4,\); pass one per output, \(3,\), or None"),
        ({"w2": torch.ones(3, 6).half()}, "w2 is torch.float16 beside a torch.float32 x; pass it as torch.float32"),
        ({"damping": torch.ones(5)}, r"damping has shape \(5,\), but z has 6 features"),
        ({"x": torch.ones(2, 5).int()}, "x has shape .2, 5. and dtype torch.int32; it must be floating point"),
        ({"mode": "square"}, "mode is 'square'; choose one of 'abs', 'relu', 'none'"),
    ],
)
def test_bad_input(change, message):
    sine = dict(amplitude=torch.ones(6), frequency=torch.ones(6), damping=torch.ones(6))
    layers = dict(x=torch.ones(2, 5), w1=torch.ones(6, 5), b1=torch.ones(6), w2=torch.ones(3, 6), b2=torch.ones(3))
    with pytest.raises(ValueError, match=f"damped_sine_mlp: {message}"):
        damped_sine_mlp(**layers | sine | change)
    assert LINEAR.name == "linear_damped_sine"


@pytest.mark.campaign(weight=1)
def test_random_calls(campaign):
    serving("triton", True)
    for seed in campaign(weight=1):
        judge(lambda budgets, values: fill(budgets, seed, values))


def fill(budgets, seed, values):
    """One random fused call, in shape and options by `seed`, with the `values`-th draw of its numbers."""
    r = random.Random(seed)
    dtype, mode = r.choice([torch.float16, torch.bfloat16]), r.choice(MODES)
    shape = r.choice([1, 2, 17, 127, 128, 129, 257]), *(r.choice([16, 32, 64, 80, 128, 144, 272]) for _ in range(3))
    layouts = [r.choice(["contiguous", "transposed", "step 2", "misaligned"]) for _ in range(4)]
    is_described = r.random() < 0.7
    (x, w1, b1, *sine, w2, b2), dy = inputs(shape, dtype, values * 1000003 + seed)
    laid = [strided_copies(t)[layout] for t, layout in zip((x, w1, w2, dy), layouts)]
    from psann_kernels import damped_sine_mlp_triton

    with poisoned_allocations(), mock.patch.object(damped_sine_mlp_triton, "has_tma", lambda device: is_described):
        fast = run(ours("triton", True, mode), (laid[0], laid[1], b1, *sine, laid[2], b2), laid[3])
    working = run(lambda *a: plain(*a, mode), (x, w1, b1, *sine, w2, b2), dy)
    truth = run(lambda *a: mlp_reference(*a, mode=mode), [t.double() for t in (x, w1, b1, *sine, w2, b2)], dy.double())
    for name, f, w, t in zip(NAMES, fast, working, truth):
        budget = budgets.setdefault(name, Budget(f"{dtype} {mode} {shape} {name}", FORWARD if name == "y" else GRADIENT))
        budget.add(f, w, t)
