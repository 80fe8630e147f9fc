"""Chooses the implementation that serves a call. This is the only place that does.

An `Op` has one specification (plain torch, backend "torch") and any number of faster implementations. Each of those
states, in a sentence, the calls that it cannot serve. Selection is ordinary Python over device, dtype, shape and stride,
so `torch.compile(fullgraph=True)` traces through it.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any, Callable, Iterator

import torch

BACKENDS = ("auto", "triton", "native", "torch", "gluon")

# Data, not policy in code: changed when a benchmark row says so. Devices that are not listed run the specification.
# On a GPU native and gluon serve by name only: no GPU has run them yet.
AUTO_ORDER = {"cpu": ("native", "torch"), "cuda": ("triton", "torch")}

OPS: dict[str, "Op"] = {}


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve the call. The message says why and what would help."""


@dataclass(frozen=True)
class Implementation:
    function: Callable[..., Any]
    refuses: Callable[..., str | None]


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


def not_at_once(*arguments: Any) -> Any:
    """What an op without an `at_once` answers to every call."""
    return NotImplemented


def _serves_everything(*args: Any, **kwargs: Any) -> None:
    return None


class Op:
    """One operation: its name, its specification and the implementations that came with it."""

    def __init__(self, name: str, is_suspect: Callable[..., bool] = _always) -> None:
        """is_suspect(*args, **kwargs): whether what `blame` says of a backend concerns this call."""
        self.name, self._is_suspect = name, is_suspect
        self.implementations: dict[str, Implementation] = {}
        self.unavailable: dict[str, str] = {}
        self.partial: set[str] = set()
        # at_once(backend, *arguments): the output of a call whose backend is that of `offer` or "auto", or NotImplemented where the
        # call must go the long way, through checks and `select`. It is not for a trace: ask is_dynamo_compiling() first.
        self.at_once = self._at_once = not_at_once
        self._faults: dict[tuple[str, torch.device], str] = {}
        OPS[name] = self

    def specify(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register the plain-torch definition. Decorator; returns `function` unchanged."""
        self.implementations["torch"] = Implementation(function, _serves_everything)
        return function

    def offer(
        self,
        backend: str,
        refuses: Callable[..., str | None],
        is_partial: bool = False,
        at_once: Callable[..., Any] = not_at_once,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register a faster implementation. `refuses(*args, **kwargs)` returns None or a sentence saying why not. is_partial: it is
        made for some kinds of calls, and a model that names the backend has the others served as under "auto". at_once: serves,
        of the calls that this backend does not refuse, some on a CPU; `Op.at_once` says how it is called."""
        if is_partial:
            self.partial.add(backend)
        if at_once is not not_at_once:
            assert AUTO_ORDER["cpu"][0] == backend, f"{self.name}: {backend} is not what auto takes first on a CPU"
            self.at_once = self._at_once = at_once

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self.implementations[backend] = Implementation(function, refuses)
            return function

        return register

    def has(self, backend: str) -> bool:
        """True if `backend` implements this op at all, whether or not it could be loaded on this machine."""
        return backend in self.implementations or backend in self.unavailable

    def blame(self, backend: str, device: torch.device, reason: str | None) -> None:
        """Make `backend` refuse every suspect call on `device` with that reason, or, with None, no longer.
        What self_test found says so."""
        if reason is None:
            self._faults.pop((backend, device), None)
        else:
            self._faults[backend, device] = reason
        # Whether a call is a suspect is found out on the long way.
        self.at_once = not_at_once if self._faults else self._at_once

    def is_faulty(self, backend: str, device: torch.device) -> bool:
        """Whether `blame` has taken `backend` away on `device`."""
        return (backend, device) in self._faults

    def refusal(self, backend: str, *args: Any, **kwargs: Any) -> str | None:
        """Why `backend` cannot serve this call, or None if it can."""
        return self._reason(backend, args, kwargs)

    def _reason(self, backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """`refusal` of arguments that need not be packed again."""
        implementation = self.implementations.get(backend)
        if implementation is None:
            return self.unavailable.get(backend, f"{backend} does not implement {self.name}")
        if (
            self._faults
            and (reason := self._faults.get((backend, args[0].device))) is not None
            and self._is_suspect(*args, **kwargs)
        ):
            return reason
        return implementation.refuses(*args, **kwargs)

    def select(self, backend: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """The function that serves this call.

        backend   "auto", or a name: a named backend serves the call or BackendError is raised, never replaced.
        args      the call's own arguments, the first of them a tensor whose device decides the order of "auto".
        """
        if backend == "auto":
            for candidate in AUTO_ORDER.get(args[0].device.type, ("torch",)):
                if candidate in self.implementations and self._reason(candidate, args, kwargs) is None:
                    return self.implementations[candidate].function
            raise AssertionError(f"{self.name} has no specification")
        reason = self._reason(backend, args, kwargs)
        if reason is not None:
            check_backend(backend, self.name)
            raise BackendError(f"{self.name}(backend={backend!r}): {reason}")
        return self.implementations[backend].function

    def explain(self, *args: Any, **kwargs: Any) -> list[tuple[str, str | None]]:
        """Every backend's answer to this call, in the order of "auto": (backend, None if it serves, else the reason).

        Of "gluon", which is for one op, nothing is said where it is not.
        """
        order = AUTO_ORDER.get(args[0].device.type, ("torch",))
        names = list(order) + [name for name in BACKENDS[1:] if name not in order and (name != "gluon" or self.has(name))]
        return [(name, self.refusal(name, *args, **kwargs)) for name in names]


def check_backend(backend: str, where: str) -> None:
    """Raise ValueError unless `backend` is one of BACKENDS."""
    if backend not in BACKENDS:
        raise ValueError(f"{where}: backend is {backend!r}; choose one of {', '.join(map(repr, BACKENDS))}")


def for_model(backend: str, op: Op) -> str:
    """What `backend=` on a model means for one op: that backend if it implements the op, and not in part, otherwise "auto"."""
    return backend if backend == "auto" or (op.has(backend) and backend not in op.partial) else "auto"


def explain(subject: str | torch.nn.Module, *args: Any, **kwargs: Any) -> list[dict[str, str]]:
    """Say which backend serves an op, and why the others do not.

    subject   an op's name, followed by that call's arguments; or a model. Modules that call ops describe their calls by a
              method `example_calls()` yielding (op, backend, args, kwargs) with tensors of the shapes that they really use, and
              name in `speaks_for` the submodules whose tensors they pass on, which then call no op of their own.

    Returns rows of op, backend, serves ("yes" or "no"), reason. For a model: one row per distinct op, the backend that runs.
    Raises ValueError for an unknown op.
    """
    if isinstance(subject, str):
        if subject not in OPS:
            raise ValueError(f"explain: no op is called {subject!r}; there are {', '.join(sorted(OPS))}")
        return [
            {"op": subject, "backend": backend, "serves": "yes" if reason is None else "no", "reason": reason or "serves this call"}
            for backend, reason in OPS[subject].explain(*args, **kwargs)
        ]
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for op, backend, call_args, call_kwargs in _calls(subject):
        row = _chosen(op, backend, call_args, call_kwargs)
        rows[row["op"], row["backend"], row["reason"]] = row
    return list(rows.values())


def _calls(model: torch.nn.Module) -> Iterator[tuple[Op, str, tuple[Any, ...], dict[str, Any]]]:
    if hasattr(model, "example_calls"):
        yield from model.example_calls()
    for name, part in model.named_children():
        if name not in getattr(model, "speaks_for", ()):
            yield from _calls(part)


def _chosen(op: Op, backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, str]:
    asked = for_model(backend, op)
    if asked != "auto":
        reason = op.refusal(asked, *args, **kwargs)
        return {"op": op.name, "backend": asked, "serves": "no" if reason else "yes", "reason": reason or "asked for by name"}
    passed_over = []
    for name, reason in op.explain(*args, **kwargs):
        if reason is None:
            why = "; ".join(passed_over) or "first in the order of auto"
            if backend not in ("auto", name):
                why = f"{backend} does not implement {op.name}{' as a whole' if op.has(backend) else ''}; {why}"
            return {"op": op.name, "backend": name, "serves": "yes", "reason": why}
        passed_over.append(f"{name}: {reason}")
    raise AssertionError(f"{op.name} has no specification")


def attach(package: str, backend: str, requires: str, modules: dict[str, tuple[Op, ...]]) -> None:
    """Import a backend's modules, which register themselves, or record for each op of each module why they are missing."""
    if importlib.util.find_spec(requires) is None:
        for op in (op for ops in modules.values() for op in ops):
            op.unavailable[backend] = f"{requires} is not installed; pip install {requires}"
        return
    for name in modules:
        importlib.import_module(f".{name}", package)
