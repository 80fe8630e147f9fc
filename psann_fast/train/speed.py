"""How fast a run is, and how fast it could be: tokens/s, and the share of the matmul rate that this machine reaches."""

from __future__ import annotations

import functools
import time

import torch
from torch import nn

FLOP_PER_PARAMETER = 6  # of a token: a multiplication and an addition, forward once and backward twice


@functools.cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, the best of a few; measured once per process, some milliseconds."""
    size = 512 if device.type == "cpu" else 4096
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        best = float("inf")
        for _ in range(6):
            began = time.perf_counter()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def utilization(tokens_per_second: float, module: nn.Module, dtype: torch.dtype | None, processes: int = 1) -> float:
    """Share of the matmul rate of all processes that training at this speed uses, at 6 FLOP per parameter and token."""
    parameter = next(module.parameters())
    rate = matmul_rate(parameter.device, parameter.dtype if dtype is None else dtype)
    # numel of a sharded parameter is that of the whole.
    return tokens_per_second * FLOP_PER_PARAMETER * sum(p.numel() for p in module.parameters()) / (rate * processes)
