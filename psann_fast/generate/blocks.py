"""Blocks of the cache: who refers to which, and what a block holds. Whole numbers only, no tensors.

A full block of a finished or running sequence is found again by its content, so that equal beginnings are computed once. Its key
is (serial of the block before it, its tokens): the dictionary compares the tokens themselves, and serials are never used twice, so
equal hashes cannot mix up two texts. Source: vLLM's advisory CVE-2025-25183 shows what comparing hashes alone costs.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Sequence

# Never given out: it pads block tables, and reads as zeros where a sequence has no past.
NULL_BLOCK = 0
NO_PARENT = 0


class BlockPool:
    """Blocks 1 to num_blocks, each free, in use (by one sequence or several), or idle: used by none, its content kept.

    num_blocks   capacity
    block_size   tokens of a block
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._references = [0] * (num_blocks + 1)
        self._returned: list[int] = []
        self._untouched = 1  # ids from here on were never given out, so the cache need not hold them yet
        self._by_content: dict[tuple[int, tuple[int, ...]], int] = {}
        self._key: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._serial: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._last_serial = NO_PARENT

    @property
    def available(self) -> int:
        """Blocks that take can give: free ones and idle ones."""
        return len(self._returned) + self.num_blocks + 1 - self._untouched + len(self._idle)

    @property
    def in_use(self) -> int:
        return self.num_blocks - self.available

    def take(self) -> int:
        """A block for one owner. An idle one, the oldest first, loses its content. The caller has looked at `available`."""
        if self._returned:
            block = self._returned.pop()
        elif self._untouched <= self.num_blocks:
            block = self._untouched
            self._untouched += 1
        else:
            assert self._idle, "no block is available"
            block, _ = self._idle.popitem(last=False)
            del self._by_content[self._key.pop(block)], self._serial[block]
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more owner of a block that is in use or idle."""
        if self._references[block] == 0:
            del self._idle[block]
        self._references[block] += 1

    def release(self, block: int) -> None:
        """One owner less."""
        assert self._references[block] > 0, f"block {block} has no owner"
        self._references[block] -= 1
        if self._references[block] == 0:
            if block in self._serial:
                self._idle[block] = None
            else:
                self._returned.append(block)

    def is_idle(self, block: int) -> bool:
        return block in self._idle

    def is_writable(self, block: int) -> bool:
        """True if one sequence alone owns it, and nobody may find it by its content."""
        return self._references[block] == 1 and block not in self._serial

    def register(self, block: int, parent: int, tokens: Sequence[int]) -> int:
        """Let a full block be found by its content; returns the serial under which its successor registers.

        parent  serial of the block before it, NO_PARENT for a first one

        Where another block holds the same already, that one stays the one that is found.
        """
        key = (parent, tuple(tokens))
        found = self._by_content.get(key)
        if found is not None:
            return self._serial[found]
        self._last_serial += 1
        self._by_content[key], self._key[block], self._serial[block] = block, key, self._last_serial
        return self._last_serial

    def find(self, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """(blocks, serials) that hold the longest beginning of `tokens`, in whole blocks."""
        size, parent = self.block_size, NO_PARENT
        blocks: list[int] = []
        serials: list[int] = []
        for begin in range(0, len(tokens) - size + 1, size):
            block = self._by_content.get((parent, tuple(tokens[begin : begin + size])))
            if block is None:
                break
            parent = self._serial[block]
            blocks.append(block)
            serials.append(parent)
        return blocks, serials
