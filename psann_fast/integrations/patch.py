"""Puts our kernels into other people's models: on one instance, never at import, with a list of what was done and a way back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Iterator

from psann_kernels.registry import check_backend
from torch import nn

from . import patch_attention, patch_loss, patch_pointwise
from .patch_rows import ALREADY, Plan, Row

# Asked in turn for every module; the first that knows it decides.
KINDS = (*patch_pointwise.KINDS, *patch_attention.KINDS, *patch_loss.KINDS)


class PatchError(RuntimeError):
    """patch(strict=True) found modules that it knows and cannot replace. Nothing was changed; the message lists them."""


@dataclass
class Report:
    """What patch did, row by row; print it. `undo()` gives the model back as it was."""

    rows: list[Row]
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def replaced(self) -> list[Row]:
        return [row for row in self.rows if row.new is not None]

    @property
    def kept(self) -> list[Row]:
        return [row for row in self.rows if row.new is None]

    def undo(self) -> None:
        """Restore every module that this call of patch changed. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        table = [("module", "old", "new", "backend", "why")]
        table += [(row.name or "(model)", row.old, row.new or "-", row.backend or "-", row.reason) for row in self.rows]
        widths = [max(len(line[column]) for line in table) for column in range(4)]
        return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[4]]).rstrip() for line in table)


def patch(model: nn.Module, *, backend: str = "auto", strict: bool = False, dry_run: bool = False) -> Report:
    """Replace what our kernels compute in `model`, this instance alone, by our kernels.
    Parameters, names, hooks and state dict stay.

    backend   "auto", "triton", "native" or "torch"; an op that the backend does not implement at all runs as under "auto"
    strict    raise PatchError, changing nothing, if a module of a known kind cannot be replaced
    dry_run   change nothing, and return what would be done

    Known kinds, each tried on a row of numbers before it is replaced:
    psann's SineParam and DampedSine modules, so also the MLPs that have one
    SIREN's sin(w0 * z): modules named Sine with `w0` or `omega_0`, and SineLayer with its `linear`
    RMS norms with `weight` or `scale`
    psannlm's SelfAttention (rotary, ALiBi or neither); with a cache of its own it keeps its own code
    models of transformers: the attention (attn_implementation becomes psann_triton on a GPU, psann_torch elsewhere); and in the
    Llama family the loss, in training: lm_head and cross-entropy in one, so that the output's logits are None there

    Patching again does nothing. Raises TypeError for what is no nn.Module; ValueError for a backend that does not exist.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model is a {type(model).__name__}; pass an nn.Module")
    check_backend(backend, "patch")
    plans = list(_plans(model, backend))
    rows = [row for row, _ in plans]
    stuck = [row for row in rows if row.new is None and row.reason != ALREADY]
    if strict and stuck:
        listed = "; ".join(f"{row.name or '(model)'} ({row.old}): {row.reason}" for row in stuck)
        raise PatchError(f"patch(strict=True): {len(stuck)} modules of a known kind cannot be replaced, so nothing was: {listed}")
    report = Report(rows)
    if not dry_run:
        report._undo = [undo for _, apply in plans if apply is not None for undo in [apply()]]
    return report


def _plans(model: nn.Module, backend: str) -> Iterator[Plan]:
    for name, module in model.named_modules():
        plan = next((plan for kind in KINDS if (plan := kind(name, module, backend)) is not None), None)
        if plan is not None:
            yield plan
    for name, module in patch_attention.whole_models(model):
        yield patch_attention.of_transformers(name, module, backend)
