"""The optimizers, decay on matrices only, and the learning-rate schedule."""

from __future__ import annotations

import logging
import math

import torch
from torch import nn

from ..config import TrainConfig
from .adamw import AdamW
from .muon import Muon

_LOG = logging.getLogger("psann_fast")


def build_optimizers(module: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """The optimizers over the parameters that learn; each learns once.

    "adamw": one AdamW. Norms, biases, alphas and sine parameters (vectors) do not decay.
    "muon": the matrices of the blocks go to Muon, whose orthogonal updates suit products; embedding, output projection, wave taps
    and vectors to AdamW. Muon's updates are scaled to AdamW's size, so one learning rate serves both.
    """
    learning = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    is_orthogonal = lambda name, p: config.optimizer == "muon" and is_product(name, p)  # noqa: E731 (two uses)
    orthogonal = [p for name, p in learning if is_orthogonal(name, p)]
    rest = [p for name, p in learning if not is_orthogonal(name, p)]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2))
    ]
    if orthogonal:
        optimizers.append(Muon(orthogonal, lr=config.lr, weight_decay=config.weight_decay))
    return optimizers


# Peak rates at a d_model of 128.
RATES = {"muon": 5e-3, "adamw": 3e-3}


def default_rate(d_model: int, optimizer: str) -> float:
    """The peak learning rate for a model of this width where none is given.

    At a d_model of 128 AdamW's is the best of bench.ablation. Muon's brings `waveresnet` furthest in 1000 steps of bench.learning;
    from 3e-3 to 8e-3 it is flat, and `respsann` tells none of them apart. Wider models take smaller steps, as products of more
    terms need.
    """
    return RATES[optimizer] * min(1.0, math.sqrt(128 / d_model))


def default_optimizer(amp: str) -> str:
    """The optimizer where none is given: Muon, from which every model of bench.ablation learns more in as many steps; beside
    float16's loss scaling, which takes one optimizer, AdamW."""
    return "adamw" if amp == "fp16" else "muon"


def is_product(name: str, parameter: nn.Parameter) -> bool:
    """True for the weight of a linear layer inside a block."""
    return parameter.dim() == 2 and name.startswith("blocks.") and not name.endswith("wave.weight")


def warmup_length(config: TrainConfig, total_steps: int) -> int:
    """Optimizer steps of warmup: as configured, but at most a tenth of the run, so that a short run learns.
    Says so when it cuts."""
    longest = max(1, total_steps // 10)
    if config.warmup_steps > longest:
        _LOG.info("warmup_steps %d is shortened to %d, a tenth of this run's %d steps", config.warmup_steps, longest, total_steps)
        return longest
    return config.warmup_steps


def learning_rate(step: int, total_steps: int, warmup: int, config: TrainConfig) -> float:
    """Rate of optimizer step `step` (from 0): linear warmup to lr, then a straight line that reaches min_lr_ratio * lr after the
    last step.

    After, not at: with a ratio of 0 the last step would move nothing. Straight, because a cosine spends its last tenth below
    2.5 % of the peak, where steps move next to nothing, while a line still averages out noise there.
    Source: Bergsma et al. 2025, arXiv:2502.15938.
    """
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / (total_steps - warmup)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 - min(progress, 1.0)))
