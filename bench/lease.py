"""All that a short GPU lease is for, in order, each section in a process of its own; the table comes last.

A kernel that faults takes its process's device with it, so a section that died is started again as long as it gets further: the
case that killed it is on record and passed over. What is left when the lease ends goes on with the same command in the next one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

from . import plots, suite
from .conditions import table

ORDER = ("device", "ops", "peers", "lm", "decoding", "compile", "gluon")
GRACE = 60.0  # seconds beyond its limit that a section gets to finish a case before it is ended


def run(
    options: argparse.Namespace, start: Callable[..., Any] = subprocess.run, clock: Callable[[], float] = time.perf_counter
) -> None:
    for section in ORDER:
        _run_section(section, options, start, clock)
    plots.draw(options.out)
    print(summary(options.out))


def _run_section(section: str, options: argparse.Namespace, start: Callable[..., Any], clock: Callable[[], float]) -> None:
    print(f"\n== {section}", flush=True)
    began, is_first = clock(), True
    while True:
        left = options.limit - (clock() - began)
        before = progress(options.out, section)
        command = [sys.executable, "-m", "bench", *arguments(section, options, left, is_first)]
        try:
            status = start(command, cwd=suite.ROOT, timeout=left + GRACE, check=False).returncode
        except subprocess.TimeoutExpired:
            print(f"{section}: ended {GRACE:g} s after its limit; the case that hung is passed over next time", flush=True)
            return
        is_further = progress(options.out, section) > before
        if status == 0 or not is_further or clock() - began > options.limit:
            if status != 0:
                print(f"{section}: ended with status {status} and nothing new; see above", flush=True)
            return
        is_first = False
        print(f"{section}: the process ended with status {status}; going on after the case that it was in", flush=True)


def arguments(section: str, options: argparse.Namespace, left: float, is_first: bool) -> list[str]:
    given = [
        "--part",
        "--sections",
        section,
        "--out",
        str(Path(options.out).resolve()),
        "--limit",
        f"{left:.0f}",
        "--device",
        options.device,
        "--size",
        options.size,
    ]
    given += ["--only", options.only] if options.only else []
    given += ["--rounds", str(options.rounds)] if options.rounds is not None else []
    given += ["--rehearse"] if options.rehearse else []
    given += ["--no-compile"] if options.no_compile else []
    return given + (["--again"] if options.again and is_first else [])


def progress(folder: Path, section: str) -> int:
    """Lines of the section's file."""
    path = folder / f"{section}.jsonl"
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """section -> its rows, the conditions and the marks of progress left out."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if lines and lines[0].get("conditions", {}).get("section") == path.stem:
            found[path.stem] = [line for line in lines[1:] if not {"begins", "ends", "complete", "stopped"} & set(line)]
    return found


def heads(folder: Path) -> list[dict[str, Any]]:
    """The first line of each section's file."""
    return [json.loads(path.read_text(encoding="utf-8").split("\n", 1)[0] or "{}") for path in sorted(folder.glob("*.jsonl"))]


def summary(folder: Path) -> str:
    """What auto takes, one line a case, then what was lost, wrong, failed, refused or absent."""
    sections = read(folder)
    parts = []
    timed = [row for row in sections.get("ops", []) if "median_ms" in row]
    served = [_line(row) for row in timed if row.get("is_auto")]
    if served:
        parts.append("ops, as backend=auto runs them (times_*: how many times as fast as that)\n" + table(served))
    if any(line.get("conditions", {}).get("rehearsal") for line in heads(folder)):
        parts.append("A REHEARSAL: tiny sizes on a CPU, kernels in an interpreter. These figures mean nothing.")
    models = [row for row in sections.get("lm", []) if "tokens_per_s" in row]
    if models:
        keys = ("model", "size", "what", "backend", "tokens_per_s", "times_torch", "mfu")
        parts.append("lm\n" + table([{key: _blank(row.get(key)) for key in keys} for row in models]))
    steps = [row for row in sections.get("decoding", []) if "step_ms" in row]
    if steps:
        keys = ("model", "size", "texts", "temperature", "backend", "how", "step_ms", "tokens_per_s", "of_bound")
        parts.append("decoding, steps of one token a text\n" + table([{key: row[key] for key in keys} for row in steps]))
    lost = [
        {
            "section": section,
            "op": row["op"],
            "shape": row["shape"],
            "dtype": row["dtype"],
            "direction": row["direction"],
            "faster": name,
            "by": 1 / ratio,
        }
        for section in ("ops", "peers")
        for row in sections.get(section, [])
        if row.get("is_auto") or row.get("backend") == "auto"
        for name, ratio in {**{k[6:]: v for k, v in row.items() if k.startswith("times_")}, **row.get("times", {})}.items()
        if ratio is not None and ratio < 1
    ]
    parts.append("lost (a peer is faster than auto, by this factor)\n" + table(lost) if lost else "lost: nothing that was measured")
    for kind in ("wrong", "failed", "refused"):
        rows = [(section, row) for section, found in sections.items() for row in found if kind in row]
        told = sorted({f"{section}: {_who(row)}: {row[kind]}" for section, row in rows})
        if told:
            parts.append(f"{kind} ({len(rows)} rows)\n" + "\n".join(f"  {line[:200]}" for line in told[:20]))
    absent = [f"{row['peer']} {row['sought']}" for row in sections.get("peers", []) if row.get("found") == "absent"]
    if absent:
        parts.append(f"absent peers, and the versions sought: {', '.join(absent)}")
    return "\n\n".join(parts)


def _who(row: dict[str, Any]) -> str:
    return " ".join(str(row[key]) for key in ("op", "model", "case", "backend", "sanitizer") if key in row)


def _line(row: dict[str, Any]) -> dict[str, Any]:
    keys = (
        "op",
        "shape",
        "dtype",
        "direction",
        "backend",
        "median_ms",
        "of_copy",
        "of_matmul",
        "times_torch",
        "times_torch.compile",
    )
    return {key: _blank(row.get(key)) for key in keys}


def _blank(value: Any) -> Any:
    return "" if value is None else value
