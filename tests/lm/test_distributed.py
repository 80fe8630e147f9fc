"""Several processes train as one: the same weights, one writer, exact continuation, errors in all of them."""

from __future__ import annotations

import json
import random

import processes
import pytest
import torch
from psann_fast import TrainConfig, psannLM
from psann_fast.train import checkpoints
from psann_fast.train.distributed import check_launch
from psann_fast.train.feed import Plan, steps
from safetensors.torch import load_file
from test_trainer import examples


def left(folder, count: int = 1):
    """Weights of each process, and the rows of process 0 without what depends on time."""
    weights = [load_file(folder / f"weights-{rank}.safetensors") for rank in range(count)]
    history = json.loads((folder / "history-0.json").read_text())
    return weights, [{name: row[name] for name in ("step", "epoch", "loss", "val_loss", "grad_norm", "tokens")} for row in history]


def check_equal(tmp_path, count: int, base: str, packed: bool, tolerance: float, **options) -> None:
    """`count` processes of a part of the batch each, and one of all of it."""
    one, many = tmp_path / "one", tmp_path / "many"
    for folder in (one, many):
        folder.mkdir()
    rows, accumulation = options.pop("rows", 2), options.pop("accumulation", 1)
    launch = options.pop("launch", processes.together)
    alone = processes.start(processes.train_some, one, base, packed, {"batch_tokens": 8 * rows * count * accumulation, "epochs": 2})
    assert processes.exit_status(alone) == 0
    options |= {"batch_tokens": 8 * rows, "grad_accum_steps": accumulation, "epochs": 2}
    assert launch(count, processes.train_some, many, base, packed, options) == [0] * count
    (wanted,), wanted_rows = left(one)
    got, got_rows = left(many, count)
    for weights in got:
        assert weights.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(weights[name], wanted[name], rtol=tolerance, atol=tolerance)
            assert torch.equal(weights[name], got[0][name]), "the processes ended with different weights"
    assert len(got_rows) == len(wanted_rows) >= 4
    for mine, its in zip(got_rows, wanted_rows):
        assert (mine.pop("val_loss") or 0.0) == pytest.approx(its.pop("val_loss") or 0.0, rel=1e-6)
        assert mine == pytest.approx(its, rel=1e-6)


@pytest.mark.parametrize("is_sharded", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_are_one(tmp_path, is_sharded):
    check_equal(tmp_path, 2, "waveresnet", False, 1e-5 if is_sharded else 1e-6, accumulation=2, fsdp=is_sharded)


@pytest.mark.campaign(weight=0.3)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("is_sharded", [False, True], ids=["ddp", "fsdp"])
def test_processes_are_one(campaign, tmp_path, count, is_sharded):
    for seed in campaign:
        draw, folder = random.Random(seed), tmp_path / str(seed)
        folder.mkdir()
        check_equal(
            folder, count, draw.choice(["respsann", "waveresnet"]), draw.random() < 0.5, 1e-5 if is_sharded else 1e-6,
            rows=draw.randrange(1, 4), accumulation=draw.randrange(1, 4), fsdp=is_sharded,
        )  # fmt: skip


@pytest.mark.parametrize("is_sharded", [False, True], ids=["ddp", "fsdp"])
def test_a_save_right_after_a_validation_that_did_not_improve(tmp_path, is_sharded):
    # FSDP2 left the embedding whole after the validation, and the optimizer's state was looked for under another tensor.
    options = dict(
        max_steps=3, lr=3.0, warmup_steps=0, save_interval_steps=1, eval_interval_steps=1, batch_tokens=32, fsdp=is_sharded
    )
    assert processes.together(2, processes.fit_some, tmp_path, 0, {**options, "checkpoint_dir": tmp_path / "run"}) == [0, 0]
    losses = [row["val_loss"] for row in json.loads((tmp_path / "history-0.json").read_text())]
    assert max(losses[1:]) > min(losses), "every validation improved, so this tests nothing"


@pytest.mark.parametrize("is_sharded", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_continue_exactly_and_one_writes(tmp_path, is_sharded):
    options = dict(max_steps=6, epochs=9, save_interval_steps=2, eval_interval_steps=3, batch_tokens=32, fsdp=is_sharded)
    for name in ("whole", "run"):
        (tmp_path / name).mkdir()
    assert processes.together(2, processes.fit_some, tmp_path, 0, {**options, "checkpoint_dir": tmp_path / "whole"}) == [0, 0]
    wanted, rows = left(tmp_path, 2)
    place = tmp_path / "whole" / "checkpoints" / "step-00000004"
    again = {**options, "checkpoint_dir": tmp_path / "run", "resume": str(place)}
    assert processes.together(2, processes.fit_some, tmp_path, 5, again) == [0, 0]
    got, later = left(tmp_path, 2)
    assert later == [row for row in rows if row["step"] > 4]
    for weights in got:
        assert all(torch.equal(weights[name], wanted[0][name]) for name in weights)
    loaded = psannLM.load(tmp_path / "run", device="cpu").module.state_dict()
    assert all(torch.equal(loaded[name], wanted[0][name]) for name in loaded)
    taken = checkpoints.newest(tmp_path / "run")
    assert taken.step == 6 and taken.state["processes"] == 2
    states = [taken.tensors[f"random/{rank}/cpu"] for rank in (0, 1)]
    assert not torch.equal(*states), "the processes drop out the same features"
    # One process alone is another run.
    alone = processes.start(processes.fit_some, tmp_path, 0, {**again, "fsdp": False, "checkpoint_dir": tmp_path / "third"})
    assert processes.exit_status(alone) == 1 and not (tmp_path / "third").exists()


def test_an_error_of_the_writer_ends_all(tmp_path):
    (tmp_path / "run" / "manifest.json.new").mkdir(parents=True)  # in the way
    options = dict(checkpoint_dir=tmp_path / "run", max_steps=4, save_interval_steps=1)
    assert processes.together(2, processes.fit_some, tmp_path, 0, options) == [1, 1]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_example_is_seen_once_by_any_number_of_processes(packed, count):
    rows = examples(37, packed=packed)
    config = TrainConfig(batch_tokens=16, grad_accum_steps=2, epochs=2, optimizer="adamw")
    plan = Plan.of(rows, config, count)
    runs = [list(steps(rows, plan, config, rank=rank, processes=count)) for rank in range(count)]
    assert {len(run) for run in runs} == {plan.total_steps}
    seen, whole = [], []
    for data in zip(*runs):
        batches = [len(step.batches) for step in data]
        assert len(set(batches)) == 1 <= batches[0] <= 2, "a process would wait for the others for ever"
        targets = [batch["targets"][batch["targets"] != -100] for step in data for batch in step.batches]
        assert sum(map(len, targets)) == data[0].targets == data[-1].targets
        seen += [target for part in targets for target in part.tolist()]
    for epoch in range(2):
        batch = rows.batch(rows.order(epoch), rows.offset(epoch))["targets"]
        whole += batch[batch != -100].tolist()
    assert sorted(seen) == sorted(whole)
    # From any step on, the rest is the same.
    for first in (1, plan.steps_per_epoch, plan.total_steps - 1):
        rest = list(steps(rows, plan, config, first=first, rank=count - 1, processes=count))
        for mine, its in zip(rest, runs[-1][first:], strict=True):
            for a, b in zip(mine.batches, its.batches, strict=True):
                assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_several_processes_cannot_do():
    for options, message in (
        (dict(ddp="on"), "start it with torchrun --nproc-per-node=N"),
        (dict(fsdp=True, ddp="off"), "use ddp='auto'"),
        (dict(fsdp=True, amp="fp16"), "use amp='bf16'"),
    ):
        with pytest.raises(ValueError, match=message):
            check_launch(TrainConfig(**options))
