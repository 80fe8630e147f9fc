"""What a measured call is: Case, and the random tensors that its arguments are made of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Callable

import torch
from torch import Tensor

Function = Callable[..., Any]
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """One call.

    make      make(seed) -> (arguments, gradients of the outputs), tensors on the device
    call      call(backend) -> function of the arguments
    plain     the formula with every intermediate in the arguments' dtype
    leaves    that many arguments get gradients
    bytes, flops   direction -> what it moves and multiplies; its keys are the directions to be timed
    crop      (arguments, gradients) of a part of the call that stands alone, where float64 of the whole would not fit
    crop_results   the same part of its results
    compiles  whether torch.compile gets the specification: those of the paged ops wait for values on the host
    facts     what peers need to know: window, new tokens, ...
    more      name -> another way of ours to the same results, asked for by an option of the op
    truth     the specification itself, where the public function does not take every argument in float64; None: call("torch")
    """

    op: str
    shape: str
    dtype: torch.dtype
    make: Callable[[int], tuple[list[Any], list[Tensor]]]
    call: Callable[[str], Function]
    plain: Function
    leaves: int
    bytes: dict[str, int]
    flops: dict[str, int] = dataclasses.field(default_factory=dict)
    crop: Callable[[list[Any], list[Tensor]], tuple[list[Any], list[Tensor]]] | None = None
    crop_results: Callable[[list[Tensor]], list[Tensor]] | None = None
    compiles: bool = True
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    truth: Function | None = None
    more: dict[str, Function] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {str(self.dtype).removeprefix('torch.')}"

    @property
    def directions(self) -> list[str]:
        return list(self.bytes)


class Draw:
    """Random tensors on a device, the same for one seed."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = FP32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator, device=self.device) * scale).to(dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device) * (high - low) + low

    def sine(self, features: int) -> list[Tensor]:
        """amplitude, frequency, damping (features,) float32."""
        return [self.uniform(features, low=low, high=high) for low, high in ((0.5, 1.5), (0.5, 6.0), (0.05, 0.5))]
