"""Three witnesses: float64 is the truth, plain torch in the working dtype shows what that dtype can do, the fast path may be
at most `factor` times as wrong, plus one rounding.

    err(fast) <= factor * err(torch) + 2 * max|((r + 0.3) - 0.3) - r| + floor      with r = the truth rounded to the dtype

factor is 2 forward and 3 for gradients; floor is 0 forward. Maxima want at least 128 elements, so `Budget` pools small cases.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

FORWARD, GRADIENT = 2.0, 3.0
BACKENDS = ("torch", "triton", "native")


class Budget:
    """Pools cases until there are enough elements for their maxima to mean something; `check` judges and must be called."""

    def __init__(self, what: str, factor: float, floor: float = 0.0) -> None:
        self.what, self.factor, self.floor = what, factor, floor
        self.fast_error = self.torch_error = self.rounding = 0.0
        self.elements = 0

    def add(self, fast: Tensor, plain: Tensor, truth: Tensor) -> None:
        """fast and plain in the working dtype, truth in float64. NaN and Inf are compared position by position."""
        assert fast.shape == truth.shape, f"{self.what}: shape {tuple(fast.shape)}, expected {tuple(truth.shape)}"
        assert fast.dtype == plain.dtype and truth.dtype == torch.float64
        rounded = truth.to(fast.dtype)
        for name, is_special in (("nan", torch.isnan), ("inf", torch.isinf)):
            assert torch.equal(is_special(fast), is_special(rounded)), f"{self.what}: {name} pattern differs"
        usable = torch.isfinite(rounded)
        if not usable.any():
            return
        fast, plain, truth, rounded = (t[usable] for t in (fast, plain, truth, rounded))
        self.fast_error = max(self.fast_error, (fast.double() - truth).abs().max().item())
        self.torch_error = max(self.torch_error, (plain.double() - truth).abs().max().item())
        self.rounding = max(self.rounding, (((rounded + 0.3) - 0.3) - rounded).abs().max().item())
        self.elements += fast.numel()

    def allowed(self) -> float:
        return self.factor * self.torch_error + 2 * self.rounding + self.floor

    def holds(self) -> bool:
        return self.fast_error <= self.allowed()

    def check(self) -> None:
        assert self.holds(), (
            f"{self.what}: error {self.fast_error:.3e} exceeds {self.allowed():.3e} (plain torch {self.torch_error:.3e}, "
            f"rounding {self.rounding:.3e}, floor {self.floor:.3e}, {self.elements} elements)"
        )


def assert_within_budget(what: str, fast: Tensor, plain: Tensor, truth: Tensor, factor: float, floor: float = 0.0) -> None:
    budget = Budget(what, factor, floor)
    budget.add(fast, plain, truth)
    budget.check()


def judge(pool: Callable[[dict[Any, Budget], int], None], draws: int = 64) -> None:
    """Check the budgets that pool(budgets, 0) fills; where one fails, with the same shapes' other draws of values in the pool too.

    pool(budgets, n) adds a case of fixed shapes with the n-th draw of its values. The maximum over few elements differs from draw
    to draw by more than the factor; a fault does not go away, because the draw that showed it stays in the pool.
    """
    budgets: dict[Any, Budget] = {}
    pool(budgets, 0)
    if any(not budget.holds() for budget in budgets.values()):
        for n in range(1, draws):
            pool(budgets, n)
    for budget in budgets.values():
        budget.check()


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """torch.empty and its kin give NaN (integers: a huge value), so that an element nobody wrote is seen."""

    def poison(t: Tensor) -> Tensor:
        if t.device.type == "meta" or isinstance(t, torch._subclasses.FakeTensor):
            return t
        return t.fill_(float("nan")) if t.is_floating_point() else t.fill_(torch.iinfo(t.dtype).max)

    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty
    with (
        mock.patch.object(torch, "empty", lambda *a, **k: poison(empty(*a, **k))),
        mock.patch.object(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k))),
        mock.patch.object(Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k))),
    ):
        yield


def strided_copies(t: Tensor) -> dict[str, Tensor]:
    """The same values in awkward memory: transposed storage, every second element, a start off by one element."""
    copies = {"contiguous": t.contiguous()}
    if t.dim() >= 2:
        copies["transposed"] = t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if t.dim() >= 1:
        copies["step 2"] = torch.stack((t, torch.full_like(t, float("nan"))), -1).flatten(-2)[..., ::2]
        padded = torch.full((t.numel() + 1,), float("nan"), dtype=t.dtype, device=t.device)
        padded[1:] = t.flatten()
        copies["misaligned"] = padded[1:].view(t.shape)
    return copies
