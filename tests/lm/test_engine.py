"""The engine: a request gets the text that it would get alone, whatever its neighbours, and says what it drew."""

from __future__ import annotations

import copy
import gc
import random
import threading
import weakref
from collections import Counter

import pytest
import torch
from engine_traffic import TOKENIZER, Traffic, alone, engine_for, finish, module_of, random_params, request_of
from psann_fast.generate import engine as engine_module
from psann_fast.generate import native_decoder, sampling
from psann_fast.generate.cache import PagedCache
from psann_fast.generate.decoder import ModuleDecoder, decoder_for
from psann_fast.generate.options import EngineOptions
from psann_fast.generate.sampling import SamplingParams
from psann_fast.generate.scheduler import Sequence, Work
from psann_fast.generate.speculation import Lookup
from psann_kernels.linear import quantize
from tiny import BASES, POSITIONS, tiny, tokens

GREEDY = SamplingParams(max_new_tokens=12, temperature=0, seed=0)


# -- neighbours -----------------------------------------------------------------------------------------------------------------


def test_a_request_gets_the_text_that_it_would_get_alone():
    total: Counter[str] = Counter()
    for seed in range(4):
        traffic = Traffic(seed, 20)
        assert not traffic.differences()
        total += traffic.counts
    share = {name: total[name] / total["requests"] for name in ("preempted", "reusing", "chunked")}
    assert share["preempted"] >= 0.05 and share["reusing"] >= 0.2 and share["chunked"] >= 0.2 and total["confirmed"] > 5, (
        share,
        total,
    )


# 20,000 requests are 200 cases.
@pytest.mark.campaign(weight=3)
def test_requests_in_traffic(campaign):
    total: Counter[str] = Counter()
    for seed in campaign:
        traffic = Traffic(seed, 100)
        assert not traffic.surprises() and not traffic.differences(some=3)
        total += traffic.counts
    print(dict(total))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["auto"])
def test_in_narrow_types_texts_part_only_at_near_ties(dtype, backend):
    parted = requests = 0
    for seed in range(3):
        traffic = Traffic(seed, 12, dtype, backend)
        requests += len(traffic.done)
        for ours, theirs in traffic.differences():
            parted += 1
            at = next(i for i, (a, b) in enumerate(zip(ours.tokens, theirs.tokens)) if a != b)
            assert is_near_tie(traffic.module, theirs.tokens[:at], ours.params, {ours.tokens[at], theirs.tokens[at]}, dtype)
    assert parted <= requests * (0.5 if dtype == torch.bfloat16 else 0.1), f"{parted} of {requests} parted"


def is_near_tie(module, tokens, params, rivals, dtype) -> bool:
    """Whether noise of the dtype's size in the logits draws each of the rivals."""
    with torch.no_grad():
        logits = module(torch.tensor([tokens]))[0, -1].double()
    # Several roundings of the largest logit lie between two orders of summation.
    noise = 16 * torch.finfo(dtype).eps * logits.abs().max()
    generator = torch.Generator().manual_seed(0)
    noisy = logits + noise * (2 * torch.rand(4000, len(logits), generator=generator, dtype=torch.float64) - 1)
    batch = sampling.SamplingBatch.of([params] * len(noisy), len(logits), torch.device("cpu"))
    seen = torch.zeros(len(noisy), len(logits), dtype=torch.bool)
    seen[:, tokens] = True
    drawn = sampling.next_tokens(noisy, batch, torch.full((len(noisy),), len(tokens)), seen)
    return rivals <= set(drawn.tolist())


def test_a_draw_that_depends_on_the_row_is_found(monkeypatch):
    uniform = sampling.uniform
    monkeypatch.setattr(sampling, "uniform", lambda seeds, positions: uniform(seeds + torch.arange(len(seeds)), positions))
    traffics = (Traffic(seed, 20) for seed in range(3))
    assert any(traffic.surprises() and traffic.differences() for traffic in traffics)


def test_a_copy_that_is_left_out_is_found(monkeypatch):
    def clear(self, copies):
        self._hold(1 + max((target for _, target in copies), default=0))
        for _, target in copies:
            for tensor in (*self._k, *self._v):
                tensor[target] = 0

    monkeypatch.setattr(PagedCache, "copy", clear)
    prompt = [i % 7 for i in range(23)]
    module = module_of("respsann", "rope")
    engine = engine_for(module)
    first, second = (request_of(prompt, SamplingParams(max_new_tokens=10, seed=seed)) for seed in (1, 2))
    engine.add(first)
    engine.step()
    engine.add(second)
    finish(engine)
    assert (
        second.tokens != alone(module, prompt, second.params).tokens or first.tokens != alone(module, prompt, first.params).tokens
    )


def test_samples_of_one_prompt():
    prompt = [i % 11 for i in range(45)]
    module = module_of("waveresnet", "rope")
    engine = engine_for(module)
    samples = [request_of(prompt, SamplingParams(max_new_tokens=20, temperature=1.5, seed=seed)) for seed in range(5)]
    for sample in samples:
        engine.add(sample)
    finish(engine)
    assert [s.tokens for s in samples] == [alone(module, prompt, s.params).tokens for s in samples]
    assert len({tuple(s.tokens) for s in samples}) > 1
    assert [s.sequence.reused for s in samples] == [0, 44, 44, 44, 44], (
        "all but the last prompt token comes from the first one's blocks"
    )


def test_a_prefix_is_computed_once_for_all():
    prefix = [i * i % 37 for i in range(400)]
    module = module_of("waveresnet", "alibi")
    engine = engine_for(module, 16384)
    requests = [request_of(prefix + [i, i + 1], SamplingParams(max_new_tokens=3, temperature=0, seed=0)) for i in range(16)]
    for request in requests:
        engine.add(request)
    finish(engine)
    drawn = engine.counts["drawn_tokens"]
    # The prefix once, the two own tokens of each, and every drawn token but each one's last.
    assert engine.counts["computed_tokens"] == 402 + 15 * 2 + drawn - 16
    assert all(r.tokens == alone(module, prefix + [i, i + 1], r.params).tokens for i, r in enumerate(requests[:4]))


# -- guesses --------------------------------------------------------------------------------------------------------------------


def test_lookup_guesses_what_followed_the_latest_occurrence():
    lookup = Lookup()
    assert lookup.guess([1, 2, 3], 4) == []
    assert lookup.guess([1, 2, 3, 1, 2], 4) == [3, 1, 2]
    assert lookup.guess([1, 2, 3, 1, 2, 9, 5, 1, 2], 2) == [9, 5]
    assert lookup.guess([1, 2, 3, 1, 2, 9, 5, 1, 2, 3], 2) == [1, 2], "a longer run counts for more"


@pytest.mark.parametrize("base", ["respsann", "waveresnet"])
def test_guesses_change_no_text(base):
    choose = random.Random(0)
    module = module_of(base, "rope")
    confirmed = steps = drawn = 0
    for _ in range(12):
        prompt, params = [choose.randrange(12) for _ in range(20)] * 2, random_params(choose)
        request = request_of(prompt, params)
        engine = engine_for(module, options=EngineOptions(speculate=4))
        engine.add(request)
        finish(engine)
        expected = alone(module, prompt, params)
        assert (request.tokens, request.text.text, request.finish_reason) == (
            expected.tokens,
            expected.text.text,
            expected.finish_reason,
        )
        confirmed, steps, drawn = (
            confirmed + engine.counts["confirmed_tokens"],
            steps + engine.counts["steps"],
            drawn + engine.counts["drawn_tokens"],
        )
    assert confirmed > 5 and steps < drawn


# -- log probabilities ----------------------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_whole_pass():
    module = module_of("waveresnet", "rope")
    prompt = [3, 1, 4, 1, 5, 9, 2, 6] * 5
    request = request_of(prompt, SamplingParams(max_new_tokens=9, temperature=0.8, seed=4), logprobs=3, prompt_logprobs=True)
    engine = engine_for(module, chunk=7, options=EngineOptions(speculate=2))
    engine.add(request)
    engine.add(request_of(prompt, GREEDY))
    finish(engine)
    with torch.no_grad():
        expected = module(torch.tensor([request.tokens]))[0].log_softmax(-1)
    reports = request.given_logprobs + request.drawn_logprobs
    assert [r.token for r in reports] == request.tokens[1:]
    for row, report in zip(expected, reports):
        assert report.logprob == pytest.approx(row[report.token].item(), abs=1e-9)
        values, ids = row.topk(3)
        assert [t for t, _ in report.top] == ids.tolist()
        assert [v for _, v in report.top] == pytest.approx(values.tolist(), abs=1e-9)


def test_prompt_logprobs_survive_a_preemption():
    module = module_of("respsann", "rope")
    engine = engine_for(module, 96, max_rows=3, chunk=16)
    requests = [
        request_of([i] * 30, SamplingParams(max_new_tokens=30, temperature=0, seed=0), logprobs=0, prompt_logprobs=True)
        for i in range(3)
    ]
    for request in requests:
        engine.add(request)
    finish(engine)
    assert engine.scheduler.preemptions > 0
    for request in requests:
        assert [r.token for r in request.given_logprobs] == request.tokens[1:30]
        assert [r.token for r in request.drawn_logprobs] == request.tokens[30:]


# -- ends -----------------------------------------------------------------------------------------------------------------------


def test_a_cancelled_requests_blocks_are_free_at_once():
    engine = engine_for(module_of("respsann", "rope"), 256, max_rows=2)
    requests = [request_of([i, 1, 2] * 10, GREEDY) for i in range(3)]
    for request in requests:
        engine.add(request)
    engine.step()
    engine.cancel(requests[0])
    assert requests[0].finish_reason == "cancelled" and engine.scheduler.pool.in_use == 2  # the second's 30 tokens
    engine.cancel(requests[2])
    finish(engine)
    engine.cancel(requests[1])
    assert requests[1].finish_reason in ("length", "eos") and not requests[2].text.text
    assert engine.scheduler.pool.in_use == 0


def test_what_can_never_fit_is_refused():
    engine = engine_for(module_of("respsann", "rope"), 64)
    with pytest.raises(
        ValueError,
        match="is 60 after a prompt of 10 tokens: .* cache of 69 tokens, and the cache holds 64; pass max_new_tokens of at most 55",
    ):
        engine.add(request_of([1] * 10, SamplingParams(max_new_tokens=60, seed=0)))
    engine.add(request_of([1] * 10, SamplingParams(max_new_tokens=55, temperature=0, seed=0)))
    finish(engine)


@pytest.mark.parametrize("options, message", [
    (dict(weights="fp8"), "weights is 'fp8'; choose one of 'model', 'bf16', 'int8'"),
    (dict(speculate=-1), "speculate is -1; it must be a whole number of 0 to 64"),
    (dict(speculate=True), "speculate is True"),
])  # fmt: skip
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        EngineOptions(**options)


def test_memory_is_asked_of_the_machine():
    assert 1 << 20 < engine_module.tokens_that_fit(module_of("respsann", "rope")) < 1 << 40
    assert TOKENIZER.eos_id < TOKENIZER.vocab_size


# -- the native decoder ---------------------------------------------------------------------------------------------------------

NATIVE = pytest.mark.skipif(native_decoder.NATIVE is None, reason=f"native: {native_decoder.WHY_NOT}")


def step_logits(decoder, module, rows: list[list[int]], cuts) -> torch.Tensor:
    cache = PagedCache(module, 20, 4, len(rows))
    sequences = [
        Sequence([], 0, blocks=list(range(1 + row, 1 + row + 4 * len(rows), len(rows))), row=row) for row in range(len(rows))
    ]
    logits = []
    with torch.inference_mode():
        for begin, end in cuts:
            view = cache.view([Work(s, begin, end) for s in sequences])
            ids = torch.tensor([t for row in rows for t in row[begin:end]])
            logits.append(decoder.logits(decoder.hidden(ids, view)).clone())
    return torch.cat(logits)


@NATIVE
@pytest.mark.parametrize("base, positions", [(base, positions) for base in BASES for positions in POSITIONS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_native_decoder_computes_what_the_modules_compute(base, positions, dtype):
    module = tiny(base=base, positional_encoding=positions, n_kv_heads=1, wave_dilations=(1, 3), wave_kernel=3).to(dtype)
    assert native_decoder.refuses(module) is None
    rows, cuts = tokens(2, 14).tolist(), [(0, 7), (7, 8), (8, 9), (9, 14)]
    ours = step_logits(decoder_for(module, "model"), module, rows, cuts)
    modules = step_logits(ModuleDecoder(module), module, rows, cuts)
    truth = step_logits(ModuleDecoder(module.double()), module, rows, cuts)
    assert (ours.double() - truth).norm() <= 2 * (modules.double() - truth).norm() + 1e-6


@NATIVE
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_rounded_weights_are_the_same_for_few_rows_and_many(weights):
    module = tiny(base="waveresnet", n_kv_heads=1)
    rounded = copy.deepcopy(module)
    for layer in rounded.modules():
        if isinstance(layer, torch.nn.Linear):
            narrow = layer.weight.data.bfloat16().float() if weights == "bf16" else None
            if narrow is None:
                whole, scale = quantize(layer.weight.data)
                narrow = whole.float() * scale[:, None]
            layer.weight.data = narrow
    rows, cuts = tokens(2, 14).tolist(), [(0, 7), (7, 8), (8, 14)]  # 14, 2 and 12 rows
    ours = step_logits(decoder_for(module, weights), module, rows, cuts)
    expected = step_logits(ModuleDecoder(rounded), rounded, rows, cuts)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)
    assert (ours - step_logits(ModuleDecoder(module), module, rows, cuts)).abs().max() > 1e-4, "the weights were not rounded"


@NATIVE
def test_the_native_decoder_follows_the_weights_and_lets_the_model_go():
    module = tiny()
    first = native_decoder.prepared(module, "model")
    assert native_decoder.prepared(module, "model") is first
    with torch.no_grad():
        module.blocks[0].alpha.fill_(0.5)
    second = native_decoder.prepared(module, "model")
    assert second is not first and second.layers[0].alpha == 0.5
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


@NATIVE
def test_two_engines_on_one_model_do_not_meet():
    module = tiny(vocab_size=TOKENIZER.vocab_size)
    engines = [engine_for(module) for _ in range(2)]
    requests = [request_of([i + 2] * 9, SamplingParams(max_new_tokens=12, seed=i)) for i in range(2)]
    for engine, request in zip(engines, requests):
        engine.add(request)
    threads = [threading.Thread(target=finish, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r.tokens for r in requests] == [alone(module, [i + 2] * 9, r.params).tokens for i, r in enumerate(requests)]
    assert engines[0].decoder.weights is engines[1].decoder.weights


@pytest.mark.parametrize("change, reason", [
    (lambda m: m.double(), "weights are torch.float64"),
    (lambda m: m.register_forward_hook(lambda *a: None) and m, "hook"),
    (lambda m: tiny(backend="torch"), "backend='torch'"),
    (lambda m: setattr(m.blocks[0], "mlp", torch.nn.Identity()) or m, "other parts"),
    (lambda m: torch.nn.Sequential(m), "base is not one of ours"),
])  # fmt: skip
def test_what_the_native_decoder_refuses(change, reason):
    module = change(tiny())
    assert native_decoder.NATIVE is None or reason in native_decoder.refuses(module)
    with pytest.raises(ValueError, match="weights is 'int8', which only the native decoder on a CPU has: .*; leave weights out"):
        decoder_for(module, "int8")
