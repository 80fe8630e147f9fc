"""What patch plans and reports: a row for each module that it looked at, and how one forward takes another's place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

import torch
from psann_kernels.registry import Op, for_model
from torch import Tensor, nn

# What a patched module remembers: the forward of its class, which `undo` gives back.
ORIGINAL = "_psann_original_forward"
ALREADY = "patched already"


@dataclass(frozen=True)
class Row:
    """One module that patch looked at.

    name      its name in the model, "" for the model itself
    old       what it is: a class, "attention sdpa", ...
    new       the op that takes its place, None if it stays
    backend   the one that would serve the module's parameters on their device now, None if it stays
    reason    why it stays, or what to know
    """

    name: str
    old: str
    new: str | None
    backend: str | None
    reason: str


# A row, and what carries it out: applying returns what undoes it. None: nothing is to be done.
Plan = tuple[Row, "Callable[[], Callable[[], None]] | None"]


def kept(name: str, old: str, reason: str) -> Plan:
    return Row(name, old, None, None, reason), None


def serving(op: Op, backend: str, example: tuple[Any, ...], options: dict[str, Any]) -> tuple[str, str | None]:
    """(the backend that `backend` on a model means for this call, None or its refusal)"""
    chosen = for_model(backend, op)
    answers = dict(op.explain(*example, **options))
    if chosen == "auto":
        chosen = next(candidate for candidate, refusal in answers.items() if refusal is None)
    return chosen, answers.get(chosen)


def replacement(
    name: str,
    module: nn.Module,
    op: Op,
    backend: str,
    example: tuple[Any, ...],
    options: dict[str, Any],
    forward: Callable[..., Any],
    reason: str = "",
) -> Plan:
    """Give `module` the forward, if the backend serves its parameters where they are."""
    old = type(module).__name__
    if ORIGINAL in module.__dict__:
        return kept(name, old, ALREADY)
    if "forward" in module.__dict__:
        return kept(name, old, "its forward was replaced by someone else; undo that first")
    chosen, refusal = serving(op, backend, example, options)
    if refusal is not None:
        return kept(name, old, f"{chosen}: {refusal}")

    def apply() -> Callable[[], None]:
        module.__dict__[ORIGINAL] = type(module).forward
        module.forward = forward.__get__(module)  # found before the class's; its hooks and parameters are untouched

        def undo() -> None:
            module.__dict__.pop(ORIGINAL)
            module.__dict__.pop("forward")

        return undo

    return Row(name, old, op.name, chosen, reason), apply


def equals(forward: Callable[..., Any], module: nn.Module, probe: Tensor, expected: Tensor, roundings: int = 4) -> bool:
    """Whether the module's own forward gives `expected`, but for some roundings:
    so that a class of the same name is not misread."""
    try:
        with torch.no_grad():
            found = forward(module, probe)
    except (TypeError, ValueError, RuntimeError):
        return False
    tolerance = roundings * torch.finfo(probe.dtype).eps * max(1.0, expected.abs().max().item())
    return isinstance(found, Tensor) and found.shape == expected.shape and bool(((found - expected).abs() <= tolerance).all())
