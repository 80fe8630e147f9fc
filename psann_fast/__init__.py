"""psann-fast: sine-activated language models (PSANN-LM) on fused kernels."""

from .config import DataConfig, ModelConfig, SineParams, TrainConfig
from .data import psannLMDataPrep
from .estimator import psannLM
from .models import register_base
from .version import __version__

__all__ = ["DataConfig", "ModelConfig", "SineParams", "TrainConfig", "__version__", "psannLM", "psannLMDataPrep", "register_base"]
