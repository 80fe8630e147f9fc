"""Is what a checkpoint says enough to go on from, and nothing else? Answered before a model or a folder changes."""

from __future__ import annotations

import math
from typing import Any, Callable, Mapping

import torch
from torch import Tensor, nn

from .checkpoint import CheckpointError
from .snapshot import MOMENTS, RANDOM, Snapshot

# What the optimizers keep of a parameter: AdamW, Muon.
KINDS = ({"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"})
MOST = 1 << 53


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _guard(value: Any) -> bool:
    return isinstance(value, dict) and all(_number(value.get(name)) for name in ("skipped", "in_a_row", "most_in_a_row"))


def _row(value: Any) -> bool:
    wanted = ("step", "epoch", "loss", "lr", "grad_norm", "skipped_steps", "tokens", "tokens_per_second", "mfu", "seconds")
    return value is None or isinstance(value, dict) and all(isinstance(value.get(name), (int, float)) for name in wanted)


STATE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (lambda value: _count(value) and value > 0, "a count of steps"),
    "tokens": (_count, "a count of tokens"),
    "seconds": (lambda value: _number(value) and value >= 0, "a number of seconds"),
    "pending": (_row, "a row of metrics or null"),
    "best": (lambda value: value is None or _number(value), "a loss or null"),
    "scaler": (lambda value: isinstance(value, dict), "a mapping"),
    "guard": (_guard, "a mapping of three numbers"),
    "processes": (lambda value: _count(value) and 0 < value < 1 << 20, "a count of processes"),
    "train": (lambda value: isinstance(value, dict), "a mapping of options"),
    "data": (lambda value: isinstance(value, str), "a checksum"),
}


def check_resumable(taken: Snapshot, module: nn.Module) -> None:
    """Raise CheckpointError unless the state, the optimizer's tensors and the random states are those of a run that trained
    `module`.

    The weights are compared elsewhere.
    """
    for name, (is_right, wanted) in STATE.items():
        value = taken.state.get(name, KeyError)
        if value is KeyError or not is_right(value):
            shown = "missing" if value is KeyError else f"{value!r:.60}"
            raise _unusable(f"its {name} is {shown}, and should be {wanted}")
    _check_moments(taken, dict(module.named_parameters()))
    wanted = torch.get_rng_state()
    for rank in range(taken.state["processes"]):
        found = taken.tensors.get(f"{RANDOM}/{rank}/cpu")
        if found is None or found.dtype != wanted.dtype or found.shape != wanted.shape:
            raise _unusable(f"the random state of process {rank} is missing, or not of this torch's {wanted.numel()} bytes")


def _check_moments(taken: Snapshot, parameters: Mapping[str, nn.Parameter]) -> None:
    kept: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in taken.tensors.items():
        kind, _, rest = full_name.partition("/")
        if kind == MOMENTS:
            name, _, key = rest.rpartition("/")
            kept.setdefault(name, {})[key] = tensor
    learning = {name for name, parameter in parameters.items() if parameter.requires_grad}
    was_moved = taken.state["guard"]["skipped"] < taken.state["step"]
    for name in sorted(learning ^ kept.keys() if was_moved else kept.keys() - learning):
        raise _unusable(
            f"its optimizer's state of {name:.100} is {'missing' if name in learning else 'of no parameter that learns'}"
        )
    for name, values in kept.items():
        shape = parameters[name].shape
        if values.keys() not in KINDS or any(value.shape != (() if key == "step" else shape) for key, value in values.items()):
            described = ", ".join(f"{key:.40} {tuple(value.shape)}" for key, value in sorted(values.items())[:5])
            raise _unusable(f"its optimizer's state of {name:.100} is {described}, which fits no parameter of shape {tuple(shape)}")


def _unusable(reason: str) -> CheckpointError:
    return CheckpointError(f"resume: no run can be continued from the checkpoint: {reason}; pass another, or start anew")
