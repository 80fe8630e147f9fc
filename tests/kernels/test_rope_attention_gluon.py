"""rope_attention's Gluon forward without a GPU: run by gluon_emulator.py, refused where it is not proven. The gradients have
test_rope_attention_backward_gluon.py."""

import sys
from pathlib import Path

import psann_kernels
import pytest
import torch
from gluon_emulator import Deadlock, Hazard, Kernel
from psann_kernels import OPS, BackendError, explain, rope_attention, self_test
from test_rope_attention import Case
from witness import FORWARD, Budget, poisoned_allocations

pytest.importorskip("triton.experimental.gluon")
HOST = sys.modules.get("psann_kernels.rope_attention_gluon")
SELF_TEST = sys.modules["psann_kernels.self_test"]
BACKWARD = sys.modules.get("psann_kernels.rope_attention_backward_gluon")
SOURCE = Path(psann_kernels.__file__).with_name("rope_attention_kernel_gluon.py")
BACKWARD_SOURCE = Path(psann_kernels.__file__).with_name("rope_attention_backward_kernel_gluon.py")
CPU = torch.device("cpu")

CASES = [
    dict(tokens=1, head_dim=64, batch=2),
    dict(tokens=128, head_dim=64, batch=2, heads=(2, 1)),
    dict(tokens=257, head_dim=64, heads=(3, 1), rotary="halves"),
    dict(tokens=130, head_dim=128, rotary=None),
    dict(tokens=70, head_dim=64, keys=333, heads=(2, 2)),
    dict(tokens=1, head_dim=128, keys=256, heads=(4, 2)),
    dict(tokens=200, head_dim=64, keys=50),
]


@pytest.fixture
def emulated(monkeypatch):
    """set(seed, edit): the kernels as gluon_emulator runs them serve backend "gluon" on the CPU, the forward's spoilt by edit."""
    if OPS["rope_attention"].refusal("triton", *[torch.ones(1, 1, 1, 64)] * 3, softmax_scale=1.0) is not None:
        pytest.skip("without the interpreter no Triton kernel turns the queries of CPU tensors")
    monkeypatch.setattr(HOST, "refuses_device", lambda device: None)
    monkeypatch.setitem(HOST.VERDICTS, CPU, "passed")

    def set_kernel(seed=0, edit=lambda source: source):
        monkeypatch.setattr(HOST, "_kernel", lambda: Kernel(SOURCE, "forward_kernel", seed, edit))
        monkeypatch.setattr(BACKWARD, "_kernel", lambda: Kernel(BACKWARD_SOURCE, "backward_kernel", seed))

    set_kernel()
    return set_kernel


def outputs(case):
    """o and the log-sum-exp of a case, through the op itself, for what the public function does not give."""
    with poisoned_allocations(), torch.no_grad():
        return HOST.rope_attention_gluon(case.q, case.k, case.v, *case.tables, case.interleaved, case.scale)[:2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_three_witnesses(emulated, dtype):
    budget = Budget("gluon o", FORWARD)
    for arguments in CASES:
        case = Case(**arguments, dtype=dtype)
        with poisoned_allocations(), torch.no_grad():
            fast = case.call("gluon")(case.q, case.k, case.v)
        plain = case.formula(dtype)(case.q, case.k, case.v)
        budget.add(fast, plain, case.formula(torch.float64)(*(t.double() for t in (case.q, case.k, case.v))))
    budget.check()


def test_any_order_gives_the_same_bits(emulated):
    case = Case(300, 64, batch=1, heads=(2, 1), dtype=torch.bfloat16)
    first = outputs(case)
    for seed in range(1, 8):
        emulated(seed)
        assert all(torch.equal(a, b) for a, b in zip(first, outputs(case))), f"seed {seed}"


def test_queries_without_keys(emulated):
    case = Case(200, 64, keys=50, dtype=torch.bfloat16)
    o, lse = outputs(case)
    assert torch.equal(o[:, :150], torch.zeros_like(o[:, :150])) and (lse[..., :150] == float("inf")).all()
    assert lse[..., 150:].isfinite().all()


def test_tensors_in_awkward_memory(emulated):
    case = Case(70, 64, batch=2, heads=(2, 1), rotary=None, dtype=torch.bfloat16)
    expected = outputs(case)
    apart = torch.full((2, 3, 75, 67), float("nan"), dtype=torch.bfloat16)
    apart[:, :2, 2:72, 3:] = case.q.transpose(1, 2)
    case.q = apart[:, :2, 2:72, 3:].transpose(1, 2)
    case.k, case.v = (torch.cat((t, t * float("nan")), 1)[:, :70] for t in (case.k, case.v))
    assert all(torch.equal(a, b) for a, b in zip(outputs(case), expected))


def once(old, new, count=1):
    def edit(source):
        assert source.count(old) == count, f"{source.count(old)} times in the kernel: {old}"
        return source.replace(old, new)

    return edit


FAULTS = {
    "the first keys are not waited for": once("    mbarrier.wait(k_ready.index(0), 0)\n", ""),
    "queries are not waited for": once("    mbarrier.wait(q_ready.index(PART), 0)\n", ""),
    "values are not waited for": once("        mbarrier.wait(v_ready.index(before), ((t - 1) // STAGES) & 1)\n", ""),
    "the producer does not wait for free keys": once("        mbarrier.wait(k_free.index(slot), phase)\n", ""),
    "the producer does not wait for free values": once("        mbarrier.wait(v_free.index(slot), phase)\n", ""),
    "the producer waits for the other phase": once("(t // STAGES + 1) & 1", "(t // STAGES) & 1"),
    "the consumer waits for the other phase": once(
        "k_ready.index(slot), (t // STAGES) & 1", "k_ready.index(slot), (t // STAGES + 1) & 1"
    ),
    "keys are never freed": once("        mbarrier.arrive(k_free.index(slot))\n", ""),
    "values are never freed": once("        mbarrier.arrive(v_free.index(before))\n", ""),
    "one consumer frees for both": once(
        "mbarrier.init(k_free.index(slot), count=CONSUMERS)", "mbarrier.init(k_free.index(slot), count=1)"
    ),
    # (Of keys the same is no fault: the producer asks for the next ones after values that are freed later.)
    "values are freed before their product is waited for": once(
        "        acc, p = warpgroup_mma_wait(0, deps=[acc, p])\n        mbarrier.arrive(v_free.index(before))\n",
        "        mbarrier.arrive(v_free.index(before))\n        acc, p = warpgroup_mma_wait(0, deps=[acc, p])\n",
    ),
    "the wait leaves the scores under way": once("warpgroup_mma_wait(1, deps=[s])", "warpgroup_mma_wait(2, deps=[s])"),
    "the wait leaves the sum under way": once(
        "acc, p = warpgroup_mma_wait(0, deps=[acc, p])\n        ", "acc, p = warpgroup_mma_wait(1, deps=[acc, p])\n        "
    ),
    "the weights' registers are not kept": once(
        "acc, p = warpgroup_mma_wait(0, deps=[acc, p])\n        ", "acc = warpgroup_mma_wait(0, deps=[acc])\n        "
    ),
    "values are those of the scores": once("        before = (t - 1) % STAGES\n", "        before = t % STAGES\n"),
    "the last values' slot is one off": once("    slot = (steps - 1) % STAGES\n", "    slot = steps % STAGES\n"),
    "too few bytes are announced": once(
        "mbarrier.expect(v_ready.index(slot), BLOCK_N * D * 2)", "mbarrier.expect(v_ready.index(slot), BLOCK_N * D)"
    ),
    "the mask shows one key more": once("n[None, :] <= position[:, None]", "n[None, :] <= position[:, None] + 1"),
    "the mask hides the query's own key": once("n[None, :] <= position[:, None]", "n[None, :] < position[:, None]"),
    "one masked tile too few": once("gl.maximum(steps - full, 1)", "1"),
    "sums do not fade": once("        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, o_layout))[:, None]\n", ""),
    "the second consumer has the first one's rows": once("i0 = first + PART * ROWS", "i0 = first"),
    "queries' positions ignore older keys": once("position = i + (keys - queries)", "position = i"),
}


def finding(emulated, edit):
    """What four interleavings of a kernel show: "" or the first trouble."""
    case = Case(200, 64, keys=520, rotary=None, dtype=torch.bfloat16)
    truth = case.formula(torch.float64)(*(t.double() for t in (case.q, case.k, case.v)))
    for seed in range(4):
        emulated(seed, edit)
        try:
            o, _ = outputs(case)
        except Hazard as hazard:
            return str(hazard)
        error = (o.double() - truth).abs().max().item()
        if not error < 0.03:
            return f"wrong by {error}"
    return ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(emulated, fault):
    assert finding(emulated, FAULTS[fault])


def test_nothing_is_found_in_the_kernel_itself(emulated):
    assert finding(emulated, lambda source: source) == ""


def test_a_deadlock_says_who_waits(emulated):
    emulated(0, FAULTS["keys are never freed"])
    with pytest.raises(Deadlock, match="partition 2 of program . waits for phase"):
        outputs(Case(400, 64, dtype=torch.bfloat16))


# ---- who serves


def test_auto_never_takes_it(emulated):
    q = torch.ones(1, 2, 1, 64, dtype=torch.bfloat16)
    rows = {row["backend"]: row["serves"] for row in explain("rope_attention", q, q, q, softmax_scale=1.0)}
    assert rows["gluon"] == "yes"
    assert all("gluon" not in order for order in sys.modules["psann_kernels.registry"].AUTO_ORDER.values())


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (dict(dtype=torch.float32), "q is torch.float32; the Gluon kernel serves float16 and bfloat16"),
        (dict(head_dim=80), "head_dim is 80; the Gluon kernel serves 64 and 128"),
        (dict(keys=0), "needs a query and a key"),
        (dict(window=3), "window is given"),
        (dict(documents=[2, 3]), "cu_seqlens is given"),
        (dict(alibi=True), "alibi_slopes is given"),
    ],
    ids=str,
)
def test_what_it_does_not_serve_it_refuses(emulated, arguments, reason):
    case = Case(**(dict(tokens=5, head_dim=64, dtype=torch.bfloat16) | arguments))
    with pytest.raises(BackendError, match=reason):
        case.call("gluon")(case.q, case.k, case.v)


def test_a_window_that_hides_nothing_is_served(emulated):
    case = Case(5, 64, window=5, dtype=torch.bfloat16)
    assert torch.equal(case.call("gluon")(case.q, case.k, case.v), case.call("triton")(case.q, case.k, case.v))


def test_other_devices_and_versions_refuse(monkeypatch):
    q = torch.ones(1, 2, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match="the tensors are on cpu; the Gluon kernel is for NVIDIA GPUs of compute capability 9.0"):
        rope_attention(q, q, q, backend="gluon")
    assert "the tensors are on cpu" in self_test("cpu", gluon=True).get("rope_attention by gluon", "the tensors are on cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(HOST.triton, "__version__", "3.7.1")
    assert HOST.refuses_device(torch.device("cuda", 0)) == "Triton is 3.7.1; the Gluon kernel was compiled with 3.6 and 3.9 alone"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "compute capability 9.0" in HOST.refuses_device(torch.device("cuda", 0))


def test_it_refuses_until_the_self_test_has_compared_it(emulated, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(SELF_TEST, "_cases", lambda: [])
    monkeypatch.setattr(SELF_TEST, "GLUON_SHAPES", ((64, 1, 1), (64, 20, 140)))
    monkeypatch.delitem(HOST.VERDICTS, CPU)
    case = Case(5, 64, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match=r"has not been compared.*self_test\('cpu', gluon=True\)"):
        case.call("gluon")(case.q, case.k, case.v)
    assert "rope_attention by gluon" not in self_test("cpu") and CPU not in HOST.VERDICTS
    assert self_test("cpu", gluon=True)["rope_attention by gluon"] == "passed"
    case.call("gluon")(case.q, case.k, case.v)

    # Another process remembers; a wrong kernel does not pass, and its reason stays.
    monkeypatch.delitem(HOST.VERDICTS, CPU)
    monkeypatch.setattr(SELF_TEST, "compare_gluon", lambda device: pytest.fail("it was remembered"))
    assert self_test("cpu", gluon=True)["rope_attention by gluon"] == "passed"


@pytest.mark.parametrize(
    "fault, reason", [("sums do not fade", "result is wrong: relative error"), ("keys are never freed", "Deadlock")]
)
def test_a_wrong_kernel_does_not_pass_the_self_test(emulated, monkeypatch, tmp_path, fault, reason):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(SELF_TEST, "_cases", lambda: [])
    monkeypatch.setattr(SELF_TEST, "GLUON_SHAPES", ((64, 20, 600),))
    emulated(0, FAULTS[fault])
    assert reason in self_test("cpu", gluon=True)["rope_attention by gluon"]
    case = Case(5, 64, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match=reason):
        case.call("gluon")(case.q, case.k, case.v)
