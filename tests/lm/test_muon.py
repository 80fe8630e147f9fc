"""Muon beside torch's, which works matrix by matrix in bfloat16, and beside what orthogonal means."""

from __future__ import annotations

import math

import pytest
import torch
from psann_fast.train import muon
from psann_fast.train.muon import Muon, orthogonal
from torch import nn

SHAPES = [(8, 8), (8, 24), (24, 8), (8, 24), (1, 5), (8, 8)]


def drawn(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(*shape, dtype=dtype)) for shape in SHAPES]


def copied(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in parameters]


# Newton and Schulz's own: slow from afar, but it ends at 1 exactly, as ours and torch's few rounds do not.
CONVERGENT = (1.875, -1.25, 0.375)


@pytest.mark.parametrize("at_once", [1 << 26, 200])
def test_steps_are_those_of_torch_once_both_go_on_to_the_orthogonal_matrix(at_once, monkeypatch):
    monkeypatch.setattr(muon, "MOST_AT_ONCE", at_once)
    monkeypatch.setattr(muon, "QUINTICS", (*muon.QUINTICS, *[CONVERGENT] * 8))
    torch.manual_seed(0)
    ours = drawn()
    start, theirs = copied(ours), copied(ours)
    optimizers = (
        Muon(ours, lr=0.02, weight_decay=0.3),
        torch.optim.Muon(
            theirs, lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw", ns_coefficients=CONVERGENT, ns_steps=20
        ),
    )
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, before in zip(ours, theirs, start):
        moved = (q - before).norm()
        assert (p - q).norm() < 0.03 * moved, f"{tuple(p.shape)}: beyond what torch's bfloat16 explains"
        torch.testing.assert_close(optimizers[0].state[p]["momentum_buffer"], optimizers[1].state[q]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(5, 6, 6), (1, 4, 32), (3, 40, 7)])
def test_orthogonal_keeps_the_singular_vectors_and_evens_the_values(shape):
    torch.manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(*shape, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, -1.9, u.shape[-1], dtype=torch.float64)  # the bound of the docstring is up to 1.1 here
    for scale in (1e-4, 1.0, 1e6):
        even = u.mT @ orthogonal(scale * (u * values) @ v) @ v.mT
        diagonal = torch.diagonal(even, dim1=-2, dim2=-1)
        assert diagonal.min() > 0.7 and diagonal.max() < 1.3
        torch.testing.assert_close(even, torch.diag_embed(diagonal), rtol=0, atol=1e-9)


def test_what_the_rounding_of_float32s_quick_way_moves_stays_within_the_quintics():
    """On a machine that computes in bfloat16. A value beyond a quintic's interval would be thrown far out."""
    torch.manual_seed(3)
    u, _, v = torch.linalg.svd(torch.randn(16, 16, 16))
    for least in (-6.0, -40.0):  # gradients in few directions, where the bound is nearest to the largest value
        even = orthogonal((u * torch.logspace(0, least, 16)) @ v).float()
        assert torch.linalg.svdvals(even).max() < 1.3
        assert (u[..., :1].mT @ even @ v[..., :1, :].mT).min() > 0.7


def test_a_matrix_of_zeros_does_not_move():
    p = nn.Parameter(torch.ones(4, 6))
    p.grad = torch.zeros_like(p)
    Muon([p], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(p.detach(), torch.full((4, 6), 0.95))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_step_is_taken_where_the_flag_is_set(bad, monkeypatch):
    monkeypatch.setattr(muon, "serves_lists", lambda *lists: False)  # the flag asks for torch's step, which rounds elsewhere
    torch.manual_seed(2)
    parameters, told = drawn(), None
    optimizer = Muon(parameters, lr=0.1, weight_decay=0.5)
    plain = copied(parameters)
    other = Muon(plain, lr=0.1, weight_decay=0.5)
    for is_bad in (False, True, False):
        for p, q in zip(parameters, plain):
            p.grad = torch.full_like(p, bad) if is_bad else torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.found_inf = torch.tensor(float(is_bad))
        optimizer.step()
        if not is_bad:
            other.step()
        for p, q in zip(parameters, plain):
            told = optimizer.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"]
            torch.testing.assert_close((p.detach(), told[0]), (q.detach(), told[1]))


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"one has the shape \(3,\); Muon takes matrices only"):
        Muon([nn.Parameter(torch.ones(3))], lr=0.1, weight_decay=0.0)
