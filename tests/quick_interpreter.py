"""Triton's interpreter in a third of the time: patch the language once a launch, know types that were seen. A pytest plugin,
loaded by conftest.py.

A launch in the interpreter replaces the builtins of triton.language, and every call of one jitted function by another looks through
the whole language again to replace what is replaced already; that search is half of the time of our kernels. Inside a launch it is
now made once for each set of language modules that the called functions see.

Of the rest most is spent on describing results: every operation makes its type anew, with a name, a checked shape and a tuple of
constants, and its tensor repeats that. Types never change, so what describes one is now made once and copied.

The arithmetic is not touched: test_quick_interpreter.py compares bits.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
from typing import Any, Callable


def once_a_launch(interpreter: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """GridExecutor.__call__ and _patch_lang for the module `triton.runtime.interpreter`;
    within the first, the second works once."""
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    language = interpreter.tl
    seen: list[set[bool]] = []  # of each launch under way: whether the patched functions see triton.language.core or the package

    def quick_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(set())
        try:
            return launch(self, *args, **kwargs)
        finally:
            seen.pop()

    @functools.cache
    def modules_of(fn: Callable[..., Any]) -> frozenset[bool]:
        modules = (value for value in fn.__globals__.values() if inspect.ismodule(value))
        return frozenset(value is language for value in modules if value in (language, language.core))

    def quick_patch(fn: Callable[..., Any]) -> Any:
        modules = modules_of(fn)
        if seen and modules and modules <= seen[-1]:
            return None  # a call within a launch: only the launch itself, whose own call never ends here, restores what it gets
        scope = patch(fn)
        if seen:
            seen[-1] |= modules
        return scope

    return quick_launch, quick_patch


def once_a_type(interpreter: Any) -> dict[tuple[Any, str], Callable[..., Any]]:
    """{(class or module, name): its function, with a memory}"""
    core, semantic = interpreter.tl.core, importlib.import_module("triton.language.semantic")
    block, tensor, pointer = core.block_type, core.tensor, core.pointer_type
    make_block, make_tensor, numpy_of = block.__init__, tensor.__init__, interpreter._get_np_dtype
    broadcast, equals = semantic.TritonSemantic.broadcast_impl_value, core.dtype.__eq__
    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}
    numpy_types: dict[str, Any] = {}

    def quick_block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(getattr(size, "value", size) for size in shape)
        # A pointer's name does not tell its address space, so pointers are known by identity; what is known keeps them alive.
        key = (id(element_ty), sizes)
        known = blocks.get(key)
        if known is None:
            make_block(self, element_ty, shape)
            self._of_its_tensors = {}
            if len(blocks) > 10_000:
                blocks.clear()
            blocks[key] = dict(vars(self))
        else:
            vars(self).update(known)

    def quick_tensor(self: Any, handle: Any, type: Any) -> None:
        known = vars(type).setdefault("_of_its_tensors", {})
        if not known:
            make_tensor(self, handle, type)
            known.update((name, value) for name, value in vars(self).items() if name not in ("handle", "type"))
        else:
            attributes = vars(self)
            attributes.update(known)
            attributes["handle"], attributes["type"] = handle, type

    def quick_numpy_of(type: Any) -> Any:
        scalar = type.element_ty if isinstance(type, block) else type
        if isinstance(scalar, pointer):
            return numpy_of(scalar)
        if scalar.name not in numpy_types:
            numpy_types[scalar.name] = numpy_of(scalar)
        return numpy_types[scalar.name]

    def quick_broadcast(self: Any, left: Any, right: Any) -> Any:
        a, b = left.type, right.type
        if a.is_block() and b.is_block() and list(a.shape) == list(b.shape):
            return left, right
        return broadcast(self, left, right)

    def quick_equals(self: Any, other: Any) -> Any:
        return self is other or equals(self, other)

    return {
        (block, "__init__"): quick_block,
        (tensor, "__init__"): quick_tensor,
        (interpreter, "_get_np_dtype"): quick_numpy_of,
        (semantic.TritonSemantic, "broadcast_impl_value"): quick_broadcast,
        (core.dtype, "__eq__"): quick_equals,
    }


SLOW: dict[tuple[Any, str], Callable[..., Any]] = {}
"""Triton's own functions, where they have been replaced: {(class or module, name): function}."""


def install() -> None:
    """Make the interpreter of this process quick, if Triton is there and interprets."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None and not SLOW:
        from triton.runtime import interpreter

        launch, patch = once_a_launch(interpreter)
        quick = {(interpreter.GridExecutor, "__call__"): launch, (interpreter, "_patch_lang"): patch, **once_a_type(interpreter)}
        for (owner, name), function in quick.items():
            SLOW[owner, name] = vars(owner)[name]
            setattr(owner, name, function)


install()
