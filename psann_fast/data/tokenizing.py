"""A corpus to token shards, in parallel and in bounded memory."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import multiprocessing
import os
from collections import deque
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import numpy as np
from tqdm import tqdm

from .corpora import corpus_files, documents
from .cutting import cut
from .shards import INDEX, ShardWriter, token_dtype, write_index
from .tokenizer import Tokenizer, load_tokenizer, train_tokenizer

LOGGER = logging.getLogger("psann_fast")

TASK_CHARACTERS = 1 << 20  # of a worker's task: large against what it costs to hand over, small against memory
SHARD_TOKENS = 1 << 27
PARTS = ("train", "validation")
Task = tuple[str, list[str], list[int]]  # the part, pieces of text, and how many pieces lie before each document's end


def tokenize(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Tokenizer = "auto",
    tokenizer_model_path: str | Path | None = None,
    vocab_size: int | None = None,
    field: str = "text",
    by_line: bool = False,
    val_split: float = 0.0,
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    seed: int = 1337,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the documents of text, JSON-lines and Parquet files as token shards into the folder `out`; returns the index's parts.

    tokenizer   a name (trained on a sample of the corpus) or a Tokenizer; tokenizer_model_path takes a prebuilt one instead
    val_split   share of the documents that go to validation, by a hash of their beginning, so equal ones stay together
    workers     processes that encode (default: one for each CPU of this process); the shards do not depend on it
    shard_tokens  a shard ends with the document that reaches it

    Raises ValueError for a folder that holds shards, files that cannot be used and a corpus without text; OSError.
    """
    out, files = Path(out), corpus_files(paths)
    if (out / INDEX).exists():
        raise ValueError(f"{out} holds token shards already; choose another folder, or remove it")
    if tokenizer_model_path is not None:
        tokenizer = load_tokenizer(tokenizer_model_path)
    workers = workers or _processors()
    read = lambda: documents(files, field=field, by_line=by_line)  # noqa: E731 (two uses)
    bar = tqdm(total=None, unit="B", unit_scale=True, unit_divisor=1024, desc="tokenizing", disable=not progress)
    with _pool(workers) as pool, bar:
        if isinstance(tokenizer, str):
            # A long document in pieces of a mebibyte: the sample is of pieces anyway.
            tokenizer = train_tokenizer(tokenizer, itertools.chain.from_iterable(read()), vocab_size, seed=seed)
        out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(out)  # from where the workers take it
        dtype = token_dtype(tokenizer.vocab_size)
        writers = {part: ShardWriter(out, part, tokenizer.eos_id, dtype, shard_tokens) for part in PARTS}
        counts = {part: {"documents": 0, "bytes": 0} for part in PARTS}
        encode = functools.partial(_encode, tokenizer) if pool is None else functools.partial(_encode_elsewhere, str(out))
        for part, ids in _in_order(pool, workers, encode, _tasks(read(), tokenizer, val_split, seed, counts, bar)):
            writers[part].append(ids)
    parts = {part: {"shards": writer.close(), "tokens": writer.tokens, **counts[part]} for part, writer in writers.items()}
    if not parts["train"]["shards"]:
        raise ValueError(f"{', '.join(map(str, paths))}: no text is left for training; pass more documents or a smaller val_split")
    if val_split and not parts["validation"]["shards"]:
        LOGGER.warning("val_split %g of %d documents left none for validation", val_split, counts["train"]["documents"])
    write_index(out, tokenizer, {part: described for part, described in parts.items() if described["shards"]})
    return parts


def _processors() -> int:
    """The CPUs of this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tasks(
    source: Iterator[Iterator[str]], tokenizer: Tokenizer, val_split: float, seed: int, counts: dict[str, dict[str, int]], bar: tqdm
) -> Iterator[Task]:
    """Documents as pieces that no token crosses, gathered to tasks; a long document spreads over several."""
    waiting: dict[str, tuple[list[str], list[int]]] = {part: ([], []) for part in PARTS}
    sizes = dict.fromkeys(PARTS, 0)
    # A library whose text cannot be cut gets each document whole.
    longest = tokenizer.piece_characters if tokenizer.can_cut else None

    def put(part: str, pieces: list[str]) -> Iterator[Task]:
        for piece in pieces:
            waiting[part][0].append(piece)
            sizes[part] += len(piece)
            if sizes[part] >= TASK_CHARACTERS:
                yield (part, *waiting[part])
                waiting[part], sizes[part] = ([], []), 0

    empty = 0
    for document in source:
        part, rest = "", ""
        for chunk in document:
            if not part and chunk:
                part = _part_of(chunk, val_split, seed)
            size = len(chunk) if chunk.isascii() else len(chunk.encode("utf-8"))
            bar.update(size)
            rest += chunk
            if part:
                counts[part]["bytes"] += size
            if longest is not None and len(rest) > longest:
                pieces, rest = cut(rest, longest)
                yield from put(part, pieces)
        if not part:
            empty += 1
            continue
        yield from put(part, [rest] if rest else [])
        waiting[part][1].append(len(waiting[part][0]))
        counts[part]["documents"] += 1
    if empty:
        LOGGER.warning("%d empty documents are left out", empty)
    for part, (pieces, ends) in waiting.items():
        if ends or pieces:
            yield part, pieces, ends


def _part_of(beginning: str, val_split: float, seed: int) -> str:
    digest = hashlib.blake2b(f"{seed}:{beginning[:4096]}".encode(), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "little") < val_split * 2**64 else "train"


def _in_order(
    pool: Executor | None, workers: int, encode: Callable[[list[str], list[int]], np.ndarray], tasks: Iterator[Task]
) -> Iterator[tuple[str, np.ndarray]]:
    """(part, ids) of each task, in the tasks' order; a few are under way at any time."""
    if pool is None:
        for part, pieces, ends in tasks:
            yield part, encode(pieces, ends)
        return
    running: deque[tuple[str, Future[np.ndarray]]] = deque()
    for part, pieces, ends in tasks:
        running.append((part, pool.submit(encode, pieces, ends)))
        if len(running) > 2 * workers:
            part, future = running.popleft()
            yield part, future.result()
    for part, future in running:
        yield part, future.result()


class _pool:
    """A pool of encoding processes, or None for one worker, which is this process.

    Entered before there is a tokenizer: the processes start, which takes seconds, while one is trained.
    """

    def __init__(self, workers: int) -> None:
        self.workers, self.pool = workers, None

    def __enter__(self) -> Executor | None:
        if self.workers > 1:
            # Not by fork: the tokenizer's library may have threads.
            self.pool = ProcessPoolExecutor(self.workers, mp_context=multiprocessing.get_context("spawn"))
            for _ in range(self.workers):
                self.pool.submit(_begin)
        return self.pool

    def __exit__(self, kind: Any, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=kind is not None)


def _begin() -> None:
    """What a worker is started by; importing this module is most of it."""


@functools.cache
def _tokenizer_of(folder: str) -> Tokenizer:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    return Tokenizer.load(folder)


def _encode_elsewhere(folder: str, pieces: list[str], ends: list[int]) -> np.ndarray:
    """`_encode` in a worker, which reads the tokenizer once: it is not sent with every task."""
    return _encode(_tokenizer_of(folder), pieces, ends)


def _encode(tokenizer: Tokenizer, pieces: list[str], ends: list[int]) -> np.ndarray:
    """The ids of the pieces end to end, a separator after each document's end."""
    rows = tokenizer.encode_batch(pieces)
    end = np.array([tokenizer.eos_id], np.int32)
    parts, done = [], 0
    for place in ends:
        parts += [*rows[done:place], end]
        done = place
    parts += rows[done:]
    return np.concatenate(parts) if parts else np.empty(0, np.int32)
