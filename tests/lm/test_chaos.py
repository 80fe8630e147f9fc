"""Nothing that was acknowledged is lost: not to kill -9, not to a signal, not to a failing disk."""

from __future__ import annotations

import builtins
import csv
import errno
import os
import random
import shutil
import signal
import time
from pathlib import Path

import processes
import pytest
import torch
from psann_fast.train import checkpoint, checkpoints
from psann_fast.train.checkpoints import Checkpoints
from psann_fast.train.interrupts import Interrupts
from safetensors.torch import load_file

# -- kill -9 during a save ------------------------------------------------------------------------------------------------------


def kill_once(folder: Path, delay: float) -> int:
    """Save in a process without end, kill it after `delay` seconds of saving; returns the newest step that was acknowledged."""
    acknowledged = folder / "acknowledged"
    before = acknowledged.stat().st_size if acknowledged.exists() else 0
    process = processes.start(processes.save_forever, folder)
    while not acknowledged.exists() or acknowledged.stat().st_size == before:
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    processes.exit_status(process)
    return max(map(int, acknowledged.read_text().split()))


def check_whole(folder: Path, acknowledged: int) -> None:
    """The newest checkpoint is whole and no older than the newest acknowledged; what the run shows is a whole model too."""
    found = checkpoints.newest(folder)
    assert found.step >= acknowledged and found.state["value"] == found.step
    for tensors in (found.weights, found.tensors):
        assert all((tensor == torch.tensor(float(found.step)).to(tensor.dtype)).all() for tensor in tensors.values())
    for place in (folder, folder / "best"):
        if (place / checkpoint.MANIFEST).exists():
            shown = load_file(checkpoint.read(place)["model.safetensors"])["w"]
            assert (shown == shown[0]).all()
            if place == folder:
                assert shown[0] >= acknowledged
    assert len(list((folder / "checkpoints").iterdir())) <= 4, "old steps are not removed"


def test_a_kill_during_a_save_loses_nothing(tmp_path):
    draw = random.Random(0)
    for _ in range(5):
        check_whole(tmp_path, kill_once(tmp_path, draw.uniform(0, 0.01)))


@pytest.mark.campaign(weight=2)
def test_kills(campaign, tmp_path):
    for seed in campaign:
        if seed % 50 == 0:
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
        check_whole(tmp_path, kill_once(tmp_path, random.Random(seed).uniform(0, 0.02)))


# -- a disk that fails ----------------------------------------------------------------------------------------------------------


class Disk:
    """Counts the calls that reach the disk, and lets one of them fail."""

    def __init__(self, patch: pytest.MonkeyPatch, failing: int, code: int) -> None:
        self.failing, self.code, self.calls, self.failed = failing, code, 0, ""
        for name in ("open", "fsync", "replace", "link", "rename", "mkdir"):
            patch.setattr(os, name, self.watched(f"os.{name}", getattr(os, name)))
        patch.setattr(Path, "unlink", self.watched("unlink", Path.unlink))
        patch.setattr(Path, "mkdir", self.watched("mkdir", Path.mkdir))
        patch.setattr(shutil, "rmtree", self.watched("rmtree", shutil.rmtree))
        patch.setattr(checkpoint, "open", self.opened, raising=False)

    def watched(self, name, real):
        def call(*args, **options):
            self.count(name)
            return real(*args, **options)

        return call

    def count(self, name: str) -> None:
        self.calls += 1
        if self.calls == self.failing:
            self.failed = name
            raise OSError(self.code, os.strerror(self.code))

    def opened(self, path, mode="r", *args, **options):
        self.count(f"open for {mode}")
        file = builtins.open(path, mode, *args, **options)
        return WatchedFile(file, self) if "w" in mode else file


class WatchedFile:
    """A file whose writes and closing are counted; a failing write leaves half of its bytes."""

    def __init__(self, file, disk: Disk) -> None:
        self.file, self.disk = file, disk

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.disk.count("close")

    def write(self, content):
        try:
            self.disk.count("write")
        except OSError:
            self.file.write(bytes(content)[: len(content) // 2])
            raise
        return self.file.write(content)


def fail_once(folder: Path, failing: int, code: int) -> str:
    """Two good saves, then one in which the disk call number `failing` fails; returns what failed, or "" if nothing did."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    kept = Checkpoints(folder, processes.model_files, keep=1)
    for step in (1, 2):
        kept.save("last", processes.numbered(step))
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, failing, code)
        try:
            kept.save("last", processes.numbered(3))
        except OSError as error:
            assert disk.failed and error.errno == code
            assert str(folder) in str(error) or disk.failed in ("rmtree", "unlink", "os.open", "os.fsync", "mkdir", "os.mkdir"), (
                str(error)
            )
    found = checkpoints.newest(folder)
    assert found.step in (2, 3) and found.state["value"] == found.step
    shown = load_file(checkpoint.read(folder)["model.safetensors"])["w"]
    assert (shown == shown[0]).all() and shown[0] in (2, 3)
    # The disk works again: so does the next save, and nothing of the failed one stays in use.
    kept.save("last", processes.numbered(4))
    check_whole(folder, 4)
    return disk.failed


def test_every_failing_disk_call_leaves_a_whole_checkpoint(tmp_path):
    seen, number = set(), 0
    while True:
        number += 1
        failed = fail_once(tmp_path / "run", number, random.Random(number).choice([errno.ENOSPC, errno.EIO, errno.EACCES]))
        if not failed:
            break
        seen.add(failed)
    assert number > 40 and {"write", "close", "os.fsync", "os.replace", "os.link", "unlink", "open for wb"} <= seen


def test_a_full_disk_says_what_is_needed(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path, processes.model_files, keep=2)
    kept.save("last", processes.numbered(1))

    def full(file, tensors):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_tensors", full)
    with pytest.raises(
        OSError, match=r"cannot save to .*step-00000002 .*No space left on device\); 6,3\d\d bytes are needed and [\d,]+ are free"
    ):
        kept.save("last", processes.numbered(2))
    assert checkpoints.newest(tmp_path).step == 1
    assert [path.name for path in (tmp_path / "checkpoints" / "step-00000002").iterdir()] == [], "what was half written is gone"


def test_a_file_size_limit_of_the_system_is_such_an_error(tmp_path):
    """The kernel's own refusal, in the middle of a tensor."""
    process = processes.start(processes.save_under_a_limit, tmp_path)
    assert processes.exit_status(process) == 0
    assert checkpoints.newest(tmp_path).step == 1


def test_a_run_folder_that_vanished_is_an_error(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    kept = Checkpoints(folder, processes.model_files, keep=2)
    kept.save("last", processes.numbered(1))
    shutil.rmtree(folder)
    with pytest.raises(
        FileNotFoundError, match="cannot save step 2: .*run has vanished .*; the weights are in memory: save them elsewhere"
    ):
        kept.save("last", processes.numbered(2))
    assert not folder.exists()


def test_an_error_in_the_background_shows_at_the_next_call(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path, processes.model_files, keep=2, is_async=True)
    kept.save("last", processes.numbered(1))
    kept.wait()
    monkeypatch.setattr(checkpoint, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    kept.save("last", processes.numbered(2))
    with pytest.raises(OSError, match="No space left"):
        kept.wait()
    monkeypatch.undo()
    kept.save("last", processes.numbered(3))
    kept.wait()
    assert checkpoints.newest(tmp_path).step == 3


# -- signals --------------------------------------------------------------------------------------------------------------------


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.002)


def last_row(folder: Path) -> int:
    # As it is at one moment: a reader that finds the file empty at first takes a later row for the header.
    lines = (folder / "metrics.csv").read_text().splitlines()
    return max((int(row["step"]) for row in csv.DictReader(lines)), default=0)


def signal_once(folder: Path, signum: int, delay: float, **options) -> int:
    """A fit that gets a signal some time after it began; returns the step that it kept."""
    process = processes.start(processes.fit_until_told, folder, options)
    wait_for(folder / "run" / "metrics.csv")
    while last_row(folder / "run") == 0:  # before its first step, a signal does what it does without us
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(process.pid, signum)
    assert processes.exit_status(process) == {signal.SIGTERM: 143, signal.SIGINT: 130}[signum]
    found = checkpoints.newest(folder / "run")
    if found is None:
        assert last_row(folder / "run") == 0
        return 0
    # A row for each step, so the last finished step is the last row's, or the one whose validation was interrupted.
    pending = found.state["pending"]
    assert found.step == last_row(folder / "run") + (pending is not None) < 400
    assert pending is None or pending["step"] == found.step
    return found.step


def finish(folder: Path, **options) -> dict[str, torch.Tensor]:
    process = processes.start(processes.fit_until_told, folder, {"resume": "auto", **options})
    assert processes.exit_status(process) == 0
    return load_file(folder / "weights-0.safetensors")


def test_signals_save_the_last_finished_step(tmp_path):
    for name, signum in (("term", signal.SIGTERM), ("int", signal.SIGINT)):
        folder = tmp_path / name
        folder.mkdir()
        assert signal_once(folder, signum, 0.15) > 0


@pytest.mark.campaign(weight=1)
def test_signals(campaign, tmp_path):
    """At any time after the first step: in a step, a validation, a save. The save has every seventh step already."""
    for seed in campaign:
        draw, folder = random.Random(seed), tmp_path / str(seed)
        folder.mkdir()
        signum = draw.choice([signal.SIGTERM, signal.SIGINT])
        signal_once(
            folder,
            signum,
            draw.uniform(0, 0.5),
            save_interval_steps=7,
            eval_interval_steps=3,
            async_checkpoints=draw.random() < 0.3,
        )
        shutil.rmtree(folder)


def test_a_signal_that_the_process_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts, interrupts.region():
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.received is None and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_signal_ends_at_once(tmp_path):
    for name, signum, status in (("term", signal.SIGTERM, -signal.SIGTERM), ("int", signal.SIGINT, 130)):
        folder = tmp_path / name
        folder.mkdir()
        process = processes.start(processes.fit_and_save_slowly, folder, 30.0)
        wait_for(folder / "saving")
        os.kill(process.pid, signum)
        time.sleep(0.2)
        assert process.is_alive(), "the first signal waits for the save"
        began = time.monotonic()
        # Again and again: on a busy machine the first has perhaps not been handled yet, and two that wait are one.
        while process.is_alive() and time.monotonic() - began < 10:
            os.kill(process.pid, signum)
            process.join(0.5)
        assert processes.exit_status(process, 1) == status, "the save of 30 seconds was waited for"


@pytest.mark.campaign(weight=1)
def test_signalled_runs(campaign, tmp_path):
    """One or two signals at random times, then the end: the weights of a run that was left alone."""
    options = dict(max_steps=60, save_interval_steps=7, eval_interval_steps=5)
    wanted = None
    for seed in campaign:
        draw, folder = random.Random(seed), tmp_path / str(seed)
        folder.mkdir()
        if wanted is None:
            wanted = finish(tmp_path, **options)
        for _ in range(draw.randrange(1, 3)):
            shutil.rmtree(folder / "started", ignore_errors=True)
            process = processes.start(processes.fit_until_told, folder, {"resume": "auto", **options})
            time.sleep(draw.uniform(0.0, 0.8))
            signum = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
            os.kill(process.pid, signum)
            # Before fit, a signal does what it always does; after the last step there is nothing to stop.
            allowed = {signal.SIGTERM: (143, -15, 0), signal.SIGINT: (130, -2, 1, 0), signal.SIGKILL: (-9, 0)}[signum]
            assert processes.exit_status(process) in allowed
        got = finish(folder, **options)
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
        shutil.rmtree(folder)
