"""The gradients of rope_attention by Gluon without a GPU: the kernel's own source run by gluon_emulator.py."""

import math
import re
import sys

import pytest
import torch
from gluon_emulator import Deadlock, Hazard, Kernel
from psann_kernels import BackendError, self_test
from test_rope_attention import Case, run
from test_rope_attention_gluon import BACKWARD, BACKWARD_SOURCE, HOST, emulated, once  # noqa: F401 (one is a fixture)
from witness import FORWARD, GRADIENT, Budget, assert_within_budget, poisoned_allocations

pytest.importorskip("triton.experimental.gluon")
SELF_TEST = sys.modules["psann_kernels.self_test"]

CASES = [
    dict(tokens=64, head_dim=64, batch=2, heads=(2, 1)),
    dict(tokens=193, head_dim=64, heads=(3, 1), rotary="halves"),
    dict(tokens=70, head_dim=128, heads=(2, 2), rotary=None),
    dict(tokens=70, head_dim=64, keys=333),
    dict(tokens=3, head_dim=128, keys=257, heads=(4, 2)),
    dict(tokens=200, head_dim=64, keys=50),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_three_witnesses(emulated, dtype):  # noqa: F811
    budgets = [Budget(f"gluon {name}", FORWARD if name == "o" else GRADIENT) for name in ("o", "dq", "dk", "dv")]
    for arguments in CASES:
        case = Case(**arguments, dtype=dtype)
        tensors = (case.q, case.k, case.v, case.do)
        with poisoned_allocations():
            fast = run(case.call("gluon"), *tensors)
        plain, truth = run(case.formula(dtype), *tensors), run(case.formula(torch.float64), *(t.double() for t in tensors))
        for budget, *values in zip(budgets, fast, plain, truth):
            budget.add(*values)
    for budget in budgets:
        budget.check()


def test_one_token(emulated):  # noqa: F811
    # The weight is 1 whatever the scores are, so dq and dk are 0, and what is left of them is rounding.
    case = Case(1, 64, batch=2, heads=(2, 1), dtype=torch.bfloat16)
    tensors = (case.q, case.k, case.v, case.do)
    with poisoned_allocations():
        fast = run(case.call("gluon"), *tensors)
    plain, truth = run(case.formula(torch.bfloat16), *tensors), run(case.formula(torch.float64), *(t.double() for t in tensors))
    for name, other, *values in zip(("dq", "dk", "dv"), (case.k, case.q, None), fast[1:], plain[1:], truth[1:]):
        assert_within_budget(f"gluon {name}", *values, GRADIENT, 0.0 if other is None else case.floor(other))


class Known:
    """A call whose forward is computed by the formula, and its gradients in float64."""

    def __init__(self, *arguments, **options):
        self.case = case = Case(*arguments, **options, rotary=None, dtype=torch.bfloat16)
        q, k, v = (t.double() for t in (case.q, case.k, case.v))
        o, *self.truth = run(case.formula(torch.float64), q, k, v, case.do.double())
        scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)) * case.scale
        lse = torch.where(case.seen()[0].unsqueeze(1), scores, -math.inf).logsumexp(-1) / math.log(2)
        self.o, self.lse = o.bfloat16().contiguous(), torch.where(lse == -math.inf, math.inf, lse).float()

    def gradients(self, monkeypatch, seed=0, edit=lambda source: source):
        case = self.case
        monkeypatch.setattr(BACKWARD, "_kernel", lambda: Kernel(BACKWARD_SOURCE, "backward_kernel", seed, edit))
        with poisoned_allocations():
            return BACKWARD.rope_attention_gluon_backward(
                case.do, case.q, case.k, case.v, self.o, self.lse, None, None, True, case.scale
            )

    def error(self, gradients):
        return max((a.double() - b).abs().max().item() for a, b in zip(gradients, self.truth))


@pytest.fixture(scope="module")
def known():
    return Known(130, 64, keys=260, heads=(2, 1))


def test_any_order_gives_the_same_bits(emulated, monkeypatch, known):  # noqa: F811
    # Several programs run beside each other, begun in any order: what they add to one tile of dQ is added in one order.
    first = known.gradients(monkeypatch)
    for seed in range(1, 8):
        assert all(torch.equal(a, b) for a, b in zip(first, known.gradients(monkeypatch, seed))), f"seed {seed}"


def test_tensors_in_awkward_memory(emulated, monkeypatch):  # noqa: F811
    known = Known(70, 64, heads=(2, 1))
    expected = known.gradients(monkeypatch)
    case = known.case
    apart = torch.full((1, 2, 75, 67), float("nan"), dtype=torch.bfloat16)
    apart[:, :, 2:72, 3:] = case.do.transpose(1, 2)
    case.do = apart[:, :, 2:72, 3:].transpose(1, 2)
    case.q, case.k, case.v = (torch.cat((t, t * float("nan")), 1)[:, :70] for t in (case.q, case.k, case.v))
    assert all(torch.equal(a, b) for a, b in zip(known.gradients(monkeypatch), expected))
    case.do = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16).expand(case.q.shape)
    assert all(torch.isfinite(t).all() for t in known.gradients(monkeypatch))


TAKE_TURNS = '        while done != before:\n            done = gl.atomic_add(counter, 0, sem="acquire", scope="gpu")\n'
FAULTS = {
    "keys and values are not waited for": once("    mbarrier.wait(kv_ready.index(0), 0)\n", ""),
    "queries are not waited for": once("        mbarrier.wait(q_ready.index(slot), phase)\n", ""),
    "dO is not waited for": once("        mbarrier.wait(do_ready.index(slot), phase)\n", ""),
    "the rows are not waited for": once("        mbarrier.wait(rows_ready.index(slot), phase)\n", ""),
    "the producer does not wait for free slots": once("        mbarrier.wait(free.index(slot), phase)\n", ""),
    "the producer waits for the other phase": once("(t // STAGES + 1) & 1", "(t // STAGES) & 1"),
    "the consumers wait for the other phase": once("phase = (t // STAGES) & 1", "phase = (t // STAGES + 1) & 1"),
    "slots are never freed": once("        mbarrier.arrive(free.index(slot))\n", ""),
    "one consumer frees for both": once(
        "mbarrier.init(free.index(slot), count=CONSUMERS)", "mbarrier.init(free.index(slot), count=1)"
    ),
    "a slot is freed before its products are waited for": lambda source: once(
        "        dv, dk, weights, grads = warpgroup_mma_wait(CONSUMERS",
        "        mbarrier.arrive(free.index(slot))\n        dv, dk, weights, grads = warpgroup_mma_wait(CONSUMERS",
    )(once("        mbarrier.arrive(free.index(slot))\n", "")(source)),
    "the rows of dQ are read after they were freed": lambda source: once(
        "        mbarrier.wait(turn.index(0), t & 1)\n",
        "        row = dq_ring.index(slot).load(gl.SliceLayout(1, q_layout)).to(gl.int64)\n"
        "        mbarrier.wait(turn.index(0), t & 1)\n",
    )(once("        row = dq_ring.index(slot).load(gl.SliceLayout(1, q_layout)).to(gl.int64)\n", "")(source)),
    "the wait leaves the scores under way": once("s = warpgroup_mma_wait(1, deps=[s])", "s = warpgroup_mma_wait(2, deps=[s])"),
    "the wait leaves dP under way": once("dp = warpgroup_mma_wait(1, deps=[dp])", "dp = warpgroup_mma_wait(2, deps=[dp])"),
    "the wait leaves dQ under way": once("dq = warpgroup_mma_wait(0, deps=[dq])", "dq = warpgroup_mma_wait(1, deps=[dq])"),
    "the registers of dS are not kept": once(
        "dv, dk, weights, grads = warpgroup_mma_wait(CONSUMERS, deps=[dv, dk, weights, grads])",
        "dv, dk, weights = warpgroup_mma_wait(CONSUMERS, deps=[dv, dk, weights])",
    ),
    "dS is not fenced": once("        fence_async_shared()\n", ""),
    "dS is fenced after it was announced": once(
        "        fence_async_shared()\n        mbarrier.arrive(ds_ready.index(0))\n",
        "        mbarrier.arrive(ds_ready.index(0))\n        fence_async_shared()\n",
    ),
    "the other's dS is not waited for": once("        mbarrier.wait(ds_ready.index(0), t & 1)\n", ""),
    "dS is overwritten while it is read": once("        mbarrier.wait(ds_free.index(0), (t + 1) & 1)\n", ""),
    "dS is freed before dQ is waited for": once(
        "        dq = warpgroup_mma_wait(0, deps=[dq])\n        mbarrier.arrive(ds_free.index(0))\n",
        "        mbarrier.arrive(ds_free.index(0))\n        dq = warpgroup_mma_wait(0, deps=[dq])\n",
    ),
    "dQ leaves out the other's keys": once("use_acc=part > 0, is_async=True)\n", "use_acc=False, is_async=True)\n"),
    "both consumers make the same columns of dQ": once("slice(PART * COLUMNS, COLUMNS, 1)", "slice(0, COLUMNS, 1)"),
    "the turn is not waited for": once("        mbarrier.wait(turn.index(0), t & 1)\n", ""),
    "nobody waits for the programs before": once(TAKE_TURNS, ""),
    "the programs before are one too few": once("        while done != before:\n", "        while done < before - 1:\n"),
    "the first keys add first": once("// BLOCK_N - kv_tile\n", "// BLOCK_N * 0 + kv_tile\n"),
    "the turn is passed on before the additions are done": once("        mbarrier.wait(added.index(0), t & 1)\n", ""),
    "the turn is passed on without a release": once('counter, 1, sem="release"', 'counter, 1, sem="relaxed"'),
    "the turn is taken without an acquire": lambda source: source.replace('0, sem="acquire"', '0, sem="relaxed"'),
    "the turn is never passed on": once('        gl.atomic_add(counter, 1, sem="release", scope="gpu")\n', ""),
    "programs are numbered as they are, not as they start": once(
        'program = gl.atomic_add(counter_ptr, 1, sem="relaxed", scope="gpu")', "program = gl.program_id(0)"
    ),
    "each head of a group takes the counters of the first": once("counter_ptr + t + t // tiles * first", "counter_ptr + t % tiles"),
    "the mask shows one key more": once("row[:, None] <= sight[None, :]", "row[:, None] <= sight[None, :] + 1"),
    "the mask hides the query's own key": once("row[:, None] <= sight[None, :]", "row[:, None] < sight[None, :]"),
    "the second consumer's mask is the first one's": once(
        "row = PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, s", "row = gl.arange(0, ROWS, gl.SliceLayout(1, s"
    ),
    "delta is ignored": once("(dp - delta[None, :])", "dp"),
    "the first tile of queries is left out": once(
        "    first = gl.maximum(n - shift, 0) // BLOCK_M\n", "    first = gl.maximum(n - shift, 0) // BLOCK_M + (n > 0)\n"
    ),
    "every head of the group is the first": once("        h = kv_head * group + t // tiles\n", "        h = kv_head * group\n"),
    "every head's delta is the first one's": once("        at = (row + t // tiles)", "        at = row + 0 * (t // tiles)"),
    "one consumer walks only the first head of a group": once(
        "group * tiles, softmax_scale, gl.constexpr(0)", "tiles, softmax_scale, gl.constexpr(0)"
    ),
    "only the first head of a group is walked": lambda source: source.replace("group * tiles", "tiles"),
    "dQ of every head goes to the first": once(".store((row + t // tiles) * (", ".store(row * ("),
}


def finding(monkeypatch, known, edit):
    """What four interleavings of a kernel show: "" or the first trouble."""
    for seed in range(4):
        try:
            error = known.error(known.gradients(monkeypatch, seed, edit))
        except Hazard as hazard:
            return f"{type(hazard).__name__}: {hazard}"
        if not error < 0.05:
            return f"wrong by {error}"
    return ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(emulated, monkeypatch, known, fault):  # noqa: F811
    assert finding(monkeypatch, known, FAULTS[fault])


def test_nothing_is_found_in_the_kernel_itself(emulated, monkeypatch, known):  # noqa: F811
    assert finding(monkeypatch, known, lambda source: source) == ""


def test_an_addition_out_of_turn_is_named(emulated, monkeypatch, known):  # noqa: F811
    with pytest.raises(Hazard, match="an element is added to without knowing of the addition before"):
        known.gradients(monkeypatch, 0, FAULTS["nobody waits for the programs before"])
    with pytest.raises(Deadlock, match="partition 3 of program . waits for element . of a counter to change from 0"):
        known.gradients(monkeypatch, 0, FAULTS["the turn is never passed on"])


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("delta is ignored", "gradient of q is wrong"),
        ("the mask shows one key more", "gradient of . is wrong"),
        ("the turn is never passed on", "Deadlock"),
    ],
)
def test_wrong_gradients_do_not_pass_the_self_test(emulated, monkeypatch, tmp_path, fault, reason):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(SELF_TEST, "_cases", lambda: [])
    monkeypatch.setattr(SELF_TEST, "GLUON_SHAPES", ((64, 20, 140),))
    monkeypatch.setattr(BACKWARD, "_kernel", lambda: Kernel(BACKWARD_SOURCE, "backward_kernel", 0, FAULTS[fault]))
    assert re.search(reason, self_test("cpu", gluon=True)["rope_attention by gluon"])
    case = Case(5, 64, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match=reason):
        case.call("gluon")(case.q, case.k, case.v)


def test_gradients_that_change_do_not_pass_the_self_test(emulated, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(SELF_TEST, "_cases", lambda: [])
    monkeypatch.setattr(SELF_TEST, "GLUON_SHAPES", ((64, 20, 140),))
    twin, calls = BACKWARD.rotated, []

    def unsteady(x, *others):
        calls.append(x)
        return twin(x * (1 + 2**-7 * (len(calls) > 6)), *others)

    monkeypatch.setattr(BACKWARD, "rotated", unsteady)
    assert "has other bits in another run" in self_test("cpu", gluon=True)["rope_attention by gluon"]


def test_opcheck(emulated):  # noqa: F811
    case = Case(5, 64, heads=(2, 1), dtype=torch.bfloat16)
    o, lse, k = HOST.rope_attention_gluon(case.q, case.k, case.v, *case.tables, True, case.scale)
    arguments = (case.do, case.q, k, case.v, o, lse, *case.tables, True, case.scale)
    torch.library.opcheck(BACKWARD.rope_attention_gluon_backward, arguments)
