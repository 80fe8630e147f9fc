"""Models of psannlm: their blocks, options and tokenizers as ours, with the same logits.

What is read: files of psannlm 2.0.1 (model.save, and the trainer's checkpoints), files of 0.12, and its models in memory. The
names and shapes of the weights are ours, so they load unchanged; only the options need reading. Nothing of psannlm is imported,
and nothing in a file is executed.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Collection, Mapping

from torch import Tensor, nn

from ..config import ModelConfig
from ..data import Tokenizer
from ..models import misfit
from .torch_file import StoredTensor, TorchFile
from .upstream_tokenizer import NotCarried, convert_tokenizer

SINE_NAMES = {"amplitude": "amplitude", "frequency": "frequency", "decay": "damping"}
BASES = ("respsann", "waveresnet", "residual", "wave")  # theirs, older and newer names: all are our respsann
DROPPABLE = ("wave",)
BOS_NOTE = "psannlm opens every text with its id 1 ([BOS]), ours open with the text; the ids of the text itself are the same"


@dataclass(frozen=True)
class Imported:
    """What convert makes of a psannlm model.

    config     ModelConfig of the same model
    state      its weights, by our names
    tokenizer  its tokenizer, where texts get the same ids here; else None
    notes      sentences on what does not carry over
    """

    config: ModelConfig
    state: dict[str, Tensor]
    tokenizer: Tokenizer | None
    notes: tuple[str, ...]


def convert(
    source: Any, *, drop: Collection[str] = (), n_heads: int | None = None, positional_encoding: str | None = None
) -> Imported:
    """A psannlm model as ours.

    source               path of a .pt file, a psannlm transformer, or a psannlm estimator that has one
    drop                 parts to leave behind; only "wave", their temporal branch: it looks at later tokens, so it has no place in
                         a causal model. Without it the logits differ.
    n_heads, positional_encoding   for files that do not say (trainer checkpoints of 0.12); an error where they contradict the file

    Their bases respsann and waveresnet both become our "respsann", whose block they are. Raises UnsafeFile for a file that is
    damaged or asks to execute something, TypeError for other objects, ValueError for what has no counterpart here: the wave branch
    unless dropped, other activations than the sine, other norms and bases.
    """
    unknown = set(drop) - set(DROPPABLE)
    if unknown:
        raise ValueError(f"from_psannlm: drop names {sorted(unknown)}; the one part that can be left behind is 'wave'")
    notes: list[str] = []
    options, state, tokenizer_state = _read_file(source, notes) if isinstance(source, (str, Path)) else _read_object(source)
    state = _without_wrappers(state)
    if "wave" in drop:
        state = _drop_wave(state, notes)
    _refuse_foreign(state)
    if tokenizer_state is None:
        notes.append("it has no tokenizer: set model.tokenizer before generating or scoring")
    config = _config(options, state, n_heads, positional_encoding, notes)
    wrong = misfit(config, state)
    if wrong is not None:
        raise ValueError(f"from_psannlm: {wrong}; the file's parts do not belong together")
    return Imported(config, state, _tokenizer(tokenizer_state, config, notes), tuple(notes))


def _read_file(path: str | Path, notes: list[str]) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"from_psannlm: there is no file {path}; pass a .pt file that psannlm wrote")
    with TorchFile(path) as file:
        content = file.content
        if not isinstance(content, dict):
            raise ValueError(f"from_psannlm: {path} holds a {type(content).__name__}; a psannlm file holds a dict")
        if "state_dict" in content:
            stored, options = content["state_dict"], content.get("config") or {}
        elif "model" in content:
            stored, options = content["model"], content.get("config") or {}
            notes.append("the optimizer's state, its schedule and the place in the data stay behind: fit begins a new schedule")
        else:
            raise ValueError(f"from_psannlm: {path} holds {sorted(map(str, content))}; a psannlm file holds state_dict or model")
        if not isinstance(stored, dict) or not all(
            isinstance(name, str) and isinstance(t, StoredTensor) for name, t in stored.items()
        ):
            raise ValueError(f"from_psannlm: the weights in {path} are not a dict of names and tensors")
        if not isinstance(options, dict):
            raise ValueError(f"from_psannlm: config in {path} is a {type(options).__name__}; it must be a dict of options")
        return options, file.tensors(stored), content.get("tokenizer")


def _read_object(source: Any) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    module = getattr(source, "_model", source)
    if module is None:
        raise ValueError("from_psannlm: the estimator has no model yet; fit it, or load its weights, first")
    theirs = getattr(module, "lm_config", None) or getattr(module, "cfg", None)
    if not isinstance(module, nn.Module) or not dataclasses.is_dataclass(theirs):
        raise TypeError(
            f"from_psannlm: source is a {type(source).__name__}; pass the path of a psannlm file, a psannlm transformer or a "
            "fitted psannlm estimator"
        )
    state = {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
    tokenizer = getattr(source, "_tokenizer", None)
    return dataclasses.asdict(theirs), state, None if tokenizer is None else tokenizer.to_state()


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DistributedDataParallel and torch.compile put a name of theirs before every tensor's."""
    for prefix in ("module.", "_orig_mod."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _drop_wave(state: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    dropped = [name for name in state if re.match(r"blocks\.\d+\.wave\.", name)]
    if dropped:
        notes.append(f"the wave branch was left behind as asked ({len(dropped)} tensors); the logits differ from psannlm's")
    return {name: tensor for name, tensor in state.items() if name not in dropped}


def _refuse_foreign(state: dict[str, Tensor]) -> None:
    known = ("alpha", "attn.", "mlp.fc", "mlp.act._A", "mlp.act._f", "mlp.act._d", "norm1.scale", "norm2.scale")
    for name in state:
        if re.match(r"blocks\.\d+\.wave\.", name):
            raise ValueError(
                f"from_psannlm: the tensor {name} belongs to psannlm's wave branch, which looks at later tokens, so no causal "
                "model can give its logits; drop='wave' leaves the branch behind (and changes the logits)"
            )
        if name in ("embed.weight", "ln_f.scale", "lm_head.weight") or name.split(".", 2)[-1].startswith(known):
            continue
        raise ValueError(
            f"from_psannlm: the tensor {name} has no counterpart here; psannlm's spectral, geometric, mixed and plain transformer "
            "variants are other models, so only the sine block carries over"
        )


def _config(
    options: Mapping[str, Any], state: Mapping[str, Tensor], n_heads: int | None, positional_encoding: str | None, notes: list[str]
) -> ModelConfig:
    """Sizes come from the weights; what weights do not show comes from the options."""
    first = ("embed.weight", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.act._A")
    for name in first:
        if name not in state:
            raise ValueError(f"from_psannlm: there is no tensor {name}; only models of psannlm with the sine activation carry over")
    for name in first[:2]:
        if state[name].dim() != 2:
            raise ValueError(f"from_psannlm: the tensor {name} has shape {tuple(state[name].shape)}; it must be a matrix")
    vocab_size, d_model = state["embed.weight"].shape
    layers = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    architecture = options.get("architecture") or {}
    base = architecture.get("kind", options.get("base", "respsann"))
    if base not in BASES:
        raise ValueError(f"from_psannlm: the model's base is {base!r}; only psannlm's {', '.join(BASES)} carry over")
    # Options that 0.12 keeps apart; those of its high-level interface that reached the model are among these.
    options = {**options, **(options.get("overrides") or {})}
    positions = options.get("positional_encoding")
    if positions is None and options.get("rope") is not None:
        positions = "rope" if options["rope"] else "sinusoidal"
    residual = architecture.get("residual") or {}
    if residual.get("norm", "rms") != "rms":
        raise ValueError(f"from_psannlm: the model's norm is {residual['norm']!r}; only 'rms' carries over")
    if residual.get("drop_path"):
        notes.append(
            f"drop_path={residual['drop_path']:g}, which drops whole blocks in training, has no counterpart; logits are the same"
        )
    if options.get("dropout"):
        notes.append("dropout acts after the projections here, and no longer on attention's probabilities; logits are the same")
    return ModelConfig(
        base="respsann",
        d_model=d_model,
        n_layers=len(layers),
        n_heads=_said("n_heads", options.get("n_heads"), n_heads),
        d_mlp=state["blocks.0.mlp.fc1.weight"].shape[0],
        vocab_size=vocab_size,
        positional_encoding=_said("positional_encoding", positions, positional_encoding),
        dropout=float(options.get("dropout") or 0.0),
        **_sine_options(architecture.get("activation"), options.get("sine")),
    )


def _said(name: str, in_file: Any, given: Any) -> Any:
    if in_file is None and given is None:
        raise ValueError(f"from_psannlm: the file does not say {name}, and its weights do not show it; pass {name}=")
    if in_file is not None and given is not None and in_file != given:
        raise ValueError(f"from_psannlm: {name}={given!r} was passed, but the file says {in_file!r}; leave the argument out")
    return given if in_file is None else in_file


def _sine_options(activation: Mapping[str, Any] | None, sine: Mapping[str, Any] | None) -> dict[str, Any]:
    """The sine_* options that matter after initialization: what the damping multiplies, what learns, the clamps.

    activation  2.0.1's description;   sine  that of 0.12
    """
    if activation is not None:
        if activation["kind"] != "psann":
            raise ValueError(
                f"from_psannlm: the model's activation is {activation['kind']!r}; only 'psann', the sine, carries over"
            )
        mode, learnable, bounds = activation["decay_mode"], activation["learnable"], activation.get("bounds") or {}
        bounds = {"amp": bounds.get("amplitude"), "freq": bounds.get("frequency"), "damp": bounds.get("decay")}
    elif sine is not None:
        mode, learnable = sine.get("decay_mode", "abs"), sine.get("learnable")
        if learnable is None:
            learnable = tuple(SINE_NAMES) if sine.get("trainable", True) else ()
        bounds = {name: sine.get(f"{name}_bounds") for name in ("amp", "freq", "damp")}
    else:
        return {}
    options = {f"sine_{name}_bounds": tuple(value) for name, value in bounds.items() if value is not None}
    return {"sine_mode": mode, "sine_learnable": tuple(SINE_NAMES[name] for name in learnable), **options}


def _tokenizer(state: Any, config: ModelConfig, notes: list[str]) -> Tokenizer | None:
    if state is None:
        return None
    try:
        tokenizer = convert_tokenizer(state)
    except NotCarried as reason:
        notes.append(f"its tokenizer does not carry over: {reason}; set model.tokenizer before generating or scoring")
        return None
    if tokenizer.vocab_size > config.vocab_size:
        notes.append(
            f"its tokenizer does not carry over: it needs {tokenizer.vocab_size} ids and the model has {config.vocab_size}; set "
            "model.tokenizer before generating or scoring"
        )
        return None
    notes.append(BOS_NOTE)
    return tokenizer
