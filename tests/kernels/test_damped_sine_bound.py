"""damped_sine keeps the bound of sine_bound.py: every backend on drawn cases, and the Triton kernel's arithmetic, repeated in
numpy, on many more values than the interpreter could serve."""

import random

import numpy as np
import psann_kernels.triton_support as support
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies
from psann_kernels import damped_sine
from psann_kernels.damped_sine import OP
from sine_bound import draw_case, judge
from witness import BACKENDS

F = np.float32
S0, S1, S2, S3, S4 = (F(getattr(support, f"_S{i}").value) for i in range(5))
HIGH, LOW, ROUNDER, LOG2_E = (F(getattr(support, name).value) for name in ("_TURNS_HIGH", "_TURNS_LOW", "_ROUNDER", "LOG2_E"))


def check(backend, case):
    reason = OP.refusal(backend, case.z, *case.parameters, mode=case.mode)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    result = case.run(lambda *a, mode: damped_sine(*a, mode=mode, backend=backend))
    case.judge().check(f"{backend} {case.mode} {case.z.dtype} {tuple(case.z.shape)}", *result, in_turns=backend != "torch")


@pytest.mark.parametrize("backend", BACKENDS)
def test_drawn_cases_stay_within_the_bound(backend):
    @settings(
        max_examples=12 if backend == "triton" else 60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(strategies.randoms(use_true_random=False))
    def run(source):
        check(backend, draw_case(source))

    run()


@pytest.mark.campaign(weight=3)
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_drawn_cases_stay_within_the_bound(backend, campaign):
    for seed in campaign:
        check(backend, draw_case(random.Random(seed)))


def fma(a, b, c):
    """a * b + c in float32 with one rounding: the product is exact in float64, and the sum is rounded to odd there, so that
    rounding it once more to float32 changes nothing."""
    product, c = a.astype(np.float64) * b.astype(np.float64), np.broadcast_to(c, np.broadcast(a, b, c).shape).astype(np.float64)
    total = product + c
    back = total - product
    rest = (product - (total - back)) + (c - back)
    is_even = (total.view(np.int64) & 1) == 0
    with np.errstate(invalid="ignore"):
        total = np.where(
            (rest != 0) & is_even & np.isfinite(total), np.nextafter(total, np.where(rest > 0, np.inf, -np.inf)), total
        )
    return total.astype(F)


def emulate(z, amplitude, frequency, damping):
    """y and dz / dy of the float32 kernels, mode "abs", operation by operation."""
    high = frequency * HIGH
    low = fma(frequency, LOW, fma(frequency, HIGH, -high))
    n = fma(z, high, ROUNDER) - ROUNDER
    r = np.clip(fma(z, low, fma(z, high, n * F(-1))), F(-0.65), F(0.65))

    def sine_of_quarter(r):
        u = r * r
        return r * fma(u, fma(u, fma(u, fma(u, S4, S3), S2), S1), S0)

    sine = sine_of_quarter(np.where(r > F(0.25), F(0.5) - r, np.where(r < F(-0.25), F(-0.5) - r, r)))
    cosine = sine_of_quarter(F(0.25) - np.abs(r))
    e = np.exp2(-damping * LOG2_E * np.abs(z))
    ps = e * sine
    dz = amplitude * frequency * (e * cosine) - amplitude * damping * np.where(z < 0, -ps, ps)
    return amplitude * e * sine, dz


def drawn_values(seed, count):
    """z, amplitude, frequency, damping, one of each to a value: |f z| up to 1e5, half of it near quarters of a turn, where sines
    and cosines are smallest beside their error."""
    g = np.random.default_rng(seed)
    frequency = F(10) ** g.uniform(-2, 3, count).astype(F)
    phase = 10 ** g.uniform(-3, 5, count)
    phase = np.where(g.random(count) < 0.5, phase, np.rint(phase / (np.pi / 2)) * (np.pi / 2))
    z = (phase * g.choice([-1, 1], count) / frequency).astype(F)
    return z, g.normal(0, 2, count).astype(F), frequency, (g.uniform(0, 3, count) / (1e-3 + np.abs(z))).astype(F)


def check_emulation(seed, count):
    z, amplitude, frequency, damping = drawn_values(seed, count)
    y, dz = emulate(z, amplitude, frequency, damping)
    tensors = [torch.from_numpy(t)[None] for t in (z, amplitude, frequency, damping)]
    judgement = judge(tensors[0], *(t[0] for t in tensors[1:]), torch.ones(1, count), "abs")
    is_near = judgement.is_in_turns
    for what, got, truth, allowed in (
        ("y", y, judgement.y, judgement.y_allowed),
        ("y, reduced in turns", y, judgement.y, judgement.y_allowed_in_turns),
        ("dz", dz, judgement.dz, judgement.dz_allowed),
    ):
        judgement._compare(f"emulation, {what}", torch.from_numpy(got)[None], truth, allowed, is_near)
    return ((torch.from_numpy(y)[None].double() - judgement.y).abs() / judgement.envelope)[is_near].max().item()


def test_the_emulation_is_the_kernel():
    z, amplitude, frequency, damping = (torch.from_numpy(t) for t in drawn_values(1, 640))
    leaf = z.view(1, -1).requires_grad_()
    y = damped_sine(leaf, amplitude, frequency, damping, backend="triton")
    (dz,) = torch.autograd.grad(y.sum(), leaf)
    emulated_y, emulated_dz = emulate(*(t.numpy() for t in (z, amplitude, frequency, damping)))
    assert np.array_equal(y.detach().numpy()[0], emulated_y)
    assert np.array_equal(dz.numpy()[0], emulated_dz)


def test_the_emulation_stays_within_the_bound():
    assert check_emulation(0, 300_000) > 1e-8, "no error at all: this compares the truth with itself"


@pytest.mark.campaign
def test_many_emulated_values_stay_within_the_bound(campaign):
    for seed in campaign:
        check_emulation(seed, 300_000)


def test_zero_keeps_its_sign_at_every_frequency():
    frequency = torch.cat([torch.linspace(0.01, 50, 500), torch.linspace(-50, -0.01, 500)])
    z = torch.tensor([0.0, -0.0])[:, None].expand(2, 1000)
    y = damped_sine(z, torch.ones(1000), frequency, 0.1 * torch.ones(1000), backend="triton")
    assert (y == 0).all() and torch.equal(torch.signbit(y), torch.signbit(z) ^ (frequency < 0))
