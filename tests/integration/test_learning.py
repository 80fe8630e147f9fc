"""What cannot be learnt is not learnt: on independent random tokens no honest model falls below their entropy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from psann_fast import ModelConfig, TrainConfig, register_base
from psann_fast.data import Examples, pack
from psann_fast.models import LanguageModel, build_model, registry
from psann_fast.models.respsann import ResPSANNBlock
from psann_fast.train.trainer import evaluate, train

SYMBOLS = 16
ENTROPY = math.log(SYMBOLS)


def random_tokens(seed: int, documents: int) -> Examples:
    """Documents of 40 independent tokens, each one of 16; two more ids are padding and separator."""
    draws = np.random.default_rng(seed).integers(2, 2 + SYMBOLS, (documents, 40))
    return Examples(pack(list(draws), 1, 2 + SYMBOLS), 32, eos_id=1, pad_id=0)


def loss_on_fresh_tokens(base: str) -> float:
    """Nats per token after training on 20,000 random tokens, on 20,000 others, the separators not counted."""
    torch.manual_seed(0)
    module = build_model(ModelConfig(base=base, d_model=32, n_layers=2, n_heads=2, d_mlp=48, vocab_size=2 + SYMBOLS))
    settings = TrainConfig(epochs=5, batch_tokens=1024, lr=3e-3, optimizer="adamw", amp="fp32", progress=False)
    train(module, random_tokens(0, 500), settings)
    return evaluate(module, random_tokens(1, 500), 32, count_separators=False)


@pytest.mark.parametrize("base", ["respsann", "waveresnet"])
def test_random_tokens_stay_at_their_entropy(base):
    loss = loss_on_fresh_tokens(base)
    # Above: untrained it would be higher by far more than what 20,000 tokens let it learn by heart.
    assert ENTROPY - 0.02 < loss < ENTROPY + 0.2


def test_a_base_that_looks_ahead_falls_below(monkeypatch):
    class LooksAhead(ResPSANNBlock):
        def forward(self, x, where, layer):
            following = torch.cat((x[:, 1:], torch.zeros_like(x[:, :1])), 1)
            return super().forward(x + 0.5 * following, where, layer)

    monkeypatch.setattr(registry, "_BASES", dict(registry._BASES))
    register_base("looks ahead", lambda config: LanguageModel(config, LooksAhead))
    assert loss_on_fresh_tokens("looks ahead") < ENTROPY - 0.5
