"""Keeps memory that a training step frees for the next step, where glibc would give it back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import threading
from typing import Iterator

# Parameters of glibc's mallopt (malloc.h), and what they are where a program has freed large blocks before.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4
USUAL = {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20, TOP_PAD: 128 << 10}
KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: -1, TOP_PAD: 64 << 20}

_LOCK = threading.Lock()
_users = 0


@contextlib.contextmanager
def kept_heap() -> Iterator[None]:
    """While entered, blocks of any size come from the heap and stay in it; at the end what is free goes back to the system.

    The tensors of a step are some megabytes each. glibc maps such a block from the system and unmaps it when it is freed, so the
    system has to clear every page again at every step: 76,000 pages and a seventh of the time of a bf16 step of bench/training.py
    on two Zen 4 cores.

    It holds for the whole process. Without glibc, or where the environment sets up malloc itself (MALLOC_..._, GLIBC_TUNABLES),
    nothing changes.
    """
    global _users
    library = _glibc()
    if library is None:
        yield
        return
    with _LOCK:
        _set(library, KEPT)
        _users += 1
    try:
        yield
    finally:
        with _LOCK:
            _users -= 1
            if _users == 0:
                _set(library, USUAL)
                library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    is_set_up = "malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") and name.endswith("_") for name in os.environ
    )
    return None if is_set_up or platform.libc_ver()[0] != "glibc" else ctypes.CDLL(None)


def _set(library: ctypes.CDLL, parameters: dict[int, int]) -> None:
    for parameter, value in parameters.items():
        if library.mallopt(parameter, value) != 1:
            raise OSError(f"mallopt({parameter}, {value}) failed; MALLOC_TOP_PAD_=131072 in the environment leaves malloc as it is")
