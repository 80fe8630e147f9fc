"""damped_sine: every backend against float64, forward and every gradient, in awkward shapes and memory."""

import pytest
import torch
from psann_kernels import BackendError, damped_sine, explain
from psann_kernels.damped_sine import MODES, OP, reference
from witness import BACKENDS, FORWARD, GRADIENT, Budget, poisoned_allocations, strided_copies

FEATURES = [1, 3, 33, 130]
SHAPES = [(0,), (1,), (33,), (2, 0), (2, 17)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(lead, features, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = (torch.randn(*lead, features, generator=g) * 4).to(dtype)
    amplitude = torch.randn(features, generator=g) + 1
    frequency = torch.rand(features, generator=g) * 6
    damping = torch.rand(features, generator=g) * 0.5
    dy = torch.randn(*lead, features, generator=g).to(dtype)
    return z, amplitude, frequency, damping, dy


def plain(z, amplitude, frequency, damping, mode):
    """The formula with every intermediate in z's dtype: what that dtype can do."""
    amplitude, frequency, damping = (t.to(z.dtype) for t in (amplitude, frequency, damping))
    g = {"abs": z.abs(), "relu": z.relu(), "none": torch.zeros_like(z)}[mode]
    return amplitude * torch.exp(-damping * g) * torch.sin(frequency * z)


def run(function, z, *parameters, dy):
    leaves = [t.detach().requires_grad_() for t in (z, *parameters)]
    y = function(*leaves)
    gradients = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    return y.detach(), *(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients))


def serving(backend, *args):
    if OP.refusal(backend, *args) is not None:
        pytest.skip(f"{backend}: {OP.refusal(backend, *args)}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_three_witnesses(backend, dtype, mode):
    serving(backend, *inputs((2,), 3, dtype)[:4])
    names = ("y", "dz", "damplitude", "dfrequency", "ddamping")
    budgets = [Budget(f"{backend} {name}", FORWARD if name == "y" else GRADIENT) for name in names]
    for lead in SHAPES:
        for features in FEATURES:
            z, *parameters, dy = inputs(lead, features, dtype)
            with poisoned_allocations():
                fast = run(lambda *a: damped_sine(*a, mode=mode, backend=backend), z, *parameters, dy=dy)
            working = run(lambda *a: plain(*a, mode), z, *parameters, dy=dy)
            truth = run(
                lambda *a: reference(*a, mode=mode), z.double(), *(p.double() for p in parameters), dy=dy.double()
            )
            for budget, f, w, t in zip(budgets, fast, working, truth):
                budget.add(f, w, t)
    for budget in budgets:
        assert budget.elements >= 128
        budget.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_layout_does_not_matter(backend):
    z, *parameters, dy = inputs((5,), 33, torch.float32)
    serving(backend, z, *parameters)
    expected = run(lambda *a: damped_sine(*a, backend=backend), z, *parameters, dy=dy)
    for name, z_copy in strided_copies(z).items():
        for dy_copy in strided_copies(dy).values():
            got = run(lambda *a: damped_sine(*a, backend=backend), z_copy, *parameters, dy=dy_copy)
            # Not bit-equal: torch sums the parameter gradients in an order that follows the strides.
            for g, e in zip(got, expected):
                torch.testing.assert_close(g, e, rtol=2e-6, atol=2e-6, msg=lambda m: f"{name}: {m}")
    row = z[:1].expand(5, 33)
    assert torch.equal(damped_sine(row, *parameters, backend=backend)[3], damped_sine(z[:1], *parameters, backend=backend)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values(backend):
    z = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e38, 1e-40]).unsqueeze(1)
    one = torch.ones(1)
    serving(backend, z, one, one, one)
    y = damped_sine(z, one, one, 0.1 * one, backend=backend).flatten()
    assert y[0] == 0 and not torch.signbit(y[0]) and y[1] == 0 and torch.signbit(y[1])
    assert torch.isnan(y[2:5]).all() and y[5] == 0 and 0 < y[6] < 1.1e-40


def test_gradients_of_the_specification():
    z, *parameters, _ = inputs((3,), 5, torch.float64)
    leaves = [t.double().requires_grad_() for t in (z, *parameters)]
    for mode in MODES:
        assert torch.autograd.gradcheck(lambda *a: reference(*a, mode=mode).sum(0), leaves)


def test_triton_library_op():
    z, *parameters, _ = inputs((4,), 16, torch.float32)
    serving("triton", z, *parameters)
    from psann_kernels.damped_sine_triton import damped_sine_triton

    for z_case in (z, z.t().contiguous().t(), z[:0], z[:1]):
        leaves = [t.detach().requires_grad_() for t in (z_case, *parameters)]
        torch.library.opcheck(damped_sine_triton, (*leaves, "abs"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_break(backend):
    z, *parameters, dy = inputs((4,), 16, torch.float32)
    serving(backend, z, *parameters)
    eager = run(lambda *a: damped_sine(*a, backend=backend), z, *parameters, dy=dy)
    compiled = torch.compile(lambda *a: damped_sine(*a, backend=backend), fullgraph=True, backend="aot_eager")
    for c, e in zip(run(compiled, z, *parameters, dy=dy), eager):
        assert torch.equal(c, e)


def test_a_named_backend_serves_or_raises(monkeypatch):
    z, *parameters, _ = inputs((4,), 16, torch.float64)
    with pytest.raises(BackendError, match="damped_sine.*backend='triton'.*float64"):
        damped_sine(z, *(p.double() for p in parameters), backend="triton")
    with pytest.raises(ValueError, match="backend is 'cuda'; choose one of 'auto'"):
        damped_sine(z, *(p.double() for p in parameters), backend="cuda")
    rows = {row["backend"]: row for row in explain("damped_sine", z, *(p.double() for p in parameters))}
    assert rows["torch"]["serves"] == "yes" and rows["triton"]["serves"] == "no" and "float64" in rows["triton"]["reason"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"damping": torch.ones(4)}, r"damping has shape \(4,\), but z has 5 features"),
        ({"amplitude": torch.ones(5).half()}, "amplitude is torch.float16 beside a torch.float32 z; pass it as torch.float32"),
        ({"z": torch.ones(3, 5).int()}, "z has shape .* and dtype torch.int32; it must be a floating-point tensor"),
        ({"mode": "square"}, "mode is 'square'; choose one of 'abs', 'relu', 'none'"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(z=torch.ones(3, 5), amplitude=torch.ones(5), frequency=torch.ones(5), damping=torch.ones(5)) | change
    with pytest.raises(ValueError, match=f"damped_sine: {message}"):
        damped_sine(**arguments)
