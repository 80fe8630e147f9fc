"""Writing text on a CPU, beside psannlm 2.0.1 and a transformers Llama of the same size, in one run.

    python -m bench.generation [--rounds 3] [--threads 2] [--new-tokens 512] [--cases one ragged ...] [--json FILE]

The model: respsann, d_model 512, 8 layers, 8 heads, 4096 token ids, random weights that psannlm's model shares; the Llama has as
many (intermediate size 1365). All draw at temperature 1 with top-p 0.9 and write to the end of their limit. Tokens per second
count new tokens over the whole call, prompt included. psannlm's `generate`, which has no cache and slows down as it writes, and
its ragged batch run in the first round only.

`of_bound` is the share of the bound for one text: memory read bandwidth of this run (the best of several reads of 256 MB) over the
bytes of weights that a token needs. `psannlm` and `transformers` are skipped, saying so, where they are not installed.

The file is written after each case. A run of the same commit, versions, threads and day goes on with the cases that it lacks.
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

from .conditions import RESULTS, conditions, kept_results, table, write_results

VOCABULARY, NO_END = 4096, -1
PROMPT = 32
BATCH, BATCH_TOKENS = 32, 64
CASES = ["one", "ragged", "long", "prefix", "guesses"]
PEERS = ("psannlm", "transformers")
COLUMNS = "spread read_gb_per_s of_bound times_psannlm times_transformers times_one_pass beyond_cache_mb computed_tokens".split()
GUESSES = (0, 4, 8)
Rows = list[dict[str, Any]]
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


def ours(
    module: torch.nn.Module, texts: list[list[int]], new_tokens: int, weights: str, temperature: float = 1.0, speculate: int = 0
) -> int:
    """Tokens written."""
    requests = [
        Request(
            i,
            list(text),
            SamplingParams(max_new_tokens=new_tokens, temperature=temperature, seed=i),
            TextStream(lambda ids: b"x"),
        )
        for i, text in enumerate(texts)
    ]
    for _ in run(module, requests, NO_END, VOCABULARY, EngineOptions(weights=weights, speculate=speculate)):
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


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Bench:
    """The cases: each measures the read bandwidth anew, races the contenders and returns its rows."""

    def __init__(self, rounds: int, new_tokens: int) -> None:
        self._rounds, self._new_tokens = rounds, new_tokens
        has = {name: importlib.util.find_spec(name) is not None for name in PEERS}
        for name in (name for name, is_there in has.items() if not is_there):
            print(f"{name} is not installed: its rows are skipped")
        self._theirs = psannlm_model() if has["psannlm"] else None
        if self._theirs is not None:
            self.module = psannLM.from_psannlm(self._theirs, device="cpu").module
            self._theirs._tokenizer = Ids()
        else:
            self.module = psannLM(base="respsann", d_model=512, n_layers=8, n_heads=8, vocab_size=VOCABULARY, device="cpu").module
        self._llama = llama() if has["transformers"] else None
        self._weights = WEIGHTS if refuses(self.module) is None else ("model",)

    def one(self) -> Rows:
        (text,) = prompts([PROMPT])
        contenders = self._contenders([text], self._new_tokens)
        if self._theirs is not None:
            theirs, ids = self._theirs, as_text(text)
            contenders["psannlm generate"] = lambda: len(theirs.generate(ids, max_new_tokens=self._new_tokens).split())
            contenders["psannlm generate_batch"] = lambda: count(theirs.generate_batch([ids], max_new_tokens=self._new_tokens))
        return self._rows(f"1 prompt of {PROMPT}, {self._new_tokens} new", contenders, has_bound=True)

    def ragged(self) -> Rows:
        ragged, equal = prompts([random.Random(i).randint(5, 60) for i in range(BATCH)]), prompts([PROMPT] * BATCH)
        contenders = self._contenders(ragged, BATCH_TOKENS)
        if self._theirs is not None:
            theirs = self._theirs
            for name, texts in (("ragged", ragged), ("equal", equal)):
                texts = list(map(as_text, texts))
                write = lambda texts=texts: count(theirs.generate_batch(texts, max_new_tokens=BATCH_TOKENS))  # noqa: E731
                contenders[f"psannlm {name}"] = write
        return self._rows(f"{BATCH} ragged prompts, {BATCH_TOKENS} new", contenders, has_bound=False)

    def long(self) -> Rows:
        """Time to the first token beside one pass over the whole prompt, and memory beyond the cache's own."""
        from psann_fast.generate.cache import bytes_per_token

        rows = []
        for length in (1024, 8192):
            (text,) = prompts([length])
            ours(self.module, prompts([64]), 1, "model")
            growth, seconds = peak_growth(lambda: timed(lambda: ours(self.module, [text], 1, "model")))
            with torch.inference_mode():
                whole = timed(lambda: self.module.lm_head(self.module.hidden(torch.tensor([text]))[:, -1]))
            beyond = (growth - bytes_per_token(self.module) * length) / 2**20
            more = dict(times_one_pass=seconds / whole, beyond_cache_mb=beyond)
            rows.append(row(f"prompt of {length}", "psann-fast model", 1 / seconds, **more))
        return rows

    def prefix(self) -> Rows:
        """64 requests of 8 new tokens whose prompts have 2048 tokens in common and 4 of their own."""
        (prefix,), own = prompts([2048]), prompts([4] * 64)
        engine = Engine(self.module, NO_END, VOCABULARY, cache_tokens=1 << 13)
        for i, text in enumerate(own):
            engine.add(Request(i, prefix + text, SamplingParams(max_new_tokens=8, seed=i), TextStream(lambda ids: b"x")))
        began = time.perf_counter()
        while engine.has_work:
            engine.step()
        rate, computed = engine.counts["drawn_tokens"] / (time.perf_counter() - began), engine.counts["computed_tokens"]
        return [row("64 prompts, 2048 tokens in common", "psann-fast model", rate, computed_tokens=computed)]

    def guesses(self) -> Rows:
        """With and without guesses: at temperature 0, where these weights soon repeat themselves, and at 1, where they do not."""
        (text,) = prompts([200])
        found = []
        for temperature in (0.0, 1.0):
            writers = {
                f"psann-fast speculate={n}": (lambda n=n: ours(self.module, [text], 256, "model", temperature, n)) for n in GUESSES
            }
            found += self._rows(f"1 prompt of 200, 256 new, temperature {temperature:g}", writers, has_bound=False)
        return found

    def _contenders(self, texts: list[list[int]], new_tokens: int) -> dict[str, Callable[[], int]]:
        made = {f"psann-fast {w}": (lambda w=w: ours(self.module, texts, new_tokens, w)) for w in self._weights}
        for weights in self._weights:  # rounded, and packed, once per model
            ours(self.module, texts, 4, weights)
        if self._llama is not None:
            made["transformers"] = lambda: llama_writes(self._llama, texts, new_tokens)
        return made

    def _rows(self, case: str, contenders: dict[str, Callable[[], int]], has_bound: bool) -> Rows:
        bandwidth = read_bandwidth()
        found = race(self._rounds, contenders)
        median = {name: statistics.median(rates) for name, rates in found.items()}
        made = []
        for name, rates in found.items():
            more: dict[str, Any] = {"spread": max(rates) - min(rates)}
            if name.startswith("psann-fast"):
                more |= {f"times_{k}": median[name] / median[k] for k in ("transformers",) if k in median}
                ratios = {k: median[name] / v for k, v in median.items() if k.startswith("psannlm")}
                more["times_psannlm"] = ", ".join(f"{v:.1f} ({k.removeprefix('psannlm ')})" for k, v in ratios.items())
                if has_bound and refuses(self.module) is None:
                    bytes_read = prepared(self.module, name.removeprefix("psann-fast ")).bytes_read
                    more |= {"of_bound": median[name] * bytes_read / bandwidth, "read_gb_per_s": bandwidth / 1e9}
            made.append(row(case, name, median[name], **more))
        return made


def row(case: str, contender: str, rate: float, **more: Any) -> dict[str, Any]:
    return {"case": case, "contender": contender, "tokens_per_s": rate, **dict.fromkeys(COLUMNS, ""), **more}


def as_text(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def count(texts: list[str]) -> int:
    return sum(len(text.split()) for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="default: all that the file lacks")
    parser.add_argument("--json", default=str(RESULTS / "generation.jsonl"), help="where the rows go, JSON lines")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore", UserWarning)
    found = kept_results(options.json, *PEERS)
    bench = Bench(options.rounds, options.new_tokens)
    for name in (name for name in options.cases if not any(held["group"] == name for held in found)):
        found += [{"group": name, **made} for made in getattr(bench, name)()]
        write_results(options.json, found, *PEERS)
    print(json.dumps(conditions(*PEERS), indent=1))
    print(table(found))


if __name__ == "__main__":
    main()
