"""What a run leaves to look at: metrics.csv, loss.png and the resolved configuration."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Mapping, Sequence

import yaml

COLUMNS = ("step", "epoch", "loss", "val_loss", "lr", "grad_norm", "skipped_steps", "tokens", "tokens_per_second", "seconds")


# What a run writes beside its checkpoints; an earlier run's files keep their content under other names.
FILES = ("config.yaml", "metrics.csv", "loss.png")


class RunFolder:
    """A folder for one run, created here. What an earlier run left in it is renamed: metrics.csv to metrics-001.csv and so on."""

    def __init__(self, path: str | Path, configuration: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        _set_aside(self.path)
        (self.path / "config.yaml").write_text(yaml.safe_dump(dict(configuration), sort_keys=False), encoding="utf-8")
        self._file = open(self.path / "metrics.csv", "x", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._writer.writeheader()
        self._rows: list[Mapping[str, Any]] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one row and flush it, so that a reader sees it at once."""
        self._writer.writerow({name: row.get(name, "") for name in COLUMNS})
        self._file.flush()
        self._rows.append(row)

    def close(self) -> None:
        """Draw loss.png from the rows of this run."""
        self._file.close()
        if self._rows:
            plot_loss(self._rows, self.path / "loss.png")


def _set_aside(folder: Path) -> None:
    """Rename the files of an earlier run, all with the same number, the first that is free."""
    held = [folder / name for name in FILES if (folder / name).exists()]
    number = 1
    while any(_numbered(folder / name, number).exists() for name in FILES):
        number += 1
    for path in held:
        path.rename(_numbered(path, number))


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number:03d}{path.suffix}")


def plot_loss(history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw training and validation loss, and the learning rate, over optimizer steps."""
    from matplotlib.figure import Figure  # half a second to import, only needed here

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([row["step"] for row in history], [row["loss"] for row in history], label="training", color="tab:blue")
    validated = [row for row in history if row.get("val_loss") is not None]
    if validated:
        axes.plot(
            [row["step"] for row in validated], [row["val_loss"] for row in validated], "o-", label="validation", color="tab:orange"
        )
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    rate = axes.twinx()
    rate.plot([row["step"] for row in history], [row["lr"] for row in history], color="tab:gray", linewidth=0.8)
    rate.set_ylabel("learning rate", color="tab:gray")
    figure.savefig(path, dpi=120)
