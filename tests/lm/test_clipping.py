"""The norm of all gradients together, natively and by torch."""

import math
import random
import sys
from pathlib import Path

import pytest
import torch
from psann_fast.train import clipping
from psann_fast.train.clipping import clip
from psann_kernels import native
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from guard_pages import SIZES, Guard  # noqa: E402

SHAPES = ((), (1,), (0, 3), (7, 5), (130, 64), (3, 8192), (70000,), (1,))


def gradients(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) * 10 ** (seed - 1) for shape in SHAPES]


def total_norm(tensors, most=math.inf):
    """What clip says of these gradients, which it leaves as they are unless the norm is above `most`."""
    parameters = [nn.Parameter(torch.zeros_like(t)) for t in tensors]
    for parameter, tensor in zip(parameters, tensors):
        parameter.grad = tensor
    return clip(parameters, most)


@pytest.fixture(params=["native", "torch"])
def way(request, monkeypatch):
    """Whether the kernel or torch adds up."""
    if request.param == "torch":
        monkeypatch.setattr(clipping, "serves_lists", lambda *lists: False)
    elif native.NATIVE is None:
        pytest.skip(f"native: {native.WHY_NOT}")
    return request.param


def test_against_float64(way):
    for seed in range(3):
        tensors = gradients(seed)
        truth = math.sqrt(sum(t.double().square().sum().item() for t in tensors))
        norm = total_norm(tensors)
        assert norm.shape == () and norm.dtype == torch.float32
        assert abs(norm.item() - truth) <= 1e-6 * truth
    assert total_norm([torch.zeros(3), torch.zeros(2, 2)]) == 0 and total_norm([]) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", range(3, len(SHAPES)))
def test_one_number_that_is_none(way, place, value):
    tensors = gradients()
    tensors[place].view(-1)[-1] = value
    norm = total_norm(tensors).item()
    assert math.isnan(norm) if math.isnan(value) else norm == math.inf


def test_other_tensors_are_torchs():
    tensors = gradients()
    for other in (tensors[3].double(), tensors[3].t(), tensors[3].bfloat16()):
        expected = nn.utils.get_total_norm([*tensors, other])
        torch.testing.assert_close(total_norm([*tensors, other]), expected, rtol=1e-6, atol=0)


def test_the_same_bits_for_any_number_of_threads():
    tensors, threads, found = gradients(), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(total_norm(tensors).item())
    finally:
        torch.set_num_threads(threads)
    if native.NATIVE is not None:
        assert len(set(found)) == 1


def test_clipping_scales_to_the_norm(way):
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    for most in (0.5, 1e9):
        given = gradients(1)
        for parameter, gradient in zip(parameters, given):
            parameter.grad = gradient.clone()
        versions = [parameter.grad._version for parameter in parameters]
        norm = clip(parameters, most)
        factor = (most / (norm + 1e-6)).clamp(max=1.0)
        for parameter, gradient, version in zip(parameters, given, versions):
            torch.testing.assert_close(parameter.grad, gradient * factor, rtol=0, atol=0)
            assert (parameter.grad._version > version) == (most < norm.item()), "autograd must see what was overwritten"


@pytest.mark.skipif(native.NATIVE is None, reason=native.WHY_NOT)
@pytest.mark.parametrize("isa", native.instruction_sets(native.NATIVE) if native.NATIVE is not None else [])
def test_the_kernels_stay_inside_their_tensors(isa):
    held = native.NATIVE.isa()
    assert native.NATIVE.use_isa(isa)
    try:
        for seed in range(20):
            choose = random.Random(seed)
            with Guard(choose, is_far=False) as guard:
                tensors = [guard.place(torch.randn(choose.choice(SIZES))) for _ in range(3)]
                truth, before = math.sqrt(sum(t.double().square().sum().item() for t in tensors)), [t.clone() for t in tensors]
                norm = total_norm(tensors, truth / 2)
                assert abs(norm.item() - truth) <= 1e-6 * truth
                for t, b in zip(tensors, before):
                    torch.testing.assert_close(t, b / 2, rtol=1e-5, atol=0)
    finally:
        native.NATIVE.use_isa(held)
