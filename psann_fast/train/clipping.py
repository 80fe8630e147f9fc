"""The norm of all gradients together, and gradients scaled down to a largest one."""

from __future__ import annotations

import math

import torch
from psann_kernels.native import addresses, launch, serves_lists
from torch import Tensor, nn

from . import snapshot

MARGIN = 1e-6  # torch adds it to the norm that it divides by


def clip(parameters: list[nn.Parameter], most: float) -> Tensor:
    """Scale the gradients so that the norm of all of them together is at most `most`; returns the norm () that they had.

    As torch.nn.utils.clip_grad_norm_, to the bit but for the norm's own last one. That one multiplies by 1 too: on a CPU the norm
    is looked at, and that pass left out; of plain float32 gradients there one native kernel scales all, where it is built.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not serves_lists(gradients):
        norm = nn.utils.get_total_norm(gradients)
        if norm.device.type != "cpu" or hasattr(norm, "full_tensor") or exceeds(norm, most):
            nn.utils.clip_grads_with_norm_(parameters, most, norm)
        return snapshot.whole(norm)
    where, sizes = addresses(gradients), [g.numel() for g in gradients]
    norm = torch.empty((), dtype=torch.float32, device="cpu")
    launch("total_norm", norm, where, sizes, norm.data_ptr())
    if exceeds(norm, most):
        launch("scale_list", norm, where, sizes, (most / (norm + MARGIN)).clamp(max=1.0).item())
        torch.autograd.graph.increment_version(gradients)
    return norm


def exceeds(norm: Tensor, most: float) -> bool:
    """Whether torch would multiply by anything but 1. NaN and infinity are clipped too, as torch does."""
    return not norm + MARGIN <= most or norm == math.inf
