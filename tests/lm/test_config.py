"""Every option is checked when it is given, by name; a misspelt one names the nearest right one; all spellings are one thing."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import yaml
from psann_fast import DataConfig, ModelConfig, SineParams, TrainConfig, psannLM, psannLMDataPrep
from psann_fast import config as configuration
from psann_fast import settings

KINDS = (ModelConfig, DataConfig, TrainConfig)
NAN, INF = math.nan, math.inf
WHOLE = [0, -1, 1.5, "8", True]
WHOLE_OR_ZERO = [-1, 1.5, "8", True]
POSITIVE = [0, -1.0, NAN, INF, "1", True]
NOT_NEGATIVE = [-1.0, NAN, INF, "1", True]
FRACTION = [-0.1, 1, 1.5, NAN, "0.1"]
FLAG = [0, 1, "yes", None]
BOUNDS = [5, (1,), (2, 1), (-1, None), ("a", None), (0, 1, 2)]

OUT_OF_RANGE = {
    ModelConfig: {
        "base": ["", 3, None],
        "d_model": WHOLE,
        "n_layers": WHOLE,
        "n_heads": WHOLE,
        "n_kv_heads": WHOLE,
        "d_mlp": WHOLE,
        "vocab_size": WHOLE,
        "positional_encoding": ["rotary", 1, ""],
        "rope_theta": POSITIVE,
        "dropout": FRACTION,
        "tie_embeddings": FLAG,
        "max_length": WHOLE,
        "sine_amp_init": POSITIVE,
        "sine_amp_init_std": NOT_NEGATIVE,
        "sine_freq_init": POSITIVE,
        "sine_freq_init_std": NOT_NEGATIVE,
        "sine_damp_init": POSITIVE,
        "sine_damp_init_std": NOT_NEGATIVE,
        "sine_trainable": FLAG,
        "sine_learnable": ["amplitude", ("phase",), 3],
        "sine_amp_bounds": BOUNDS,
        "sine_freq_bounds": BOUNDS,
        "sine_damp_bounds": BOUNDS,
        "sine_mode": ["square", 1, None],
        "wave_kernel": WHOLE,
        "wave_dilations": [(), 2, (0,), (1, 1.5)],
        "backend": ["cuda", "", None],
        "device": ["", 0, None],
    },
    DataConfig: {
        "tokenizer": ["bpe", "", None],
        "tokenizer_model_path": ["", 5],
        "tokenizer_vocab_size": WHOLE,
        "max_length": WHOLE,
        "pack_sequences": FLAG,
        "val_split": FRACTION,
        "seed": WHOLE_OR_ZERO,
    },
    TrainConfig: {
        "epochs": WHOLE,
        "max_steps": WHOLE,
        "batch_tokens": WHOLE,
        "grad_accum_steps": WHOLE,
        "lr": POSITIVE,
        "min_lr_ratio": [-0.1, 1.1, NAN, "0"],
        "warmup_steps": WHOLE_OR_ZERO,
        "weight_decay": NOT_NEGATIVE,
        "beta1": FRACTION,
        "beta2": FRACTION,
        "label_smoothing": FRACTION,
        "grad_clip": NOT_NEGATIVE,
        "nan_policy": ["raise", "", None],
        "amp": ["float16", "", None],
        "ddp": ["yes", True, None],
        "fsdp": FLAG,
        "compile": FLAG,
        "cuda_graphs": FLAG,
        "activation_checkpointing": FLAG,
        "optimizer": ["sgd", "", 1],
        "keep_checkpoints": WHOLE,
        "async_checkpoints": FLAG,
        "resume": ["", 5, True],
        "sample_interval_steps": WHOLE,
        "sample_prompt": [None, 5],
        "tensorboard": FLAG,
        "seed": WHOLE_OR_ZERO,
        "checkpoint_dir": ["", 5],
        "log_interval_steps": WHOLE,
        "save_interval_steps": WHOLE,
        "eval_interval_steps": WHOLE,
        "progress": FLAG,
    },
}


def test_the_table_covers_every_field():
    for kind in KINDS:
        assert set(OUT_OF_RANGE[kind]) == {f.name for f in dataclasses.fields(kind)}


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in KINDS for name in OUT_OF_RANGE[kind]])
def test_a_value_out_of_range_is_refused_by_name(kind, name):
    for value in OUT_OF_RANGE[kind][name]:
        with pytest.raises(ValueError) as caught:
            kind(**{name: value})
        message = str(caught.value)
        assert message.startswith(f"{kind.__name__}: {name} is {value!r}; it must be ") and "\n" not in message


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_has_a_meaning_and_a_valid_default(kind):
    config = kind()
    for f in dataclasses.fields(kind):
        assert len(f.metadata["help"]) > 10 and f.metadata["check"](getattr(config, f.name)) is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 5


def test_the_fields_that_the_documentation_of_psannlm_names():
    documented = {
        ModelConfig: "base d_model n_layers n_heads d_mlp vocab_size rope sine_params",
        DataConfig: "tokenizer tokenizer_model_path max_length pack_sequences val_split seed",
        TrainConfig: "epochs batch_tokens lr warmup_steps weight_decay label_smoothing grad_clip grad_accum_steps amp ddp "
        "checkpoint_dir log_interval_steps save_interval_steps",
    }
    for kind, names in documented.items():
        assert not set(names.split()) - set(configuration.option_names(kind))
    assert ModelConfig(d_model=40, n_heads=4).d_mlp == 160


# -- misspelt names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: psannLM(d_modle=8), "psannLM has no option 'd_modle'; did you mean 'd_model'?"),
        (lambda: psannLM(n_layer=8), "psannLM has no option 'n_layer'; did you mean 'n_layers'?"),
        (lambda: psannLM(sine_params=dict(freq=1.0)), "sine_params has no option 'freq'; did you mean 'freq_init'?"),
        (lambda: psannLM(sine_params=3), "sine_params is 3; pass a dict such as dict(freq_init=3.0), or SineParams(...)"),
        (lambda: psannLMDataPrep(["a"], max_len=8), "psannLMDataPrep has no option 'max_len'; did you mean 'max_length'?"),
        (lambda: psannLM().fit(None, batch_token=8), "fit has no option 'batch_token'; did you mean 'batch_tokens'?"),
        (lambda: psannLM().set_params(drop_out=0.1), "psannLM has no option 'drop_out'; did you mean 'dropout'?"),
        (
            lambda: psannLM(config=ModelConfig(), d_model=8),
            "psannLM takes config= or options, not both; put d_model into the ModelConfig",
        ),
        (
            lambda: psannLM().fit(None, train_config=TrainConfig(), lr=1.0),
            "fit takes train_config= or options, not both; put lr into the TrainConfig",
        ),
    ],
)
def test_a_misspelt_option_names_the_nearest(call, message):
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value) == message


def test_a_name_near_to_none_lists_all():
    with pytest.raises(TypeError, match="psannLM has no option 'zzz'; it takes backend, base, d_mlp, d_model, .*"):
        psannLM(zzz=1)


# -- options that belong together -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(d_model=30, n_heads=4), "n_heads is 4, which does not divide d_model 30; choose a divisor"),
        (dict(n_heads=8, n_kv_heads=3), "n_kv_heads is 3, which does not divide n_heads 8; choose a divisor"),
        (
            dict(d_model=30, n_heads=2),
            "head_dim is 15 .*rotary positions turn pairs; choose an even head_dim, or positional_encoding 'alibi'",
        ),
        (dict(d_model=15, n_heads=3, rope=False), "d_model is 15, but sinusoidal positions come in pairs; choose an even d_model"),
        (dict(rope=True, positional_encoding="alibi"), "rope=True and positional_encoding='alibi' contradict each other; give one"),
        (dict(rope=False, positional_encoding="rope"), "rope=False and positional_encoding='rope' contradict each other; give one"),
        (dict(rope="yes"), "rope is 'yes'; it must be True or False"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ValueError, match=f"ModelConfig: {message}"):
        ModelConfig(**options)


def test_odd_head_dim_without_rotary_positions():
    assert ModelConfig(d_model=15, n_heads=3, positional_encoding="alibi").head_dim == 5
    assert ModelConfig(d_model=30, n_heads=2, positional_encoding="sinusoidal").head_dim == 15


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, "rope"),
        (dict(rope=True), "rope"),
        (dict(rope=False), "sinusoidal"),
        (dict(positional_encoding="alibi"), "alibi"),
        (dict(rope=False, positional_encoding="alibi"), "alibi"),
        (dict(rope=None, positional_encoding="sinusoidal"), "sinusoidal"),
    ],
)
def test_rope_is_another_spelling_of_positional_encoding(options, expected):
    config = ModelConfig(**options)
    assert config.positional_encoding == expected and config.rope is (expected == "rope")


def test_sine_params_are_another_spelling_of_the_sine_fields():
    given = dict(
        amp_init=2.0,
        freq_init=1.0,
        damp_init=0.5,
        freq_init_std=0.1,
        trainable=False,
        learnable=("damping",),
        freq_bounds=(0.5, None),
        mode="relu",
    )
    config = ModelConfig(sine_params=given)
    assert (
        config
        == ModelConfig(sine_params=SineParams(**given))
        == ModelConfig(**{f"sine_{name}": value for name, value in given.items()})
    )
    for name, value in given.items():
        assert getattr(config.sine_params, name) == value
    # None means the library's default, and what is given means what it says, 1.0 too.
    assert ModelConfig(sine_params={}) == ModelConfig(sine_params=SineParams()) == ModelConfig()
    assert ModelConfig(sine_params=dict(freq_init=1.0)).sine_freq_init == 1.0 != ModelConfig().sine_freq_init
    with pytest.raises(ValueError, match="ModelConfig: sine_freq_init is 0; it must be a number above 0"):
        ModelConfig(sine_params=dict(freq_init=0))


def test_which_sine_parameters_learn():
    assert ModelConfig().learnable_sine == ("amplitude", "frequency", "damping")
    assert ModelConfig(sine_trainable=False).learnable_sine == ()
    assert ModelConfig(sine_learnable=["damping"]).learnable_sine == ("damping",)
    assert ModelConfig(sine_learnable=["damping"], sine_trainable=False).learnable_sine == ()


def test_a_change_is_followed_by_what_was_left_to_its_default():
    config = ModelConfig(d_model=64, n_heads=4)
    assert configuration.changed(config, d_model=128).d_mlp == 512
    assert configuration.changed(config, n_heads=2).n_kv_heads == 2
    assert configuration.changed(config, rope=False).positional_encoding == "sinusoidal"
    own = ModelConfig(d_model=64, n_heads=4, n_kv_heads=2, d_mlp=100)
    assert configuration.changed(own, d_model=128, n_heads=8) == ModelConfig(d_model=128, n_heads=8, n_kv_heads=2, d_mlp=100)
    assert configuration.changed(own) == own
    with pytest.raises(ValueError, match="n_heads is 3, which does not divide d_model 64"):
        configuration.changed(config, n_heads=3)


# -- one thing in every spelling ------------------------------------------------------------------------------------------------

UNUSUAL = {
    ModelConfig: ModelConfig(
        d_model=32,
        n_heads=4,
        n_kv_heads=2,
        vocab_size=9,
        rope=False,
        sine_freq_bounds=(0.1, None),
        sine_learnable=("damping",),
        wave_dilations=(1, 3),
        dropout=0.25,
        tie_embeddings=True,
    ),
    DataConfig: DataConfig(tokenizer="simple", val_split=0.25, pack_sequences=False, tokenizer_model_path="a.model"),
    TrainConfig: TrainConfig(max_steps=3, lr=2e-4, checkpoint_dir="run", amp="bf16", progress=False, weight_decay=0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_survives_json_and_yaml(kind):
    for config in (kind(), UNUSUAL[kind]):
        plain = configuration.to_dict(config)
        assert configuration.build(kind, "test", json.loads(json.dumps(plain))) == config
        section = next(name for name, other in settings.SECTIONS.items() if other is kind)
        parsed = settings.parse(yaml.safe_dump({section: plain}), "test")
        assert configuration.build(kind, "test", parsed[section]) == config


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_survives_being_written_as_flags(kind):
    config = UNUSUAL[kind]
    spelt = {
        name: ",".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in configuration.to_dict(config).items()
    }
    assert (
        configuration.build(kind, "test", {name: configuration.coerced(kind, name, text) for name, text in spelt.items()}) == config
    )


def test_numbers_as_yaml_and_command_lines_spell_them():
    assert configuration.coerced(TrainConfig, "lr", "2e-4") == 2e-4 == configuration.coerced(TrainConfig, "lr", 2e-4)
    assert configuration.coerced(TrainConfig, "lr", 1) == 1.0
    assert configuration.coerced(TrainConfig, "max_steps", "none") is None
    assert configuration.coerced(TrainConfig, "progress", "False") is False
    assert configuration.coerced(ModelConfig, "base", "123") == "123"
    assert configuration.coerced(ModelConfig, "wave_dilations", "1, 2,4") == (1, 2, 4)
    # PyYAML reads 2e-4 as text.
    assert settings.parse("train: {lr: 2e-4}", "test") == {"train": {"lr": 2e-4}}


@pytest.mark.parametrize(
    "text, kind, message",
    [
        ("train: {learning_rate: 1}", TypeError, "my.yaml, section train, has no option 'learning_rate'"),
        ("model: {d_modell: 1}", TypeError, "my.yaml, section model, has no option 'd_modell'; did you mean 'd_model'"),
        ("trian: {}", TypeError, "my.yaml has no option 'trian'; did you mean 'train'"),
        ("[1, 2]", ValueError, "my.yaml holds a list; it must hold the sections model, data, train"),
        ("model: 5", ValueError, "my.yaml, section model, holds a int; it must hold options, one a line"),
        ("model: [d_model]", ValueError, "my.yaml, section model, holds a list"),
        ("model: {", ValueError, "my.yaml is not valid YAML"),
    ],
)
def test_yaml_that_is_wrong(text, kind, message):
    with pytest.raises(kind, match=message):
        settings.parse(text, "my.yaml")


def test_sections_may_be_empty_or_missing():
    assert settings.parse("", "test") == {} and settings.parse("model:\n", "test") == {"model": {}}


def test_later_layers_override_earlier_ones_option_by_option():
    merged = settings.merged({"model": {"d_model": 1, "n_heads": 2}}, {"model": {"d_model": 3}, "train": {"lr": 1.0}})
    assert merged == {"model": {"d_model": 3, "n_heads": 2}, "data": {}, "train": {"lr": 1.0}}


def test_presets_are_valid():
    assert "quickstart" in settings.presets()
    for name in settings.presets():
        for section, options in settings.load_preset(name).items():
            configuration.build(settings.SECTIONS[section], name, options)
    with pytest.raises(ValueError, match="preset is 'fast'; choose one of 'quickstart', or write a YAML file for --config"):
        settings.load_preset("fast")
