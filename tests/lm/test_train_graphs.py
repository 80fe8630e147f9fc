"""Training steps as graphs: the same weights as without, and nothing in a step that a GPU's host would wait for.

A recording of operations (tape.py) takes the place of a CUDA graph, the device "meta" that of a GPU.
"""

from __future__ import annotations

import contextlib
import importlib

import pytest
import torch
from psann_fast import TrainConfig
from psann_fast.train import feed, graphs, trainer
from psann_fast.train.distributed import Group
from tape import Tape, serve_meta, waits
from tiny import data, fitted, model, tiny
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

REFUSES = graphs.refuses


@pytest.fixture
def taped(monkeypatch):
    """Runs with cuda_graphs record their micro-batches."""
    monkeypatch.setattr(graphs, "refuses", lambda config, device, processes: None)
    monkeypatch.setattr(trainer, "CUDACapture", lambda device: Tape.record)
    return monkeypatch


def weights(lm) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in lm.module.parameters()])


@pytest.mark.parametrize("base", ["respsann", "waveresnet"])
@pytest.mark.parametrize("options", [
    dict(batch_tokens=32), dict(batch_tokens=64, grad_accum_steps=2, epochs=2),
    dict(batch_tokens=48, grad_accum_steps=3, optimizer="muon"),
], ids=["one", "two", "three, and a rest"])  # fmt: skip
def test_a_run_over_graphs_is_one_without(taped, base, options):
    runs = []
    for wanted in (False, True):
        before = Tape.tapes
        # In float64, because a recording takes other forms of some ops, as a trace does, which sum in another order.
        made = model(base=base, d_model=16, backend="torch")
        made.module.double()
        lm = fitted(made, data(), cuda_graphs=wanted, **{"max_steps": 6, **options})
        assert (Tape.tapes - before > 0) == wanted
        runs.append((weights(lm), [row["loss"] for row in lm.history_], [row["grad_norm"] for row in lm.history_]))
        assert all(p.grad is None for p in lm.module.parameters())
    torch.testing.assert_close(runs[1][0], runs[0][0], rtol=1e-8, atol=1e-10)
    assert runs[1][1] == pytest.approx(runs[0][1], rel=1e-9) and runs[1][2] == pytest.approx(runs[0][2], rel=1e-8)


def test_a_count_that_the_graph_keeps_is_found(taped):
    def frozen(self, inputs, count, call=graphs._Graph.__call__):
        return call(self, inputs, 1)

    taped.setattr(graphs._Graph, "__call__", frozen)
    with pytest.raises(AssertionError):
        test_a_run_over_graphs_is_one_without(taped, "respsann", dict(batch_tokens=32))


def test_gradients_that_are_not_set_to_zero_are_found(taped):
    taped.setattr(torch, "_foreach_zero_", lambda tensors: None)
    with pytest.raises(AssertionError):
        test_a_run_over_graphs_is_one_without(taped, "respsann", dict(batch_tokens=32))


@pytest.mark.parametrize("device, processes, options, reason", [
    ("cpu", 1, {}, "the model is on cpu"),
    ("cuda", 2, {}, "several processes"),
    ("cuda", 1, dict(activation_checkpointing=True), "random states"),
    ("cuda", 1, dict(amp="fp16"), "use amp='bf16'"),
    ("cuda", 1, {}, None),
])  # fmt: skip
def test_what_cannot_be_captured(device, processes, options, reason):
    found = REFUSES(TrainConfig(cuda_graphs=True, **options), torch.device(device), processes)
    assert found is None if reason is None else reason in found


# -- the step on a GPU, without one ---------------------------------------------------------------------------------------------


class OnDevice(TorchDispatchMode):
    """Refuses what makes the host wait. Only page-locked batches may come from the host, without waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(not t.is_meta for t in found):
            on_host = all(not t.is_meta for t in found) and "device" not in kwargs
            is_sent = func is torch.ops.aten._to_copy.default and kwargs.get("non_blocking")
            assert on_host or is_sent, f"{func} takes a tensor of the host"
        else:
            assert not waits(func, args), f"{func} makes the host wait"
        self.names.append(func.name())
        return func(*args, **kwargs)


@pytest.fixture
def meta(monkeypatch):
    serve_meta(monkeypatch)
    monkeypatch.setattr(importlib.import_module("torch.optim.optimizer"), "_get_fused_kernels_supported_devices", lambda: ["meta"])
    return monkeypatch


def steps_on_meta(base: str, **options) -> list[str]:
    prepared, module = data(), tiny(base=base, vocab_size=258).to("meta").train()
    config = TrainConfig(
        **{"optimizer": "adamw", **options}, lr=1e-3, batch_tokens=32, amp="fp32", progress=False, log_interval_steps=1000
    )
    training = trainer._Training(
        module, prepared.dataset, config, None, Group(config, torch.device("meta")), None, None, None, None, []
    )
    training.at = trainer.Position(1, 0, 0.0, {})
    training.bar = contextlib.nullcontext()
    training.bar.step = lambda count: None
    training._start_clock()
    plan = training.plan
    batches = list(feed.steps(prepared.dataset, plan, config))[:2]
    training._step(batches[0])  # what is made once for a device may come from the host
    with OnDevice() as seen:
        training._step(batches[1])
    return seen.names


@pytest.mark.parametrize("base, options", [
    ("respsann", {}), ("waveresnet", dict(grad_accum_steps=2)), ("respsann", dict(optimizer="muon")),
])  # fmt: skip
def test_no_training_step_waits_for_the_device(meta, base, options):
    names = steps_on_meta(base, epochs=20, **options)
    assert any("fused_adamw" in name for name in names) and any("rope_attention_triton" in name for name in names), names


def test_a_training_step_that_waits_is_found(meta):
    norms = []

    def clip(parameters, limit, norm):
        norms.append(norm)
        if len(norms) > 1:  # the first step is not watched, and torch itself would stop it
            norm.item()

    meta.setattr(nn.utils, "clip_grads_with_norm_", clip)
    with pytest.raises(AssertionError, match="_local_scalar_dense.* makes the host wait"):
        steps_on_meta("respsann", epochs=20)
