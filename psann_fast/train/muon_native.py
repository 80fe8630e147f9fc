"""What a step of Muon does to memory around its products, in csrc/cpu/muon.cpp. Read muon.py first.

A small model's step is hundreds of small calls of torch, which take a third of its time. Here gradients and momenta are read twice
before the products, because the second pass needs the norm that the first adds up, and parameters once after them. A matrix that is
higher than wide is turned on the way, so that every product has its operands in order.
"""

from __future__ import annotations

from typing import Sequence

import torch
from psann_kernels.native import TYPES, addresses, launch
from torch import Tensor


def prepare(gradients: Sequence[Tensor], momenta: Sequence[Tensor], x: Tensor, momentum: float, least: float) -> None:
    """Move the momenta towards the gradients, in place, and write Nesterov's updates, each over its norm, into x.

    gradients, momenta  (rows, columns) each
    x                   (n, min(rows, columns), max(rows, columns)) float32 or bfloat16, contiguous
    momentum            what the momenta keep of themselves
    least               instead of a norm below it
    """
    if x.numel():
        launch(
            "muon_prepare", x,
            addresses(gradients), addresses(momenta), x.data_ptr(), *gradients[0].shape, momentum, least, TYPES[x.dtype],
        )  # fmt: skip
        torch.autograd.graph.increment_version(momenta)


def bound(x: Tensor, gram: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """muon.bound in place. x (n, rows, columns), gram (n, rows, rows): contiguous, of one dtype, which is float32 or bfloat16."""
    if x.numel():
        launch("muon_bound", x, x.data_ptr(), gram.data_ptr(), *x.shape, least, TYPES[x.dtype])
    return x, gram


def apply(parameters: Sequence[Tensor], x: Tensor, keep: float, scale: float) -> None:
    """Each parameter = keep * itself - scale * its matrix of x, which lies as `prepare` writes it."""
    if x.numel():
        launch("muon_apply", x, addresses(parameters), x.data_ptr(), *parameters[0].shape, keep, scale, TYPES[x.dtype])
        torch.autograd.graph.increment_version(parameters)
