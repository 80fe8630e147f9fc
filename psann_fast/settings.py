"""Presets and YAML files: three sections, `model`, `data` and `train`, with the field names of the configuration classes."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Mapping

import yaml

from . import config as configuration
from .config import DataConfig, ModelConfig, TrainConfig

SECTIONS = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
LARGEST_FILE = 1 << 15  # bytes; all options take 3 KB, and the parser takes a second for 32
Settings = dict[str, dict[str, Any]]


def presets() -> list[str]:
    """Names of the presets in the package."""
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files(__package__).joinpath("presets").iterdir() if p.name.endswith(".yaml")
    )


def load_preset(name: str) -> Settings:
    """The settings of a preset. Raises ValueError for an unknown one."""
    if name not in presets():
        raise ValueError(f"preset is {name!r}; choose one of {', '.join(map(repr, presets()))}, or write a YAML file for --config")
    return parse(resources.files(__package__).joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8"), f"preset {name}")


def load_file(path: str | Path) -> Settings:
    """The settings of a YAML file. Raises OSError if it cannot be read, ValueError or TypeError for what it says."""
    with open(path, "rb") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"{path} has more than {LARGEST_FILE:,} bytes; pass a YAML file of options")
    try:
        return parse(content.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); pass a YAML file of options") from None


def parse(text: str, where: str) -> Settings:
    """YAML text as settings; an unknown section or option is a TypeError that names the nearest right one."""
    try:
        raw = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a number of thousands of digits; brackets without end
        raise ValueError(f"{where} is not valid YAML: {error}") from error
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where} holds a {type(raw).__name__}; it must hold the sections {', '.join(SECTIONS)}")
    settings: Settings = {}
    for section, options in raw.items():
        if section not in SECTIONS:
            raise configuration.unknown_option(where, str(section), SECTIONS)
        options = {} if options is None else options
        if not isinstance(options, Mapping):
            raise ValueError(
                f"{where}, section {section}, holds a {type(options).__name__}; it must hold options, one a line: name: value"
            )
        known = configuration.option_names(SECTIONS[section])
        for name in options:
            if name not in known:
                raise configuration.unknown_option(f"{where}, section {section},", str(name), known)
        settings[section] = {name: configuration.coerced(SECTIONS[section], name, value) for name, value in options.items()}
    return settings


def merged(*layers: Settings) -> Settings:
    """The layers laid over each other, later ones on top, option by option."""
    return {section: {k: v for layer in layers for k, v in layer.get(section, {}).items()} for section in SECTIONS}
