"""Writing text on a CPU, beside psannlm 2.0.1 and a transformers Llama of the same size, in one run.

    python -m bench.generation [--rounds 3] [--threads 2] [--new-tokens 512] [--json FILE]

The model: respsann, d_model 512, 8 layers, 8 heads, 4096 token ids, random weights that psannlm's model shares; the Llama has as
many (intermediate size 1365). All draw at temperature 1 with top-p 0.9 and write to the end of their limit. Tokens per second
count new tokens over the whole call, prompt included. psannlm's `generate`, which has no cache and slows down as it writes, and
its ragged batch run in the first round only.

`of_bound` is the share of the bound for one text: memory read bandwidth of this run (the best of several reads of 256 MB) over the
bytes of weights that a token needs. `psannlm` and `transformers` are skipped, saying so, where they are not installed.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import random
import resource
import statistics
import sys
import threading
import time
import warnings
from typing import Any, Callable

import torch
from psann_fast import psannLM
from psann_fast.generate.engine import Engine, Request, run
from psann_fast.generate.native_decoder import prepared, refuses
from psann_fast.generate.options import WEIGHTS, EngineOptions
from psann_fast.generate.sampling import SamplingParams
from psann_fast.generate.text import TextStream

from .conditions import RESULTS, conditions, table, write_results

VOCABULARY, NO_END = 4096, -1
PROMPT = 32
BATCH, BATCH_TOKENS = 32, 64
FIRST_ROUND_ONLY = ("psannlm generate", "psannlm ragged")  # they take a minute


class Ids:
    """The tokenizer of all contenders: a text is its ids."""

    eos_id, vocab_size = VOCABULARY - 1, VOCABULARY

    def encode(self, text: str, add_specials: bool = False) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], skip_specials: bool = True) -> str:
        return " ".join(map(str, ids))


def prompts(lengths: list[int]) -> list[list[int]]:
    choose = random.Random(0)
    return [[choose.randrange(VOCABULARY - 1) for _ in range(length)] for length in lengths]


def read_bandwidth() -> float:
    """Bytes per second: the best of ten reads of 256 MB."""
    source = torch.ones(1 << 26)
    best = 0.0
    for _ in range(10):
        began = time.perf_counter()
        source.sum()
        best = max(best, source.numel() * 4 / (time.perf_counter() - began))
    return best


def ours(module: torch.nn.Module, texts: list[list[int]], new_tokens: int, weights: str) -> int:
    """Tokens written."""
    requests = [
        Request(i, list(text), SamplingParams(max_new_tokens=new_tokens, seed=i), TextStream(lambda ids: b"x"))
        for i, text in enumerate(texts)
    ]
    for _ in run(module, requests, NO_END, VOCABULARY, EngineOptions(weights=weights)):
        pass
    return sum(len(request.tokens) - request.prompt_length for request in requests)


def psannlm_model() -> Any:
    import psannlm
    from psannlm.architectures import LMArchitectureConfig, LMConfig, build_lm_model

    config = LMConfig(
        architecture=LMArchitectureConfig._residual(), d_model=512, n_layers=8, n_heads=8, vocab_size=VOCABULARY,
        positional_encoding="rope",
    )  # fmt: skip
    model = psannlm.PSANNLM(config=config, device="cpu")
    model._model = build_lm_model(config).model.eval()
    return model


def llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1365, num_hidden_layers=8, num_attention_heads=8, vocab_size=VOCABULARY,
        eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def llama_writes(model: torch.nn.Module, texts: list[list[int]], new_tokens: int) -> int:
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_p=0.9,
        top_k=0,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
    )
    return out[:, longest:].numel()


def race(rounds: int, contenders: dict[str, Callable[[], int]]) -> dict[str, list[float]]:
    """Tokens per second of each, `rounds` times in turns."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, write in contenders.items():
            if number > 0 and name in FIRST_ROUND_ONLY:
                continue
            began = time.perf_counter()
            tokens = write()
            found[name].append(tokens / (time.perf_counter() - began))
    return found


def peak_growth(work: Callable[[], Any]) -> tuple[float, Any]:
    """Bytes by which the resident memory exceeded, at most, what it was before; and what `work` returned."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would serve the work unseen
    page = resource.getpagesize()
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * page  # noqa: E731 (two uses)
    before, highest, is_done = resident(), [0], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.002):
            highest[0] = max(highest[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = work()
    is_done.set()
    watcher.join()
    return max(highest[0], resident()) - before, result


def long_prompts(module: torch.nn.Module, row: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """Time to the first token beside one pass over the whole prompt, and memory beyond the cache's own."""
    from psann_fast.generate.cache import bytes_per_token

    rows = []
    for length in (1024, 8192):
        (text,) = prompts([length])
        ours(module, prompts([64]), 1, "model")
        growth, seconds = peak_growth(lambda: timed(lambda: ours(module, [text], 1, "model")))
        with torch.inference_mode():
            whole = timed(lambda: module.lm_head(module.hidden(torch.tensor([text]))[:, -1]))
        cache = bytes_per_token(module) * length
        rows.append(
            row(
                f"prompt of {length}",
                "psann-fast model",
                1 / seconds,
                times_one_pass=seconds / whole,
                beyond_cache_mb=(growth - cache) / 2**20,
            )
        )
    return rows


def shared_prefix(module: torch.nn.Module, row: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """64 requests of 8 new tokens whose prompts have 2048 tokens in common and 4 of their own."""
    (prefix,), own = prompts([2048]), prompts([4] * 64)
    engine = Engine(module, NO_END, VOCABULARY, cache_tokens=1 << 13)
    for i, text in enumerate(own):
        engine.add(Request(i, prefix + text, SamplingParams(max_new_tokens=8, seed=i), TextStream(lambda ids: b"x")))
    began = time.perf_counter()
    while engine.has_work:
        engine.step()
    rate = engine.counts["drawn_tokens"] / (time.perf_counter() - began)
    return row("64 prompts, 2048 tokens in common", "psann-fast model", rate, computed_tokens=engine.counts["computed_tokens"])


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--json", default=str(RESULTS / "generation.jsonl"), help="where the rows go, JSON lines")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore", UserWarning)
    has = {name: importlib.util.find_spec(name) is not None for name in ("psannlm", "transformers")}
    for name in (name for name, is_there in has.items() if not is_there):
        print(f"{name} is not installed: its rows are skipped")
    theirs = psannlm_model() if has["psannlm"] else None
    if theirs is not None:
        module = psannLM.from_psannlm(theirs, device="cpu").module
        theirs._tokenizer = Ids()
    else:
        module = psannLM(base="respsann", d_model=512, n_layers=8, n_heads=8, vocab_size=VOCABULARY, device="cpu").module
    peer = llama() if has["transformers"] else None
    bandwidth = read_bandwidth()

    def row(case: str, contender: str, rate: float, **more: Any) -> dict[str, Any]:
        columns = dict(
            spread="",
            of_bound="",
            times_psannlm="",
            times_transformers="",
            times_one_pass="",
            beyond_cache_mb="",
            computed_tokens="",
        )
        return {"case": case, "contender": contender, "tokens_per_s": rate, **columns, **more}

    def rows_of(case: str, found: dict[str, list[float]], bound: bool) -> list[dict[str, Any]]:
        median = {name: statistics.median(rates) for name, rates in found.items()}
        made = []
        for name, rates in found.items():
            more: dict[str, Any] = {"spread": max(rates) - min(rates)}
            if name.startswith("psann-fast"):
                more |= {f"times_{k}": median[name] / median[k] for k in ("transformers",) if k in median}
                ratios = {k: median[name] / v for k, v in median.items() if k.startswith("psannlm")}
                more["times_psannlm"] = ", ".join(f"{v:.1f} ({k.removeprefix('psannlm ')})" for k, v in ratios.items())
                weights = name.removeprefix("psann-fast ")
                if bound and refuses(module) is None:
                    more["of_bound"] = median[name] * prepared(module, weights).bytes_read / bandwidth
            made.append(row(case, name, median[name], **more))
        return made

    (one,) = prompts([PROMPT])
    as_text = lambda ids: " ".join(map(str, ids))  # noqa: E731 (three uses)
    single: dict[str, Callable[[], int]] = {
        f"psann-fast {w}": (lambda w=w: ours(module, [one], options.new_tokens, w))
        for w in (WEIGHTS if refuses(module) is None else ("model",))
    }
    if theirs is not None:
        single["psannlm generate"] = lambda: len(theirs.generate(as_text(one), max_new_tokens=options.new_tokens).split())
        single["psannlm generate_batch"] = lambda: len(
            theirs.generate_batch([as_text(one)], max_new_tokens=options.new_tokens)[0].split()
        )
    if peer is not None:
        single["transformers"] = lambda: llama_writes(peer, [one], options.new_tokens)
    for weights in WEIGHTS if refuses(module) is None else ("model",):  # rounded once per model
        ours(module, [one], 4, weights)
    found = rows_of(f"1 prompt of {PROMPT}, {options.new_tokens} new", race(options.rounds, single), bound=True)

    ragged, equal = prompts([random.Random(i).randint(5, 60) for i in range(BATCH)]), prompts([PROMPT] * BATCH)
    many: dict[str, Callable[[], int]] = {
        f"psann-fast {w}": (lambda w=w: ours(module, ragged, BATCH_TOKENS, w))
        for w in (WEIGHTS if refuses(module) is None else ("model",))
    }
    if theirs is not None:
        count = lambda texts: sum(len(text.split()) for text in texts)  # noqa: E731 (two uses)
        many["psannlm ragged"] = lambda: count(theirs.generate_batch([as_text(t) for t in ragged], max_new_tokens=BATCH_TOKENS))
        many["psannlm equal"] = lambda: count(theirs.generate_batch([as_text(t) for t in equal], max_new_tokens=BATCH_TOKENS))
    if peer is not None:
        many["transformers"] = lambda: llama_writes(peer, ragged, BATCH_TOKENS)
    ours(module, ragged, 4, "model")
    found += rows_of(f"{BATCH} ragged prompts, {BATCH_TOKENS} new", race(options.rounds, many), bound=False)
    found += [*long_prompts(module, row), shared_prefix(module, row)]

    print(json.dumps(conditions(), indent=1))
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s")
    print(table(found))
    write_results(options.json, [{"read_gb_per_s": bandwidth / 1e9}, *found])


if __name__ == "__main__":
    main()
