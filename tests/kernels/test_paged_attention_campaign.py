"""Random search over paged caches: block sizes, lengths at every boundary, mixed steps, shuffled tables, poison between tokens."""

import contextlib
import random
from unittest import mock

import pytest
import torch
from paged_cases import dense, make_case, offsets, rotary_tables, rotated
from psann_kernels import paged_append, paged_attention
from psann_kernels.paged_attention import ATTENTION
from witness import BACKENDS, FORWARD, Budget, assert_within_budget, judge, poisoned_allocations


@contextlib.contextmanager
def splits(least, most):
    """Triton's splits hold at least `least` keys, and there are at most `most`."""
    if "triton" not in ATTENTION.implementations:
        yield
        return
    from psann_kernels import paged_attention_triton

    with mock.patch.multiple(paged_attention_triton, MIN_SPLIT=least, MAX_SPLITS=most):
        yield


def draw(rng, dtype, values=0, is_float8=False):
    """A call of paged_attention of random shape, sometimes on a float8 cache if that may be;
    `values` numbers the draw of its values."""
    block_size = rng.choice([1, 8, 16, 64, 64, rng.randint(2, 40)])
    boundaries = [0, 1, block_size - 1, block_size, block_size + 1, block_size + 5, 2 * block_size, 3 * block_size]
    lengths = [rng.choice([*boundaries, rng.randint(0, 130)]) for _ in range(rng.randint(1, 4))]
    some = lambda length: min(rng.choice([0, 1, 1, 2, 8, 9, 15, 16, 17, 18, 200]), length)  # noqa: E731 (reads in the line below)
    new = [some(length) if length else rng.choice([0, 1, 2]) for length in lengths]  # of an empty sequence: padding
    options = rng.choice([(), ("pairs",), ("halves",)])
    options += tuple(option for option in ("window", "alibi", "scale") if rng.random() < 0.4)
    options += ("float8",) * (is_float8 and rng.random() < 0.25)
    return make_case(
        lengths, new, block_size=block_size, group=rng.choice([1, 1, 2, 3, 4, 8]), num_kv_heads=rng.choice([1, 1, 2, 3]),
        head_dim=rng.choice([2, 16, 24, 40, 64, 128]) if "pairs" in options or "halves" in options else rng.choice([1, 16, 33, 64]),
        dtype=dtype, junk=rng.choice([float("nan"), float("inf"), 1e30]), spare_columns=rng.choice([0, 1, 7]),
        seed=rng.getrandbits(32) + values, numbering=rng.getrandbits(32), options=options,
        window=rng.choice([1, 2, 16, 17, rng.randint(1, 130)]),
    )  # fmt: skip


def check_append(case, backend, rng):
    """The new tokens are taken out of the cache and appended again."""
    block_size = case.k_cache.shape[1]
    counts = case.cu_seqlens_q.diff().tolist()
    real = [min(n, length) for n, length in zip(counts, case.seq_lens.tolist())]  # of padding, none
    ends = case.seq_lens.tolist()
    position = torch.cat([torch.arange(end - n, end) for n, end in zip(real, ends)])
    owner = torch.repeat_interleave(torch.arange(len(ends)), torch.tensor(real))
    slots = case.block_table[owner, position // block_size].long() * block_size + position % block_size
    k, v = (torch.cat([t[len(t) - n :] for t, n in zip(tensors, real)]) for tensors in (case.keys, case.values))
    order = torch.randperm(len(slots), generator=torch.Generator().manual_seed(rng.getrandbits(32)))
    skipped = rng.randint(0, 2)  # tokens that are nobody's
    k, v = (torch.cat((t[order], t.new_zeros(skipped, *t.shape[1:]))) for t in (k, v))
    slot_mapping = torch.cat((slots[order], torch.full((skipped,), -1)))

    caches = [cache.clone() for cache in (case.k_cache, case.v_cache)]
    for cache in caches:
        cache[slots // block_size, slots % block_size] = 5.0
    paged_append(k, v, *caches, slot_mapping, backend=backend)
    for cache, expected in zip(caches, (case.k_cache, case.v_cache)):
        assert torch.equal(cache.nan_to_num(7.0), expected.nan_to_num(7.0)), "paged_append wrote something else"

    if "cos" in case.options and k.numel() >= 128:
        cos, sin = rotary_tables(500, k.shape[2], torch.promote_types(k.dtype, torch.float32))
        positions = torch.randint(0, 500, (len(k),), generator=torch.Generator().manual_seed(rng.getrandbits(32)))
        turned = [rotated(x, cos[positions], sin[positions], case.options["interleaved"])[: len(slots)] for x in (k, k.double())]
        options = dict(positions=positions, cos=cos, sin=sin, interleaved=case.options["interleaved"])
        paged_append(k, v, *caches, slot_mapping, **options, backend=backend)
        block, offset = slots[order] // block_size, slots[order] % block_size
        assert_within_budget("rotated k", caches[0][block, offset], *turned, FORWARD)


def check_company(case, backend, together, rng):
    """One of the sequences alone, with a table no wider than it needs: the same bits."""
    b = rng.randrange(len(case.seq_lens))
    start, stop = case.cu_seqlens_q[b : b + 2].tolist()
    blocks = -(-int(case.seq_lens[b]) // case.k_cache.shape[1])
    alone = paged_attention(
        case.q[start:stop], case.k_cache, case.v_cache, case.block_table[b : b + 1, :blocks], case.seq_lens[b : b + 1],
        offsets([stop - start]), **case.options, backend=backend,
    )  # fmt: skip
    assert torch.equal(alone, together[start:stop]), f"sequence {b} is different alone"


def check_capacity(case, backend):
    """A table filled to its last slot is served (by another sequence's blocks, whatever they hold); one token more raises."""
    capacity = case.block_table.shape[1] * case.k_cache.shape[1]
    q, table = case.q[:0], torch.zeros_like(case.block_table[:1])
    scales = {name: case.options[name] for name in ("k_scale", "v_scale") if name in case.options}
    for length in (capacity, capacity + 1):
        call = (q, case.k_cache, case.v_cache, table, torch.tensor([length]).int(), torch.zeros(2).int())
        with pytest.raises(ValueError, match="block_table has room for") if length > capacity else contextlib.nullcontext():
            paged_attention(*call, **scales, backend=backend)


def fill(budgets, seed, values, backend):
    """Pool random calls of one dtype until there are enough elements, and hold each to what needs no bound.

    The torch backend defines the op and is the witness of the others: it is held to dense() in float64."""
    rng = random.Random(seed)
    dtype = rng.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
    if backend == "torch":
        # It is the witness: in float32 its products with one row and dense()'s with many differ by 2.3 in the rounding of their
        # sums.
        dtype = torch.float64
    with splits(rng.choice([16, 16, 64, 256]), rng.choice([2, 4, 32])):
        elements = 0
        while elements < 128:  # a maximum over fewer means little
            case = draw(rng, dtype, values, is_float8=backend == "triton")
            if ATTENTION.refusal(backend, *case.arguments, **case.options) is not None:
                pytest.skip(f"{backend}: {ATTENTION.refusal(backend, *case.arguments, **case.options)}")
            with poisoned_allocations():
                o = paged_attention(*case.arguments, **case.options, backend=backend)
            if backend == "torch":
                torch.testing.assert_close(o, dense(case, o.dtype), rtol=1e-11, atol=1e-12)
            else:
                budget = budgets.setdefault("o", Budget(f"{backend} {dtype} o", FORWARD))
                truth = dense(case, torch.float64)
                # Two orders of summation that torch itself takes; their errors differ by 2.3 where sums are long.
                budget.add(o, dense(case, o.dtype), truth)
                budget.add(o, paged_attention(*case.arguments, **case.options, backend="torch"), truth)
            elements += o.numel()
            if "k_scale" not in case.options:
                check_append(case, backend, rng)
            check_company(case, backend, o, rng)
            check_capacity(case, backend)


@pytest.mark.campaign(weight=2)
@pytest.mark.parametrize("backend", BACKENDS)
def test_paged_attention_holds_its_bound(backend, campaign):
    for seed in campaign:
        judge(lambda budgets, values: fill(budgets, seed, values, backend))
