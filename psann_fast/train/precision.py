"""What `amp=` means on a device, and which device "auto" is."""

from __future__ import annotations

import contextlib
import os
from typing import ContextManager

import torch
from psann_kernels.library import cpu_has_bf16


def resolve_device(name: str) -> torch.device:
    """The device that `name` means: "auto" is a usable GPU, else the CPU. Raises ValueError for one that is not usable here.

    Under torchrun a GPU without a number is the one of this process.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; it must be 'auto', 'cpu', 'cuda', 'cuda:1', 'mps' or the like ({error})") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but this machine has no usable CUDA GPU; use device='cpu' or 'auto'")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but this machine has {torch.cuda.device_count()} CUDA GPUs; use 'cuda:0' or 'auto'")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device is {name!r}, but this machine has no usable Apple GPU; use device='cpu' or 'auto'")
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def resolve_amp(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype of `amp` on `device`, or None for full float32.

    "auto" is bfloat16 on CUDA and on CPUs with bf16 instructions, else None. Raises ValueError for "fp16" on a CPU.
    """
    if amp in ("fp32", "none"):
        return None
    if amp == "fp16":
        if device.type == "cpu":
            raise ValueError("amp is 'fp16', which torch does not train with on a CPU; use amp='bf16', or 'fp32'")
        return torch.float16
    if amp == "bf16":
        return torch.bfloat16
    return torch.bfloat16 if device.type == "cuda" or (device.type == "cpu" and cpu_has_bf16()) else None


def autocast(dtype: torch.dtype | None, device: torch.device) -> ContextManager[None]:
    """torch.autocast for `dtype`, or nothing for None."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
