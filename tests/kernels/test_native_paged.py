"""What paged attention promises on a CPU beyond the reference's tests: bits that do not depend on neighbours, and safety."""

import math

import pytest
import torch
from psann_kernels import BackendError, native, paged_attention
from test_native import needs_native, paged_arguments

pytestmark = needs_native


def attend(arguments, **options):
    return paged_attention(*arguments, **options, backend="native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_gets_the_same_bits_alone(dtype):
    lengths, new = [300, 21, 9, 70], [1, 19, 4, 2]
    together = attend(paged_arguments(lengths, new, dtype))
    q, k_cache, v_cache, table, seq_lens, bounds = paged_arguments(lengths, new, dtype)
    for b, n in enumerate(new):
        rows = slice(int(bounds[b]), int(bounds[b + 1]))
        alone = attend((q[rows], k_cache, v_cache, table[b : b + 1], seq_lens[b : b + 1], torch.tensor([0, n], dtype=torch.int32)))
        assert torch.equal(together[rows], alone)


def test_renumbered_blocks_change_no_bit():
    q, k_cache, v_cache, table, seq_lens, bounds = paged_arguments([40, 17], [3, 1])
    order = torch.randperm(len(k_cache), generator=torch.Generator().manual_seed(5))
    moved = torch.where(table < len(order), torch.argsort(order)[table.clamp(max=len(order) - 1)].int(), table)
    expected = attend((q, k_cache, v_cache, table, seq_lens, bounds))
    assert torch.equal(attend((q, k_cache[order], v_cache[order], moved, seq_lens, bounds)), expected)


@pytest.mark.parametrize("tokens", [3, 18])
def test_a_later_tokens_nan_reaches_no_earlier_row(tokens):
    q, k_cache, v_cache, table, seq_lens, bounds = paged_arguments([40], [tokens])
    expected = attend((q, k_cache, v_cache, table, seq_lens, bounds))
    last = int(table[0, 39 // 8]), 39 % 8
    k_cache[last] = v_cache[last] = float("nan")
    got = attend((q, k_cache, v_cache, table, seq_lens, bounds))
    assert torch.equal(got[:-1], expected[:-1]) and got[-1].isnan().all()


INFINITY = float("inf")


# 300 keys are three splits of eight tiles or fewer; 18 new tokens are taken without splits.
@pytest.mark.parametrize("keys", [slice(0, 16), slice(0, 128), slice(130, 131), slice(282, 300), slice(0, 300)], ids=str)
@pytest.mark.parametrize("length, new", [(300, 1), (300, 18)])
@pytest.mark.parametrize("key", [-INFINITY, INFINITY, float("nan")])
@pytest.mark.parametrize("value", [0.5, INFINITY, float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_infinite_scores_count_as_in_the_reference(isa, dtype, value, key, length, new, keys):
    """A key of score -infinity has the weight 0, which makes NaN of a value that is not finite; a row of such keys alone is NaN."""
    q, k_cache, v_cache, table, seq_lens, bounds = paged_arguments([length], [new], dtype)
    q[..., 0] = 1.0
    t = torch.arange(length)[keys]
    slots = table[0, t // 8].long(), t % 8
    k_cache[(*slots, 0, 0)], v_cache[(*slots, 0, 0)] = key, value
    arguments = q, k_cache, v_cache, table, seq_lens, bounds
    tolerance = {} if dtype == torch.float32 else {"rtol": 2.0**-7, "atol": 2.0**-7}
    torch.testing.assert_close(attend(arguments), paged_attention(*arguments, backend="torch"), equal_nan=True, **tolerance)


@pytest.mark.parametrize("poison", [INFINITY, float("nan")])
@pytest.mark.parametrize("window", [1, 2, 7, 40])
@pytest.mark.parametrize("length, new", [(37, 1), (38, 1), (300, 1), (38, 2), (301, 3), (60, 17)])
@pytest.mark.parametrize("kv_heads, group", [(2, 1), (1, 4), (2, 5)])
def test_keys_and_values_before_the_window_are_not_used(isa, kv_heads, group, length, new, window, poison):
    """Windows begin and end at odd keys too, where keys are taken in twos."""
    shape = {"dtype": torch.bfloat16, "head_dim": 72, "kv_heads": kv_heads, "group": group}
    q, k_cache, v_cache, table, seq_lens, bounds = paged_arguments([length], [new], **shape)
    slopes = torch.linspace(0.1, 0.5, kv_heads * group)
    t = torch.arange(max(0, length - new - window + 1))
    arguments = q, k_cache, v_cache, table, seq_lens, bounds
    exact = [x.double() for x in arguments[:3]]
    expected = paged_attention(*exact, *arguments[3:], window=window, alibi_slopes=slopes.double(), backend="torch")
    slots = table[0, t // 8].long(), t % 8
    k_cache[slots] = v_cache[slots] = poison
    found = attend(arguments, window=window, alibi_slopes=slopes)
    torch.testing.assert_close(found.double(), expected, rtol=2.0**-7, atol=2.0**-7)


def with_growing_scores(length, new, dtype, kv_heads, group):
    """Arguments whose scores grow fourfold in each tile of 16 keys, so that a row's running maximum moves again and again."""
    q, k_cache, v_cache, table, seq_lens, bounds = paged_arguments([length], [new], dtype, 72, kv_heads, group)
    t = torch.arange(length)
    k_cache[table[0, t // 8].long(), t % 8, :, 0] = (t * (2 * math.log(2) / 16 * 72**0.5)).to(dtype).view(-1, 1)
    q[..., 0] = 1.0
    return q, k_cache, v_cache, table, seq_lens, bounds


@pytest.mark.parametrize("factor", [6.0, -0.1, float("nan")])
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("length, new", [(38, 2), (301, 3), (600, 4), (290, 18)])
@pytest.mark.parametrize("kv_heads, group", [(2, 1), (2, 2), (1, 4), (2, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_later_token_changes_no_bit_of_an_earlier_one(isa, dtype, kv_heads, group, length, new, window, factor):
    """Tokens of one sequence are attended to side by side; what one of them adds or asks must not round its elders otherwise."""
    q, k_cache, v_cache, table, seq_lens, bounds = with_growing_scores(length, new, dtype, kv_heads, group)
    before = attend((q, k_cache, v_cache, table, seq_lens, bounds), window=window)
    slot = int(table[0, (length - 1) // 8]), (length - 1) % 8
    for changed in (q[-1], k_cache[slot], v_cache[slot]):
        changed *= factor
    after = attend((q, k_cache, v_cache, table, seq_lens, bounds), window=window)
    assert torch.equal(after[:-1], before[:-1]) and not torch.equal(after[-1], before[-1])


@pytest.mark.parametrize("factor", [6.0, -0.1, float("nan")])
@pytest.mark.parametrize("length, new", [(38, 1), (301, 1), (600, 3)])
@pytest.mark.parametrize("kv_heads, group", [(4, 1), (2, 2), (1, 4), (2, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_changes_no_bit_of_another(isa, dtype, kv_heads, group, length, new, factor):
    """Whether it shares the other's keys or not."""
    q, *rest = with_growing_scores(length, new, dtype, kv_heads, group)
    before = attend((q, *rest))
    for head in range(kv_heads * group):
        changed = q.clone()
        changed[:, head] *= factor
        is_same = (attend((changed, *rest)) == before).all(-1).all(0)
        assert is_same.tolist() == [other != head for other in range(kv_heads * group)]


def test_denormals_of_bfloat16_count_at_most_as_zeros(isa):
    """The instruction that multiplies pairs of bfloat16 takes a denormal for 0."""
    q, k_cache, v_cache, table, seq_lens, bounds = paged_arguments([40], [1], torch.bfloat16)
    least = 2.0**-126  # that is no denormal
    arguments = q, k_cache * (least / 8), v_cache * (least / 8), table, seq_lens, bounds
    expected = paged_attention(*arguments, backend="torch")
    assert expected.any() and (attend(arguments) - expected).abs().max() < least


def test_a_cache_that_is_half_of_a_larger_tensor():
    q, k_cache, v_cache, table, seq_lens, bounds = paged_arguments([40, 17], [3, 1])
    both = torch.stack((k_cache, v_cache), 1)
    expected = attend((q, k_cache, v_cache, table, seq_lens, bounds))
    assert torch.equal(attend((q, both[:, 0], both[:, 1], table, seq_lens, bounds)), expected)
    with pytest.raises(BackendError, match="stride 2 along head_dim"):
        wide = torch.stack((k_cache, k_cache), -1)[..., 0]
        attend((q, wide, v_cache, table, seq_lens, bounds))


@pytest.mark.parametrize(
    "place, value, message",
    [
        (3, 10**6, r"block_table\[0, 0\] is 1000000, but the cache has blocks 0 to"),
        (3, -1, r"block_table\[0, 0\] is -1"),
        (4, 10**6, r"seq_lens\[0\] is 1000000, but block_table has room"),
        (4, 2, "has 3 new tokens and seq_lens 2"),
        (5, 7, "cu_seqlens_q runs from 7"),
    ],
)
def test_the_kernel_checks_what_it_would_follow(place, value, message):
    """Inside torch.compile nobody else looks at the values."""
    from psann_kernels.paged_attention_native import paged_attention_native

    arguments = list(paged_arguments([40, 17], [3, 1]))
    arguments[place] = arguments[place].clone()
    arguments[place].view(-1)[0] = value
    with pytest.raises(ValueError, match=f"paged_attention: .*{message}|{message}"):
        paged_attention_native(*arguments, None, None, True, 0.2, 0, None)


def test_append_checks_what_it_would_follow():
    from psann_kernels.paged_append_native import paged_append_native

    cache = torch.zeros(2, 4, 1, 8)
    k, tables = torch.ones(2, 1, 8), torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"slot_mapping\[1\] is 8; a slot is -1 \(skip\) or 0 to 7"):
        paged_append_native(k, k, cache, cache.clone(), torch.tensor([0, 8]), None, None, None, True)
    with pytest.raises(ValueError, match=r"positions\[0\] is 3, but cos and sin have rows 0 to 2"):
        paged_append_native(k, k, cache, cache.clone(), torch.tensor([0, 1]), torch.tensor([3, 0]), tables, tables, True)
    assert not cache.any(), "a refused call must not write"
