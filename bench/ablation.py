"""One factor at a time from the default: what each choice of the model and the optimizer is worth, on Shakespeare's characters.

    python -m bench.ablation --data tinyshakespeare.txt [--seeds 3] [--steps 2000] [--settings NAME ...] [--out FOLDER]

The size and the data are those of bench.learning: 4 layers, 4 heads, d_model 128, windows of 64, 12 of them a step, about 0.82M
parameters, judged in nats per character over the whole validation part; the rest are the library's defaults. Each run is a row of
FOLDER/rows.jsonl as soon as it ends, and a row that is there is not run again, so an interrupted table goes on where it stopped;
--minutes ends it between two runs. FOLDER also receives table.txt, curves.png (training loss, smoothed) and sines.png (learned
amplitude, frequency and damping of every feature).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, Callable

import torch
from psann_fast import psannLM, psannLMDataPrep, register_base
from psann_fast.models import LanguageModel

from .conditions import RESULTS, conditions, table
from .learning import ROWS, SIZE, WINDOW, GELUBlock, judge, read_corpus

WAVE, PLAIN = dict(base="waveresnet", d_mlp=448), dict(base="respsann", d_mlp=512)
# name -> (options of psannLM, options of fit), the default first; each other one changes one thing.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": (WAVE, {}),
    "base respsann": (PLAIN, {}),
    "activation GELU": ({**PLAIN, "base": "gelu-twin"}, {}),
    "optimizer adamw": (WAVE, {"optimizer": "adamw"}),
    "frequency 1": ({**WAVE, "sine_freq_init": 1.0}, {}),
    "learning rate 1e-3": (WAVE, {"lr": 1e-3}),
    "frequency spread 0.7": ({**WAVE, "sine_freq_init_std": 0.7}, {}),
    "frequency 6": ({**WAVE, "sine_freq_init": 6.0}, {}),
    "damping 0.1": ({**WAVE, "sine_damp_init": 0.1}, {}),
    "wave kernel 4": ({**WAVE, "wave_kernel": 4}, {}),
    "respsann, optimizer adamw": (PLAIN, {"optimizer": "adamw"}),
    "GELU, optimizer adamw": ({**PLAIN, "base": "gelu-twin"}, {"optimizer": "adamw"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, type=Path, help="tinyshakespeare.txt, 1,115,394 bytes")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting (default 3)")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps (default 2000; fewer are another table)")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--minutes", type=float, default=90.0, help="start no run after so many minutes (default 90)")
    parser.add_argument("--out", type=Path, default=RESULTS / "ablation")
    options = parser.parse_args()
    text = read_corpus(options.data)
    register_base("gelu-twin", lambda config: LanguageModel(config, GELUBlock))
    # All settings with one seed before the next seed, so that an early end leaves a whole table of fewer seeds.
    cells = [{"setting": name, "seed": seed, "steps": options.steps} for seed in range(options.seeds) for name in options.settings]
    rows = grid(
        options.out / "rows.jsonl", cells, lambda cell: run(cell["setting"], text, cell["seed"], cell["steps"]), options.minutes
    )
    report([row for row in rows if row["steps"] == options.steps], options.out)


def grid(
    path: Path, cells: list[dict[str, Any]], run: Callable[[dict[str, Any]], dict[str, Any]], minutes: float
) -> list[dict[str, Any]]:
    """All rows of `path`, after every cell that none of them has became one: the cell, what run(cell) gives, and the conditions.

    A row is written as soon as it is there; after `minutes` no run begins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    began = time.monotonic()
    for cell in cells:
        if any(cell.items() <= row.items() for row in rows):
            continue
        if time.monotonic() - began > 60 * minutes:
            print(f"{minutes:g} minutes are over; the same command goes on from here")
            break
        rows.append({**cell, **run(cell), "conditions": conditions()})
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print({name: value for name, value in rows[-1].items() if isinstance(value, (str, int, float))}, flush=True)
    return rows


def run(name: str, text: str, seed: int, steps: int) -> dict[str, Any]:
    model_options, fit_options = SETTINGS[name]
    data = psannLMDataPrep([text], tokenizer="simple", max_length=WINDOW, val_split=0.1, seed=seed)
    model = psannLM(**SIZE, **model_options)
    epochs = 1 + steps // (len(data) // ROWS)
    # Judged once at the end, below, and not by fit's own validation.
    data.val_dataset = None
    began = time.perf_counter()
    # float32 on every machine, so that rows of a CPU that has bf16 and of one that has not can share a table.
    always = {"epochs": epochs, "max_steps": steps, "batch_tokens": WINDOW * ROWS, "seed": seed, "amp": "fp32"}
    model.fit(data, **always, **fit_options)
    return {
        "nats_per_character": judge(model.module, torch.tensor(data.tokenizer.encode(data.val_texts[0]))),
        "seconds": time.perf_counter() - began,
        "parameters": model.module.num_parameters() - 2 * (data.vocab_size - len(data.used_ids) + 1) * SIZE["d_model"],
        "curve": [[row["step"], round(row["loss"], 4)] for row in model.history_],
        "sines": sines(model.module),
    }


def sines(module: torch.nn.Module) -> dict[str, list[float]]:
    """The learned parameters of every sine of the MLPs, rounded."""
    found: dict[str, list[float]] = {}
    for block in module.blocks:
        if hasattr(block.mlp.act, "parameters_of_sine"):
            for name, values in zip(("amplitude", "frequency", "damping"), block.mlp.act.parameters_of_sine()):
                found.setdefault(name, []).extend(round(value, 4) for value in values.tolist())
    return found


def report(rows: list[dict[str, Any]], folder: Path) -> None:
    """table.txt and the two plots."""
    if not rows:
        return
    summary = []
    for name in dict.fromkeys(row["setting"] for row in rows):
        losses = [row["nats_per_character"] for row in rows if row["setting"] == name]
        summary.append({
            "setting": name, "mean": statistics.mean(losses), "worst": max(losses), "seeds": len(losses),
            "parameters": next(row["parameters"] for row in rows if row["setting"] == name),
        })  # fmt: skip
    text = table(summary)
    (folder / "table.txt").write_text(f"{rows[0]['steps']} steps\n{text}\n", encoding="utf-8")
    print(text)

    first = [row for row in rows if row["seed"] == 0]
    draw_curves({row["setting"]: row["curve"] for row in first}, "nats per character", folder / "curves.png")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    for place, name in zip(figure.subplots(1, 3), ("amplitude", "frequency", "damping")):
        for row in (row for row in first if name in row["sines"]):
            place.hist(row["sines"][name], bins=60, histtype="step", density=True, label=row["setting"])
        place.set(xlabel=f"learned {name}", ylabel="density", yscale="log")
    place.legend(fontsize="x-small")
    figure.savefig(folder / "sines.png", dpi=120)


def draw_curves(curves: dict[str, list[list[float]]], unit: str, path: Path) -> None:
    """Training losses [[step, loss], ...] by name, smoothed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    for name, curve in curves.items():
        steps, losses = zip(*curve)
        width = max(1, len(losses) // 20)
        axes.plot(steps[width - 1 :], torch.tensor(losses).unfold(0, width, 1).mean(-1), label=name)
    axes.set(xlabel="optimizer step", ylabel=f"training loss ({unit})")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
