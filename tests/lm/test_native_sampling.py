"""The native kernel that draws tokens: what plain torch draws, a row what it draws alone, nothing else touched,
NaN left to torch."""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

import pytest
import torch
from psann_fast.generate import sampling
from psann_fast.generate.sampling import SamplingBatch, SamplingParams, next_tokens
from psann_kernels import native
from test_sampling import check_against_oracle, random_case

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from guard_pages import Guard  # noqa: E402

pytestmark = pytest.mark.skipif(native.NATIVE is None, reason=native.WHY_NOT)

SIZES = (1, 7, 8, 15, 33, 257, 4096, 5003)


def params_of(choose: random.Random, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=choose.choice((0, 1e-9, 0.01, 0.3, 1.0, 2.5, 100.0)),
        top_k=choose.choice((None, 1, 2, 40, 10000)),
        top_p=choose.choice((None, 1.0, 1e-9, 0.5, 0.9, choose.uniform(0.01, 1))),
        min_p=choose.choice((None, 0.0, 0.05, 1.0)),
        seed=seed,
    )


def case(seed: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[SamplingParams], torch.Tensor]:
    """Rows that are flat, one-sided, tied, or have tokens that cannot be drawn."""
    choose, g = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = 24
    logits = torch.randn(rows, vocabulary, generator=g, dtype=dtype)
    logits *= torch.tensor([choose.choice((0.0, 0.1, 1.0, 5.0, 50.0)) for _ in range(rows)]).unsqueeze(1)
    logits[::4] = logits[::4].round()
    logits[1::4] = logits[1::4].masked_fill(torch.rand(len(logits[1::4]), vocabulary, generator=g) < 0.5, -torch.inf)
    logits[1::4, vocabulary // 2] = 0.5
    logits[2, 0] = -1e30
    return logits, [params_of(choose, row) for row in range(rows)], torch.arange(rows) + 1000 * seed


def drawn(logits: torch.Tensor, params: list[SamplingParams], positions: torch.Tensor) -> torch.Tensor:
    return next_tokens(logits, SamplingBatch.of(params, logits.shape[1], torch.device("cpu")), positions)


@pytest.mark.parametrize("isa", native.instruction_sets(native.NATIVE) if native.NATIVE is not None else [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_it_draws_what_torch_draws(monkeypatch, dtype, isa):
    held, different = native.NATIVE.isa(), 0
    for seed, vocabulary in itertools.product(range(3), SIZES):
        given = case(seed, vocabulary, dtype)
        try:
            assert native.NATIVE.use_isa(isa)
            found = drawn(*given)
        finally:
            native.NATIVE.use_isa(held)
        with monkeypatch.context() as plain:
            plain.setattr(sampling, "NATIVE", None)
            assert torch.equal(found, drawn(*given)), (seed, vocabulary)
        different += len(set(found.tolist())) > 1
    assert different > 2 * len(SIZES)


def test_a_row_draws_what_it_draws_alone():
    for seed, threads in itertools.product(range(3), (1, 3)):
        logits, params, positions = case(seed, 4096, torch.float32)
        held = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            together = drawn(logits, params, positions)
        finally:
            torch.set_num_threads(held)
        for row in range(len(logits)):
            alone = drawn(logits[row : row + 1], params[row : row + 1], positions[row : row + 1])
            assert alone.item() == together[row].item()


def test_torch_alone_has_the_oracles_supports_and_intervals(monkeypatch):
    monkeypatch.setattr(sampling, "NATIVE", None)
    for seed in range(100):
        check_against_oracle(monkeypatch, *random_case(seed))


def test_what_is_no_number_is_left_to_torch(monkeypatch):
    params = [SamplingParams(temperature=t, seed=1) for t in (1.0, 0.0)]
    for value in (torch.nan, torch.inf, -torch.inf):
        for vocabulary in (3, 40):
            logits = torch.zeros(2, vocabulary)
            logits[0] = value
            logits[1, 2] = value
            found = drawn(logits, params, torch.zeros(2, dtype=torch.int64))
            with monkeypatch.context() as plain:
                plain.setattr(sampling, "NATIVE", None)
                assert torch.equal(found, drawn(logits, params, torch.zeros(2, dtype=torch.int64))), (value, vocabulary)


def test_rows_may_lie_anywhere():
    logits, params, positions = case(0, 257, torch.float32)
    expected = drawn(logits, params, positions)
    wide = torch.full((24, 300), torch.nan)
    wide[:, 5:262] = logits
    assert torch.equal(drawn(wide[:, 5:262], params, positions), expected)
    assert torch.equal(drawn(logits.t().contiguous().t(), params, positions), expected)


def test_nothing_beside_the_arguments_is_touched():
    """A stray access ends the process: the logits lie against an unreadable page."""
    choose = random.Random(0)
    for seed, vocabulary in itertools.product(range(4), SIZES):
        logits, params, positions = case(seed, vocabulary, choose.choice((torch.float32, torch.float64)))
        expected = drawn(logits, params, positions)
        with Guard(choose, False) as guard:
            placed = guard.place(logits)
            assert torch.equal(drawn(placed, params, positions), expected)
