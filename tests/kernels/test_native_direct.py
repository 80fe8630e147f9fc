"""Calls that leave the dispatcher out give what the op gives, and whatever looks at calls still sees them."""

import pytest
import torch
from psann_kernels import (
    damped_sine, direct, linear, native, paged_append, paged_attention, rms_norm, rope_attention, scaled_add, wave_conv,
)  # fmt: skip
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.skipif(native.NATIVE is None, reason=native.WHY_NOT)


def arguments():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(5, 33, generator=g), *(torch.rand(33, generator=g) for _ in range(3))]


def serve(*tensors):
    return damped_sine(*tensors, backend="native")


class Calls(TorchDispatchMode):
    """Names of what the dispatcher runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_the_op_gives_the_same_bits(monkeypatch):
    leaves = [t.requires_grad_() for t in arguments()]
    dy = torch.randn(5, 33)

    def run():
        y = serve(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    directly = run()
    monkeypatch.setattr(direct, "_is_watched", lambda: True)
    for a, b in zip(directly, run()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_a_view_that_negates_is_read_as_what_it_says(needs_gradient):
    """Its memory holds the opposite, and it lies like any other tensor."""
    z, a, f, d = arguments()
    z, view = z.neg(), torch._neg_view(z)
    assert view.is_neg() and view.is_contiguous() and torch.equal(z, view)
    weight = a[:1].clone()
    for call in (
        lambda x: damped_sine(x, a, f, d, backend="native"), lambda x: rms_norm(x, a, backend="native"),
        lambda x: rms_norm(z, a, residual=x, backend="native")[0], lambda x: linear(x, z, backend="native"),
        lambda x: linear(z, x, backend="native"), lambda x: scaled_add(z, x, weight, backend="native"),
        lambda x: wave_conv(x[None], a[:, None], a, f, d, backend="native"),
        lambda x: rope_attention(x.view(1, 5, 3, 11), *[z.view(1, 5, 3, 11)] * 2),
    ):  # fmt: skip
        torch.testing.assert_close(call(z), call(view.detach().requires_grad_(needs_gradient)))


@pytest.mark.parametrize("which", ["q", "k_cache", "k"])
def test_a_view_that_negates_is_read_so_by_decoding_too(which):
    def decoded(change):
        g = torch.Generator().manual_seed(0)
        shapes = {"q": (1, 2, 8), "k": (1, 2, 8), "k_cache": (3, 4, 2, 8)}
        t = {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}
        t[which] = change(t[which])
        table, length, bounds = (torch.tensor(x, dtype=torch.int32) for x in ([[1, 2]], [7], [0, 1]))
        if which == "k":
            caches = torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 8)
            paged_append(t["k"], t["k"], *caches, torch.tensor([5]), backend="native")
            return caches
        return paged_attention(t["q"], t["k_cache"], torch.ones(3, 4, 2, 8).cumsum(0), table, length, bounds, backend="native")

    with torch.no_grad():
        torch.testing.assert_close(decoded(torch.neg), decoded(torch._neg_view))


def test_a_mode_sees_the_op():
    with Calls() as calls:
        serve(*arguments())
    assert any("damped_sine_native" in name for name in calls.names)


def test_a_trace_holds_the_op():
    tensors = arguments()
    graph = make_fx(serve)(*tensors)
    assert "damped_sine_native" in graph.code
    traced = torch.jit.trace(lambda z: serve(z, *tensors[1:]), tensors[0])
    assert torch.equal(traced(2 * tensors[0]), serve(2 * tensors[0], *tensors[1:]))


def test_a_profile_names_the_op():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        serve(*arguments())
    assert any("damped_sine_native" in event.name for event in profile.events())


def test_fake_tensors_run_no_kernel():
    with FakeTensorMode() as mode:
        y = serve(*(mode.from_tensor(t) for t in arguments()))
    assert type(y).__name__ == "FakeTensor" and y.shape == (5, 33)


def test_a_subclass_is_dispatched():
    class Marked(torch.Tensor):
        pass

    z, *parameters = arguments()
    assert type(serve(z.as_subclass(Marked), *parameters)) is Marked


def test_derivatives_that_it_lacks_are_errors():
    z, *parameters = arguments()
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda t: serve(t, *parameters), (z,), (z,))
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda t: serve(t, *parameters).sum())(z)
    z.requires_grad_()
    with pytest.raises(RuntimeError, match="damped_sine_native.*has no derivative .*backend='torch' has all"):
        torch.autograd.grad(serve(z, *parameters).sum(), z, create_graph=True)


def test_a_parameter_keeps_its_gradient_and_inference_gives_none():
    weight = torch.nn.Parameter(torch.ones(33))
    z = arguments()[0]
    rms_norm(z, weight, backend="native").sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert not rms_norm(z, weight, backend="native").requires_grad
    with torch.inference_mode():
        assert linear(z, z, backend="native").is_inference()
