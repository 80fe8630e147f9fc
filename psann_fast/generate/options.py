"""How the engine runs, as opposed to what a request asks for."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

WEIGHTS = ("model", "bf16", "int8")


@dataclass(frozen=True)
class EngineOptions:
    """Options of a run; they change its speed, and `weights` the model.

    weights    "model": as they are. "bf16", "int8": each matrix rounded, on a CPU with native kernels, where reading the weights is
               most of a step's time; int8 has one scale per output. Activations and the cache keep the model's dtype
    speculate  tokens guessed per step and text at most, from the text's own repetitions; 0: none. The text stays the same
    cuda_graphs  "auto": on a CUDA device, steps in which every text adds one token run as captured graphs, each compared once
               with the step that it is of; where that cannot be, the log says why. True: an error where it cannot be. False: never

    Raises ValueError for a value out of range, naming it.
    """

    weights: str = "model"
    speculate: int = 0
    cuda_graphs: bool | str = "auto"

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights is {self.weights!r}; choose one of {', '.join(map(repr, WEIGHTS))}")
        is_whole = isinstance(self.speculate, numbers.Integral) and not isinstance(self.speculate, bool)
        if not is_whole or not 0 <= self.speculate <= 64:
            raise ValueError(f"speculate is {self.speculate!r}; it must be a whole number of 0 to 64")
        if self.cuda_graphs != "auto" and not isinstance(self.cuda_graphs, bool):
            raise ValueError(f"cuda_graphs is {self.cuda_graphs!r}; it must be 'auto', True or False")
