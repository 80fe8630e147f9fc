"""scaled_add: every backend against float64, forward and every gradient."""

import contextlib

import pytest
import torch
from psann_kernels import BackendError, explain, scaled_add
from psann_kernels.scaled_add import OP, reference
from witness import FORWARD, GRADIENT, assert_within_budget, poisoned_allocations

BACKENDS = ("torch", "native")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIXED = [(x, branch) for x in DTYPES for branch in DTYPES if branch == x or x == torch.float32]


def inputs(shape, dtype=torch.float32, branch_dtype=torch.float32, seed=0):
    """x, branch, alpha, dh"""
    g = torch.Generator().manual_seed(seed)
    x, branch, dh = (torch.randn(shape, generator=g) for _ in range(3))
    return x.to(dtype), branch.to(branch_dtype), torch.tensor([0.7]), dh.to(dtype)


def run(function, x, branch, alpha, dh):
    leaves = [t.detach().requires_grad_() for t in (x, branch, alpha)]
    h = function(*leaves)
    return h.detach(), *torch.autograd.grad(h, leaves, dh)


def call(backend):
    return lambda *tensors: scaled_add(*tensors, backend=backend)


def serving(backend):
    reason = OP.refusal(backend, *inputs((2, 3))[:3])
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("dtype, branch_dtype", MIXED, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_three_witnesses(backend, dtype, branch_dtype):
    serving(backend)
    for seed, shape in enumerate(((3, 100), (2, 5, 33), (5, 4099))):
        tensors = inputs(shape, dtype, branch_dtype, seed)
        with poisoned_allocations():
            fast = run(call(backend), *tensors)
        # As torch would write it, everything in its own dtype; float32 where the branch is narrower.
        plain = run(lambda x, branch, alpha: x + (alpha.to(x.dtype) * branch).to(x.dtype), *tensors)
        truth = run(reference, *(t.double() for t in tensors))
        for name, factor, *values in zip(("h", "dx", "dbranch"), (FORWARD, GRADIENT, GRADIENT), fast, plain, truth):
            assert_within_budget(f"{backend} {name}", *values, factor)
        # One number, whose error in torch may happen to be 0: judged by what adding up that many costs.
        scale = (tensors[1].double() * tensors[3].double()).abs().sum()
        assert fast[3].dtype == torch.float32 and (fast[3].double() - truth[3]).abs() <= 2e-7 * scale


@pytest.mark.parametrize("backend", BACKENDS)
def test_awkward_calls(backend):
    serving(backend)
    for shape in ((0, 4), (1,), (1, 1)):
        h, *gradients = run(call(backend), *inputs(shape))
        assert h.shape == shape and all(g.isfinite().all() for g in gradients)
    x, branch, alpha, dh = inputs((6, 35))
    expected = run(call(backend), x, branch, alpha, dh)
    got = run(call(backend), *(t.t().contiguous().t() for t in (x, branch)), alpha, dh.t().contiguous().t())
    for g, e in zip(got, expected):
        torch.testing.assert_close(g, e)
    with pytest.raises(RuntimeError, match="has no derivative") if backend == "native" else contextlib.nullcontext():
        leaf = x.detach().requires_grad_(), branch.detach().requires_grad_(), alpha.detach().requires_grad_()
        torch.autograd.grad(scaled_add(*leaf, backend=backend).sum(), leaf, create_graph=True)


def test_the_same_bits_for_any_number_of_threads():
    serving("native")
    tensors, threads, found = inputs((300, 200), torch.float32, torch.bfloat16), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(call("native"), *tensors))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_special_values_go_where_they_belong():
    serving("native")
    x, branch, alpha, dh = inputs((4, 40))
    branch[1, 3], x[2, 5] = float("inf"), float("nan")
    torch.testing.assert_close(scaled_add(x, branch, alpha, backend="native"), reference(x, branch, alpha), equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_break(backend):
    serving(backend)
    tensors = inputs((4, 16))
    compiled = torch.compile(call(backend), fullgraph=True, backend="aot_eager")
    for c, e in zip(run(compiled, *tensors), run(call(backend), *tensors), strict=True):
        torch.testing.assert_close(c, e)


def test_library_ops():
    serving("native")
    from psann_kernels.scaled_add_native import scaled_add_native

    x, branch, alpha, _ = inputs((3, 8), torch.float32, torch.bfloat16)
    torch.library.opcheck(scaled_add_native, tuple(t.requires_grad_() for t in (x, branch, alpha)))


def test_a_named_backend_serves_or_raises():
    tensors = [t.double() for t in inputs((2, 3))[:3]]
    with pytest.raises(BackendError, match="scaled_add.*backend='native'"):
        scaled_add(*tensors, backend="native")
    assert {row["backend"]: row["serves"] for row in explain("scaled_add", *tensors)}["torch"] == "yes"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(3, 5).int()}, "x is torch.int32; it must be floating point"),
        ({"branch": torch.ones(1, 5)}, r"branch is \(1, 5\) torch.float32 .* pass both in one shape"),
        ({"branch": torch.ones(3, 5).double()}, r"branch is \(3, 5\) torch.float64 .* pass both in one shape"),
        ({"x": torch.ones(3, 5).half()}, "branch is .* torch.float32 .* and x is .* torch.float16"),
        ({"alpha": torch.ones(())}, r"alpha is \(\) torch.float32 .* pass one number, shape \(1,\)"),
        ({"alpha": torch.ones(1).half()}, "alpha is .* torch.float16 .* in torch.float32 or torch.float32"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=f"scaled_add: {message}"):
        scaled_add(**dict(x=torch.ones(3, 5), branch=torch.ones(3, 5), alpha=torch.ones(1)) | change)
