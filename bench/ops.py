"""Sections ops and peers: each case's variants are checked, then raced together with a copy and a matrix product."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Mapping

import torch
import torch._functorch.config as functorch
from psann_kernels import BackendError
from psann_kernels.registry import AUTO_ORDER
from torch import Tensor

from . import check, suite
from .case import BACKWARD, FORWARD, Case, Function
from .cases import cases
from .timing import Call, Prepared, Times, Yardsticks, copies_beyond, extra_bytes

BACKENDS = ("triton", "native", "torch")
OWN = ("auto", *BACKENDS, "gluon")
# Our bound is ours alone: Inductor's sums over one long chain, for one, exceed it by some half. Without a time for them we would
# win by default, so others are timed up to this many times what is allowed, and their error_share tells.
OTHERS_SHARE = 16.0


@dataclass(frozen=True)
class Limit:
    """Less than the op, and so not checked: what a perfect version of it could not beat."""

    function: Function


@dataclass(frozen=True)
class Planned:
    """A forward whose preparation is not timed: plan(*arguments) gives the call that is."""

    plan: Callable[..., Call]

    def __call__(self, *arguments: Any) -> Any:
        return self.plan(*arguments)()


Variant = Function | Limit | str  # a sentence says why there is nothing to run


class Bench:
    """What the sections share: device, size, timer, yardsticks."""

    def __init__(self, device: torch.device, size: str, timer: Any, only: str = "", has_compile: bool = True) -> None:
        self.device, self.size, self.timer, self.only, self.has_compile = device, size, timer, only, has_compile
        is_gpu = device.type == "cuda"
        copy_bytes, side = (1 << 29, 8192) if is_gpu else (1 << 26, 768)
        self.yardsticks = Yardsticks(device, *((copy_bytes, side) if size != "tiny" else (1 << 16, 64)))

    def cases(self) -> Iterator[Case | str]:
        for case in cases(self.size, self.device):
            if self.only in (case if isinstance(case, str) else case.name):
                yield case


def ops_section(bench: Bench) -> Iterator[suite.Case]:
    """Our backends, torch eager and torch.compile."""
    for case in bench.cases():
        if isinstance(case, str):
            yield case, lambda op=case: [{"op": op, "refused": "not in this version"}]
        else:
            yield case.name, lambda case=case: measure(bench, case, own_variants(bench, case))


def own_variants(bench: Bench, case: Case) -> dict[str, Variant]:
    """Each of our backends, and torch.compile of the specification."""
    variants: dict[str, Variant] = {backend: case.call(backend) for backend in BACKENDS} | case.more
    if not case.compiles:
        variants["torch.compile"] = "the specification reads values on the host"
    elif not bench.has_compile:
        variants["torch.compile"] = "left out by --no-compile"
    else:
        variants["torch.compile"] = compiled(case.call("torch"))
    return variants


def compiled(function: Function, **options: Any) -> Function:
    """torch.compile for fixed shapes. A backward is timed many times over one forward, so its saved tensors are not given away."""
    functorch.donated_buffer = False
    return torch.compile(function, dynamic=False, **options)


def measure(bench: Bench, case: Case, variants: Mapping[str, Variant]) -> list[suite.Row]:
    """Rows of one case: refusals and wrong results first, then a row for each variant and direction."""
    head = {"op": case.op, "shape": case.shape, "dtype": str(case.dtype).removeprefix("torch.")}
    rows: list[suite.Row] = []
    functions, errors, refused = {}, {}, set()
    judge = check.Judge(case)
    for name, variant in variants.items():
        if isinstance(variant, str):
            rows.append({**head, "backend": name, "refused": variant})
            continue
        if isinstance(variant, Limit):
            functions[name], errors[name] = variant.function, None
            continue
        try:
            wrong, errors[name] = judge.verdict(variant)
        except BackendError as error:
            rows.append({**head, "backend": name, "refused": str(error)})
            refused.add(name)
            continue
        except suite.VARIANT_FAILURES as error:
            suite.raise_if_lost(error)
            rows.append({**head, "backend": name, "failed": suite.describe(error)})
            continue
        if wrong is not None and (name in OWN or name in case.more or errors[name] > OTHERS_SHARE):
            rows.append({**head, "backend": name, "wrong": wrong})
        else:
            functions[name] = variant
    del judge  # and the float64 tensors that it keeps
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    chosen = next(name for name in AUTO_ORDER.get(bench.device.type, ("torch",)) if name not in refused)  # right or wrong
    for direction in case.directions:
        racing, failed = prepared(bench, case, direction, functions)
        rows += [{**head, "backend": name, "direction": direction, "failed": why} for name, why in failed.items()]
        # The second call of each, after whatever is made once.
        memory = {name: extra_bytes(each[0]()) / 1e6 if bench.device.type == "cuda" else None for name, each in racing.items()}
        yardsticks = {"copy": bench.yardsticks.copy(), **({"matmul": bench.yardsticks.matmul(case.dtype)} if case.flops else {})}
        times = bench.timer.race({**yardsticks, **racing})
        rows += [
            {
                **head,
                "backend": name,
                "direction": direction,
                **figures(bench, case, direction, name, times),
                "error_share": errors[name],
                "extra_mb": memory[name],
                "is_auto": name == chosen,
            }
            for name in racing
        ]
    return rows


def prepared(
    bench: Bench, case: Case, direction: str, functions: Mapping[str, Function]
) -> tuple[dict[str, list[Prepared]], dict[str, str]]:
    """Each variant over every copy of the inputs, after one call of it: (those that run, those that fail with why)."""
    arguments, gradients = case.make(0)
    size = sum(t.nbytes for t in (*arguments, *gradients) if isinstance(t, Tensor))
    count = 1 if size >= 8 * bench.timer.cache_bytes else copies_beyond(bench.timer.cache_bytes, size)
    copies = [(arguments, gradients)] + [case.make(seed) for seed in range(1, count)]
    racing, failed = {}, {}
    for name, function in functions.items():
        each = [functools.partial(prepare, function, direction, case.leaves, *copy) for copy in copies]
        try:
            each[0]()()
        except suite.VARIANT_FAILURES as error:
            suite.raise_if_lost(error)
            failed[name] = suite.describe(error)
        else:
            racing[name] = each
    return racing, failed


def prepare(function: Function, direction: str, leaves: int, arguments: list[Any], gradients: list[Tensor]) -> Call:
    """The call to be timed; where it is the backward alone, its forward has run."""
    if direction == FORWARD:
        plain = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
        planned = function.plan(*plain) if isinstance(function, Planned) else functools.partial(function, *plain)

        def forward() -> Any:
            with torch.no_grad():
                return planned()

        return forward
    inputs = [a.detach().requires_grad_() for a in arguments[:leaves]]

    def outputs() -> list[Tensor]:
        found = function(*inputs, *arguments[leaves:])
        return list(found) if isinstance(found, (tuple, list)) else [found]

    if direction == BACKWARD:
        kept = outputs()
        return lambda: torch.autograd.grad(kept, inputs, gradients, retain_graph=True)
    return lambda: torch.autograd.grad(outputs(), inputs, gradients)


def figures(bench: Bench, case: Case, direction: str, name: str, times: Mapping[str, Times]) -> suite.Row:
    """Times, rates, and their ratios to the yardsticks and peers of the same rounds."""
    mine = times[name]
    seconds = mine.median()
    copy_rate = bench.yardsticks.bytes_per_second(times["copy"].median())
    row: suite.Row = {
        "median_ms": seconds * 1e3,
        "p10_ms": mine.percentile(10) * 1e3,
        "p90_ms": mine.percentile(90) * 1e3,
        "rounds": len(mine.seconds),
        "timing": mine.how,
        "gb_per_s": case.bytes[direction] / seconds / 1e9,
        "of_copy": case.bytes[direction] / seconds / copy_rate,
        "copy_gb_per_s": copy_rate / 1e9,
    }
    if case.flops:
        matmul_rate = bench.yardsticks.flops_per_second(times["matmul"].median())
        rate = case.flops[direction] / seconds
        row |= {"tflop_per_s": rate / 1e12, "of_matmul": rate / matmul_rate, "matmul_tflop_per_s": matmul_rate / 1e12}
    row["of_roof"] = max(row["of_copy"], row.get("of_matmul", 0.0))
    for peer in ("torch", "torch.compile"):
        row[f"times_{peer}"] = times[peer].median() / seconds if peer in times and peer != name else None
    row["times"] = {
        other: times[other].median() / seconds for other in times if other not in (name, "copy", "matmul", "torch", "torch.compile")
    }
    return row
