"""The paged cache: keys, values and the wave branch's inputs in blocks that grow with what is used.

The scheduler deals in whole numbers and never sees a tensor of keys; a kernel never sees a sequence: they meet in a CacheView.
The wave branch's inputs lie in the same blocks as the keys, so that its state comes along wherever a block is shared or copied, and
a guess that proved wrong is overwritten like any other token.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch
from torch import Tensor

from ..models import CacheView
from .scheduler import Work


def bytes_per_token(module: torch.nn.Module) -> int:
    """Bytes of cache that one token takes, over all layers."""
    config = module.config
    wave = sum(config.d_model for length in module.wave_state_lengths() if length)
    return (2 * config.n_layers * config.n_kv_heads * config.head_dim + wave) * module.embed.weight.element_size()


class PagedCache:
    """Blocks 1 to num_blocks, of which as many exist as were needed so far; block 0 belongs to no sequence and holds zeros.

    num_blocks, block_size   capacity: num_blocks * block_size tokens
    max_rows                 sequences that run at once
    """

    def __init__(self, module: torch.nn.Module, num_blocks: int, block_size: int, max_rows: int) -> None:
        config, like = module.config, module.embed.weight
        self.num_blocks, self.block_size, self.device = num_blocks, block_size, like.device
        self._dtype = like.dtype
        self._module = module
        self._state_lengths = module.wave_state_lengths()
        self._held = 0
        kv_width = (config.n_kv_heads, config.head_dim)
        self._k = [self._new(*kv_width) for _ in range(config.n_layers)]
        self._v = [self._new(*kv_width) for _ in range(config.n_layers)]
        self._wave = [self._new(config.d_model if length else 0) for length in self._state_lengths]
        self._table = np.zeros((max_rows, 8), dtype=np.int32)
        self._no_slots = torch.zeros((max_rows, 0), dtype=torch.int64, device=like.device)

    @property
    def bytes_held(self) -> int:
        """Memory of the blocks that exist."""
        return sum(t.numel() * t.element_size() for tensors in (self._k, self._v, self._wave) for t in tensors)

    def _new(self, *width: int) -> Tensor:
        return torch.empty((self._held, self.block_size, *width), dtype=self._dtype, device=self.device)

    def _hold(self, blocks: int) -> None:
        """Make block ids below `blocks` exist. Doubling keeps copies cheap; layer after layer, so that one layer is held twice."""
        if blocks <= self._held:
            return
        old, self._held = self._held, min(max(blocks, 2 * self._held, 16), self.num_blocks + 1)
        for tensors in (self._k, self._v, self._wave):
            for layer, held in enumerate(tensors):
                tensors[layer] = self._new(*held.shape[2:])
                tensors[layer][:old] = held
        if old == 0:
            for tensor in self._wave:
                tensor[0] = 0

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, (from, to), one after another."""
        if copies:
            self._hold(1 + max(target for _, target in copies))
        for source, target in copies:
            for tensors in (self._k, self._v, self._wave):
                for tensor in tensors:
                    tensor[target] = tensor[source]

    def view(self, work: Sequence[Work]) -> CacheView:
        """The view for a step in which each work's sequence adds its tokens begin to end (exclusive)."""
        size = self.block_size
        rows, begins, ends, widest = [], [], [], 1
        for w in work:
            s = w.sequence
            if s.in_table < len(s.blocks):
                self._hold(1 + max(s.blocks[s.in_table :]))
                self._enter(s.row, s.in_table, s.blocks)
                s.in_table = len(s.blocks)
            rows.append(s.row)
            begins.append(w.begin)
            ends.append(w.end)
            widest = max(widest, len(s.blocks))
        table, starts = self._table[rows, :widest], np.array(begins)
        if sum(ends) - sum(begins) == len(work):  # a token each: the step that is taken most
            offsets, positions = np.arange(len(work) + 1), starts
            owner = offsets[:-1]
        else:
            counts = np.subtract(ends, begins)
            offsets = np.concatenate(([0], np.cumsum(counts)))
            owner = np.repeat(np.arange(len(work)), counts)
            positions = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts)
        slots = table[owner, positions // size].astype(np.int64) * size + positions % size
        cos, sin = self._module.rotary_tables(max(ends))
        return CacheView(
            k_cache=tuple(self._k),
            v_cache=tuple(self._v),
            wave_cache=tuple(self._wave),
            block_table=self._tensor(table, np.int32),
            seq_lens=self._tensor(ends, np.int32),
            cu_seqlens=self._tensor(offsets, np.int32),
            positions=self._tensor(positions, np.int64),
            slot_mapping=self._tensor(slots, np.int64),
            wave_slots=self._wave_slots(table, starts),
            cos=cos,
            sin=sin,
        )

    def _enter(self, row: int, first: int, blocks: list[int]) -> None:
        if len(blocks) > self._table.shape[1]:
            wider = np.zeros((len(self._table), 2 * len(blocks)), dtype=np.int32)
            wider[:, : self._table.shape[1]] = self._table
            self._table = wider
        self._table[row, first : len(blocks)] = blocks[first:]

    def _wave_slots(self, table: np.ndarray, begins: np.ndarray) -> tuple[Tensor, ...]:
        """For each layer (B, state length): where its past inputs lie; slot 0, which holds zeros, before a sequence's begin."""
        made = {0: self._no_slots[: len(begins)]}
        for length in set(self._state_lengths) - {0}:
            positions = begins[:, None] + np.arange(-length, 0)
            blocks = np.take_along_axis(table, np.maximum(positions, 0) // self.block_size, 1).astype(np.int64)
            slots = np.where(positions >= 0, blocks * self.block_size + positions % self.block_size, 0)
            made[length] = self._tensor(slots, np.int64)
        return tuple(made[length] for length in self._state_lengths)

    def _tensor(self, values: np.ndarray | list[int], dtype: type) -> Tensor:
        made = torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))
        return made if self.device.type == "cpu" else made.to(self.device)
