"""No kernel reads or writes past its tensors: guard_pages.py runs in a process of its own, which an over-read ends."""

import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psann_kernels
import pytest
from guard_pages import CASES
from kernel_list import kernels, operation

SECONDS_PER_CASE = 600  # a guard against hanging, generous because machines are shared


class Guarded:
    """The guarded process of one backend, started anew if a case has ended it."""

    def __init__(self, backend):
        self.backend, self.process = backend, None

    def run(self, op, seed, distance="near"):
        """Raise AssertionError if the case touched memory that is not its own, or failed otherwise."""
        if self.process is None:
            command = [sys.executable, Path(__file__).with_name("guard_pages.py"), self.backend]
            self.errors = tempfile.TemporaryFile("w+")
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        timer = threading.Timer(SECONDS_PER_CASE, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(f"{op} {seed} {distance}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; its status is judged below
        answer = self.process.stdout.readline()
        timer.cancel()
        if answer != f"done {op} {seed} {distance}\n":
            status, self.process = self.process.wait(), None
            self.errors.seek(0)
            assert status != -signal.SIGSEGV, (
                f"{op} on {self.backend}, seed {seed} {distance}: touched memory past its tensors (SIGSEGV)"
            )
            raise AssertionError(f"{op} on {self.backend}, seed {seed} {distance}: status {status}: {self.errors.read()[-3000:]}")

    def launched(self):
        """Triton kernels, by module and name, that the process has run without a fault."""
        self.process.stdin.write("kernels\n")
        self.process.stdin.flush()
        return set(self.process.stdout.readline().split())

    def close(self):
        if self.process is not None:
            self.process.communicate()


@pytest.fixture(scope="module", params=["triton", "native"])
def guarded(request):
    process = Guarded(request.param)
    yield process
    process.close()


def require(case, backend):
    op = case.removesuffix("_mixed")
    missing = psann_kernels.OPS[op].unavailable.get(backend)
    if missing or not psann_kernels.OPS[op].has(backend):
        pytest.skip(f"{backend}: {missing or f'{backend} does not implement {op}'}")


@pytest.mark.parametrize("op", CASES)
def test_nothing_is_touched_past_the_end(op, guarded):
    require(op, guarded.backend)
    for seed in range(6 if guarded.backend == "triton" else 40):
        guarded.run(op, seed)
    if guarded.backend == "triton":
        missing = {kernel for kernel in kernels() if operation(kernel) == op} - guarded.launched()
        assert not missing, f"no case of guard_pages.py reaches {sorted(missing)}"


@pytest.mark.parametrize("op", CASES)
def test_offsets_past_2_to_the_31_are_right(op, guarded):
    require(op, guarded.backend)
    for seed in range(3 if guarded.backend == "triton" else 20):
        guarded.run(op, seed, "far")


@pytest.mark.campaign
@pytest.mark.parametrize("op", CASES)
def test_nothing_is_touched_past_the_end_in_many_cases(op, guarded, campaign):
    require(op, guarded.backend)
    for seed in campaign:
        guarded.run(op, seed, "far" if seed % 4 == 0 else "near")


@pytest.mark.parametrize("fault, distance", [("reads_too_far", "near"), ("multiplies_in_32_bits", "far")])
def test_a_fault_is_caught(fault, distance):
    with pytest.raises(AssertionError, match="SIGSEGV"):
        Guarded("triton").run(fault, 0, distance)
