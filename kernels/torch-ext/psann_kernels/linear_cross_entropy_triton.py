"""Triton twin of linear_cross_entropy. Read linear_cross_entropy.py and linear_cross_entropy_chunks.py first.

The three matrix products are cuBLAS's; the kernel turns a chunk's logits into losses and, in place, into their gradient. One
program a row, which it reads twice, the second time from the level-2 cache (256 KB for 128k bfloat16 classes), and writes once: 2 *
rows * classes * itemsize bytes of memory. The maximum is one number a block and the sum one a lane,
so a logit costs one exponential a pass.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .linear_cross_entropy import OP
from .linear_cross_entropy_chunks import define_ops, serve
from .triton_support import LOG2_E, Configuration, narrow, refuses_device, refuses_dtype, widen

# Logits of a row in flight: 16 a thread, as two 16-byte reads where they are half precision.
BLOCK_V = 2048
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(u):
    """tanh to about 3e-7 of itself: by the exponential it loses the digits of a small u, which the series keeps."""
    s = u * u
    series = u * ((((0.02186949 * s - 0.05396825) * s + 0.13333333) * s - 0.33333333) * s + 1.0)
    return tl.where(tl.abs(u) < 0.3, series, 1.0 - 2.0 / (tl.exp2(u * 2.0 * LOG2_E) + 1.0))


@triton.jit
def _capped(logits_ptr, c, classes, soft_cap):
    """Logits c of a row, bounded if soft_cap is given, and -inf past the last."""
    logits = widen(tl.load(logits_ptr + c, mask=c < classes, other=float("-inf")))
    if soft_cap is not None:
        logits = tl.where(c < classes, soft_cap * tanh(logits / soft_cap), float("-inf"))
    return logits


@triton.jit
def _turn_kernel(
    logits_ptr, target_ptr, dloss_ptr, loss_ptr, classes, logits_stride, ignore_index, label_smoothing, z_loss, soft_cap,
    HAS_SMOOTHING: tl.constexpr, HAS_GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    target = tl.load(target_ptr + row)
    is_counted = target != ignore_index
    # A target out of range finds no logit, and its loss is NaN: nobody waits for this kernel who could raise an error.
    picked = widen(tl.load(logits_ptr + target, mask=is_counted & (target >= 0) & (target < classes), other=float("nan")))
    if soft_cap is not None:
        picked = soft_cap * tanh(picked / soft_cap)

    highest = float("-inf")
    sums = tl.zeros((BLOCK_V,), tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    c = tl.arange(0, BLOCK_V)
    for _ in range(0, classes, BLOCK_V):
        logits = _capped(logits_ptr, c, classes, soft_cap)
        before = highest
        highest = tl.maximum(before, tl.max(logits, 0))
        # A row that has seen nothing but -inf shifts by 0: -inf less itself would be nan.
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        sums = sums * tl.exp2((before - shift) * LOG2_E) + tl.exp2((logits - shift) * LOG2_E)
        if HAS_SMOOTHING:
            total += tl.where(c < classes, logits, 0.0)
        c += BLOCK_V

    shift = tl.where(highest == float("-inf"), 0.0, highest)
    # A NaN logit is passed over by the maximum, and stays in the sum.
    lse = shift + tl.log2(tl.sum(sums, 0)) * LN_2
    loss = lse - (1.0 - label_smoothing) * picked + z_loss * lse * lse
    if HAS_SMOOTHING:
        loss -= label_smoothing * (tl.sum(total, 0) / classes)
    tl.store(loss_ptr + row, tl.where(is_counted, loss, 0.0))

    if HAS_GRADIENT:
        scale = 1.0
        if dloss_ptr is not None:
            scale = tl.load(dloss_ptr + row)
        slope = 1.0 + 2.0 * z_loss * lse
        uniform = label_smoothing / classes
        c = tl.arange(0, BLOCK_V)
        for _ in range(0, classes, BLOCK_V):
            logits = _capped(logits_ptr, c, classes, soft_cap)
            gradient = tl.exp2((logits - lse) * LOG2_E) * slope - uniform
            gradient -= tl.where(c == target, 1.0 - label_smoothing, 0.0)
            if soft_cap is not None:
                share = logits / soft_cap
                gradient *= 1.0 - share * share
            gradient = tl.where(is_counted, gradient * scale, 0.0)
            tl.store(logits_ptr + c, narrow(gradient, logits_ptr.dtype.element_ty), mask=c < classes)
            c += BLOCK_V


def turn(
    logits: Tensor, targets: Tensor, losses: Tensor, dloss: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float,
    soft_cap: float | None, wants_gradient: bool,
) -> None:  # fmt: skip
    """`Turn` by the kernel."""
    rows, classes = logits.shape
    _turn_kernel[(rows,)](
        logits, targets.contiguous(), None if dloss is None else dloss.contiguous(), losses, classes, logits.stride(0),
        ignore_index, label_smoothing, z_loss, soft_cap, HAS_SMOOTHING=label_smoothing > 0, HAS_GRADIENT=wants_gradient,
        BLOCK_V=BLOCK_V, enable_fp_fusion=True,
    )  # fmt: skip


OPS = define_ops("triton", turn)


def configurations() -> list[Configuration]:
    """The least and the most that a gradient can ask for, in half and full precision, and rows that are no multiple of 16 long. A
    call for the loss alone runs the first half of these."""
    types = {"target_ptr": "*i64:16", "dloss_ptr": "*fp32:16", "loss_ptr": "*fp32:16", "ignore_index": "i32"}
    numbers = {name: "fp32" for name in ("label_smoothing", "z_loss", "soft_cap")}
    plain = dict(dloss_ptr=None, soft_cap=None, HAS_SMOOTHING=False, HAS_GRADIENT=True)
    full = dict(HAS_SMOOTHING=True, HAS_GRADIENT=True)
    found = []
    for name, dtype, size, constants in (
        ("plain bf16", "bf16", "i32:16", plain), ("full bf16", "bf16", "i32:16", full), ("full fp32", "fp32", "i32:16", full),
        ("plain bf16 unaligned", "bf16", "i32", plain),
    ):  # fmt: skip
        signature = {"logits_ptr": f"*{dtype}:16", "classes": size, "logits_stride": size, **types, **numbers}
        signature = {key: signature[key] for key in _turn_kernel.arg_names if key in signature and key not in constants}
        found.append(
            Configuration(_turn_kernel, signature, dict(BLOCK_V=BLOCK_V, **constants), name=f"linear_cross_entropy {name}")
        )
    return found


def refuses(x: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> str | None:
    return refuses_device(x) or refuses_dtype("x", x)


@OP.offer("triton", refuses)
def _serve(x: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return serve(OPS, x, weight, targets, **options)
