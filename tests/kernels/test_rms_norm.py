"""rms_norm: every backend against float64, forward and every gradient, in awkward shapes and memory."""

import random

import pytest
import torch
from psann_kernels import BackendError, explain, rms_norm
from psann_kernels.rms_norm import OP, reference
from witness import BACKENDS, FORWARD, GRADIENT, Budget, judge, poisoned_allocations, strided_copies

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(0, 3), (1, 1), (9, 130), (3, 33), (2, 3, 1), (2, 4, 17), (5, 0, 3), (33, 3)]
# The constants of rms_norm_triton, made small so that small shapes take every path: programs that see several tiles of rows,
# and rows wider than a tile.
FORMS = {
    "as shipped": {},
    "few programs": {"MAX_ROW_PROGRAMS": 2},
    "wide rows": {"MAX_TILE": 16, "WIDE_TILE": 32, "MAX_ROW_PROGRAMS": 2},
}
RUNS = [(backend, form) for backend in BACKENDS for form in FORMS if backend == "triton" or form == "as shipped"]


def inputs(shape, dtype, weight_dtype=torch.float32, seed=0):
    """x, residual, weight, dy, dh"""
    g = torch.Generator().manual_seed(seed)
    x, residual, dy, dh = (torch.randn(shape, generator=g).to(dtype) for _ in range(4))
    weight = (torch.rand(shape[-1], generator=g) + 0.5).to(weight_dtype)
    return 3 * x, residual, weight, dy, dh


def plain(x, weight, residual=None, eps=1e-6):
    """The formula with every intermediate in x's dtype: what that dtype can do."""
    h = x if residual is None else x + residual
    y = h / torch.sqrt((h * h).mean(-1, keepdim=True) + eps) * weight.to(x.dtype)
    return y if residual is None else (y, h)


def run(function, leaves, gradients):
    """Outputs, then the gradient of every leaf: x, weight and, where given, residual."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = function(*leaves)
    y = y if isinstance(y, tuple) else (y,)
    return *(t.detach() for t in y), *torch.autograd.grad(y, leaves, gradients[: len(y)])


def serving(backend, form="as shipped", monkeypatch=None, dtype=torch.float32):
    x, _, weight, *_ = inputs((2, 3), dtype)
    if OP.refusal(backend, x, weight) is not None:
        pytest.skip(f"{backend}: {OP.refusal(backend, x, weight)}")
    if FORMS[form]:
        from psann_kernels import rms_norm_triton

        for name, value in FORMS[form].items():
            monkeypatch.setattr(rms_norm_triton, name, value)


def call(backend, eps=1e-6):
    return lambda x, weight, residual=None: rms_norm(x, weight, residual=residual, eps=eps, backend=backend)


def cancellation(x, weight, residual, dy, eps):
    """Floor of dx's error: with one feature y is all but constant, and dx the small difference of two terms of this size."""
    if x.shape[-1] > 1 or x.numel() == 0:
        return 0.0
    h = x.double() if residual is None else x.double() + residual.double()
    return 2 * torch.finfo(x.dtype).eps * (dy.double() * weight.double() * (h * h + eps).rsqrt()).abs().max().item()


def pool(budgets, names, backend, leaves, gradients, eps=1e-6):
    """Add one case to the budgets, which are made on first use."""
    with poisoned_allocations():
        fast = run(call(backend, eps), leaves, gradients)
    working = run(lambda *a: plain(*a, eps=eps), leaves, gradients)
    wide = [t.double() for t in leaves], [t.double() for t in gradients]
    truth = run(lambda x, w, r=None: reference(x, w, residual=r, eps=eps), *wide)
    for name, f, w, t in zip(names, fast, working, truth, strict=True):
        factor = GRADIENT if name.startswith("d") else FORWARD
        # One budget a dtype: a float32 gradient of a half-precision call is judged apart from the half ones.
        budget = budgets.setdefault((name, f.dtype), Budget(f"{backend} {name} {f.dtype}", factor))
        budget.add(f, w, t)
        if name in ("dx", "dresidual"):
            budget.floor = max(budget.floor, cancellation(*leaves[:2], leaves[2] if len(leaves) > 2 else None, gradients[0], eps))


NAMES = {False: ("y", "dx", "dweight"), True: ("y", "h", "dx", "dweight", "dresidual")}


@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend, form", RUNS)
def test_three_witnesses(backend, form, dtype, has_residual, monkeypatch):
    serving(backend, form, monkeypatch, dtype)
    budgets = {}
    for weight_dtype in {torch.float32, dtype}:
        for seed, shape in enumerate(SHAPES):
            x, residual, weight, *gradients = inputs(shape, dtype, weight_dtype, seed)
            leaves = (x, weight, residual) if has_residual else (x, weight)
            pool(budgets, NAMES[has_residual], backend, leaves, gradients)
    for budget in budgets.values():
        assert budget.elements >= 128
        budget.check()


@pytest.mark.parametrize("backend, form", RUNS)
def test_memory_layout_does_not_matter(backend, form, monkeypatch):
    serving(backend, form, monkeypatch)
    x, residual, weight, dy, dh = inputs((5, 33), torch.float32)
    expected = run(call(backend), (x, weight, residual), (dy, dh))
    copies = [strided_copies(t) for t in (x, residual, dy, dh)]
    layouts = list(copies[0])
    for turn in range(len(layouts)):
        chosen = [layouts[(turn + i) % len(layouts)] for i in range(4)]
        x_copy, residual_copy, *gradients = (c[layout] for c, layout in zip(copies, chosen))
        got = run(call(backend), (x_copy, strided_copies(weight)["step 2"], residual_copy), gradients)
        # Not bit-equal: torch sums in an order that follows the strides.
        for g, e in zip(got, expected):
            torch.testing.assert_close(g, e, rtol=2e-6, atol=2e-6, msg=lambda m: f"x, residual, dy, dh {chosen}: {m}")
    row = x[:1].expand(5, 33)
    assert torch.equal(rms_norm(row, weight, backend=backend)[3], rms_norm(x[:1], weight, backend=backend)[0])


@pytest.mark.filterwarnings("ignore:.*encountered in multiply:RuntimeWarning")  # numpy's, under the interpreter
@pytest.mark.parametrize("backend, form", RUNS)
def test_special_values_stay_in_their_row(backend, form, monkeypatch):
    serving(backend, form, monkeypatch)
    x, _, weight, dy, _ = inputs((6, 20), torch.float32)
    expected = run(call(backend), (x, weight), (dy,))
    x = x.clone()
    x[1] = 0.0
    x[2, 5], x[3, 19], x[4, 0] = float("nan"), float("inf"), 1e30
    y, dx, _ = run(call(backend), (x, weight), (dy,))
    assert (y[1] == 0).all() and torch.isfinite(dx[1]).all()
    assert torch.isnan(y[2]).all() and torch.isnan(dx[2]).all()
    # A row whose mean square is infinite becomes 0, and the infinite feature itself has no quotient.
    assert torch.isnan(y[3, 19]) and (y[3, :19] == 0).all() and (y[4] == 0).all()
    for row in (0, 5):
        assert torch.equal(y[row], expected[0][row]) and torch.equal(dx[row], expected[1][row])


@pytest.mark.parametrize("backend, form", RUNS)
def test_a_batch_equals_its_rows(backend, form, monkeypatch):
    serving(backend, form, monkeypatch)
    x, residual, weight, dy, dh = inputs((5, 20), torch.bfloat16)
    whole = run(call(backend), (x, weight, residual), (dy, dh))
    for row in range(5):
        part = slice(row, row + 1)
        alone = run(call(backend), (x[part], weight, residual[part]), (dy[part], dh[part]))
        for name, w, a in zip(NAMES[True], whole, alone):
            assert name == "dweight" or torch.equal(w[part], a), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    serving(backend)
    x, _, weight, *_ = inputs((4, 33), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = rms_norm(x, weight, backend=backend)
    assert torch.equal(y, rms_norm(x, weight, backend=backend))


@pytest.mark.parametrize("residual_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend, form", RUNS)
def test_beside_float32_the_residual_and_y_may_be_halves(backend, form, dtype, residual_dtype, monkeypatch):
    """As the float32 call of the widened residual, whose y and whose residual's gradient are rounded once."""
    serving(backend, form, monkeypatch)
    for shape in ((5, 33), (3, 40, 16), (70, 130), (0, 4)):
        x, residual, weight, dy, dh = inputs(shape, torch.float32)
        residual, dy = residual.to(residual_dtype), dy.to(dtype)
        mixed = lambda x, weight, residual: rms_norm(x, weight, residual=residual, dtype=dtype, backend=backend)  # noqa: E731
        with poisoned_allocations():
            y, h, dx, dweight, dresidual = run(mixed, (x, weight, residual), (dy, dh))
        wide = run(call(backend), (x, weight, residual.float()), (dy.float(), dh))
        assert y.dtype == dtype and h.dtype == dx.dtype == torch.float32 and dresidual.dtype == residual_dtype
        assert torch.equal(y, wide[0].to(dtype)) and torch.equal(h, wide[1]) and torch.equal(dresidual, dx.to(residual_dtype))
        torch.testing.assert_close((dx, dweight), (wide[2], wide[3]), rtol=1e-6, atol=1e-6)
        alone = lambda x, weight: rms_norm(x, weight, dtype=dtype, backend=backend)  # noqa: E731
        y, dx, dweight = run(alone, (x, weight), (dy,))
        expected = run(call(backend), (x, weight), (dy.float(),))
        assert torch.equal(y, expected[0].to(dtype))
        torch.testing.assert_close((dx, dweight), expected[1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_sum_of_a_half_residual_may_be_used(backend):
    serving(backend)
    x, residual, weight, _, dh = inputs((4, 9), torch.float32)
    leaves = [x.requires_grad_(), residual.half().requires_grad_()]
    _, h = rms_norm(leaves[0], weight, residual=leaves[1], backend=backend)
    dx, dresidual = torch.autograd.grad(h, leaves, dh)
    assert torch.equal(dx, dh) and torch.equal(dresidual, dh.half())


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_of_two_outputs_may_go_unused(backend):
    serving(backend)
    x, residual, weight, dy, dh = inputs((4, 9), torch.float32)
    zero = torch.zeros_like(dy)
    for used, gradient, whole in ((0, dy, (dy, zero)), (1, dh, (zero, dh))):
        leaves = [t.detach().requires_grad_() for t in (x, weight, residual)]
        outputs = rms_norm(leaves[0], leaves[1], residual=leaves[2], backend=backend)
        got = torch.autograd.grad(outputs[used], leaves, gradient, materialize_grads=True)
        for g, e in zip(got, run(call(backend), (x, weight, residual), whole)[2:]):
            torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-6)


def test_gradients_of_the_specification():
    x, residual, weight, *_ = inputs((3, 5), torch.float64, torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, residual)]
    assert torch.autograd.gradcheck(lambda x, w, r: reference(x, w, residual=r, eps=0.1), leaves)
    assert torch.autograd.gradcheck(lambda x, w: reference(x, w, eps=0.1), leaves[:2])


def test_triton_library_ops():
    serving("triton")
    from psann_kernels.rms_norm_triton import add_rms_norm_triton, rms_norm_triton, rms_norm_triton_backward

    x, residual, weight, dy, dh = (t.requires_grad_() for t in inputs((3, 8), torch.float32))
    torch.library.opcheck(rms_norm_triton, (x.t().contiguous().t(), weight.bfloat16(), 1e-6, torch.bfloat16))
    torch.library.opcheck(rms_norm_triton, (x[:0], weight, 1e-6, torch.float32))
    torch.library.opcheck(add_rms_norm_triton, (x, residual.half(), weight, 1e-6, torch.bfloat16))
    torch.library.opcheck(add_rms_norm_triton, (x[:0], residual[:0], weight, 1e-6, torch.float32))
    torch.library.opcheck(rms_norm_triton_backward, (dy.detach(), dh.detach(), x.detach(), weight.detach(), 1e-6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_break(backend):
    serving(backend)
    x, residual, weight, dy, dh = inputs((4, 16), torch.float32)
    for leaves in ((x, weight), (x, weight, residual)):
        compiled = torch.compile(call(backend), fullgraph=True, backend="aot_eager")
        for c, e in zip(run(compiled, leaves, (dy, dh)), run(call(backend), leaves, (dy, dh)), strict=True):
            assert torch.equal(c, e)


def test_a_named_backend_serves_or_raises():
    x, _, weight, *_ = inputs((4, 8), torch.float64, torch.float64)
    with pytest.raises(BackendError, match="rms_norm.*backend='triton'.*float64"):
        rms_norm(x, weight, backend="triton")
    with pytest.raises(ValueError, match="backend is 'cuda'; choose one of 'auto'"):
        rms_norm(x, weight, backend="cuda")
    rows = {row["backend"]: row for row in explain("rms_norm", x, weight)}
    assert rows["torch"]["serves"] == "yes" and rows["triton"]["serves"] == "no" and "float64" in rows["triton"]["reason"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(3, 5).int()}, "x has shape .* and dtype torch.int32; it must be a floating-point tensor"),
        ({"x": torch.ones(3, 0)}, r"x has shape \(3, 0\) .* of at least one feature"),
        ({"x": torch.tensor(1.0)}, r"x has shape \(\) .* of at least one feature"),
        ({"weight": torch.ones(4)}, r"weight has shape \(4,\), but x has 5 features"),
        ({"weight": torch.ones(5, 1)}, r"weight has shape \(5, 1\), but x has 5 features"),
        ({"weight": torch.ones(5).half()}, "weight is torch.float16 beside a torch.float32 x; pass it as torch.float32"),
        ({"weight": torch.ones(5, device="meta")}, "weight is on meta and x on cpu; put them on one device"),
        ({"residual": torch.ones(1, 5)}, r"residual is \(1, 5\) torch.float32 .* pass both in one shape"),
        ({"residual": torch.ones(3, 5).double()}, r"residual is \(3, 5\) torch.float64 .* pass both in one shape"),
        ({"dtype": torch.float64}, "dtype is torch.float64; of a torch.float32 x, y can have torch.float32 or torch.bfloat16 or"),
        ({"x": torch.ones(3, 5).half(), "dtype": torch.bfloat16}, "dtype is torch.bfloat16; of a torch.float16 x, y can have"),
        ({"eps": 0.0}, "eps is 0.0; it must be positive"),
        ({"eps": float("nan")}, "eps is nan; it must be positive"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=f"rms_norm: {message}"):
        rms_norm(**dict(x=torch.ones(3, 5), weight=torch.ones(5)) | change)


# Elements that a random case pools: of 128, maxima differ by more than the factor in one case of 400.
ENOUGH = 512


def fill(budgets, seed, values, backend, monkeypatch):
    """Pool one random kind of call, in as many random shapes as it takes to judge it; `values` numbers the draw of their values."""
    draw = random.Random(seed)
    form = draw.choice(list(FORMS))
    dtype = draw.choice(DTYPES)
    weight_dtype = draw.choice([torch.float32, dtype])
    has_residual = draw.random() < 0.5
    eps = 10 ** draw.uniform(-8, 0)
    with monkeypatch.context() as patch:
        serving(backend, form, patch, dtype)
        elements = 0
        while elements < ENOUGH:
            lead = [draw.choice([1, 1, 2, 3, 17, 33]) for _ in range(draw.randint(1, 2))]
            shape = (*lead, draw.choice([1, 3, 15, 16, 17, 31, 32, 33, 64, 100, 129]))
            x, residual, weight, *gradients = inputs(shape, dtype, weight_dtype, draw.randrange(2**32) + values)
            tensors = [draw.choice(list(strided_copies(t).values())) for t in (x, weight, residual, *gradients)]
            pool(budgets, NAMES[has_residual], backend, tensors[: 3 if has_residual else 2], tensors[3:], eps)
            elements += shape[-1]  # of dweight, which has the fewest


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.campaign(weight=1)
def test_random_calls(backend, campaign, monkeypatch):
    serving(backend)
    for seed in campaign(weight=1):
        judge(lambda budgets, values: fill(budgets, seed, values, backend, monkeypatch))
