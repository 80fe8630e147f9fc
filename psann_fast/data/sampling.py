"""Draws what a subword tokenizer learns from: all of a small corpus, a fair sample of a large one."""

from __future__ import annotations

import heapq
import random
from typing import Iterable

from .cutting import check_unicode, cut

# A trainer takes about fifteen times its text (490 MB for 32 MB of source code, vocabulary 32768), and a vocabulary learnt from
# 16 MiB differs little from one learnt from all.
SAMPLE_BYTES = 16 << 20
PIECE_CHARACTERS = 4096


def sample(texts: Iterable[str], seed: int, limit: int = SAMPLE_BYTES) -> list[str]:
    """Pieces of the texts, in their order, of at most `limit` UTF-8 bytes altogether.

    Each piece of up to 4096 characters draws a number from `seed`; the pieces with the lowest stay. `texts` is read once and
    memory is bounded by `limit` and the longest text. The result depends on the texts, their order and the seed.
    """
    draw = random.Random(seed).random
    kept: list[tuple[float, int, str, int]] = []  # highest draw first
    held = count = 0
    for index, text in enumerate(texts):
        check_unicode(text, f"text {index} of the tokenizer's training texts")
        pieces, rest = cut(text, PIECE_CHARACTERS)
        for piece in [*pieces, rest]:
            size = len(piece) if piece.isascii() else len(piece.encode("utf-8"))
            heapq.heappush(kept, (-draw(), count, piece, size))
            held, count = held + size, count + 1
            while held > limit:
                held -= heapq.heappop(kept)[3]
    return [piece for _, _, piece, _ in sorted(kept, key=lambda entry: entry[1]) if piece]
