"""Triton's interpreter in about half the time: patch the language once a launch. A pytest plugin, loaded by conftest.py.

A launch in the interpreter replaces the builtins of triton.language, and every call of one jitted function by another looks through
the whole language again to replace what is replaced already; that search is half of the time of our kernels. Inside a launch it is
now made once for each set of language modules that the called functions see. The arithmetic is not touched:
test_quick_interpreter.py compares bits.
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


SLOW: list[Callable[..., Any]] = []
"""Triton's own two functions, where they have been replaced."""


def install() -> None:
    """Make the interpreter of this process quick, if Triton is there and interprets."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None and not SLOW:
        from triton.runtime import interpreter

        SLOW.extend([interpreter.GridExecutor.__call__, interpreter._patch_lang])
        interpreter.GridExecutor.__call__, interpreter._patch_lang = once_a_launch(interpreter)


install()
