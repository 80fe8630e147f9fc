"""Damage to what a run is continued from: each kind, in each file, is found; resume="auto" steps back to the checkpoint before."""

from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path

import processes
import pytest
from psann_fast.train import checkpoints
from psann_fast.train.checkpoint import MANIFEST, CheckpointError
from psann_fast.train.checkpoints import Checkpoints

STEPS = (1, 2, 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with a checkpoint after each of three steps, whose every number is its step."""
    folder = tmp_path_factory.mktemp("run")
    kept = Checkpoints(folder, processes.model_files, keep=len(STEPS))
    for step in STEPS:
        kept.save("last", processes.numbered(step))
    return folder


def place(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def turned(content: bytes, draw: random.Random, path: Path, whole: Path) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def zeroed(content: bytes, draw: random.Random, path: Path, whole: Path) -> bytes:
    """A block that never reached the disk."""
    at = draw.randrange(len(content))
    return content[:at] + bytes(min(512, len(content) - at)) + content[at + 512 :]


def of_another_step(content: bytes, draw: random.Random, path: Path, whole: Path) -> bytes:
    return (place(whole, draw.choice(STEPS)) / path.name).read_bytes()


def of_another_name(content: bytes, draw: random.Random, path: Path, whole: Path) -> bytes:
    return draw.choice([other for other in sorted(path.parent.iterdir()) if other != path]).read_bytes()


KINDS = {
    "a bit": turned,
    "a truncation": lambda content, draw, path, whole: content[: draw.randrange(len(content))],
    "more bytes": lambda content, draw, path, whole: content + draw.randbytes(draw.randrange(1, 9)),
    "a block of zeros": zeroed,
    "a file of another step": of_another_step,
    "another file of the step": of_another_name,
    "no file": lambda content, draw, path, whole: None,
}


def damage(folder: Path, whole: Path, step: int, draw: random.Random) -> str:
    """Damage one file of a step; returns what was done."""
    while True:
        path = draw.choice(sorted(place(folder, step).iterdir()))
        content, kind = path.read_bytes(), draw.choice(list(KINDS))
        spoilt = KINDS[kind](content, draw, path, whole)
        if spoilt is None and path.name != MANIFEST:  # without its manifest, a step is one that was not finished
            path.unlink()
            return f"{path.name}: {kind}"
        if spoilt is not None and spoilt != content:
            path.write_bytes(spoilt)
            return f"{path.name}: {kind}"


def check_case(whole: Path, folder: Path, draw: random.Random, caplog) -> str:
    """One file of the newest checkpoint damaged; in some cases one of the checkpoint before it too, or of all."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    spoilt = STEPS[-draw.choice((1, 1, 1, 2, 3)) :]
    done = [damage(folder, whole, step, draw) for step in spoilt]
    for step in STEPS:
        if step in spoilt:
            with pytest.raises(CheckpointError):
                checkpoints.read(place(folder, step))
                raise AssertionError(f"damage was not found: {done}")
        else:
            assert checkpoints.read(place(folder, step)).state["value"] == step
    if len(spoilt) == len(STEPS):
        with pytest.raises(CheckpointError, match="all checkpoints of .* are damaged"):
            checkpoints.newest(folder)
        return done[0]
    caplog.clear()
    found = checkpoints.newest(folder)
    assert found.step == found.state["value"] == spoilt[0] - 1, done
    for step in spoilt:
        said = [message for message in caplog.messages if f"step-{step:08d}" in message and "stepping back" in message]
        assert len(said) == 1, (done, caplog.messages)
    # The run goes on from there, and its next checkpoint takes the place of the damaged one.
    Checkpoints(folder, processes.model_files, keep=3, is_resumed=True).save("last", processes.numbered(spoilt[0]))
    assert checkpoints.read(place(folder, spoilt[0])).state["value"] == spoilt[0]
    return done[0]


def test_damage_to_a_checkpoint_steps_back(run, tmp_path, caplog):
    done = [check_case(run, tmp_path / "copy", random.Random(seed), caplog) for seed in range(60)]
    assert {case.partition(": ")[2] for case in done} == set(KINDS) and len({case.partition(": ")[0] for case in done}) == 5


@pytest.mark.campaign(weight=1)
def test_damage_to_checkpoints(campaign, run, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "psann_fast")
    for seed in campaign:
        check_case(run, tmp_path / "copy", random.Random(seed), caplog)
