"""Pictures of a folder's rows: roofline.png, every row by its intensity, and bars-<op>.png, every variant beside the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(folder: Path) -> list[Path]:
    """The files written; none where nothing was timed."""
    import matplotlib

    matplotlib.use("Agg")
    from .lease import read

    sections = read(folder)
    timed = [row for section in ("ops", "peers") for row in sections.get(section, []) if "median_ms" in row]
    if not timed:
        return []
    written = [_roofline(folder, timed)]
    for op in dict.fromkeys(row["op"] for row in timed):
        written.append(_bars(folder, op, [row for row in timed if row["op"] == op]))
    return written


def _roofline(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Both axes are ratios to the run's own yardsticks, so rows of one picture share their roof: 1, reached at any intensity."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        axes.scatter(
            [max(row.get("of_matmul", 0.0), 1e-3) / row["of_copy"] for row in mine],
            [row["of_roof"] for row in mine],
            label=op,
            s=18,
            alpha=0.7,
        )
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.axvline(1.0, color="gray", linewidth=0.8, linestyle=":")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="share of matmul rate / share of copy rate (left of 1: bound by memory)",
        ylabel="share of the roof",
    )
    axes.legend(fontsize=8)
    return _saved(figure, folder / "roofline.png")


def _bars(folder: Path, op: str, rows: list[dict[str, Any]]) -> Path:
    from matplotlib import pyplot

    calls = list(dict.fromkeys((row["shape"], row["dtype"], row["direction"]) for row in rows))
    labels, shares, colors = [], [], []
    for number, call in enumerate(calls):
        for row in (row for row in rows if (row["shape"], row["dtype"], row["direction"]) == call):
            labels.append(f"{call[0]} {call[1]} {call[2]}: {row['backend']}")
            shares.append(row["of_roof"])
            colors.append(f"C{number % 10}")
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.22 * len(labels)), layout="constrained")
    axes.barh(range(len(labels)), shares, color=colors)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set(title=op, xlabel="share of the roof (the larger of its shares of copy and matmul)")
    return _saved(figure, folder / f"bars-{op}.png")


def _saved(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
