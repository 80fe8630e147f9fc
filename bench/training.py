"""Training on a CPU beside psannlm 2.0.1's own trainer, and beside what the machine's matrix products allow.

    python -m bench.training [--steps 8] [--bases respsann waveresnet] [--amp bf16 fp32] [--optimizers adamw muon] [--out FILE]

d_model 512, 8 layers, 8 heads, 4096 token ids, windows of 256, 2048 tokens a step: the same random letters, a token each. Each
trainer runs in a process of its own: psannlm's `fit` as it ships, ours with the library's defaults but for the optimizer, which is
theirs, AdamW, unless another is asked for (Muon, ours, does more in a step and needs fewer of them). Rates are tokens over the time
of the steps after the first two. "share" is 6 FLOP per parameter and token over the rate of a square product of the same dtype,
measured in the same process before and after, the better of both. Peak memory is the process's largest resident set, torch
included.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from psann_fast.train.precision import resolve_amp
from torch.optim.optimizer import register_optimizer_step_post_hook

from .conditions import RESULTS, conditions, table, write_results

SHAPE = dict(d_model=512, n_layers=8, n_heads=8)
VOCABULARY, WINDOW, ROWS = 4096, 256, 8
WARMUP_STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps timed (default 8)")
    parser.add_argument("--bases", nargs="+", default=["respsann", "waveresnet"])
    parser.add_argument("--amp", nargs="+", default=["auto"], help="ours: auto, bf16, fp32 (default auto)")
    parser.add_argument("--optimizers", nargs="+", default=["adamw"], help="ours: adamw, muon (default adamw, which psannlm takes)")
    parser.add_argument("--out", type=Path, default=RESULTS / "training.jsonl")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print("RESULT " + json.dumps(run(json.loads(options.case))))
        return
    cases = [
        {"trainer": "psann-fast", "base": base, "amp": amp, "optimizer": optimizer}
        for base in options.bases for amp in options.amp for optimizer in options.optimizers
    ]  # fmt: skip
    if importlib.util.find_spec("psannlm") is not None:
        cases.append({"trainer": "psannlm", "base": "respsann", "amp": "as it ships", "optimizer": "adamw"})
    else:
        print("psannlm is not installed; skipped")
    rows = [in_a_process({**case, "steps": options.steps}) for case in cases]
    theirs = [row["tokens_per_second"] for row in rows if row["trainer"] == "psannlm"]
    for row in rows:
        row["times_psannlm"] = row["tokens_per_second"] / theirs[0] if theirs else float("nan")
    write_results(options.out, rows)
    print(f"\n{conditions()}\n")
    print(table(rows))


def in_a_process(case: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.training", "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not found:
        raise SystemExit(f"{case}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    print(found[-1], flush=True)
    return json.loads(found[-1].removeprefix("RESULT "))


def run(case: dict[str, Any]) -> dict[str, Any]:
    amp = resolve_amp(case["amp"], torch.device("cpu")) if case["trainer"] == "psann-fast" else None
    dtype = amp or torch.float32
    rate = product_rate(dtype)
    steps = case["steps"] + WARMUP_STEPS
    seconds, parameters = (run_ours if case["trainer"] == "psann-fast" else run_theirs)(case, steps)
    # On a shared machine one moment may be slow: the better of before and after.
    rate = max(rate, product_rate(dtype))
    tokens_per_second = WINDOW * ROWS / statistics.median(seconds[WARMUP_STEPS:])
    return {
        "trainer": case["trainer"],
        "base": case["base"],
        "amp": case["amp"],
        "optimizer": case["optimizer"],
        "tokens_per_second": tokens_per_second,
        "share": tokens_per_second * 6 * parameters / rate,
        "product_dtype": str(dtype).removeprefix("torch."),
        "product_gflops": rate / 1e9,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "parameters": parameters,
        "steps": case["steps"],
    }


def product_rate(dtype: torch.dtype, size: int = 1536) -> float:
    """FLOP/s of a square product, the best of a few."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def text(steps: int) -> str:
    """Random letters, a token each for both libraries' character tokenizers, enough for the steps and what packing leaves over."""
    draws = np.random.default_rng(0).integers(97, 123, (steps + 1) * WINDOW * ROWS, dtype=np.uint8)
    return draws.tobytes().decode("ascii")


def run_ours(case: dict[str, Any], steps: int) -> tuple[list[float], int]:
    """Seconds of each step, and parameters."""
    from psann_fast import psannLM, psannLMDataPrep
    from psann_fast.train import trainer

    data = psannLMDataPrep([text(steps)], tokenizer="simple", max_length=WINDOW)
    model = psannLM(base=case["base"], vocab_size=VOCABULARY, device="cpu", **SHAPE)
    seconds: list[float] = []
    real = trainer._Training._step

    def timed(self: Any, step: Any) -> None:
        began = time.perf_counter()
        real(self, step)
        seconds.append(time.perf_counter() - began)

    trainer._Training._step = timed
    model.fit(data, max_steps=steps, batch_tokens=WINDOW * ROWS, amp=case["amp"], optimizer=case["optimizer"], progress=False)
    return seconds, model.module.num_parameters()


def run_theirs(case: dict[str, Any], steps: int) -> tuple[list[float], int]:
    import psannlm

    data = psannlm.psannLMDataPrep([text(steps)], tokenizer="simple", max_length=WINDOW, pack_sequences=True)
    model = psannlm.psannLM(base=case["base"], vocab_size=VOCABULARY, **SHAPE)
    seconds: list[float] = []
    last = [time.perf_counter()]

    def after_step(*_: Any) -> None:
        now = time.perf_counter()
        seconds.append(now - last[0])
        last[0] = now
        if len(seconds) == steps:
            raise EnoughSteps

    register_optimizer_step_post_hook(after_step)
    try:
        model.fit(data, epochs=1, batch_tokens=WINDOW * ROWS, lr=1e-3)
    except EnoughSteps:
        pass
    return seconds, sum(p.numel() for p in model._model.parameters())


class EnoughSteps(Exception):
    """The steps that are timed have been taken."""


if __name__ == "__main__":
    main()
