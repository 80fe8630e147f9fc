"""What every *_triton.py needs: the interpreter switch, exact narrowing stores, sine and exponential, device refusals, and
the form in which it lists the configurations that dispatch can choose."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton reads this variable when a kernel is decorated, so the switch is fixed for the process, like the kernels.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
INTERPRET = tl.constexpr(IS_INTERPRETED)


@dataclass(frozen=True)
class Configuration:
    """One compiled form of a kernel that dispatch can choose. Each *_triton.py lists its own by `configurations()`, and the
    offline gate (tests/kernels/gate.py) compiles exactly those, without a GPU.

    kernel      the @triton.jit function
    signature   every run-time argument, in order: "*bf16", "*fp32", "i32", "i64", "fp32", "tensordesc<bf16[64,64]>". A suffix
                ":16" says divisible by 16 (what the launcher finds for whole tensors and most sizes), ":1" equal to 1
    constexprs  every constexpr argument and its value (None too)
    num_warps, num_stages   as in the launch
    name        unique, readable: "damped_sine forward bf16"
    targets     where dispatch can choose it, None for everywhere: ("sm_90",) for what needs Hopper
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    name: str = ""
    targets: tuple[str, ...] | None = None


# frequency / 2 pi is kept as two float32, so that the product with z is never rounded (KERNELS: "reduce in turns").
_TURNS_HIGH = tl.constexpr(0.15915493667125702)  # float32(1 / 2 pi)
_TURNS_LOW = tl.constexpr(6.420638326565253e-09)  # 1 / 2 pi - float32(1 / 2 pi)
LOG2_E = tl.constexpr(math.log2(math.e))

# sin(2 pi r) / r on |r| <= 1/4 as a polynomial in r^2, least maximal relative error (5.3e-9, found by iterated weighted
# least squares in float64, then rounded to float32).
_S0 = tl.constexpr(6.2831854820251465)
_S1 = tl.constexpr(-41.341678619384766)
_S2 = tl.constexpr(81.60223388671875)
_S3 = tl.constexpr(-76.57498931884766)
_S4 = tl.constexpr(39.71090316772461)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x (float32) in `dtype`, rounded to nearest even. The interpreter truncates to bfloat16, so there the bits are made here."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = tl.where(x == x, rounded, bits | 0x00400000)
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def widen(x):
    """x in float32. The interpreter computes with bfloat16's bit patterns, so every load goes through here first."""
    if INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def split_turns(frequency):
    """frequency / 2 pi as (high, low), two float32 whose sum carries about 48 bits."""
    high = frequency * _TURNS_HIGH
    low = tl.fma(frequency, _TURNS_LOW, tl.fma(frequency, _TURNS_HIGH, -high))
    return high, low


@triton.jit
def turns_of(z, high, low):
    """frequency * z in turns, less the nearest whole number: in [-0.5, 0.5]."""
    n = tl.floor(z * high + 0.5)
    r = tl.fma(z, low, tl.fma(z, high, -n))
    # Where |z * high| exceeds 2^23, n is as coarse as the product and r may be many turns: take those off too.
    return r - tl.floor(r + 0.5)


@triton.jit
def _sine_of_quarter(r):
    u = r * r
    p = tl.fma(u, _S4, _S3)
    p = tl.fma(u, p, _S2)
    p = tl.fma(u, p, _S1)
    p = tl.fma(u, p, _S0)
    return r * p


@triton.jit
def sine_of_turns(r):
    """sin(2 pi r) for |r| <= 0.5, absolute error below 1.6e-7."""
    # Beyond a quarter turn the sine is that of the rest of the half turn; the subtraction is exact. -0.0 stays -0.0.
    folded = tl.where(r > 0.25, 0.5 - r, tl.where(r < -0.25, -0.5 - r, r))
    return _sine_of_quarter(folded)


@triton.jit
def cosine_of_turns(r):
    """cos(2 pi r) for |r| <= 0.5, absolute error below 1.6e-7."""
    return _sine_of_quarter(0.25 - tl.abs(r))


def refuses_device(t: Tensor) -> str | None:
    """Why Triton cannot run on t's device, or None."""
    if t.device.type == "cuda" or (t.device.type == "cpu" and IS_INTERPRETED):
        return None
    return f"the tensors are on {t.device}; Triton needs a GPU (for tests, TRITON_INTERPRET=1 runs its interpreter on the CPU)"


def refuses_dtype(name: str, t: Tensor) -> str | None:
    """Why Triton cannot take t's dtype, or None."""
    if t.dtype in (torch.float16, torch.bfloat16, torch.float32):
        return None
    return f"{name} is {t.dtype}; the kernel serves float16, bfloat16 and float32"


def as_rows(t: Tensor) -> Tensor:
    """t (..., F) as (rows, F) with unit stride along F; copied only where no view has that form."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
