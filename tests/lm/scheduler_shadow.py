"""A cache without numbers: it remembers which text's prefix each slot holds, and fails where a wrong one is read or written.

A slot is right for token t of a text if what was written there was token t of a text with the same first t + 1 tokens.
"""

from __future__ import annotations

import random
from collections import Counter

from psann_fast.generate.blocks import NULL_BLOCK
from psann_fast.generate.scheduler import DONE, RUNNING, WAITING, CannotFit, Scheduler, Sequence


def step_sizes(chunk: int, works: list) -> None:
    prompts = [w for w in works if w.end - w.begin - w.drafted > 1]
    assert sum(w.end - w.begin for w in works) <= chunk + len(works) + sum(w.drafted for w in works)
    assert not prompts or sum(w.end - w.begin for w in prompts) <= max(1, chunk)


class Shadow:
    """Runs a Scheduler and checks it. `model(prefix)` says which token follows; texts end after their `wanted` tokens."""

    def __init__(self, scheduler: Scheduler, vocabulary: int = 3) -> None:
        self.scheduler, self.vocabulary = scheduler, vocabulary
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}
        self.sequences: list[Sequence] = []
        self.prompt: dict[Sequence, list[int]] = {}
        self.steps = self.finished = self.copies = 0

    def add(self, prompt: list[int], wanted: int, shares: bool = True) -> Sequence | None:
        sequence = Sequence(list(prompt), len(prompt) + wanted - 1, shares)
        pool = self.scheduler.pool
        try:
            self.scheduler.add(sequence)
        except CannotFit as refused:
            assert sequence.longest > pool.num_blocks * pool.block_size == refused.tokens_that_fit
            return None
        assert sequence.longest <= pool.num_blocks * pool.block_size
        self.prompt[sequence] = list(prompt)
        self.sequences.append(sequence)
        return sequence

    def follower(self, prefix: list[int]) -> int:
        # Depends on the last tokens, so that texts with one beginning stay alike for a while.
        return (sum(prefix[-3:]) * 7 + len(prefix) // 5) % self.vocabulary

    def step(self, choose: random.Random | None = None) -> None:
        """One step: drafts (right and wrong ones where `choose` is given), plan, copies, writes, reads, commit, ends."""
        scheduler, size = self.scheduler, self.scheduler.block_size
        if choose is not None:
            for s in scheduler.running:
                room = s.longest - len(s.tokens)
                s.drafts = [choose.randrange(self.vocabulary) for _ in range(min(choose.choice((0, 0, 1, 3)), max(room, 0)))]
        plan = scheduler.plan()
        self.steps += 1
        assert bool(plan.work) == bool(scheduler.waiting or scheduler.running), "there are sequences, and none advances"
        step_sizes(scheduler.chunk, plan.work)
        self.copies += len(plan.copies)
        for source, target in plan.copies:
            for offset in range(size):
                self.slots.pop((target, offset), None)
                if (source, offset) in self.slots:
                    self.slots[target, offset] = self.slots[source, offset]
        self.check_owners()
        texts = {}
        for work in plan.work:
            s = work.sequence
            assert s.state is RUNNING and work.begin == s.cached < work.end <= len(s.tokens) + work.drafted <= s.longest + 1
            assert len(s.blocks) * size >= work.end
            text = texts[s] = s.tokens[: work.end - work.drafted] + s.drafts[: work.drafted]
            for position in range(work.begin, work.end):
                block = s.blocks[position // size]
                assert scheduler.pool.is_writable(block), "a block that others may read is written"
                self.slots[block, position % size] = tuple(text[: position + 1])
        for work in plan.work:
            s, text = work.sequence, texts[work.sequence]
            for position in range(work.end):
                held = self.slots.get((s.blocks[position // size], position % size))
                assert held == tuple(text[: position + 1]), f"slot of token {position} holds {held}"
        for work in plan.work:
            self._commit(work)

    def _commit(self, work) -> None:
        s, scheduler = work.sequence, self.scheduler
        if work.end - work.drafted < len(s.tokens):
            scheduler.commit(work, work.end - work.begin, [])
            return
        drawn = []
        for draft in [*s.drafts[: work.drafted], None]:
            drawn.append(self.follower(s.tokens + drawn))
            if drawn[-1] != draft:
                break
        s.drafts = []
        scheduler.commit(work, work.end - work.begin - work.drafted + len(drawn) - 1, drawn)
        assert len(s.tokens) <= s.longest + 1
        if len(s.tokens) == s.longest + 1:
            self.end(s)

    def end(self, sequence: Sequence) -> None:
        expected = self.prompt[sequence][:]
        while len(expected) < len(sequence.tokens):
            expected.append(self.follower(expected))
        assert sequence.tokens == expected, "the text is not the one that it would be alone"
        self.scheduler.finish(sequence)
        self.forget(sequence)
        self.finished += 1

    def cancel(self, sequence: Sequence) -> None:
        self.scheduler.cancel(sequence)
        self.forget(sequence)

    def forget(self, sequence: Sequence) -> None:
        assert sequence.state is DONE and not sequence.blocks and sequence.row == -1
        self.sequences.remove(sequence)
        del self.prompt[sequence]

    def check_owners(self) -> None:
        """Every block is free, idle or in use, its references are the sequences that list it, and content leads where it says."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        owners = Counter(block for s in scheduler.running for block in s.blocks)
        assert all(len(set(s.blocks)) == len(s.blocks) for s in scheduler.running)
        assert [pool._references[b] for b in range(pool.num_blocks + 1)] == [owners[b] for b in range(pool.num_blocks + 1)]
        free = set(pool._returned) | set(range(pool._untouched, pool.num_blocks + 1))
        idle = set(pool._idle)
        assert len(free) == len(pool._returned) + pool.num_blocks + 1 - pool._untouched
        assert not free & idle and not free & owners.keys() and not idle & owners.keys()
        assert free | idle | owners.keys() == set(range(1, pool.num_blocks + 1)) and NULL_BLOCK not in owners
        assert pool.available == len(free) + len(idle) and pool.in_use == len(owners)
        assert pool._by_content == {key: block for block, key in pool._key.items()} and pool._key.keys() == pool._serial.keys()
        assert idle <= pool._serial.keys() and not free & pool._serial.keys()
        assert len(set(pool._serial.values())) == len(pool._serial)
        rows = [s.row for s in scheduler.running]
        assert sorted(rows + scheduler._rows) == list(range(scheduler.max_rows))
        assert all(s.state is RUNNING for s in scheduler.running) and all(
            s.state is WAITING and not s.blocks for s in scheduler.waiting
        )
        order = {s: i for i, s in enumerate(self.sequences)}
        arrivals = [order[s] for s in [*scheduler.running, *scheduler.waiting]]
        assert arrivals == sorted(arrivals) and len(arrivals) == len(self.sequences), "not first come, first served"

    def drain(self, most: int = 100_000) -> None:
        for _ in range(most):
            if not self.sequences:
                break
            self.step()
        assert not self.sequences, "no progress"
        assert self.scheduler.pool.in_use == 0 and len(self.scheduler._rows) == self.scheduler.max_rows
        self.check_owners()
