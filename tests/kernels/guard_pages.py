"""Runs kernels on tensors that end where readable memory ends: an access past them is a SIGSEGV instead of a number.

    python tests/kernels/guard_pages.py triton     reads lines "OP SEED near|far", answers "done ..." after each; to "kernels"
                                                   it answers the names of the Triton kernels launched so far, with their modules

In "far" cases the last entry along a tensor's first axis starts past element 2^31, in memory that is mapped and hardly ever
touched: an offset that overflows 32 bits points outside.

Meant to run as a process of its own (test_guard_pages.py does), because a fault ends it. Inputs, outputs and scratch memory are
guarded alike; each tensor lies against the page after it or the page before it, and has no element to spare between its strides.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import mmap
import os
import sys
from random import Random
from typing import Callable, Iterator
from unittest import mock

if __name__ == "__main__" and sys.argv[1] == "triton":
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    import quick_interpreter  # noqa: F401 (installs itself)

import psann_kernels
import torch
from torch import Tensor

_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.10 does not name it
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Guard:
    """Hands out tensors between unreadable pages. Used as a context: they must not be touched after it."""

    def __init__(self, random: Random, is_far: bool) -> None:
        self.random, self.is_far = random, is_far
        self.regions: list[tuple[int, int]] = []

    def __enter__(self) -> "Guard":
        return self

    def __exit__(self, *error: object) -> None:
        for address, size in self.regions:
            _LIBC.munmap(address, size)

    def place(self, t: Tensor, first_stride: int | None = None) -> Tensor:
        """A copy of t, in the same strides, whose last element is the last of its page, or the first the first, by chance.

        first_stride   elements from one entry of the first axis to the next, if not as in t
        """
        if t.numel() == 0:
            return t
        strides = t.stride() if first_stride is None else (first_stride, *t.stride()[1:])
        span = (1 + sum((size - 1) * stride for size, stride in zip(t.shape, strides))) * t.element_size()
        inner = math.ceil(span / mmap.PAGESIZE) * mmap.PAGESIZE
        whole = inner + 2 * mmap.PAGESIZE
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        address = _LIBC.mmap(None, whole, mmap.PROT_READ | mmap.PROT_WRITE, kind, -1, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), f"mmap of {whole} bytes failed")
        self.regions.append((address, whole))
        for guard in (address, address + mmap.PAGESIZE + inner):
            if _LIBC.mprotect(guard, mmap.PAGESIZE, 0):
                raise OSError(ctypes.get_errno(), "mprotect failed")
        start = address + mmap.PAGESIZE + (inner - span if self.random.random() < 0.7 else 0)
        flat = torch.frombuffer((ctypes.c_char * span).from_address(start), dtype=t.dtype)
        placed = flat.as_strided(t.shape, strides)
        placed.copy_(t)
        return placed

    @contextlib.contextmanager
    def allocations(self) -> Iterator[None]:
        """torch.empty and its kin give guarded memory meanwhile."""
        empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty
        with (
            mock.patch.object(torch, "empty", lambda *a, **k: self.place(empty(*a, **k))),
            mock.patch.object(torch, "empty_like", lambda *a, **k: self.place(empty_like(*a, **k))),
            mock.patch.object(Tensor, "new_empty", lambda *a, **k: self.place(new_empty(*a, **k))),
        ):
            yield


Case = Callable[[Random, Guard, str], None]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 127, 130)


def tensor(random: Random, guard: Guard, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random values; the last axis without gaps, rows sometimes further apart than they are long."""
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    t = torch.randn(shape, generator=generator)
    if guard.is_far and len(shape) > 1 and shape[0] > 1:
        return guard.place(t.to(dtype), 2**31 // (shape[0] - 1) + 1)
    if random.random() < 0.3 and len(shape) > 1:
        t = torch.cat((t, t[..., : random.choice((1, 3))]), -1)[..., : shape[-1]]
    return guard.place(t.to(dtype))


def differentiate(random: Random, guard: Guard, function: Callable[..., Tensor | tuple[Tensor, ...]], *leaves: Tensor) -> None:
    """Forward and backward of function(*leaves)."""
    leaves = tuple(leaf.requires_grad_() for leaf in leaves)
    with guard.allocations():
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, leaves, [tensor(random, guard, *y.shape, dtype=y.dtype) for y in outputs])


def constants(random: Random, backend: str, module: str, **values: int) -> contextlib.AbstractContextManager[object]:
    """In most cases, constants of psann_kernels' Triton `module` made small, so that small shapes take the paths of large ones."""
    if backend != "triton" or random.random() < 0.25:
        return contextlib.nullcontext()
    return mock.patch.multiple(importlib.import_module(f"psann_kernels.{module}"), **values)


def damped_sine(random: Random, guard: Guard, backend: str) -> None:
    features = random.choice(SIZES)
    z = tensor(random, guard, *random.choices(SIZES, k=random.randint(0, 1)), features, dtype=random.choice(DTYPES))
    mode = random.choice(("abs", "relu", "none"))
    parameters = [tensor(random, guard, features) for _ in range(3)]
    if mode == "none":  # damping takes no part
        damping = parameters.pop()
        differentiate(
            random, guard, lambda z, a, f: psann_kernels.damped_sine(z, a, f, damping, mode=mode, backend=backend), z, *parameters
        )
    else:
        differentiate(random, guard, lambda *t: psann_kernels.damped_sine(*t, mode=mode, backend=backend), z, *parameters)


def rms_norm(random: Random, guard: Guard, backend: str) -> None:
    features, rows = random.choice((*SIZES, 1025)), random.choice(SIZES)
    dtype = random.choice(DTYPES)
    x, weight = tensor(random, guard, rows, features, dtype=dtype), tensor(random, guard, features)
    leaves = (x, weight, tensor(random, guard, rows, features, dtype=dtype)) if random.random() < 0.5 else (x, weight)
    with constants(random, backend, "rms_norm_triton", MAX_TILE=2, WIDE_TILE=128, MAX_ROW_PROGRAMS=2):
        differentiate(random, guard, lambda x, w, r=None: psann_kernels.rms_norm(x, w, residual=r, backend=backend), *leaves)


def rms_norm_mixed(random: Random, guard: Guard, backend: str) -> None:
    """A float32 x whose residual or whose y is a half. A case of its own, because the CUDA kernels take one dtype."""
    features, rows = random.choice((*SIZES, 1025)), random.choice(SIZES)
    x, weight = tensor(random, guard, rows, features), tensor(random, guard, features)
    residual = [tensor(random, guard, rows, features, dtype=random.choice(DTYPES))] if random.random() < 0.5 else []
    options = {"dtype": random.choice(DTYPES), "backend": backend}
    with constants(random, backend, "rms_norm_triton", MAX_TILE=2, WIDE_TILE=128, MAX_ROW_PROGRAMS=2):
        differentiate(
            random, guard, lambda x, w, r=None: psann_kernels.rms_norm(x, w, residual=r, **options), x, weight, *residual
        )


def scaled_add(random: Random, guard: Guard, backend: str) -> None:
    dtype, shape = random.choice(DTYPES), [*random.choices(SIZES, k=random.randint(0, 1)), random.choice(SIZES)]
    branch_dtype = random.choice(DTYPES) if dtype == torch.float32 else dtype
    x, branch = (tensor(random, guard, *shape, dtype=each) for each in (dtype, branch_dtype))
    alpha = tensor(random, guard, 1, dtype=random.choice((dtype, torch.float32)))
    differentiate(random, guard, lambda *t: psann_kernels.scaled_add(*t, backend=backend), x, branch, alpha)


def documents(random: Random, guard: Guard, total: int) -> Tensor:
    """cu_seqlens of up to four documents, some of them empty, in `total` tokens."""
    cuts = sorted(random.randint(0, total) for _ in range(random.randint(0, 3)))
    return guard.place(torch.tensor([0, *cuts, total], dtype=torch.int32))


def wave_conv(random: Random, guard: Guard, backend: str) -> None:
    dtype, features, taps = random.choice(DTYPES), random.choice(SIZES), random.choice((1, 2, 3, 4))
    dilation = random.choice((1, 2, 5))
    options = {"dilation": dilation, "mode": random.choice(("abs", "relu")), "backend": backend}
    tokens = random.choice(SIZES)
    if random.random() < 0.5:
        x = tensor(random, guard, tokens, features, dtype=dtype)
        options["cu_seqlens"] = documents(random, guard, tokens)
        rows = len(options["cu_seqlens"]) - 1
    else:
        rows = random.choice((1, 2))
        x = tensor(random, guard, rows, tokens, features, dtype=dtype)
    if random.random() < 0.6:
        options["state"] = tensor(random, guard, rows, (taps - 1) * dilation, features, dtype=dtype)
    weight, bias, *parameters = tensor(random, guard, features, taps), *(tensor(random, guard, features) for _ in range(4))
    differentiate(
        random, guard, lambda x, weight, bias, *parameters: psann_kernels.wave_conv(x, weight, *parameters, bias=bias, **options),
        x, weight, bias, *parameters,
    )  # fmt: skip


def heads(random: Random) -> tuple[int, int, int]:
    """(query heads, key heads, head_dim)"""
    kv = random.choice((1, 2))
    return kv * random.choice((1, 2, 3)), kv, random.choice((2, 16, 24, 40, 64))


def tables(guard: Guard, positions: int, head_dim: int) -> dict[str, Tensor]:
    cos, sin = psann_kernels.rotary_tables(positions, head_dim)
    return {"cos": guard.place(cos), "sin": guard.place(sin)}


def attention_options(random: Random, guard: Guard, num_heads: int) -> dict[str, object]:
    options: dict[str, object] = {"interleaved": random.random() < 0.5}
    if random.random() < 0.4:
        options["window"] = random.choice((1, 7, 40))
    if random.random() < 0.3:
        options["alibi_slopes"] = guard.place(torch.rand(num_heads))
    return options


def rope_attention(random: Random, guard: Guard, backend: str) -> None:
    dtype, (num_heads, kv, head_dim) = random.choice(DTYPES), heads(random)
    options = attention_options(random, guard, num_heads)
    queries = keys = random.choice(SIZES)
    lead: tuple[int, ...] = ()
    if random.random() < 0.5:
        options["cu_seqlens"] = documents(random, guard, keys)
    else:
        lead, queries = (random.choice((1, 2)),), random.choice((keys, random.randint(1, keys)))
    if random.random() < 0.6:
        options |= tables(guard, keys, head_dim)
    q = tensor(random, guard, *lead, queries, num_heads, head_dim, dtype=dtype)
    k, v = (tensor(random, guard, *lead, keys, kv, head_dim, dtype=dtype) for _ in range(2))
    differentiate(random, guard, lambda q, k, v: psann_kernels.rope_attention(q, k, v, **options, backend=backend), q, k, v)


def paged_attention(random: Random, guard: Guard, backend: str) -> None:
    """paged_append of the new tokens, then paged_attention over them; the table has no entry and the pool no block to spare."""
    dtype, (num_heads, kv, head_dim) = random.choice(DTYPES), heads(random)
    block_size = random.choice((1, 8, 16, 64))
    lengths = [random.choice((0, 1, block_size, block_size + 1, 70)) for _ in range(random.randint(1, 3))]
    new = [random.randint(0, min(length, 20)) for length in lengths]
    blocks = [math.ceil(length / block_size) for length in lengths]
    owned = random.sample(range(sum(blocks)), sum(blocks))
    table = torch.full((len(lengths), max(1, *blocks, 1)), 2**30, dtype=torch.int32)
    slots, positions = [], []
    for b, count in enumerate(blocks):
        table[b, :count] = torch.tensor([owned.pop() for _ in range(count)], dtype=torch.int32)
        for t in range(lengths[b] - new[b], lengths[b]):
            slots.append(int(table[b, t // block_size]) * block_size + t % block_size)
            positions.append(t)
    is_float8 = backend != "native" and random.random() < 0.25  # native refuses those
    cache_dtype = torch.float8_e4m3fn if is_float8 else dtype
    k_cache, v_cache = (tensor(random, guard, max(1, sum(blocks)), block_size, kv, head_dim, dtype=cache_dtype) for _ in range(2))
    scales = {name: guard.place(torch.full((kv,), 0.01)) for name in ("k_scale", "v_scale")} if is_float8 else {}
    rotary = tables(guard, max(1, *lengths, 1), head_dim) if random.random() < 0.6 else {}
    options = attention_options(random, guard, num_heads) | {"backend": backend}
    k, v = (tensor(random, guard, sum(new), kv, head_dim, dtype=dtype) for _ in range(2))
    ends = torch.tensor([0, *new]).cumsum(0).int()
    with guard.allocations(), constants(random, backend, "paged_attention_triton", MIN_SPLIT=16, MAX_SPLITS=4):
        psann_kernels.paged_append(
            k, v, k_cache, v_cache, guard.place(torch.tensor(slots, dtype=torch.int64)), interleaved=options["interleaved"],
            positions=guard.place(torch.tensor(positions, dtype=torch.int64)) if rotary else None, **rotary, **scales,
            backend=backend,
        )  # fmt: skip
        psann_kernels.paged_attention(
            tensor(random, guard, sum(new), num_heads, head_dim, dtype=dtype), k_cache, v_cache, guard.place(table),
            guard.place(torch.tensor(lengths, dtype=torch.int32)), guard.place(ends), **rotary, **scales, **options,
        )  # fmt: skip


def multiplies_in_32_bits(random: Random, guard: Guard, backend: str) -> None:
    """A kernel whose row offset is a 32-bit product: what the far cases are for."""
    import triton
    import triton.language as tl

    @triton.jit
    def copy(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
        row, c = tl.program_id(0), tl.arange(0, BLOCK)
        tl.store(y_ptr + row * BLOCK + c, tl.load(x_ptr + row * stride + c))

    x = tensor(random, guard, 3, 16)
    copy[(3,)](x, torch.empty(3, 16), x.stride(0), BLOCK=16)


def reads_too_far(random: Random, guard: Guard, backend: str) -> None:
    """A kernel whose mask lets one element too many through: what the guard is for."""
    import triton
    import triton.language as tl

    @triton.jit
    def copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        c = tl.arange(0, BLOCK)
        tl.store(y_ptr + c, tl.load(x_ptr + c, mask=c <= n, other=0.0), mask=c < n)

    for _ in range(20):
        x = tensor(random, guard, 100)
        copy[(1,)](x, torch.empty_like(x), 100, BLOCK=128)


def linear_cross_entropy(random: Random, guard: Guard, backend: str) -> None:
    # Of two far rows the second lies 2^31 elements behind the first: torch's own float16 product of one row crashes there.
    sizes = [size for size in SIZES if size != 2 or not guard.is_far]
    dtype, classes = random.choice(DTYPES), random.choice((*sizes, 2049))
    x = tensor(random, guard, random.choice(sizes), random.choice((1, 3, 16)), dtype=dtype)
    weight, bias = tensor(random, guard, classes, x.shape[1], dtype=dtype), tensor(random, guard, classes, dtype=dtype)
    targets = torch.tensor([random.choice((-100, random.randrange(classes))) for _ in range(len(x))])
    options = {
        "label_smoothing": random.choice((0.0, 0.1)), "z_loss": random.choice((0.0, 0.01)), "soft_cap": random.choice((None, 3.0)),
        "reduction": random.choice(("sum", "none")), "chunk": random.choice((None, 1, 5)), "backend": backend,
    }  # fmt: skip
    targets = guard.place(targets)
    differentiate(
        random, guard, lambda x, w, b: psann_kernels.linear_cross_entropy(x, w, targets, bias=b, **options), x, weight, bias
    )


def damped_sine_mlp(random: Random, guard: Guard, backend: str) -> None:
    dtype = random.choice((torch.float16, torch.bfloat16))
    (inner, features, outputs), rows = (random.choice((16, 32, 80)) for _ in range(3)), random.choice((*SIZES, 130))
    x, w1, b1 = (tensor(random, guard, *shape, dtype=dtype) for shape in ((rows, inner), (features, inner), (features,)))
    w2, b2 = (tensor(random, guard, *shape, dtype=dtype) for shape in ((outputs, features), (outputs,)))
    sine = [tensor(random, guard, features) for _ in range(3)]
    options = {"mode": random.choice(("abs", "relu", "none")), "fused": backend == "triton", "backend": backend}
    has_tma = random.random() < 0.5  # these tensors all have descriptors, and a GPU without TMA reads them through pointers
    with contextlib.ExitStack() as stack:
        if backend == "triton":
            stack.enter_context(mock.patch("psann_kernels.damped_sine_mlp_triton.has_tma", lambda device: has_tma))
        differentiate(random, guard, lambda *a: psann_kernels.damped_sine_mlp(*a, **options), x, w1, b1, *sine, w2, b2)
        differentiate(random, guard, lambda *a: psann_kernels.linear_damped_sine(*a, **options), x, w1, b1, *sine)


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        damped_sine, rms_norm, rms_norm_mixed, scaled_add, wave_conv, rope_attention, paged_attention, linear_cross_entropy,
        damped_sine_mlp,
    )
}  # fmt: skip
FAULTS: dict[str, Case] = {case.__name__: case for case in (reads_too_far, multiplies_in_32_bits)}


def record_launches() -> set[str]:
    """A set that grows by "module.kernel" whenever Triton's interpreter runs a kernel."""
    from triton.runtime.interpreter import InterpretedFunction

    launched: set[str] = set()
    run = InterpretedFunction.run

    def recorded(self: InterpretedFunction, *args: object, **options: object) -> object:
        launched.add(f"{self.fn.__module__.removeprefix('psann_kernels.')}.{self.fn.__name__}")
        return run(self, *args, **options)

    InterpretedFunction.run = recorded
    return launched


def main() -> None:
    torch.set_num_threads(1)
    backend = sys.argv[1]
    launched = record_launches() if backend == "triton" else set()
    for line in sys.stdin:
        if line == "kernels\n":
            print(*sorted(launched), flush=True)
            continue
        name, seed, distance = line.split()
        random = Random(int(seed))
        with Guard(random, distance == "far") as guard:
            (CASES | FAULTS)[name](random, guard, backend)
        print(f"done {line}", end="", flush=True)


if __name__ == "__main__":
    main()
