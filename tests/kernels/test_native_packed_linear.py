"""packed_linear: against float64 over awkward shapes, the same bits for a row alone, before unreadable pages,
and errors by name."""

import random

import pytest
import torch
from guard_pages import Guard
from psann_kernels import native
from psann_kernels.linear import quantize, reference
from psann_kernels.packed_linear import PANEL, pack, packed_linear
from witness import FORWARD, Budget, poisoned_allocations, strided_copies

pytestmark = pytest.mark.skipif(native.NATIVE is None, reason=native.WHY_NOT)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WEIGHTS = [*DTYPES, torch.int8]


def draw(rows, inputs, outputs, dtype, weight_dtype, seed=0):
    g = torch.Generator().manual_seed(seed + rows + 100 * inputs)
    x, weight, bias = (torch.randn(*shape, generator=g) for shape in ((rows, inputs), (outputs, inputs), (outputs,)))
    weight, scale = quantize(weight) if weight_dtype == torch.int8 else (weight.to(weight_dtype), None)
    return x.to(dtype), weight, scale, bias


def shapes():
    """(rows, inputs, outputs): every number of rows to 70, with sizes below, at and beside those of tiles, panels and blocks."""
    choose = random.Random(0)
    for rows in (*range(1, 71), 119, 121, 250):
        yield rows, choose.choice((1, 2, 3, 5, 31, 64, 255, 256, 257, 515)), choose.choice((1, 7, 15, 16, 17, 33, 64, 65, 130))
    yield 2401, 3, 18  # whose last chunk is a single row


def test_the_panel_is_the_kernels():
    assert PANEL == native.NATIVE.packed_linear_panel


@pytest.mark.parametrize("weight_dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype, weight_dtype):
    budget = Budget("packed_linear", FORWARD)
    for shape in shapes():
        x, weight, scale, bias = draw(*shape, dtype, weight_dtype)
        with poisoned_allocations():
            fast = packed_linear(x, pack(weight), len(weight), scale=scale, bias=bias)
        working = x @ weight.to(dtype).t()
        working = (working if scale is None else working * scale.to(dtype)) + bias.to(dtype)
        wide = weight if weight_dtype == torch.int8 else weight.double()
        truth = reference(x.double(), wide, scale=None if scale is None else scale.double(), bias=bias.double())
        budget.add(fast, working, truth)
    budget.check()


@pytest.mark.parametrize("weight_dtype", WEIGHTS, ids=str)
def test_a_row_gets_the_same_bits_alone(weight_dtype):
    x, weight, scale, bias = draw(130, 530, 70, torch.float32, weight_dtype)
    packed = pack(weight)
    together = packed_linear(x, packed, 70, scale=scale, bias=bias)
    for count in (1, 2, 3, 8, 9, 31):
        for first in (0, 130 - count):
            some = packed_linear(x[first : first + count], packed, 70, scale=scale, bias=bias)
            assert torch.equal(some, together[first : first + count]), (count, first)


@pytest.mark.parametrize("isa", native.instruction_sets(native.NATIVE) if native.NATIVE is not None else [])
@pytest.mark.parametrize("threads", [1, 3])
def test_neither_threads_nor_instructions_matter_beyond_rounding(isa, threads):
    x, weight, _, bias = draw(27, 300, 150, torch.float32, torch.bfloat16)
    expected, before, held = packed_linear(x, pack(weight), 150, bias=bias), native.NATIVE.isa(), torch.get_num_threads()
    try:
        assert native.NATIVE.use_isa(isa)
        torch.set_num_threads(threads)
        found = packed_linear(x, pack(weight), 150, bias=bias)
    finally:
        native.NATIVE.use_isa(before)
        torch.set_num_threads(held)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert isa != before or torch.equal(found, expected)


def test_nan_and_infinity_stay_in_their_row_and_output():
    x, weight, _, bias = draw(20, 40, 33, torch.float32, torch.float32)
    expected = packed_linear(x, pack(weight), 33, bias=bias)
    x[3, 5], x[11, 0] = torch.nan, torch.inf
    weight[7, 39] = torch.nan
    found = packed_linear(x, pack(weight), 33, bias=bias)
    assert found[3].isnan().all() and found[:, 7].isnan().all()
    others = [n for n in range(33) if n != 7]
    assert torch.equal(found[11, others], weight[others, 0] * torch.inf)
    rows = [r for r in range(20) if r not in (3, 11)]
    assert torch.equal(found[rows][:, others], expected[rows][:, others])


def test_memory_layout_and_empty_sizes():
    x, weight, _, bias = draw(12, 33, 18, torch.float32, torch.float32)
    packed = pack(weight)
    expected = packed_linear(x, packed, 18, bias=bias)
    for copy in strided_copies(x).values():
        assert torch.equal(packed_linear(copy, packed, 18, bias=bias), expected)
    assert torch.equal(packed_linear(x.view(3, 4, 33), packed, 18, bias=bias), expected.view(3, 4, 18))
    assert packed_linear(x[:0], packed, 18).shape == (0, 18)
    assert packed_linear(x, pack(weight[:0]), 0).shape == (12, 0)
    assert torch.equal(packed_linear(x[:, :0], pack(weight[:, :0]), 18, bias=bias), bias.expand(12, 18))


def test_nothing_beside_the_arguments_is_touched():
    """A stray access ends the process: each tensor lies against an unreadable page."""
    choose = random.Random(0)
    for rows, inputs, outputs in shapes():
        dtype, weight_dtype = choose.choice(DTYPES), choose.choice(WEIGHTS)
        x, weight, scale, bias = draw(rows, inputs, outputs, dtype, weight_dtype)
        with Guard(choose, False) as guard:
            x, packed, bias = guard.place(x), guard.place(pack(weight)), guard.place(bias)
            scale = None if scale is None else guard.place(scale)
            with guard.allocations():
                y = packed_linear(x, packed, outputs, scale=scale, bias=bias)
            assert y.isfinite().all()


@pytest.mark.parametrize("change, message", [
    (dict(x=torch.ones(2, 5)), r"packed has shape \(2, 4, 16\).* with x \(2, 5\) and 20 outputs it must be \(2, 5, 16\)"),
    (dict(x=torch.ones(2, 4).double()), "x has shape .* torch.float64"),
    (dict(outputs=33), r"it must be \(3, 4, 16\)"),
    (dict(packed=torch.ones(2, 4, 16, dtype=torch.int8)), "scale is missing; an int8 weight has one scale per output"),
    (dict(scale=torch.ones(20)), "scale is given"),
    (dict(bias=torch.ones(21)), r"bias is torch.float32 \(21,\)"),
    (dict(bias=torch.ones(20).bfloat16()), r"bias is torch.bfloat16"),
    (dict(x=torch.ones(2, 4, requires_grad=True)), "it has no derivative"),
])  # fmt: skip
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=f"packed_linear: .*{message}"):
        packed_linear(**{"x": torch.ones(2, 4), "packed": torch.ones(2, 4, 16), "outputs": 20, **change})


def test_what_cannot_be_packed():
    with pytest.raises(ValueError, match=r"pack: weight has shape \(4,\)"):
        pack(torch.ones(4))
    with pytest.raises(ValueError, match="pack: .*torch.int64"):
        pack(torch.ones(4, 4).long())
