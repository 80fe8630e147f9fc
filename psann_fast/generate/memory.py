"""How much memory a cache may take on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import torch

# What is left for activations, the allocator's slack and everybody else.
SHARE = 0.8
_CONTROL_GROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int:
    """Bytes on `device` that nobody uses, and that this process may take; a guess (8 GiB) where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # torch keeps what it freed for itself.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [_from_meminfo(), _from_control_group()]
    known = [value for value in found if value is not None]
    if known:
        return min(known)
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 8 << 30


def _from_meminfo() -> int | None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None


def _from_control_group() -> int | None:
    most, used = _CONTROL_GROUP / "memory.max", _CONTROL_GROUP / "memory.current"
    if not most.exists() or not used.exists():
        return None
    limit = most.read_text().strip()
    return None if limit == "max" else max(int(limit) - int(used.read_text()), 0)
