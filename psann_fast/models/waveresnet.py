"""Base "waveresnet": the respsann block with a wave branch over time before attention."""

from __future__ import annotations

from torch import Tensor

from ..config import ModelConfig
from .language_model import LanguageModel
from .layers import CacheView, WaveBranch, Window
from .respsann import ResPSANNBlock


class WaveResNetBlock(ResPSANNBlock):
    """x + wave(x), then as respsann."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.wave = WaveBranch(config, layer)

    def forward(self, x: Tensor, where: Window | CacheView, layer: int) -> Tensor:
        normed, x = self.norm1(x, self.wave(x, where, layer))
        return self._after(x, normed, where, layer)


def build(config: ModelConfig) -> LanguageModel:
    return LanguageModel(config, WaveResNetBlock)
