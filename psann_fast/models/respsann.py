"""Base "respsann": pre-norm attention and a sine MLP, the latter scaled by a learnable scalar."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from .language_model import LanguageModel
from .layers import Attention, CacheView, RMSNorm, SineMLP, Window


class ResPSANNBlock(nn.Module):
    """x + attn(norm1(x)), then x + alpha * mlp(norm2(x)); alpha (1,) starts at 1."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.d_model, config.backend)
        self.attn = Attention(config)
        self.norm2 = RMSNorm(config.d_model, config.backend)
        self.mlp = SineMLP(config)
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, where: Window | CacheView, layer: int) -> Tensor:
        x = x + self.attn(self.norm1(x), where, layer)
        return x + self.alpha * self.mlp(self.norm2(x))


def build(config: ModelConfig) -> LanguageModel:
    return LanguageModel(config, ResPSANNBlock)
