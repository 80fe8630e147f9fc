"""Section decoding: steps in which every text adds one token, with and without CUDA graphs, beside transformers' generate.

Each row is a number of texts over one engine that has captured what it needs. `step_ms` is the median of whole steps by the wall
clock, each of which ends with its tokens on the host; `of_bound` is the least time in which the device could read what a step reads
(every matrix once, and each text's keys and values), over that. The bandwidth is the best of several reads of a large tensor, in
the same run. The Llama has as many layers and heads, and parameters within a few percent; its steps are the time of a long call
less that of a short one.
"""

from __future__ import annotations

import functools
import importlib.util
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any, Callable, Iterator

import torch
from psann_kernels import BackendError
from torch import nn

from psann_fast.generate.cache import bytes_per_token
from psann_fast.generate.engine import Engine, Request
from psann_fast.generate.options import EngineOptions
from psann_fast.generate.sampling import SamplingParams
from psann_fast.generate.text import TextStream

from . import suite
from .lm import BASES, NO_END, SIZES, Size, amp_of, made
from .ops import Bench


@dataclass(frozen=True)
class Load:
    """Texts at once, tokens of each prompt, tokens that each text adds while steps are timed; bytes of the tensor that is read."""

    texts: tuple[int, ...]
    prompt: int
    steps: int
    read_bytes: int


LOADS = {
    "tiny": Load((1, 3), 8, 12, 1 << 20), "cpu": Load((1, 8), 32, 64, 1 << 28), "gpu": Load((1, 8, 64), 512, 256, 1 << 31),
}  # fmt: skip
GRAPHS = {"cuda graphs": True, "eager": False}


def decoding_section(bench: Bench) -> Iterator[suite.Case]:
    """The largest model of the section lm."""
    name, size = list(SIZES[bench.size].items())[-1]
    load = LOADS[bench.size]
    for texts in load.texts:
        for base in BASES:
            for temperature in (0.0, 0.8):
                case = f"decoding {base} {name} {texts} texts temperature {temperature:g}"
                if bench.only in case:
                    yield case, functools.partial(our_rows, bench, base, name, size, load, texts, temperature)
        case = f"decoding transformers {name} {texts} texts"
        if bench.only in case:
            yield case, functools.partial(their_rows, bench, name, size, load, texts)


def read_rate(bench: Bench, size: int) -> float:
    """Bytes a second: the best of ten reads."""
    source = torch.ones(size // 4, device=bench.device)
    best = 0.0
    for _ in range(10):
        best = max(best, size / timed(bench, source.sum))
    return best


def timed(bench: Bench, call: Callable[[], Any]) -> float:
    """Seconds until the device is done."""
    wait(bench)
    began = time.perf_counter()
    call()
    wait(bench)
    return time.perf_counter() - began


def wait(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.synchronize()


def head_of(bench: Bench, model: str, name: str, load: Load, texts: int) -> suite.Row:
    dtype = str(amp_of(bench.device) or torch.float32).removeprefix("torch.")
    return {"model": model, "size": name, "texts": texts, "shape": f"{load.prompt} + {load.steps} tokens", "dtype": dtype}


def our_rows(bench: Bench, base: str, name: str, size: Size, load: Load, texts: int, temperature: float) -> list[suite.Row]:
    head = {**head_of(bench, base, name, load, texts), "temperature": temperature}
    rate, rows = read_rate(bench, load.read_bytes), []
    # Plain torch, whose attention reads lengths on the host, is told apart once.
    for backend in ("auto", "torch") if texts == 1 and temperature == 0 else ("auto",):
        module = made(base, size, backend, bench.device).to(amp_of(bench.device) or torch.float32)
        for how, graphs in GRAPHS.items():
            row = {**head, "backend": backend, "how": how}
            try:
                engine = Engine(
                    module, NO_END, size.vocabulary, cache_tokens=texts * (load.prompt + load.steps + 16), max_rows=texts,
                    options=EngineOptions(cuda_graphs=graphs),
                )  # fmt: skip
                seconds, firsts = steps_of(engine, size, load, temperature)
            except (BackendError, ValueError) as error:
                rows.append({**row, "refused": str(error)})
                continue
            except suite.VARIANT_FAILURES as error:
                suite.raise_if_lost(error)
                rows.append({**row, "failed": suite.describe(error)})
                continue
            rows.append({**row, **figures(module, load, texts, rate, statistics.median(seconds)), "first_token_s": firsts})
            del engine
    by_how = {(row["backend"], row["how"]): row["step_ms"] for row in rows if "step_ms" in row}
    for row in rows:
        if "step_ms" in row and ("auto", "eager") in by_how:
            row["times_eager"] = by_how["auto", "eager"] / row["step_ms"]
    return rows


def steps_of(engine: Engine, size: Size, load: Load, temperature: float) -> tuple[list[float], float]:
    """Seconds of each step that only decodes, the second time that the texts are asked for, and until all had a first token."""
    for _ in range(2):
        choose, seconds = random.Random(0), []
        for index in range(engine.scheduler.max_rows):
            prompt = [choose.randrange(size.vocabulary) for _ in range(load.prompt)]
            params = SamplingParams(max_new_tokens=load.steps, temperature=temperature, seed=index)
            engine.add(Request(index, prompt, params, TextStream(lambda ids: b"x")))
        began, first = time.perf_counter(), None
        while engine.has_work:
            is_decoding = all(len(s.tokens) > load.prompt for s in engine.scheduler.running) and not engine.scheduler.waiting
            if is_decoding and engine.scheduler.running and first is None:
                first = time.perf_counter() - began
            step_began = time.perf_counter()
            engine.step()
            if is_decoding and len(engine.scheduler.running) == engine.scheduler.max_rows:
                seconds.append(time.perf_counter() - step_began)
    return seconds, first


def figures(module: nn.Module, load: Load, texts: int, rate: float, seconds: float) -> suite.Row:
    """Rates and the share of the bound of a step of the middle of the texts."""
    weights = sum(p.numel() * p.element_size() for p in matrices(module))
    cached = bytes_per_token(module) * texts * (load.prompt + load.steps // 2)
    return {
        "step_ms": seconds * 1e3,
        "tokens_per_s": texts / seconds,
        "weight_mb": weights / 1e6,
        "cache_mb": cached / 1e6,
        "read_gb_per_s": rate / 1e9,
        "of_bound": (weights + cached) / rate / seconds,
    }


def matrices(module: nn.Module) -> list[nn.Parameter]:
    """What every step reads whole: all parameters, but of an embedding that is no output projection."""
    skipped = {id(module.embed.weight)} - {id(module.lm_head.weight)}
    return [p for p in module.parameters() if id(p) not in skipped]


def their_rows(bench: Bench, name: str, size: Size, load: Load, texts: int) -> list[suite.Row]:
    head = {**head_of(bench, "llama", name, load, texts), "temperature": 0.0, "backend": "transformers"}
    if importlib.util.find_spec("transformers") is None:
        return [{**head, "refused": "transformers is not installed; pip install transformers"}]
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype = amp_of(bench.device) or torch.float32
    config = LlamaConfig(
        hidden_size=size.width, intermediate_size=size.width * 8 // 3, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, vocab_size=size.vocabulary, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(bench.device, dtype).eval()
    ids = torch.randint(size.vocabulary, (texts, load.prompt), generator=torch.Generator().manual_seed(0)).to(bench.device)
    rate, rows = read_rate(bench, load.read_bytes), []
    for how, options in (("dynamic cache", {}), ("static cache, compiled", {"cache_implementation": "static"})):
        if options and not bench.has_compile:
            rows.append({**head, "how": how, "refused": "left out by --no-compile"})
            continue
        short = load.steps // 2

        def write(count: int, options: dict[str, Any] = options) -> None:
            with torch.inference_mode():
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, min_new_tokens=count, **options
                )

        try:
            for _ in range(2):  # the first time compiles
                seconds = (timed(bench, lambda: write(load.steps)) - timed(bench, lambda: write(short))) / (load.steps - short)
        except suite.VARIANT_FAILURES as error:
            suite.raise_if_lost(error)
            rows.append({**head, "how": how, "failed": suite.describe(error)})
            continue
        weights = sum(p.numel() * p.element_size() for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
        cached = 2 * size.layers * size.width * dtype.itemsize * texts * (load.prompt + load.steps * 3 // 4)
        rows.append(
            {
                **head, "how": how, "step_ms": seconds * 1e3, "tokens_per_s": texts / seconds, "weight_mb": weights / 1e6,
                "cache_mb": cached / 1e6, "read_gb_per_s": rate / 1e9, "of_bound": (weights + cached) / rate / seconds,
            }
        )  # fmt: skip
    return rows
