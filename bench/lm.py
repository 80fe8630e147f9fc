"""Section lm: tokens a second of training and of decoding, both bases, per backend; "torch" is the same model in plain torch.

A training step is loss, backward, clipping and fused AdamW, under bf16 autocast on a GPU and in float32 on a CPU; "compiled" has
the loss under torch.compile, "graphs" forward and backward as a CUDA graph. `mfu` is 6 FLOP a parameter and token over the matmul
rate measured in the same process, `extra_mb` what a step holds at most beyond weights and optimizer state (a graph keeps its
memory, so it has no such figure). Decoding is the engine's whole run over random prompts at temperature 0, prompts included in its
time and not in its tokens. Before the times each backend's logits are judged by the three witnesses.
"""

from __future__ import annotations

import copy
import functools
import random
from dataclasses import dataclass
from typing import Any, Callable, Iterator

import torch
from psann_kernels import BackendError
from torch import Tensor, nn

from psann_fast import ModelConfig, TrainConfig
from psann_fast.cuda_graphs import CUDACapture
from psann_fast.generate.engine import Request, run
from psann_fast.generate.sampling import SamplingParams
from psann_fast.generate.text import TextStream
from psann_fast.models import build_model
from psann_fast.train.graphs import StepGraphs
from psann_fast.train.loss import LossModule
from psann_fast.train.optim import build_optimizers
from psann_fast.train.precision import autocast
from psann_fast.train.speed import utilization

from . import check, suite
from .ops import BACKENDS, Bench
from .timing import CPUTimer, Times, extra_bytes

BASES = ("respsann", "waveresnet")
NO_END = -1  # an id that is never drawn, so that every text has its full length


@dataclass(frozen=True)
class Size:
    """d_model, layers, heads, vocabulary; a training batch of rows x tokens; texts written at once, their prompt and new tokens."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    rows: int
    tokens: int
    texts: int
    prompt: int
    new_tokens: int


SIZES = {
    "tiny": {"tiny": Size(32, 2, 2, 64, 2, 16, 2, 4, 4)},
    "cpu": {"5M": Size(256, 4, 4, 4096, 4, 256, 8, 32, 64)},
    "gpu": {"124M": Size(768, 12, 12, 50304, 16, 1024, 32, 128, 128), "350M": Size(1024, 24, 16, 50304, 8, 2048, 32, 128, 128)},
}


def lm_section(bench: Bench) -> Iterator[suite.Case]:
    for name, size in SIZES[bench.size].items():
        for base in BASES:
            for what, measure in (("train", train_rows), ("decode", decode_rows)):
                case = f"lm {base} {name} {what}"
                if bench.only in case:
                    yield case, functools.partial(measure, bench, base, name, size)


def made(base: str, size: Size, backend: str, device: torch.device) -> nn.Module:
    """The model; its weights are the same for every backend."""
    torch.manual_seed(0)
    config = ModelConfig(
        base=base,
        d_model=size.width,
        n_layers=size.layers,
        n_heads=size.heads,
        vocab_size=size.vocabulary,
        backend=backend,
        max_length=size.tokens,
    )
    return build_model(config).to(device).eval()


def amp_of(device: torch.device) -> torch.dtype | None:
    return torch.bfloat16 if device.type == "cuda" else None


def drawn(size: Size, device: torch.device, rows: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(size.vocabulary, (rows, tokens + 1), generator=generator).to(device)


def right_models(bench: Bench, base: str, size: Size, head: suite.Row) -> tuple[dict[str, nn.Module], list[suite.Row]]:
    """({backend: model} whose logits hold, rows about the others)."""
    device, rows = bench.device, []
    ids = drawn(size, device, 2, min(size.tokens, 256))[:, :-1]
    models: dict[str, nn.Module] = {}

    def logits(model: nn.Module, dtype: torch.dtype | None) -> Tensor:
        with torch.no_grad(), autocast(dtype, device):
            return model(ids)

    plain_model = made(base, size, "torch", device)
    plain = logits(plain_model, amp_of(device))
    truth = logits(plain_model.double(), None)
    del plain_model
    for backend in BACKENDS:
        try:
            model = made(base, size, backend, device)
            wrong, _ = check.compare([logits(model, amp_of(device))], [plain], [truth])
        except BackendError as error:
            rows.append({**head, "backend": backend, "refused": str(error)})
        except suite.VARIANT_FAILURES as error:
            suite.raise_if_lost(error)
            rows.append({**head, "backend": backend, "failed": suite.describe(error)})
        else:
            if wrong is None:
                models[backend] = model
            else:
                rows.append({**head, "backend": backend, "wrong": f"logits: {wrong}"})
    return models, rows


def train_rows(bench: Bench, base: str, name: str, size: Size) -> list[suite.Row]:
    head = {
        "model": base,
        "size": name,
        "what": "train",
        "shape": f"{size.rows}x{size.tokens}",
        "dtype": "bf16 autocast" if amp_of(bench.device) else "float32",
    }
    models, rows = right_models(bench, base, size, head)
    batch = drawn(size, bench.device, size.rows, size.tokens)
    steps = {backend: step_of(model.train(), batch, bench.device) for backend, model in models.items()}
    fastest = next(iter(models), None)  # in the order of auto
    for backend in dict.fromkeys(name for name in (fastest, "torch") if bench.has_compile and name in models):
        models[f"{backend} compiled"] = model = copy.deepcopy(models[backend])
        steps[f"{backend} compiled"] = step_of(model, batch, bench.device, is_compiled=True)
    if bench.device.type == "cuda" and fastest is not None:
        models[f"{fastest} graphs"] = model = copy.deepcopy(models[fastest])
        steps[f"{fastest} graphs"] = graphed_step_of(model, batch, bench.device)
    made_rows = raced(bench, head, models, steps, size.rows * size.tokens)
    for row in made_rows:
        if "tokens_per_s" in row:
            backend = row["backend"]
            row["mfu"] = utilization(row["tokens_per_s"], models[backend], amp_of(bench.device))
            is_known = bench.device.type == "cuda" and not backend.endswith("graphs")
            row["extra_mb"] = extra_bytes(steps[backend]) / 1e6 if is_known else None
    return rows + made_rows


def graphed_step_of(model: nn.Module, batch: Tensor, device: torch.device) -> Callable[[], None]:
    """As step_of, forward and backward as a CUDA graph."""
    loss_module = LossModule(model)
    optimizers = build_optimizers(model, TrainConfig(lr=1e-4, optimizer="adamw"))
    inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def micro_batch(ids: Tensor, targets: Tensor, starts: Tensor | None, count: int | Tensor) -> Tensor:
        with autocast(amp_of(device), device):
            loss = loss_module(ids, targets, starts) / count
        loss.backward()
        return loss.detach()

    graphs = StepGraphs(micro_batch, list(model.parameters()), len(inputs), CUDACapture(device))

    def step() -> None:
        graphs.step([(inputs, targets, None)], targets.numel())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()

    return step


def step_of(model: nn.Module, batch: Tensor, device: torch.device, is_compiled: bool = False) -> Callable[[], None]:
    loss_module = LossModule(model)
    if is_compiled:
        loss_module.compile(dynamic=False)
    optimizers = build_optimizers(model, TrainConfig(lr=1e-4, optimizer="adamw"))
    inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def step() -> None:
        with autocast(amp_of(device), device):
            loss = loss_module(inputs, targets) / targets.numel()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def decode_rows(bench: Bench, base: str, name: str, size: Size) -> list[suite.Row]:
    dtype = amp_of(bench.device) or torch.float32
    head = {
        "model": base,
        "size": name,
        "what": "decode",
        "shape": f"{size.texts} texts, {size.prompt} + {size.new_tokens} tokens",
        "dtype": str(dtype).removeprefix("torch."),
    }
    models, rows = right_models(bench, base, size, head)
    choose = random.Random(0)
    prompts = [[choose.randrange(size.vocabulary) for _ in range(size.prompt)] for _ in range(size.texts)]
    runs = {backend: functools.partial(write, model.to(dtype), prompts, size) for backend, model in models.items()}
    return rows + raced(bench, head, models, runs, size.texts * size.new_tokens)


def write(model: nn.Module, prompts: list[list[int]], size: Size) -> None:
    requests = [
        Request(
            i, list(prompt), SamplingParams(max_new_tokens=size.new_tokens, temperature=0.0, seed=i), TextStream(lambda ids: b"x")
        )
        for i, prompt in enumerate(prompts)
    ]
    for _ in run(model, requests, NO_END, size.vocabulary):
        pass
    short = [r.index for r in requests if len(r.tokens) != r.prompt_length + size.new_tokens]
    if short:
        raise RuntimeError(f"texts {short} ended before {size.new_tokens} tokens, so tokens a second would be too high")


def raced(
    bench: Bench, head: suite.Row, models: dict[str, nn.Module], runs: dict[str, Callable[[], Any]], tokens: int
) -> list[suite.Row]:
    """Rows of whole runs by the wall clock, in turns; the device is waited for."""

    def waited(call: Callable[[], Any]) -> Callable[[], None]:
        def timed() -> None:
            call()
            if bench.device.type == "cuda":
                torch.cuda.synchronize()

        return timed

    failed, racing = [], {}
    for backend, call in runs.items():
        try:
            waited(call)()
        except suite.VARIANT_FAILURES as error:
            suite.raise_if_lost(error)
            failed.append({**head, "backend": backend, "failed": suite.describe(error)})
        else:
            racing[backend] = [lambda call=call: waited(call)]
    times: dict[str, Times] = CPUTimer(bench.timer.rounds, patience=30.0).race(racing)
    parameters = {backend: sum(p.numel() for p in models[backend].parameters()) for backend in racing}
    return failed + [
        {
            **head,
            "backend": backend,
            "parameters": parameters[backend],
            "tokens_per_s": tokens / t.median(),
            "p10_tokens_per_s": tokens / t.percentile(90),
            "p90_tokens_per_s": tokens / t.percentile(10),
            "median_ms": t.median() * 1e3,
            "rounds": len(t.seconds),
            "times_torch": times["torch"].median() / t.median() if "torch" in times and backend != "torch" else None,
        }
        for backend, t in times.items()
    ]
