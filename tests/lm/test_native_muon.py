"""The native kernels of Muon: torch's step but for rounding, nothing else touched, the same bits whatever the threads."""

from __future__ import annotations

import ctypes
import math
import random
import sys
from pathlib import Path
from typing import Callable

import pytest
import torch
from psann_fast.train import muon, muon_native
from psann_fast.train.muon import MOMENTUM, QUINTICS, TINY, Muon, orthogonal
from psann_kernels import native
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from guard_pages import SIZES, Guard  # noqa: E402

pytestmark = pytest.mark.skipif(native.NATIVE is None, reason=native.WHY_NOT)

# One matrix alone, several, both ways round; parts of a vector and of a tile, and several pieces.
SHAPES = [(1, 1), (1, 5), (5, 1), (7, 7), (33, 130), (130, 33), (33, 130), (64, 64), (64, 64), (300, 40), (40, 300), (20, 1100)]
LR, DECAY = 0.05, 0.4
# What the quintics make of a rounding: their slopes at 0 are their steepest.
STEEPEST = math.prod(a for a, _, _ in QUINTICS)
EPS = torch.finfo(torch.float32).eps
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def launches(launches_of) -> list[str]:
    """The kernels that have run."""
    return launches_of(muon_native)


def narrow(monkeypatch, dtype: torch.dtype) -> None:
    """Have products computed in this dtype, whatever the CPU."""
    monkeypatch.setattr(muon, "multiplies_narrow", lambda x: dtype == torch.bfloat16 and x.dtype != torch.float64)


def drawn(seed: int = 0, shapes: list[tuple[int, int]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def stepped(
    gradients: list[list[Tensor]], dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and momenta after a step with each list of gradients."""
    parameters = [nn.Parameter(t.to(dtype)) for t in drawn(99, [tuple(g.shape) for g in gradients[0]])]
    optimizer = Muon(parameters, lr=LR, weight_decay=DECAY)
    for each in gradients:
        for p, g in zip(parameters, each):
            p.grad = (g * scale).to(dtype)
        optimizer.step()
    return [p.detach() for p in parameters], [optimizer.state[p]["momentum_buffer"] for p in parameters]


def with_torch(monkeypatch, *arguments, **options):
    with monkeypatch.context() as plain:
        plain.setattr(muon, "serves_lists", lambda *lists: False)
        return stepped(*arguments, **options)


GRADIENTS = [drawn(seed) for seed in range(3)]


def size_of_a_move(p: Tensor) -> float:
    return 0.2 * LR * math.sqrt(max(p.shape))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_float32_steps_are_torchs(isa, launches, monkeypatch, scale):
    narrow(monkeypatch, torch.float32)
    monkeypatch.setattr(muon_native, "multiplies", lambda dtype: True)
    found, momenta = stepped(GRADIENTS, scale=scale)
    assert set(launches) == {"muon_prepare", "muon_rounds", "muon_apply"}
    launches.clear()
    expected, expected_momenta = with_torch(monkeypatch, GRADIENTS, scale=scale)
    assert not launches
    for p, q, m, n in zip(found, expected, momenta, expected_momenta):
        assert torch.equal(m, n)
        # Norms and products are added up in another order, in every step.
        error = len(GRADIENTS) * (size_of_a_move(p) * 4 * STEEPEST + q.abs().max().item()) * EPS
        assert (p - q).abs().max() <= error, f"{tuple(p.shape)}: {(p - q).abs().max() / error}"


@pytest.mark.parametrize("multiplies", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_are_as_near_to_float64_as_torchs(isa, launches, monkeypatch, dtype, multiplies):
    narrow(monkeypatch, dtype)
    monkeypatch.setattr(muon_native, "multiplies", lambda dtype: multiplies)
    found, momenta = stepped(GRADIENTS)
    assert set(launches) == {"muon_prepare", "muon_apply"} | ({"muon_rounds"} if multiplies else set())
    plain, _ = with_torch(monkeypatch, GRADIENTS)
    launches.clear()
    truth, true_momenta = stepped(GRADIENTS, torch.float64)
    assert not launches, "the kernels know no float64"
    for p, q, t, m, n in zip(found, plain, truth, momenta, true_momenta):
        rounding = size_of_a_move(p) * torch.finfo(dtype).eps + t.abs().max().item() * EPS
        assert (p - t).norm() <= 2 * (q - t).norm() + rounding * math.sqrt(p.numel()), tuple(p.shape)
        torch.testing.assert_close(m.double(), n, rtol=4 * EPS, atol=4 * EPS)


def judge_rounds(found: Tensor, before: Tensor) -> None:
    """Native rounds of `before`: as near to float64 as torch's, whose products round in as many places, and one rounding."""
    truth, plain = muon.rounds(before.double()), muon.rounds(before).double()
    for x, q, t in zip(found.double(), plain, truth):
        # What the first quintic, the steepest, makes of half a unit in the gram of one singular value, which is at most 1, and of
        # half a unit in its coefficients, which the kernel divides by the bound.
        _, b, c = QUINTICS[0]
        rounding = (abs(b) + 2 * abs(c)) * torch.finfo(before.dtype).eps
        assert (x - t).norm() <= 2 * (q - t).norm() + rounding, (tuple(x.shape), (x - t).norm(), (q - t).norm())


def kernels_once(seed: int, shape: tuple[int, int], n: int, dtype: torch.dtype, place: Callable[[Tensor], Tensor]) -> None:
    """Each kernel on n matrices, judged by float64."""
    g, m, p = ([place(t) for t in drawn(seed + i, [shape] * n)] for i in (0, 100, 200))
    u = torch.stack(g).double() * (1 - MOMENTUM) + MOMENTUM * (
        torch.stack(m).double() * MOMENTUM + torch.stack(g).double() * (1 - MOMENTUM)
    )
    x = place(torch.full((n, *sorted(shape, reverse=True)), math.nan, dtype=dtype))
    muon_native.prepare(g, m, x, MOMENTUM, TINY)
    tall = muon.as_tall(u / torch.linalg.matrix_norm(u, keepdim=True))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(x.double(), tall, rtol=eps / 2 + 8 * EPS, atol=8 * EPS)

    before = x.clone()
    muon_native.rounds(x, QUINTICS, TINY)
    judge_rounds(x, before)

    update = x.double().mT if muon.is_wide(p[0]) else x.double()
    moved = [q.double() * 0.9 - 0.3 * each for q, each in zip(p, update)]
    muon_native.apply(p, x, 0.9, 0.3)
    for q, true in zip(p, moved):
        torch.testing.assert_close(q.double(), true, rtol=4 * EPS, atol=4 * EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [16, 48, 300])
def test_singular_values_come_near_1_whatever_they_were(isa, rows, dtype):
    """A value beyond a quintic's interval would be thrown far out; rounding must not throw it there."""
    generator = torch.Generator().manual_seed(3)
    u, _, v = torch.linalg.svd(torch.randn(16, rows, 16, generator=generator), full_matrices=False)
    for least in (-1.5, -6.0, -40.0):  # from many directions to few, where the bound is nearest to the largest value
        x = (u * torch.logspace(0, least, 16)) @ v
        x = (x / torch.linalg.matrix_norm(x, keepdim=True)).to(dtype)
        even = muon_native.rounds(x.clone(), QUINTICS, TINY).float()
        values = torch.linalg.svdvals(even)
        assert values.max() < 1.3, values.max()
        assert (u[..., :1].mT @ even @ v[..., :1, :].mT).min() > 0.7
        if least == -1.5:
            assert values.min() > 0.65, values.min()


def test_products_are_ours_where_they_are_faster(isa, monkeypatch):
    for has_tiles in (False, True):
        monkeypatch.setattr(muon_native, "cpu_has_bf16_tiles", lambda: has_tiles)
        assert muon_native.multiplies(torch.float32) is (isa != "portable")
        assert muon_native.multiplies(torch.bfloat16) is (isa == "avx512_bf16" and not has_tiles)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_kernel_is_right_and_stays_inside_its_matrices(isa, dtype):
    for seed in range(60):
        choose = random.Random(seed)
        shape = (choose.choice((*SIZES, 300)), choose.choice((*SIZES, 300)))
        with Guard(choose, is_far=False) as guard:
            kernels_once(seed, shape, choose.choice((1, 2, 5)), dtype, guard.place)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(isa, dtype):
    """Neither where they share each product nor where each has matrices of its own, from 4 a thread on."""
    held, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 70):
            torch.set_num_threads(threads)
            for shape, n in (((300, 40), 3), ((40, 300), 14), ((130, 130), 3), ((700, 90), 2)):
                g, m, p = (drawn(i, [shape] * n) for i in range(3))
                x = torch.empty(n, *sorted(shape, reverse=True), dtype=dtype)
                muon_native.prepare(g, m, x, MOMENTUM, TINY)
                muon_native.rounds(x, QUINTICS, TINY)
                muon_native.apply(p, x, 0.9, 0.3)
                seen.append((threads, shape, torch.cat([t.double().flatten() for t in (x, *m, *p)])))
    finally:
        torch.set_num_threads(held)
    first = {shape: bits for threads, shape, bits in seen if threads == 1}
    assert all(torch.equal(bits, first[shape]) for _, shape, bits in seen) and len(seen) == 16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(260, 200), (1100, 64), (520, 513)])
def test_sums_of_several_chunks_are_whole(isa, dtype, shape):
    """More units than a tile adds up at once, in the gram and in its square."""
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(4))
    x = (x / torch.linalg.matrix_norm(x, keepdim=True)).to(dtype)
    judge_rounds(muon_native.rounds(x.clone(), QUINTICS, TINY), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [3, 9])
def test_rounds_of_nan_and_of_nothing_stay_in_their_matrix(isa, dtype, n):
    x = torch.randn(n, 70, 40, generator=torch.Generator().manual_seed(5), dtype=torch.float32) / 60
    x[0, 3, 4] = math.nan
    x[1] = 0.0
    expected = muon_native.rounds(x[2:].to(dtype), QUINTICS, TINY)
    found = muon_native.rounds(x.to(dtype), QUINTICS, TINY)
    assert found[0].isnan().all() and not found[1].any() and torch.equal(found[2:], expected)


@pytest.mark.parametrize("byte", [0x7F, 0x80])
def test_no_memory_is_believed_that_nobody_wrote(monkeypatch, byte):
    """What malloc gives is full of huge numbers, and outputs of NaN."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        pytest.skip("this C library has no mallopt")
    expected = stepped(GRADIENTS)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    perturb = -6  # M_PERTURB: freed memory is filled with this byte, new memory with its complement
    mallopt(perturb, byte)
    try:
        found = stepped(GRADIENTS)
    finally:
        mallopt(perturb, 0)
    for a, b in zip(expected, found):
        assert all(torch.equal(p, q) for p, q in zip(a, b))


@pytest.mark.parametrize("shape", [(4, 6), (60, 40)])
def test_matrices_of_zeros_do_not_move(launches, shape):
    parameters, _ = stepped([[torch.zeros(shape)] * 3])
    assert launches
    for p, start in zip(parameters, drawn(99, [shape] * 3)):
        assert torch.equal(p, start * (1 - LR * DECAY))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38, 1e-30])
def test_gradients_beyond_all_bounds_do_what_they_do_in_torch(launches, monkeypatch, bad):
    """NaN and infinity spread over their own matrix; what squares to infinity or to nothing moves nothing."""
    narrow(monkeypatch, torch.float32)
    shapes = [(20, 30), (30, 20), (20, 30)]
    gradients = drawn(5, shapes)
    if math.isfinite(bad):
        gradients[1] = torch.full((30, 20), bad)
    else:
        gradients[1][3, 4] = bad
    found, expected = stepped([gradients]), with_torch(monkeypatch, [gradients])
    assert launches
    for a, b in zip(found, expected):
        for p, q in zip(a, b):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert bool(found[0][1].isnan().all()) is not math.isfinite(bad) and not found[0][0].isnan().any()


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_a_norm_that_is_nan_is_not_taken_for_a_small_one(isa, shape):
    g, m = drawn(0, [shape] * 2), [torch.zeros(shape) for _ in range(2)]
    g[0][3, 4] = math.nan
    x = torch.empty(2, 30, 20)
    muon_native.prepare(g, m, x, MOMENTUM, TINY)
    assert x[0].isnan().all() and not x[1].isnan().any()


@pytest.mark.parametrize("which", ["parameter", "gradient", "momentum", "float64", "bfloat16", "a subclass"])
def test_what_the_kernels_cannot_take_goes_through_torch(launches, monkeypatch, which):
    narrow(monkeypatch, torch.float32)

    class Own(Tensor):
        pass

    def turned(t: Tensor) -> Tensor:
        return t.T.contiguous().T

    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(which, torch.float32)
    starts, gradients = ([t.to(dtype) for t in drawn(i, [(12, 16)] * 2)] for i in (0, 1))
    start = starts[0].as_subclass(Own) if which == "a subclass" else starts[0]
    parameters = [nn.Parameter(turned(start) if which == "parameter" else start), nn.Parameter(starts[1])]
    optimizer = Muon(parameters, lr=LR, weight_decay=DECAY)
    for p, g in zip(parameters, gradients):
        p.grad = turned(g) if which == "gradient" else g
    if which == "momentum":
        optimizer.state[parameters[0]]["momentum_buffer"] = turned(torch.zeros(12, 16))
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    assert not launches
    for p, start, g in zip(parameters, before, gradients):
        update = orthogonal(g.double()[None])[0]
        expected = start.double() * (1 - LR * DECAY) - update * size_of_a_move(p)
        # In bfloat16, whose products are wrong by their own rounding and more, the size of the move is what can be told.
        error = 0.5 * size_of_a_move(p) if dtype == torch.bfloat16 else 1e-5
        assert (p.detach().as_subclass(Tensor) - expected).abs().max() < error


def test_a_backward_through_weights_that_have_moved_is_an_error(launches):
    p = nn.Parameter(torch.randn(4, 6))
    x = torch.randn(2, 4, requires_grad=True)
    loss = (x @ p).square().sum()
    loss.backward(retain_graph=True)
    Muon([p], lr=LR, weight_decay=DECAY).step()
    assert launches
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_restored_state_goes_on_to_the_same_bits(launches):
    whole = stepped(GRADIENTS)
    parameters = [nn.Parameter(t) for t in drawn(99)]
    optimizer = Muon(parameters, lr=LR, weight_decay=DECAY)
    for each in GRADIENTS:
        # A new optimizer for every step.
        state = optimizer.state_dict()
        assert all(set(entry) == {"momentum_buffer"} for entry in state["state"].values())
        parameters = [nn.Parameter(p.detach().clone()) for p in parameters]
        optimizer = Muon(parameters, lr=LR, weight_decay=DECAY)
        optimizer.load_state_dict(state)
        for p, g in zip(parameters, each):
            p.grad = g.clone()
        optimizer.step()
    assert launches
    for p, q, m in zip(parameters, *whole):
        assert torch.equal(p, q) and torch.equal(optimizer.state[p]["momentum_buffer"], m)
