"""Token shards on disk: written by `psann-fast tokenize`, memory-mapped for training.

    folder/index.json            format, tokenizer files, and for each part its shards with tokens, bytes; checksums of all of them
                                 and of the index itself; written last
    folder/train-00000.bin       ids of documents end to end with separators, as `pack` lays them: uint16, or int32 for a vocabulary
    folder/validation-00000.bin  above 65536, little-endian

A document never crosses a shard. Windows are cut from each shard by itself, so the examples do not depend on who reads them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Iterator, Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..sealed import is_sealed, sealed
from .packing import Examples
from .tokenizer import Tokenizer, read_tokenizer_file, tokenizer_from_files

INDEX = "index.json"
FORMAT, FORMAT_VERSION = "psann-fast tokens", 2
LARGEST_INDEX = 1 << 24  # bytes; a shard takes 130


def token_dtype(vocab_size: int) -> np.dtype:
    """How ids are stored."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")


class ShardWriter:
    """Writes the shards of one part.

    append  ids end to end, a separator after each document
    close   finishes; returns the index entries of the shards: file, tokens, size, xxh3_128
    """

    def __init__(self, folder: Path, part: str, eos_id: int, dtype: np.dtype, shard_tokens: int) -> None:
        self.folder, self.part, self.eos_id, self.dtype, self.shard_tokens = folder, part, eos_id, dtype, shard_tokens
        self.entries: list[dict[str, Any]] = []
        self.tokens = 0
        self._file: Any = None

    def append(self, ids: np.ndarray) -> None:
        while len(ids):
            if self._file is None:
                self._open()
            # A shard ends with the document that reaches its size, wherever the ids happen to be handed over.
            ends = np.flatnonzero(ids == self.eos_id) + 1
            ends = ends[self._held + ends >= self.shard_tokens]
            place = int(ends[0]) if len(ends) else len(ids)
            self._write(ids[:place])
            if len(ends):
                self._finish()
            ids = ids[place:]

    def close(self) -> list[dict[str, Any]]:
        if self._file is not None:
            self._finish()
        return self.entries

    def _open(self) -> None:
        self._file = open(self.folder / f"{self.part}-{len(self.entries):05d}.bin", "wb")
        self._digest, self._held = xxhash.xxh3_128(), 0
        self._write(np.array([self.eos_id]))

    def _write(self, ids: np.ndarray) -> None:
        content = np.ascontiguousarray(ids, self.dtype)
        self._file.write(content.data)
        self._digest.update(content.data)
        self._held += len(ids)

    def _finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        name = Path(self._file.name).name
        size = self._held * self.dtype.itemsize
        self.entries.append({"file": name, "tokens": self._held, "size": size, "xxh3_128": self._digest.hexdigest()})
        self.tokens += self._held - 1
        self._file = None


def write_index(folder: Path, tokenizer: Tokenizer, parts: dict[str, dict[str, Any]]) -> None:
    """Write the tokenizer's files and, as the last one, the index."""
    tokenizer.save(folder)
    sums = {name: xxhash.xxh3_128_hexdigest(content) for name, content in tokenizer.to_files().items()}
    index = {
        "format": FORMAT, "version": FORMAT_VERSION, "dtype": token_dtype(tokenizer.vocab_size).str, "tokenizer": sums,
        "parts": parts,
    }  # fmt: skip
    waiting = folder / f"{INDEX}.new"
    waiting.write_bytes(sealed(index))
    os.replace(waiting, folder / INDEX)


def is_shards(path: str | Path) -> bool:
    return (Path(path) / INDEX).is_file()


class Shards:
    """What `psann-fast tokenize` wrote, opened.

    tokenizer  the one that the ids are of
    parts      "train" and perhaps "validation": {"shards": [...], "documents": n, "bytes": n}

    Raises ValueError for a folder that is not ours, and for a shard whose size or (unless verify is False)
    checksum is not the index's.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True) -> None:
        self.folder = Path(folder)
        try:
            index = _read_index(self.folder / INDEX)
            self.parts = index["parts"]
            files = {_plain(name): read_tokenizer_file(self.folder / name) for name in index["tokenizer"]}
            for name, content in files.items():
                if xxhash.xxh3_128_hexdigest(content) != index["tokenizer"][name]:
                    raise ValueError(f"{name} does not match its checksum")
            self.tokenizer = tokenizer_from_files(files)
            self.dtype = token_dtype(self.tokenizer.vocab_size)
            if index["dtype"] != self.dtype.str:
                raise ValueError(f"dtype is {index['dtype']!r}, and should be {self.dtype.str!r}")
            if "train" not in self.parts or not all(part["shards"] for part in self.parts.values()):
                raise ValueError(f"{INDEX} names no shard to train on, or a part without any")
            for part in self.parts.values():
                for entry in part["shards"]:
                    self._check(entry, verify)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError, FileNotFoundError) as error:
            raise ValueError(f"{self.folder} does not hold usable token shards ({error}); run psann-fast tokenize again") from error

    def _check(self, entry: dict[str, Any], verify: bool) -> None:
        path = self.folder / _plain(entry["file"])
        size = path.stat().st_size if path.is_file() else -1
        if size != entry["size"] or size != entry["tokens"] * self.dtype.itemsize:
            raise ValueError(f"{path.name} has {max(size, 0)} bytes and should have {entry['size']}")
        if verify:
            digest, highest = xxhash.xxh3_128(), 0
            with open(path, "rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
                    highest = max(highest, int(np.frombuffer(chunk, self.dtype).max()))
            if digest.hexdigest() != entry["xxh3_128"]:
                raise ValueError(f"{path.name} does not match its checksum")
            if highest >= self.tokenizer.vocab_size:
                raise ValueError(f"{path.name} has the id {highest}, and the tokenizer's are 0 to {self.tokenizer.vocab_size - 1}")

    def examples(self, part: str, window: int, seed: int) -> ShardedExamples:
        entries = self.parts[part]["shards"]
        streams = [np.memmap(self.folder / entry["file"], self.dtype, mode="r") for entry in entries]
        sums = [entry["xxh3_128"] for entry in entries]
        return ShardedExamples(streams, sums, window, eos_id=self.tokenizer.eos_id, pad_id=self.tokenizer.pad_id, seed=seed)


def _read_index(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.stat().st_size > LARGEST_INDEX:
        raise ValueError(f"{path.name} is missing, or has more than {LARGEST_INDEX:,} bytes")
    content = path.read_bytes()
    index = json.loads(content)
    if index["format"] != FORMAT or index["version"] != FORMAT_VERSION:
        raise ValueError(f"format {index['format']!r} version {index['version']!r}")
    if not is_sealed(index, content):
        raise ValueError(f"{path.name} does not match its checksum")
    return index


def _plain(name: Any) -> str:
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is not the name of a file beside {INDEX}")
    return name


class ShardedExamples(torch.utils.data.Dataset):
    """Windows of several streams, one after the other; used as Examples is, in constant memory.

    streams    (tokens,) each, as `pack` lays documents; memory maps
    checksums  one for each stream, for `fingerprint`
    """

    is_packed = True

    def __init__(
        self, streams: Sequence[np.ndarray], checksums: Sequence[str], window: int, *, eos_id: int, pad_id: int, seed: int = 1337
    ) -> None:
        self.window, self.eos_id, self.pad_id, self.seed = window, eos_id, pad_id, seed
        self.shards = [Examples(stream, window, eos_id=eos_id, pad_id=pad_id, seed=seed, shrink=False) for stream in streams]
        self.target_tokens = sum(shard.target_tokens for shard in self.shards)
        self._firsts = np.cumsum([0, *map(len, self.shards)])
        self.fingerprint = xxhash.xxh3_128_hexdigest(repr((window, eos_id, pad_id, seed, list(checksums))).encode())

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One example, as Examples has it, for a torch.utils.data.DataLoader."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return {name: rows[0] for name, rows in self.batch([index % len(self)]).items()}

    def batch(self, indices: Sequence[int] | np.ndarray, offset: int = 0) -> dict[str, Tensor]:
        """As Examples.batch; the offset shifts the windows of every shard."""
        out = {}
        for places, shard, within in self._by_shard(indices):
            for name, rows in shard.batch(within, offset).items():
                out.setdefault(name, torch.empty((len(indices), self.window), dtype=rows.dtype))[places] = rows
        return out or self.shards[0].batch([], 0)

    def blank(self) -> dict[str, Tensor]:
        return self.shards[0].blank()

    def count_targets(self, indices: np.ndarray) -> int:
        return sum(shard.count_targets(within) for _, shard, within in self._by_shard(indices))

    def order(self, epoch: int) -> Permutation:
        """The order of the examples in an epoch; slices of it are computed when they are asked for."""
        return Permutation(len(self), self.seed, epoch)

    def offset(self, epoch: int) -> int:
        return self.shards[0].offset(epoch)

    def _by_shard(self, indices: Sequence[int] | np.ndarray) -> Iterator[tuple[Tensor, Examples, np.ndarray]]:
        """For each shard that some of the examples are in: their places in `indices`, the shard, their numbers in it."""
        indices = np.asarray(indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"batch: indices must be whole numbers from 0 to {len(self) - 1}")
        owners = np.searchsorted(self._firsts, indices, side="right") - 1
        for owner in np.unique(owners):
            places = np.flatnonzero(owners == owner)
            yield torch.from_numpy(places), self.shards[owner], indices[places] - self._firsts[owner]


class Permutation:
    """A permutation of 0 to length - 1 that takes no memory: a Feistel network over the next power of four, walked until it lands
    inside. Source: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 4 (cycle walking)."""

    ROUNDS = 6

    def __init__(self, length: int, seed: int, epoch: int) -> None:
        self.length = length
        self._half = np.uint64(max(1, -(-max(length - 1, 1).bit_length() // 2)))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = np.random.Philox(np.random.SeedSequence((seed, epoch, 0))).random_raw(self.ROUNDS).astype(np.uint64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, chosen: slice) -> np.ndarray:
        """(n,) int64 for a slice of the places."""
        values = self._network(np.arange(*chosen.indices(self.length)).astype(np.uint64))
        while (outside := values >= self.length).any():
            values[outside] = self._network(values[outside])
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & self._mask)
        return left << self._half | right


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer. Source: Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators"."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
