"""Base "respsann": pre-norm attention and a sine MLP, the latter scaled by a learnable scalar."""

from __future__ import annotations

import torch
from psann_kernels import OPS, scaled_add
from psann_kernels.registry import for_model
from torch import Tensor, nn

from ..config import ModelConfig
from .language_model import LanguageModel
from .layers import Attention, CacheView, ExampleCalls, RMSNorm, SineMLP, Window, as_branch


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
        return self._after(x, self.norm1(x), where, layer)

    def _after(self, x: Tensor, normed: Tensor, where: Window | CacheView, layer: int) -> Tensor:
        """The block from norm1's output on."""
        normed, x = self.norm2(x, self.attn(normed, where, layer))
        return scaled_add(x, as_branch(self.mlp(normed), x), self.alpha, backend=self._add_backend)

    @property
    def _add_backend(self) -> str:
        return for_model(self.norm1.backend, OPS["scaled_add"])

    def example_calls(self) -> ExampleCalls:
        x = self.alpha.new_empty(1, len(self.norm1.scale))
        yield OPS["scaled_add"], self._add_backend, (x, x, self.alpha), {}


def build(config: ModelConfig) -> LanguageModel:
    return LanguageModel(config, ResPSANNBlock)
