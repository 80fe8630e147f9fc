"""Every option: its meaning, its default and its check, once.

The same names are dataclass fields, keywords of `psannLM(...)`, `.fit(...)` and `psannLMDataPrep(...)`, keys in YAML files and
flags of the command line. An unknown name is a TypeError that names the nearest right one.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import reprlib
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, TypeVar

from psann_kernels import BACKENDS
from psann_kernels.damped_sine import MODES

POSITIONAL_ENCODINGS = ("rope", "alibi", "sinusoidal")
AMP_CHOICES = ("auto", "bf16", "fp16", "fp32", "none")
DDP_CHOICES = ("auto", "on", "off")
OPTIMIZERS = ("adamw", "muon")
NAN_POLICIES = ("stop", "skip")
TOKENIZERS = ("auto", "simple", "sentencepiece", "tokenizers")
SINE_PARAMETERS = ("amplitude", "frequency", "damping")

# A file may nest lists so that writing one out takes for ever.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring = 2, 200
_SHORT.maxother = _SHORT.maxlong = 200

Config = TypeVar("Config", "ModelConfig", "DataConfig", "TrainConfig")
Check = Callable[[Any], "str | None"]


def unknown_option(owner: str, name: str, known: Iterable[str]) -> TypeError:
    """The error for a misspelt option: names the nearest right one."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
    return TypeError(f"{owner} has no option {name!r}; {hint}")


def _whole(least: int) -> Check:
    def check(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            return f"a whole number of at least {least}"
        return None

    return check


def _real(low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False) -> Check:
    def check(value: Any) -> str | None:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
        if is_number and low <= value <= high and not (open_low and value == low) and not (open_high and value == high):
            return None
        if high == math.inf:
            return f"a number {'above' if open_low else 'of at least'} {low:g}"
        return f"a number in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"

    return check


def _one_of(*choices: str) -> Check:
    return lambda value: None if value in choices else f"one of {', '.join(map(repr, choices))}"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "True or False"


def _text(value: Any) -> str | None:
    return None if isinstance(value, (str, Path)) and str(value) else "a non-empty string"


def _option(default: Any, check: Check, help: str, *, optional: bool = False) -> Any:
    def wanted(value: Any) -> str | None:
        if optional and value is None:
            return None
        rule = check(value)
        return f"{rule} or None" if rule and optional else rule

    return field(default=default, metadata={"check": wanted, "help": help})


def _check_fields(config: Any) -> None:
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        rule = f.metadata["check"](value)
        if rule:
            raise ValueError(f"{type(config).__name__}: {f.name} is {_SHORT.repr(value)}; it must be {rule}")


@dataclass(frozen=True)
class SineParams:
    """How the damped sines of a model start, and which of their parameters learn.

    A value that is None takes the library's default (see ModelConfig). Every argument given means what it says:
    `SineParams(freq_init=1.0)` starts every feature at frequency 1.
    """

    amp_init: float | None = None
    amp_init_std: float | None = None
    freq_init: float | None = None
    freq_init_std: float | None = None
    damp_init: float | None = None
    damp_init_std: float | None = None
    trainable: bool | None = None
    learnable: tuple[str, ...] | None = None
    amp_bounds: tuple[float | None, float | None] | None = None
    freq_bounds: tuple[float | None, float | None] | None = None
    damp_bounds: tuple[float | None, float | None] | None = None
    mode: str | None = None

    @classmethod
    def of(cls, value: SineParams | Mapping[str, Any]) -> SineParams:
        """From a mapping or a SineParams. Raises TypeError for an unknown key."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise TypeError(f"sine_params is {value!r}; pass a dict such as dict(freq_init=3.0), or SineParams(...)")
        names = [f.name for f in dataclasses.fields(cls)]
        for name in value:
            if name not in names:
                raise unknown_option("sine_params", name, names)
        return cls(**value)


def _learnable(value: Any) -> str | None:
    ok = isinstance(value, (tuple, list)) and all(name in SINE_PARAMETERS for name in value)
    return None if ok else f"a subset of {SINE_PARAMETERS}"


def _bounds(value: Any) -> str | None:
    ok = isinstance(value, (tuple, list)) and len(value) == 2 and not any(_real(0)(v) for v in value if v is not None)
    return None if ok and (None in value or value[0] <= value[1]) else "(least, largest), numbers of at least 0 or None"


@dataclass(frozen=True)
class ModelConfig:
    """The model. `rope=` and `sine_params=` are other ways to give `positional_encoding` and the `sine_*` fields."""

    base: str = _option("waveresnet", _text, "kind of block: 'waveresnet', 'respsann', or one added by register_base")
    d_model: int = _option(512, _whole(1), "width of the residual stream")
    n_layers: int = _option(8, _whole(1), "number of blocks")
    n_heads: int = _option(8, _whole(1), "query heads; must divide d_model")
    n_kv_heads: int | None = _option(None, _whole(1), "key/value heads; must divide n_heads (default: n_heads)", optional=True)
    d_mlp: int | None = _option(None, _whole(1), "width of the MLP (default: 4 * d_model)", optional=True)
    vocab_size: int | None = _option(None, _whole(1), "rows of the embedding (default: taken from the data)", optional=True)
    positional_encoding: str | None = _option(
        None, _one_of(*POSITIONAL_ENCODINGS), "'rope' (the default), 'alibi' or 'sinusoidal'", optional=True
    )
    rope_theta: float = _option(10000.0, _real(0, open_low=True), "base of the rotary wavelengths")
    dropout: float = _option(0.0, _real(0, 1, open_high=True), "dropout after embedding and projections")
    tie_embeddings: bool = _option(False, _flag, "use the embedding as the output projection too")
    max_length: int | None = _option(
        None, _whole(1), "tokens of the window trained on; generation past it warns (default: taken from the data)", optional=True
    )
    sine_amp_init: float = _option(1.0, _real(0, open_low=True), "initial amplitude of the sines")
    sine_amp_init_std: float = _option(0.0, _real(0), "spread of the initial amplitude over features")
    sine_freq_init: float = _option(3.0, _real(0, open_low=True), "initial frequency, radians per unit of pre-activation")
    sine_freq_init_std: float = _option(0.0, _real(0), "spread of the initial frequency over features")
    sine_damp_init: float = _option(0.01, _real(0, open_low=True), "initial damping per unit of |pre-activation|")
    sine_damp_init_std: float = _option(0.0, _real(0), "spread of the initial damping over features")
    sine_trainable: bool = _option(True, _flag, "whether amplitude, frequency and damping learn")
    sine_learnable: tuple[str, ...] | None = _option(
        None, _learnable, "which of amplitude, frequency, damping learn (default: all, if sine_trainable)", optional=True
    )
    sine_amp_bounds: tuple[float | None, float | None] | None = _option(None, _bounds, "clamp of the amplitude", optional=True)
    sine_freq_bounds: tuple[float | None, float | None] | None = _option(None, _bounds, "clamp of the frequency", optional=True)
    sine_damp_bounds: tuple[float | None, float | None] | None = _option(None, _bounds, "clamp of the damping", optional=True)
    sine_mode: str = _option("abs", _one_of(*MODES), "what the damping multiplies: |z|, max(z, 0) or nothing")
    # 2, the token and the one a dilation before it: every further tap begins at random too and dilutes those, and what is farther
    # back is attention's to find. bench.ablation has the difference.
    wave_kernel: int = _option(2, _whole(1), "taps of the wave branch's causal convolution (base 'waveresnet')")
    wave_dilations: tuple[int, ...] = _option(
        (1, 2, 4),
        lambda v: (
            None if isinstance(v, (tuple, list)) and v and not any(_whole(1)(d) for d in v) else "whole numbers of at least 1"
        ),
        "dilations of the wave branch, taken in turn by the layers",
    )
    backend: str = _option(
        "auto", _one_of(*BACKENDS), "which kernels run: 'auto', 'triton', 'native', 'torch' or 'gluon'; not saved with the model"
    )
    device: str = _option("auto", _text, "'auto' (a usable GPU, else the CPU) or a torch device name; not saved with the model")
    rope: InitVar[bool | None] = None
    sine_params: InitVar[SineParams | Mapping[str, Any] | None] = None

    def __post_init__(self, rope: bool | None, sine_params: SineParams | Mapping[str, Any] | None) -> None:
        set_field = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731 (the only way into a frozen dataclass)
        if sine_params is not None:
            sine = SineParams.of(sine_params)
            for f in dataclasses.fields(sine):
                if getattr(sine, f.name) is not None:
                    set_field(f"sine_{f.name}", getattr(sine, f.name))
        _check_fields(self)
        if rope is not None:
            if _flag(rope):
                raise ValueError(f"ModelConfig: rope is {rope!r}; it must be True or False")
            meant = "rope" if rope else "sinusoidal"
            if self.positional_encoding is None:
                set_field("positional_encoding", meant)
            elif (self.positional_encoding == "rope") != rope:
                raise ValueError(
                    f"ModelConfig: rope={rope} and positional_encoding={self.positional_encoding!r} contradict each other; "
                    "give one of them"
                )
        for f in dataclasses.fields(self):
            if isinstance(getattr(self, f.name), list):  # JSON and YAML know no tuples
                set_field(f.name, tuple(getattr(self, f.name)))
        for name, value in (
            ("positional_encoding", self.positional_encoding or "rope"),
            ("n_kv_heads", self.n_kv_heads or self.n_heads),
            ("d_mlp", self.d_mlp or 4 * self.d_model),
        ):
            set_field(name, value)
        if self.d_model % self.n_heads:
            raise ValueError(
                f"ModelConfig: n_heads is {self.n_heads}, which does not divide d_model {self.d_model}; choose a divisor"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"ModelConfig: n_kv_heads is {self.n_kv_heads}, which does not divide n_heads {self.n_heads}; choose a divisor"
            )
        if self.positional_encoding == "rope" and self.head_dim % 2:
            raise ValueError(
                f"ModelConfig: head_dim is {self.head_dim} (d_model {self.d_model} / n_heads {self.n_heads}), but rotary positions "
                "turn pairs; choose an even head_dim, or positional_encoding 'alibi'"
            )
        if self.positional_encoding == "sinusoidal" and self.d_model % 2:
            raise ValueError(
                f"ModelConfig: d_model is {self.d_model}, but sinusoidal positions come in pairs; choose an even d_model"
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def sine_bounds(self) -> dict[str, tuple[float | None, float | None]]:
        """The clamps that are set, by sine parameter."""
        bounds = dict(zip(SINE_PARAMETERS, (self.sine_amp_bounds, self.sine_freq_bounds, self.sine_damp_bounds)))
        return {name: value for name, value in bounds.items() if value is not None}

    @property
    def learnable_sine(self) -> tuple[str, ...]:
        """Which sine parameters learn."""
        if not self.sine_trainable:
            return ()
        return SINE_PARAMETERS if self.sine_learnable is None else self.sine_learnable


ModelConfig.rope = property(lambda self: self.positional_encoding == "rope", doc="True if positions are rotary")
ModelConfig.sine_params = property(
    lambda self: SineParams(**{f.name: getattr(self, f"sine_{f.name}") for f in dataclasses.fields(SineParams)}),
    doc="the sine_* fields as SineParams",
)


@dataclass(frozen=True)
class DataConfig:
    """Text to training examples."""

    tokenizer: str = _option("auto", _one_of(*TOKENIZERS), "'auto', 'simple' (characters), 'sentencepiece' or 'tokenizers'")
    tokenizer_model_path: str | Path | None = _option(
        None, _text, "a prebuilt tokenizer: SentencePiece .model or Hugging Face .json", optional=True
    )
    tokenizer_vocab_size: int = _option(4096, _whole(1), "largest vocabulary of a subword tokenizer that we train")
    max_length: int = _option(256, _whole(1), "tokens of a training window")
    pack_sequences: bool = _option(True, _flag, "pack documents end to end (attention stays inside each document)")
    val_split: float = _option(0.0, _real(0, 1, open_high=True), "fraction of the text held out for validation")
    seed: int = _option(1337, _whole(0), "seed of the split, of the order of the examples and of the tokenizer's sample")

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True)
class TrainConfig:
    """One call of fit."""

    epochs: int = _option(1, _whole(1), "passes over the training examples")
    max_steps: int | None = _option(None, _whole(1), "at most this many optimizer steps in this call", optional=True)
    batch_tokens: int = _option(8192, _whole(1), "approximate tokens of a micro-batch")
    grad_accum_steps: int = _option(1, _whole(1), "micro-batches of an optimizer step")
    lr: float | None = _option(
        None,
        _real(0, open_low=True),
        "peak learning rate (default: 5e-3 of Muon, 3e-3 of AdamW, above a d_model of 128 times sqrt(128 / d_model))",
        optional=True,
    )
    min_lr_ratio: float = _option(0.0, _real(0, 1), "where the straight decay ends, after the last step, as a fraction of lr")
    warmup_steps: int = _option(100, _whole(0), "optimizer steps of linear warmup; at most a tenth of the run")
    optimizer: str | None = _option(
        None,
        _one_of(*OPTIMIZERS),
        "'muon' for the matrices of the blocks and adamw for the rest, or 'adamw' for all (default: muon; adamw if amp is fp16)",
        optional=True,
    )
    weight_decay: float = _option(0.1, _real(0), "weight decay, on matrices only")
    beta1: float = _option(0.9, _real(0, 1, open_high=True), "AdamW decay of the first moment")
    beta2: float = _option(0.99, _real(0, 1, open_high=True), "AdamW decay of the second moment")
    label_smoothing: float = _option(0.0, _real(0, 1, open_high=True), "label smoothing of the cross-entropy")
    grad_clip: float = _option(1.0, _real(0), "largest global gradient norm; 0 does not clip")
    nan_policy: str = _option(
        "stop",
        _one_of(*NAN_POLICIES),
        "at a NaN or infinite loss or gradient: 'stop', or 'skip' that step (20 in a row still stop)",
    )
    amp: str = _option("auto", _one_of(*AMP_CHOICES), "mixed precision: 'auto', 'bf16', 'fp16' (CUDA only), 'fp32' or 'none'")
    ddp: str = _option(
        "auto", _one_of(*DDP_CHOICES), "data-parallel training: 'auto' joins the processes that torchrun started, 'on' needs them"
    )
    fsdp: bool = _option(False, _flag, "share weights, gradients and optimizer out over the processes (FSDP2)")
    compile: bool = _option(False, _flag, "compile model and loss with torch.compile")
    cuda_graphs: bool = _option(False, _flag, "launch forward and backward as CUDA graphs; one process, a CUDA device")
    activation_checkpointing: bool = _option(False, _flag, "keep only the input of each block and compute it again in backward")
    seed: int = _option(1337, _whole(0), "seed of dropout, and of the first weights where fit builds the model")
    checkpoint_dir: str | Path | None = _option(
        None,
        _text,
        "run folder: model, checkpoints, metrics, plot, resolved configuration (default: nothing is written)",
        optional=True,
    )
    log_interval_steps: int = _option(10, _whole(1), "optimizer steps between rows of history_ and metrics.csv")
    save_interval_steps: int = _option(500, _whole(1), "optimizer steps between checkpoints")
    keep_checkpoints: int = _option(2, _whole(1), "newest checkpoints that stay in checkpoint_dir/checkpoints")
    async_checkpoints: bool = _option(False, _flag, "write checkpoints beside training, from a copy in memory")
    resume: str | Path | None = _option(
        None, _text, "'auto' continues the run in checkpoint_dir, if there is one; or the folder of one checkpoint", optional=True
    )
    eval_interval_steps: int = _option(200, _whole(1), "optimizer steps between validations, if there is validation data")
    sample_interval_steps: int | None = _option(
        None, _whole(1), "optimizer steps between texts that the model writes into samples.txt (default: none)", optional=True
    )
    sample_prompt: str = _option("The ", lambda v: None if isinstance(v, str) else "a string", "what those texts continue")
    tensorboard: bool = _option(False, _flag, "write the metrics for TensorBoard too (needs the package tensorboard)")
    progress: bool = _option(True, _flag, "show a progress bar with loss, tokens/s and time left")

    def __post_init__(self) -> None:
        _check_fields(self)


def option_names(kind: type) -> list[str]:
    """The option names of a configuration class, keyword-only aliases included."""
    aliases = ["rope", "sine_params"] if kind is ModelConfig else []
    return [f.name for f in dataclasses.fields(kind)] + aliases


def build(kind: type[Config], owner: str, options: Mapping[str, Any]) -> Config:
    """kind(**options); an unknown name is a TypeError in the name of `owner`, naming the nearest right one."""
    known = option_names(kind)
    for name in options:
        if name not in known:
            raise unknown_option(owner, name, known)
    return kind(**options)


def to_dict(config: Any) -> dict[str, Any]:
    """The fields of a configuration as JSON and YAML take them."""
    plain = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        plain[f.name] = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return plain


def changed(config: Config, **changes: Any) -> Config:
    """A copy of `config` with some fields changed, checked anew. What equals its default and is not changed follows the change:
    d_mlp stays 4 * d_model, n_kv_heads stays n_heads, and rope= takes the place of positional_encoding."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if isinstance(config, ModelConfig):
        follows = {
            "d_mlp": config.d_mlp == 4 * config.d_model,
            "n_kv_heads": config.n_kv_heads == config.n_heads,
            "positional_encoding": changes.get("rope") is not None,
        }
        values |= {name: None for name, is_default in follows.items() if is_default}
    return build(type(config), type(config).__name__, {**values, **changes})


_NONE = ("none", "null")


def coerced(kind: type, name: str, value: Any) -> Any:
    """`value` of option `name` as YAML or a command line gives it, as the field takes it: "2e-4" is a number, "1,2,4" a tuple."""
    wanted = str({f.name: f.type for f in dataclasses.fields(kind)}.get(name, ""))
    if isinstance(value, str) and "None" in wanted and value.lower() in _NONE:
        return None
    if isinstance(value, str) and "tuple" in wanted and value.lower() not in _NONE:
        return tuple(coerced_scalar(item.strip()) for item in value.split(",") if item.strip())
    if isinstance(value, str) and not wanted.startswith("str"):
        return coerced_scalar(value)
    if isinstance(value, int) and not isinstance(value, bool) and wanted.startswith("float"):
        return float(value)
    return value


def coerced_scalar(text: str) -> Any:
    """None, True, False, a number, or the text itself."""
    words = {**dict.fromkeys(_NONE), "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
