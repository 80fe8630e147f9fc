"""Every op on this device, at awkward sizes, judged by the tests' witnesses: `python -m bench.parity [--smallest] [--only TEXT]`.

The tests of tests/kernels run on CPU tensors (Triton in its interpreter); this is their judgement on the device itself.
--smallest takes one case an op, for compute-sanitizer. Ends with status 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import functools
from typing import Iterator

import torch
from psann_kernels import BackendError

from . import check, suite
from .case import Case
from .cases import cases

BACKENDS = ("triton", "native", "torch")


def parity_cases(device: torch.device, only: str = "", is_smallest: bool = False, size: str = "parity") -> Iterator[suite.Case]:
    seen: set[str] = set()
    for case in cases(size, device):
        if isinstance(case, str):
            yield f"parity {case}", lambda op=case: [{"op": op, "refused": "not in this version"}]
        elif only in case.name and not (is_smallest and case.op in seen):
            seen.add(case.op)
            yield f"parity {case.name}", functools.partial(rows, case)


def rows(case: Case) -> list[suite.Row]:
    """One row a variant: right (with the error as a share of what is allowed), wrong, refused or failed."""
    judge, found = check.Judge(case), []
    for backend, function in ({backend: case.call(backend) for backend in BACKENDS} | case.more).items():
        row = {"op": case.op, "shape": case.shape, "dtype": str(case.dtype).removeprefix("torch."), "backend": backend}
        try:
            wrong, share = judge.verdict(function)
        except BackendError as error:
            row["refused"] = str(error)
        except suite.VARIANT_FAILURES as error:
            suite.raise_if_lost(error)
            row["failed"] = suite.describe(error)
        else:
            row |= {"right": share} if wrong is None else {"wrong": wrong}
        found.append(row)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.parity", description=__doc__.splitlines()[0])
    parser.add_argument("--smallest", action="store_true", help="one case an op")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds TEXT")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_right = True
    for _, measure in parity_cases(device, options.only, options.smallest):
        for row in measure():
            print(suite.short(row), flush=True)
            is_right = is_right and "wrong" not in row and "failed" not in row
    return 0 if is_right else 1


if __name__ == "__main__":
    raise SystemExit(main())
