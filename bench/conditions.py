"""What a figure depends on: device, versions, commit, date. Stored beside every result."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any, Iterable, Mapping

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("psann-fast", "torch", "triton", "numpy")


def conditions(*peers: str) -> dict[str, Any]:
    """device, threads, versions (those of `peers` too), commit (with "+" where the tree has changes) and date of this run."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in (*PACKAGES, *peers)}},
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    return f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def _commit() -> str:
    git = lambda *words: subprocess.run(  # noqa: E731 (two uses)
        ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    # What a run before this one has written is no change of what runs.
    changes = git("status", "--porcelain", "--untracked-files=no", ":(top,exclude)bench/results")
    return git("rev-parse", "--short", "HEAD") + ("+" if changes else "")


def write_results(path: str | Path, rows: Iterable[Mapping[str, Any]], *peers: str) -> None:
    """JSON lines: the conditions first, then the rows."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"conditions": conditions(*peers)}, *rows]), encoding="utf-8")


def kept_results(path: str | Path, *peers: str) -> list[dict[str, Any]]:
    """The rows of an interrupted run that was made under today's conditions; none where one of them differs."""
    path = Path(path)
    if not path.exists():
        return []
    head, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return rows if head == {"conditions": conditions(*peers)} else []


def table(rows: list[Mapping[str, Any]]) -> str:
    """Rows of equal keys as an aligned table."""
    cells = [list(rows[0]), *([f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)
