"""AdamW's native step: torch's but for rounding, the same state, nothing else touched, the same bits whatever the threads."""

from __future__ import annotations

import copy
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from psann_fast.train import adamw
from psann_fast.train.adamw import AdamW
from psann_kernels import native
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from guard_pages import SIZES, Guard  # noqa: E402

SHAPES = ((), (1,), (0, 3), (7, 5), (33,), (130, 64), (3, 8192), (20000,), (1,))
RATE, BETAS, DECAY = 0.02, (0.9, 0.99), 0.3
EPS = torch.finfo(torch.float32).eps
needs_kernels = pytest.mark.skipif(native.NATIVE is None, reason=native.WHY_NOT)


@pytest.fixture
def launches(launches_of) -> list[str]:
    """The kernels that have run."""
    return launches_of(adamw)


def drawn(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * scale for shape in SHAPES]


def groups(parameters: list[nn.Parameter]) -> list[dict]:
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def ours(parameters: list[nn.Parameter]) -> AdamW:
    return AdamW(groups(parameters), lr=RATE, betas=BETAS)


def torchs(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups(parameters), lr=RATE, betas=BETAS, fused=True)


def stepped(make, steps: int, dtype: torch.dtype = torch.float32, scale: float = 1.0):
    """(parameters, optimizer) after so many steps; one parameter has no gradient in the second."""
    parameters = [nn.Parameter(t.to(dtype)) for t in drawn(99)]
    optimizer = make(parameters)
    for step in range(steps):
        for p, g in zip(parameters, drawn(step, scale)):
            p.grad = g.to(dtype)
        if step == 1:
            parameters[3].grad = None
        for group in optimizer.param_groups:
            group["lr"] = RATE / (1 + step)
        optimizer.step()
    return parameters, optimizer


@needs_kernels
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e12])
def test_steps_are_as_near_to_float64_as_torchs(isa, launches, scale):
    found, optimizer = stepped(ours, 4, scale=scale)
    assert launches == ["adamw"] * 8
    plain, other = stepped(torchs, 4, scale=scale)
    true, exact = stepped(torchs, 4, torch.float64, scale)
    for p, q, t in zip(found, plain, true):
        assert sorted(optimizer.state[p]) == sorted(other.state[q])
        # The moments hold sums of as many terms as there were steps; a move is at most a few RATE, and so is its rounding.
        for name in ("step", "exp_avg", "exp_avg_sq"):
            mine, theirs, right = optimizer.state[p][name], other.state[q][name], exact.state[t][name].double()
            assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
            size = right.abs().max().item() if right.numel() else 0.0
            assert (mine - right).norm() <= 2 * (theirs - right).norm() + size * EPS * math.sqrt(max(1, right.numel()))
        size = RATE + (t.abs().max().item() if t.numel() else 0.0)
        assert (p - t).norm() <= 2 * (q - t).norm() + size * EPS * math.sqrt(max(1, t.numel())), tuple(p.shape)


@needs_kernels
def test_a_step_ends_what_autograd_kept_of_the_parameters():
    p = nn.Parameter(torch.randn(5))
    held = (p * p).sum()
    p.grad = torch.ones(5)
    ours([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held.backward()


@needs_kernels
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_none_spreads_to_its_element_alone(launches, bad):
    p = nn.Parameter(torch.ones(40))
    p.grad = torch.ones(40)
    p.grad[33] = bad
    ours([p]).step()
    assert launches and torch.isnan(p).nonzero().tolist() == [[33]]


@needs_kernels
def test_the_kernel_stays_inside_its_tensors(isa):
    for seed in range(20):
        choose = random.Random(seed)
        sizes = [choose.choice((*SIZES, 9000)) for _ in range(3)]
        with Guard(choose, is_far=False) as guard:
            held = [[guard.place(torch.rand(n) + 0.5) for n in sizes] for _ in range(4)]
            p, g, m, v = ([t.double() for t in each] for each in held)
            steps = [guard.place(torch.tensor(float(n))) for n in (0, 6, 999)]
            lists = [native.addresses(each) for each in (*held, steps)]
            native.launch("adamw", held[0][0], *lists, sizes, RATE, *BETAS, 1e-8, DECAY)
            for i, n in enumerate((1, 7, 1000)):
                assert steps[i].item() == n
                m[i], v[i] = m[i] * 0.9 + g[i] * 0.1, v[i] * 0.99 + g[i] ** 2 * 0.01
                root = (v[i] / (1 - 0.99**n)).sqrt() + 1e-8
                p[i] = p[i] * (1 - RATE * DECAY) - RATE * m[i] / (1 - 0.9**n) / root
                for found, true in zip(held, (p, g, m, v)):
                    torch.testing.assert_close(found[i].double(), true[i], rtol=8 * EPS, atol=8 * EPS)


@needs_kernels
def test_the_number_of_threads_changes_no_bit():
    held, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.cat([p.detach().flatten() for p in stepped(ours, 3)[0]]))
    finally:
        torch.set_num_threads(held)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_kernels
def test_a_copy_and_a_loaded_state_go_on_to_the_same_bits(launches):
    parameters, optimizer = stepped(ours, 2)
    copied_parameters, copied = copy.deepcopy((parameters, optimizer))
    loaded_parameters = copy.deepcopy(parameters)
    loaded = ours(loaded_parameters)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    launches.clear()
    for members, each in ((parameters, optimizer), (copied_parameters, copied), (loaded_parameters, loaded)):
        for p, g in zip(members, drawn(7)):
            p.grad = g
        each.step()
    assert launches == ["adamw"] * 6
    for p, q, r in zip(parameters, copied_parameters, loaded_parameters):
        assert torch.equal(p, q) and torch.equal(p, r)


def turned(t: Tensor) -> Tensor:
    return t.t().contiguous().t()


OTHERS = {"other strides": turned, "another dtype": Tensor.double}


@pytest.mark.parametrize("other", [*OTHERS, "a flag", "maximize"])
def test_what_the_kernel_does_not_serve_is_torchs(launches, other):
    found = []
    for make in (ours, torchs):
        change = OTHERS.get(other, lambda t: t)
        parameters = [nn.Parameter(change(t) if t.dim() == 2 else t) for t in drawn(3)]
        optimizer = make(parameters)
        if other == "a flag":
            optimizer.found_inf = torch.zeros(())
        for group in optimizer.param_groups:
            group["maximize"] = other == "maximize"
        for step in range(2):
            for p, g in zip(parameters, drawn(step)):
                p.grad = torch.empty_like(p).copy_(g)
            optimizer.step()
        found.append(parameters)
    assert not launches
    for p, q in zip(*found):
        assert torch.equal(p, q)


@needs_kernels
def test_a_moment_that_was_replaced_is_looked_at_again(launches):
    parameters, optimizer = stepped(ours, 2)
    plain, other = stepped(torchs, 2)
    launches.clear()
    for members, each in ((parameters, optimizer), (plain, other)):
        for p, g in zip(members, drawn(7)):
            p.grad = g
        each.state[members[3]]["step"] = torch.zeros((), dtype=torch.float64)  # which the kernel would read as a float
        each.step()
    assert not launches and optimizer.state[parameters[3]]["step"] == 1
    for p, q in zip(parameters, plain):
        torch.testing.assert_close(p, q)


def test_a_closure_is_called_once_and_its_loss_returned():
    p, calls = nn.Parameter(torch.ones(4)), []

    def closure():
        calls.append(1)
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert ours([p]).step(closure).item() == 4.0 and calls == [1]
    assert (p < 1).all()


def test_nothing_moves_without_gradients():
    parameters = [nn.Parameter(t) for t in drawn(1)]
    optimizer = ours(parameters)
    assert optimizer.step() is None and not optimizer.state
    for p, before in zip(parameters, drawn(1)):
        assert torch.equal(p, before)
