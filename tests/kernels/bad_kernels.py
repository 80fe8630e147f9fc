"""Kernels with one fault each, for the gate to find: the table that test_gate.py gives it instead of psann_kernels'."""

import triton
import triton.language as tl
from psann_kernels.triton_support import Configuration


@triton.jit
def narrow_product(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    tl.store(y_ptr + c, tl.load(x_ptr + tl.program_id(0) * stride + c))


@triton.jit
def product(x_ptr, y_ptr, M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, k = tl.arange(0, M)[:, None], tl.arange(0, K)
    x = tl.load(x_ptr + m * K + k[None, :])
    y = tl.load(x_ptr + k[:, None] * K + k[None, :])
    tl.store(y_ptr + m * K + k[None, :], tl.dot(x, y, input_precision=PRECISION))


@triton.jit
def does_not_compile(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.arange(0, BLOCK + 1))


def configurations() -> list[Configuration]:
    whole = {"x_ptr": "*fp32:16", "y_ptr": "*fp32:16"}
    half = {"x_ptr": "*bf16:16", "y_ptr": "*fp32:16"}

    def dot(name, signature, m, k, precision, **launch):
        return Configuration(product, signature, {"M": m, "K": k, "PRECISION": precision}, name=name, **launch)

    return [
        Configuration(narrow_product, {**whole, "stride": "i32"}, {"BLOCK": 128}, name="narrow product"),
        Configuration(does_not_compile, {"x_ptr": "*fp32:16"}, {"BLOCK": 128}, name="does not compile"),
        dot("TF32", whole, 64, 32, "tf32"),
        dot("no fault", half, 64, 64, "ieee"),
        dot("one warp has no HGMMA", half, 64, 64, "ieee", num_warps=1),
        dot("spills", half, 64, 128, "ieee", num_warps=1),
        dot("much shared memory", half, 64, 512, "ieee", num_warps=8),
    ]
