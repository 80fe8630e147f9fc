"""What runs a step's tokens through the model: its own modules, or a prepared form of it that is faster."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..models import CacheView
from . import native_decoder


class Decoder(Protocol):
    def hidden(self, ids: Tensor, view: CacheView) -> Tensor:
        """(tokens, d_model) for new tokens (tokens,) int64, laid end to end as `view` says, their keys and values written."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, vocab_size) of rows of hidden."""


class ModuleDecoder:
    """The model as it is."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.hidden, self.logits = module.decode, module.lm_head


def decoder_for(module: torch.nn.Module, weights: str) -> Decoder:
    """The decoder that serves the model with these weights; see EngineOptions.

    Raises ValueError for weights other than "model" where the native decoder cannot serve.
    """
    reason = native_decoder.refuses(module)
    if reason is None:
        return native_decoder.NativeDecoder(native_decoder.prepared(module, weights))
    if weights != "model":
        raise ValueError(f"weights is {weights!r}, which only the native decoder on a CPU has: {reason}; leave weights out")
    return ModuleDecoder(module)
