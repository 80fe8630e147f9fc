"""Lists and compares run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterable

import yaml

from .run_folder import read_metrics


def find_runs(folders: Iterable[str | Path]) -> list[Path]:
    """The run folders among `folders` and up to two levels below them, by name.
    Raises FileNotFoundError for one that is not there."""
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
        "tokens_per_second": _middle(rows, "tokens_per_second"),
        "mfu": _middle(rows, "mfu"),
        "seconds": last.get("seconds"),
    }


def _middle(rows: list[dict[str, Any]], name: str) -> Any:
    values = sorted(row[name] for row in rows if row[name] is not None)
    return values[len(values) // 2] if values else None


def _configuration(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML ({error}); restore it, or name other runs") from error
    if not isinstance(sections, dict) or not all(isinstance(values, dict) for values in sections.values()):
        raise ValueError(f"{path} is not the configuration of a run; restore it, or name other runs")
    return sections


def differences(runs: list[Path]) -> dict[str, dict[str, Any]]:
    """The options whose values differ among the runs: "train.lr" -> run -> value. The folder's own name is none."""
    options: dict[str, dict[str, Any]] = {}
    for run in runs:
        for section, values in _configuration(run / "config.yaml").items():
            for name, value in values.items():
                if name != "checkpoint_dir":
                    options.setdefault(f"{section}.{name}", {})[str(run)] = value
    return {name: values for name, values in options.items() if len({repr(values.get(str(run))) for run in runs}) > 1}
