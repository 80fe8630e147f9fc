"""Guesses at the next tokens from the text itself: what followed the last time that these tokens came.

A guess costs little, because the weights are read once for all tokens of a step, and it cannot change a text: a draw is a function
of (request seed, position) and the logits there, so the engine draws at every guessed place and keeps the draws for as long as they
equal the guesses. Source: prompt lookup decoding, Saxena 2023; speculative decoding, Leviathan et al. 2023, arXiv:2211.17192.
"""

from __future__ import annotations

# The longest run that is looked up, then shorter ones; a single token says too little.
LENGTHS = (4, 3, 2)


class Lookup:
    """The places of all runs of LENGTHS tokens in one text that grows."""

    def __init__(self) -> None:
        self._end_of: dict[tuple[int, ...], int] = {}
        self._known = 0

    def guess(self, tokens: list[int], count: int) -> list[int]:
        """At most `count` tokens that followed the latest earlier place where the last tokens of the text stood; none, maybe."""
        # A run is entered once something follows it, so the text's own end is not found.
        for end in range(self._known + 1, len(tokens)):
            for length in LENGTHS:
                if length <= end:
                    self._end_of[tuple(tokens[end - length : end])] = end
        self._known = max(len(tokens) - 1, 0)
        for length in LENGTHS:
            end = self._end_of.get(tuple(tokens[-length:])) if length <= len(tokens) else None
            if end is not None:
                return tokens[end : end + count]
        return []
