"""Which tokens run in the next step, and in which blocks. Plain Python on whole numbers: no tensors, no text.

First come, first served. A sequence is admitted when blocks for the tokens that it has are there; it takes more as it grows, and
when none is left the sequence that came last gives all of its back and is computed again later (preemption by recompute). The
first one is never preempted for another, and a sequence that could not fit alone is refused at once, so every one gets done.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from .blocks import NO_PARENT, BlockPool

WAITING, RUNNING, DONE = "waiting", "running", "done"


class CannotFit(ValueError):
    """A request that is larger than the whole cache. tokens_that_fit: what would be admitted, prompt included."""

    def __init__(self, longest: int, tokens_that_fit: int) -> None:
        super().__init__(f"the request needs a cache of {longest} tokens, and {tokens_that_fit} fit")
        self.tokens_that_fit = tokens_that_fit


@dataclass(eq=False)
class Sequence:
    """One text as the scheduler sees it.

    tokens     prompt and output; the engine appends what was drawn
    longest    tokens that the cache must hold at most: all but the last one drawn
    shares     whether blocks of equal content may be taken from, and left to, other sequences
    drafts     guesses at the next tokens, for the next step only; the engine sets them

    cached     how many of `tokens` the cache holds
    blocks     of the cached tokens, and for those of the step at hand
    serials    of the leading blocks that were offered to others by content
    row        0 to max_rows - 1 while it runs
    in_table   leading blocks that the row's block table holds already
    """

    tokens: list[int]
    longest: int
    shares: bool = True
    drafts: list[int] = field(default_factory=list)
    state: str = WAITING
    cached: int = 0
    blocks: list[int] = field(default_factory=list)
    serials: list[int] = field(default_factory=list)
    row: int = -1
    in_table: int = 0
    preemptions: int = 0
    reused: int = 0  # tokens that were found in the cache at its first admission


@dataclass
class Work:
    """In this step `sequence` computes its tokens begin to end (exclusive), the last `drafted` of them guesses."""

    sequence: Sequence
    begin: int
    end: int
    drafted: int = 0


@dataclass
class Plan:
    """work, in the order of arrival; copies: (from, to) blocks to copy, one after another, before anything is written."""

    work: list[Work]
    copies: list[tuple[int, int]]


class Scheduler:
    """Deals blocks and rows to sequences, step by step: add, then plan and commit in turns, finish or cancel.

    num_blocks, block_size   capacity of the cache
    max_rows                 sequences that run at once
    chunk                    prompt tokens of a step beside the running sequences' single ones
    """

    def __init__(self, num_blocks: int, block_size: int, max_rows: int, chunk: int) -> None:
        self.pool = BlockPool(num_blocks, block_size)
        self.block_size, self.max_rows, self.chunk = block_size, max_rows, chunk
        # Every running sequence came before every waiting one, and both stand in the order of arrival.
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._rows = list(range(max_rows - 1, -1, -1))
        self.preemptions = self.reused_tokens = 0

    @property
    def capacity(self) -> int:
        """Tokens that the whole cache holds."""
        return self.pool.num_blocks * self.block_size

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises CannotFit for one that the whole cache could not hold."""
        if self._blocks_for(sequence.longest) > self.pool.num_blocks:
            raise CannotFit(sequence.longest, self.capacity)
        self.waiting.append(sequence)

    def plan(self) -> Plan:
        """The next step; its work is empty only if there is no sequence at all."""
        copies: list[tuple[int, int]] = []
        while self.waiting and len(self.running) < self.max_rows and self._admit(self.waiting[0], copies):
            pass
        work = []
        budget = self.chunk
        for sequence in list(self.running):
            if sequence.state is RUNNING and len(sequence.tokens) - sequence.cached == 1:
                step = self._next_token(sequence, copies)
                if step is not None:
                    work.append(step)
                    budget -= step.end - step.begin
        # At least one prompt token a step, so that a prompt advances beside any number of running sequences.
        budget = max(budget, 1)
        for sequence in self.running:
            left = len(sequence.tokens) - sequence.cached
            if left > 1 and budget > 0:
                taken = min(left, budget)
                budget -= taken
                work.append(Work(sequence, sequence.cached, sequence.cached + taken))
        return Plan(work, copies)

    def commit(self, work: Work, computed: int, drawn: list[int]) -> None:
        """The step is done: the first `computed` tokens of the work count, and `drawn` follow the sequence's tokens.

        Of drafts, those that were confirmed are among `drawn`. Full blocks can now be found by others.
        """
        sequence, size = work.sequence, self.block_size
        sequence.tokens.extend(drawn)
        sequence.cached = work.begin + computed
        if not sequence.shares:
            return
        for index in range(len(sequence.serials), sequence.cached // size):
            parent = sequence.serials[-1] if sequence.serials else NO_PARENT
            content = sequence.tokens[index * size : (index + 1) * size]
            sequence.serials.append(self.pool.register(sequence.blocks[index], parent, content))

    def finish(self, sequence: Sequence) -> None:
        """A running sequence ends; its blocks serve others."""
        self.running.remove(sequence)
        self._vacate(sequence)
        sequence.state = DONE

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence at whatever stage it is; one that is done stays so. Not between plan and commit."""
        if sequence.state is RUNNING:
            self.finish(sequence)
        elif sequence.state is WAITING:
            self.waiting.remove(sequence)
            sequence.state = DONE

    # -- blocks -------------------------------------------------------------------------------------------------------------

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _vacate(self, sequence: Sequence) -> None:
        # The last block first: of idle blocks the oldest goes first, and a beginning is useful without its end, not the reverse.
        for block in reversed(sequence.blocks):
            self.pool.release(block)
        self._rows.append(sequence.row)
        sequence.blocks, sequence.serials, sequence.drafts = [], [], []
        sequence.cached, sequence.row, sequence.in_table = 0, -1, 0

    def _preempt_last(self) -> Sequence:
        sequence = self.running.pop()
        self._vacate(sequence)
        sequence.state = WAITING
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)
        return sequence

    def _next_token(self, sequence: Sequence, copies: list[tuple[int, int]]) -> Work | None:
        """The work of a sequence whose text is cached but for one token; None if it had to give way to those before it."""
        begin = sequence.cached
        end = begin + 1 + len(sequence.drafts)
        if sequence.drafts and self._missing(sequence, end) > self.pool.available:
            end = begin + 1  # guesses are not worth another's blocks
        while self._missing(sequence, end) > self.pool.available:
            if self._preempt_last() is sequence:
                return None
        self._extend(sequence, end, copies)
        return Work(sequence, begin, end, drafted=end - begin - 1)

    def _missing(self, sequence: Sequence, end: int) -> int:
        """Blocks to take before `sequence` can write its tokens up to `end`."""
        is_copied = self._written_first(sequence) is not None
        return self._blocks_for(end) - len(sequence.blocks) + is_copied

    def _written_first(self, sequence: Sequence) -> int | None:
        """The index of the block that the next token falls into, if others may read that block."""
        index = sequence.cached // self.block_size
        return index if index < len(sequence.blocks) and not self.pool.is_writable(sequence.blocks[index]) else None

    def _extend(self, sequence: Sequence, end: int, copies: list[tuple[int, int]]) -> None:
        index = self._written_first(sequence)
        if index is not None:
            old, new = sequence.blocks[index], self.pool.take()
            copies.append((old, new))
            sequence.blocks[index] = new
            self.pool.release(old)
            sequence.in_table = min(sequence.in_table, index)
            del sequence.serials[index:]
        while len(sequence.blocks) < self._blocks_for(end):
            sequence.blocks.append(self.pool.take())

    # -- admission ----------------------------------------------------------------------------------------------------------

    def _admit(self, sequence: Sequence, copies: list[tuple[int, int]]) -> bool:
        """Let the first waiting sequence run if there is room for the tokens that it has."""
        tokens = sequence.tokens
        blocks, serials = self.pool.find(tokens) if sequence.shares else ([], [])
        if sequence.shares:
            if self._is_about_to_be_cached(tokens, len(blocks)):
                return False
            begun = self._begun_by_another(tokens, blocks)
            if begun is not None:
                blocks.append(begun)
        # Each running sequence may want a block in this very step; admitting one only to preempt it helps nobody.
        reserve = len(self.running)
        while True:
            # The last token is computed even if it is cached: its logits are wanted.
            cached = min(len(blocks) * self.block_size, len(tokens) - 1)
            is_copied = cached < len(blocks) * self.block_size
            missing = self._blocks_for(len(tokens)) - len(blocks) + is_copied
            room = self.pool.available - sum(map(self.pool.is_idle, blocks))
            if missing + reserve <= room:
                break
            if self.running or not blocks:
                return False
            blocks.pop()  # alone, and the copy of a shared block would be one too many: compute it instead
        for block in blocks:
            self.pool.share(block)
        self.waiting.popleft()
        self.running.append(sequence)
        sequence.state, sequence.row = RUNNING, self._rows.pop()
        sequence.blocks, sequence.serials, sequence.cached = blocks, serials[: len(blocks)], cached
        if sequence.preemptions == 0:
            sequence.reused = cached
            self.reused_tokens += cached
        self._extend(sequence, len(tokens), copies)
        return True

    def _is_about_to_be_cached(self, tokens: list[int], found: int) -> bool:
        """Whether a running sequence is computing the block that follows the `found` ones; then waiting for it saves the work."""
        end = (found + 1) * self.block_size
        if end > len(tokens):
            return False
        return any(
            other.shares and other.cached < end <= len(other.tokens) and other.tokens[:end] == tokens[:end]
            for other in self.running
        )

    def _begun_by_another(self, tokens: list[int], blocks: list[int]) -> int | None:
        """A running sequence's block, not yet full, that holds the rest of `tokens` but the last: samples of one prompt share it.

        Only of one that draws: it looks for readers before each token, where a prompt is written in chunks without a look.
        """
        begin, end = len(blocks) * self.block_size, len(tokens) - 1
        if not begin < end < begin + self.block_size:
            return None
        for other in self.running:
            draws = len(other.tokens) - other.cached == 1
            if other.shares and draws and other.cached >= end and other.tokens[:end] == tokens[:end]:
                return other.blocks[len(blocks)]
        return None
