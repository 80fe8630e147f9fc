"""All that a run is after one of its steps, in tensors and JSON, to be written and to be continued from bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Iterable, Mapping

import torch
from torch import Tensor, nn

# Names in a checkpoint's training.safetensors.
MOMENTS, RANDOM = "optimizer", "random"


@dataclass(frozen=True)
class Snapshot:
    """A run after `step` optimizer steps.

    weights  the module's state dict, on the CPU
    tensors  "optimizer/<parameter>/<moment>" and "random/<process>/<device kind>", on the CPU
    state    what JSON holds: step, tokens, the best validation loss, the gradient scale, the options of the run,
             the data's fingerprint
    """

    step: int
    weights: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)


def moments(module: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' tensors by the parameters' names, as they are; a sharded one is gathered, so every process must call this."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {
        f"{MOMENTS}/{names[parameter]}/{key}": whole(value)
        for optimizer in optimizers
        for parameter, entries in optimizer.state.items()
        for key, value in entries.items()
    }


def restore_moments(module: nn.Module, optimizers: Iterable[torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors of `moments` back. Raises ValueError for those of another model or optimizer."""
    parameters = dict(module.named_parameters())
    owner = {parameter: optimizer for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]}
    for full_name, value in tensors.items():
        kind, _, rest = full_name.partition("/")
        if kind != MOMENTS:
            continue
        name, _, key = rest.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None or parameter not in owner or value.shape not in ((), parameter.shape):
            raise ValueError(f"the checkpoint's {full_name} belongs to no parameter of this model that learns")
        owner[parameter].state[parameter][key] = like(value, parameter)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes; another as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A copy of `value` where `parameter` is, and sharded as it is unless it is a single number."""
    if value.dim() == 0:
        return value.to(parameter.device, copy=True)
    copy = value.to(parameter.device, copy=not hasattr(parameter, "device_mesh"))
    return sharded_as(copy, parameter)


def sharded_as(value: Tensor, parameter: Tensor) -> Tensor:
    """This process' part of `value`, which all have, if `parameter` is sharded; else `value` itself."""
    if not hasattr(parameter, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def on_cpu(tensors: Mapping[str, Tensor], *, copy: bool) -> dict[str, Tensor]:
    """The tensors on the CPU; copy: even those that are there, because training goes on while they are written."""
    return {name: tensor.detach().to("cpu", copy=copy) for name, tensor in tensors.items()}


def random_state(device: torch.device) -> dict[str, Tensor]:
    """torch's random states that training draws from: device kind -> (bytes,) uint8."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
