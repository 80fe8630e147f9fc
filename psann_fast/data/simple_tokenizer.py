"""Characters, and bytes for every other character.

Ids 0 and 1 are padding and the end of a document, 2 to 257 the bytes, which are the ASCII characters too, and from 258 on the
other characters of the training texts, in the order of their code points.
"""

from __future__ import annotations

from typing import Any, Iterable, Mapping, Sequence

import numpy as np

from .cutting import check_unicode
from .tokenizer import DESCRIPTION, Tokenizer

PAD, EOS, FIRST_BYTE, FIRST_CHARACTER = 0, 1, 2, 258
CODE_POINTS = 0x110000
# Counting takes a table of all code points, so short texts are counted together.
COUNTED_TOGETHER = 1 << 22


class SimpleTokenizer(Tokenizer):
    """One id for each character of the training texts; other characters are their UTF-8 bytes, an id each."""

    name = "simple"
    least_vocab_size = FIRST_CHARACTER
    piece_characters = 1 << 20  # no token crosses a character, and the work is vectorized

    def __init__(self, characters: str) -> None:
        """characters   those above ASCII that have an id of their own, in rising order, each once"""
        check_unicode(characters, "SimpleTokenizer: characters")
        if any(character.isascii() for character in characters) or list(characters) != sorted(set(characters)):
            raise ValueError("SimpleTokenizer: characters must lie above ASCII and rise, each once")
        self.characters = characters
        super().__init__(
            [b"", b"", *(bytes([byte]) for byte in range(256)), *(character.encode("utf-8") for character in characters)], PAD, EOS
        )
        self._id_of = np.full(CODE_POINTS, -1, np.int32)
        self._id_of[:128] = np.arange(128) + FIRST_BYTE
        self._id_of[_code_points(characters)] = np.arange(len(characters)) + FIRST_CHARACTER

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int | None, seed: int) -> SimpleTokenizer:
        """All characters of the texts, or the most frequent that vocab_size can hold. Nothing is drawn, so seed is unused."""
        counts = np.zeros(CODE_POINTS, np.int64)
        waiting: list[np.ndarray] = []
        held = 0
        for index, text in enumerate(texts):
            check_unicode(text, f"text {index} of the tokenizer's training texts")
            if not text.isascii():
                waiting.append(_code_points(text))
                held += len(text)
                if held >= COUNTED_TOGETHER:
                    counts += np.bincount(np.concatenate(waiting), minlength=CODE_POINTS)
                    waiting.clear()
                    held = 0
        if waiting:
            counts += np.bincount(np.concatenate(waiting), minlength=CODE_POINTS)
        counts[:128] = 0
        order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        if vocab_size is not None:
            order = order[: vocab_size - FIRST_CHARACTER]
        return cls("".join(map(chr, np.sort(order).tolist())))

    def to_files(self) -> dict[str, bytes]:
        return {DESCRIPTION: self._describe(characters=self.characters)}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], description: Mapping[str, Any]) -> SimpleTokenizer:
        characters = description.get("characters")
        if not isinstance(characters, str):
            raise ValueError(f"{DESCRIPTION}: characters is {characters!r}; it must be a string of characters")
        return cls(characters)

    def _encode_pieces(self, pieces: Sequence[str]) -> list[np.ndarray]:
        return [self._encode_piece(piece) for piece in pieces]

    def _encode_piece(self, piece: str) -> np.ndarray:
        code_points = _code_points(piece)
        ids = self._id_of[code_points]
        unknown = ids < 0
        if not unknown.any():
            return ids
        spelt = {int(c): np.frombuffer(chr(c).encode("utf-8"), np.uint8) for c in np.unique(code_points[unknown])}
        lengths = np.ones(len(ids), np.int64)
        lengths[unknown] = [len(spelt[c]) for c in code_points[unknown].tolist()]
        starts = np.cumsum(lengths) - lengths
        whole = np.empty(int(lengths.sum()), np.int32)
        whole[starts[~unknown]] = ids[~unknown]
        in_bytes = np.ones(len(whole), bool)
        in_bytes[starts[~unknown]] = False
        whole[in_bytes] = np.concatenate([spelt[c] for c in code_points[unknown].tolist()]).astype(np.int32) + FIRST_BYTE
        return whole


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


TOKENIZER = SimpleTokenizer
