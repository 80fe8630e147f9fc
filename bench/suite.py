"""Runs sections into a folder: one JSON lines file a section, written row by row, continued where it stopped.

A section yields cases: a name and a function that measures it and returns rows. The file starts with the conditions; a case
is announced before it is measured, so that one which kills the process is known and passed over by the next run. A file
whose conditions differ in anything but the date (commit, sources, device, versions, size) is begun again.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable

import torch

from .conditions import conditions

Row = dict[str, Any]
Case = tuple[str, Callable[[], list[Row]]]
ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("bench", "kernels", "psann_fast", "csrc")
# What a device throws because of one case; anything else is a mistake of ours and ends the run.
FAILURES: tuple[type[BaseException], ...] = (RuntimeError, OSError)
# What other people's code throws where it cannot serve a call, or is another version than the one that we know.
VARIANT_FAILURES = (*FAILURES, ValueError, TypeError, AttributeError, ImportError, AssertionError)
if importlib.util.find_spec("triton") is not None:
    VARIANT_FAILURES += (importlib.import_module("triton.errors").TritonError,)


@dataclass
class Report:
    """One section's file."""

    path: Path
    conditions: Row
    rows: list[Row] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    is_complete: bool = False

    def append(self, row: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def conditions_of(section: str, **choices: Any) -> Row:
    """What every row of a section depends on. `sources` is a checksum, because a changed tree is not named by its commit."""
    return {"section": section, **conditions(), "cuda": torch.version.cuda, "driver": _driver(), "sources": _checksum(), **choices}


def _driver() -> str | None:
    """NVIDIA's driver version; None without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def _checksum() -> str:
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def open_report(folder: Path, section: str, current: Row, again: bool) -> Report:
    """The section's file as an earlier run under the same conditions left it, or a new one."""
    path = folder / f"{section}.jsonl"
    report = Report(path, current)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # a process that was ended may leave half a line
    lines = [json.loads(line) for line in whole.splitlines()]
    if again or not lines or _lasting(lines[0].get("conditions", {})) != _lasting(current):
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"conditions": current}) + "\n", encoding="utf-8")
        return report
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    begun: dict[str, bool] = {}
    for line in lines[1:]:
        if "begins" in line:
            begun[line["begins"]] = False
        elif "ends" in line:
            begun[line["ends"]] = True
        elif "complete" in line:
            report.is_complete = True
        elif "stopped" not in line:
            report.rows.append(line)
    for name, has_ended in begun.items():
        report.done.add(name)
        if not has_ended:
            report.rows.append({"case": name, "failed": "the process ended while this case ran"})
            report.append(report.rows[-1])
            report.append({"ends": name})
    return report


def _lasting(found: Row) -> Row:
    return {key: value for key, value in json.loads(json.dumps(found)).items() if key != "date"}


def run_section(
    folder: Path, section: str, cases: Iterable[Case], current: Row, *, again: bool = False, limit: float = 600.0,
    say: Callable[[str], None] = print, clock: Callable[[], float] = time.perf_counter,
) -> Report:  # fmt: skip
    """Measure the cases that the folder does not have yet; stop between two of them once `limit` seconds have passed."""
    report = open_report(folder, section, current, again)
    if report.is_complete:
        say(f"{section}: complete in {report.path} under these conditions; --again measures anew")
        return report
    if report.done:
        say(f"{section}: {len(report.done)} cases are in {report.path} already; the rest follows")
    started = clock()
    for name, measure in cases:
        if name in report.done:
            continue
        if clock() - started > limit:
            report.append({"stopped": f"the section's {limit:g} s had passed before {name!r}"})
            say(f"{section}: stopped after {limit:g} s before {name!r}; the same command goes on from there")
            return report
        report.append({"begins": name})
        try:
            rows = measure()
        except FAILURES as error:
            rows = [{"case": name, "failed": describe(error)}]
            is_lost = isinstance(error, torch.AcceleratorError)
        else:
            is_lost = False
        for row in rows:
            report.append(row)
            say(short(row))
        report.rows += rows
        report.append({"ends": name})
        report.done.add(name)
        if is_lost:  # every later case would fail with it
            raise SystemExit(f"{section}: the device failed in {name!r}; run the same command again to go on after it")
    report.is_complete = True
    report.append({"complete": True, "seconds": round(clock() - started, 1)})
    return report


def raise_if_lost(error: BaseException) -> None:
    """A device that failed in a kernel answers every later call of the process with the same error."""
    if isinstance(error, torch.AcceleratorError):
        raise error


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def short(row: Row) -> str:
    """One line for whoever watches."""
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items() if value is not None
    )
