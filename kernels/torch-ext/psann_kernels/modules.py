"""The ops as ordinary nn.Modules, with parameters, for any model."""

from __future__ import annotations

from typing import Any, Collection, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .damped_sine import MODES, damped_sine
from .registry import OPS, Op, check_backend

# Keeps the frequency positive where softplus underflows, as psann does, so that its weights give the same numbers here.
FREQUENCY_FLOOR = 1e-6


class DampedSine(nn.Module):
    """y = amplitude * exp(-damping * g(z)) * sin(frequency * z) with learnable positive parameters, one triple per feature.

    features        F; the input is (..., F)
    amplitude, frequency, damping   initial values; amplitude and damping as in the op, frequency in radians per unit of z
    amplitude_std, frequency_std, damping_std   spread of the initial values over the features (normal, kept positive)
    learnable       which of "amplitude", "frequency", "damping" are trained
    bounds          name -> (least, largest), either None: the positive value is clamped, and learns only inside
    mode            "abs", "relu" or "none": what the damping multiplies
    backend         "auto", "triton", "native" or "torch"

    The parameters `_A`, `_f`, `_d` (F,) hold inverse softplus values in float32: amplitude = softplus(_A),
    frequency = softplus(_f) + 1e-6, damping = softplus(_d). Raises ValueError for values that no softplus gives.
    Source: the names and the transform are those of psann's SineParam, so its state dicts load.
    """

    def __init__(
        self,
        features: int,
        *,
        amplitude: float = 1.0,
        frequency: float = 1.0,
        damping: float = 0.01,
        amplitude_std: float = 0.0,
        frequency_std: float = 0.0,
        damping_std: float = 0.0,
        learnable: Collection[str] = ("amplitude", "frequency", "damping"),
        bounds: Mapping[str, tuple[float | None, float | None]] | None = None,
        mode: str = "abs",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("amplitude", amplitude), ("frequency", frequency), ("damping", damping)):
            if not value > 0:
                raise ValueError(f"DampedSine: {name} is {value!r}; it must be above 0, since it is kept positive by softplus")
        for option, names in (("learnable", learnable), ("bounds", bounds or ())):
            unknown = set(names) - {"amplitude", "frequency", "damping"}
            if unknown:
                raise ValueError(f"DampedSine: {option} names {sorted(unknown)}; choose among 'amplitude', 'frequency', 'damping'")
        if mode not in MODES:
            raise ValueError(f"DampedSine: mode is {mode!r}; choose one of {', '.join(map(repr, MODES))}")
        check_backend(backend, "DampedSine")
        self.features, self.mode, self.backend = features, mode, backend
        self.bounds = dict(bounds or {})
        self._A = nn.Parameter(_raw(amplitude, amplitude_std, features), requires_grad="amplitude" in learnable)
        self._f = nn.Parameter(_raw(frequency, frequency_std, features, FREQUENCY_FLOOR), requires_grad="frequency" in learnable)
        self._d = nn.Parameter(_raw(damping, damping_std, features), requires_grad="damping" in learnable)

    def parameters_of_sine(self) -> tuple[Tensor, Tensor, Tensor]:
        """(amplitude, frequency, damping), each (F,), float32 (float64 in a float64 module)."""
        wide = torch.promote_types(self._A.dtype, torch.float32)
        amplitude, frequency, damping = (F.softplus(t.to(wide)) for t in (self._A, self._f, self._d))
        values = {"amplitude": amplitude, "frequency": frequency + FREQUENCY_FLOOR, "damping": damping}
        for name, (least, largest) in self.bounds.items():
            values[name] = values[name].clamp(least, largest)
        return values["amplitude"], values["frequency"], values["damping"]

    def forward(self, z: Tensor) -> Tensor:
        """z (..., F) -> (..., F) in z's dtype."""
        return damped_sine(z, *self.parameters_of_sine(), mode=self.mode, backend=self.backend)

    def example_calls(self) -> Iterator[tuple[Op, str, tuple[Any, ...], dict[str, Any]]]:
        """The op call that `explain(model)` asks about."""
        z = self._A.new_empty((1, self.features))
        yield OPS["damped_sine"], self.backend, (z, *self.parameters_of_sine()), {"mode": self.mode}

    def extra_repr(self) -> str:
        return f"{self.features}, mode={self.mode!r}, backend={self.backend!r}"


def _raw(mean: float, std: float, features: int, floor: float = 0.0) -> Tensor:
    """What softplus takes to `mean` (spread by `std`) less `floor`."""
    value = torch.full((features,), float(mean), dtype=torch.float64)
    if std:
        # A draw near or below zero would make a dead feature; a hundredth of the mean is as small as one may start.
        value = (value + std * torch.randn(features, dtype=torch.float64)).clamp_min(0.01 * mean)
    return _inverse_softplus(value - floor).float()


def _inverse_softplus(y: Tensor) -> Tensor:
    # log(e^y - 1) written so that it neither overflows for large y nor cancels for small ones.
    return y + torch.log(-torch.expm1(-y))
