"""Section gluon: rope_attention by Gluon beside plain Triton, forward and gradients. Last in a lease, since a wrong barrier would
hang and not fail."""

from __future__ import annotations

import functools
from typing import Iterator

import psann_kernels

from . import suite
from .case import Case
from .ops import Bench, measure


def gluon_section(bench: Bench) -> Iterator[suite.Case]:
    yield "self-test", functools.partial(self_test_rows, bench)
    for case in bench.cases():
        if isinstance(case, Case) and case.op == "rope_attention":
            yield case.name, functools.partial(rows, bench, case)


def self_test_rows(bench: Bench) -> list[suite.Row]:
    return [{"self-test": str(psann_kernels.self_test(bench.device, gluon=True))}]


def rows(bench: Bench, case: Case) -> list[suite.Row]:
    """Forward and gradients."""
    psann_kernels.self_test(bench.device, gluon=True)  # remembered, but each process needs to be told
    return measure(bench, case, {name: case.call(name) for name in ("gluon", "triton")})
