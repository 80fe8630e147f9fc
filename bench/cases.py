"""The calls that are measured and checked: every op at named sizes, what it must move and compute, and its formula spelt out.

Sizes: "gpu" (the issue's shapes), "cpu" (small enough for two cores), "tiny" (tests), "parity" (awkward ones, checked only).

Bytes are inputs read once and outputs written once; flops are the formula's products alone, two a multiply-add. A backward's
attention is credited with 5 products to the forward's 2.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Callable, Iterator

import psann_kernels
import torch
from psann_kernels import OPS
from psann_kernels.linear import quantize
from psann_kernels.linear import reference as linear_reference
from torch import Tensor

Function = Callable[..., Any]
SIZES = ("gpu", "cpu", "tiny", "parity")
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


def cases(size: str, device: torch.device) -> Iterator[Case | str]:
    """Every case of a size; for an op that this version lacks, its name."""
    for op, builder in BUILDERS.items():
        if op in OPS and hasattr(psann_kernels, op):
            yield from builder(size, device)
        else:
            yield op


# -- elementwise and row-wise -------------------------------------------------------------------------------------------------


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


# -- attention ----------------------------------------------------------------------------------------------------------------


def seen_pairs(tokens: int, window: int | None) -> int:
    """Query-key pairs of one causal head."""
    full = tokens if window is None else min(window, tokens)
    return full * (full + 1) // 2 + (tokens - full) * full


def rope_attention_cases(size: str, device: torch.device) -> Iterator[Case]:
    # (rows, tokens, heads, kv heads, head_dim, window, rotates, dtypes)
    shapes = {
        "gpu": [
            (2, 8192, 64, 8, 128, None, True, (BF16,)),
            (2, 8192, 64, 8, 128, None, False, (BF16,)),
            (2, 8192, 64, 8, 64, None, True, (BF16,)),
            (2, 8192, 64, 8, 64, 128, True, (BF16,)),
            (2, 2048, 16, 16, 128, None, True, (BF16, FP32)),
        ],
        "cpu": [
            (1, 1024, 8, 2, 64, None, True, (FP32, BF16)),
            (1, 512, 8, 2, 128, None, True, (FP32,)),
            (1, 1024, 8, 2, 64, 128, True, (FP32,)),
        ],
        "tiny": [(1, 40, 2, 1, 16, None, True, (FP32,))],
        "parity": [
            (2, 130, 6, 2, 64, None, True, (FP32, BF16)),
            (1, 257, 4, 1, 128, 100, True, (FP32, BF16)),
            (1, 33, 3, 3, 40, None, False, (FP32, BF16)),
            (1, 300, 2, 1, 256, None, True, (BF16,)),
        ],
    }
    for rows, tokens, heads, kv_heads, head_dim, window, rotates, dtypes in shapes[size]:
        for dtype in dtypes:
            yield _attention_case(device, rows, tokens, heads, kv_heads, head_dim, window, rotates, dtype)


def _attention_case(
    device: torch.device,
    rows: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    rotates: bool,
    dtype: torch.dtype,
) -> Case:
    tables = list(psann_kernels.rotary_tables(tokens, head_dim, device=device)) if rotates else [None, None]

    def make(seed: int) -> tuple[list[Any], list[Tensor]]:
        draw = Draw(device, seed)
        q, k, v, do = (draw.normal(rows, tokens, h, head_dim, dtype=dtype) for h in (heads, kv_heads, kv_heads, heads))
        return [q, k, v, *tables], [do]

    def call(backend: str) -> Function:
        return lambda *a: psann_kernels.rope_attention(*a, window=window, backend=backend)

    def plain(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        if cos is not None:
            q, k = (turn(x, cos, sin) for x in (q, k))
        group = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(group, 2) for x in (k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * head_dim**-0.5
        distance = torch.arange(tokens, device=q.device).unsqueeze(1) - torch.arange(tokens, device=q.device)
        unseen = (distance < 0) | (distance >= (window or tokens))
        return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(unseen, float("-inf")).softmax(-1), v)

    # A key head and its queries depend on nothing else; so much of 64 heads fits into memory in float64.
    group = heads // kv_heads
    is_large = tokens > 2048

    def crop(arguments: list[Any], gradients: list[Tensor]) -> tuple[list[Any], list[Tensor]]:
        q, k, v, *rest = arguments
        return [q[:1, :, :group], k[:1, :, :1], v[:1, :, :1], *rest], [do[:1, :, :group] for do in gradients]

    def crop_results(results: list[Tensor]) -> list[Tensor]:
        return [r[:1, :, : group if r.shape[2] == heads and (kv_heads < heads or n < 2) else 1] for n, r in enumerate(results)]

    q_bytes, k_bytes = (rows * tokens * h * head_dim * dtype.itemsize for h in (heads, kv_heads))
    products = 4 * rows * heads * head_dim * seen_pairs(tokens, window)
    notes = ("" if window is None else f" window {window}") + ("" if rotates else " no rotation")
    return Case(
        "rope_attention",
        f"B{rows} T{tokens} H{heads}/{kv_heads} D{head_dim} causal{notes}",
        dtype,
        make,
        call,
        plain,
        3,
        {FORWARD: 2 * q_bytes + 2 * k_bytes, BACKWARD: 4 * q_bytes + 4 * k_bytes},
        {FORWARD: products, BACKWARD: products * 5 // 2},
        crop if is_large else None,
        crop_results if is_large else None,
        facts={"window": window, "rotates": rotates},
    )


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Adjacent pairs of x (B, T, H, D) turned by the tables of positions 0 to T - 1, in x's dtype."""
    cos, sin = (t[: x.shape[1], None].to(x.dtype) for t in (cos, sin))
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def paged_append_cases(size: str, device: torch.device) -> Iterator[Case]:
    # (new tokens, kv heads, head_dim)
    shapes = {
        "gpu": [(128, 8, 128), (8192, 8, 128)],
        "cpu": [(8, 2, 64), (1024, 2, 64)],
        "tiny": [(5, 1, 16)],
        "parity": [(1, 3, 64), (77, 2, 128), (300, 1, 40)],
    }
    for tokens, kv_heads, head_dim in shapes[size]:
        for dtype in (FP32, BF16) if size == "parity" else (BF16 if size == "gpu" else FP32,):
            num_blocks = -(-2 * tokens // 16)

            def make(
                seed: int,
                tokens: int = tokens,
                kv_heads: int = kv_heads,
                head_dim: int = head_dim,
                dtype: torch.dtype = dtype,
                num_blocks: int = num_blocks,
            ) -> tuple[list[Any], list[Tensor]]:
                draw = Draw(device, seed)
                k, v = (draw.normal(tokens, kv_heads, head_dim, dtype=dtype) for _ in range(2))
                caches = [torch.zeros(num_blocks, 16, kv_heads, head_dim, dtype=dtype, device=device) for _ in range(2)]
                slots = torch.randperm(num_blocks * 16, generator=draw.generator, device=device)[:tokens]
                return [
                    k,
                    v,
                    *caches,
                    slots,
                    torch.arange(tokens, device=device),
                    *psann_kernels.rotary_tables(tokens, head_dim, device=device),
                ], []

            def call(backend: str) -> Function:
                def append(
                    k: Tensor,
                    v: Tensor,
                    k_cache: Tensor,
                    v_cache: Tensor,
                    slots: Tensor,
                    positions: Tensor,
                    cos: Tensor,
                    sin: Tensor,
                ) -> Any:
                    psann_kernels.paged_append(
                        k, v, k_cache, v_cache, slots, positions=positions, cos=cos, sin=sin, backend=backend
                    )
                    return k_cache, v_cache

                return append

            def plain(
                k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
            ) -> Any:
                caches = []
                for cache, x in ((k_cache, turn(k.unsqueeze(0), cos[positions], sin[positions])[0]), (v_cache, v)):
                    caches.append(cache.flatten(0, 1).index_copy(0, slots, x).view(cache.shape))
                return caches

            moved = 4 * tokens * kv_heads * head_dim * dtype.itemsize
            yield Case(
                "paged_append",
                f"{tokens} tokens Hkv{kv_heads} D{head_dim}",
                dtype,
                make,
                call,
                plain,
                0,
                {FORWARD: moved},
                compiles=False,
            )


def paged_attention_cases(size: str, device: torch.device) -> Iterator[Case]:
    # (sequences, length, new tokens, heads, kv heads, head_dim)
    grids = {
        "gpu": [(b, length, new, 64, 8, 128) for new in (1, 8) for b in (1, 8, 32, 128) for length in (2048, 8192, 32768, 131072)],
        "cpu": [(b, length, new, 8, 2, 64) for new in (1, 8) for b in (1, 8) for length in (512, 2048)],
        "tiny": [(2, 40, 1, 2, 1, 16)],
        "parity": [(3, 77, 1, 6, 2, 64), (2, 300, 8, 8, 1, 128), (1, 1000, 17, 2, 2, 40), (4, 64, 64, 4, 2, 64)],
    }
    for batch, length, new, heads, kv_heads, head_dim in grids[size]:
        for dtype in (FP32, BF16) if size == "parity" else (BF16 if size == "gpu" else FP32,):
            yield _paged_case(device, batch, length, new, heads, kv_heads, head_dim, dtype)


def _paged_case(
    device: torch.device, batch: int, length: int, new: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> Case:
    """Blocks of 16 in shuffled order."""
    blocks = -(-length // 16)
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=device) * new
    seq_lens = torch.full((batch,), length, dtype=torch.int32, device=device)
    tables = list(psann_kernels.rotary_tables(length, head_dim, device=device))

    def make(seed: int) -> tuple[list[Any], list[Tensor]]:
        draw = Draw(device, seed)
        q = draw.normal(batch * new, heads, head_dim, dtype=dtype)
        # Drawn in the cache's dtype: twice 64 GB of float32 would not fit beside it.
        caches = [
            torch.empty(batch * blocks, 16, kv_heads, head_dim, dtype=dtype, device=device).normal_(generator=draw.generator)
            for _ in range(2)
        ]
        table = torch.randperm(batch * blocks, generator=draw.generator, device=device).int().view(batch, blocks)
        return [q, *caches, table, seq_lens, offsets, *tables], []

    def call(backend: str) -> Function:
        return lambda *a: psann_kernels.paged_attention(*a[:6], cos=a[6], sin=a[7], backend=backend)

    def plain(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, seq_lens: Tensor, offsets: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        outputs = []
        position = torch.arange(length - new, length, device=device)
        for b in range(len(table)):
            rows = turn(q[b * new : (b + 1) * new].unsqueeze(0), cos[position], sin[position])[0]
            k, v = (c[table[b].long()].flatten(0, 1)[:length].repeat_interleave(heads // kv_heads, 1) for c in (k_cache, v_cache))
            scores = torch.einsum("nhd,shd->hns", rows, k) * head_dim**-0.5
            scores = scores.masked_fill(torch.arange(length, device=device) > position.unsqueeze(1), float("-inf"))
            outputs.append(torch.einsum("hns,shd->nhd", scores.softmax(-1), v))
        return torch.cat(outputs)

    def crop(arguments: list[Any], gradients: list[Tensor]) -> tuple[list[Any], list[Tensor]]:
        q, k_cache, v_cache, table, seq_lens, offsets, *rest = arguments
        kept = table[:2].long().flatten()
        renumbered = torch.arange(len(kept), dtype=torch.int32, device=device).view(-1, blocks)
        return [q[: 2 * new], k_cache[kept], v_cache[kept], renumbered, seq_lens[:2], offsets[:3], *rest], []

    cache_bytes = 2 * batch * length * kv_heads * head_dim * dtype.itemsize
    return Case(
        "paged_attention",
        f"B{batch} L{length} new {new} H{heads}/{kv_heads} D{head_dim} block 16",
        dtype,
        make,
        call,
        plain,
        0,
        {FORWARD: cache_bytes + 2 * batch * new * heads * head_dim * dtype.itemsize},
        {FORWARD: 4 * batch * new * heads * head_dim * length},
        crop,
        lambda results: [r[: 2 * new] for r in results],
        compiles=False,
        facts={"new": new, "length": length, "blocks": blocks},
    )


# -- products -----------------------------------------------------------------------------------------------------------------


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
        for dtype in (FP32, BF16) if size == "parity" else (BF16 if size == "gpu" else FP32,):

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
        "parity": [(130, 33, 65), (65, 128, 300)],
    }
    for tokens, width, hidden in shapes[size]:
        for dtype in (FP32, BF16) if size == "parity" else (BF16 if size == "gpu" else FP32,):

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
            )


BUILDERS: dict[str, Callable[[str, torch.device], Iterator[Case]]] = {
    "damped_sine": damped_sine_cases,
    "rms_norm": rms_norm_cases,
    "wave_conv": wave_conv_cases,
    "rope_attention": rope_attention_cases,
    "paged_append": paged_append_cases,
    "paged_attention": paged_attention_cases,
    "linear": linear_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
    "damped_sine_mlp": damped_sine_mlp_cases,
}
