"""Generation: the paged cache gives the logits of the whole pass, rows do not touch one another, text comes out whole."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from psann_fast import psannLM
from psann_fast.data import train_tokenizer
from psann_fast.generate import cache as cache_module
from psann_fast.generate import engine
from psann_fast.generate.cache import PagedCache
from psann_fast.generate.scheduler import Sequence, Work
from psann_fast.generate.text import TextStream
from psann_fast.models import layers
from scripted import scripted
from tiny import BASES, POSITIONS, tiny, tokens

EVERY_MODEL = pytest.mark.parametrize("base, positions", [(base, positions) for base in BASES for positions in POSITIONS])
PROMPTS = ["", "a", "hello world", "x" * 40, "Gr\u00fc\u00dfe \U0001f600", "The quick brown fox"]


@pytest.fixture
def poisoned_cache(monkeypatch):
    """Cache slots that nobody wrote hold NaN."""
    empty = torch.empty
    monkeypatch.setattr(cache_module.torch, "empty", lambda *args, **options: empty(*args, **options).fill_(float("nan")))


def writer(base: str = "waveresnet", **options) -> psannLM:
    """An untrained model with a byte tokenizer: it writes all sorts of bytes, valid UTF-8 or not, and the end of the document."""
    tokenizer = train_tokenizer("simple", ["only bytes"])
    torch.manual_seed(0)
    model = psannLM(
        base=base,
        d_model=16,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        d_mlp=24,
        vocab_size=tokenizer.vocab_size,
        device="cpu",
        **options,
    )
    model.tokenizer = tokenizer
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# -- the cache ------------------------------------------------------------------------------------------------------------------


def cached_logits(module, rows, cuts, block_size=4):
    """The logits of each row's tokens through a paged cache, fed in the pieces that `cuts` gives for each row and step.

    Blocks are dealt in a shuffled order. A row that begins late takes the place and blocks of nobody.
    """
    capacity = -(-max(map(len, rows)) // block_size)
    cache = PagedCache(module, capacity * len(rows), block_size, len(rows))
    blocks = random.Random(0).sample(range(1, capacity * len(rows) + 1), capacity * len(rows))
    sequences = [
        Sequence([], 0, blocks=blocks[row * capacity : (row + 1) * capacity], row=row) for row in range(len(rows))
    ]
    held, logits = [0] * len(rows), [[] for _ in rows]
    for step in cuts:
        running = [row for row in range(len(rows)) if min(step[row], len(rows[row]) - held[row])]
        begins = [held[row] for row in running]
        ends = [min(held[row] + step[row], len(rows[row])) for row in running]
        ids = torch.cat([rows[row][b:e] for row, b, e in zip(running, begins, ends)])
        with torch.inference_mode():
            work = [Work(sequences[row], begin, end) for row, begin, end in zip(running, begins, ends)]
            out = module.lm_head(module.decode(ids, cache.view(work)))
        for row, part in zip(running, out.split([e - b for b, e in zip(begins, ends)])):
            logits[row].append(part)
        for row, end in zip(running, ends):
            held[row] = end
    assert held == list(map(len, rows))
    return [torch.cat(parts) for parts in logits]


CUTS = {
    "token by token": [(1, 1, 1)] * 29,
    "at once": [(29, 29, 29)],
    "in ragged chunks": [(5, 0, 3), (1, 1, 1), (0, 7, 4), (2, 1, 1), (9, 1, 1), (1, 0, 13), (12, 9, 1)],
}


@pytest.mark.parametrize("cut", CUTS)
@EVERY_MODEL
def test_cached_decoding_gives_the_logits_of_the_whole_pass(poisoned_cache, base, positions, cut):
    module = tiny(base=base, positional_encoding=positions, n_kv_heads=1, wave_dilations=(1, 3))
    rows = [tokens(29, seed=1), tokens(17, seed=2), tokens(22, seed=3)]
    for row, logits in zip(rows, cached_logits(module, rows, CUTS[cut])):
        with torch.no_grad():
            whole = module(row[None])[0]
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", [1, 2])
def test_a_wave_branch_with_little_or_no_memory(poisoned_cache, kernel):
    module = tiny(base="waveresnet", wave_kernel=kernel, wave_dilations=(2,))
    row = tokens(9)
    with torch.no_grad():
        torch.testing.assert_close(cached_logits(module, [row], [(2,), (1,), (9,)])[0], module(row[None])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_cache_has_the_models_dtype(poisoned_cache, dtype):
    module = tiny(base="waveresnet", positional_encoding="alibi").to(dtype)
    row = tokens(20)
    with torch.no_grad():
        cached, whole = cached_logits(module, [row], [(1,)] * 20)[0], module(row[None])[0]
    assert cached.dtype == dtype
    # Measured against float64: as wrong as the whole pass, not more.
    truth = tiny(base="waveresnet", positional_encoding="alibi").to(dtype).double()
    with torch.no_grad():
        truth = truth(row[None])[0]
    error, allowed = (cached.double() - truth).norm(), (whole.double() - truth).norm()
    assert error <= 2 * allowed + 1e-12


# -- rows do not touch one another ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.3, "seed": 7}],
    ids=str,
)
def test_a_ragged_batch_equals_its_rows(base, options):
    model = writer(base)
    options = {"max_new_tokens": 20, **options}
    together = model.generate_batch(PROMPTS, **options)
    assert together == [model.generate(prompt, **options) for prompt in PROMPTS]
    assert len(set(together)) == len(PROMPTS)


def test_one_seed_for_all_or_one_for_each():
    model = writer()
    alone = [model.generate("abc", max_new_tokens=20, seed=seed) for seed in (3, 4, 5)]
    assert len(set(alone)) == 3
    assert model.generate_batch(["abc"] * 3, max_new_tokens=20, seed=[3, 4, 5]) == alone
    assert model.generate_batch(["abc"] * 3, max_new_tokens=20, seed=4) == [alone[1]] * 3
    assert len(set(model.generate_batch(["abc"] * 3, max_new_tokens=20))) == 3


def test_without_a_seed_draws_follow_torchs():
    model = writer()
    torch.manual_seed(11)
    first, second = (model.generate("abc", max_new_tokens=20) for _ in range(2))
    assert first != second
    torch.manual_seed(11)
    assert first == model.generate("abc", max_new_tokens=20)
    state = torch.random.get_rng_state()
    model.generate("abc", max_new_tokens=20, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("base", BASES)
def test_more_requests_than_rows_and_blocks(monkeypatch, base):
    model = writer(base)
    prompts = [p + q for p in PROMPTS for q in ("", "?!")]
    # With these seeds rows end early, at the end of the document, as well as at their length.
    model.module.lm_head.weight.data[model.tokenizer.eos_id] *= 4
    # The penalty remembers what a row has seen, which must not pass to the row's next request.
    options = dict(max_new_tokens=25, seed=0, repetition_penalty=1.5)
    wanted = model.generate_batch(prompts, **options)
    engines = []
    make = engine.Engine.__init__
    monkeypatch.setattr(
        engine.Engine, "__init__", lambda self, *args, **options: engines.append(self) or make(self, *args, **options)
    )
    monkeypatch.setattr(engine, "BLOCK_SIZE", 4)
    monkeypatch.setattr(engine, "MAX_ROWS", 3)
    monkeypatch.setattr(engine, "MAX_CACHED_TOKENS", 80)
    monkeypatch.setattr(engine, "CHUNK", 7)
    assert model.generate_batch(prompts, **options) == wanted
    assert len({len(text) for text in wanted}) > 3
    (scheduler,) = (e.scheduler for e in engines)
    assert scheduler.pool.num_blocks == 20 and scheduler.pool.in_use == 0 and scheduler.preemptions > 0


def test_a_request_longer_than_the_usual_cache_gets_one_that_holds_it(monkeypatch):
    model = writer()
    wanted = model.generate("hello world", max_new_tokens=30, seed=0)
    monkeypatch.setattr(engine, "MAX_CACHED_TOKENS", 16)
    assert model.generate("hello world", max_new_tokens=30, seed=0) == wanted


def test_a_prompt_longer_than_a_chunk(monkeypatch):
    model = writer()
    wanted = model.generate_batch(PROMPTS, max_new_tokens=9, temperature=0)
    for chunk in (1, 3, 11):
        monkeypatch.setattr(engine, "CHUNK", chunk)
        assert model.generate_batch(PROMPTS, max_new_tokens=9, temperature=0) == wanted


# -- where a text begins and ends -----------------------------------------------------------------------------------------------


def test_the_text_follows_the_prompt_and_leaves_it_out(monkeypatch):
    model = scripted(monkeypatch, "Helo wrd", "0123456789")
    assert model.generate("xyH") == "elo wrd"
    assert model.generate("0") == "123456789" and model.generate("0", max_new_tokens=3) == "123"
    assert model.generate("0", max_new_tokens=1) == "1"
    assert model.generate("9") == ""


def test_nothing_stands_between_prompt_and_text(monkeypatch):
    model = scripted(monkeypatch, "0123")
    model.generate("ab0")
    encoded = model.tokenizer.encode("ab0")
    assert model.module.steps[0] == encoded, "the prompt must be fed as it is, without an end of document after it"
    assert model.tokenizer.eos_id not in sum(model.module.steps, [])


def test_an_empty_prompt_begins_a_document(monkeypatch):
    model = scripted(monkeypatch, "0123")
    eos = model.tokenizer.eos_id
    model.module.successors[eos] = model.tokenizer.encode("0")[0]
    assert model.generate("") == "0123"
    assert model.module.steps[0] == [eos]


def test_each_row_ends_at_its_own_end_of_document(monkeypatch):
    model = scripted(monkeypatch, "0123456789", "ab")
    model.module.steps.clear()
    assert model.generate_batch(["a", "0", "8"]) == ["b", "123456789", "9"]
    # The rows that have ended take part in no further step.
    assert [len(step) for step in model.module.steps] == [3, 3] + [1] * 8


def test_finish_reasons(monkeypatch):
    model = scripted(monkeypatch, "0123456789", "abcdef", "xyz")
    requests, options = model._requests("test", ["0", "a", "x"], {"max_new_tokens": 4, "stop": "cd"}, None)
    list(model._run(requests, options))
    assert [(r.text.text, r.finish_reason) for r in requests] == [("1234", "length"), ("b", "stop"), ("yz", "eos")]


def test_no_prompts_give_no_texts(monkeypatch):
    assert scripted(monkeypatch, "0123").generate_batch([]) == []


# -- stop strings and characters ------------------------------------------------------------------------------------------------


def test_stop_strings_across_tokens(monkeypatch):
    model = scripted(monkeypatch, "0123456789", "abcdefgh")
    assert model.generate("0", stop="567") == "1234"
    assert model.generate_batch(["0", "a"], stop=["def", "89", "2"]) == ["1", "bc"]
    assert model.generate("0", stop=["345", "34"]) == "12"
    assert model.generate("0", stop="x") == "123456789"
    # What only began a stop string is text after all, whether another character follows or none.
    assert model.generate("0", stop=["24", "9x"]) == "123456789"
    assert list(model.stream("0", stop=["34x", "78x"])) == ["1", "2", "345", "6", "789"]


def stopped(text: str, stops: list[str]) -> str:
    """The specification: the text up to the stop string that is complete first."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(ends)[1]] if ends else text


def test_random_texts_with_random_stop_strings():
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choice("ab\u00e9\U0001f600") for _ in range(draw.randrange(12)))
        stops = ["".join(draw.choice("ab\u00e9") for _ in range(draw.randint(1, 4))) for _ in range(draw.randrange(3))]
        content = text.encode()
        cuts = sorted(draw.randrange(len(content) + 1) for _ in range(draw.randrange(8)))
        pieces = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)])]
        stream = TextStream(lambda ids, pieces=pieces: b"".join(pieces[i] for i in ids), stops)
        emitted = []
        for index in range(len(pieces)):
            emitted.append(stream.push(index))
            if stream.is_stopped:
                break
        emitted.append(stream.finish())
        assert "".join(emitted) == stream.text == stopped(text, stops), (text, stops, pieces)
        assert stream.is_stopped == any(stop in text for stop in stops)
        assert "\ufffd" not in stream.text


def test_stream_never_splits_a_character(monkeypatch):
    model = scripted(monkeypatch, "a\u00e9 \U0001f600!")
    pieces = list(model.stream("a"))
    assert pieces == ["\u00e9", " ", "\U0001f600", "!"]
    # Cut in the middle of the character: what cannot be text is shown as such, once, at the end.
    assert list(model.stream("a", max_new_tokens=5)) == ["\u00e9", " ", "\ufffd"]


def test_stream_gives_what_generate_gives():
    model = writer()
    for options in ({"seed": 1}, {"seed": 2, "stop": ["a", "\u00e9"]}, {"temperature": 0}):
        options = {"max_new_tokens": 40, **options}
        pieces = list(model.stream("hello", **options))
        assert "".join(pieces) == model.generate("hello", **options) and all(pieces) and len(pieces) > 1


def test_stream_leaves_the_callers_mode_alone_and_may_be_left_early():
    model = writer()
    pieces = model.stream("hello", max_new_tokens=50, seed=0)
    next(pieces)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    pieces.close()
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    assert not any(p.is_inference() for p in model.module.parameters())


def test_stream_refuses_wrong_options_at_once():
    with pytest.raises(ValueError, match="temperature is -1"):
        writer().stream("hello", temperature=-1)


# -- past the window ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
def test_generating_past_the_window_works_and_warns_once(positions):
    model = writer(positional_encoding=positions, max_length=24)
    model.module.lm_head.weight.data[model.tokenizer.eos_id] = 0  # so that it hardly ends
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate("x" * 10, max_new_tokens=15, temperature=0)
    # 256 positions is where the rotary tables must grow.
    with pytest.warns(UserWarning, match="up to 289 tokens .* windows of 24") as caught:
        text = model.generate("x" * 250, max_new_tokens=40, temperature=0)
    assert len(caught) == 1 and text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.generate_batch(["x" * 250], max_new_tokens=40, temperature=0) == [text]


def test_past_the_window_still_equals_the_whole_pass():
    model = writer(max_length=8)
    # Only ASCII has logits other than 0, so that the text says which tokens were drawn.
    model.module.lm_head.weight.data[:2] = model.module.lm_head.weight.data[130:] = 0
    with pytest.warns(UserWarning, match="windows of 8"):
        text = model.generate("abc", max_new_tokens=20, temperature=0)
    ids = model.tokenizer.encode("abc" + text)
    with torch.no_grad():
        best = model.module(torch.tensor([ids]))[0].argmax(-1)
    assert len(ids) == 23 and best[2:-1].tolist() == ids[3:]


# -- wrong calls ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda m: m.generate_batch("hello"), ValueError, "prompts is one str; pass a list of prompts, or call generate"),
        (lambda m: m.generate(["hello"]), ValueError, "generate.*: prompt 0 is a list; it must be a str"),
        (lambda m: m.generate_batch(["hello", b"x"]), ValueError, "prompt 1 is a bytes; it must be a str"),
        (lambda m: m.generate("hello", seed=1.5), ValueError, "seed is 1.5; it must be a whole number of at least 0"),
        (
            lambda m: m.generate_batch(["a", "b"], seed=[1]),
            ValueError,
            "seed has 1 values for 2 prompts; pass one for all, or one for each",
        ),
        (lambda m: m.generate("hello", max_tokens=3), TypeError, "has no option 'max_tokens'; did you mean 'max_new_tokens'"),
        (lambda m: m.generate("\ud800"), ValueError, "lone surrogate"),
        (lambda m: psannLM(vocab_size=9).generate("x"), ValueError, "no tokenizer yet; call fit first"),
    ],
)
def test_wrong_calls(call, kind, message):
    with pytest.raises(kind, match=message):
        call(writer())


# -- sizes and ids --------------------------------------------------------------------------------------------------------------


def test_a_text_that_memory_cannot_hold_is_refused_with_what_would_fit(monkeypatch):
    model = writer()
    monkeypatch.setattr(engine, "available_bytes", lambda device: 1 << 20)
    per_token = cache_module.bytes_per_token(model.module)
    fits = int((1 << 20) * 0.8) // per_token // 16 * 16
    for call in (model.generate, model.stream):  # stream at once, not at its first piece
        with pytest.raises(ValueError, match=f"max_new_tokens is {10**12} after a prompt of 5 tokens") as caught:
            call("hello", max_new_tokens=10**12)
        assert f"memory has room for {fits}; pass max_new_tokens of at most {fits - 4}" in str(caught.value)
    model.stream("hello", max_new_tokens=fits - 4)
    with pytest.raises(ValueError, match="shorten the prompt to less than"):
        model.generate("x" * (fits + 1))


def test_a_large_limit_costs_no_memory_until_it_is_used(monkeypatch):
    model = scripted(monkeypatch, "0123456789")
    held = []
    view = PagedCache.view
    monkeypatch.setattr(PagedCache, "view", lambda self, work: (view(self, work), held.append(self.bytes_held))[0])
    assert model.generate("0", max_new_tokens=1_000_000) == "123456789"
    assert 0 < max(held) < 1 << 16


def test_ids_that_the_model_does_not_know_are_refused_by_name():
    model = writer()
    module = model.module
    size = module.config.vocab_size
    for bad in (size, -1):
        with pytest.raises(ValueError, match=f"input_ids holds {bad}, but the model's vocab_size is {size}"):
            module(torch.tensor([[0, bad, 1]]))
        with pytest.raises(ValueError, match=f"the prompt holds token id {bad}, but the model's vocab_size is {size}"):
            engine.check_ids([0, bad, 1], size)
    model.tokenizer = train_tokenizer("simple", ["\u4e00\u4e01\u4e02"])  # three more ids than the model has
    with pytest.raises(ValueError, match=f"token id {size + 2}, .* use the tokenizer that the model was trained with"):
        model.generate("\u4e02")


def test_slopes_are_built_once(monkeypatch):
    built = []
    slopes = layers.alibi_slopes
    monkeypatch.setattr(layers, "alibi_slopes", lambda heads: built.append(heads) or slopes(heads))
    model = writer(positional_encoding="alibi")
    model.generate("hello", max_new_tokens=8, temperature=0)
    model.module(torch.tensor([[1, 2]])).sum().backward()
    assert built == [2, 2], "once for each of the two layers"
