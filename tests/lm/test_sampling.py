"""Which token comes next: exact supports and intervals against an oracle in plain Python, frequencies, refusals."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from psann_fast.generate import sampling
from psann_fast.generate.sampling import SamplingBatch, SamplingParams, next_tokens, uniform

ALL = dict(top_p=None)  # every filter off


def oracle(logits: list[float], params: SamplingParams, seen: set[int] = frozenset()) -> list[tuple[int, float]]:
    """(token, probability) of all tokens that can be drawn, in the order of their intervals."""
    penalty = params.repetition_penalty or 1.0
    logits = [(x / penalty if x > 0 else x * penalty) if i in seen else x for i, x in enumerate(logits)]
    highest = max(logits)
    if params.temperature == 0:
        return [(logits.index(highest), 1.0)]
    weights = [math.exp((x - highest) / params.temperature) for x in logits]
    kept = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: params.top_k]
    total = math.fsum(weights[i] for i in kept)
    if params.top_p is not None:
        reached, count = 0.0, 0
        while count < len(kept) and reached < params.top_p:
            reached += weights[kept[count]] / total
            count += 1
        kept = kept[:count]
    kept = [i for i in kept if weights[i] >= (params.min_p or 0.0) * weights[kept[0]]]
    total = math.fsum(weights[i] for i in kept)
    return [(i, weights[i] / total) for i in kept if weights[i] > 0]


def draw(monkeypatch, logits, params, points, seen=()):
    """What next_tokens takes where the uniform draw is each of `points`."""
    rows = len(points)
    monkeypatch.setattr(sampling, "uniform", lambda seeds, positions: torch.tensor(points, dtype=torch.float64))
    is_seen = torch.zeros(rows, len(logits), dtype=torch.bool)
    is_seen[:, list(seen)] = True
    batch = SamplingBatch.of([params] * rows, len(logits), torch.device("cpu"))
    return next_tokens(
        torch.tensor([logits] * rows, dtype=torch.float64), batch, torch.zeros(rows, dtype=torch.int64), is_seen
    ).tolist()


def check_against_oracle(monkeypatch, logits, params, seen=()):
    """Every token that can be drawn is drawn in the middle of its interval and near both its ends; nothing else ever is."""
    expected = oracle(logits, params, set(seen))
    points, wanted, edge = [], [], 0.0
    for token, probability in expected:
        if probability > 1e-9:
            points += [edge + probability * place for place in (1e-3, 0.5, 1 - 1e-3)]
            wanted += [token] * 3
        edge += probability
    assert draw(monkeypatch, logits, params, points, seen) == wanted
    last = [token for token, probability in expected][-1]
    first, final = draw(monkeypatch, logits, params, [0.0, 1 - 2.0**-53], seen)
    assert first == expected[0][0] and (final == last or expected[-1][1] < 1e-9)


def params_of(**options) -> SamplingParams:
    return SamplingParams(**{**ALL, "seed": 0, **options})


def random_case(seed: int):
    choose = random.Random(seed)
    size = choose.choice((1, 2, 3, 17, 64, 257))
    # Whole numbers make ties; the spread reaches from flat to one-sided.
    spread = choose.choice((0.1, 1.0, 5.0, 20.0))
    logits = [choose.choice((choose.gauss(0, spread), float(choose.randint(-3, 3)))) for _ in range(size)]
    params = params_of(
        temperature=choose.choice((0, 0.3, 1.0, 2.5)),
        top_k=choose.choice((None, 1, 2, 5, size, size + 9)),
        top_p=choose.choice((None, 1.0, 1e-9, 0.5, 0.9, choose.uniform(0.01, 1))),
        min_p=choose.choice((None, 0.0, 0.05, 0.5, 1.0)),
        repetition_penalty=choose.choice((None, 1.0, 1.3, 0.7)),
    )
    return logits, params, choose.sample(range(size), choose.randrange(size + 1))


def test_random_distributions_have_the_oracles_supports_and_intervals(monkeypatch):
    for seed in range(300):
        check_against_oracle(monkeypatch, *random_case(seed))


@pytest.mark.campaign(weight=0.3)
def test_supports_of_random_distributions(campaign, monkeypatch):
    for seed in campaign:
        check_against_oracle(monkeypatch, *random_case(seed))


def support(monkeypatch, logits, **options) -> list[int]:
    """All tokens that can be drawn, ascending."""
    points = [(i + 0.5) / 4096 for i in range(4096)]
    return sorted(set(draw(monkeypatch, logits, params_of(**options), points)))


def logs(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


def test_top_p_keeps_the_token_that_crosses(monkeypatch):
    logits = logs(0.125, 0.5, 0.125, 0.25)
    for top_p, expected in (
        (0.4, [1]),
        (0.51, [1, 3]),
        (0.74, [1, 3]),
        (0.76, [0, 1, 3]),
        (0.88, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ):
        assert support(monkeypatch, logits, top_p=top_p) == expected, top_p
    assert support(monkeypatch, logits, top_p=1e-12) == [1]


def test_ties_go_to_the_lowest_id(monkeypatch):
    flat = [0.0] * 67
    assert support(monkeypatch, flat, top_k=3) == [0, 1, 2]
    assert support(monkeypatch, flat, top_p=2.5 / 67) == [0, 1, 2]
    assert support(monkeypatch, [1.0, 2.0, 2.0, 0.0, 2.0], top_k=2) == [1, 2]
    assert support(monkeypatch, [1.0, 2.0, 2.0, 0.0, 2.0], temperature=0) == [1]


def test_top_k_comes_before_top_p(monkeypatch):
    # Among the first two alone, the likeliest has 5/9 = 0.56 and reaches p; among all it has 0.5 and would not.
    logits = logs(0.5, 0.4, 0.1)
    assert support(monkeypatch, logits, top_k=2, top_p=0.53) == [0]
    assert support(monkeypatch, logits, top_p=0.53) == [0, 1]


def test_min_p_is_a_fraction_of_the_likeliest(monkeypatch):
    logits = logs(0.6, 0.25, 0.1, 0.05)
    assert support(monkeypatch, logits, min_p=0.4) == [0, 1]
    assert support(monkeypatch, logits, min_p=0.15) == [0, 1, 2]
    assert support(monkeypatch, logits, min_p=1.0) == [0]
    assert support(monkeypatch, logits, min_p=0.0) == [0, 1, 2, 3]


def test_temperature_comes_before_the_filters(monkeypatch):
    logits = logs(0.6, 0.3, 0.1)
    assert support(monkeypatch, logits, top_p=0.65) == [0, 1]
    assert support(monkeypatch, logits, temperature=0.25, top_p=0.65) == [0]
    assert support(monkeypatch, logits, temperature=10.0, top_p=0.9) == [0, 1, 2]


def test_the_repetition_penalty_lowers_what_was_seen_whatever_its_sign(monkeypatch):
    # 2 / 1.5 = 1.33 falls below 1.5, and -1 * 1.5 below -1.2.
    assert draw(monkeypatch, [2.0, 1.5], params_of(temperature=0, repetition_penalty=1.5), [0.5], seen=[0]) == [1]
    assert draw(monkeypatch, [2.0, 1.5], params_of(temperature=0, repetition_penalty=1.5), [0.5]) == [0]
    assert draw(monkeypatch, [-1.0, -1.2], params_of(temperature=0, repetition_penalty=1.5), [0.5], seen=[0]) == [1]
    assert draw(monkeypatch, [1.0, 1.2], params_of(temperature=0, repetition_penalty=0.5), [0.5], seen=[0]) == [0]


def test_an_interval_has_its_lower_end_and_not_its_upper(monkeypatch):
    assert draw(monkeypatch, [0.0] * 4, params_of(), [0.0, 0.25, 0.5, 0.75]) == [0, 1, 2, 3]


def test_minus_infinity_is_never_drawn(monkeypatch):
    assert support(monkeypatch, [0.0, -math.inf, 1.0, -math.inf]) == [0, 2]
    assert support(monkeypatch, [-math.inf, -5.0, -math.inf], temperature=0) == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_rows_of_a_batch_keep_their_own_parameters(dtype):
    rows = [
        params_of(temperature=0),
        params_of(top_k=1),
        params_of(top_p=0.2, seed=3),
        params_of(temperature=5.0, seed=4),
        params_of(min_p=0.3, seed=5),
        params_of(repetition_penalty=2.0, temperature=0),
        params_of(seed=6),
    ]
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(len(rows), 50, generator=generator)).to(dtype)
    seen = torch.rand(len(rows), 50, generator=generator) < 0.5
    for position in range(40):
        positions = torch.full((len(rows),), position)
        batch = SamplingBatch.of(rows, 50, torch.device("cpu"))
        alone = [
            next_tokens(logits[i : i + 1], SamplingBatch.of([row], 50, torch.device("cpu")), positions[:1], seen[i : i + 1]).item()
            for i, row in enumerate(rows)
        ]
        assert next_tokens(logits, batch, positions, seen).tolist() == alone


# -- frequencies ----------------------------------------------------------------------------------------------------------------


def p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Of a chi-square test; cells that expect fewer than 10 are put together."""
    expected = probabilities * counts.sum()
    rare = expected < 10
    if rare.any():
        counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
        expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
        if expected[-1] == 0:
            assert counts[-1] == 0
            counts, expected = counts[:-1], expected[:-1]
    if len(expected) == 1:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected).sum()
    half = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(half, statistic.double() / 2).item()


def frequencies_fit(case: int, draws: int) -> float:
    """p of one random distribution, drawn at one seed and rising positions: what one request does."""
    logits, params, _ = random_case(case)
    params = SamplingParams(
        temperature=params.temperature or 1.0, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p, seed=case % (1 << 62)
    )
    probabilities = torch.zeros(len(logits), dtype=torch.float64)
    for token, probability in oracle(logits, params):
        probabilities[token] = probability
    counts = torch.zeros(len(logits))
    for begin in range(0, draws, 5000):
        positions = torch.arange(begin, min(begin + 5000, draws))
        batch = SamplingBatch.of([params] * len(positions), len(logits), torch.device("cpu"))
        drawn = next_tokens(torch.tensor([logits], dtype=torch.float64).expand(len(positions), -1), batch, positions)
        counts += torch.bincount(drawn, minlength=len(logits))
    return p_value(counts, probabilities)


def test_frequencies_of_draws():
    cases = range(40, 60)
    p = {case: frequencies_fit(case, 5000) for case in cases}
    assert min(p.values()) > 0.01 / len(p), p  # Bonferroni


def test_the_chi_square_test_finds_a_wrong_distribution():
    probabilities = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    assert p_value(torch.tensor([2500.0, 1500.0, 1000.0]), probabilities) > 0.99
    assert p_value(torch.tensor([2600.0, 1450.0, 950.0]), probabilities) < 0.02
    # The 5 % point of chi-square with 2 degrees of freedom is 5.991.
    off = math.sqrt(5.991 / (1 / 2500 + 1 / 1500))
    assert p_value(torch.tensor([2500 + off, 1500 - off, 1000.0]), probabilities) == pytest.approx(0.05, abs=1e-3)


@pytest.mark.campaign(weight=1)
def test_frequencies_of_many_distributions(campaign):
    # 200 distributions are what RELIABILITY counts; more than that in a long campaign make 1e-7 a likely draw of none.
    for seed in campaign:
        p = frequencies_fit(seed, 100_000)
        assert p > 1e-7, f"p is {p}"


# -- the uniform draw -----------------------------------------------------------------------------------------------------------


def splitmix(seed: int, position: int) -> float:
    """The same in whole numbers."""
    mask = (1 << 64) - 1

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
        return x ^ x >> 31

    return (mix((mix(seed) + position) & mask) >> 11) * 2.0**-53


def test_the_uniform_draw_is_splitmix():
    seeds = [0, 1, 2, 12345, (1 << 63) - 1, 1 << 62]
    pairs = [(seed, position) for seed in seeds for position in (0, 1, 2, 255, 100_000)]
    drawn = uniform(torch.tensor([s for s, _ in pairs]), torch.tensor([p for _, p in pairs]))
    assert drawn.tolist() == [splitmix(*pair) for pair in pairs]


def test_uniform_draws_of_neighbours_are_unrelated():
    by_position = uniform(torch.zeros(1 << 14, dtype=torch.int64) + 7, torch.arange(1 << 14))
    by_seed = uniform(torch.arange(1 << 14), torch.zeros(1 << 14, dtype=torch.int64) + 7)
    for draws in (by_position, by_seed):
        assert 0 <= draws.min() and draws.max() < 1
        assert p_value(torch.histc(draws.float(), 64, 0, 1), torch.full((64,), 1 / 64, dtype=torch.float64)) > 1e-3
        for lag in (1, 2, 16):
            pair = torch.corrcoef(torch.stack((draws[lag:], draws[:-lag])))[0, 1]
            assert abs(pair) < 4 / math.sqrt(1 << 14)
    assert abs(torch.corrcoef(torch.stack((by_position, by_seed)))[0, 1]) < 4 / math.sqrt(1 << 14)


# -- values out of range --------------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
OUT_OF_RANGE = {
    "max_new_tokens": [0, -1, 1.5, True, "3", None],
    "temperature": [-0.1, NAN, INF, "1", None, True],
    "top_k": [0, -1, 1.5, True, "3"],
    "top_p": [0, -0.1, 1.1, NAN, INF, "0.9"],
    "min_p": [-0.1, 1.1, NAN, "0.1"],
    "repetition_penalty": [0, -1.0, NAN, INF, "2"],
    "stop": ["", [""], ["a", ""], 5, ["a", 3], b"a"],
    "seed": [-1, 1.5, 1 << 63, True, "7"],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in OUT_OF_RANGE.items() for value in values])
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} is {value!r}; it must be ") and "\n" not in message


def test_the_table_covers_every_parameter():
    assert set(OUT_OF_RANGE) == {f.name for f in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(
    "options",
    [
        dict(max_new_tokens=1),
        dict(temperature=0),
        dict(temperature=100),
        dict(top_k=1),
        dict(top_p=1),
        dict(top_p=None),
        dict(min_p=0),
        dict(min_p=1),
        dict(repetition_penalty=0.5),
        dict(stop="x"),
        dict(stop=["x", "yz"]),
        dict(stop=()),
        dict(seed=0),
        dict(seed=(1 << 63) - 1),
    ],
    ids=str,
)
def test_the_edges_of_the_ranges_are_allowed(options):
    SamplingParams(**options)
