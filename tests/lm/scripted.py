"""A stand-in for a trained model that writes exactly what a test says, through the real engine."""

from __future__ import annotations

import torch
from psann_fast import ModelConfig, psannLM, register_base
from psann_fast.data import train_tokenizer
from psann_fast.models import CacheView, registry
from torch import Tensor, nn


class Successor(nn.Module):
    """After token t always comes successors[t]. It records the ids that each step was given."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, 1)
        self.lm_head = nn.Identity()
        self.successors = torch.zeros(config.vocab_size, dtype=torch.int64)
        self.steps: list[list[int]] = []

    def decode(self, input_ids: Tensor, view: CacheView) -> Tensor:
        self.steps.append(input_ids.tolist())
        return 1000.0 * nn.functional.one_hot(self.successors[input_ids], self.config.vocab_size)

    def wave_state_lengths(self) -> list[int]:
        return [0] * self.config.n_layers

    def rotary_tables(self, length: int) -> tuple[None, None]:
        return None, None


def scripted(monkeypatch, *lines: str, **options) -> psannLM:
    """A psannLM that, once it reads the first character of a line, writes the rest of that line, then the end of the document.

    Tokens are single bytes, and no byte may stand twice in the lines. After a byte of no line it ends the document.
    """
    monkeypatch.setattr(registry, "_BASES", dict(registry._BASES))
    register_base("scripted", Successor)
    tokenizer = train_tokenizer("simple", ["only bytes"])
    model = psannLM(base="scripted", d_model=2, n_layers=1, n_heads=1, vocab_size=tokenizer.vocab_size, device="cpu", **options)
    model.tokenizer = tokenizer
    model.module.successors[:] = tokenizer.eos_id
    seen: set[int] = set()
    for line in lines:
        ids = tokenizer.encode(line)
        assert len(set(ids)) == len(ids) and not seen & set(ids), "a byte stands twice, so what follows it is not clear"
        seen |= set(ids)
        model.module.successors[ids] = torch.tensor([*ids[1:], tokenizer.eos_id])
    return model
