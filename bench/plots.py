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


# Where the rows of ops without products stand: so far left that only the copy limits them.
NO_PRODUCTS = 1e-3


def _roofline(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Flops a byte against flops a second, in units of the run's own yardsticks, so that all rows share one roof: min(x, 1)."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for op in dict.fromkeys(row["op"] for row in rows):
        points = [_point(row) for row in rows if row["op"] == op]
        axes.scatter([x for x, _ in points], [y for _, y in points], label=op, s=18, alpha=0.7)
    right = max(10.0, *(_point(row)[0] for row in rows))
    axes.plot([NO_PRODUCTS / 2, 1.0, 2 * right], [NO_PRODUCTS / 2, 1.0, 1.0], color="black", linewidth=0.8)
    label = "flops a byte, in units of (matmul rate / copy rate); ops without products stand at the left end"
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="share of the matmul rate")
    axes.legend(fontsize=8)
    return _saved(figure, folder / "roofline.png")


def _point(row: dict[str, Any]) -> tuple[float, float]:
    x = row["of_matmul"] / row["of_copy"] if "of_matmul" in row else NO_PRODUCTS
    return x, x * row["of_copy"]


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
