"""Do these weights belong to this configuration? Answered before anything is built, in a time that the weights bound."""

from __future__ import annotations

from typing import Mapping

import torch
from torch import Tensor

from ..config import ModelConfig, changed
from .registry import build_model

# Building a layer takes 7 ms even without memory, so a deep model is first compared as one of so many layers.
SHALLOW = 16


def misfit(config: ModelConfig, state: Mapping[str, Tensor]) -> str | None:
    """What is wrong with `state` as the state dict of a model of `config`: one tensor, or too few of them; None where all fit.

    The output projection must be in it even where it is tied. Raises ValueError for an unknown base.
    """
    if config.n_layers > len(state):
        return f"n_layers is {config.n_layers}, but the weights hold only {len(state)} tensors"
    for n_layers in sorted({min(config.n_layers, SHALLOW), config.n_layers}):
        try:
            with torch.device("meta"):
                expected = build_model(changed(config, n_layers=n_layers)).state_dict()
        except RuntimeError as error:  # torch cannot count the elements
            return f"the configuration describes no model ({error})"
        names = expected.keys() | state.keys() if n_layers == config.n_layers else expected.keys()
        for name in sorted(names):
            found = tuple(state[name].shape) if name in state else "missing"
            wanted = tuple(expected[name].shape) if name in expected else "absent"
            if found != wanted:
                return (
                    f"the tensor {name:.100} is {found}, and should be {wanted}: "
                    "it is missing, unknown, or of another shape than the configuration says"
                )
    return None
