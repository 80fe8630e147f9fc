"""Models out to transformers and back: a folder that loads there without psann-fast, and that comes back as it went."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping

import torch
from safetensors import SafetensorError

from ..config import SINE_PARAMETERS, ModelConfig
from ..data import Tokenizer
from ..models import misfit
from ..train.checkpoint import CheckpointError, read_tensors

if TYPE_CHECKING:
    from ..estimator import psannLM

# Where our own tokenizer's files lie in an exported folder, for the way back.
TOKENIZER_FOLDER = "psann_tokenizer"
LARGEST_CONFIG = 1 << 20
SINE_FIELDS = dict(zip(SINE_PARAMETERS, ("amp", "freq", "damp")))


def to_transformers(model: psannLM) -> Any:
    """The model as a transformers model (PSANNForCausalLM) on the CPU, with weights of its own.

    Raises ModuleNotFoundError without transformers; ValueError for a base that is not ours.
    """
    from .huggingface import PSANNForCausalLM

    config, state = _their_config(model.config), model.module.state_dict()
    if model.tokenizer is not None:
        config.pad_token_id, config.eos_token_id = model.tokenizer.pad_id, model.tokenizer.eos_id
        # What opens a document is the end of the one before, which stands alone in training.
        config.bos_token_id = config.separator_token_id = model.tokenizer.eos_id
    with torch.random.fork_rng(devices=[]):  # fresh weights are drawn, and then replaced
        theirs = PSANNForCausalLM(config)
    dtype = next(iter(state.values())).dtype
    theirs.to(dtype).load_state_dict(
        {name if name.startswith("lm_head.") else f"model.{name}": t.cpu() for name, t in state.items()}
    )
    return theirs.eval()


def export(model: psannLM, folder: str | Path) -> list[str]:
    """Write a folder that transformers loads: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True), also where
    psann-fast is not installed. Weights, configuration, modelling code, model card, and a fast tokenizer where ours can be one.

    Returns sentences on what does not carry over. Raises as to_transformers; ValueError for a folder that holds something else.
    """
    folder, notes = Path(folder), []
    if folder.is_dir() and any(folder.iterdir()) and not _is_exported(folder):
        raise ValueError(f"export: {folder} holds something else; pass a new folder, or one that was exported before")
    theirs = to_transformers(model)
    theirs.save_pretrained(folder)
    if model.tokenizer is None:
        notes.append("the model has no tokenizer, so none is exported")
    else:
        model.tokenizer.save(folder / TOKENIZER_FOLDER)
        notes += _save_fast_tokenizer(model.tokenizer, theirs.config, folder)
    (folder / "README.md").write_text(_card(model, has_tokenizer=not notes), encoding="utf-8")
    return notes


def _save_fast_tokenizer(tokenizer: Tokenizer, config: Any, folder: Path) -> list[str]:
    from transformers import PreTrainedTokenizerFast

    from .fast_tokenizer import NotExpressible, fast_tokenizer

    try:
        fast = fast_tokenizer(tokenizer)
    except NotExpressible as reason:
        return [f"no fast tokenizer is exported: {reason}; {TOKENIZER_FOLDER}/ holds ours, which psann_fast.data reads"]
    name = fast.id_to_token
    PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token=name(tokenizer.pad_id), eos_token=name(tokenizer.eos_id), bos_token=name(tokenizer.eos_id),
        split_special_tokens=True, clean_up_tokenization_spaces=False, padding_side="left",
        model_max_length=config.max_position_embeddings,
    ).save_pretrained(folder)  # fmt: skip
    return []


def import_exported(folder: str | Path, *, backend: str = "auto", device: str = "auto") -> psannLM:
    """The model that export wrote, or that PSANNForCausalLM.save_pretrained did. Nothing in the folder is executed, and
    transformers is not needed. Without our tokenizer's files the model has none (a UserWarning).

    Raises CheckpointError for a missing, damaged or foreign folder.
    """
    from ..estimator import psannLM

    folder = Path(folder)
    if (folder / "manifest.json").is_file():
        raise CheckpointError(f"{folder} holds a model of psann-fast, not an exported one; psannLM.load({str(folder)!r}) reads it")
    try:
        described = _read_json(folder / "config.json")
        if described.get("model_type") != "psann":
            raise CheckpointError(f"{folder}: model_type is {described.get('model_type')!r}; only exported psann models come back")
        weights = _read_weights(folder)
        config = _our_config(described, backend, device)
        if config.n_layers > len(weights):
            raise CheckpointError(f"{folder}: num_hidden_layers is {config.n_layers}, but the weights hold {len(weights)} tensors")
        if config.tie_embeddings and "embed.weight" in weights:
            weights["lm_head.weight"] = weights["embed.weight"]
        wrong = misfit(config, weights)
        if wrong is not None:
            raise CheckpointError(f"{folder}: {wrong}")
        model = psannLM(config=config)
        with torch.random.fork_rng(devices=[]):
            model.module.to(weights["embed.weight"].dtype).load_state_dict(weights)
        if (folder / TOKENIZER_FOLDER).is_dir():
            model.tokenizer = Tokenizer.load(folder / TOKENIZER_FOLDER)
        else:
            warnings.warn(f"{folder} has no {TOKENIZER_FOLDER}: set model.tokenizer before generating or scoring", stacklevel=2)
    except (KeyError, TypeError, AttributeError, ValueError, OSError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder} does not hold a usable model: {error}") from error
    return model


def _is_exported(folder: Path) -> bool:
    return (folder / "config.json").is_file() and _read_json(folder / "config.json").get("model_type") == "psann"


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; pass a folder that psann-fast export wrote")
    if path.stat().st_size > LARGEST_CONFIG:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, more than any configuration")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no options")
    return content


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    files = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index)["weight_map"].values()))
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise CheckpointError(f"{index} names files outside its folder")
        files = [folder / name for name in names]
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        weights |= read_tensors(file)
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def _their_config(config: ModelConfig) -> Any:
    from .huggingface import PSANNConfig

    if config.base not in ("respsann", "waveresnet"):
        raise ValueError(f"export: base is {config.base!r}; the exported code knows 'respsann' and 'waveresnet'")
    sine: dict[str, Any] = {"mode": config.sine_mode, "learnable": list(config.learnable_sine)}
    sine["bounds"] = {name: list(bounds) for name, bounds in config.sine_bounds.items()}
    for name, short in SINE_FIELDS.items():
        sine[name], sine[f"{name}_std"] = getattr(config, f"sine_{short}_init"), getattr(config, f"sine_{short}_init_std")
    window = {} if config.max_length is None else {"max_position_embeddings": config.max_length}
    return PSANNConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads, intermediate_size=config.d_mlp, base=config.base,
        dropout=config.dropout, positional_encoding=config.positional_encoding, rotary_theta=config.rope_theta,
        tie_word_embeddings=config.tie_embeddings, wave_kernel=config.wave_kernel, wave_dilations=config.wave_dilations, sine=sine,
        has_window=config.max_length is not None, **window,
    )  # fmt: skip


def _our_config(described: Mapping[str, Any], backend: str, device: str) -> ModelConfig:
    sine = described.get("sine") or {}
    learnable = tuple(sine.get("learnable", SINE_PARAMETERS))
    options: dict[str, Any] = {
        "sine_mode": sine.get("mode", "abs"),
        "sine_learnable": None if learnable == SINE_PARAMETERS else learnable,
    }
    for name, short in SINE_FIELDS.items():
        for theirs, ours in ((name, f"sine_{short}_init"), (f"{name}_std", f"sine_{short}_init_std")):
            if theirs in sine:
                options[ours] = sine[theirs]
        if name in (sine.get("bounds") or {}):
            options[f"sine_{short}_bounds"] = tuple(sine["bounds"][name])
    return ModelConfig(
        base=described["base"], d_model=described["hidden_size"], n_layers=described["num_hidden_layers"],
        n_heads=described["num_attention_heads"], n_kv_heads=described["num_key_value_heads"], d_mlp=described["intermediate_size"],
        vocab_size=described["vocab_size"], positional_encoding=described["positional_encoding"],
        rope_theta=described["rotary_theta"], dropout=described["dropout"], tie_embeddings=described["tie_word_embeddings"],
        max_length=described["max_position_embeddings"] if described.get("has_window", True) else None,
        wave_kernel=described["wave_kernel"], wave_dilations=tuple(described["wave_dilations"]), backend=backend, device=device,
        **options,
    )  # fmt: skip


def _card(model: psannLM, has_tokenizer: bool) -> str:
    config = model.config
    loads = "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n" if has_tokenizer else ""
    runs = (
        'ids = tokenizer("The ", return_tensors="pt").input_ids\n'
        "print(tokenizer.decode(model.generate(ids, max_new_tokens=40)[0]))\n"
        if has_tokenizer
        else f"print(model(torch.randint({config.vocab_size}, (1, 8))).logits.shape)\n"
    )
    needs = "from transformers import AutoModelForCausalLM" + (", AutoTokenizer" if has_tokenizer else "")
    learnt = model.history_[-1] if model.history_ else None
    training = (
        "This export does not know how the model was trained." if learnt is None
        else f"Last training loss {learnt['loss']:.3f} nats per token after {learnt['step']} steps and {learnt['tokens']:,} tokens."
    )  # fmt: skip
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [psann, sine-activation]
---

# A PSANN language model

Base `{config.base}`: {config.n_layers} layers, d_model {config.d_model}, {config.n_heads} heads ({config.n_kv_heads} for keys and
values), MLP width {config.d_mlp}, vocabulary {config.vocab_size}, positions `{config.positional_encoding}`,
{model.module.num_parameters():,} parameters. Its MLPs use a learnable damped sine, `A exp(-d |z|) sin(f z)`.
Causal; exported by psann-fast.

```python
{needs}{"" if has_tokenizer else chr(10) + "import torch"}

folder = "."  # or the name of this repository
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
{loads}{runs}```

`trust_remote_code` runs `modeling_psann.py` and `configuration_psann.py` of this folder: read them first. They need transformers
5.23 or newer, and use the fused kernels of psann-fast where it is installed. `psann-fast import` brings the folder back. The id
between documents (`separator_token_id`, also BOS and EOS) stands alone, as in training: a text gives the same
with and without it in front.

## Training

{training} Data, intended use and limits: for its author to say.
"""
