"""Calls a fast op's function without torch's dispatcher, where nobody could tell the difference.

The dispatcher costs 10 us a call through an op that has a derivative in Python, and 31 where something needs a gradient; this costs
2 and 9 (torch 2.13 on a 3 GHz core). The kernels of a small model take no longer themselves. A call that something looks at, a
trace, a mode, a transform, a profiler or a subclass of Tensor, takes the op. Decoding's usual calls come no further than
csrc/at_once.cpp, which has the same conditions.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Callable

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_tracing, _len_torch_dispatch_stack, _len_torch_function_stack
from torch.autograd import _profiler_enabled, forward_ad

TENSORS = (Tensor, torch.nn.Parameter)
OTHERS = (bool, int, float, str, torch.dtype)
# Each answers 0 or False where it replaces no call.
REPLACERS = (_len_torch_dispatch_stack, _len_torch_function_stack, _are_functorch_transforms_active, _is_tracing)


def shortcut(
    op: Callable[..., Any],
    function: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """A callable that gives what `op` gives.

    op, function, backward, setup_context   what library.define returned and was given;
                                            without backward the outputs have no gradient
    """

    class Differentiable(torch.autograd.Function):
        # setup_context stays inside forward: torch calls a separate one four times more slowly.
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = function(*arguments)
            setup_context(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            if torch.is_grad_enabled():
                # What follows is no part of any graph, and a second derivative would silently miss it.
                raise RuntimeError(
                    f"{op}: its gradient has no derivative (create_graph=True asks for one); backend='torch' has all"
                )
            return backward(ctx, *gradients)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*arguments)
        if forward_ad._current_level >= 0 and any(_has_tangent(a) for a in arguments):
            # The dispatcher would drop it without a word.
            raise RuntimeError(f"{op}: it has no forward-mode derivative; backend='torch' has it")
        if _is_watched():
            return op(*arguments)
        needs_gradient = False
        for argument in arguments:
            if argument is None:
                continue
            if type(argument) in TENSORS:
                if argument.is_neg():  # the dispatcher writes such a view out; its memory holds the opposite
                    return op(*arguments)
                needs_gradient = needs_gradient or argument.requires_grad
            elif type(argument) not in OTHERS:
                return op(*arguments)
        if needs_gradient and torch.is_grad_enabled():
            return op(*arguments) if backward is None else Differentiable.apply(*arguments)
        return function(*arguments)

    return call


def is_watched(*tensors: Tensor | None) -> bool:
    """True where something besides autograd would see or replace a call of these, or memory holds the opposite of one; a profiler,
    which changes nothing, aside."""
    return (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or _is_replaced()
        or not all(t is None or (type(t) in TENSORS and not t.is_neg()) for t in tensors)
    )


def _is_watched() -> bool:
    """True where something besides autograd would see, or replace, a call of the dispatcher."""
    return _is_replaced() or _profiler_enabled()


def _is_replaced() -> bool:
    for replaces in REPLACERS:
        if replaces():
            return True
    return False


def set_up_at_once(native: ModuleType, dtypes: tuple[torch.dtype, ...]) -> None:
    """Tell csrc/at_once.cpp what a call must look like for it, and how to see that nobody looks at it; dtypes in csrc's order."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is not None:  # else at_once answers every call by NotImplemented
        native.at_once_setup(
            capsule, TENSORS, (*REPLACERS, _profiler_enabled), forward_ad, torch.is_grad_enabled, torch.get_num_threads, dtypes
        )


def _has_tangent(argument: Any) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None
