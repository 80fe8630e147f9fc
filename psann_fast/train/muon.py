"""Muon: momentum whose update of each matrix is made orthogonal. Batched over equal shapes,
in the dtype that the device multiplies best."""

from __future__ import annotations

import math
from typing import Iterable

import torch
from psann_kernels.library import cpu_has_bf16
from psann_kernels.native import serves_lists
from torch import Tensor, nn

from . import muon_native
from .snapshot import sharded_as, whole

MOMENTUM = 0.95
# a x + b x^3 + c x^5, one after the other, bring singular values from [0.01, 1] to between 0.7 and 1.3. Each is the best quintic
# for what the one before leaves, so three do what Jordan's one quintic takes five rounds for: Polar Express, Amsel et al. 2025,
# arXiv:2505.16932, from 0.01. Its argument is shrunk by 2 % in the first and 1 % in the others, because a quintic explodes beyond
# its interval, and bfloat16 rounds by up to 0.4 %.
QUINTICS = ((7.8327, -21.4358, 15.1063), (3.6073, -2.6467, 0.5110), (2.6448, -1.9269, 0.4315))
TINY = 1e-7  # instead of the norm of a matrix of zeros
MOST_AT_ONCE = 1 << 26  # elements made orthogonal together: 128 MB in bfloat16


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled to the root mean square of AdamW's updates (so that one rate serves both);
    decay apart.

    params        matrices only
    lr            learning rate
    weight_decay  each step multiplies a weight by 1 - lr * weight_decay

    The step of torch.optim.Muon(adjust_lr_fn="match_rms_adamw") but for the way to orthogonal. That one works matrix by matrix and
    in bfloat16 everywhere: on a CPU without bfloat16 instructions that takes several times as long as the training step it serves.
    Plain contiguous float32 parameters on a CPU go through native kernels where these are built (and unless `found_inf` is set),
    their products too where these are faster: in float32 with AVX2 or AVX-512, in bfloat16 with AVX512-BF16 and not with AMX, which
    torch uses. All else is torch's. Both give the same but for rounding.
    State: "momentum_buffer". Like torch's fused optimizers it takes no step where the attribute `found_inf`, a () tensor on the
    device, is 1.

    Raises ValueError for a parameter that is no matrix.
    Source: Jordan 2024, https://kellerjordan.github.io/posts/muon; the scale: Liu et al. 2025, arXiv:2502.16982.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None
    _step_supports_amp_scaling = True

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() != 2:
                    raise ValueError(
                        f"params: one has the shape {tuple(p.shape)}; Muon takes matrices only, give the others to AdamW"
                    )

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(tuple(sorted(p.shape)), []).append(p)
            for shape, members in alike.items():
                members.sort(key=is_wide)
                at_once = max(1, MOST_AT_ONCE // max(1, math.prod(shape)))
                for first in range(0, len(members), at_once):
                    self._step_alike(members[first : first + at_once], group["lr"], group["weight_decay"])

    def _step_alike(self, members: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        """One step of parameters of one shape and of that shape turned, the wide ones last."""
        gradients = [p.grad for p in members]
        for p in members:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
        momenta = [self.state[p]["momentum_buffer"] for p in members]
        decay, scale = lr * weight_decay, 0.2 * lr * math.sqrt(max(members[0].shape))
        if self.found_inf is None and serves_lists(members, gradients, momenta):
            self._step_natively(members, gradients, momenta, decay, scale)
            return
        taken = None if self.found_inf is None else 1 - self.found_inf
        if taken is not None:  # NaN times 0 is NaN
            gradients = [torch.where(taken > 0, g, torch.zeros_like(g)) for g in gradients]
        moves = torch._foreach_sub(gradients, momenta)
        torch._foreach_mul_(moves, 1 - MOMENTUM if taken is None else (1 - MOMENTUM) * taken)
        torch._foreach_add_(momenta, moves)
        stacked = torch.stack([as_tall(whole(t)) for t in torch._foreach_lerp(gradients, momenta, MOMENTUM)])
        updates = orthogonal(stacked).to(members[0].dtype)
        if taken is not None:
            updates *= taken
        torch._foreach_mul_(members, 1 - decay if taken is None else 1 - decay * taken)
        turned = [update.mT if is_wide(p) else update for update, p in zip(updates.unbind(), members)]
        torch._foreach_sub_(members, [sharded_as(update, p) for update, p in zip(turned, members)], alpha=scale)

    def _step_natively(
        self, members: list[nn.Parameter], gradients: list[Tensor], momenta: list[Tensor], decay: float, scale: float
    ) -> None:
        """The same of what `muon_native` serves."""
        tall = sum(not is_wide(p) for p in members)
        parts = [part for part in (slice(tall), slice(tall, None)) if members[part]]
        dtype = torch.bfloat16 if multiplies_narrow(members[0]) else torch.float32
        shape = sorted(members[0].shape, reverse=True)
        x = torch.empty(len(members), *shape, dtype=dtype, device=members[0].device)
        for part in parts:
            muon_native.prepare(gradients[part], momenta[part], x[part], MOMENTUM, TINY)
        x = muon_native.rounds(x, QUINTICS, TINY) if muon_native.multiplies(dtype) else rounds(x)
        for part in parts:
            muon_native.apply(members[part], x[part], 1 - decay, scale)


def is_wide(x: Tensor) -> bool:
    return x.shape[-2] < x.shape[-1]


def as_tall(x: Tensor) -> Tensor:
    """x, or where it is wider than high x^T, whose Gram matrix is smaller."""
    return x.mT if is_wide(x) else x


def multiplies_narrow(x: Tensor) -> bool:
    """Whether x's products are computed in bfloat16."""
    return x.dtype != torch.float64 and (x.is_cuda or (x.device.type == "cpu" and cpu_has_bf16()))


def orthogonal(x: Tensor) -> Tensor:
    """About U V^T for each matrix U S V^T of x (n, rows, columns): singular values of at least 0.01 * |x x^T|^(1/2), in Frobenius'
    norm, come out between 0.7 and 1.3, and smaller ones below that.

    Computed in bfloat16 on a GPU and on CPUs that have it in hardware, in float64 for float64, else in float32, and returned so.
    """
    if is_wide(x):
        return orthogonal(x.mT).mT
    is_narrow = multiplies_narrow(x)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(TINY)  # so that squares neither overflow nor vanish
    return rounds(x.bfloat16() if is_narrow else x)


def rounds(x: Tensor) -> Tensor:
    """The quintics of x (n, rows, columns), no wider than high, each matrix of norm 1.

    First x becomes x / sqrt(s), s the norm of x^T x and at least TINY: no singular value is above sqrt(s), which is nearer to the
    largest than |x| and costs no product: the values begin up to columns^(1/4) times nearer to 1.
    """
    for index, (a, b, c) in enumerate(QUINTICS):
        gram = x.mT @ x
        if index == 0:
            s = torch.linalg.matrix_norm(gram.to(torch.promote_types(gram.dtype, torch.float32)), keepdim=True).clamp_min(TINY)
            x, gram = x * s.rsqrt().to(x.dtype), gram * s.reciprocal().to(x.dtype)
        x = torch.baddbmm(x, x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), beta=a)
    return x
