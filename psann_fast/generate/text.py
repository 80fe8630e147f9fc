"""Tokens to text as they come: UTF-8 is never split, stop strings end the text."""

from __future__ import annotations

import codecs
from typing import Callable, Sequence


class TextStream:
    """The text of one request.

    decode_bytes  ids -> bytes; that of a list is the concatenation of those of its items
    stop          strings; the text ends before the first that is complete
    """

    def __init__(self, decode_bytes: Callable[[list[int]], bytes], stop: Sequence[str] = ()) -> None:
        self._decode_bytes = decode_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._held = ""
        self.text = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain. Sets is_stopped when a stop string is complete."""
        return self._emit(self._utf8.decode(self._decode_bytes([token])), is_final=False)

    def finish(self) -> str:
        """No token follows: the rest of the text, an incomplete character as U+FFFD."""
        return self._emit(self._utf8.decode(b"", final=True), is_final=True)

    def _emit(self, new: str, is_final: bool) -> str:
        if self.is_stopped:
            return ""
        self._held += new
        # (end, start) of each: the string that is complete first ends the text, however the text came in pieces.
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            certain, self._held, self.is_stopped = self._held[: min(found)[1]], "", True
        else:
            keep = 0 if is_final else max((_overlap(self._held, stop) for stop in self._stop), default=0)
            certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += certain
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
