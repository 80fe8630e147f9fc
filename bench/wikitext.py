"""The sine beside GELU on encyclopedia prose: bits per byte on WikiText-2, at several learning rates.

    python -m bench.wikitext --train wikitext-2-valid.txt --test wikitext-2-test.txt [--seeds 3] [--steps 300] [--out FOLDER]

Trained on the validation file (1.1 MB) and judged on the whole test file (1.3 MB), both of WikiText-2 as raw word-level text; the
tokenizer is BPE with 4096 tokens, trained on the former. 4 layers, 4 heads, d_model 128, windows of 128 tokens, 16 of them a step;
the default base with d_mlp 448 beside respsann's block with GELU and d_mlp 512, of as many parameters within 1 %. The rest are the
library's defaults. The best rate of each is the one whose mean over the seeds is lowest.

Each run is a row of FOLDER/rows.jsonl as soon as it ends and is not run again; --minutes ends the table between two runs. FOLDER
also receives table.txt and curves.png.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
from pathlib import Path
from typing import Any

from psann_fast import psannLM, psannLMDataPrep, register_base
from psann_fast.models import LanguageModel

from .ablation import draw_curves, grid
from .conditions import RESULTS, table
from .learning import SIZE, GELUBlock

SHA256 = {
    "train": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
}
MODELS = {"waveresnet": dict(base="waveresnet", d_mlp=448), "GELU twin": dict(base="gelu-twin", d_mlp=512)}
RATES = (1e-3, 3e-3, 6e-3)
WINDOW, ROWS = 128, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--train", required=True, type=Path, help="WikiText-2's validation file, 1,121,681 bytes")
    parser.add_argument("--test", required=True, type=Path, help="WikiText-2's test file, 1,256,449 bytes")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model and rate (default 3)")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default 300, about two epochs)")
    parser.add_argument("--minutes", type=float, default=90.0, help="start no run after so many minutes (default 90)")
    parser.add_argument("--out", type=Path, default=RESULTS / "wikitext")
    options = parser.parse_args()
    texts = {name: read(getattr(options, name), SHA256[name]) for name in SHA256}
    register_base("gelu-twin", lambda config: LanguageModel(config, GELUBlock))
    data = psannLMDataPrep([texts["train"]], tokenizer="tokenizers", tokenizer_vocab_size=4096, max_length=WINDOW)
    cells = [
        {"model": name, "lr": rate, "seed": seed, "steps": options.steps}
        for seed in range(options.seeds) for rate in RATES for name in MODELS
    ]  # fmt: skip
    rows = grid(options.out / "rows.jsonl", cells, lambda cell: run(cell, data, texts["test"]), options.minutes)
    report([row for row in rows if row["steps"] == options.steps], options.out)


def read(path: Path, sha256: str) -> str:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise SystemExit(f"{path} is not the file of WikiText-2 that is meant (sha256 {sha256}); see the head of bench/wikitext.py")
    return content.decode()


def run(cell: dict[str, Any], data: psannLMDataPrep, test: str) -> dict[str, Any]:
    model = psannLM(**SIZE, **MODELS[cell["model"]])
    model.fit(data, epochs=99, max_steps=cell["steps"], batch_tokens=WINDOW * ROWS, lr=cell["lr"], seed=cell["seed"])
    return {
        "bits_per_byte": model.score([test])["bits_per_byte"],
        "parameters": model.module.num_parameters(),
        "curve": [[row["step"], round(row["loss"], 4)] for row in model.history_],
    }


def report(rows: list[dict[str, Any]], folder: Path) -> None:
    """table.txt and the plot."""
    if not rows:
        return
    summary = []
    for name, rate in dict.fromkeys((row["model"], row["lr"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["lr"]) == (name, rate)]
        bits = [row["bits_per_byte"] for row in mine]
        summary.append({
            "model": name, "rate": rate, "bits per byte": statistics.mean(bits), "worst": max(bits), "seeds": len(bits),
            "parameters": mine[0]["parameters"],
        })  # fmt: skip
    best = {
        name: min((row for row in summary if row["model"] == name), key=lambda row: row["bits per byte"]) for name in MODELS
        if any(row["model"] == name for row in summary)
    }  # fmt: skip
    lines = [f"{rows[0]['steps']} steps", table(summary), ""]
    lines += [f"best of {name}: {row['bits per byte']:.4f} bits per byte at {row['rate']:g}" for name, row in best.items()]
    text = "\n".join(lines)
    (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    first = [row for row in rows if row["seed"] == 0]
    draw_curves({f"{row['model']}, {row['lr']:g}": row["curve"] for row in first}, "nats per token", folder / "curves.png")


if __name__ == "__main__":
    main()
