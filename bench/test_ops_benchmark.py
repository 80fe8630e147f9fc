"""The small ops as pytest-benchmark entries: `pytest bench --benchmark-only [-k rms_norm] [--benchmark-compare]`.

For comparing two commits on one machine. Figures beside a copy, a product and peers come from `python -m bench --sections ops`.
"""

from __future__ import annotations

import pytest
import torch
from psann_kernels import BackendError

from . import check
from .case import Case
from .cases import cases
from .ops import prepare

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed; pip install pytest-benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = ("damped_sine", "rms_norm", "wave_conv", "paged_append", "linear")
ENTRIES = [
    (case, direction, backend)
    for case in cases(DEVICE.type if DEVICE.type == "cpu" else "gpu", DEVICE)
    if isinstance(case, Case) and case.op in SMALL
    for direction in case.directions
    for backend in ("auto", "torch")
]


@pytest.fixture(autouse=True)
def only_when_asked(request):
    if not request.config.getoption("benchmark_only"):
        pytest.skip("times are taken with --benchmark-only")


@pytest.mark.parametrize(
    "case, direction, backend", ENTRIES, ids=lambda value: value.name.replace(" ", "-") if isinstance(value, Case) else value
)
def test_op(benchmark, case, direction, backend):
    function = case.call(backend)
    try:
        wrong, _ = check.Judge(case).verdict(function)
    except BackendError as error:
        pytest.skip(str(error))
    assert wrong is None, wrong
    call = prepare(function, direction, case.leaves, *case.make(0))

    def waited():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.name} {direction}"
    benchmark.pedantic(waited, rounds=15, iterations=1, warmup_rounds=2)
