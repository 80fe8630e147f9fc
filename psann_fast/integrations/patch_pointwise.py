"""Sines and norms of other people's models, as patch replaces them."""

from __future__ import annotations

import torch
from psann_kernels import OPS, damped_sine, rms_norm
from psann_kernels.layers import sine_parameters
from psann_kernels.registry import for_model
from torch import Tensor, nn

from .patch_rows import Plan, equals, kept, replacement

SIREN_FREQUENCIES = ("w0", "omega_0", "omega")


def sine_param(name: str, module: nn.Module, backend: str) -> Plan | None:
    """psann's SineParam: `_A`, `_f`, `_d`, decay_mode, bounds, feature_dim."""
    if not all(isinstance(getattr(module, raw, None), nn.Parameter) for raw in ("_A", "_f", "_d")) or not hasattr(
        module, "decay_mode"
    ):
        return None
    old, extra = type(module).__name__, sorted(n for n, _ in module.named_parameters() if n not in ("_A", "_f", "_d"))
    if extra:
        return kept(name, old, f"it has more parameters than a damped sine: {', '.join(extra)}")
    mode, dim, chosen = module.decay_mode, module.feature_dim, for_model(backend, OPS["damped_sine"])

    def forward(self: nn.Module, z: Tensor) -> Tensor:
        return damped_sine(z.movedim(dim, -1), *sine_parameters(self), mode=mode, backend=chosen).movedim(-1, dim)

    def last(self: nn.Module, z: Tensor) -> Tensor:
        return damped_sine(z, *sine_parameters(self), mode=mode, backend=chosen)

    example = (module._A.new_empty((1, module._A.numel())), *sine_parameters(module))
    return replacement(name, module, OPS["damped_sine"], backend, example, {"mode": mode}, last if dim == -1 else forward)


def siren(name: str, module: nn.Module, backend: str) -> Plan | None:
    """sin(w0 * z) of SIREN networks: a module called Sine without parameters, or SineLayer, whose z comes from its `linear`."""
    old, children = type(module).__name__, dict(module.named_children())
    is_layer = old.lower() in ("sinelayer", "sirenlayer") and list(children) == ["linear"] and isinstance(module.linear, nn.Linear)
    if not is_layer and old.lower() not in ("sine", "sin", "siren_sine"):
        return None
    frequency = next((getattr(module, n) for n in SIREN_FREQUENCIES if isinstance(getattr(module, n, None), (int, float))), None)
    if frequency is None or any(True for _ in module.parameters(recurse=False)) or children and not is_layer:
        return kept(name, old, "its frequency is no number named w0 or omega_0")
    weight = module.linear.weight if is_layer else torch.empty(1, 1)
    if weight.device.type != "meta":
        probe = torch.linspace(-2, 2, weight.shape[1] if is_layer else 9, dtype=weight.dtype, device=weight.device)
        with torch.no_grad():
            phase = frequency * (module.linear(probe) if is_layer else probe)
        # A linear layer may be summed in another order, and its rounding is then as large as its phase.
        roundings = 4 + int(16 * phase.abs().max()) if is_layer else 4
        if not equals(type(module).forward, module, probe, torch.sin(phase), roundings):
            return kept(name, old, "its forward does not compute sin(w0 * z)")
    chosen, constants = for_model(backend, OPS["damped_sine"]), {}

    def sine(z: Tensor) -> Tensor:
        wide = torch.float64 if z.dtype == torch.float64 else torch.float32
        key = (z.shape[-1], z.device, wide)
        if key not in constants:
            constants[key] = tuple(
                torch.full(key[:1], value, dtype=wide, device=z.device) for value in (1.0, float(frequency), 0.0)
            )
        return damped_sine(z, *constants[key], mode="none", backend=chosen)

    def layer(self: nn.Module, x: Tensor) -> Tensor:
        return sine(self.linear(x))

    def activation(self: nn.Module, z: Tensor) -> Tensor:
        return sine(z)

    example = (
        weight.new_empty(1, 1),
        *(weight.new_empty(1, dtype=torch.promote_types(weight.dtype, torch.float32)) for _ in range(3)),
    )
    return replacement(name, module, OPS["damped_sine"], backend, example, {"mode": "none"}, layer if is_layer else activation)


def norm(name: str, module: nn.Module, backend: str) -> Plan | None:
    """RMS norms by whatever name their parts have, if they give what ours gives."""
    old = type(module).__name__
    if "rmsnorm" not in old.lower():
        return None
    found = [n for n, _ in module.named_parameters(recurse=False)]
    epsilon = next((getattr(module, n) for n in ("variance_epsilon", "eps") if isinstance(getattr(module, n, None), float)), None)
    if isinstance(module, nn.RMSNorm) and epsilon is None:
        epsilon = torch.finfo(module.weight.dtype).eps if module.weight is not None else None
    if len(found) != 1 or found[0] not in ("weight", "scale") or epsilon is None or getattr(module, found[0]).dim() != 1:
        return kept(name, old, "it has no single weight vector and epsilon that we know")
    weight_name, chosen = found[0], for_model(backend, OPS["rms_norm"])
    weight = getattr(module, weight_name)
    probe = torch.linspace(-1.5, 2, weight.numel(), dtype=weight.dtype, device=weight.device).view(1, -1)
    if weight.device.type != "meta" and not equals(
        type(module).forward, module, probe, rms_norm(probe, weight.detach(), eps=epsilon, backend="torch")
    ):
        return kept(name, old, "its forward does not compute x / sqrt(mean(x^2) + eps) * weight")

    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, getattr(self, weight_name), eps=epsilon, backend=chosen)

    example = (weight.new_empty((1, weight.numel())), weight)
    return replacement(name, module, OPS["rms_norm"], backend, example, {"eps": epsilon}, forward)


KINDS = (sine_param, siren, norm)
