"""Paged caches for tests: sequences scattered over shuffled blocks, poison wherever no token is, and attention computed densely."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

OUTSIDE = 10**6  # a block id that no pool has


@dataclass
class Case:
    """A call of paged_attention, and beside it the keys and values of each sequence, (length, Hkv, D), in order."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    options: dict[str, Any]
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return self.q, self.k_cache, self.v_cache, self.block_table, self.seq_lens, self.cu_seqlens_q


def offsets(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def rotary_tables(positions: int, head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * 10000 ** (-torch.arange(0, head_dim, 2) / head_dim).double()
    return angle.cos().to(dtype), angle.sin().to(dtype)


def make_case(
    lengths: list[int], new: list[int], *, block_size: int, group: int = 3, num_kv_heads: int = 2, head_dim: int = 24,
    dtype: torch.dtype = torch.float32, junk: float = float("nan"), spare_columns: int = 1, seed: int = 0, numbering: int = 0,
    options: tuple[str, ...] = (), window: int = 7,
) -> Case:  # fmt: skip
    """Random values, the same for one seed whatever the blocks' numbering.

    junk        fills every slot without a token; what is too large for dtype becomes infinite
    numbering   seed of the permutation that deals out the blocks
    options     of "pairs" or "halves", "window", "alibi", "scale", "float8" (the caches,
                and what their bits say as keys and values)
    """
    g = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731 (five uses)
    num_heads, table_dtype = group * num_kv_heads, torch.promote_types(dtype, torch.float32)
    q = random(sum(new), num_heads, head_dim)
    keys = [random(length, num_kv_heads, head_dim) for length in lengths]
    values = [random(length, num_kv_heads, head_dim) for length in lengths]
    chosen: dict[str, Any] = {}
    cached, cache_dtype = (keys, values), dtype
    if "float8" in options:
        cache_dtype = torch.float8_e4m3fn
        scales = [torch.rand(num_kv_heads, generator=g) / 50 + 0.005 for _ in range(2)]
        chosen |= dict(zip(("k_scale", "v_scale"), scales))
        cached = tuple(
            [(x.float() / s[:, None]).clamp(-448, 448).to(cache_dtype) for x in tensors] for tensors, s in zip(cached, scales)
        )
        keys, values = ([x.double() * s.double()[:, None] for x in tensors] for tensors, s in zip(cached, scales))

    needed = [-(-length // block_size) for length in lengths]
    num_blocks = sum(needed) + 3
    # Nobody owns block 0: it is where a kernel that masks a table entry and then reads on would look.
    shuffled = 1 + torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(numbering)).int()
    k_cache = torch.full((num_blocks, block_size, num_kv_heads, head_dim), junk, dtype=torch.float64).to(cache_dtype)
    v_cache = k_cache.clone()
    block_table = torch.full((len(lengths), max(needed, default=0) + spare_columns), OUTSIDE, dtype=torch.int32)
    dealt = 0
    for b, length in enumerate(lengths):
        blocks = shuffled[dealt : dealt + needed[b]]
        dealt += needed[b]
        block_table[b, : needed[b]] = blocks
        token = torch.arange(length)
        k_cache[blocks[token // block_size].long(), token % block_size] = cached[0][b]
        v_cache[blocks[token // block_size].long(), token % block_size] = cached[1][b]

    if "pairs" in options or "halves" in options:
        chosen["cos"], chosen["sin"] = rotary_tables(max([*lengths, 1]), head_dim, table_dtype)
        chosen["interleaved"] = "pairs" in options
    if "window" in options:
        chosen["window"] = window
    if "alibi" in options:
        chosen["alibi_slopes"] = torch.rand(num_heads, generator=g).to(table_dtype)
    if "scale" in options:
        chosen["softmax_scale"] = 0.3
    return Case(q, k_cache, v_cache, block_table, torch.tensor(lengths).int(), offsets(new), chosen, keys, values)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (T, H, D) turned by cos and sin (T, D / 2), every intermediate in x's dtype."""
    half = x.shape[-1] // 2
    first = torch.arange(half) * 2 if interleaved else torch.arange(half)
    second = first + 1 if interleaved else first + half
    a, b, cos, sin = x[..., first], x[..., second], cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    y = torch.empty_like(x)
    y[..., first], y[..., second] = a * cos - b * sin, b * cos + a * sin
    return y


def dense(case: Case, dtype: torch.dtype) -> Tensor:
    """What the call should give, from each sequence's own keys and values, with every intermediate in `dtype`."""
    options = case.options
    o = torch.zeros(case.q.shape, dtype=dtype)
    for b, (k, v) in enumerate(zip(case.keys, case.values)):
        start, stop = case.cu_seqlens_q[b : b + 2].tolist()
        if start == stop or len(k) == 0:
            continue
        position = torch.arange(len(k) - (stop - start), len(k))
        q, k, v = case.q[start:stop].to(dtype), k.to(dtype), v.to(dtype)
        if "cos" in options:
            q = rotated(q, options["cos"][position], options["sin"][position], options["interleaved"])
        scale = options.get("softmax_scale", q.shape[-1] ** -0.5)
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("nhd,shd->hns", q, k.repeat_interleave(group, 1)) * scale
        distance = position[:, None] - torch.arange(len(k))
        if "alibi_slopes" in options:
            scores = scores - options["alibi_slopes"].to(dtype)[:, None, None] * distance.to(dtype)
        unseen = (distance < 0) | (distance >= options.get("window", len(k)))
        p = torch.softmax(scores.masked_fill(unseen, float("-inf")), -1)
        o[start:stop] = torch.einsum("hns,shd->nhd", p, v.repeat_interleave(group, 1))
    return o
