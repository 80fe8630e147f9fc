"""Random traffic through one engine, and the same requests each alone."""

from __future__ import annotations

import random
from collections import Counter
from functools import lru_cache

import torch
from psann_fast.data import train_tokenizer
from psann_fast.generate.engine import Engine, Request
from psann_fast.generate.options import EngineOptions
from psann_fast.generate.sampling import SamplingBatch, SamplingParams, next_tokens
from psann_fast.generate.text import TextStream
from tiny import tiny

TOKENIZER = train_tokenizer("simple", ["only bytes"])
KINDS = [("respsann", "rope"), ("waveresnet", "rope"), ("waveresnet", "alibi"), ("waveresnet", "sinusoidal")]


@lru_cache
def module_of(base: str, positions: str, dtype: torch.dtype = torch.float64, backend: str = "torch"):
    """Logits spread enough that a text is neither noise nor one token."""
    module = tiny(
        base=base,
        positional_encoding=positions,
        n_kv_heads=1,
        vocab_size=TOKENIZER.vocab_size,
        wave_dilations=(1, 3),
        backend=backend,
    )
    with torch.no_grad():
        module.lm_head.weight.mul_(4)
        module.lm_head.weight[12:] *= 0.1  # a small alphabet, so that texts repeat themselves
        module.lm_head.weight[TOKENIZER.eos_id] *= 0.1
    return module.to(dtype)


def request_of(tokens: list[int], params: SamplingParams, **options) -> Request:
    return Request(0, list(tokens), params, TextStream(TOKENIZER.decode_bytes, params.stop_strings), **options)


def engine_for(module, cache_tokens: int = 4096, **options) -> Engine:
    return Engine(module, TOKENIZER.eos_id, TOKENIZER.vocab_size, cache_tokens=cache_tokens, **options)


def finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def alone(module, tokens: list[int], params: SamplingParams) -> Request:
    request = request_of(tokens, params)
    engine = engine_for(module)
    engine.add(request)
    finish(engine)
    return request


def random_params(choose: random.Random) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=choose.randint(1, 40),
        temperature=choose.choice((0, 0, 0.3, 0.7, 1.5)),
        top_k=choose.choice((None, None, 5, 40)),
        top_p=choose.choice((None, 0.5, 0.9)),
        min_p=choose.choice((None, None, 0.05)),
        repetition_penalty=choose.choice((None, None, None, 1.3)),
        stop=choose.choice((None, None, "a", ("bc", "\x07"))),
        seed=choose.randrange(1 << 40),
    )


class Traffic:
    """`count` requests at random times through an engine that is short of blocks; equal beginnings are common.

    counts  of requests, preempted, reusing, chunked and confirmed guesses
    """

    def __init__(self, seed: int, count: int, dtype: torch.dtype = torch.float64, backend: str = "torch") -> None:
        choose = random.Random(seed)
        self.module = module_of(*choose.choice(KINDS), dtype, backend)
        chunk = choose.choice((5, 9, 33, 512))
        self.engine = engine_for(
            self.module, choose.choice((112, 128, 160)), max_rows=8, chunk=chunk,
            block_size=choose.choice((2, 4, 16)),
            options=EngineOptions(speculate=choose.choice((0, 3))),
        )  # fmt: skip
        beginnings = [[choose.randrange(40) for _ in range(choose.randint(1, 40))] for _ in range(3)]
        waiting = []
        for _ in range(count):
            tokens = choose.choice(beginnings)[: choose.choice((1, 16, 31, 32, 33, 40))] + [
                choose.randrange(12) for _ in range(choose.choice((0, 0, 1, 5, 20)))
            ]
            waiting.append((tokens, random_params(choose)))
        self.counts: Counter[str] = Counter()
        self.done: list[tuple[list[int], Request]] = []
        cancelled = []
        while waiting or self.engine.has_work:
            while waiting and choose.random() < 0.7:
                tokens, params = waiting.pop()
                request = request_of(tokens, params)
                self.engine.add(request)
                (cancelled if choose.random() < 0.05 else self.done).append((tokens, request))
            self.engine.step()
            if cancelled and choose.random() < 0.3:
                self.engine.cancel(cancelled.pop()[1])
        for tokens, request in self.done:
            self.counts["requests"] += 1
            self.counts["preempted"] += request.sequence.preemptions > 0
            self.counts["reusing"] += request.sequence.reused > 0
            self.counts["chunked"] += len(tokens) > chunk
        self.counts["confirmed"] = self.engine.counts["confirmed_tokens"]
        assert self.engine.scheduler.pool.in_use == 0

    def differences(self, some: int | None = None) -> list[tuple[Request, Request]]:
        """(in the traffic, alone) of those, the first `some` or all, that did not get the text and the end that they get alone."""
        pairs = [(request, alone(self.module, tokens, request.params)) for tokens, request in self.done[:some]]
        return [(a, b) for a, b in pairs if (a.tokens, a.finish_reason, a.text.text) != (b.tokens, b.finish_reason, b.text.text)]

    def surprises(self) -> list[Request]:
        """Those whose text, or end, is not what one uncached pass over it draws at every place: cheaper than `alone`, for counts.

        By induction that is the text that the request gets alone: a draw depends on seed, place and the text before it.
        """
        return [request for tokens, request in self.done if expected(self.module, tokens, request) != outcome(request)]


def outcome(request: Request) -> tuple[list[int], str | None, str]:
    return request.tokens, request.finish_reason, request.text.text


@torch.no_grad()
def expected(module, prompt: list[int], request: Request) -> tuple[list[int], str | None, str]:
    """The outcome that the draws at every place of the request's text make, up to the first that ends it."""
    params, places = request.params, range(len(prompt), len(request.tokens) + 1)
    logits = module(torch.tensor([request.tokens]))[0, len(prompt) - 1 :, : TOKENIZER.vocab_size]
    seen = torch.zeros(len(places), TOKENIZER.vocab_size, dtype=torch.bool)
    for row, place in enumerate(places):
        seen[row, request.tokens[:place]] = True
    batch = SamplingBatch.of([params] * len(places), TOKENIZER.vocab_size, logits.device)
    text, tokens = TextStream(TOKENIZER.decode_bytes, params.stop_strings), list(prompt)
    for token in next_tokens(logits, batch, torch.tensor(places), seen).tolist():
        tokens.append(token)
        if token == TOKENIZER.eos_id:
            reason = "eos"
        else:
            text.push(token)
            reason = "stop" if text.is_stopped else "length" if len(tokens) - len(prompt) == params.max_new_tokens else None
        if reason is not None:
            text.finish()
            return tokens, reason, text.text
    return tokens, None, text.text
