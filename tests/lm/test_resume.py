"""A run that is continued is the run that was never interrupted, bit for bit; what cannot be continued says why."""

from __future__ import annotations

import copy
import csv
import json
import logging
import math
import random
import shutil

import pytest
import torch
from psann_fast import TrainConfig, psannLM
from psann_fast.train import checkpoints, run_folder, trainer
from psann_fast.train.checkpoint import CheckpointError
from psann_fast.train.interrupts import Interrupted
from psann_fast.train.snapshot import Snapshot
from psann_fast.train.trainer import train
from test_trainer import examples
from tiny import data, fitted, model, tiny

@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    """Drawing loss.png takes longer than these runs; test_trainer looks at it."""
    monkeypatch.setattr(run_folder, "plot_run", lambda rows, path: None)


# Three micro-batches a step, rows of different lengths, a last step with fewer of both; dropout; a validation every fourth step.
CONFIG = dict(
    batch_tokens=24, grad_accum_steps=3, epochs=3, lr=0.01, log_interval_steps=2, eval_interval_steps=4, save_interval_steps=1,
    progress=False, amp="fp32", optimizer="adamw",
)  # fmt: skip
TIMES = ("tokens_per_second", "mfu", "seconds")


def ragged(documents: int = 28):
    rows = examples(documents, packed=False)
    assert len(rows) % 9 and len(rows) % 9 % 3, (
        "the last step of an epoch should have fewer micro-batches, the last of those fewer rows"
    )
    return rows


def run(seed: int = 0, rows=None, resumed: Snapshot | None = None, module=None, **options):
    """(snapshots by step, rows of metrics) of a run of train; snapshots as they come back from files."""
    kept: dict[int, Snapshot] = {}

    def save(name: str, taken: Snapshot) -> None:
        if name == "last":
            kept[taken.step] = copy.deepcopy(
                Snapshot(taken.step, taken.weights, taken.tensors, json.loads(json.dumps(taken.state)))
            )

    module = module if module is not None else tiny(seed, base="waveresnet", dropout=0.2)
    if resumed is not None:
        module.load_state_dict(resumed.weights)
    history = train(
        module, rows or ragged(), TrainConfig(**{**CONFIG, **options}), val_examples=examples(7), save=save, resumed=resumed
    )
    return kept, [{name: value for name, value in row.items() if name not in TIMES} for row in history]


def same(one: Snapshot, other: Snapshot) -> None:
    assert one.step == other.step
    for mine, its in ((one.weights, other.weights), (one.tensors, other.tensors)):
        assert mine.keys() == its.keys()
        for name in mine:
            assert torch.equal(mine[name], its[name]), name
    assert {k: v for k, v in one.state.items() if k not in ("seconds", "pending")} == {
        k: v for k, v in other.state.items() if k not in ("seconds", "pending")
    }


@pytest.mark.parametrize("options", [{}, {"optimizer": "muon"}, {"nan_policy": "skip", "max_steps": 7}], ids=str)
def test_a_run_goes_on_from_every_step_bit_for_bit(options):
    whole, history = run(**options)
    last = max(whole)
    assert last >= 7 and list(whole) == list(range(1, last + 1))
    # A snapshot taken in one run and those after it in another; every fourth start suffices for the variants.
    for step in range(1, last + 1, 1 if not options else 4):
        again, rows = run(seed=1, resumed=whole[step], **options)
        for later in range(step + 1, last + 1):
            same(again[later], whole[later])
        assert rows == [row for row in history if row["step"] > step]


@pytest.mark.campaign(weight=1)
def test_two_hundred_steps_go_on_from_every_one(campaign):
    """A run of 200 steps with accumulation, dropout, ragged last steps and validations, continued to its end after each of them."""
    options = dict(max_steps=200, epochs=60, eval_interval_steps=20)
    starts: list[int] = []
    for seed in campaign:
        if not starts:
            draw_base = random.Random(seed).choice(["respsann", "waveresnet"])
            whole, history = run(module=tiny(seed, base=draw_base, dropout=0.2), **options)
            assert list(whole) == list(range(1, 201))
            starts = random.Random(seed).sample(range(1, 200), 199)
        step = starts.pop()
        again, rows = run(
            module=tiny(seed + 1, base=draw_base, dropout=0.2), resumed=whole[step], save_interval_steps=200, **options
        )
        same(
            Snapshot(200, whole[200].weights, whole[200].tensors, {**whole[200].state, "train": again[200].state["train"]}),
            again[200],
        )
        assert rows == [row for row in history if row["step"] > step]


@pytest.mark.campaign(weight=1)
def test_resumed_runs(campaign):
    """Other shapes of run, each continued from a random step: accumulation, dropout, packing, epochs, length."""
    for seed in campaign:
        draw = random.Random(seed)
        rows = examples(draw.randrange(5, 60), window=draw.choice([4, 8]), packed=draw.random() < 0.5, seed=seed)
        options = dict(
            batch_tokens=draw.choice([8, 24, 64]), grad_accum_steps=draw.randrange(1, 4), epochs=draw.randrange(1, 5),
            optimizer=draw.choice(["adamw", "muon"]), grad_clip=draw.choice([0.0, 0.3]), max_steps=draw.choice([None, 9]),
        )  # fmt: skip
        make = lambda: tiny(seed, base=draw_base, dropout=0.3)  # noqa: E731 (two uses)
        draw_base = draw.choice(["respsann", "waveresnet"])
        whole, history = run(rows=rows, module=make(), **options)
        step = draw.choice(list(whole))
        again, later = run(rows=rows, module=make(), resumed=whole[step], **options)
        for number in again:
            same(again[number], whole[number])
        assert later == [row for row in history if row["step"] > step]


def test_float16_continues_with_its_scale(monkeypatch):
    monkeypatch.setattr(trainer, "resolve_amp", lambda amp, device: torch.float16)
    whole, history = run(max_steps=6)
    assert whole[3].state["scaler"]["scale"] > 1
    again, rows = run(seed=1, resumed=whole[3], max_steps=6)
    same(again[6], whole[6])


def folder_rows(folder) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def weights(lm: psannLM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in lm.module.state_dict().items()}


OPTIONS = dict(
    epochs=9,
    max_steps=9,
    save_interval_steps=2,
    eval_interval_steps=3,
    lr=0.01,
    grad_accum_steps=2,
    batch_tokens=32,
    keep_checkpoints=3,
)


def interrupted_at(lm: psannLM, call: int, kind: type[BaseException] = KeyboardInterrupt) -> psannLM:
    """`lm`, whose forward pass number `call` ends the process's work."""
    calls = []

    def end(*_) -> None:
        calls.append(1)
        if len(calls) == call:
            raise kind

    lm.module.register_forward_hook(end)
    return lm


@pytest.fixture
def whole_run(tmp_path):
    lm = fitted(model(dropout=0.2), data(val_split=0.3), checkpoint_dir=tmp_path / "whole", **OPTIONS)
    return weights(lm), folder_rows(tmp_path / "whole"), tmp_path / "run"


@pytest.mark.parametrize("call", [1, 4, 9, 12, 20])
def test_fit_continues_in_its_folder(whole_run, call):
    wanted, rows, folder = whole_run
    with pytest.raises(KeyboardInterrupt):
        fitted(interrupted_at(model(dropout=0.2), call), data(val_split=0.3), checkpoint_dir=folder, **OPTIONS)
    lm = fitted(model(seed=5, dropout=0.2), data(val_split=0.3), checkpoint_dir=folder, resume="auto", **OPTIONS)
    if call > 4:  # before, no checkpoint was there, and the other model began anew
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in lm.module.state_dict().items())
        assert folder_rows(folder) == rows, "one header, each row once"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(folder_rows(folder)) and json.loads(lines[-1])["step"] == 9
    loaded = psannLM.load(folder, device="cpu").module
    assert all(torch.equal(tensor, lm.module.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_a_finished_run_stays_as_it_is(whole_run):
    wanted, rows, folder = whole_run
    fitted(model(dropout=0.2), data(val_split=0.3), checkpoint_dir=folder, **OPTIONS)
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    lm = fitted(model(seed=3, dropout=0.2), data(val_split=0.3), checkpoint_dir=folder, resume="auto", **OPTIONS)
    assert lm.history_ == [] and all(torch.equal(tensor, wanted[name]) for name, tensor in lm.module.state_dict().items())
    assert before == {path: path.read_bytes() for path in folder.rglob("*.safetensors")} and folder_rows(folder) == rows


def damage(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["model-*.safetensors", "training-*.safetensors", "training-*.json", "config-*.json", "manifest.json"]
)
def test_a_damaged_checkpoint_is_stepped_over_and_named(whole_run, name, caplog):
    wanted, rows, folder = whole_run
    fitted(model(dropout=0.2), data(val_split=0.3), checkpoint_dir=folder, **OPTIONS)
    steps = sorted((folder / "checkpoints").iterdir())
    assert [step.name for step in steps] == ["step-00000006", "step-00000008", "step-00000009"]
    for step in steps[1:]:
        damage(next(step.glob(name)))
    damage(folder / "manifest.json"), damage(folder / "best" / "manifest.json")  # what is made anew stops nothing
    with caplog.at_level(logging.WARNING, "psann_fast"):
        lm = fitted(model(seed=3, dropout=0.2), data(val_split=0.3), checkpoint_dir=folder, resume="auto", **OPTIONS)
    assert sum("stepping back to the checkpoint before it" in message for message in caplog.messages) == 2
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in lm.module.state_dict().items()) and folder_rows(folder) == rows
    assert [row["step"] for row in lm.history_] == [7, 8, 9]
    assert len(list(csv.DictReader(open(folder / "metrics-001.csv")))) == len(rows), "the rows that were made again are kept"


def test_only_damaged_checkpoints_are_an_error(tmp_path):
    fitted(checkpoint_dir=tmp_path, save_interval_steps=1)
    for step in (tmp_path / "checkpoints").iterdir():
        damage(next(step.glob("training-*.safetensors")))
    lm = model()
    before = weights(lm)
    with pytest.raises(CheckpointError, match="all checkpoints of .* are damaged .*restore one, or train anew elsewhere"):
        fitted(lm, checkpoint_dir=tmp_path, resume="auto")
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.module.state_dict().items()) and lm.tokenizer is None


def test_a_checkpoint_is_a_model_and_can_be_named(tmp_path):
    lm = fitted(checkpoint_dir=tmp_path, save_interval_steps=2)
    place = tmp_path / "checkpoints" / "step-00000002"
    assert psannLM.load(place, device="cpu").tokenizer.name == "simple"
    again = fitted(model(seed=2), checkpoint_dir=tmp_path / "other", resume=place)
    assert [row["step"] for row in again.history_] == [3, 4]
    assert all(torch.equal(tensor, lm.module.state_dict()[name]) for name, tensor in again.module.state_dict().items())
    lm.save(tmp_path / "model")
    with pytest.raises(CheckpointError, match="holds no training.safetensors, so no run can be continued from it"):
        fitted(checkpoint_dir=tmp_path / "third", resume=tmp_path / "model")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(lr=0.5), r"resume: lr was 0.005 in the run to continue and is 0.5 now; give the same options, or start anew"),
        (dict(seed=7), "resume: seed was 1337"),
        (dict(batch_tokens=16), "resume: batch_tokens was 64"),
        (dict(optimizer="adamw"), "resume: optimizer was 'muon'"),
        (dict(prepared=data(seed=4)), "resume: the data is not that of the run to continue"),
        (dict(prepared=data(max_length=8)), "resume: the data is not that of the run"),
        (dict(lm=model(d_mlp=32)), "of another shape than the configuration says"),
        (dict(checkpoint_dir=None), "resume is 'auto' and checkpoint_dir is None; pass the checkpoint_dir of the run to continue"),
    ],
)
def test_another_run_is_refused_and_nothing_changes(tmp_path, change, message):
    fitted(checkpoint_dir=tmp_path, max_steps=2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    lm = change.pop("lm", None) or model()
    state = weights(lm)
    with pytest.raises(ValueError, match=message):
        fitted(lm, **{"checkpoint_dir": tmp_path, "resume": "auto", "max_steps": 2, **change})
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert all(torch.equal(tensor, state[name]) for name, tensor in lm.module.state_dict().items())


def test_a_run_may_be_made_longer(tmp_path, caplog):
    fitted(checkpoint_dir=tmp_path, max_steps=3, epochs=5)
    with caplog.at_level(logging.WARNING, "psann_fast"):
        lm = fitted(model(seed=2), checkpoint_dir=tmp_path, max_steps=6, epochs=5, resume="auto")
    assert [row["step"] for row in lm.history_] == [4, 5, 6]
    assert "resume: max_steps was 3 and is 6 now; the learning rate follows the new length from here on" in caplog.messages


def test_a_new_run_puts_the_old_ones_checkpoints_aside(tmp_path):
    old = fitted(checkpoint_dir=tmp_path, max_steps=4, save_interval_steps=1)
    with pytest.raises(KeyboardInterrupt):
        fitted(interrupted_at(model(seed=3), 3), checkpoint_dir=tmp_path, max_steps=4, save_interval_steps=1)
    found = checkpoints.newest(tmp_path)
    assert found.step == 2 and checkpoints.read(tmp_path / "checkpoints-001" / "step-00000004").step == 4
    assert not torch.equal(found.weights["lm_head.weight"], old.module.lm_head.weight)


def test_an_unfinished_first_checkpoint_begins_anew(tmp_path):
    fitted(checkpoint_dir=tmp_path, max_steps=2)
    (tmp_path / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    assert [row["step"] for row in fitted(checkpoint_dir=tmp_path, max_steps=2, resume="auto").history_] == [1, 2]


@pytest.mark.parametrize("when", ["training", "validation"])
def test_an_interrupted_run_loses_no_row(whole_run, when):
    """A signal in the middle of a step, or of the validation after it."""
    wanted, rows, folder = whole_run
    # Steps have two forward passes; after step 3 comes a validation.
    call = {"training": 6, "validation": 7}[when]
    with pytest.raises(SystemExit) as ended:
        lm = interrupted_at(model(dropout=0.2), call, Terminated)
        fitted(lm, data(val_split=0.3), checkpoint_dir=folder, **OPTIONS)
    assert ended.value.code == 143
    assert checkpoints.newest(folder).step == {"training": 2, "validation": 3}[when]
    lm = fitted(model(seed=5, dropout=0.2), data(val_split=0.3), checkpoint_dir=folder, resume="auto", **OPTIONS)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in lm.module.state_dict().items())
    assert folder_rows(folder) == rows


class Terminated(Interrupted):
    def __init__(self) -> None:
        super().__init__(15)


def test_nan_leaves_the_best_and_the_last_good_checkpoint(tmp_path):
    draw = random.Random(0)
    for case in range(6):
        folder = tmp_path / str(case)
        bad, policy = draw.randrange(2, 8), draw.choice(["stop", "skip"])
        check_nan(folder, bad, policy)


@pytest.mark.campaign(weight=0.5)
def test_nan_injections(campaign, tmp_path):
    for seed in campaign:
        draw = random.Random(seed)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        check_nan(
            tmp_path / "run", draw.randrange(1, 9), draw.choice(["stop", "skip"]), draw.choice([math.nan, math.inf, -math.inf])
        )


def check_nan(folder, bad: int, policy: str, poison: float = math.nan) -> None:
    """A run of 8 steps whose step `bad` is not finite."""
    lm, calls = model(), []

    def spoil(module, args, out):
        if not module.training:
            return out
        calls.append(1)
        return out * poison if len(calls) == bad else out

    lm.module.register_forward_hook(spoil)
    options = dict(checkpoint_dir=folder, max_steps=8, epochs=9, save_interval_steps=1, eval_interval_steps=1, nan_policy=policy)
    if policy == "stop":
        with pytest.raises(FloatingPointError, match=f"at optimizer step {bad}; the weights are those before it"):
            fitted(lm, data(val_split=0.3), **options)
        assert len(calls) == bad and len(lm.history_) == bad - 1
        if bad == 1:
            assert not (folder / "manifest.json").exists()
            return
        assert checkpoints.newest(folder).step == bad - 1
    else:
        fitted(lm, data(val_split=0.3), **options)
        assert len(calls) == 8 and lm.history_[-1]["skipped_steps"] == 1 and checkpoints.newest(folder).step == 8
    for place in (folder, folder / "best"):
        assert all(p.isfinite().all() for p in psannLM.load(place, device="cpu").module.parameters())
    kept = psannLM.load(folder, device="cpu").module.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in lm.module.state_dict().items())
