"""Layers without state for Hugging Face `kernelize`, which gives their forward to modules of other classes.

`kernels` wants no constructor, no attributes beyond the two below, and a forward that takes as many arguments as the one it
replaces; `self` is then the adopting module, whose parameters are read here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .damped_sine import damped_sine
from .modules import FREQUENCY_FLOOR
from .rms_norm import rms_norm


class DampedSine(nn.Module):
    """For psann's SineParam and for our DampedSine: `_A`, `_f`, `_d`, `bounds`, and `decay_mode` or `mode`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, z: Tensor) -> Tensor:
        dim = getattr(self, "feature_dim", -1)
        mode = self.decay_mode if hasattr(self, "decay_mode") else self.mode
        y = damped_sine(z.movedim(dim, -1), *sine_parameters(self), mode=mode)
        return y.movedim(-1, dim)


class RMSNorm(nn.Module):
    """For classes with `weight` or `scale`, and `variance_epsilon` (Llama's and its kin) or `eps`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight if hasattr(self, "weight") else self.scale
        return rms_norm(hidden_states, weight, eps=self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps)


def sine_parameters(module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """(amplitude, frequency, damping), each (F,), of a module with psann's raw parameters; float32 at least."""
    wide = torch.promote_types(module._A.dtype, torch.float32)
    amplitude, frequency, damping = (F.softplus(t.to(wide)) for t in (module._A, module._f, module._d))
    bounds = module.bounds or {}
    clamp = lambda value, *names: next((value.clamp(*bounds[name]) for name in names if name in bounds), value)  # noqa: E731
    # psann calls the damping decay.
    return clamp(amplitude, "amplitude"), clamp(frequency + FREQUENCY_FLOOR, "frequency"), clamp(damping, "damping", "decay")
