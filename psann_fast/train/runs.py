"""Lists and compares run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterable

import yaml

from .run_folder import read_metrics


def find_runs(folders: Iterable[str | Path]) -> list[Path]:
    """The run folders among `folders` and up to two levels below them, by name. Raises FileNotFoundError for one that is not there."""
    found: list[Path] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; pass run folders, or the folder that holds them")
        found += [path.parent for pattern in ("", "*/", "*/*/") for path in sorted(folder.glob(f"{pattern}metrics.jsonl"))]
    return list(dict.fromkeys(found))


def summary(run: Path) -> dict[str, Any]:
    """What a run came to; values that it has not are None."""
    rows, _ = read_metrics(run)
    losses = [row["val_loss"] for row in rows if row["val_loss"] is not None]
    last = rows[-1] if rows else {}
    return {
        "run": str(run),
        "step": last.get("step"),
        "loss": last.get("loss"),
        "val_loss": losses[-1] if losses else None,
        "best_val_loss": min(losses) if losses else None,
        "tokens": last.get("tokens"),
        "tokens_per_second": sorted(row["tokens_per_second"] for row in rows)[len(rows) // 2] if rows else None,
        "mfu": sorted(row["mfu"] for row in rows)[len(rows) // 2] if rows else None,
        "seconds": last.get("seconds"),
    }


def differences(runs: list[Path]) -> dict[str, dict[str, Any]]:
    """The options whose values differ among the runs: "train.lr" -> run -> value. The folder's own name is none."""
    options: dict[str, dict[str, Any]] = {}
    for run in runs:
        sections = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) if (run / "config.yaml").is_file() else {}
        for section, values in sections.items():
            for name, value in values.items():
                if name != "checkpoint_dir":
                    options.setdefault(f"{section}.{name}", {})[str(run)] = value
    return {name: values for name, values in options.items() if len({repr(values.get(str(run))) for run in runs}) > 1}
