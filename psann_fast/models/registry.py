"""The bases by name; register_base adds one."""

from __future__ import annotations

from typing import Callable

from torch import nn

from ..config import ModelConfig
from . import respsann, waveresnet

_BASES: dict[str, Callable[[ModelConfig], nn.Module]] = {"respsann": respsann.build, "waveresnet": waveresnet.build}


def register_base(name: str, builder: Callable[[ModelConfig], nn.Module]) -> None:
    """Make `base=name` build a model of yours.

    builder  builder(config) -> nn.Module with the interface of LanguageModel: forward and num_parameters to train; embed, decode,
             wave_state_lengths, rotary_tables, lm_head and config to generate. `LanguageModel(config, block)` with a block of
             your own is the short way.

    Raises ValueError if the name is taken.
    """
    if name in _BASES:
        raise ValueError(f"register_base: {name!r} is taken; choose another name than {', '.join(sorted(_BASES))}")
    _BASES[name] = builder


def build_model(config: ModelConfig) -> nn.Module:
    """The model that `config` describes, freshly initialised from torch's random state. Raises ValueError for an unknown base."""
    if config.base not in _BASES:
        raise ValueError(
            f"base is {config.base!r}; choose one of {', '.join(map(repr, sorted(_BASES)))}, or add it with register_base"
        )
    return _BASES[config.base](config)
