"""The calls that are measured and checked: every op at named sizes, what it must move and compute, and its formula spelt out.

Sizes: "gpu" (the issue's shapes), "cpu" (small enough for two cores), "tiny" (tests), "parity" (awkward ones, checked only).

Bytes are inputs read once and outputs written once; flops are the formula's products alone, two a multiply-add. A backward's
attention is credited with 5 products to the forward's 2.
"""

from __future__ import annotations

from typing import Callable, Iterator

import psann_kernels
import torch
from psann_kernels import OPS

from .case import Case
from .cases_attention import paged_append_cases, paged_attention_cases, rope_attention_cases
from .cases_products import damped_sine_mlp_cases, linear_cases, linear_cross_entropy_cases, linear_damped_sine_cases
from .cases_rows import damped_sine_cases, rms_norm_cases, wave_conv_cases

BUILDERS: dict[str, Callable[[str, torch.device], Iterator[Case]]] = {
    "damped_sine": damped_sine_cases,
    "rms_norm": rms_norm_cases,
    "wave_conv": wave_conv_cases,
    "rope_attention": rope_attention_cases,
    "paged_append": paged_append_cases,
    "paged_attention": paged_attention_cases,
    "linear": linear_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
    "linear_damped_sine": linear_damped_sine_cases,
    "damped_sine_mlp": damped_sine_mlp_cases,
}


def cases(size: str, device: torch.device) -> Iterator[Case | str]:
    """Every case of a size; for an op that this version lacks, its name."""
    for op, builder in BUILDERS.items():
        if op in OPS and hasattr(psann_kernels, op):
            yield from builder(size, device)
        else:
            yield op
