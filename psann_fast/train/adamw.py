"""AdamW, in one native kernel where parameters are many and small and on a CPU."""

from __future__ import annotations

import operator
from typing import Any, Callable, Iterable, Sequence

import torch
from psann_kernels.native import addresses, launch, serves_lists
from torch import Tensor

LISTS = ("exp_avg", "exp_avg_sq", "step")


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True), whose step on a CPU adds to the counts of steps one by one and starts threads for each tensor.

    params   as torch's
    lr       learning rate
    betas    what the two moments keep of themselves

    Plain contiguous float32 parameters and gradients on a CPU go through one native kernel for each group, where these are built:
    csrc/cpu/adamw.cpp. Everything else is torch's. Both give the same but for rounding, and keep the same state: "step",
    "exp_avg" and "exp_avg_sq" of each parameter.
    Source: Loshchilov and Hutter 2019, arXiv:1711.05101.
    """

    _known: Sequence[Tensor] = ()  # moments and counts that were plain at an earlier step: asking 200 takes longer than their step

    def __init__(self, params: Iterable[Any], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, lr=lr, betas=betas, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient."""
        is_flagged = any(getattr(self, name, None) is not None for name in ("found_inf", "grad_scale"))
        # Another optimizer's state may bring them.
        is_other = any(group["amsgrad"] or group["maximize"] for group in self.param_groups)
        moves = None if closure is not None or is_flagged or is_other else [self._lists(group) for group in self.param_groups]
        if moves is None or not self._serves(moves):
            return super().step(closure)
        for group, lists in zip(self.param_groups, moves):
            parameters = lists[0]
            if parameters:
                launch(
                    "adamw", parameters[0],
                    *map(addresses, lists), [p.numel() for p in parameters], group["lr"], *group["betas"], group["eps"],
                    group["weight_decay"],
                )  # fmt: skip
                torch.autograd.graph.increment_version(parameters)

    def _serves(self, moves: Sequence[Sequence[list[Tensor]]]) -> bool:
        held = [t for lists in moves for tensors in lists[2:] for t in tensors]
        if len(held) != len(self._known) or not all(map(operator.is_, held, self._known)):
            if not serves_lists(held):
                return False
            self._known = held
        return serves_lists(*(tensors for lists in moves for tensors in lists[:2]))

    def _lists(self, group: dict[str, Any]) -> tuple[list[Tensor], ...]:
        """The group's parameters that have gradients, those, and their moments and counts of steps."""
        parameters = [p for p in group["params"] if p.grad is not None]
        states = [self.state[p] for p in parameters]
        for p, state in zip(parameters, states):
            if not state:  # as torch begins
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        return parameters, [p.grad for p in parameters], *([state[name] for state in states] for name in LISTS)
