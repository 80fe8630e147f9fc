"""The paged cache: blocks of keys and values, and the wave branch's state, for several sequences.

The allocator deals in whole numbers and never sees a tensor of keys; a kernel never sees a sequence: they meet in a CacheView.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch

from ..models import CacheView


class BlockPool:
    """Block ids that are free; a plain stack."""

    def __init__(self, num_blocks: int) -> None:
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` block ids. The caller has looked at `free`."""
        assert count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: Sequence[int]) -> None:
        self._free.extend(reversed(blocks))


class PagedCache:
    """Keys, values and wave state of up to `max_rows` sequences.

    num_blocks, block_size   capacity: num_blocks * block_size tokens
    max_blocks               blocks of the longest sequence
    """

    def __init__(self, module: torch.nn.Module, num_blocks: int, block_size: int, max_blocks: int, max_rows: int) -> None:
        config, like = module.config, module.embed.weight
        self.block_size, self.device = block_size, like.device
        shape = (num_blocks, block_size, config.n_kv_heads, config.head_dim)
        new = lambda *size: torch.empty(size, dtype=like.dtype, device=like.device)  # noqa: E731 (three uses)
        self._k = tuple(new(*shape) for _ in range(config.n_layers))
        self._v = tuple(new(*shape) for _ in range(config.n_layers))
        self._wave = tuple(new(max_rows, length, config.d_model) for length in module.wave_state_lengths())
        self._table = np.zeros((max_rows, max_blocks), dtype=np.int32)
        self._rotary = module.rotary_tables(max_blocks * block_size)
        self.pool = BlockPool(num_blocks)

    def begin(self, row: int, blocks: Sequence[int]) -> None:
        """A sequence moves into `row`, owning `blocks` in this order."""
        self._table[row] = 0
        self._table[row, : len(blocks)] = blocks
        for state in self._wave:
            state[row] = 0

    def view(self, rows: Sequence[int], begins: Sequence[int], ends: Sequence[int]) -> CacheView:
        """The view for a step in which the sequence of rows[i] adds its tokens begins[i] to ends[i] (exclusive)."""
        counts = np.subtract(ends, begins)
        table = self._table[rows]
        offsets = np.concatenate(([0], np.cumsum(counts)))
        owner = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - begins, counts)
        slots = table[owner, positions // self.block_size].astype(np.int64) * self.block_size + positions % self.block_size
        tensor = lambda array, dtype: torch.from_numpy(np.ascontiguousarray(array, dtype=dtype)).to(self.device)  # noqa: E731
        cos, sin = self._rotary
        return CacheView(
            k_cache=self._k,
            v_cache=self._v,
            wave_cache=self._wave,
            block_table=tensor(table, np.int32),
            seq_lens=tensor(ends, np.int32),
            cu_seqlens=tensor(offsets, np.int32),
            positions=tensor(positions, np.int64),
            slot_mapping=tensor(slots, np.int64),
            wave_slots=tensor(rows, np.int64),
            cos=cos,
            sin=sin,
        )
