"""Damped sine activation, one (amplitude, frequency, damping) triple per feature.

    y = amplitude * exp(-damping * g(z)) * sin(frequency * z)

with g(z) = |z| (mode "abs"), max(z, 0) ("relu") or 0 ("none").
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import Op

OP = Op("damped_sine")
MODES = ("abs", "relu", "none")


def damped_sine(
    z: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, *, mode: str = "abs", backend: str = "auto"
) -> Tensor:
    """Damped sine of every element of z.

    z           (..., F)  float16, bfloat16, float32 or float64; any strides
    amplitude   (F,)      float32 (float64 beside a float64 z); the maximum of |y|, any sign
    frequency   (F,)      as amplitude; radians per unit of z
    damping     (F,)      as amplitude; 1 per unit of z
    mode                  "abs", "relu" or "none": what the damping multiplies
    backend               "auto", "triton", "native" or "torch"

    Returns (..., F) in z's dtype. Differentiable in z and in the three parameters, whose gradients are reduced in a fixed
    order. At z = +-0 the result is +-0; at +-inf and NaN it is NaN. The phase is computed in float32 at least.
    Raises ValueError for other shapes or dtypes; BackendError if `backend` was named and cannot serve.
    Source: SIREN's periodic activation, Sitzmann et al. 2020, arXiv:2006.09661, with PSANN's learnable damping.
    """
    check_sine("damped_sine", z, amplitude, frequency, damping, mode)
    return OP.select(backend, z, amplitude, frequency, damping, mode=mode)(z, amplitude, frequency, damping, mode=mode)


@OP.specify
def reference(z: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, *, mode: str = "abs") -> Tensor:
    # bf16 steps by 0.125 near 30 rad, a visible slice of a period, so the phase is computed wide.
    wide = torch.promote_types(z.dtype, torch.float32)
    x, amplitude, frequency, damping = (t.to(wide) for t in (z, amplitude, frequency, damping))
    y = amplitude * torch.sin(frequency * x)
    if mode != "none":
        y = y * torch.exp(-damping * (x.abs() if mode == "abs" else x.relu()))
    return y.to(z.dtype)


def check_sine(op: str, z: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, mode: str) -> None:
    """Raise ValueError unless z (..., F), the three parameters (F,) and mode fit together; `op` opens the message."""
    if mode not in MODES:
        raise ValueError(f"{op}: mode is {mode!r}; choose one of {', '.join(map(repr, MODES))}")
    if z.dim() == 0 or not z.is_floating_point():
        raise ValueError(
            f"{op}: z has shape {tuple(z.shape)} and dtype {z.dtype}; it must be a floating-point tensor of at least one dimension"
        )
    features = z.shape[-1]
    wanted = torch.float64 if z.dtype == torch.float64 else torch.float32
    for name, parameter in (("amplitude", amplitude), ("frequency", frequency), ("damping", damping)):
        if parameter.shape != (features,):
            raise ValueError(
                f"{op}: {name} has shape {tuple(parameter.shape)}, but z has {features} features (z is {tuple(z.shape)}); "
                f"pass one {name} per feature, shape ({features},)"
            )
        if parameter.dtype != wanted:
            raise ValueError(
                f"{op}: {name} is {parameter.dtype} beside a {z.dtype} z; pass it as {wanted} (the parameters stay wide)"
            )
        if parameter.device != z.device:
            raise ValueError(f"{op}: {name} is on {parameter.device} and z on {z.device}; put them on one device")
