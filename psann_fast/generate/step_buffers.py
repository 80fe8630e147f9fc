"""The inputs and outputs of decode steps of up to so many sequences, in memory that stays where it is.

All inputs lie in one block of bytes, on the host (page-locked beside a GPU) and on the device, so that a step costs one copy that
nobody waits for. Rows beyond the sequences of a step are padding: they read nothing, and write where nobody reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Sequence

import numpy as np
import torch
from torch import Tensor

from .cache import SCRATCH_SLOT, PagedCache, Placement
from .sampling import SamplingBatch, columns_of, has_penalty, is_greedy

if TYPE_CHECKING:
    from .engine import Request

# As torch's allocator aligns: a kernel compiled for a whole tensor then fits each of the fields.
ALIGNMENT = 512
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "penalty", "seeds")


class StepBuffers:
    """A step in which each of up to `rows` sequences adds one token.

    rows        sequences, padding included
    width       blocks that a sequence may have
    vocab_size  ids that are drawn
    nobody      the row of SeenTokens that padding marks

    ids, positions, slots, seq_lens, table and past[state length] are those of a CacheView and Decoder.hidden, `seen_rows` those of
    SeenTokens, on the device; drawn (rows,) int64 and logits (rows, vocab_size) are what a step writes.
    """

    def __init__(self, cache: PagedCache, rows: int, width: int, vocab_size: int, nobody: int, dtype: torch.dtype) -> None:
        self.rows, self.width, self.vocab_size, self._cache = rows, width, vocab_size, cache
        device = cache.device
        self._lengths = sorted(set(cache.state_lengths) - {0})
        whole, real = (torch.int64, np.int64), (torch.float64, np.float64)
        # name -> dtypes, columns (0: none of its own), and what padding holds.
        fields = {name: (whole, 0, 0) for name in ("ids", "positions", "seeds")}
        fields |= {"slots": (whole, 0, SCRATCH_SLOT), "seen_rows": (whole, 0, nobody), "top_k": (whole, 1, 1)}
        fields |= {name: (real, 1, value) for name, value in (("temperature", 0), ("top_p", 1), ("min_p", 0), ("penalty", 1))}
        fields |= {"seq_lens": ((torch.int32, np.int32), 0, 0), "table": ((torch.int32, np.int32), width, 0)}
        fields |= {f"past{length}": (whole, length, 0) for length in self._lengths}
        sizes = {name: rows * max(columns, 1) * np.dtype(kind).itemsize for name, ((_, kind), columns, _) in fields.items()}
        starts = dict(zip(sizes, np.cumsum([0] + [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values()]).tolist()))
        total = max(starts[name] + size for name, size in sizes.items())
        self._host = torch.zeros(total, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(total, dtype=torch.uint8, device=device)
        host = self._host.numpy()
        self._values: dict[str, np.ndarray] = {}
        on_device: dict[str, Tensor] = {}
        for name, ((dtype_of, kind), columns, _) in fields.items():
            part, shape = slice(starts[name], starts[name] + sizes[name]), (rows, columns) if columns else (rows,)
            self._values[name] = host[part].view(kind).reshape(shape)
            on_device[name] = self._device[part].view(dtype_of).view(shape)
        self._padding = {name: value for name, (_, _, value) in fields.items()}
        self.ids, self.positions, self.slots = (on_device[name] for name in ("ids", "positions", "slots"))
        self.seq_lens, self.table, self.seen_rows = (on_device[name] for name in ("seq_lens", "table", "seen_rows"))
        self.past = {length: on_device[f"past{length}"] for length in self._lengths}
        self.cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._columns = {name: on_device[name] for name in SAMPLING}
        self.drawn = torch.zeros(rows, dtype=torch.int64, device=device)
        self.logits = torch.zeros(rows, vocab_size, dtype=dtype, device=device)
        self._requests: list[Request] = []
        self._used = rows
        self.kind = True, False  # of the requests that `fill` was given: whether all are greedy, whether one has a penalty
        self.clear()

    def clear(self) -> None:
        """Padding alone. Sent by the caller."""
        self._pad(0)
        self._requests = []

    def fill(self, placed: Placement, requests: Sequence[Request]) -> None:
        """What a step of these requests, a token each, reads. Sent by the caller, after whoever reads the last step has done so."""
        count, values = len(requests), self._values
        self._pad(count)
        values["ids"][:count] = [request.tokens[-1] for request in requests]
        values["positions"][:count] = placed.positions
        values["slots"][:count] = placed.slots
        values["seq_lens"][:count] = placed.ends
        values["table"][:count, : placed.table.shape[1]] = placed.table
        for length in self._lengths:
            values[f"past{length}"][:count] = self._cache.past_slots(placed, length)
        values["seen_rows"][:count] = [request.sequence.row for request in requests]
        if requests != self._requests:
            self._requests = list(requests)
            params = [request.params for request in requests]
            self.kind = is_greedy(params), has_penalty(params)
            for name, column in columns_of(params, self.vocab_size).items():
                values[name][:count] = np.array(column).reshape(values[name][:count].shape)

    def _pad(self, count: int) -> None:
        if count >= self._used:
            self._used = count
            return
        for name, value in self._padding.items():
            self._values[name][count : self._used] = value
        self._used = count

    def send(self) -> None:
        """Bring the inputs to the device, without waiting for it."""
        self._device.copy_(self._host, non_blocking=True)

    def batch(self, is_greedy: bool, has_penalty: bool) -> SamplingBatch:
        """The requests' parameters. Of the filters only the costly ones are left out where nobody asks for them."""
        return SamplingBatch(**self._columns, is_greedy=is_greedy, has_penalty=has_penalty, has_top_p=True, has_min_p=True)
