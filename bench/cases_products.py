"""The ops around a matrix product: linear, linear_cross_entropy, damped_sine_mlp."""

from __future__ import annotations

from typing import Any, Iterator

import psann_kernels
import torch
from psann_kernels.linear import quantize
from psann_kernels.linear import reference as linear_reference
from torch import Tensor

from .case import BF16, BOTH, FORWARD, FP32, Case, Draw, Function
from .cases_rows import plain_sine


def linear_cases(size: str, device: torch.device) -> Iterator[Case]:
    # (rows, inputs, outputs): decoding's products, where reading the weights is the time
    shapes = {
        "gpu": [(1, 4096, 11008), (16, 4096, 11008)],
        "cpu": [(1, 512, 2048), (8, 512, 2048)],
        "tiny": [(2, 16, 24)],
        "parity": [(1, 33, 65), (9, 130, 17)],
    }
    for rows, inputs, outputs in shapes[size]:
        for weights in (BF16, torch.int8) if size != "tiny" else (FP32,):

            def make(
                seed: int, rows: int = rows, inputs: int = inputs, outputs: int = outputs, weights: torch.dtype = weights
            ) -> tuple[list[Any], list[Tensor]]:
                draw = Draw(device, seed)
                x = draw.normal(rows, inputs, dtype=BF16 if device.type == "cuda" else FP32)
                weight = draw.normal(outputs, inputs, scale=inputs**-0.5)
                if weights == torch.int8:
                    return [x, *quantize(weight)], []
                return [x, weight.to(weights)], []

            def call(backend: str) -> Function:
                return lambda x, weight, scale=None: psann_kernels.linear(x, weight, scale=scale, backend=backend)

            def plain(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
                y = x @ weight.to(x.dtype).t()
                return y if scale is None else y * scale.to(x.dtype)

            moved = outputs * inputs * weights.itemsize + rows * (inputs + outputs) * (2 if device.type == "cuda" else 4)
            name = str(weights).removeprefix("torch.")
            yield Case(
                "linear",
                f"{rows}x{inputs} -> {outputs} weights {name}",
                BF16 if device.type == "cuda" else FP32,
                make,
                call,
                plain,
                0,
                {FORWARD: moved},
                {FORWARD: 2 * rows * inputs * outputs},
                truth=lambda x, weight, scale=None: linear_reference(x, weight, scale=scale),
            )


def linear_cross_entropy_cases(size: str, device: torch.device) -> Iterator[Case]:
    # (tokens, width, vocabulary)
    shapes = {
        "gpu": [(8192, 4096, 128256), (8192, 1024, 32768)],
        "cpu": [(1024, 256, 8192)],
        "tiny": [(12, 16, 40)],
        "parity": [(130, 33, 1000), (7, 64, 4097)],
    }
    for tokens, width, vocabulary in shapes[size]:
        for dtype in _dtypes(size):

            def make(
                seed: int, tokens: int = tokens, width: int = width, vocabulary: int = vocabulary, dtype: torch.dtype = dtype
            ) -> tuple[list[Any], list[Tensor]]:
                draw = Draw(device, seed)
                x, weight = draw.normal(tokens, width, dtype=dtype), draw.normal(vocabulary, width, scale=width**-0.5, dtype=dtype)
                targets = torch.randint(vocabulary, (tokens,), generator=draw.generator, device=device)
                return [x, weight, targets], [torch.ones((), device=device)]

            def call(backend: str) -> Function:
                return lambda x, weight, targets: psann_kernels.linear_cross_entropy(x, weight, targets, backend=backend)

            def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
                return torch.nn.functional.cross_entropy(x @ weight.t(), targets)

            read = (tokens + vocabulary) * width * dtype.itemsize
            products = 2 * tokens * width * vocabulary
            yield Case(
                "linear_cross_entropy",
                f"{tokens}x{width} -> {vocabulary}",
                dtype,
                make,
                call,
                plain,
                2,
                {FORWARD: read, BOTH: 2 * read},
                {FORWARD: products, BOTH: 3 * products},
            )


def damped_sine_mlp_cases(size: str, device: torch.device) -> Iterator[Case]:
    # (tokens, width, hidden)
    shapes = {
        "gpu": [(8192, 1024, 4096), (8192, 2048, 8192), (8192, 4096, 16384)],
        "cpu": [(1024, 256, 1024)],
        "tiny": [(12, 16, 24)],
        "parity": [(130, 33, 65), (65, 128, 304)],
    }
    for tokens, width, hidden in shapes[size]:
        for dtype in _dtypes(size):

            def make(
                seed: int, tokens: int = tokens, width: int = width, hidden: int = hidden, dtype: torch.dtype = dtype
            ) -> tuple[list[Any], list[Tensor]]:
                draw = Draw(device, seed)
                w1, w2 = (
                    draw.normal(hidden, width, scale=width**-0.5, dtype=dtype),
                    draw.normal(width, hidden, scale=hidden**-0.5, dtype=dtype),
                )
                b1, b2 = draw.normal(hidden, dtype=dtype, scale=0.1), draw.normal(width, dtype=dtype, scale=0.1)
                return [draw.normal(tokens, width, dtype=dtype), w1, b1, *draw.sine(hidden), w2, b2], [
                    draw.normal(tokens, width, dtype=dtype)
                ]

            def call(backend: str) -> Function:
                return lambda *a: psann_kernels.damped_sine_mlp(*a, backend=backend)

            def plain(
                x: Tensor, w1: Tensor, b1: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, w2: Tensor, b2: Tensor
            ) -> Tensor:
                return plain_sine(x @ w1.t() + b1, amplitude, frequency, damping) @ w2.t() + b2

            weights, ends = 2 * width * hidden * dtype.itemsize, 2 * tokens * width * dtype.itemsize
            products = 4 * tokens * width * hidden
            yield Case(
                "damped_sine_mlp",
                f"{tokens}x{width} -> {hidden}",
                dtype,
                make,
                call,
                plain,
                8,
                {FORWARD: weights + ends, BOTH: 3 * (weights + ends)},
                {FORWARD: products, BOTH: 3 * products},
                more={"triton fused": lambda *a: psann_kernels.damped_sine_mlp(*a, fused=True, backend="triton")},
            )


def linear_damped_sine_cases(size: str, device: torch.device) -> Iterator[Case]:
    # (tokens, inputs, features)
    shapes = {
        "gpu": [(65536, 256, 256), (8192, 1024, 4096), (8192, 4096, 16384)],
        "cpu": [(16384, 256, 256)],
        "tiny": [(12, 16, 24)],
        "parity": [(130, 33, 65), (65, 128, 304)],
    }
    for tokens, inputs, features in shapes[size]:
        for dtype in _dtypes(size):

            def make(
                seed: int, tokens: int = tokens, inputs: int = inputs, features: int = features, dtype: torch.dtype = dtype
            ) -> tuple[list[Any], list[Tensor]]:
                draw = Draw(device, seed)
                w, b = draw.normal(features, inputs, scale=inputs**-0.5, dtype=dtype), draw.normal(features, dtype=dtype, scale=0.1)
                return [draw.normal(tokens, inputs, dtype=dtype), w, b, *draw.sine(features)], [
                    draw.normal(tokens, features, dtype=dtype)
                ]

            def call(backend: str) -> Function:
                return lambda *a: psann_kernels.linear_damped_sine(*a, backend=backend)

            def plain(x: Tensor, w: Tensor, b: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor) -> Tensor:
                return plain_sine(x @ w.t() + b, amplitude, frequency, damping)

            read, products = (inputs * features + tokens * inputs) * dtype.itemsize, 2 * tokens * inputs * features
            y = tokens * features * dtype.itemsize
            yield Case(
                "linear_damped_sine",
                f"{tokens}x{inputs} -> {features}",
                dtype,
                make,
                call,
                plain,
                6,
                {FORWARD: read + y, BOTH: 3 * read + 2 * y},
                {FORWARD: products, BOTH: 3 * products},
                more={"triton fused": lambda *a: psann_kernels.linear_damped_sine(*a, fused=True, backend="triton")},
            )


def _dtypes(size: str) -> tuple[torch.dtype, ...]:
    """What the device is used with; both for parity."""
    return {"gpu": (BF16,), "parity": (FP32, BF16)}.get(size, (FP32,))
