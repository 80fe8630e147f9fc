"""How wrong a damped sine may be, whoever computes it, and cases to look for one that is worse.

    |error of y|  <= 2 * 2^-24 (1 + |f z| + |d z|) A e^(-d g(z))  + half an ulp of y + tiny
    |error of dz| <= 6 * 2^-24 (1 + |f z| + |d z|) A (|f| + d) e^(-d g(z)) |dy|  + half an ulp of dz + tiny

The first terms are what a few roundings of f z, d z and the product cost. tiny is 2^-148 times 1 + each of the other factors (A
for y; A, |f| + d, |dy| for dz), as float32 holds a product below 2^-126 only to 2^-149, which factors that follow enlarge.

A kernel that reduces the phase in turns never rounds f z, so up to |f z| = 1e5 it must also keep
|error of y| <= (1e-6 + 2^-23 |d z|) A e^(-d g(z)), half outputs plus one rounding.  Above |f z| = 2^22 float32 knows no phase:
there only NaN, infinities and |y| <= A e^(-d g(z)) are judged.

The gradients of the parameters are sums over rows: each term may be as wrong as dz, and the sum of n terms t may lose
(16 + 2 log2 n) * 2^-24 * sum |t|, what sums in lanes and trees lose; one in a single float32 variable would not pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Callable

import torch
from psann_kernels.damped_sine import MODES
from torch import Tensor
from witness import strided_copies

UNIT = 2.0**-24
TINY = 2.0**-148
PHASE_LIMIT = 2.0**22
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
AXES = (0, 1, 3, 127, 129)
MOST_ELEMENTS = 30_000  # keeps a case within half a second in the interpreter


def half_ulp(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours in `dtype` at each float64 value."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(truth)
    smallest = math.frexp(info.smallest_normal)[1]
    return torch.ldexp(torch.full_like(truth, info.eps / 2), exponent.clamp(min=smallest) - 1)


@dataclass
class Judgement:
    """What float64 gives for one call, and how far from it a result may be."""

    y: Tensor
    dz: Tensor
    parameters: tuple[Tensor, Tensor, Tensor]
    y_allowed: Tensor
    y_allowed_in_turns: Tensor
    dz_allowed: Tensor
    parameters_allowed: tuple[Tensor, Tensor, Tensor]
    envelope: Tensor
    highest: Tensor  # the envelope and what rounding d |x| to float32 adds to it
    is_known: Tensor  # where |f z| is at most 2^22
    is_in_turns: Tensor  # where |f z| is at most 1e5

    def check(self, what: str, y: Tensor, dz: Tensor, *parameters: Tensor, in_turns: bool) -> None:
        """Raise AssertionError for the first element outside the bound."""
        self._compare(f"{what} y", y, self.y, self.y_allowed, self.is_known)
        self._compare(f"{what} dz", dz, self.dz, self.dz_allowed, self.is_known)
        if in_turns:
            self._compare(f"{what} y, reduced in turns", y, self.y, self.y_allowed_in_turns, self.is_in_turns)
        beyond = ~self.is_known & (y.double().abs() > self.highest + half_ulp(self.envelope, y.dtype))
        assert not beyond.any(), f"{what}: |y| exceeds the envelope at {beyond.nonzero()[0].tolist()}"
        columns = self.is_known.flatten(0, -2).all(0) if self.y.dim() > 1 else self.is_known
        for name, got, truth, allowed in zip(
            ("damplitude", "dfrequency", "ddamping"), parameters, self.parameters, self.parameters_allowed
        ):
            self._compare(f"{what} {name}", got, truth, allowed, columns)

    @staticmethod
    def _compare(what: str, got: Tensor, truth: Tensor, allowed: Tensor, where: Tensor) -> None:
        assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
        rounded = truth.to(got.dtype)
        assert torch.equal(got.isnan(), rounded.isnan()) and torch.equal(got.isinf(), rounded.isinf()), (
            f"{what}: NaN or Inf pattern"
        )
        wrong = where & rounded.isfinite() & ~((got.double() - truth).abs() <= allowed)
        if wrong.any():
            place = tuple(wrong.nonzero()[0].tolist())
            error = (got[place].double() - truth[place]).abs().item()
            raise AssertionError(
                f"{what} at {place}: {got[place].item()}, expected {truth[place].item()}; {error:.3e} > {allowed[place].item():.3e}"
            )


def judge(z: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, dy: Tensor, mode: str) -> Judgement:
    """z and dy (..., F) in the dtype under test, the parameters (F,) in float32."""
    x, a, f, d, g = (t.double() for t in (z, amplitude, frequency, damping, dy))
    distance = {"abs": x.abs(), "relu": x.relu(), "none": torch.zeros_like(x)}[mode]
    slope = {"abs": x.sign(), "relu": (x > 0).double(), "none": torch.zeros_like(x)}[mode]
    e = torch.exp(-d * distance)
    sine, cosine = torch.sin(f * x), torch.cos(f * x)
    y = a * e * sine
    dz = g * a * e * (f * cosine - d * slope * sine)
    loss = UNIT * (1 + (f * x).abs() + (d * x).abs()) * e
    terms = (g * e * sine, g * a * e * x * cosine, -g * a * e * distance * sine)
    sizes = (torch.ones_like(x), a.abs() * x.abs(), a.abs() * distance)
    rows = math.prod(z.shape[:-1])
    depth = 16 + 2 * math.log2(max(rows, 1))

    def sum_rows(t: Tensor) -> Tensor:
        return t.reshape(rows, z.shape[-1]).sum(0)

    envelope = a.abs() * e
    steep = f.abs() + d.abs()
    tiny = TINY * (1 + a.abs()) * (1 + g.abs())
    return Judgement(
        y=y,
        dz=dz,
        parameters=tuple(map(sum_rows, terms)),
        y_allowed=2 * loss * a.abs() + half_ulp(y, z.dtype) + TINY * (1 + a.abs()),
        y_allowed_in_turns=(1e-6 + 2 * UNIT * (d * x).abs()) * envelope
        + (z.dtype != torch.float32) * half_ulp(y, z.dtype)
        + TINY * (1 + a.abs()),
        dz_allowed=6 * loss * a.abs() * steep * g.abs() + half_ulp(dz, z.dtype) + tiny * (1 + steep),
        parameters_allowed=tuple(
            sum_rows(6 * loss * size * g.abs() + depth * UNIT * term.abs() + tiny * (1 + x.abs()))
            for size, term in zip(sizes, terms)
        ),
        envelope=envelope,
        highest=envelope * (1 + UNIT * (8 + 2 * (d * x).abs())),
        is_known=(f * x).abs() <= PHASE_LIMIT,
        is_in_turns=(f * x).abs() <= 1e5,
    )


@dataclass
class Case:
    z: Tensor
    parameters: tuple[Tensor, Tensor, Tensor]
    dy: Tensor
    mode: str

    def run(self, function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """y, dz and the gradients of the three parameters, by function(z, amplitude, frequency, damping, mode=mode)."""
        leaves = [t.detach().requires_grad_() for t in (self.z, *self.parameters)]
        y = function(*leaves, mode=self.mode)
        gradients = torch.autograd.grad(y, leaves, self.dy, allow_unused=True)
        return y.detach(), *(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients))

    def judge(self) -> Judgement:
        return judge(self.z, *self.parameters, self.dy, self.mode)


def draw_case(random: Random) -> Case:
    """Any mode, dtype, shape and strides; |f z| anywhere up to 1e8."""
    dtype, mode = random.choice(DTYPES), random.choice(MODES)
    shape = [random.choice(AXES) for _ in range(random.randint(1, 3))]
    if random.random() < 0.2:
        shape[random.randrange(len(shape))] = 1000
    while math.prod(shape) > MOST_ELEMENTS:
        shape[shape.index(max(shape))] = 3
    generator = torch.Generator().manual_seed(random.randrange(2**31))

    def spread(low: float, high: float, *size: int) -> Tensor:
        return 10 ** (low + (high - low) * torch.rand(*size, generator=generator))

    features = shape[-1]
    largest = random.uniform(-1, 8)  # log10 of |f z|
    frequency = spread(random.uniform(-2, 0), random.uniform(0, 3), features)
    signs = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1
    z = (signs * spread(-3, largest, *shape) / frequency).clamp(-6e4, 6e4)
    amplitude = torch.randn(features, generator=generator) * 2
    # Damped by e^-3 at most at the largest |z| in half of the cases, so that something is left to be wrong.
    damping = (
        spread(-4, 0, features) if random.random() < 0.5 else 3 * torch.rand(features, generator=generator) / (1 + 10**largest)
    )
    # Scaled so that float16 holds dz.
    dy = torch.randn(*shape, generator=generator) / (1 + frequency + damping)
    return Case(_strided(random, z.to(dtype)), (amplitude, frequency, damping), _strided(random, dy.to(dtype)), mode)


def _strided(random: Random, t: Tensor) -> Tensor:
    if random.random() < 0.1 and t.dim() > 1 and t.shape[0]:
        return t[:1].expand(t.shape)
    return random.choice(list(strided_copies(t).values()))
