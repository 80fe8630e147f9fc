"""Token ids to training windows of one shape, each token a target exactly once per epoch.

Documents lie end to end in one stream with a separator, the eos id, at both ends and between them:

    eos  document 1  eos  document 2  eos ... document D  eos          sum of lengths + D + 1 tokens

Every separator is a document of its own for attention, one token long, and a text begins at its first token. So the first token of
a text is predicted from the separator alone, as it is when generating from an empty prompt, and the others from the text alone,
as they are when continuing a prompt, which has no separator before it.
"""

from __future__ import annotations

import functools
import logging
from typing import Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

LOGGER = logging.getLogger("psann_fast")
IGNORED = -100  # the target that cross-entropy skips


def pack(documents: Sequence[np.ndarray], eos_id: int, vocab_size: int) -> np.ndarray:
    """The stream of some documents, each (tokens,) of whole numbers: uint16 (tokens,) if the vocabulary allows, else int32.

    Raises ValueError if a document contains the separator or an id outside the vocabulary.
    """
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.int32
    stream = np.full(sum(map(len, documents)) + len(documents) + 1, eos_id, dtype)
    start = 1
    for index, ids in enumerate(documents):
        if len(ids) and (np.any(ids == eos_id) or ids.min() < 0 or ids.max() >= vocab_size):
            raise ValueError(
                f"pack: document {index} contains the separator {eos_id} or an id outside 0 to {vocab_size - 1}; "
                "pass the ids of its text alone"
            )
        stream[start : start + len(ids)] = ids
        start += len(ids) + 1
    return stream


class Examples(torch.utils.data.Dataset):
    """Windows of a stream, as tensors.

    stream       (tokens,) whole numbers; begins and ends with eos_id. A memory map will do: nothing is copied
    max_length   tokens of a window, T; a shorter stream (not packed: a shorter longest document) shrinks it, and the log says so
    eos_id       the separator; wherever it stands, a document ends
    pad_id       fills the rest of a window; each such token is a document of its own, and its target is IGNORED
    seed         of the order in which an epoch takes the examples
    shrink       False: windows have max_length tokens even where the stream has fewer (packed only)
    name         what the log calls the stream
    pack         True: windows lie end to end. False: every document, with the separator before it, has windows of its own

    Example i is a dict of
        input_ids        (T,) int64
        targets          (T,) int64, the token after each input, or IGNORED
        document_starts  (T,) bool, True where attention and positions start anew; always at 0

    Every token of the stream but the first is a target exactly once. Raises ValueError for a max_length below 1, a stream that
    does not begin and end with eos_id, and one without a text.
    """

    def __init__(
        self, stream: np.ndarray, max_length: int, *, eos_id: int, pad_id: int, pack: bool = True, seed: int = 1337,
        shrink: bool = True, name: str = "text",
    ) -> None:
        if max_length < 1:
            raise ValueError(f"Examples: max_length is {max_length}; a window has at least 1 token")
        if stream.ndim != 1 or stream.dtype.kind not in "iu":
            raise ValueError(f"Examples: stream has shape {stream.shape} and dtype {stream.dtype}; pass one row of whole numbers")
        if len(stream) < 3 or stream[0] != eos_id or stream[-1] != eos_id:
            raise ValueError(f"Examples: the stream has {len(stream)} tokens; it must hold a text between two separators {eos_id}")
        self.stream, self.eos_id, self.pad_id, self.is_packed = stream, eos_id, pad_id, pack
        self.seed = seed
        self.target_tokens = len(stream) - 1
        if pack:
            longest = self.target_tokens
        else:
            separators = np.flatnonzero(stream == eos_id)
            lengths = np.diff(separators)
            longest = int(lengths.max())
        self.window = min(max_length, longest) if shrink else max_length
        if self.window < max_length:
            LOGGER.warning(
                "the %s has %d tokens, fewer than a window of %d: its windows have %d tokens",
                name if pack else f"longest document of the {name}", longest, max_length, self.window,
            )  # fmt: skip
        if pack:
            self._length = -(-self.target_tokens // self.window)
        else:
            windows = -(-lengths // self.window)
            within = np.arange(windows.sum()) - np.repeat(np.cumsum(windows) - windows, windows)
            self._starts = np.repeat(separators[:-1], windows) + within * self.window
            self._ends = np.repeat(separators[1:], windows)
            self._length = len(self._starts)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return {name: rows[0] for name, rows in self.batch([index % len(self)]).items()}

    def batch(self, indices: Sequence[int] | np.ndarray, offset: int = 0) -> dict[str, Tensor]:
        """Some examples at once: the same dict, with shapes (B, T).

        offset   tokens by which the windows of this epoch are shifted, 0 to T - 1 (see `offset`); 0 unless packed

        A packed stream is a ring, because it ends with the separator that it begins with, so a shift only moves the cuts.
        """
        indices = np.asarray(indices, np.int64)
        if indices.ndim != 1 or (len(indices) and not 0 <= indices.min() <= indices.max() < len(self)):
            raise IndexError(f"batch: indices must be one row of whole numbers from 0 to {len(self) - 1}")
        if not 0 <= offset < (self.window if self.is_packed else 1):
            raise ValueError(f"batch: offset is {offset}; it must be from 0 to {self.window - 1 if self.is_packed else 0}")
        steps = np.arange(self.window)
        ring = self.target_tokens
        if self.is_packed:
            starts = indices * self.window
            counts = np.minimum(self.window, ring - starts)
            places = ((starts + offset) % ring)[:, None] + steps
            if self.window <= ring:
                places[places >= ring] -= ring
            else:
                places %= ring
        else:
            starts = self._starts[indices]
            counts = np.minimum(self.window, self._ends[indices] - starts)
            places = np.minimum(starts[:, None] + steps, ring - 1)
        is_real = steps < counts[:, None]
        inputs = self.stream[places].astype(np.int64)
        targets = self.stream[places + 1].astype(np.int64)
        is_separator = inputs == self.eos_id
        document_starts = is_separator | ~is_real
        document_starts[:, 1:] |= is_separator[:, :-1]
        document_starts[:, 0] = True
        inputs[~is_real] = self.pad_id
        targets[~is_real] = IGNORED
        return {
            "input_ids": torch.from_numpy(inputs),
            "targets": torch.from_numpy(targets),
            "document_starts": torch.from_numpy(document_starts),
        }

    def blank(self) -> dict[str, Tensor]:
        """A batch of one row without a target, for a process that has no example left where others have."""
        shape = (1, self.window)
        return {
            "input_ids": torch.full(shape, self.pad_id),
            "targets": torch.full(shape, IGNORED),
            "document_starts": torch.ones(shape, dtype=torch.bool),
        }

    def count_targets(self, indices: np.ndarray) -> int:
        """The targets of some examples, without reading them; the same at every offset."""
        left = self.target_tokens - indices * self.window if self.is_packed else self._ends[indices] - self._starts[indices]
        return int(np.minimum(left, self.window).sum())

    @functools.cached_property
    def fingerprint(self) -> str:
        """A checksum of all that decides what the examples are and in which order they come."""
        settings = (self.window, self.eos_id, self.pad_id, self.is_packed, self.seed, str(self.stream.dtype), len(self.stream))
        digest = xxhash.xxh3_128(repr(settings).encode())
        for start in range(0, len(self.stream), 1 << 24):
            digest.update(np.ascontiguousarray(self.stream[start : start + (1 << 24)]).data)
        return digest.hexdigest()

    def order(self, epoch: int) -> np.ndarray:
        """The order of the examples in an epoch: a permutation, (len,) int64, the same on every machine."""
        # Sorting raw draws: numpy may change how it shuffles, but not what its bit generators give.
        return np.argsort(_draws(self.seed, epoch, 0, count=len(self)), kind="stable")

    def offset(self, epoch: int) -> int:
        """Tokens by which `batch` shifts the windows of an epoch, so that epochs cut a text differently; 0 unless packed."""
        return int(_draws(self.seed, epoch, 1, count=1)[0]) % self.window if self.is_packed else 0


def _draws(*entropy: int, count: int) -> np.ndarray:
    return np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count)
