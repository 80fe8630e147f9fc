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
from triton.language.extra import libdevice

# Triton reads this variable when a kernel is decorated, so the switch is fixed for the process, like the kernels.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
INTERPRET = tl.constexpr(IS_INTERPRETED)

# NVIDIA's special function unit gives a sine in two instructions; AMD's libdevice has none, the interpreter no libdevice.
HAS_FAST_SINE = tl.constexpr(not IS_INTERPRETED and torch.version.hip is None)


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


# frequency / 2 pi is kept as two float32, so that the product with z is never rounded (KERNELS: "reduce in turns"). The high part
# is the float32 below the nearest one: then the low part has the sign of the frequency whatever the product's rounding, and
# z = -0.0 gives -0.0, where parts of opposite signs would add to +0.0.
_TURNS_HIGH = tl.constexpr(0.15915492177009583)
_TURNS_LOW = tl.constexpr(2.1321799437146183e-08)  # 1 / 2 pi - _TURNS_HIGH
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23
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
    """frequency / 2 pi as (high, low), two float32 of one sign whose sum carries about 46 bits."""
    high = frequency * _TURNS_HIGH
    low = tl.fma(frequency, _TURNS_LOW, tl.fma(frequency, _TURNS_HIGH, -high))
    return high, low


@triton.jit
def turns_of(z, high, low):
    """frequency * z in turns, less the nearest whole number: in [-0.65, 0.65], as `low` may carry it past a half."""
    # Adding 1.5 * 2^23 leaves no bits for a fraction, so what comes back is the nearest whole number, up to 2^22 turns.
    n = tl.fma(z, high, _ROUNDER) - _ROUNDER
    r = tl.fma(z, low, tl.fma(z, high, n * -1.0))
    # Beyond, r may be any number; a sine of it may be any too, but never above 1 or NaN. NaN and infinities give NaN.
    return tl.clamp(r, -0.65, 0.65, tl.PropagateNan.ALL)


@triton.jit
def _sine_of_quarter(r):
    u = r * r
    p = tl.fma(u, _S4, _S3)
    p = tl.fma(u, p, _S2)
    p = tl.fma(u, p, _S1)
    p = tl.fma(u, p, _S0)
    return r * p


@triton.jit
def sine_of_turns(r, dtype: tl.constexpr = tl.float32):
    """sin(2 pi r) for |r| <= 0.65, absolute error below 1.6e-7; below 5.1e-7 (2^-20.9) where `dtype`, to which the caller rounds,
    is half precision and the GPU has an instruction for it. Either way the relative error stays small near r = 0."""
    if HAS_FAST_SINE and dtype != tl.float32:
        # The instruction's error is absolute, and it flushes denormals; below 2^-7, x itself is within 1.1e-5 of its sine.
        x = r * _S0
        return tl.where(tl.abs(x) < 0.0078125, x, libdevice.fast_sinf(x))
    # Beyond a quarter turn the sine is that of the rest of the half turn; the subtraction is exact. -0.0 stays -0.0.
    folded = tl.where(r > 0.25, 0.5 - r, tl.where(r < -0.25, -0.5 - r, r))
    return _sine_of_quarter(folded)


@triton.jit
def cosine_of_turns(r, dtype: tl.constexpr = tl.float32):
    """cos(2 pi r), to the error of sine_of_turns up to 1e5 rad, where |r| may reach 0.503; by 0.65 the polynomial is 2e-4 off."""
    if HAS_FAST_SINE and dtype != tl.float32:
        return libdevice.fast_cosf(r * _S0)
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
