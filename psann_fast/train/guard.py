"""Keeps steps that are not finite away from the weights, without making the host wait for the device."""

from __future__ import annotations

import logging
import math
from typing import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..config import TrainConfig

_LOG = logging.getLogger("psann_fast")

# A gradient scale starts at 2^16 and halves with each overflow: after so many in a row it is below 1, where float16 gains nothing.
MOST_SKIPS_IN_A_ROW = 20


class TrainingDiverged(FloatingPointError):
    """The loss, a gradient or a weight is NaN or infinite. The weights are those before the failing step."""


class Guard:
    """Takes the optimizer's steps. One whose loss or gradient norm is not finite leaves weights and optimizer state as they are.

    nan_policy "stop": so does every later step, until `check` raises. "skip": training goes on with the next batch, unless
    MOST_SKIPS_IN_A_ROW fail one after the other. In float16, where the gradient scale is found by overflowing, a step that is not
    finite is skipped in either case.

    On a CPU every step is looked at before it is taken. On a GPU looking would wait for the device, so there the optimizer is told
    by a flag that stays on the device, and `check` looks: when a row is logged, before a save, at the end. An optimizer that
    knows no such flag makes every step be looked at there too.
    """

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], scaler: torch.amp.GradScaler, config: TrainConfig, device: torch.device
    ) -> None:
        self.optimizers, self.scaler, self.config = optimizers, scaler, config
        self.stops = config.nan_policy == "stop" and not scaler.is_enabled()
        self.waits = device.type == "cpu" or not all(getattr(o, "_step_supports_amp_scaling", False) for o in optimizers)
        zero = lambda: torch.zeros((), device=device)  # noqa: E731 (three uses)
        self._skipped, self._in_a_row, self._most_in_a_row = zero(), zero(), zero()
        self._failure = torch.zeros(3, device=device)  # step, loss and gradient norm of the newest failure, for "stop" the first
        self._reported = 0

    def step(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Take optimizer step `step` (from 1), whose loss and gradient norm are scalars on the device."""
        if self.waits and not self.scaler.is_enabled() and math.isfinite(loss) and math.isfinite(norm):
            self._in_a_row.zero_()
            for optimizer in self.optimizers:
                optimizer.step()
            return
        is_bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        is_new = is_bad & (self._skipped == 0) if self.stops else is_bad
        if self.stops:
            is_bad = is_bad | (self._skipped > 0)
        self._failure = torch.where(is_new, torch.stack((torch.full_like(norm, step), loss.to(norm.dtype), norm)), self._failure)
        bad = is_bad.to(self._skipped.dtype)
        self._skipped += bad
        self._in_a_row = (self._in_a_row + 1) * bad
        self._most_in_a_row = torch.maximum(self._most_in_a_row, self._in_a_row)
        if self.scaler.is_enabled():
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
        elif self.waits:
            self.check()
        else:
            # torch's fused optimizers leave weights, moments and their count of steps as they are where found_inf is 1.
            for optimizer in self.optimizers:
                optimizer.grad_scale, optimizer.found_inf = None, bad
                optimizer.step()

    def state(self) -> dict[str, float]:
        """What a run that continues must know; after `check`."""
        return {"skipped": float(self._skipped), "in_a_row": float(self._in_a_row), "most_in_a_row": float(self._most_in_a_row)}

    def restore(self, state: Mapping[str, float]) -> None:
        """Put the values of `state` back."""
        self._skipped.fill_(state["skipped"])
        self._in_a_row.fill_(state["in_a_row"])
        self._most_in_a_row.fill_(state["most_in_a_row"])
        self._reported = int(state["skipped"])

    def check(self) -> int:
        """The steps skipped so far; waits for the device. Raises TrainingDiverged if training must stop."""
        skipped, in_a_row = int(self._skipped), int(self._most_in_a_row)
        if skipped == 0:
            return 0
        step, loss, norm = self._failure.tolist()
        what = f"loss is {loss} and the gradient norm {norm} at optimizer step {step:.0f}"
        advice = f"Lower lr (it is {self.config.lr:g}), lengthen warmup_steps, or use amp='fp32'"
        if self.stops:
            raise TrainingDiverged(f"{what}; the weights are those before it. {advice}")
        if in_a_row >= MOST_SKIPS_IN_A_ROW or (self.scaler.is_enabled() and self.scaler.get_scale() < 1):
            raise TrainingDiverged(
                f"{what}, and {in_a_row} steps in a row were skipped; the weights are those before them. {advice}"
            )
        if skipped > self._reported and not self.scaler.is_enabled():
            _LOG.warning("%s: %d steps skipped so far", what, skipped)
        self._reported = skipped
        return skipped


def weights_are_finite(module: nn.Module) -> bool:
    """False if a weight of `module` is NaN or infinite; of a sharded module, a weight that this process holds."""
    weights = [p.to_local() if hasattr(p, "to_local") else p.detach() for p in module.parameters()]
    # The largest magnitude of each tensor is finite exactly if all of it is; so the device is waited for once.
    largest = torch._foreach_norm([w for w in weights if w.numel()], math.inf)
    return bool(torch.isfinite(torch.stack(largest)).all())
