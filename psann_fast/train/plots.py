"""The plot of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, Sequence


def plot_run(history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Training and validation loss with the learning rate above, tokens/s and the share of the matmul rate below, over steps."""
    from matplotlib.figure import Figure  # half a second to import, only needed here

    steps = [row["step"] for row in history]
    figure = Figure(figsize=(8, 7), layout="constrained")
    losses, speeds = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    losses.plot(steps, [row["loss"] for row in history], label="training", color="tab:blue")
    validated = [row for row in history if row.get("val_loss") is not None]
    if validated:
        losses.plot(
            [row["step"] for row in validated], [row["val_loss"] for row in validated], "o-", label="validation", color="tab:orange"
        )
    losses.set(ylabel="loss (nats per token)")
    losses.legend(loc="upper right")
    _second(losses, steps, [row["lr"] for row in history], "learning rate")
    speeds.plot(steps, [row["tokens_per_second"] for row in history], color="tab:green")
    speeds.set(xlabel="optimizer step", ylabel="tokens/s", ylim=(0, None))
    _second(speeds, steps, [100 * row["mfu"] for row in history], "% of the matmul rate")
    for axes in (losses, speeds):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _second(axes: Any, steps: Sequence[int], values: Sequence[float], label: str) -> None:
    right = axes.twinx()
    right.plot(steps, values, color="tab:gray", linewidth=0.8)
    right.set_ylabel(label, color="tab:gray")
    right.set_ylim(0, None)
