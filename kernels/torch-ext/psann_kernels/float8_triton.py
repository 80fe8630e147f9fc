"""Reading and writing torch.float8_e4m3fn by its bits: four exponent bits of bias 7, three of mantissa, no infinity.

Kernels take such tensors as uint8, because Triton's own conversion needs sm_89 and fails on older GPUs; these few integer
operations run anywhere. Bits: a sign, then 0x7F for NaN, up to 0x7E for 448.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What from_float8 leaves out of its numbers.
FLOAT8_UNIT = tl.constexpr(256.0)


@triton.jit
def from_float8(x):
    """Bits x (uint8) as float32: exactly the number that they stand for, divided by FLOAT8_UNIT, which half precision holds too."""
    bits = x.to(tl.uint16)
    # float16 has one more exponent bit and a bias of 15: the same bits in its places mean 2^-8 as much, subnormal numbers too.
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    half = tl.where((bits & 0x7F) == 0x7F, 0x7E00, half)
    return half.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def to_float8(x, scale):
    """Bits (uint8) of x / scale (float32), rounded to nearest, ties to even; magnitudes beyond 448 become 448."""
    y = tl.math.div_rn(x, scale)
    size = tl.minimum(tl.abs(y), 448.0)
    bits = size.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    # Below the least normal number steps are 2^-9: beside 2^14 float32 has just those.
    subnormal = (size + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, subnormal, normal)
    code = tl.where(y == y, code, 0x7F)
    return (code | ((y.to(tl.uint32, bitcast=True) >> 31) << 7)).to(tl.uint8)
