"""Which token comes next.

A draw is a function of (request seed, position) and of the row's own logits, so that batching cannot change a request's text.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import reprlib
from dataclasses import dataclass
from typing import Any, Sequence

import numpy as np
import torch
from psann_kernels.documents import are_values_known
from psann_kernels.native import NATIVE
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How one request draws its tokens. Filters act in this order: repetition penalty, temperature, top-k, top-p, min-p.

    max_new_tokens      tokens to add at most, at least 1
    temperature         0 takes the likeliest token (the lowest id among equals); above 0 divides the logits
    top_k               keep the k likeliest (ties: the lowest ids), or None
    top_p               keep the likeliest tokens until their sum reaches p, the one that crosses it included; None or 1: all
    min_p               keep tokens of at least min_p times the likeliest one's probability, or None
    repetition_penalty  positive logits of tokens already in prompt or output are divided by it, negative ones multiplied;
                        None or 1: off. Source: Keskar et al. 2019, arXiv:1909.05858
    stop                a string or strings; the text ends before the first that is complete
    seed                whole number below 2^63; None where the caller draws one

    Raises ValueError for a value out of range, naming it.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = 0.9
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: str | Sequence[str] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _whole("max_new_tokens", self.max_new_tokens, 1)
        _real("temperature", self.temperature, 0, math.inf)
        if self.top_k is not None:
            _whole("top_k", self.top_k, 1)
        if self.top_p is not None:
            _real("top_p", self.top_p, 0, 1, above=True)
        if self.min_p is not None:
            _real("min_p", self.min_p, 0, 1)
        if self.repetition_penalty is not None:
            _real("repetition_penalty", self.repetition_penalty, 0, math.inf, above=True)
        if self.seed is not None:
            _whole("seed", self.seed, 0)
            if self.seed >= 1 << 63:
                raise ValueError(f"seed is {reprlib.repr(self.seed)}; it must be below 2^63")
        for stop in self.stop_strings:
            if not isinstance(stop, str) or not stop:
                raise ValueError(f"stop is {self.stop!r}; it must be a non-empty string, several of them, or None")

    def with_seed(self, seed: int) -> SamplingParams:
        """These parameters with another seed."""
        return dataclasses.replace(self, seed=seed)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return () if self.stop is None else tuple(self.stop) if isinstance(self.stop, (list, tuple)) else (self.stop,)


def seed_of_sample(seed: int, sample: int) -> int:
    """The seed of sample 0, 1, ... of one prompt; that of sample 0 is the prompt's own."""
    return seed if sample == 0 else int(_mix(np.array([seed]) + sample)[0]) & ((1 << 63) - 1)


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} is {reprlib.repr(value)}; it must be a whole number of at least {least}")


def _real(name: str, value: object, low: float, high: float, above: bool = False) -> None:
    if not _is_finite(value) or not low <= value <= high or (above and value == low):
        rule = f"{'above' if above else 'at least'} {low:g}" + ("" if high == math.inf else f" and at most {high:g}")
        raise ValueError(f"{name} is {reprlib.repr(value)}; it must be a number {rule}")


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """(B,) float64 in [0, 1) of (B,) int64 seeds and positions: 53 bits of a twice-applied SplitMix64.

    Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", the finaliser's constants.
    """
    if are_values_known(seeds):  # a few numbers on a CPU: numpy's calls cost a third of torch's
        mixed = _mix(_mix(seeds.numpy()) + positions.numpy())
        return torch.from_numpy(_shift(mixed, 11) * 2.0**-53)
    return _shift(_mix(_mix(seeds) + positions), 11).to(torch.float64) * 2.0**-53


# On int64 tensors and arrays alike: both wrap.
def _shift(x: Any, bits: int) -> Any:
    # int64 shifts keep the sign; the mask makes the shift a logical one.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Any) -> Any:
    x = x + -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


@dataclass(frozen=True)
class SamplingBatch:
    """The parameters of B requests as columns, (B, 1), and their seeds, (B,), on the model's device."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    penalty: Tensor
    seeds: Tensor
    is_greedy: bool
    has_penalty: bool
    has_top_p: bool
    has_min_p: bool

    @classmethod
    def of(cls, requests: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> SamplingBatch:
        columns = columns_of(requests, vocab_size)
        wide = lambda name: torch.tensor(columns[name], dtype=torch.float64, device=device).unsqueeze(1)  # noqa: E731 (four uses)
        return cls(
            temperature=wide("temperature"),
            top_k=torch.tensor(columns["top_k"], device=device).unsqueeze(1),
            top_p=wide("top_p"),
            min_p=wide("min_p"),
            penalty=wide("penalty"),
            seeds=torch.tensor(columns["seeds"], dtype=torch.int64, device=device),
            is_greedy=is_greedy(requests),
            has_penalty=has_penalty(requests),
            has_top_p=any((p.top_p or 1.0) != 1.0 for p in requests),
            has_min_p=any((p.min_p or 0.0) != 0.0 for p in requests),
        )


def columns_of(requests: Sequence[SamplingParams], vocab_size: int) -> dict[str, list[float] | list[int]]:
    """What the tensors of a SamplingBatch hold, one value a request; what is off has the value that changes nothing."""
    return {
        "temperature": [p.temperature for p in requests],
        "top_k": [min(p.top_k or vocab_size, vocab_size) for p in requests],
        "top_p": [1.0 if p.top_p is None else p.top_p for p in requests],
        "min_p": [p.min_p or 0.0 for p in requests],
        "penalty": [p.repetition_penalty or 1.0 for p in requests],
        "seeds": [p.seed for p in requests],
    }


def is_greedy(requests: Sequence[SamplingParams]) -> bool:
    """Whether all of them take the likeliest token."""
    return all(p.temperature == 0 for p in requests)


def has_penalty(requests: Sequence[SamplingParams]) -> bool:
    """Whether one of them has a repetition penalty."""
    return any((p.repetition_penalty or 1.0) != 1.0 for p in requests)


def next_tokens(logits: Tensor, batch: SamplingBatch, positions: Tensor | None, seen: Tensor | None = None) -> Tensor:
    """(B,) int64: the token that each row draws.

    logits     (B, V), any float dtype
    positions  (B,) int64: the position that the drawn token will have; not needed where all are greedy
    seen       (B, V) bool: tokens in prompt or output; needed where a repetition penalty is set
    """
    if batch.has_penalty:
        logits = logits.to(torch.float64)
        logits = torch.where(seen, torch.where(logits > 0, logits / batch.penalty, logits * batch.penalty), logits)
    if batch.is_greedy:
        return logits.argmax(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    draws = uniform(batch.seeds, positions)
    if NATIVE is not None and are_values_known(logits):
        tokens = _drawn_natively(logits, batch, draws)
        if tokens is not None:
            return tokens
    ascending = _sorted(logits)
    falling = ascending.flip(-1).to(torch.float64)
    # Weights relative to the likeliest token's, and their running sums: tokens up to any place in the order.
    weights = torch.exp((falling - falling[:, :1]) / batch.temperature.clamp_min(1e-6))
    edges = weights.cumsum(-1)
    # A binary search counts the edges before a value. Tokens behind the place where the sum stops growing have no weight at all.
    count_below = lambda values, right=False: torch.searchsorted(edges, values, right=right)  # noqa: E731 (three uses)
    kept = torch.minimum(batch.top_k, count_below(edges[:, -1:].contiguous()) + 1)
    if batch.has_top_p:
        # What comes before a token decides whether it is kept, so the token that crosses p is.
        kept = torch.minimum(kept, count_below(batch.top_p * edges.gather(1, kept - 1)) + 1)
    if batch.has_min_p:
        kept = torch.minimum(kept, (weights >= batch.min_p).sum(-1, keepdim=True))
    draw = draws.unsqueeze(1) * edges.gather(1, kept - 1)
    # The first token whose interval ends above the draw; rounding may put the draw on the last edge, so look no further than kept.
    chosen = torch.minimum(count_below(draw, right=True), kept - 1)
    chosen = torch.where(batch.temperature == 0, 0, chosen)
    return _ids_at(chosen, logits, ascending).squeeze(1)


def _drawn_natively(logits: Tensor, batch: SamplingBatch, draws: Tensor) -> Tensor | None:
    """What next_tokens draws, from a kernel that sorts only what it must; None where a logit is NaN or the highest one infinite."""
    rows, vocabulary = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    draws = draws.contiguous()
    tokens = torch.empty(rows, dtype=torch.int64)
    NATIVE.sample_tokens(
        logits.data_ptr(), batch.temperature.data_ptr(), batch.top_p.data_ptr(), batch.min_p.data_ptr(), draws.data_ptr(),
        batch.top_k.data_ptr(), tokens.data_ptr(), rows, vocabulary, logits.stride(0), logits.dtype == torch.float64,
        torch.get_num_threads(),
    )  # fmt: skip
    return None if (tokens.numpy() < 0).any() else tokens


def _ids_at(places: Tensor, logits: Tensor, ascending: Tensor) -> Tensor:
    """(B, 1): the tokens at these places, (B, 1), of the falling order of logits, the lowest id first among equals.

    The order is that of values alone, whose sort costs a third of one that carries the ids along.
    """
    last = logits.shape[1] - 1
    value = ascending.gather(1, last - places)
    equals_before = places - (last + 1 - torch.searchsorted(ascending, value, right=True))
    equals = (logits == value).cumsum(-1, dtype=torch.int32)
    return torch.searchsorted(equals, (equals_before + 1).to(torch.int32)).clamp_max(last)


def _sorted(logits: Tensor) -> Tensor:
    if not are_values_known(logits):
        return logits.sort(dim=-1).values
    return torch.from_numpy(np.sort(logits.contiguous().numpy(), axis=-1))  # with vector instructions, 10 times as fast as torch's
