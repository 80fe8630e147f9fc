"""psann-fast: sine-activated language models (PSANN-LM) on fused kernels."""

from .version import __version__

__all__ = ["__version__"]
