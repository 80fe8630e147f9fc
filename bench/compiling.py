"""Section compile: torch.compile(fullgraph=True) of every op and of both bases beside eager, and what compiling costs.

A graph break fails the row. The compiled function is judged by the same witnesses as any other variant. compile_s is the first
call, backward included, with Inductor's caches as the machine has them.
"""

from __future__ import annotations

import functools
import time
from typing import Iterator

import torch
from psann_kernels import BackendError

from psann_fast.train.loss import LossModule

from . import check, suite
from .case import BOTH, FORWARD, Case
from .lm import BASES, SIZES, drawn, made
from .ops import BACKENDS, OTHERS_SHARE, Bench, compiled, prepared


def compile_section(bench: Bench) -> Iterator[suite.Case]:
    seen: set[str] = set()
    for case in bench.cases():
        if isinstance(case, str):
            yield case, lambda op=case: [{"op": op, "refused": "not in this version"}]
        elif case.op not in seen:
            seen.add(case.op)  # the first of its cases: what is compiled is the same for all
            yield f"compile {case.name}", functools.partial(op_rows, bench, case)
    for base in BASES:
        if bench.only in f"compile {base}":
            yield f"compile {base}", functools.partial(model_rows, bench, base)


def op_rows(bench: Bench, case: Case) -> list[suite.Row]:
    head = {"op": case.op, "shape": case.shape, "dtype": str(case.dtype).removeprefix("torch.")}
    rows, judge = [], check.Judge(case)
    direction = BOTH if case.leaves else FORWARD
    for backend in BACKENDS:
        torch._dynamo.reset()
        eager, fast = case.call(backend), compiled(case.call(backend), fullgraph=True)
        try:
            wrong, share = judge.verdict(eager)
            started = time.perf_counter()
            if wrong is None:
                arguments, gradients = case.make(0)
                check.run(fast, arguments, case.leaves, gradients)
            seconds = time.perf_counter() - started
            if wrong is None:
                wrong, share = judge.verdict(fast)
        except BackendError as error:
            rows.append({**head, "backend": backend, "refused": str(error)})
            continue
        except (torch._dynamo.exc.TorchDynamoException, *suite.VARIANT_FAILURES) as error:
            suite.raise_if_lost(error)
            rows.append({**head, "backend": backend, "failed": suite.describe(error)})
            continue
        if wrong is not None and (backend != "torch" or share > OTHERS_SHARE):  # what is compiled of torch is Inductor's
            rows.append({**head, "backend": backend, "wrong": wrong})
            continue
        racing, failed = prepared(bench, case, direction, {"eager": eager, "compiled": fast})
        rows += [{**head, "backend": backend, "failed": f"{name}: {why}"} for name, why in failed.items()]
        if not failed:
            times = bench.timer.race(racing)
            rows.append(
                {
                    **head,
                    "backend": backend,
                    "direction": direction,
                    "eager_ms": times["eager"].median() * 1e3,
                    "compiled_ms": times["compiled"].median() * 1e3,
                    "times_eager": times["eager"].median() / times["compiled"].median(),
                    "compile_s": seconds,
                    "error_share": share,
                    "timing": times["compiled"].how,
                    "rounds": len(times["compiled"].seconds),
                }
            )
    return rows


def model_rows(bench: Bench, base: str) -> list[suite.Row]:
    """Loss and gradients of a batch, the smallest of the section's models."""
    name, size = next(iter(SIZES[bench.size].items()))
    rows: list[suite.Row] = []
    batch = drawn(size, bench.device, size.rows, size.tokens)
    inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    for backend in BACKENDS:
        head = {"model": base, "size": name, "shape": f"{size.rows}x{size.tokens}", "backend": backend, "direction": BOTH}
        torch._dynamo.reset()
        try:
            model = made(base, size, backend, bench.device).train()
            eager = LossModule(model)
            parameters = list(model.parameters())
            expected = torch.autograd.grad(eager(inputs, targets), parameters)
            fast = torch.compile(LossModule(model), fullgraph=True, dynamic=False)
            started = time.perf_counter()
            got = torch.autograd.grad(fast(inputs, targets), parameters)
            seconds = time.perf_counter() - started
        except BackendError as error:
            rows.append({**head, "refused": str(error)})
            continue
        except (torch._dynamo.exc.TorchDynamoException, *suite.VARIANT_FAILURES) as error:
            suite.raise_if_lost(error)
            rows.append({**head, "failed": suite.describe(error)})
            continue

        def both(module: torch.nn.Module, parameters: list[torch.nn.Parameter] = parameters) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(module(inputs, targets), parameters)

        times = bench.timer.race({"eager": [lambda m=eager: lambda: both(m)], "compiled": [lambda m=fast: lambda: both(m)]})
        largest = max((g - e).norm().item() / max(e.norm().item(), 1e-30) for g, e in zip(got, expected))
        rows.append(
            {
                **head,
                "eager_ms": times["eager"].median() * 1e3,
                "compiled_ms": times["compiled"].median() * 1e3,
                "times_eager": times["eager"].median() / times["compiled"].median(),
                "compile_s": seconds,
                "gradient_difference": largest,
                "rounds": len(times["compiled"].seconds),
                "timing": times["compiled"].how,
            }
        )
    return rows
