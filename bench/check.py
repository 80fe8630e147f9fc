"""A row is timed only if it is right: the tests' three witnesses, on the tensors that are timed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

WITNESS = Path(__file__).resolve().parent.parent / "tests" / "kernels" / "witness.py"
Function = Callable[..., Any]


def _load() -> ModuleType:
    """tests/kernels/witness.py: one formula judges the tests and the benchmarks."""
    name = "psann_fast_tests_witness"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, WITNESS)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def widened(arguments: Sequence[Any]) -> list[Any]:
    """Floating-point tensors in float64, the rest as it is."""
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def run(function: Function, arguments: Sequence[Any], leaves: int, gradients: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, then the gradients of the first `leaves` arguments where there are any."""
    inputs = [a.detach().requires_grad_() for a in arguments[:leaves]]
    with torch.set_grad_enabled(leaves > 0):
        outputs = function(*inputs, *arguments[leaves:])
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    if not leaves:
        return outputs
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, inputs, list(gradients)))


def compare(fast: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor]) -> tuple[str | None, float]:
    """(None or what is wrong, the worst error as a share of what is allowed) of outputs."""
    budgets: list[Any] = []
    wrong = _pool(budgets, fast, plain, truth, outputs=len(fast))
    if wrong is not None:
        return wrong, float("inf")
    return _judged(budgets)


def _pool(budgets: list[Any], fast: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor], outputs: int) -> str | None:
    """Add the errors of results to the budgets, which are made on first use; what is beyond numbers (shape, where NaNs are) comes
    back as a sentence."""
    witness = _load()
    for number, (f, p, t) in enumerate(zip(fast, plain, truth, strict=True)):
        if len(budgets) <= number:
            is_output = number < outputs
            what = f"output {number}" if is_output else f"gradient {number - outputs}"
            budgets.append(witness.Budget(what, witness.FORWARD if is_output else witness.GRADIENT))
        try:
            budgets[number].add(f, p.to(f.dtype), t)
        except AssertionError as error:
            return str(error)
    return None


def _judged(budgets: list[Any]) -> tuple[str | None, float]:
    def share(budget: Any) -> float:
        return budget.fast_error / budget.allowed() if budget.allowed() > 0 else 0.0 if budget.fast_error == 0 else float("inf")

    worst = max(budgets, key=share)
    if all(budget.holds() for budget in budgets):
        return None, share(worst)
    told = f"error {worst.fast_error:.3e}, allowed {worst.allowed():.3e} (plain torch {worst.torch_error:.3e})"
    return f"{worst.what}: {told}", share(worst)


class Judge:
    """Judges the variants of one case; plain torch and float64 are computed once for all of them.

    The maximum over few elements, a loss's only one above all, differs from draw to draw by more than the factor, so a case that
    fails is judged again with other draws of its values in the pool, as tests/kernels do. A fault does not go away by that, because
    the draw that showed it stays in the pool.
    """

    DRAWS = 8

    def __init__(self, case: Any) -> None:
        self.case = case
        self._witnesses: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def verdict(self, function: Function) -> tuple[str | None, float]:
        """(None or what is wrong, the worst error as a share of what is allowed)."""
        budgets: list[Any] = []
        for draw in range(self.DRAWS):
            arguments, gradients = self.case.make(draw)
            fast = run(function, arguments, self.case.leaves, gradients)
            if self.case.crop_results is not None:
                fast = self.case.crop_results(fast)
            wrong = _pool(budgets, fast, *self._witnessed(draw), outputs=len(fast) - self.case.leaves)
            if wrong is not None:
                return wrong, float("inf")
            result = _judged(budgets)
            if result[0] is None:
                break
        return result

    def _witnessed(self, draw: int) -> tuple[list[Tensor], list[Tensor]]:
        """(the formula with every intermediate in the case's dtype, the specification in float64) of what crop leaves."""
        if draw in self._witnesses:
            return self._witnesses[draw]
        case = self.case
        arguments, gradients = case.make(draw)
        if case.crop is not None:
            arguments, gradients = case.crop(arguments, gradients)
        plain = run(case.plain, arguments, case.leaves, [g.to(case.dtype) for g in gradients])
        truth = run(case.truth or case.call("torch"), widened(arguments), case.leaves, [g.double() for g in gradients])
        if draw == 0:  # the one that every variant meets; more of them would fill a device
            self._witnesses[draw] = (plain, truth)
        return plain, truth
