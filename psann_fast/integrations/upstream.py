"""Weights of psannlm 2.0.1: the names and shapes are ours, so a state dict loads unchanged; only the options need reading."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..config import ModelConfig

_SINE_NAMES = {"amplitude": "amplitude", "frequency": "frequency", "decay": "damping"}


def convert(source: Any) -> tuple[ModelConfig, dict[str, Tensor]]:
    """(configuration, state dict) of a psannlm transformer, or of a psannlm estimator that has one. Nothing of theirs is imported.

    Both of their bases become our "respsann", whose block they are. Raises TypeError for other objects, ValueError for options
    that have no counterpart here: their wave branch (it looks at later tokens), other activations than the sine, other norms.
    """
    module = getattr(source, "_model", source)
    if module is None:
        raise ValueError("from_psannlm: the estimator has no model yet; fit it, or load its weights, first")
    theirs = getattr(module, "lm_config", None) or getattr(module, "cfg", None)
    if not isinstance(module, nn.Module) or theirs is None:
        raise TypeError(f"from_psannlm: source is a {type(source).__name__}; pass a psannlm transformer or a fitted psannlm estimator")
    state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    _refuse_foreign(state)
    d_mlp, d_model = state["blocks.0.mlp.fc1.weight"].shape
    config = ModelConfig(
        base="respsann",
        d_model=d_model,
        n_layers=theirs.n_layers,
        n_heads=theirs.n_heads,
        d_mlp=d_mlp,
        vocab_size=state["embed.weight"].shape[0],
        positional_encoding=theirs.positional_encoding,
        dropout=float(theirs.dropout),
        **_sine_options(theirs),
    )
    return config, state


def _refuse_foreign(state: dict[str, Tensor]) -> None:
    known = ("alpha", "attn.", "mlp.fc", "mlp.act._A", "mlp.act._f", "mlp.act._d", "norm1.scale", "norm2.scale")
    for name in state:
        if name in ("embed.weight", "ln_f.scale", "lm_head.weight") or name.split(".", 2)[-1].startswith(known):
            continue
        raise ValueError(
            f"from_psannlm: the tensor {name} has no counterpart here; psannlm's wave branch looks at later tokens and its spectral, "
            "geometric and mixed variants are other models, so only the plain sine block carries over"
        )


def _sine_options(theirs: Any) -> dict[str, Any]:
    """The sine_* options that matter after initialisation: what the damping multiplies, what learns, the clamps."""
    architecture = getattr(theirs, "architecture", None)
    if architecture is not None:
        sine = architecture.activation
        mode, learnable, bounds = sine.decay_mode, sine.learnable, sine.bounds or {}
        bounds = {"amp": bounds.get("amplitude"), "freq": bounds.get("frequency"), "damp": bounds.get("decay")}
    else:
        sine = getattr(theirs, "sine", None)
        if sine is None:
            return {}
        mode, learnable = sine.decay_mode, sine.learnable
        if learnable is None:
            learnable = tuple(_SINE_NAMES) if sine.trainable else ()
        bounds = {name: getattr(sine, f"{name}_bounds") for name in ("amp", "freq", "damp")}
    options = {f"sine_{name}_bounds": value for name, value in bounds.items() if value is not None}
    return {"sine_mode": mode, "sine_learnable": tuple(_SINE_NAMES[name] for name in learnable), **options}
