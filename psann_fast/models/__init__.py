"""The models: what is trained and what generates."""

from .language_model import LanguageModel
from .layers import CacheView, Window
from .registry import build_model, register_base
from .weights import misfit

__all__ = ["CacheView", "LanguageModel", "Window", "build_model", "misfit", "register_base"]
