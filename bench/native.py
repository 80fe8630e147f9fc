"""Native kernels on a CPU beside torch: `python -m bench.native [--threads N] [--seconds S] [--sections ...] [--json FILE]`.

The calls of a row are measured in turns, one each per round, and medians of the rounds' ratios are compared; so a noisy machine
widens the spread and moves the ratios little. Whoever is measured, freed memory stays in the heap, as while `fit` trains
(train/heap.py): otherwise the system would clear the pages of every output of some megabytes anew. A row is checked against the
reference before it is timed. Bytes are those that the operation must move: inputs read once, outputs written once. Beside every
row that memory could bound stands a copy or a read of memory in the same rounds, which also empties the caches; the rows of a
training step, and those "in cache", are measured with warm ones.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from functools import partial
from typing import Any, Callable

import torch
import torch.nn.functional as F
from psann_fast.train import muon, muon_native
from psann_fast.train.heap import kept_heap
from psann_kernels import damped_sine, linear, native, paged_attention, rms_norm, wave_conv
from psann_kernels.linear import quantize
from psann_kernels.registry import OPS
from torch import Tensor

from .conditions import RESULTS, conditions, table, write_results

MB = 1 << 20
Call = Callable[[], Any]


class Bench:
    """Times calls in turns and keeps the rows."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.rows: list[dict[str, Any]] = []
        # Larger than the last cache, together.
        self.source, self.target = torch.ones(16 * MB), torch.ones(16 * MB)

    def copy(self) -> None:
        self.target.copy_(self.source)

    def read(self) -> None:
        self.source.sum()
        self.target.sum()

    def race(self, calls: dict[str, Call], before: Call | None = None) -> dict[str, list[float]]:
        """Seconds of each call in rounds of one each, after two to warm up; `before` runs in front of every call, untimed."""
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        end, rounds = math.inf, 0
        while rounds < 7 or (rounds < 200 and time.perf_counter() < end):
            rounds += 1
            if rounds == 3:  # compiling is over
                end = time.perf_counter() + self.seconds
            for name, call in calls.items():
                if before is not None:
                    before()
                started = time.perf_counter()
                call()
                if rounds > 2:
                    seconds[name].append(time.perf_counter() - started)
        return seconds

    def add(
        self, op: str, shape: str, dtype: torch.dtype, direction: str, calls: dict[str, Call], *, elements: int, moved: int,
        memory: str | None = "copy", before: Call | None = None,
    ) -> None:  # fmt: skip
        """A row per call. elements, moved: what the operation computes, and the bytes it must move. memory: "copy",
        "read" or None."""
        beside = {} if memory is None else {memory: getattr(self, memory)}
        seconds = self.race({**beside, **calls}, before)
        median = {name: statistics.median(s) for name, s in seconds.items()}
        for name in calls:
            first, _, third = statistics.quantiles(seconds[name], n=4)
            row = {
                "op": op, "backend": name, "shape": shape, "dtype": str(dtype).removeprefix("torch."), "direction": direction,
                "ms": median[name] * 1e3, "spread_ms": (third - first) * 1e3, "rounds": len(seconds[name]),
                "g_elements_per_s": elements / median[name] / 1e9, "gb_per_s": moved / median[name] / 1e9,
            }  # fmt: skip
            if memory is not None:
                row[f"of_{memory}"] = moved / (128 * MB) * ratio(seconds[memory], seconds[name])
            if name == "native":
                row |= {f"times_{peer}": ratio(seconds[peer], seconds[name]) for peer in calls if peer != "native"}
            self.rows.append(row)
            print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)


def ratio(one: list[float], other: list[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(one, other))


def assert_close(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (got.float() - expected.float()).abs().max().item()
    scale = expected.float().abs().max().item()
    if not error <= tolerance * max(scale, 1.0):
        raise SystemExit(f"{what}: error {error:.3g} beside values up to {scale:.3g}; a wrong kernel is not timed")


def functions(op: str, function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The native op beside its definition, compiled and eager."""
    reference = OPS[op].implementations["torch"].function
    torch._dynamo.reset()  # or too many shapes of one function would make torch.compile give up without a word
    return {
        "native": lambda *a, **k: function(*a, **k, backend="native"),
        "torch.compile": torch.compile(reference, dynamic=False),
        "torch": reference,
    }


def compare(
    bench: Bench, op: str, function: Callable[..., Any], leaves: list[Tensor], options: dict[str, Any], shape: str, **row: Any
) -> None:  # fmt: skip
    """Rows of forward, and of forward and backward, of `op` over leaves; the first of them gives size and dtype."""
    peers = functions(op, function)
    x = leaves[0]
    expected = peers["torch"](*leaves, **options)
    assert_close(op, peers["native"](*leaves, **options), expected, 2.0**-7 if x.dtype == torch.bfloat16 else 5e-5)
    size = x.numel() * x.element_size()
    with torch.no_grad():
        calls: dict[str, Call] = {name: (lambda f=f: f(*leaves, **options)) for name, f in peers.items()}
        bench.add(op, shape, x.dtype, "forward", calls, elements=x.numel(), moved=2 * size, **row)
    dy = torch.randn_like(expected)
    leaves = [t.clone().requires_grad_() for t in leaves]
    calls = {name: (lambda f=f: torch.autograd.grad(f(*leaves, **options), leaves, dy)) for name, f in peers.items()}
    bench.add(op, shape, x.dtype, "forward+backward", calls, elements=x.numel(), moved=5 * size, **row)


def sine_inputs(shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    z = (torch.randn(*shape, generator=g) * 2).to(dtype)
    return [z, *(torch.rand(shape[1], generator=g) * scale + 0.1 for scale in (1.0, 6.0, 0.5))]


def sine_rows(bench: Bench) -> None:
    for shape in ((1024, 2048), (8192, 2048)):
        for dtype in (torch.float32, torch.bfloat16):
            compare(bench, "damped_sine", damped_sine, sine_inputs(shape, dtype), {}, f"{shape[0]}x{shape[1]}")


def preallocated_rows(bench: Bench) -> None:
    """The kernel alone, its output given, as the copy's is: without the page faults of a fresh output."""
    for shape in ((768, 512), (1024, 2048), (8192, 2048)):
        for dtype in (torch.float32, torch.bfloat16):
            z, *parameters = sine_inputs(shape, dtype)
            y = torch.empty_like(z)
            pointers = [t.data_ptr() for t in (z, *parameters, y)]

            def kernel() -> None:
                native.NATIVE.damped_sine_forward(*pointers, *shape, shape[1], native.TYPES[dtype], 0, torch.get_num_threads())

            row: dict[str, Any] = {"elements": z.numel(), "moved": 2 * z.numel() * z.element_size()}
            if shape[0] < 8192:
                row |= {"memory": None, "before": kernel}
            name = "output given" + (", in cache" if shape[0] < 8192 else "")
            bench.add(f"damped_sine, {name}", f"{shape[0]}x{shape[1]}", dtype, "forward", {"native": kernel}, **row)


def step_rows(bench: Bench) -> None:
    """Sizes of a small model's training step, each call right after a matrix product of torch's, whose threads still spin."""
    a, b = torch.randn(768, 128), torch.randn(128, 512)

    def product() -> None:
        torch.mm(a, b)

    g = torch.Generator().manual_seed(0)
    z, *parameters = sine_inputs((768, 512), torch.float32)
    x, weight = torch.randn(768, 128, generator=g), torch.rand(128, generator=g) + 0.5
    row: dict[str, Any] = {"before": product, "memory": None}
    compare(bench, "damped_sine", damped_sine, [z, *parameters], {}, "768x512 after a matmul", **row)
    compare(bench, "rms_norm", rms_norm, [x, weight], {}, "768x128 after a matmul", **row)
    taps = torch.randn(128, 4, generator=g) / 2
    leaves = [x.view(3, 256, 128), taps, *(t[:128] for t in parameters)]
    compare(bench, "wave_conv", wave_conv, leaves, {"dilation": 2}, "3x256x128, 4 taps, after a matmul", **row)
    moved = 4 * (768 * 128 + 128 * 512 + 768 * 512)
    bench.add(
        "matmul (torch)", "768x128 @ 128x512", a.dtype, "forward", {"torch": product}, elements=768 * 512, moved=moved, memory=None
    )


def eager_rows(bench: Bench) -> None:
    """What `auto` serves by rms_norm and wave_conv, from one token to many, beside torch eager; small ones in cache."""
    g = torch.Generator().manual_seed(0)
    parameters = sine_inputs((1, 512), torch.float32)[1:]
    for rows in (1, 64, 4096):
        for dtype in (torch.float32, torch.bfloat16):
            x, weight, taps = (torch.randn(*shape, generator=g).to(dtype) for shape in ((rows, 512), (512,), (512, 4)))
            row: dict[str, Any] = {"elements": x.numel(), "moved": 2 * x.numel() * x.element_size(), "memory": None}
            for op, call in (
                ("rms_norm", partial(rms_norm, x, weight)),
                ("wave_conv", partial(wave_conv, x.unsqueeze(0), taps / 2, *parameters, dilation=2)),
            ):
                calls = {name: partial(call, backend=name) for name in ("native", "torch")}
                with torch.no_grad():
                    assert_close(op, calls["native"](), calls["torch"](), 2.0**-6 if dtype == torch.bfloat16 else 5e-5)
                    bench.add(op, f"{rows}x512, eager", dtype, "forward", calls, **row)


def attention_rows(bench: Bench) -> None:
    """64 MB of cache, blocks of 16 in shuffled order, one new token a sequence. "torch" is SDPA, which gets its keys gathered and
    dense for free; "torch, gathering" gathers them too, as who has no paged kernel must for each token."""
    for dtype in (torch.bfloat16, torch.float32):
        for batch, heads, kv_heads, head_dim in ((8, 8, 8, 64), (8, 8, 2, 64), (1, 8, 8, 128)):
            size = torch.empty(0, dtype=dtype).element_size()
            length = 64 * MB // (2 * batch * kv_heads * head_dim * size)
            blocks = batch * length // 16
            k_cache, v_cache = (torch.randn(blocks, 16, kv_heads, head_dim).to(dtype) for _ in range(2))
            block_table = torch.randperm(blocks).int().view(batch, -1)
            q = torch.randn(batch, heads, head_dim).to(dtype)
            seq_lens, bounds = torch.full((batch,), length, dtype=torch.int32), torch.arange(batch + 1, dtype=torch.int32)
            index, q4 = block_table.long(), q.unsqueeze(2)

            def gathered() -> list[Tensor]:
                return [t[index].view(batch, length, kv_heads, head_dim).transpose(1, 2) for t in (k_cache, v_cache)]

            k, v = (t.contiguous() for t in gathered())

            def ours() -> Tensor:
                return paged_attention(q, k_cache, v_cache, block_table, seq_lens, bounds, backend="native")

            def sdpa(k: Tensor = k, v: Tensor = v) -> Tensor:
                return F.scaled_dot_product_attention(q4, k, v, enable_gqa=heads != kv_heads)

            with torch.no_grad():
                assert_close("paged_attention", ours(), sdpa().squeeze(2), 2.0**-6 if dtype == torch.bfloat16 else 1e-4)
                shape = f"B{batch} H{heads}/{kv_heads} D{head_dim}, {length} tokens"
                calls: dict[str, Call] = {"native": ours, "torch": sdpa, "torch, gathering": lambda: sdpa(*gathered())}
                bench.add(
                    "paged_attention", shape, dtype, "forward", calls, elements=q.numel() * length, moved=64 * MB, memory="read"
                )


def linear_rows(bench: Bench) -> None:
    """Weights of 2048 x 512 in 64 copies, so that none is in a cache when its turn comes; a row's time is that of all of them."""
    weights = [torch.randn(2048, 512).bfloat16() for _ in range(64)]
    whole = [quantize(w) for w in weights]
    for count in (1, 4, 8):
        x = torch.randn(count, 512).bfloat16()
        row: dict[str, Any] = {"elements": 64 * weights[0].numel() * count, "memory": "read"}
        with torch.no_grad():
            assert_close("linear", linear(x, weights[0], backend="native"), F.linear(x.float(), weights[0].float()), 2.0**-7)
            y = torch.empty(count, 2048, dtype=torch.bfloat16)
            sizes = (count, 512, 2048, 512, 512, 1, 1, torch.get_num_threads())
            fixed = [(x.data_ptr(), w.data_ptr(), 0, 0, y.data_ptr(), *sizes) for w in weights]
            calls: dict[str, Call] = {
                "native": lambda: [linear(x, w, backend="native") for w in weights],
                "native, kernel alone": lambda: [native.NATIVE.linear(*numbers) for numbers in fixed],
                "torch": lambda: [F.linear(x, w) for w in weights],
            }
            bench.add("linear, 64 weights", f"{count}x512 -> 2048", torch.bfloat16, "forward", calls, moved=64 * 2 * MB, **row)
            calls = {"native": lambda: [linear(x, w, scale=s, backend="native") for w, s in whole]}
            bench.add("linear, 64 weights", f"{count}x512 -> 2048", torch.int8, "forward", calls, moved=64 * MB, **row)


def muon_rows(bench: Bench) -> None:
    """A step's products of Muon: as many matrices as bench.learning's models have of a shape, and a larger model's MLPs."""
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16 and not muon_native.multiplies(dtype):
            continue
        for n, rows, columns in ((20, 128, 128), (8, 448, 128), (16, 1792, 512)):
            x = torch.randn(n, rows, columns)
            x = (x / torch.linalg.matrix_norm(x, keepdim=True)).to(dtype)
            calls: dict[str, Call] = {
                "native": lambda: muon_native.rounds(x.clone(), muon.QUINTICS, muon.TINY), "torch": lambda: muon.rounds(x)
            }  # fmt: skip
            assert_close("muon", calls["native"](), muon.rounds(x.double()), 0.1 if dtype == torch.bfloat16 else 1e-4)
            row: dict[str, Any] = {"elements": x.numel(), "moved": 2 * x.numel() * x.element_size(), "memory": None}
            bench.add("muon, products", f"{n} of {rows}x{columns}", dtype, "step", calls, **row)


SECTIONS = {
    "sine": sine_rows, "given": preallocated_rows, "step": step_rows, "eager": eager_rows, "attention": attention_rows,
    "linear": linear_rows, "muon": muon_rows,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.native", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row, beyond 7 rounds")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--json", default=str(RESULTS / "native.jsonl"), help="where the conditions and the rows go, one JSON object a line"
    )
    options = parser.parse_args()
    if native.NATIVE is None:
        raise SystemExit(f"bench.native: {native.WHY_NOT}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    bench = Bench(options.seconds)
    with kept_heap():
        for section in options.sections:
            SECTIONS[section](bench)
            write_results(options.json, bench.rows)
    print(json.dumps({**conditions(), "instruction_set": native.NATIVE.isa(), "threading": native.NATIVE.threading()}, indent=1))
    columns = list(dict.fromkeys(key for row in bench.rows for key in row))
    print(table([{key: row.get(key, "") for key in columns} for row in bench.rows]))


if __name__ == "__main__":
    main()
