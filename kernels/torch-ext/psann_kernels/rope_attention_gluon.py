"""rope_attention on Hopper by warp-specialised Gluon kernels: the forward's is in rope_attention_kernel_gluon.py, the gradients'
are launched by rope_attention_backward_gluon.py.

The kernels have not run on a GPU. So "auto" never takes them: they serve backend="gluon" alone, and only where
`self_test(gluon=True)` has found that on this device, with this Triton, they give the plain Triton twin's numbers.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import triton
from torch import Tensor

from .descriptor_gluon import described, descriptor_type
from .library import define
from .rope_attention import OP
from .rope_attention_backward_gluon import rope_attention_gluon_backward
from .rope_attention_tiles_triton import narrowing, rotated
from .triton_support import Configuration

BLOCK_M, BLOCK_N = 128, 128  # queries and keys of a tile
CONSUMERS = 2  # of the kernel, between which a tile's queries are divided
# Gluon's names and layouts change between versions; the kernel was compiled with these.
TRITON_VERSIONS = ("3.6", "3.9")

# What self_test found: "passed" or a reason to refuse. The key says which GPU.
VERDICTS: dict[torch.device, str] = {}


def refuses(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, *, cu_seqlens: Tensor | None = None,
    window: int | None = None, alibi_slopes: Tensor | None = None, **options: Any,
) -> str | None:  # fmt: skip
    reason = refuses_device(q.device)
    if reason is not None:
        return reason
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"q is {q.dtype}; the Gluon kernel serves float16 and bfloat16"
    if q.shape[-1] not in (64, 128):
        return f"head_dim is {q.shape[-1]}; the Gluon kernel serves 64 and 128"
    if q.numel() == 0 or k.numel() == 0:
        return f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; the Gluon kernel needs a query and a key"
    for name, is_given in (
        ("cu_seqlens", cu_seqlens is not None),
        ("window", narrowing(window, k.shape[1]) > 0),
        ("alibi_slopes", alibi_slopes is not None),
    ):
        if is_given:
            return f"{name} is given; the Gluon kernel serves causal attention without documents, window and ALiBi"
    verdict = VERDICTS.get(q.device)
    if verdict is None:
        return (
            f"the Gluon kernel has not been compared with the plain Triton one on {q.device}; "
            f"psann_kernels.self_test({str(q.device)!r}, gluon=True) does that"
        )
    return None if verdict == "passed" else verdict


def refuses_device(device: torch.device) -> str | None:
    """Why the Gluon kernel cannot run on a device with the Triton that is installed, or None."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) != (9, 0):
        return f"the tensors are on {device}; the Gluon kernel is for NVIDIA GPUs of compute capability 9.0 (Hopper)"
    if triton.__version__.rsplit(".", 1)[0] not in TRITON_VERSIONS:
        return f"Triton is {triton.__version__}; the Gluon kernel was compiled with {' and '.join(TRITON_VERSIONS)} alone"
    return None


def _kernel() -> Any:
    # Not imported with the package: on a Triton that refuses_device turns away, Gluon may lack the names.
    return importlib.import_module(".rope_attention_kernel_gluon", __package__).forward_kernel


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    turned_k = k.new_empty(0) if cos is None else rotated(k, cos, sin, None, 0, interleaved)
    if cos is not None:
        q, k = rotated(q, cos, sin, None, keys - queries, interleaved), turned_k
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    _kernel()[(triton.cdiv(queries, BLOCK_M) * batch * heads,)](
        described(q, BLOCK_M // CONSUMERS), described(k, BLOCK_N), described(v, BLOCK_N), o, lse, softmax_scale,
        queries, keys, batch * heads, heads, heads // kv_heads, D=head_dim, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4,
    )  # fmt: skip
    return o, lse, turned_k


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    return q.new_empty(q.shape), lse, k.new_empty((0,) if cos is None else k.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, cos, sin, *ctx.options = inputs
    o, lse, turned_k = output
    ctx.save_for_backward(q, k if cos is None else turned_k, v, o, lse, cos, sin)
    ctx.mark_non_differentiable(lse, turned_k)


def _differentiate(ctx: Any, do: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *rope_attention_gluon_backward(do, *ctx.saved_tensors, *ctx.options), *[None] * 4


rope_attention_gluon = define(
    "rope_attention_gluon(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, bool interleaved, float softmax_scale)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _differentiate,
    _setup_context,
)


@OP.offer("gluon", refuses)
def _serve(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, *, cu_seqlens: Tensor | None = None,
    interleaved: bool = True, softmax_scale: float, window: int | None = None, alibi_slopes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    cos, sin = (None if t is None else t.contiguous() for t in (cos, sin))
    o, _, _ = rope_attention_gluon(q, k, v, cos, sin, interleaved, softmax_scale)
    return o


def configurations() -> list[Configuration]:
    """Both widths as a long call compiles them, odd sizes in float16, and one query of one head, whose sizes are the constant 1."""
    found = []
    rows = (("long", "bf16", 64, "i32:16"), ("long", "bf16", 128, "i32:16"), ("odd", "fp16", 128, "i32"))
    for name, dtype, head_dim, size in (*rows, ("one query", "bf16", 128, "i32:1")):
        kernel = _kernel()
        constants = dict(D=head_dim, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
        signature = {argument: size for argument in kernel.arg_names if argument not in constants}
        for argument, tile in (("q_desc", BLOCK_M // CONSUMERS), ("k_desc", BLOCK_N), ("v_desc", BLOCK_N)):
            signature[argument] = descriptor_type(dtype, tile, head_dim)
        signature |= {"o_ptr": f"*{dtype}:16", "lse_ptr": "*fp32:16", "softmax_scale": "fp32"}
        name = f"rope_attention gluon forward {name} {dtype} D={head_dim}"
        found.append(Configuration(kernel, signature, constants, num_warps=4, num_stages=1, name=name, targets=("sm_90",)))
    return found
