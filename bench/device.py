"""Section device: is everything right here? What doctor says, the kernels' self-test, parity of every op, compute-sanitizer."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from typing import Iterator

import psann_kernels
from psann_kernels import explain

from psann_fast import doctor

from . import parity, suite
from .lm import BASES, SIZES, made
from .ops import Bench

SANITIZERS = ("memcheck", "racecheck")
SANITIZER_SECONDS = 240.0


def device_section(bench: Bench) -> Iterator[suite.Case]:
    yield "doctor", doctor_rows
    for base in BASES:
        yield f"explain {base}", functools.partial(explain_rows, bench, base)
    yield "self-test", self_test_rows
    yield from parity.parity_cases(bench.device, bench.only, size="tiny" if bench.size == "tiny" else "parity")
    for tool in SANITIZERS:
        yield f"compute-sanitizer {tool}", functools.partial(sanitizer_rows, tool, bench.only)


def doctor_rows() -> list[suite.Row]:
    report = doctor.report()
    return [
        {"versions": report["versions"]},
        {"devices": report["devices"]},
        *({"doctor": row["op"], **row} for row in report["ops"]),
    ]


def explain_rows(bench: Bench, base: str) -> list[suite.Row]:
    model = made(base, next(iter(SIZES[bench.size].values())), "auto", bench.device)
    return [{"model": base, **row} for row in explain(model)]


def self_test_rows() -> list[suite.Row]:
    if not hasattr(psann_kernels, "self_test"):
        return [{"self-test": "not in this version"}]
    return [{"self-test": str(psann_kernels.self_test())}]


def sanitizer_rows(tool: str, only: str) -> list[suite.Row]:
    """One call of every op under compute-sanitizer, in a process of its own."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return [{"sanitizer": tool, "refused": "compute-sanitizer is not on PATH (it comes with the CUDA toolkit)"}]
    command = [
        program,
        "--tool",
        tool,
        "--error-exitcode",
        "86",
        sys.executable,
        "-m",
        "bench.parity",
        "--smallest",
        "--only",
        only,
    ]
    # Torch's caching allocator would hide an access beyond a tensor inside its own block.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, cwd=suite.ROOT, env=environment, capture_output=True, text=True, timeout=SANITIZER_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return [{"sanitizer": tool, "failed": f"took more than {SANITIZER_SECONDS:g} s; run it alone: {' '.join(command)}"}]
    told = [line.strip("= \n") for line in (done.stdout + done.stderr).splitlines() if line.startswith("=====")]
    if done.returncode == 86:
        return [{"sanitizer": tool, "wrong": " | ".join(told[:6])}]
    if done.returncode != 0:
        return [{"sanitizer": tool, "failed": f"status {done.returncode}: {(done.stderr or done.stdout)[-300:]}"}]
    return [{"sanitizer": tool, "right": " | ".join(told[-1:])}]
