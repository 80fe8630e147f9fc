"""The paged cache: keys, values and the wave branch's inputs in blocks that grow with what is used.

The scheduler deals in whole numbers and never sees a tensor of keys; a kernel never sees a sequence: they meet in a CacheView.
The wave branch's inputs lie in the same blocks as the keys, so that its state comes along wherever a block is shared or copied, and
a guess that proved wrong is overwritten like any other token.
"""

from __future__ import annotations

import math
from typing import Mapping, NamedTuple, Sequence

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


# A slot of block 0 beside the one that reads as zeros: rows that only pad a step write there, and nobody reads it.
SCRATCH_SLOT = 1


class Placement(NamedTuple):
    """Where the new tokens of a step go, on the host.

    table      (B, blocks of the longest) int32, which blocks each sequence owns
    begins     (B,) int64, each sequence's first new position
    ends       each sequence's tokens, the new ones included
    offsets    (B + 1,) int64: sequence b owns new tokens offsets[b] to offsets[b + 1]
    positions  (tokens,) int64
    slots      (tokens,) int64
    """

    table: np.ndarray
    begins: np.ndarray
    ends: list[int]
    offsets: np.ndarray
    positions: np.ndarray
    slots: np.ndarray


# On a CPU memory that nobody has written to is not there yet, so this much is asked for at once: a cache that grows is copied.
UNTOUCHED_BYTES = 256 << 20


class PagedCache:
    """Blocks 1 to num_blocks, of which those exist that were needed so far (on a CPU more: UNTOUCHED_BYTES); block 0 is no
    sequence's, and its slot 0 holds zeros.

    num_blocks, block_size   capacity: num_blocks * block_size tokens
    max_rows                 sequences that run at once
    """

    def __init__(self, module: torch.nn.Module, num_blocks: int, block_size: int, max_rows: int) -> None:
        config, like = module.config, module.embed.weight
        self.num_blocks, self.block_size, self.device = num_blocks, block_size, like.device
        self._dtype = like.dtype
        self._module = module
        self.state_lengths = module.wave_state_lengths()
        self.moves = 0  # how often the tensors were replaced by larger ones
        self._held = self._used = 0  # blocks that exist, and those below the highest that was needed
        kv_width = (config.n_kv_heads, config.head_dim)
        self._k = [self._new(*kv_width) for _ in range(config.n_layers)]
        self._v = [self._new(*kv_width) for _ in range(config.n_layers)]
        self._wave = [self._new(config.d_model if length else 0) for length in self.state_lengths]
        self._table = np.zeros((max_rows, 8), dtype=np.int32)
        self._no_slots = torch.zeros((max_rows, 0), dtype=torch.int64, device=like.device)

    @property
    def bytes_held(self) -> int:
        """Memory of the blocks that were needed so far; what a CPU has set aside beyond them is not backed by any."""
        return self._used * self._block_bytes()

    def _block_bytes(self) -> int:
        return sum(math.prod(t.shape[1:]) * t.element_size() for tensors in (self._k, self._v, self._wave) for t in tensors)

    def _new(self, *width: int) -> Tensor:
        return torch.empty((self._held, self.block_size, *width), dtype=self._dtype, device=self.device)

    def hold_all(self) -> None:
        """Make every block exist, so that none ever moves."""
        self._hold(self.num_blocks + 1)

    def _hold(self, blocks: int) -> None:
        """Make block ids below `blocks` exist. Doubling keeps copies cheap; layer after layer, so that one layer is held twice."""
        self._used = max(self._used, blocks)
        if blocks <= self._held:
            return
        self.moves += 1
        least = max(16, UNTOUCHED_BYTES // max(1, self._block_bytes())) if self.device.type == "cpu" else 16
        old, self._held = self._held, min(max(blocks, 2 * self._held, least), self.num_blocks + 1)
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

    def place(self, work: Sequence[Work]) -> Placement:
        """Where a step in which each work's sequence adds its tokens begin to end (exclusive) writes, and what it reads."""
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
        return Placement(table, starts, ends, offsets, positions, slots)

    def view(self, work: Sequence[Work]) -> CacheView:
        """The view for a step as `place` lays it out."""
        placed = self.place(work)
        past = {0: self._no_slots[: len(work)]}
        for length in set(self.state_lengths) - {0}:
            past[length] = self._tensor(self.past_slots(placed, length), np.int64)
        return self.view_over(
            block_table=self._tensor(placed.table, np.int32),
            seq_lens=self._tensor(placed.ends, np.int32),
            cu_seqlens=self._tensor(placed.offsets, np.int32),
            positions=self._tensor(placed.positions, np.int64),
            slot_mapping=self._tensor(placed.slots, np.int64),
            past=past,
            tokens=max(placed.ends),
        )

    def view_over(
        self, *, block_table: Tensor, seq_lens: Tensor, cu_seqlens: Tensor, positions: Tensor, slot_mapping: Tensor,
        past: Mapping[int, Tensor], tokens: int,
    ) -> CacheView:  # fmt: skip
        """The blocks that exist, under tensors of the caller's. tokens: the longest sequence that these may tell of.

        past  state length -> (B, length) int64, as past_slots gives them; those of length 0 may be missing
        """
        cos, sin = self._module.rotary_tables(tokens)
        return CacheView(
            k_cache=tuple(self._k),
            v_cache=tuple(self._v),
            wave_cache=tuple(self._wave),
            block_table=block_table,
            seq_lens=seq_lens,
            cu_seqlens=cu_seqlens,
            positions=positions,
            slot_mapping=slot_mapping,
            wave_slots=tuple(past[length] if length in past else self._no_slots[: len(seq_lens)] for length in self.state_lengths),
            cos=cos,
            sin=sin,
        )

    def _enter(self, row: int, first: int, blocks: list[int]) -> None:
        if len(blocks) > self._table.shape[1]:
            wider = np.zeros((len(self._table), 2 * len(blocks)), dtype=np.int32)
            wider[:, : self._table.shape[1]] = self._table
            self._table = wider
        self._table[row, first : len(blocks)] = blocks[first:]

    def past_slots(self, placed: Placement, length: int) -> np.ndarray:
        """(B, length) int64: where each sequence's last inputs before its new ones lie; slot 0, of zeros, before its begin."""
        positions = placed.begins[:, None] + np.arange(-length, 0)
        blocks = np.take_along_axis(placed.table, np.maximum(positions, 0) // self.block_size, 1).astype(np.int64)
        return np.where(positions >= 0, blocks * self.block_size + positions % self.block_size, 0)

    def _tensor(self, values: np.ndarray | list[int], dtype: type) -> Tensor:
        made = torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))
        return made if self.device.type == "cpu" else made.to(self.device)
