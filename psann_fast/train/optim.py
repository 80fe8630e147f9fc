"""AdamW with decay on matrices only, and the learning-rate schedule."""

from __future__ import annotations

import logging
import math

import torch
from torch import nn

from ..config import TrainConfig

_LOG = logging.getLogger("psann_fast")


def build_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that learn. Norms, biases, alphas and sine parameters (vectors) do not decay."""
    learning = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in learning if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def warmup_length(config: TrainConfig, total_steps: int) -> int:
    """Optimizer steps of warmup: as configured, but at most a tenth of the run, so that a short run learns. Says so when it cuts."""
    longest = max(1, total_steps // 10)
    if config.warmup_steps > longest:
        _LOG.info("warmup_steps %d is shortened to %d, a tenth of this run's %d steps", config.warmup_steps, longest, total_steps)
        return longest
    return config.warmup_steps


def learning_rate(step: int, total_steps: int, warmup: int, config: TrainConfig) -> float:
    """Rate of optimizer step `step` (from 0): linear warmup to lr, then a cosine that reaches min_lr_ratio * lr after the last step.

    After, not at: with a ratio of 0 the last step would move nothing.
    """
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / (total_steps - warmup)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
