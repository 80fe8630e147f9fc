"""Defines torch.library ops: what makes a fast implementation traceable by torch.compile and testable by opcheck.

The namespace comes from this package's own import name, because Hugging Face's loader imports a second copy of the
package into the same process, and one name cannot be defined twice. `Library.define` and `impl` cost about 4 us a call
where `custom_op` costs 9.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, ContextManager

import torch
from torch import Tensor

NAMESPACE = (__package__ or "psann_kernels").replace(".", "_")
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
# Asked once, since torch.compile cannot trace the question.
_CPU_HAS_BF16_TILES = torch.cpu._is_amx_tile_supported()
_CPU_HAS_BF16 = torch.cpu._is_avx512_bf16_supported() or _CPU_HAS_BF16_TILES


def define(
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Define one op and return the callable.

    schema         as torch.library takes it, without the namespace: "damped_sine_triton(Tensor z, ...) -> Tensor"
    function       runs it, on every device; its first argument is a tensor of the device; must not be differentiable by itself
    fake           gives outputs of the right shape, dtype, device and stride without reading data
    backward       backward(ctx, *grads) -> a gradient or None for each input; itself made of ops, so that it traces too
    setup_context  setup_context(ctx, inputs, output) keeps what backward needs
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, on_its_gpu(function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def on_its_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, run with the GPU of its first argument as the current one: Triton launches there, wherever the tensors are."""

    def run(first: Tensor, *others: Any) -> Any:
        if not first.is_cuda:
            return function(first, *others)
        with torch.cuda.device(first.device):
            return function(first, *others)

    return run


def cast_dtype(t: Tensor) -> torch.dtype:
    """The dtype in which products of t take place: its own, or under torch.autocast what that asks for."""
    device = t.device.type
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and t.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_cast else t.dtype


def cpu_has_bf16() -> bool:
    """True if this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX); elsewhere bf16 is slower than float32."""
    return _CPU_HAS_BF16


def cpu_has_bf16_tiles() -> bool:
    """True if this CPU multiplies bfloat16 matrices as tiles (AMX), which torch's products use and our kernels do not."""
    return _CPU_HAS_BF16_TILES


def without_autocast(device: torch.device) -> ContextManager[None]:
    """Where ops take tensors in the dtype that they have."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
