"""Small models for tests, freshly drawn from a seed and moved off their symmetric start."""

from __future__ import annotations

from typing import Any

import torch
from psann_fast.config import ModelConfig
from psann_fast.models import LanguageModel, build_model

BASES = ("respsann", "waveresnet")
POSITIONS = ("rope", "alibi", "sinusoidal")
VOCABULARY = 29


def tiny_config(**options: Any) -> ModelConfig:
    """Two layers of width 16: layer 1 of base 'waveresnet' has a dilated wave branch."""
    small = dict(d_model=16, n_layers=2, n_heads=2, d_mlp=24, vocab_size=VOCABULARY, device="cpu")
    return ModelConfig(**{**small, **options})


def tiny(seed: int = 0, **options: Any) -> LanguageModel:
    """A model in eval mode. Every parameter is moved a little, so that no scale is 1 and no bias 0, and an unused one shows."""
    torch.manual_seed(seed)
    module = build_model(tiny_config(**options)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module


def tokens(*shape: int, seed: int = 0, vocab_size: int = VOCABULARY) -> torch.Tensor:
    """(shape) int64, uniform."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))
