"""The training loss of a batch, as a module that DDP, FSDP and torch.compile can wrap."""

from __future__ import annotations

import contextlib
from typing import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..data.packing import IGNORED
from ..models import LanguageModel


class LossModule(nn.Module):
    """Sum over the targets of a batch of their cross-entropy in nats, () float32 (float64 for a float64 model).

    label_smoothing  weight of the uniform distribution in the target; only while the module trains
    """

    def __init__(self, module: nn.Module, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.module, self.label_smoothing = module, label_smoothing

    def forward(self, input_ids: Tensor, targets: Tensor, document_starts: Tensor | None = None) -> Tensor:
        smoothing = self.label_smoothing if self.training else 0.0
        # A projection of another class (an adapter, say) does more than its weight shows.
        if isinstance(self.module, LanguageModel) and type(self.module.lm_head) is nn.Linear:
            return self.module(input_ids, document_starts, targets, smoothing)
        logits = self.module(input_ids, document_starts)
        logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)


@contextlib.contextmanager
def activation_checkpointing(module: nn.Module, is_wanted: bool) -> Iterator[None]:
    """While entered, each of module.blocks keeps its input alone and computes the rest again in backward."""
    blocks = list(getattr(module, "blocks", ())) if is_wanted else []
    for block in blocks:
        # On the instance, so that hooks, state-dict names and the class stay as they are.
        block.forward = lambda *args, run=block.forward: checkpoint(run, *args, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
