"""The heap keeps what a training step frees, while it trains and no longer (psann_fast/train/heap.py)."""

import os
import platform
import resource
import subprocess
import sys

import pytest
from psann_fast.train import heap

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's decides for itself")

# Page faults of three tensors of 40 MB each, one after the other: before, within and after kept_heap(), and within two of them.
PROGRAM = """
import resource, torch
from psann_fast.train.heap import kept_heap

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.zeros(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
with kept_heap():
    faults()
    print(faults())
    with kept_heap():
        pass
    print(faults())
print(faults())
"""


def faults(**environment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120,
        env={name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [*map(int, done.stdout.split())]


def test_freed_memory_is_used_again():
    pages = 3 * 40_000_000 // resource.getpagesize()
    before, within, still_within, after = faults()
    assert within < pages / 20 and still_within < pages / 20
    if before > pages / 2:  # not where the system maps huge pages unasked
        assert after > pages / 2


def test_settings_of_the_environment_stay(monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "131072")
    assert heap._glibc() is None
    monkeypatch.delenv("MALLOC_TOP_PAD_")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_max=10")
    assert heap._glibc() is None


def test_it_is_put_back_after_an_error(monkeypatch):
    calls = []

    class Library:
        def mallopt(self, parameter, value):
            calls.append((parameter, value))
            return 1

        def malloc_trim(self, pad):
            calls.append("trim")

    monkeypatch.setattr(heap, "_glibc", Library)
    with pytest.raises(KeyError), heap.kept_heap():
        assert calls == [*heap.KEPT.items()]
        raise KeyError
    assert calls == [*heap.KEPT.items(), *heap.USUAL.items(), "trim"]


def test_a_refusal_is_an_error(monkeypatch):
    monkeypatch.setattr(heap, "_glibc", lambda: type("Library", (), {"mallopt": lambda *_: 0, "malloc_trim": lambda *_: 1})())
    with pytest.raises(OSError, match=r"mallopt\(-4, 0\) failed"), heap.kept_heap():
        pass
    assert heap._users == 0
