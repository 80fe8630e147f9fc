"""The elementwise and row-wise ops: damped_sine, rms_norm, wave_conv."""

from __future__ import annotations

from typing import Any, Iterator

import psann_kernels
import torch
from torch import Tensor

from .case import BACKWARD, BF16, FORWARD, FP32, Case, Draw, Function


def plain_sine(z: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor) -> Tensor:
    amplitude, frequency, damping = (t.to(z.dtype) for t in (amplitude, frequency, damping))
    return amplitude * torch.exp(-damping * z.abs()) * torch.sin(frequency * z)


def damped_sine_cases(size: str, device: torch.device) -> Iterator[Case]:
    shapes = {
        "gpu": [(16384, 4096), (32768, 1024)],
        "cpu": [(2048, 2048)],
        "tiny": [(32, 48)],
        "parity": [(1, 130), (33, 33), (257, 1025), (4096, 64)],
    }
    for rows, features in shapes[size]:
        for dtype in (FP32, BF16):

            def make(
                seed: int, rows: int = rows, features: int = features, dtype: torch.dtype = dtype
            ) -> tuple[list[Any], list[Tensor]]:
                draw = Draw(device, seed)
                return [draw.normal(rows, features, dtype=dtype, scale=2.0), *draw.sine(features)], [
                    draw.normal(rows, features, dtype=dtype)
                ]

            size_bytes = rows * features * dtype.itemsize
            yield Case(
                "damped_sine",
                f"{rows}x{features}",
                dtype,
                make,
                lambda b: lambda *a: psann_kernels.damped_sine(*a, backend=b),
                plain_sine,
                4,
                {FORWARD: 2 * size_bytes, BACKWARD: 3 * size_bytes},
            )


def rms_norm_cases(size: str, device: torch.device) -> Iterator[Case]:
    shapes = {"gpu": [(16384, 4096)], "cpu": [(4096, 1024)], "tiny": [(32, 48)], "parity": [(3, 130), (65, 1000), (9, 8192)]}
    for rows, features in shapes[size]:
        for dtype in (FP32, BF16):
            for has_residual in (False, True):

                def make(
                    seed: int,
                    rows: int = rows,
                    features: int = features,
                    dtype: torch.dtype = dtype,
                    has_residual: bool = has_residual,
                ) -> tuple[list[Any], list[Tensor]]:
                    draw = Draw(device, seed)
                    tensors = [draw.normal(rows, features, dtype=dtype) for _ in range(2 + 2 * has_residual)]
                    weight = draw.uniform(features, low=0.5, high=1.5).to(dtype)
                    if not has_residual:
                        return [tensors[0], weight], [tensors[1]]
                    return [tensors[0], weight, tensors[1]], tensors[2:]

                def call(backend: str) -> Function:
                    return lambda x, weight, residual=None: psann_kernels.rms_norm(x, weight, residual=residual, backend=backend)

                n = rows * features * dtype.itemsize
                moved = {FORWARD: 4 * n, BACKWARD: 4 * n} if has_residual else {FORWARD: 2 * n, BACKWARD: 3 * n}
                yield Case(
                    "rms_norm",
                    f"{rows}x{features}{' + residual' if has_residual else ''}",
                    dtype,
                    make,
                    call,
                    plain_rms_norm,
                    2 + has_residual,
                    moved,
                    facts={"residual": has_residual},
                )


def plain_rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
    h = x if residual is None else x + residual
    y = h / torch.sqrt((h * h).mean(-1, keepdim=True) + 1e-6) * weight.to(x.dtype)
    return y if residual is None else (y, h)


def wave_conv_cases(size: str, device: torch.device) -> Iterator[Case]:
    # (rows, tokens, features, taps, dilation)
    shapes = {
        "gpu": [(8, 4096, 2048, 4, 4)],
        "cpu": [(4, 512, 512, 4, 4)],
        "tiny": [(2, 16, 24, 3, 2)],
        "parity": [(2, 130, 33, 4, 3), (1, 1000, 65, 2, 1), (3, 7, 130, 3, 9)],
    }
    for rows, tokens, features, taps, dilation in shapes[size]:
        for dtype in (FP32, BF16):

            def make(
                seed: int, shape: tuple[int, ...] = (rows, tokens, features), taps: int = taps, dtype: torch.dtype = dtype
            ) -> tuple[list[Any], list[Tensor]]:
                draw = Draw(device, seed)
                weight, bias = draw.uniform(shape[-1], taps, low=-0.5, high=0.5), draw.uniform(shape[-1], low=-0.5, high=0.5)
                return [draw.normal(*shape, dtype=dtype), weight, *draw.sine(shape[-1]), bias], [draw.normal(*shape, dtype=dtype)]

            def call(backend: str, dilation: int = dilation) -> Function:
                return lambda *a: psann_kernels.wave_conv(*a[:5], bias=a[5], dilation=dilation, backend=backend)

            def plain(
                x: Tensor,
                weight: Tensor,
                amplitude: Tensor,
                frequency: Tensor,
                damping: Tensor,
                bias: Tensor,
                dilation: int = dilation,
            ) -> Tensor:
                weight, bias = weight.to(x.dtype), bias.to(x.dtype)
                taps, tokens = weight.shape[1], x.shape[1]
                padded = torch.nn.functional.pad(x, (0, 0, (taps - 1) * dilation, 0))
                c = bias + sum(weight[:, j] * padded[:, j * dilation : j * dilation + tokens] for j in range(taps))
                return plain_sine(c, amplitude, frequency, damping)

            n = rows * tokens * features * dtype.itemsize
            shape = f"{rows}x{tokens}x{features} K{taps} dilation {dilation}"
            yield Case(
                "wave_conv", shape, dtype, make, call, plain, 6, {FORWARD: 2 * n, BACKWARD: 3 * n}, facts={"dilation": dilation}
            )
