"""The blocks of a key/value cache, and which sequence owns which: the bookkeeping around paged_append and paged_attention."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .paged_attention import FLOAT8


class PagedStep(NamedTuple):
    """The new tokens of some sequences, laid end to end, and where their keys go. PagedKVCache.extend makes it.

    k_cache, v_cache  (num_layers, num_blocks, block_size, Hkv, D)
    block_table       (B, max_blocks) int32, padded with block 0
    seq_lens          (B,) int32, tokens of each sequence, the new ones included
    cu_seqlens        (B + 1,) int32, sequence b owns new tokens cu_seqlens[b] to cu_seqlens[b + 1]
    positions         (T,) int64, position of each new token in its sequence
    slot_mapping      (T,) int64, block * block_size + offset of each new token
    k_scale, v_scale  (num_layers, Hkv) float32 with caches of torch.float8_e4m3fn, otherwise None
    """

    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens: Tensor
    positions: Tensor
    slot_mapping: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def scales(self, layer: int) -> dict[str, Tensor | None]:
        """The options k_scale and v_scale of paged_append and paged_attention in this layer."""
        pairs = (("k_scale", self.k_scale), ("v_scale", self.v_scale))
        return {name: None if scale is None else scale[layer] for name, scale in pairs}


class PagedKVCache:
    """Keys and values of any number of sequences, in blocks that are taken as a sequence grows.

    num_blocks, block_size   capacity: num_blocks * block_size tokens, over all sequences
    num_kv_heads, head_dim   Hkv and D
    num_layers               attention layers that share the block tables, each with keys and values of its own
    dtype, device            of keys and values; torch.float8_e4m3fn takes half the memory of half precision
    k_scale, v_scale         of a float8 cache: what 1 in it is worth, a number or float32 that broadcasts to (num_layers, Hkv),
                             above 0; default 1, at which magnitudes up to 448 fit, and keep four digits (binary) down to 1/64

    Every layer of a model takes the same step: `step = cache.extend(["a", "b"], [5, 3])`, then `attention(x, step=step, layer=i)`.
    A sequence begins when it is first named and ends with `free`. Nothing is ever moved or evicted.
    Source: PagedAttention, Kwon et al. 2023, arXiv:2309.06180.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_layers: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        k_scale: Tensor | float | None = None,
        v_scale: Tensor | float | None = None,
    ) -> None:
        sizes = dict(
            num_blocks=num_blocks, block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim, num_layers=num_layers
        )
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"PagedKVCache: {name} is {size!r}; it must be a whole number of at least 1")
        shape = (num_layers, num_blocks, block_size, num_kv_heads, head_dim)
        self.k_cache = torch.empty(shape, dtype=dtype, device=device)
        self.v_cache = torch.empty(shape, dtype=dtype, device=device)
        self.k_scale, self.v_scale = (
            self._whole_scale(name, scale) for name, scale in (("k_scale", k_scale), ("v_scale", v_scale))
        )
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._blocks: dict[Hashable, list[int]] = {}
        self._lengths: dict[Hashable, int] = {}

    def _whole_scale(self, name: str, scale: Tensor | float | None) -> Tensor | None:
        """`scale` for each layer and head, (num_layers, Hkv) float32."""
        cache = self.k_cache
        if cache.dtype != FLOAT8:
            if scale is not None:
                raise ValueError(f"PagedKVCache: {name} is given and dtype is {cache.dtype}; only a cache of {FLOAT8} has scales")
            return None
        shape = (cache.shape[0], cache.shape[3])
        given = torch.as_tensor(1.0 if scale is None else scale, dtype=torch.float32, device=cache.device)
        if given.dim() > 2 or any(have not in (1, want) for have, want in zip(given.shape[::-1], shape[::-1])):
            raise ValueError(
                f"PagedKVCache: {name} has shape {tuple(given.shape)}; it must broadcast to (num_layers, Hkv), {shape}"
            )
        if not bool(((given > 0) & given.isfinite()).all()):
            raise ValueError(f"PagedKVCache: {name} is {given.tolist()}; a scale is finite and above 0")
        return given.expand(shape).contiguous()

    @property
    def free_tokens(self) -> int:
        """Tokens that fit into the blocks which no sequence owns."""
        return len(self._free) * self.block_size

    def length(self, sequence: Hashable) -> int:
        """Tokens that the cache holds of a sequence; 0 for one that has not begun."""
        return self._lengths.get(sequence, 0)

    def extend(self, sequences: Sequence[Hashable], new_tokens: Sequence[int]) -> PagedStep:
        """Make room for new tokens, new_tokens[i] of sequences[i], and say where they go.

        The keys and values of a step must be written, by every layer, before the next step. Raises ValueError for a sequence that
        is named twice, counts below 1, or too few free blocks; then nothing has changed.
        """
        sequences, new_tokens = list(sequences), list(new_tokens)
        if len(sequences) != len(new_tokens) or len(set(sequences)) != len(sequences):
            raise ValueError(
                f"PagedKVCache.extend: {sequences} beside {new_tokens}; pass distinct sequences and one count for each"
            )
        if min(new_tokens, default=0) < 1:
            raise ValueError(
                f"PagedKVCache.extend: new_tokens is {new_tokens}; every sequence that is named needs at least 1 new token"
            )
        ends = [self.length(sequence) + new for sequence, new in zip(sequences, new_tokens)]
        wanted = [-(-end // self.block_size) - len(self._blocks.get(sequence, ())) for sequence, end in zip(sequences, ends)]
        if sum(wanted) > len(self._free):
            raise ValueError(
                f"PagedKVCache.extend: {sum(new_tokens)} new tokens need {sum(wanted)} more blocks, and {len(self._free)} of "
                f"{self.block_size} tokens are free; free a sequence, or make the cache with more blocks"
            )
        starts, tables = [end - new for end, new in zip(ends, new_tokens)], []
        for sequence, end, count in zip(sequences, ends, wanted):
            blocks = self._blocks.setdefault(sequence, [])
            blocks.extend(self._free.pop() for _ in range(count))
            self._lengths[sequence] = end
            tables.append(blocks)
        widest = max(map(len, tables))
        size = self.block_size
        positions = [p for start, end in zip(starts, ends) for p in range(start, end)]
        slots = [blocks[p // size] * size + p % size for blocks, start, end in zip(tables, starts, ends) for p in range(start, end)]
        offsets = [0]
        for new in new_tokens:
            offsets.append(offsets[-1] + new)
        device = self.k_cache.device
        return PagedStep(
            self.k_cache,
            self.v_cache,
            torch.tensor([blocks + [0] * (widest - len(blocks)) for blocks in tables], dtype=torch.int32, device=device),
            torch.tensor(ends, dtype=torch.int32, device=device),
            torch.tensor(offsets, dtype=torch.int32, device=device),
            torch.tensor(positions, dtype=torch.int64, device=device),
            torch.tensor(slots, dtype=torch.int64, device=device),
            self.k_scale,
            self.v_scale,
        )

    def free(self, sequence: Hashable) -> None:
        """End a sequence; its blocks serve others. Raises ValueError if it has not begun."""
        if sequence not in self._blocks:
            raise ValueError(f"PagedKVCache.free: there is no sequence {sequence!r}; the cache holds {list(self._blocks)}")
        self._free.extend(reversed(self._blocks.pop(sequence)))
        del self._lengths[sequence]
