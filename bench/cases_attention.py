"""The ops of attention: rope_attention, paged_append, paged_attention."""

from __future__ import annotations

from typing import Any, Iterator

import psann_kernels
import torch
from torch import Tensor

from .case import BACKWARD, BF16, FORWARD, FP32, Case, Draw, Function


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
    def make(seed: int) -> tuple[list[Any], list[Tensor]]:
        draw = Draw(device, seed)
        q, k, v, do = (draw.normal(rows, tokens, h, head_dim, dtype=dtype) for h in (heads, kv_heads, kv_heads, heads))
        tables = psann_kernels.rotary_tables(tokens, head_dim, device=device) if rotates else (None, None)
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

    def make(seed: int) -> tuple[list[Any], list[Tensor]]:
        draw = Draw(device, seed)
        q = draw.normal(batch * new, heads, head_dim, dtype=dtype)
        # Drawn in the cache's dtype: twice 64 GB of float32 would not fit beside it.
        caches = [
            torch.empty(batch * blocks, 16, kv_heads, head_dim, dtype=dtype, device=device).normal_(generator=draw.generator)
            for _ in range(2)
        ]
        table = torch.randperm(batch * blocks, generator=draw.generator, device=device).int().view(batch, blocks)
        tables = psann_kernels.rotary_tables(length, head_dim, device=device)
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
