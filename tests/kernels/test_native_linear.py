"""linear: every backend against float64, forward and every gradient, and rows that do not depend on their neighbours."""

import pytest
import torch
from psann_kernels import BackendError, linear
from psann_kernels.linear import OP, quantize, reference
from psann_kernels.native import NATIVE
from witness import FORWARD, GRADIENT, Budget, poisoned_allocations, strided_copies

BACKENDS = ("torch", "native")
SHAPES = [(1, 1, 1), (1, 33, 130), (3, 130, 33), (8, 7, 5), (2, 512, 64)]  # rows, inputs, outputs
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(rows, k, n, dtype, weight_dtype):
    g = torch.Generator().manual_seed(rows + k)
    x, weight, bias, dy = (torch.randn(*s, generator=g) for s in ((rows, k), (n, k), (n,), (rows, n)))
    weight, scale = quantize(weight) if weight_dtype == torch.int8 else (weight.to(weight_dtype), None)
    return x.to(dtype), weight, scale, bias, dy.to(dtype)


def serving(backend, *args, **options):
    reason = OP.refusal(backend, *args, **options)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def run(function, x, weight, scale, bias, dy):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t.is_floating_point()]
    full = iter(leaves)
    args = [next(full) if t.is_floating_point() else t for t in (x, weight)]
    y = function(*args, scale=scale, bias=next(full))
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def plain(x, weight, *, scale, bias):
    """Every result in x's dtype, products too."""
    y = x @ weight.to(x.dtype).t()
    return (y if scale is None else y * scale.to(x.dtype)) + bias.to(x.dtype)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_three_witnesses(backend, dtype, weight_dtype):
    serving(backend, torch.ones(1, 1).to(dtype), torch.ones(1, 1).to(weight_dtype))
    budgets = {}
    for shape in SHAPES:
        x, weight, scale, bias, dy = inputs(*shape, dtype, weight_dtype)
        with poisoned_allocations():
            fast = run(lambda *a, **o: linear(*a, **o, backend=backend), x, weight, scale, bias, dy)
        working = run(plain, x, weight, scale, bias, dy)
        wide = [t if t is None or t.dtype == torch.int8 else t.double() for t in (x, weight, scale, bias, dy)]
        truth = run(reference, *wide)
        names = ("y", "dx", "dweight", "dbias") if weight.is_floating_point() else ("y", "dx", "dbias")
        for name, f, w, t in zip(names, fast, working, truth):
            budget = budgets.setdefault(name, Budget(f"{backend} {name}", FORWARD if name == "y" else GRADIENT))
            # A gradient has its tensor's dtype; the plain witness may be narrower.
            budget.add(f, w.to(f.dtype), t)
    for budget in budgets.values():
        assert budget.elements >= 128
        budget.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_layout_does_not_matter(backend):
    x, weight, _, bias, _ = inputs(3, 33, 130, torch.float32, torch.float32)
    serving(backend, x, weight)
    expected = linear(x, weight, bias=bias, backend=backend)
    for x_copy in strided_copies(x).values():
        for weight_copy in strided_copies(weight).values():
            torch.testing.assert_close(linear(x_copy, weight_copy, bias=bias, backend=backend), expected, rtol=1e-6, atol=2e-6)
    assert linear(x[:0], weight, backend=backend).shape == (0, 130)
    assert linear(x.view(3, 1, 33), weight, backend=backend).shape == (3, 1, 130)


@pytest.mark.skipif(NATIVE is None, reason="native is missing")
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_row_gets_the_same_bits_alone(weight_dtype):
    x, weight, scale, bias, _ = inputs(8, 530, 33, torch.float32, weight_dtype)
    together = linear(x, weight, scale=scale, bias=bias, backend="native")
    for r in range(8):
        assert torch.equal(linear(x[r : r + 1], weight, scale=scale, bias=bias, backend="native")[0], together[r])


def test_quantized_weights_are_close():
    weight = torch.randn(40, 70)
    weight[3] = 0
    whole, scale = quantize(weight)
    assert whole.dtype == torch.int8 and ((whole * scale[:, None] - weight).abs() <= scale[:, None] * 0.5 + 1e-7).all()


@pytest.mark.skipif(NATIVE is None, reason="native is missing")
def test_many_rows_are_refused():
    with pytest.raises(BackendError, match="x has 9 rows; the kernel serves 1 to 8"):
        linear(torch.ones(9, 4), torch.ones(2, 4), backend="native")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.ones(2, 3)}, r"weight has shape \(2, 3\), but x has 4 inputs"),
        ({"weight": torch.ones(2, 4, dtype=torch.int8)}, "scale is missing; an int8 weight has one scale per row"),
        ({"scale": torch.ones(2)}, "scale is given"),
        ({"bias": torch.ones(3)}, r"bias is torch.float32 \(3,\); pass"),
        ({"weight": torch.ones(2, 4).long()}, "weight is torch.int64"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=f"linear: {message}|linear: .*{message}"):
        linear(**{"x": torch.ones(1, 4), "weight": torch.ones(2, 4), **change})
