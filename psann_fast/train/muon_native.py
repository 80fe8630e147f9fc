"""A step of Muon on a CPU: memory in csrc/cpu/muon.cpp, products in csrc/cpu/muon_rounds.cpp. Read muon.py first.

A small model's step is hundreds of small calls of torch, which take a third of its time. Here gradients and momenta are read twice
before the products, because the second pass needs the norm that the first adds up, and parameters once after them. A matrix that is
wider than high is turned on the way, so that every product has its operands in order.

Torch's products multiply both halves of what is symmetric: of a square matrix's step these leave out a third, of one four times as
high as wide more than a quarter; and each matrix stays in the caches from its first product to its last.
"""

from __future__ import annotations

from typing import Sequence

import torch
from psann_kernels.library import cpu_has_bf16_tiles
from psann_kernels.native import NATIVE, TYPES, addresses, launch
from torch import Tensor


def prepare(gradients: Sequence[Tensor], momenta: Sequence[Tensor], x: Tensor, momentum: float, least: float) -> None:
    """Move the momenta towards the gradients, in place, and write Nesterov's updates, each over its norm, into x.

    gradients, momenta  (rows, columns) each
    x                   (n, max(rows, columns), min(rows, columns)) float32 or bfloat16, contiguous
    momentum            what the momenta keep of themselves
    least               instead of a norm below it
    """
    if x.numel():
        launch(
            "muon_prepare", x,
            addresses(gradients), addresses(momenta), x.data_ptr(), *gradients[0].shape, momentum, least, TYPES[x.dtype],
        )  # fmt: skip
        torch.autograd.graph.increment_version(momenta)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether `rounds` beats torch's products of this dtype, float32 or bfloat16, on this CPU.

    Without the vectors of AVX2 it takes twice as long (bench.native, PSANN_FAST_NATIVE_ISA=portable).
    """
    if dtype == torch.float32:
        return NATIVE.isa() != "portable"
    return NATIVE.isa() == "avx512_bf16" and not cpu_has_bf16_tiles()


def rounds(x: Tensor, quintics: Sequence[tuple[float, float, float]], least: float) -> Tensor:
    """muon.rounds in place. x (n, rows, columns), rows >= columns, contiguous, float32 or bfloat16."""
    if x.numel():
        launch("muon_rounds", x, x.data_ptr(), [number for each in quintics for number in each], *x.shape, least, TYPES[x.dtype])
    return x


def apply(parameters: Sequence[Tensor], x: Tensor, keep: float, scale: float) -> None:
    """Each parameter = keep * itself - scale * its matrix of x, which lies as `prepare` writes it."""
    if x.numel():
        launch("muon_apply", x, addresses(parameters), x.data_ptr(), *parameters[0].shape, keep, scale, TYPES[x.dtype])
        torch.autograd.graph.increment_version(parameters)
