"""What patch() gains in other people's models: `python -m bench.patch [--sections psannlm siren] [--rounds N]
[--json FILE]`.

Each variant takes one step a round, in turns, so that a noisy machine moves the ratios little. "removed" is the model whose
activation is the identity: what is left when the activation costs nothing, the limit for whoever replaces it alone. Before anything
is timed, the patched model must give the other's output. All is measured twice, without and with torch's own switch for huge pages
(THP_MEM_ALLOC_ENABLE=1), because page faults of large tensors take as long as the arithmetic.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any, Callable

import torch
from psann_fast.integrations.patch import patch
from torch import nn
from torch.nn import functional as F

from .conditions import conditions, table, write_results

TOLERANCE = 1e-5
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch reads it once, so each setting is a process


def race(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, `rounds` of them after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def rows(
    what: str, shape: str, step: str, variants: dict[str, Callable[[], None]], rounds: int, difference: float
) -> list[dict[str, Any]]:
    """One row a variant; the first is what users have today."""
    if not difference <= TOLERANCE:
        raise SystemExit(f"{what}: the patched model's output differs by {difference:.3g}, more than {TOLERANCE}; it is not timed")
    seconds = race(variants, rounds)
    first = next(iter(seconds))
    found = []
    for name, s in seconds.items():
        quarter = statistics.quantiles(s, n=4)
        found.append(
            {
                "model": what, "shape": shape, "step": step, "huge_pages": os.environ.get(HUGE_PAGES, "0"), "variant": name,
                "median_ms": statistics.median(s) * 1e3, "spread_ms": (quarter[2] - quarter[0]) * 1e3,
                "times_unpatched": statistics.median(seconds[first]) / statistics.median(s),
                "output_difference": difference if "patched" in name else "",
            }  # fmt: skip
        )
    return found


def without_activation(model: nn.Module, kind: type) -> nn.Module:
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, nn.Identity())
    return model


def psannlm_rows(rounds: int) -> list[dict[str, Any]]:
    """A training step of psannlm 2.0.1 as its trainer takes it: cross-entropy of the logits, clipping, AdamW."""
    from psann.activations import SineParam
    from psannlm.architectures import LMArchitectureConfig, LMConfig, build_lm_model

    width, layers, heads, vocabulary, batch, tokens = 512, 8, 8, 4096, 8, 256
    torch.manual_seed(0)
    config = LMConfig(
        architecture=LMArchitectureConfig.wave(),
        d_model=width,
        n_layers=layers,
        n_heads=heads,
        d_mlp=4 * width,
        vocab_size=vocabulary,
    )
    plain = build_lm_model(config).model
    ids = torch.randint(vocabulary, (batch, tokens + 1))

    def step_of(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step() -> None:
            logits = model(ids[:, :-1])
            F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    patched, removed = copy.deepcopy(plain), without_activation(plain, SineParam)
    patch(patched, strict=True)
    with torch.no_grad():
        difference = (patched(ids[:1, :-1]) - plain(ids[:1, :-1])).abs().max().item()
    variants = {"psannlm": plain, "patched": patched, "activation removed": removed}
    shape = f"d_model {width}, {layers} layers, {batch}x{tokens} tokens, vocabulary {vocabulary}"
    return rows("psannlm 2.0.1", shape, "training step", {name: step_of(m) for name, m in variants.items()}, rounds, difference)


class Sine(nn.Module):
    """SIREN's activation, as its users write it."""

    def __init__(self, w0: float) -> None:
        super().__init__()
        self.w0 = w0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.w0 * x)


def siren_rows(rounds: int) -> list[dict[str, Any]]:
    """Forward and backward of an image fit: 256 x 256 points, 3 hidden layers."""
    width, side, hidden = 256, 256, 3
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(2, width), Sine(30.0)]
    nn.init.uniform_(layers[0].weight, -0.5, 0.5)
    for _ in range(hidden):
        layers += [nn.Linear(width, width), Sine(30.0)]
        nn.init.uniform_(layers[-2].weight, -((6 / width) ** 0.5) / 30, (6 / width) ** 0.5 / 30)
    layers.append(nn.Linear(width, 3))
    nn.init.uniform_(layers[-1].weight, -((6 / width) ** 0.5) / 30, (6 / width) ** 0.5 / 30)
    plain = nn.Sequential(*layers)
    axis = torch.linspace(-1, 1, side)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).view(-1, 2)
    colors = 0.5 + 0.5 * torch.sin(points @ torch.tensor([[9.0, 2.0, 5.0], [3.0, 8.0, -6.0]]))

    def step_of(model: nn.Module) -> Callable[[], None]:
        def step() -> None:
            F.mse_loss(model(points), colors).backward()
            model.zero_grad(set_to_none=True)

        return step

    patched, removed = copy.deepcopy(plain), without_activation(plain, Sine)
    patch(patched, strict=True)
    with torch.no_grad():
        difference = (patched(points) - plain(points)).abs().max().item()
    variants = {"SIREN": plain, "patched": patched, "activation removed": removed}
    shape = f"{width} wide, {hidden} hidden layers, {len(points):,} points"
    return rows("SIREN", shape, "forward and backward", {name: step_of(m) for name, m in variants.items()}, rounds, difference)


SECTIONS = {"psannlm": psannlm_rows, "siren": siren_rows}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.patch", description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="write the conditions and the rows to this file, one JSON object a line")
    parser.add_argument("--here", action="store_true", help="only this process's setting of huge pages, rows as JSON lines")
    options = parser.parse_args()
    if options.here:
        for section in options.sections:
            for row in SECTIONS[section](options.rounds):
                print(json.dumps(row))
        return
    found = []
    for setting in ("0", "1"):
        command = [sys.executable, "-m", "bench.patch", "--here", "--rounds", str(options.rounds), "--sections", *options.sections]
        done = subprocess.run(command, env={**os.environ, HUGE_PAGES: setting}, stdout=subprocess.PIPE, text=True, check=True)
        found += [json.loads(line) for line in done.stdout.splitlines()]
    print(json.dumps(conditions(), indent=1))
    print(table(found))
    if options.json:
        write_results(options.json, found)


if __name__ == "__main__":
    main()
