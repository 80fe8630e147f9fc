"""What this machine has, and which backend would serve each op here, and why the others would not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch
from psann_kernels import self_test

from .config import ModelConfig
from .models import build_model
from .train.precision import cpu_has_bf16

PACKAGES = ("psann-fast", "torch", "triton", "numpy", "safetensors", "sentencepiece", "tokenizers")


def report() -> dict[str, Any]:
    """versions, devices, self-test: op -> "passed" or what is wrong with its Triton kernel on the GPU (empty without one), and ops:
    a row of op, device, backend, serves, reason for each backend."""
    # First, because what it finds wrong refuses afterwards.
    tested = self_test("cuda") if torch.cuda.is_available() else {}
    ops = [row for device in _names() for row in _ops(device)]
    return {"versions": _versions(), "devices": _devices(), "self-test": tested, "ops": ops}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _names() -> list[str]:
    return ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def _devices() -> dict[str, str]:
    bf16 = "bf16 in hardware" if cpu_has_bf16() else "no bf16 in hardware (amp='auto' trains in float32)"
    devices = {
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {torch.backends.cpu.get_cpu_capability()}, {bf16}"
    }
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
    if torch.cuda.device_count() == 0:
        devices["cuda"] = "no usable GPU"
    return devices


def _ops(device: str) -> list[dict[str, str]]:
    config = ModelConfig(d_model=64, n_layers=1, n_heads=1, vocab_size=8, base="waveresnet")
    with torch.random.fork_rng(devices=[]):
        model = build_model(config).to(device)
    rows, done = [], set()
    for module in model.modules():
        for op, _, args, kwargs in module.example_calls() if hasattr(module, "example_calls") else ():
            if op.name in done:
                continue
            done.add(op.name)
            for backend, reason in op.explain(*args, **kwargs):
                serves = "no" if reason else "yes"
                rows.append({"op": op.name, "device": device, "backend": backend, "serves": serves, "reason": reason or ""})
    return rows
