"""self_test: finds kernels that are wrong, makes them refuse, remembers, and is asked outside of calls alone."""

import json
import sys
from dataclasses import replace

import psann_kernels
import pytest
import torch
from psann_kernels import OPS, BackendError, damped_sine, explain, self_test
from psann_kernels.registry import Implementation, Op

SELF_TEST = sys.modules["psann_kernels.self_test"]  # the package's attribute of that name is the function
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def afresh(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    for op in OPS.values():
        op.blame("triton", CPU, None)


@pytest.fixture
def interpreted():
    if OPS["damped_sine"].refusal("triton", torch.ones(1, 1), *[torch.ones(1)] * 3) is not None:
        pytest.skip("without the interpreter no Triton kernel serves CPU tensors")


def only(monkeypatch, *names):
    cases = [case for case in SELF_TEST._cases() if case[0] in names]
    monkeypatch.setattr(SELF_TEST, "_cases", lambda: cases)


def spoil(monkeypatch, name, spoiled):
    """backend "triton" of an op, its results passed through `spoiled`."""
    right = OPS[name].implementations["triton"]
    wrong = replace(right, function=lambda *a, **k: spoiled(right.function(*a, **k)))
    monkeypatch.setitem(OPS[name].implementations, "triton", wrong)


class WrongGradient(torch.autograd.Function):
    """As from the miscompiled product: the result is right and the gradient is not."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy.roll(1, 1)


def test_every_kernel_passes(interpreted):
    found = self_test()
    assert set(found.values()) == {"passed"}
    assert set(found) == {name for name, op in OPS.items() if "triton" in op.implementations} - {"paged_append"}


def test_attention_is_tried_by_descriptors_and_through_pointers(interpreted, monkeypatch):
    only(monkeypatch, "rope_attention")
    tiles = sys.modules["psann_kernels.rope_attention_tiles_triton"]
    ways, read = set(), tiles.memory

    def recorded(rows, is_described, *tensors):
        ways.add((tensors[0].dtype, is_described))
        return read(rows, is_described, *tensors)

    for name in ("rope_attention_triton", "rope_attention_backward_triton"):
        ways.clear()
        monkeypatch.setattr(sys.modules[f"psann_kernels.{name}"], "memory", recorded)
        assert self_test(again=True) == {"rope_attention": "passed"}
        assert ways == {(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False)}
        monkeypatch.setattr(sys.modules[f"psann_kernels.{name}"], "memory", read)


def test_the_mlp_is_tried_by_descriptors_and_through_pointers(interpreted, monkeypatch):
    only(monkeypatch, "damped_sine_mlp")
    module = sys.modules["psann_kernels.damped_sine_mlp_triton"]
    ways, choose = set(), module.chosen

    def recorded(by_pointers, by_descriptors, a, b):
        tile, is_described = choose(by_pointers, by_descriptors, a, b)
        ways.add((by_pointers is module.FORWARD, is_described))
        return tile, is_described

    monkeypatch.setattr(module, "chosen", recorded)
    assert self_test(again=True) == {"damped_sine_mlp": "passed"}
    assert ways == {(is_forward, is_described) for is_forward in (True, False) for is_described in (True, False)}


def test_a_wrong_gradient_is_found_and_refused(interpreted, monkeypatch):
    only(monkeypatch, "rope_attention", "rms_norm")
    spoil(monkeypatch, "rope_attention", WrongGradient.apply)
    found = self_test()
    assert found["rms_norm"] == "passed"
    assert "found the gradient of its argument 1 wrong in torch.bfloat16: relative error" in found["rope_attention"]
    q = torch.ones(1, 2, 1, 16)
    with pytest.raises(BackendError, match="rope_attention.*'triton'.*the self-test on cpu found the gradient"):
        psann_kernels.rope_attention(q, q, q, backend="triton")
    rows = {row["backend"]: row for row in explain("rope_attention", q, q, q, softmax_scale=1.0)}
    assert (
        rows["triton"]["serves"] == "no"
        and rows["triton"]["reason"] == found["rope_attention"]
        and rows["torch"]["serves"] == "yes"
    )


def test_three_digits_of_a_float32_product_are_not_enough(interpreted, monkeypatch):
    only(monkeypatch, "damped_sine")
    spoil(monkeypatch, "damped_sine", lambda y: y * (1 + 2**-11) if y.dtype == torch.float32 else y)
    assert "its result wrong in torch.float32" in self_test()["damped_sine"]


@pytest.mark.parametrize("fault", [float("nan"), RuntimeError("the launch failed")])
def test_nan_and_errors_are_faults(interpreted, monkeypatch, fault):
    only(monkeypatch, "rms_norm")

    def spoiled(y):
        if isinstance(fault, RuntimeError):
            raise fault
        return y * fault

    spoil(monkeypatch, "rms_norm", spoiled)
    expected = "relative error nan" if not isinstance(fault, RuntimeError) else "ended with RuntimeError: the launch failed"
    assert expected in self_test()["rms_norm"]


def test_the_answer_is_remembered(interpreted, monkeypatch, tmp_path):
    only(monkeypatch, "damped_sine")
    spoil(monkeypatch, "damped_sine", lambda y: 2 * y)
    reason = self_test()["damped_sine"]
    OPS["damped_sine"].blame("triton", CPU, None)  # as in a new process
    monkeypatch.setattr(SELF_TEST, "_run", lambda device: pytest.fail("the answer was in the cache folder"))
    assert self_test() == {"damped_sine": reason} == self_test("cpu")
    with pytest.raises(BackendError, match="self-test on cpu"):
        damped_sine(torch.ones(1, 2), *[torch.ones(2)] * 3, backend="triton")
    monkeypatch.undo()


def test_it_is_asked_again_by_name_and_after_a_change(interpreted, monkeypatch):
    only(monkeypatch, "damped_sine")
    with monkeypatch.context() as wrong:
        spoil(wrong, "damped_sine", lambda y: 2 * y)
        self_test()
    assert self_test()["damped_sine"] != "passed"
    assert (
        self_test(again=True) == {"damped_sine": "passed"}
        and OPS["damped_sine"].refusal("triton", torch.ones(1, 2), *[torch.ones(2)] * 3) is None
    )
    monkeypatch.setattr(SELF_TEST.torch, "__version__", "0.0")
    ran = []
    monkeypatch.setattr(SELF_TEST, "_run", lambda device: ran.append(device) or {"damped_sine": "passed"})
    self_test()
    assert ran == [CPU]


@pytest.mark.parametrize("content", ["{", "[]", '{"x": 3}', '{"x": {"no such op": "passed"}}'])
def test_a_damaged_cache_is_passed_over(interpreted, monkeypatch, tmp_path, content):
    only(monkeypatch, "rms_norm")
    (tmp_path / "psann-fast").mkdir()
    (tmp_path / "psann-fast" / "self-test.json").write_text(content)
    assert self_test() == {"rms_norm": "passed"}
    assert list(json.loads((tmp_path / "psann-fast" / "self-test.json").read_text()).values()) == [{"rms_norm": "passed"}]


def test_a_folder_that_cannot_be_written_only_costs_the_memory(interpreted, monkeypatch, tmp_path, caplog):
    only(monkeypatch, "rms_norm")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("not a folder")
    assert self_test() == {"rms_norm": "passed"} and "cannot be kept" in caplog.text


def test_not_inside_a_trace(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match="call it before tracing"):
        self_test()


def test_where_no_kernel_runs_it_says_why(monkeypatch):
    if "triton" in OPS["damped_sine"].implementations:
        no_gpu = Implementation(lambda *a: pytest.fail("nothing can run"), lambda *a, **k: "Triton needs a GPU")
        monkeypatch.setitem(OPS["damped_sine"].implementations, "triton", no_gpu)
    assert set(self_test("cpu")) == {"triton"} and "riton" in self_test("cpu")["triton"]


def test_blame_of_the_fused_kernels_leaves_the_parts():
    from psann_kernels.damped_sine_mlp import MLP

    x, w, one = torch.ones(2, 16), torch.ones(16, 16), torch.ones(16)
    arguments = (x, w, None, one, one, one, w, None)
    before = MLP.refusal("triton", *arguments)
    MLP.blame("triton", CPU, "wrong here")
    assert MLP.refusal("triton", *arguments, fused=True) == "wrong here" and MLP.refusal("triton", *arguments) == before


def test_blame_is_by_device():
    op = Op("blamed for a test")
    try:
        op.implementations["torch"] = Implementation(lambda x: x, lambda x: None)
        op.blame("torch", torch.device("cuda", 1), "wrong there")
        assert op.refusal("torch", torch.ones(1)) is None
        op.blame("torch", CPU, "wrong here")
        assert op.refusal("torch", torch.ones(1)) == "wrong here" and op.is_faulty("torch", CPU)
    finally:
        del OPS[op.name]


def test_a_model_that_moves_to_a_gpu_asks_first(monkeypatch):
    from psann_fast import doctor, estimator

    asked = []
    for module in (estimator, doctor):
        monkeypatch.setattr(module, "self_test", lambda device: asked.append(str(device)) or {"rms_norm": "passed"})
    model = torch.nn.Linear(2, 2, device="meta").train()
    monkeypatch.setattr(model, "to", lambda device: model)
    assert estimator._placed(model, torch.device("cuda", 1)) is model and not model.training and asked == ["cuda:1"]
    assert estimator._placed(model, CPU) is model and asked == ["cuda:1"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "_names", lambda: [])
    monkeypatch.setattr(doctor, "_devices", dict)
    assert doctor.report()["self-test"] == {"rms_norm": "passed"} and asked == ["cuda:1", "cuda"]
