"""Small models for tests, freshly drawn from a seed and moved off their symmetric start."""

from __future__ import annotations

from typing import Any

import torch
from psann_fast import psannLM, psannLMDataPrep
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


SENTENCES = [
    "The sea was calm and the boat went slowly home.",
    "A red fox ran over the hill, and nobody saw it.",
    "Rain fell all night; in the morning the street was a river.",
    "She read the letter twice before she answered.",
    "Nothing is as loud as a clock in an empty house.",
]


def data(**options: Any) -> psannLMDataPrep:
    """Five sentences, byte tokens, windows of 16."""
    return psannLMDataPrep(SENTENCES, **{"tokenizer": "simple", "max_length": 16, **options})


def model(seed: int = 0, **options: Any) -> psannLM:
    """A psannLM of one small layer, its module built, so that equal seeds start alike."""
    torch.manual_seed(seed)
    small = dict(base="respsann", d_model=16, n_layers=1, n_heads=2, d_mlp=24, vocab_size=258, device="cpu")
    lm = psannLM(**{**small, **options})
    lm.module
    return lm


def fitted(lm: psannLM | None = None, prepared: psannLMDataPrep | None = None, **options: Any) -> psannLM:
    """`lm` after a few steps, a row of history_ for each."""
    quick = dict(batch_tokens=64, max_steps=4, log_interval_steps=1, progress=False, amp="fp32")
    return (lm or model()).fit(prepared or data(), **{**quick, **options})
