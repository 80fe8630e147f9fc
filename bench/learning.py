"""How well the bases learn: nanoGPT's CPU recipe on Shakespeare's characters.

    python -m bench.learning --data tinyshakespeare.txt [--nanogpt CHECKOUT] [--seeds 3]

4 layers, 4 heads, d_model 128, windows of 64 characters, 12 of them a step, 2000 steps, dropout 0, 100 steps of warmup; d_mlp 512,
or 448 for waveresnet, whose wave branch takes the difference; the rest are the library's defaults, and nanoGPT's are
its recipe's. Judged by nats per character over the whole validation part (the last tenth) in windows of 64.

The text is the corpus of char-rnn and nanoGPT, 1,115,394 bytes: data/tinyshakespeare/input.txt of the repository
karpathy/char-rnn. `--nanogpt` names a checkout of karpathy/nanoGPT, whose own model then runs beside ours with its recipe's
settings. `--share 0.5` asks what half of nanoGPT's wall time is good for: ours then take as many steps as fit into it. A
shared machine may be half as fast again a minute later, so how many that are comes from the median of ratios of pieces of both
trainings that take turns (`ratio`, our step's time over theirs), and nanoGPT runs once.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from psann_fast import psannLM, psannLMDataPrep, register_base
from psann_fast.config import ModelConfig
from psann_fast.models import LanguageModel
from psann_fast.models.respsann import ResPSANNBlock
from psann_fast.train import trainer
from torch import Tensor, nn
from torch.nn import functional as F

from .conditions import RESULTS, conditions, table, write_results

SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
WINDOW, ROWS, RATE, WARMUP = 64, 12, 1e-3, 100
PIECE, PIECES = 20, 15  # steps that are timed together, and how often the two take turns
SIZE = dict(n_layers=4, n_heads=4, d_model=128)
MODELS = {
    "respsann": dict(base="respsann", d_mlp=512),
    "waveresnet": dict(base="waveresnet", d_mlp=448),
    "respsann, frequency 1": dict(base="respsann", d_mlp=512, sine_params=dict(freq_init=1.0)),
    "GELU twin": dict(base="gelu-twin", d_mlp=512),
}


class GELUBlock(ResPSANNBlock):
    """The respsann block with GELU in place of the damped sine."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.mlp.act = nn.GELU()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, type=Path, help="tinyshakespeare.txt, 1,115,394 bytes")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT, to run its model beside ours")
    parser.add_argument("--seeds", type=int, default=3, help="seeds for each model (default 3)")
    parser.add_argument(
        "--steps", type=int, default=2000, help="optimizer steps (default 2000, the recipe's; fewer time the models)"
    )
    parser.add_argument(
        "--share", type=float, help="end ours within this share of nanoGPT's seconds instead of after its steps, for example 0.5"
    )
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--out", type=Path, default=RESULTS / "learning.jsonl")
    options = parser.parse_args()
    if options.share is not None and (options.nanogpt is None or not 0 < options.share <= 1):
        raise SystemExit(
            f"--share is {options.share}: it is a share of what --nanogpt takes, above 0 and at most 1, so both are needed"
        )
    text = read_corpus(options.data)
    register_base("gelu-twin", lambda config: LanguageModel(config, GELUBlock))

    rows, steps, ratios = [], dict.fromkeys(options.models, options.steps), {}
    for seed in range(options.seeds):
        if options.nanogpt is not None and (seed == 0 or options.share is None):
            rows.append(run_nanogpt(options.nanogpt, text, seed, options.steps))
            print(rows[-1], flush=True)
        if options.share is not None and seed == 0:
            for name in options.models:
                theirs = NanoGPT(options.nanogpt, text, seed, options.steps)
                steps[name], ratios[name] = steps_within(options.share * options.steps, name, theirs, text, seed)
        for name in options.models:
            row = run_ours(name, text, seed, steps[name])
            rows.append(row | ({"ratio": ratios[name]} if name in ratios else {}))
            print(rows[-1], flush=True)
    summary = summarise(rows)
    write_results(options.out, rows + summary)
    print(f"\n{conditions()}\n")
    print(table(summary))


def read_corpus(path: Path) -> str:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise SystemExit(
            f"{path} is not the tinyshakespeare corpus (sha256 {SHA256}); see the head of bench/learning.py for where to get it"
        )
    return content.decode()


def split(text: str) -> int:
    """Where validation begins: nanoGPT's own split. Held out here, because its loop has no validation either."""
    return int(0.9 * len(text))


def fit_ours(name: str, text: str, seed: int, steps: int) -> tuple[psannLM, psannLMDataPrep, float]:
    """Returns the model, its data and the seconds that `fit` took."""
    data = psannLMDataPrep([text[: split(text)]], tokenizer="simple", max_length=WINDOW, seed=seed)
    model = psannLM(**SIZE, **MODELS[name])
    examples_a_epoch = len(data) // ROWS
    began = time.perf_counter()
    model.fit(
        data, epochs=1 + steps // examples_a_epoch, max_steps=steps, batch_tokens=WINDOW * ROWS, warmup_steps=WARMUP, seed=seed
    )
    return model, data, time.perf_counter() - began


def steps_within(their_steps: float, name: str, theirs: NanoGPT, text: str, seed: int) -> tuple[int, float]:
    """How many steps of a model fit into the time of so many of theirs, and our step's time over theirs."""
    ours, other, step, last = [], [], trainer._Training._step, time.perf_counter()

    def timed(self: Any, data: Any) -> None:
        nonlocal last
        step(self, data)
        if self.at.step % PIECE:
            return
        ours.append(time.perf_counter() - last)
        began = time.perf_counter()
        for _ in range(PIECE):
            theirs.step()
        last = time.perf_counter()
        other.append(last - began)

    with mock.patch.object(trainer._Training, "_step", timed):
        seconds = fit_ours(name, text, seed, PIECE * PIECES)[2]
    around = seconds - sum(ours) - sum(other)  # what fit does before and after its steps
    ours, other = ours[1:], other[1:]  # the first call of everything is among the first piece
    ratio = statistics.median(mine / its for mine, its in zip(ours, other))
    steps = int((their_steps - around / (statistics.median(other) / PIECE)) / ratio)
    print(f"{name}: a step takes {ratio:.3f} of nanoGPT's, {around:.2f} s lie around them: {steps} steps", flush=True)
    if steps <= WARMUP:
        raise SystemExit(f"{name}: that time holds {steps} steps and {WARMUP} are warmup: raise --steps or --share")
    return steps, ratio


def run_ours(name: str, text: str, seed: int, steps: int) -> dict[str, Any]:
    model, data, seconds = fit_ours(name, text, seed, steps)
    characters = len(data.used_ids) - 1  # the separator is not one
    unused = data.vocab_size - characters
    return {
        "model": name,
        "seed": seed,
        "steps": steps,
        "nats_per_character": judge(model.module, torch.tensor(data.tokenizer.encode(text[split(text) :]))),
        "seconds": seconds,
        # Embedding and head rows of ids that no training character uses (bytes, separator, padding) are left out.
        "parameters": model.module.num_parameters() - 2 * unused * SIZE["d_model"],
    }


class NanoGPT:
    """nanoGPT's own model, trained as its recipe does."""

    def __init__(self, checkout: Path, text: str, seed: int, steps: int) -> None:
        spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
        theirs = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(theirs)
        number = {c: i for i, c in enumerate(sorted(set(text)))}
        ids = torch.tensor([number[c] for c in text])
        self.train, self.validation = ids[: split(text)], ids[split(text) :]
        torch.manual_seed(seed)
        self.model = theirs.GPT(
            theirs.GPTConfig(WINDOW, len(number), SIZE["n_layers"], SIZE["n_heads"], SIZE["d_model"], dropout=0.0, bias=False)
        )
        self.optimizer = self.model.configure_optimizers(0.1, RATE, (0.9, 0.99), "cpu")
        self.steps, self.taken = steps, 0

    def step(self) -> Tensor:
        """The loss () before it."""
        at = torch.randint(len(self.train) - WINDOW, (ROWS,))
        x, y = (torch.stack([self.train[i + shift : i + shift + WINDOW] for i in at]) for shift in (0, 1))
        cosine = 0.5 * (1 + math.cos(math.pi * (self.taken - WARMUP) / (self.steps - WARMUP)))
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * (self.taken + 1) / (WARMUP + 1) if self.taken < WARMUP else RATE * (0.1 + 0.9 * cosine)
        loss = self.model(x, y)[1]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.taken += 1
        return loss


def run_nanogpt(checkout: Path, text: str, seed: int, steps: int) -> dict[str, Any]:
    training = NanoGPT(checkout, text, seed, steps)
    began = time.perf_counter()
    for step in range(steps):
        loss = training.step()
        if step % 200 == 0:
            print(f"nanoGPT seed {seed}: step {step} loss {loss.item():.3f}", flush=True)
    seconds = time.perf_counter() - began
    model = training.model.eval()
    return {
        "model": "nanoGPT", "seed": seed, "steps": steps,
        "nats_per_character": judge(lambda windows: model(windows, windows)[0], training.validation), "seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


@torch.no_grad()
def judge(logits_of: Any, ids: Tensor) -> float:
    """Nats per character over all whole windows of `ids`, each judged alone."""
    count = (len(ids) - 1) // WINDOW
    inputs, targets = ids[: count * WINDOW].view(count, WINDOW), ids[1 : count * WINDOW + 1].view(count, WINDOW)
    total = sum(
        F.cross_entropy(logits_of(x).flatten(0, 1), y.flatten(), reduction="sum").item()
        for x, y in zip(inputs.split(128), targets.split(128))
    )
    return total / (count * WINDOW)


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    summary = []
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        losses = [row["nats_per_character"] for row in mine]
        summary.append({
            "model": name,
            "seeds": len(mine),
            "steps (median)": statistics.median(row["steps"] for row in mine),
            "mean": statistics.mean(losses),
            "worst": max(losses),
            "seconds (median)": statistics.median(row["seconds"] for row in mine),
            "parameters": mine[0]["parameters"],
        })  # fmt: skip
    return summary


if __name__ == "__main__":
    main()
