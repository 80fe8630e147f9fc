"""The CUDA kernels, run on a CPU by cuda_emulator.h: right in the three witnesses' budget, in any order of their threads, within
their memory. What hardware alone can show (its exp2, its contractions, its memory model between blocks) is left to a GPU.
"""

import platform
import re
from random import Random

import guard_pages
import pytest
import test_damped_sine
import test_damped_sine_bound
import test_paged_attention
import test_paged_attention_campaign
import test_rms_norm
import test_wave_conv
import torch
from bad_cuda_kernels import FAULTS
from cuda_emulated import COMPILER, CSRC, ORDERS, Gpu, build, emulated
from paged_cases import dense, make_case
from psann_kernels import damped_sine, native, paged_append, paged_attention, rms_norm, wave_conv
from psann_kernels.damped_sine import MODES
from sine_bound import draw_case
from test_native import draw, gradients
from test_rms_norm import DTYPES
from witness import FORWARD, Budget, judge, poisoned_allocations

X86 = platform.machine().lower() in ("x86_64", "amd64")

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="g++ is not installed"),
    pytest.mark.skipif(not CSRC.is_dir(), reason="csrc is not beside the tests"),
    pytest.mark.skipif(native.NATIVE is None, reason=native.WHY_NOT),
]


@pytest.fixture(scope="module")
def emulator():
    return Gpu(build())


@pytest.fixture
def gpu(emulator):
    emulator.order("ascending")
    with emulated(emulator):
        yield emulator


def check_damped_sine(dtypes=DTYPES):
    for dtype in dtypes:
        for mode in MODES:
            test_damped_sine.test_three_witnesses("native", dtype, mode)
    test_damped_sine.test_memory_layout_does_not_matter("native")
    test_damped_sine.test_special_values("native")
    # More rows than a grid has blocks for them, and than a sum has blocks.
    z, *parameters, dy = test_damped_sine.inputs((9000,), 1, torch.float32)
    case = test_damped_sine_bound.draw_case(Random(0))
    case.z, case.parameters, case.dy, case.mode = z, tuple(parameters), dy, "abs"
    test_damped_sine_bound.check("native", case)


def check_rms_norm(dtypes=DTYPES):
    for dtype in dtypes:
        for has_residual in (False, True):
            test_rms_norm.test_three_witnesses("native", "as shipped", dtype, has_residual, None)
    for check in (
        test_rms_norm.test_memory_layout_does_not_matter, test_rms_norm.test_special_values_stay_in_their_row,
        test_rms_norm.test_a_batch_equals_its_rows,
    ):  # fmt: skip
        check("native", "as shipped", None)
    test_rms_norm.test_one_of_two_outputs_may_go_unused("native")
    # More rows than a sum has blocks, and features than a block has threads.
    for shape in ((1100, 3), (3, 600)):
        budgets = {}
        x, residual, weight, *grads = test_rms_norm.inputs(shape, torch.float32)
        test_rms_norm.pool(budgets, test_rms_norm.NAMES[True], "native", (x, weight, residual), grads)
        for budget in budgets.values():
            budget.check()


def check_wave_conv(dtypes=DTYPES):
    for dtype in dtypes:
        test_wave_conv.test_three_witnesses("native", dtype, None)
    test_wave_conv.test_weights_in_half_precision("native", None)
    for check in (
        test_wave_conv.test_packed_documents_equal_documents_alone, test_wave_conv.test_rows_begin_documents,
        test_wave_conv.test_memory_layout_does_not_matter,
    ):  # fmt: skip
        check("native", None)
    for call in (test_wave_conv.CALLS[0], test_wave_conv.CALLS[3], test_wave_conv.CALLS[4]):
        test_wave_conv.test_nothing_sees_the_future_or_another_document("native", call, None)
    for kernel_size, dilation in ((4, 1), (2, 30)):
        test_wave_conv.test_streaming_equals_the_whole("native", kernel_size, dilation)
    test_wave_conv.test_decoding_equals_the_whole("native")
    test_wave_conv.test_tokens_after_the_end_do_not_exist("native")
    # Several runs of tokens, and of features.
    budgets = {}
    test_wave_conv.pool(budgets, "native", *test_wave_conv.inputs(((2, 210, 140), None, 3, 5, True, True, "abs"), torch.float32))
    for budget in budgets.values():
        budget.check()


def check_append():
    for dtype in DTYPES:
        for rotary in ("none", "pairs", "halves"):
            test_paged_attention.test_append_writes_the_named_slots_and_no_other("native", dtype, rotary)
    test_paged_attention.test_append_of_nothing("native")


def check_skipped():
    """A token of slot -1 is written nowhere: the caches are whole pages between unreadable ones."""
    with guard_pages.Guard(Random(0), False) as guard:
        caches = [guard.place(torch.zeros(2, 16, 4, 16)) for _ in range(2)]
        paged_append(torch.ones(2, 4, 16), torch.ones(2, 4, 16), *caches, torch.tensor([-1, 31]), backend="native")
        assert all(int(cache.sum()) == 64 and (cache[1, 15] == 1).all() for cache in caches)


def check_paged_attention(witnessed=test_paged_attention.WITNESSED):
    for dtype, options in witnessed:
        test_paged_attention.test_three_witnesses("native", dtype, options)
    for head_dim, group, num_kv_heads in ((1, 1, 1), (33, 8, 1), (128, 1, 2), (256, 5, 1)):
        test_paged_attention.test_head_dimensions_and_groups("native", head_dim, group, num_kv_heads)
    for check in (
        test_paged_attention.test_what_no_token_owns_is_never_read, test_paged_attention.test_renumbering_blocks_changes_nothing,
        test_paged_attention.test_company_changes_nothing, test_paged_attention.test_nothing_to_do,
        test_paged_attention.test_memory_layout_does_not_matter,
    ):  # fmt: skip
        check("native")
    test_paged_attention.test_appending_and_attending_in_steps_is_attention_of_the_whole("native", torch.float32, ("halves",))


def check_splits():
    """Lengths at the boundaries of splits of 256 keys, windows that leave splits empty, and a sequence of more than 64 splits."""
    for options, new, window in (
        ((), [1] * 7, 0),
        (("pairs", "window"), [1, 3, 16, 2, 0, 1, 1], 300),
        (("window", "alibi"), [16] * 5 + [1, 1], 7),
    ):
        budget = Budget(f"o {options}", FORWARD)
        case = make_case(
            [255, 256, 257, 512, 513, 1, 0], new, block_size=16, group=2, num_kv_heads=1, head_dim=8, options=options, window=window
        )
        with poisoned_allocations():
            budget.add(
                paged_attention(*case.arguments, **case.options, backend="native"),
                dense(case, torch.float32),
                dense(case, torch.float64),
            )
        budget.check()
    for length in (64 * 256, 64 * 256 + 1, 64 * 300 - 7):
        case = make_case([length, 3], [2, 1], block_size=64, group=1, num_kv_heads=1, head_dim=4)
        with poisoned_allocations():
            o = paged_attention(*case.arguments, backend="native")
        torch.testing.assert_close(o.double(), dense(case, torch.float64), rtol=0, atol=1e-6)


def check_padding():
    """Rows of q past the last sequence become 0."""
    from psann_kernels.paged_attention_native import paged_attention_native

    case = make_case([5, 9], [1, 2], block_size=4, group=2, num_kv_heads=2, head_dim=8)
    expected = paged_attention(*case.arguments, backend="native")
    q = torch.cat((case.q, case.q, case.q))
    with poisoned_allocations():
        o = paged_attention_native(q, *case.arguments[1:], None, None, True, 8**-0.5, 0, None)
    assert torch.equal(o[:3], expected) and (o[3:] == 0).all(), "a row that no sequence owns is not zero"


def check_many_sequences(count=70_000):
    """More sequences than a grid is high: one of three tokens, one without any, and so on."""
    lengths = torch.tensor([3, 0]).repeat(count // 2).int()
    table = (torch.arange(count).int() % 5)[:, None].contiguous()
    g = torch.Generator().manual_seed(0)
    k_cache, v_cache = (torch.randn(5, 4, 1, 1, generator=g) for _ in range(2))
    q = torch.randn(count, 1, 1, generator=g)
    with poisoned_allocations():
        o = paged_attention(q, k_cache, v_cache, table, lengths, torch.arange(count + 1).int(), backend="native")
    k, v = (cache[table[:, 0].long(), :3, 0, 0].double() for cache in (k_cache, v_cache))
    expected = (torch.softmax(q[:, 0].double() * k, -1) * v).sum(-1) * (lengths > 0)
    torch.testing.assert_close(o[:, 0, 0].double(), expected, rtol=0, atol=1e-6)


def check_misaligned():
    for dtype in DTYPES:
        flat = torch.randn(4 * 64 + 1).to(dtype)
        one = torch.ones(64)
        for z in (flat[1:].view(4, 64), flat[:-1].view(4, 64), torch.cat((flat, flat))[: 4 * 65].view(4, 65)[:, :64]):
            assert torch.equal(
                damped_sine(z, one, one, one, backend="native"), damped_sine(z.clone(), one, one, one, backend="native")
            )


GUARDED = ("damped_sine", "rms_norm", "wave_conv", "paged_attention")


def check_guarded(distance, count=25, first=0):
    """Every tensor between unreadable pages; far: its rows past element 2^31."""
    for name in GUARDED:
        for seed in range(first, first + count):
            random = Random(seed)
            with guard_pages.Guard(random, distance == "far") as guard:
                guard_pages.CASES[name](random, guard, "native")


CHECKS = {
    "damped_sine": check_damped_sine,
    "rms_norm": check_rms_norm,
    "wave_conv": check_wave_conv,
    "append": check_append,
    "skipped": check_skipped,
    "paged_attention": check_paged_attention,
    "splits": check_splits,
    "padding": check_padding,
    "many_sequences": check_many_sequences,
    "misaligned": check_misaligned,
    "near": lambda: check_guarded("near"),
    "far": lambda: check_guarded("far"),
}


@pytest.mark.parametrize("check", CHECKS)
def test_right_and_within_its_memory(check, gpu):
    gpu.order("random", seed=1)
    CHECKS[check]()


def results():
    """Every kernel, over several blocks, warps and rows."""
    z, a, f, d = draw(300, 140), draw(140) + 1, draw(140).abs(), draw(140).abs() / 4
    yield from gradients(lambda *t: damped_sine(*t, backend="native"), z, a, f, d)
    yield from gradients(
        lambda x, w, r: rms_norm(x, w, residual=r, backend="native"), z.bfloat16(), draw(140), draw(300, 140, seed=3).bfloat16()
    )
    yield from gradients(
        lambda x, w, a, f, d: wave_conv(x, w, a, f, d, dilation=3, backend="native"), z[None], draw(140, 4), a, f, d
    )
    for options in (("pairs",), ("window", "alibi")):
        case = make_case([600, 21, 0], [3, 16, 1], block_size=8, options=options)
        yield paged_attention(*case.arguments, **case.options, backend="native")


def test_the_order_of_threads_changes_no_bit(gpu):
    expected = list(results())
    for order, seed in (("descending", 0), ("random", 1), ("random", 2)):
        gpu.order(order, seed)
        for got, e in zip(results(), expected, strict=True):
            assert torch.equal(got, e), order
    written = {
        f"{path.stem} {name}"
        for path in (CSRC / "cuda").glob("*.cu")
        for name in re.findall(r"__global__[^;{]*?\) (\w+)\(", path.read_text())
    }
    launched = gpu.launched() | {"paged_append append"}  # of check_append
    assert written == launched - {"cuda_probe probe"}, "a kernel that no test here runs"


def test_the_sine_keeps_its_bound(gpu):
    gpu.order("random", 3)
    for seed in range(60):
        test_damped_sine_bound.check("native", draw_case(Random(seed)))


def test_bad_indices_become_nan_and_touch_nothing(gpu):
    """What a CPU refuses, a kernel on a GPU only meets: the rows of such a sequence are NaN, and the others what they were."""
    from psann_kernels.paged_attention_native import paged_attention_native

    rest = (None, None, True, 0.5, 0, None)
    case = make_case([9, 5, 20], [2, 1, 3], block_size=4, group=2, num_kv_heads=1, head_dim=8, junk=0.0)
    expected = paged_attention_native(*case.arguments, *rest)
    changes = [
        (3, (1, 0), 10**6, slice(2, 3)), (3, (1, 1), -1, slice(2, 3)), (4, 1, 10**6, slice(2, 3)), (4, 1, -1, slice(2, 3)),
        (4, 2, 2, slice(3, 6)), (5, 3, 7, slice(3, 6)), (5, 3, 2**31 - 1, slice(3, 6)),
    ]  # fmt: skip
    for place, index, value, bad in changes:
        with guard_pages.Guard(Random(0), False) as guard:
            arguments = list(case.arguments)
            arguments[place] = arguments[place].clone()
            arguments[place][index] = value
            with guard.allocations():
                o = paged_attention_native(*(guard.place(t) for t in arguments), *rest).clone()
        good = torch.ones(len(o), dtype=torch.bool)
        good[bad] = False
        assert o[bad].isnan().all() and torch.equal(o[good], expected[good]), (place, index, value)


def test_scores_past_float32_are_the_specifications(gpu):
    case = make_case([5], [1], block_size=4, group=1, num_kv_heads=1, head_dim=2)
    for first, second in ((-1e30, 1.0), (1.0, -1e30), (-1e30, -1e30), (1e30, 1.0)):
        q, k_cache = case.q.clone().fill_(1e30), case.k_cache.clone()
        k_cache[case.block_table[0, 0].long(), :2] = torch.tensor([first, second])[:, None, None]
        k_cache[case.block_table[0, 0].long(), 2:] = k_cache[case.block_table[0, 1].long(), 0] = -1e30
        got, truth = (paged_attention(q, k_cache, *case.arguments[2:], backend=b) for b in ("native", "torch"))
        torch.testing.assert_close(got, truth, equal_nan=True)


def test_halves_are_rounded_as_torch_rounds_them(gpu):
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    wide = gpu.convert(2, torch.arange(2**16, dtype=torch.int32)).view(torch.float32)
    torch.testing.assert_close(wide, halves.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(wide.signbit(), halves.signbit())
    g = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**31), 2**31, (200_000,), generator=g).int().view(torch.float32)
    edges = torch.tensor(
        [65519.0, 65520.0, -65536.0, 2.0**-25, -(2.0**-24), 1.5 * 2.0**-24, 0.0, -0.0, float("inf"), -float("inf"), float("nan")]
    )
    # Ties of both types, of normal and denormal halves.
    x = torch.cat(
        (drawn, drawn.clamp(-1e5, 1e5), wide * (1 + 2.0**-11), wide + 2.0**-25, wide.bfloat16().float() * (1 + 2.0**-8), edges)
    )
    for what, dtype in ((0, torch.bfloat16), (1, torch.float16)):
        got, expected = gpu.convert(what, x.view(torch.int32)).to(torch.int16), x.to(dtype)
        same = (got == expected.view(torch.int16)) | (got.view(dtype).isnan() & expected.isnan())
        assert same.all(), (dtype, x[~same][:5])


def test_warp_operations(gpu):
    def expected(t):
        lane, warp = t % 32, t // 32
        half = range(t - t % 16, t - t % 16 + 16)
        ballot = sum(1 << s % 32 for s in half if s % 3 == 0)
        up, down = (t - 3 if lane % 16 >= 3 else t), (t + 3 if lane % 16 < 13 else t)
        # A partner in a later group of lanes is out of reach; one in an earlier group is not.
        xor = t ^ 9 if (lane ^ 9) <= (lane | 7) else t
        signed = ballot - (1 << 32 if ballot >> 31 else 0)
        return [t - t % 8 + 5, up, down, xor, signed, warp, 1 - warp, t ^ 2 if lane % 2 else -1, (t ^ 1) ** 2]

    for order in ORDERS:
        gpu.order(order, 5)
        assert gpu.probe().tolist() == [expected(t) for t in range(64)]


@pytest.fixture(scope="module")
def faulty():
    return Gpu(build([fault for fault, _, _ in FAULTS]))


@pytest.mark.parametrize("number", range(1, len(FAULTS) + 1), ids=lambda n: f"{FAULTS[n - 1][0].file}-{n}")
def test_a_fault_is_found(number, faulty):
    _, check, says = FAULTS[number - 1]
    faulty.order("ascending")
    faulty.fault(number)
    try:
        with emulated(faulty), pytest.raises((AssertionError, RuntimeError), match=says):
            CHECKS[check]()
    finally:
        faulty.fault(0)


def check_random(op, seed, monkeypatch):
    if op == "damped_sine":
        test_damped_sine_bound.check("native", draw_case(Random(seed)))
    elif op == "paged_attention":
        judge(lambda budgets, values: test_paged_attention_campaign.fill(budgets, seed, values, "native"))
    else:
        module = {"rms_norm": test_rms_norm, "wave_conv": test_wave_conv}[op]
        judge(lambda budgets, values: module.fill(budgets, seed, values, "native", monkeypatch))
    random = Random(seed)
    with guard_pages.Guard(random, seed % 4 == 0) as guard:
        guard_pages.CASES[op](random, guard, "native")


@pytest.mark.campaign(weight=2)
@pytest.mark.parametrize("op", GUARDED)
def test_random_calls(op, gpu, campaign, monkeypatch):
    for seed in campaign:
        gpu.order("random", seed)
        check_random(op, seed, monkeypatch)


@pytest.mark.campaign(weight=1)
@pytest.mark.parametrize("op", GUARDED)
def test_random_calls_with_contracted_products(op, campaign, monkeypatch):
    """As nvcc contracts them: x * y + z in one rounding wherever the compiler sees both. The portable fibers run in it."""
    contracted = Gpu(build((), "-DPORTABLE_FIBERS", "-ffp-contract=fast", *(["-mfma"] if X86 else [])))
    with emulated(contracted):
        for seed in campaign:
            check_random(op, seed, monkeypatch)
