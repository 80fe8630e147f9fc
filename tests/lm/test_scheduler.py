"""The scheduler: blocks are owned rightly at every step, texts are those that each would be alone, everyone gets done."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from psann_fast.generate.blocks import NO_PARENT, BlockPool
from psann_fast.generate.scheduler import DONE, RUNNING, WAITING, CannotFit, Scheduler, Sequence
from scheduler_shadow import Shadow


def shadow(num_blocks=8, block_size=4, max_rows=3, chunk=8) -> Shadow:
    return Shadow(Scheduler(num_blocks, block_size, max_rows, chunk))


class Machine(RuleBasedStateMachine):
    """Any order of arrivals, steps with guesses, and cancellations; few blocks, so that preemption is the rule."""

    @initialize(
        num_blocks=st.integers(1, 12),
        block_size=st.sampled_from([1, 2, 4, 8]),
        max_rows=st.integers(1, 4),
        chunk=st.sampled_from([1, 3, 8, 50]),
    )
    def begin(self, num_blocks, block_size, max_rows, chunk):
        self.shadow = shadow(num_blocks, block_size, max_rows, chunk)

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20), wanted=st.integers(1, 12), shares=st.booleans())
    def arrive(self, prompt, wanted, shares):
        self.shadow.add(prompt, wanted, shares)

    @precondition(lambda self: self.shadow.sequences)
    @rule(data=st.data(), extra=st.lists(st.integers(0, 1), max_size=3), wanted=st.integers(1, 12))
    def arrive_like_another(self, data, extra, wanted):
        other = data.draw(st.sampled_from(self.shadow.sequences))
        self.shadow.add(other.tokens + extra, wanted)

    @rule(seed=st.integers(0, 1 << 16))
    def step_with_guesses(self, seed):
        self.shadow.step(random.Random(seed))

    @rule(count=st.integers(1, 5))
    def steps(self, count):
        for _ in range(count):
            self.shadow.step()

    @precondition(lambda self: self.shadow.sequences)
    @rule(data=st.data())
    def cancel(self, data):
        self.shadow.cancel(data.draw(st.sampled_from(self.shadow.sequences)))

    @invariant()
    def blocks_are_owned_rightly(self):
        if hasattr(self, "shadow"):
            self.shadow.check_owners()

    def teardown(self):
        if hasattr(self, "shadow"):
            self.shadow.drain()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))


def drive(seed: int, steps: int) -> Shadow:
    """`steps` scheduler steps of random traffic, then to the end."""
    choose = random.Random(seed)
    run = shadow(choose.randint(1, 40), choose.choice((1, 2, 4, 16)), choose.randint(1, 8), choose.choice((1, 4, 16, 64)))
    beginnings = [[choose.randrange(3) for _ in range(choose.randint(1, 40))] for _ in range(3)]
    rate = choose.choice((0.05, 0.2, 0.6))
    while run.steps < steps:
        if choose.random() < rate and len(run.sequences) < 20:
            prompt = choose.choice(beginnings)[: choose.randint(1, 40)] + [choose.randrange(3) for _ in range(choose.randint(0, 4))]
            run.add(prompt, choose.randint(1, 20), choose.random() < 0.9)
        if run.sequences and choose.random() < 0.02:
            run.cancel(choose.choice(run.sequences))
        run.step(choose)
    run.drain()
    return run


def test_random_traffic():
    runs = [drive(seed, 150) for seed in range(40)]
    assert sum(run.finished for run in runs) > 300
    assert sum(run.scheduler.preemptions for run in runs) > 100 and sum(run.copies for run in runs) > 30


# A case is 2,000 steps, so that 5 million are 2,500 cases.
@pytest.mark.campaign(weight=2)
def test_scheduler_steps(campaign):
    for seed in campaign:
        drive(seed, 2000)


# -- one subject each -----------------------------------------------------------------------------------------------------------


def work_of(run: Shadow) -> list[tuple[int, int]]:
    """(begin, end) of each work of the next step, without running it."""
    return [(w.begin, w.end) for w in run.scheduler.plan().work]


def test_prompts_run_in_chunks_beside_decoding():
    run = shadow(num_blocks=40, chunk=8)
    run.add([0] * 3, 9, shares=False)
    run.step()
    run.add([1] * 20, 2, shares=False)
    run.step()
    assert [s.cached for s in run.sequences] == [4, 7]
    run.step()
    run.step()
    assert [s.cached for s in run.sequences] == [6, 20]
    run.drain()


def test_blocks_are_taken_as_a_text_grows_not_before():
    run = shadow(num_blocks=1000, block_size=4)
    sequence = run.add([0], 3000)
    for tokens in range(1, 30):
        run.step()
        assert sequence.cached == tokens and run.scheduler.pool.in_use == -(-tokens // 4)
    run.cancel(sequence)
    assert run.scheduler.pool.in_use == 0


def test_what_can_never_fit_is_refused_with_the_number_of_tokens_that_would():
    scheduler = Scheduler(8, 4, 2, 8)
    with pytest.raises(CannotFit, match="needs a cache of 33 tokens, and 32 fit") as caught:
        scheduler.add(Sequence([0] * 30, 33))
    assert caught.value.tokens_that_fit == 32 and not scheduler.waiting
    scheduler.add(Sequence([0] * 30, 32))


def test_equal_beginnings_are_computed_once():
    run = shadow(num_blocks=200, block_size=4, max_rows=10, chunk=16)
    prefix = [random.Random(0).randrange(3) for _ in range(64)]
    sequences = [run.add(prefix + [i % 3, i // 3], 1) for i in range(9)]
    computed = 0
    while run.sequences:
        before = {s: s.cached for s in run.sequences}
        reused = {s: s.reused for s in run.sequences}
        run.step()
        computed += sum(len(s.tokens) - 1 if s.state is DONE else s.cached for s in before) - sum(before.values())
        computed -= sum(s.reused - reused[s] for s in before)
    assert [s.reused for s in sequences] == [0] + [64] * 8
    assert computed == 66 + 8 * 2


def test_samples_of_one_prompt_share_the_block_in_progress_and_copy_it_on_write():
    run = shadow(num_blocks=40, block_size=4, max_rows=4, chunk=32)
    first = run.add([0, 1, 2, 0, 1, 2, 1], 6)
    run.step()
    second = run.add([0, 1, 2, 0, 1, 2, 1], 6)
    run.step()
    assert second.reused == 6 and first.blocks[0] == second.blocks[0] and first.blocks[1] != second.blocks[1]
    assert run.copies == 1
    run.drain()


def test_a_prompt_that_is_cached_whole_computes_its_last_token_in_a_copy():
    run = shadow(num_blocks=10, block_size=4)
    run.add([0, 1, 2, 0, 1, 2, 1, 0], 1)
    run.drain()
    again = run.add([0, 1, 2, 0, 1, 2, 1, 0], 1)
    run.step()
    assert again.state is DONE and again.reused == 7 and run.copies == 1


def test_a_cached_prompt_that_fills_the_whole_cache_leaves_no_room_for_a_copy():
    run = shadow(num_blocks=2, block_size=4)
    for _ in range(2):
        run.add([0, 1, 2, 0, 1, 2, 1, 0], 1)
        run.drain()
    assert run.copies == 0


def test_the_last_to_come_gives_way_and_comes_back_first():
    run = shadow(num_blocks=5, block_size=2, max_rows=3, chunk=100)
    first, second, third = (run.add([i], 7, shares=False) for i in range(3))
    for _ in range(3):
        run.step()
    assert first.state is RUNNING and third.preemptions == 1 and list(run.scheduler.waiting) == [third]
    assert third.tokens[:1] == [2] and len(third.tokens) == 3 and third.cached == 0, "what was drawn stays drawn"
    run.drain()
    assert first.preemptions == 0


def test_a_guess_does_not_take_anothers_blocks():
    run = shadow(num_blocks=3, block_size=2, max_rows=2)
    first, second = run.add([0], 6, shares=False), run.add([1], 6, shares=False)
    run.step()
    run.scheduler.pool.take()  # the last one
    first.drafts = [0, 0]
    assert work_of(run) == [(1, 2), (1, 2)]
    assert second.state is RUNNING


@pytest.mark.parametrize("stage", ["waiting", "in its prompt", "drawing", "preempted", "done"])
def test_cancelling_at_every_stage(stage):
    run = shadow(num_blocks=5, block_size=2, max_rows=2, chunk=2)
    other = run.add([0, 0, 0], 8, shares=False)
    run.step()
    run.step()
    sequence = run.add([1, 1, 1], 5, shares=False)
    until = {
        "waiting": lambda: True,
        "in its prompt": lambda: 0 < sequence.cached < 3,
        "drawing": lambda: len(sequence.tokens) > 3,
        "preempted": lambda: sequence.preemptions > 0,
        "done": lambda: sequence.state is DONE,
    }[stage]
    for _ in range(30):
        if until():
            break
        run.step()
    assert until()
    if stage == "done":
        run.scheduler.cancel(sequence)
    else:
        run.cancel(sequence)
    assert sequence.state is DONE and not sequence.blocks
    run.check_owners()
    run.drain()
    assert other.state is DONE


def test_waiting_sequences_run_in_the_order_of_arrival():
    run = shadow(num_blocks=6, block_size=2, max_rows=6)
    large, small = run.add([0] * 10, 1, shares=False), run.add([1] * 8, 1, shares=False)
    tiny = run.add([1], 1, shares=False)
    run.step()
    assert (large.state, small.state, tiny.state) == (RUNNING, WAITING, WAITING), "the small one behind must not overtake"
    run.drain()


# -- content --------------------------------------------------------------------------------------------------------------------


def test_equal_hashes_are_not_equal_texts():
    twin = (1 << 61) - 1 + 5
    assert hash((5, 6)) == hash((twin, 6))
    pool = BlockPool(4, 2)
    pool.register(pool.take(), NO_PARENT, [5, 6])
    assert pool.find([twin, 6]) == ([], []) and len(pool.find([5, 6])[0]) == 1


def test_content_is_found_only_behind_its_own_beginning():
    pool = BlockPool(6, 2)
    a, b, c = pool.take(), pool.take(), pool.take()
    serial = pool.register(a, NO_PARENT, [1, 2])
    pool.register(b, serial, [3, 4])
    pool.register(c, NO_PARENT, [3, 4])
    assert pool.find([1, 2, 3, 4, 5])[0] == [a, b] and pool.find([3, 4, 3, 4])[0] == [c]


def test_a_block_that_lost_its_content_takes_its_followers_with_it():
    pool = BlockPool(2, 1)
    a, b = pool.take(), pool.take()
    pool.register(b, pool.register(a, NO_PARENT, [1]), [2])
    pool.release(a)
    assert pool.take() == a
    # The same content again has another serial, so what once followed it is not taken for its follower.
    pool.register(a, NO_PARENT, [1])
    assert pool.find([1, 2])[0] == [a]


def test_idle_content_goes_oldest_first_and_ends_before_beginnings():
    run = shadow(num_blocks=4, block_size=2, chunk=100)
    run.add([0, 1, 0, 1, 0], 2)
    run.drain()
    run.add([2] * 5, 1)
    run.drain()
    assert len(run.scheduler.pool.find([0, 1, 0, 1])[0]) == 1
