"""How long a call takes: every variant of a case in turns, on inputs that no cache still holds.

A variant comes as several `Prepared`, one for each copy of the inputs. Calling one does what is not timed (the forward pass where
the backward is timed) and gives the call that is. Copies are used in rotation, so many that twice the last cache fits into them.

On a CPU a round calls each variant in turn, as often as fills a fraction of a millisecond. On a GPU the calls over all copies are
captured in one CUDA graph and a round replays it between two events, so that the cost of launching from Python is not
measured; where something cannot be captured, the row says so and the events stand around ordinary calls.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import torch

Call = Callable[[], Any]
Prepared = Callable[[], Call]
MB = 1 << 20
MIN_ROUNDS = 5


@dataclass
class Times:
    """Seconds of one call, a figure a round, and how they were taken: "calls", "graph" or "events (why not a graph)"."""

    seconds: list[float]
    how: str

    def median(self) -> float:
        return statistics.median(self.seconds)

    def percentile(self, percent: int) -> float:
        ordered = sorted(self.seconds)
        at = (len(ordered) - 1) * percent / 100
        low, high = math.floor(at), math.ceil(at)
        return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


class CPUTimer:
    """`rounds` rounds, fewer once `patience` seconds are used up, but never fewer than 5."""

    def __init__(self, rounds: int = 15, patience: float = 2.0, clock: Callable[[], float] = time.perf_counter) -> None:
        self.rounds, self.patience, self.clock = rounds, patience, clock
        self.cache_bytes = last_cache_bytes()

    def race(self, variants: Mapping[str, Sequence[Prepared]]) -> dict[str, Times]:
        calls = {name: [prepare() for prepare in prepared] for name, prepared in variants.items()}
        repeats: dict[str, int] = {}
        for name, each in calls.items():
            each[0]()
            started = self.clock()
            each[-1]()
            repeats[name] = max(1, math.ceil(5e-4 / max(self.clock() - started, 1e-7)))
        times: dict[str, Times] = {name: Times([], "calls") for name in variants}
        next_copy = dict.fromkeys(variants, 0)
        began = self.clock()
        for round_number in range(self.rounds):
            if round_number >= MIN_ROUNDS and self.clock() - began > self.patience:
                break
            for name, each in calls.items():
                count, at = repeats[name], next_copy[name]
                chosen = [each[(at + i) % len(each)] for i in range(count)]
                next_copy[name] = at + count
                started = self.clock()
                for call in chosen:
                    call()
                times[name].seconds.append((self.clock() - started) / count)
        return times


class CUDATimer:
    """As CPUTimer, by events around graph replays. `cuda` is torch.cuda, or what stands in for it in a test."""

    def __init__(
        self, rounds: int = 25, patience: float = 4.0, cuda: Any = torch.cuda, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.rounds, self.patience, self.cuda, self.clock = rounds, patience, cuda, clock
        self.cache_bytes = cuda.get_device_properties(cuda.current_device()).L2_cache_size

    def race(self, variants: Mapping[str, Sequence[Prepared]]) -> dict[str, Times]:
        stream = self.cuda.Stream()
        stream.wait_stream(self.cuda.current_stream())
        runs: dict[str, tuple[Call, int, str]] = {}
        with self.cuda.stream(stream):
            for name, prepared in variants.items():
                runs[name] = self._captured(prepared, stream)
            times = {name: Times([], how) for name, (_, _, how) in runs.items()}
            began = self.clock()
            for round_number in range(self.rounds):
                if round_number >= MIN_ROUNDS and self.clock() - began > self.patience:
                    break
                for name, (run, count, _) in runs.items():
                    times[name].seconds.append(self._seconds(run, stream) / count)
        return times

    def _captured(self, prepared: Sequence[Prepared], stream: Any) -> tuple[Call, int, str]:
        """(what runs all the calls once, how many these are, how)."""
        # Backward runs on the stream that forward ran on, so both are given the stream of the capture.
        calls = [prepare() for prepare in prepared]
        for call in calls:  # compiles, tunes, and makes the libraries' workspaces, which a capture may not
            call()
        eager = self._seconds(calls[-1], stream)
        # About 20 calls a graph, or 20 ms of them where calls are long: an event resolves half a microsecond.
        turns = max(1, min(math.ceil(20 / len(calls)), int(0.02 / max(eager * len(calls), 1e-7))))
        calls = calls * turns

        def all_calls() -> None:
            for call in calls:
                call()

        graph = self.cuda.CUDAGraph()
        try:
            with self.cuda.graph(graph, stream=stream):
                all_calls()
        except RuntimeError as error:
            self.cuda.synchronize()  # raises again if the device is lost, and not only the capture
            return all_calls, len(calls), f"events ({_first_line(error)})"
        graph.replay()
        return graph.replay, len(calls), "graph"

    def _seconds(self, run: Call, stream: Any) -> float:
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        run()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def last_cache_bytes() -> int:
    """The CPU's last cache in bytes as Linux tells it; 32 MB where nothing does."""
    sizes = [32 * MB]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(ValueError):
            sizes.append(int(path.read_text().strip().removesuffix("K")) * 1024)
    return max(sizes)


def copies_beyond(cache_bytes: int, input_bytes: int, most: int = 64) -> int:
    """How many copies of the inputs hold twice the cache: at least 2, so that no call meets its own last inputs."""
    return min(most, max(2, math.ceil(2 * cache_bytes / max(input_bytes, 1))))


def extra_bytes(call: Call, cuda: Any = torch.cuda) -> int:
    """The most memory that a call held at once beyond what was there before: its outputs, what it saves and what it works in."""
    cuda.synchronize()
    before = cuda.memory_allocated()
    cuda.reset_peak_memory_stats()
    call()
    cuda.synchronize()
    return cuda.max_memory_allocated() - before


class Yardsticks:
    """A copy and a matrix product, to be raced beside the variants: what memory and the multipliers of this device do today.

    side  of the product's matrices; copy_bytes of each of the copy's two buffers
    """

    def __init__(self, device: torch.device, copy_bytes: int, side: int) -> None:
        self.device, self.copy_bytes, self.side = device, copy_bytes, side
        self._made: dict[object, Any] = {}

    def copy(self) -> list[Prepared]:
        if "copy" not in self._made:
            source, target = (torch.ones(self.copy_bytes // 4, device=self.device) for _ in range(2))
            self._made["copy"] = [lambda: lambda: target.copy_(source)]
        return self._made["copy"]

    def matmul(self, dtype: torch.dtype) -> list[Prepared]:
        """In float32 without TF32, as the ops compute."""
        if dtype not in self._made:
            a, b = (torch.randn(self.side, self.side, device=self.device).to(dtype) for _ in range(2))
            c = torch.empty_like(a)
            self._made[dtype] = [lambda: lambda: torch.mm(a, b, out=c)]
        return self._made[dtype]

    def bytes_per_second(self, seconds: float) -> float:
        return 2 * self.copy_bytes / seconds

    def flops_per_second(self, seconds: float) -> float:
        return 2 * self.side**3 / seconds
