"""Stands in for a CUDA graph on a CPU: a recording of a function's operations, run again on the same memory.

As in a graph, nothing of Python runs again: numbers stay as they were when it was recorded, each operation reads the memory that it
read then and writes what it wrote then, and what a graph cannot hold is refused.
"""

from __future__ import annotations

from typing import Any, Callable
from unittest import mock

import pytest
import torch
import torch._dynamo  # noqa: F401 (knows is_compiling by identity, so it must not be imported first while that is replaced)
from psann_fast.cuda_graphs import CaptureError
from psann_kernels.registry import AUTO_ORDER, Op
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Each of these makes the host wait for the device, or copies from the host's pageable memory.
FORBIDDEN_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
FORBIDDEN = {aten.lift_fresh.default, aten._local_scalar_dense.default, aten.nonzero.default, aten.is_nonzero.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Tape(TorchDispatchMode):
    """What Tape.record returns replays it. tapes counts the recordings."""

    tapes = 0

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    @classmethod
    def record(cls, function: Callable[[], None]) -> Callable[[], None]:
        """As CUDACapture: `function` runs once outside, then is recorded."""
        function()
        tape = cls()
        # Values are unknown in a trace as they are on a GPU: nothing looks at them.
        with mock.patch.object(torch.compiler, "is_compiling", lambda: True), tape:
            function()
        cls.tapes += 1
        return tape.replay

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        if waits(func, args):
            raise CaptureError(f"{func} is no operation of a graph")
        output = func(*args, **kwargs)
        self.calls.append((func, *pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs, output))))
        return output

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, output in self.calls:
            if is_view(func):
                continue
            for old, new in zip(pytree.tree_leaves(output), pytree.tree_leaves(func(*args, **kwargs))):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def waits(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the host takes part in this operation on a GPU."""
    if func in INDEXED:  # a mask is counted on the host
        return any(t is not None and t.dtype == torch.bool for t in args[1])
    return func in FORBIDDEN or bool(FORBIDDEN_TAGS & set(func.tags))


def is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def serve_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device "meta", which has shapes and no numbers, stands for a GPU: Triton kernels serve it, and torch the ops without."""
    pytest.importorskip("triton")
    monkeypatch.setitem(AUTO_ORDER, "meta", ("triton", "torch"))
    monkeypatch.setattr(Op, "_reason", lambda self, backend, args, kwargs: None)
