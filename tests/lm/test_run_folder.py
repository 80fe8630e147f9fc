"""What goes wrong with a run's folder while a person looks on: each message says what happened and what stays."""

from __future__ import annotations

import errno
import logging
import shutil
import signal

import pytest
from psann_fast.cli import main
from psann_fast.train import checkpoints, run_folder
from psann_fast.train.interrupts import Interrupted
from psann_fast.train.run_folder import one_run
from test_resume import interrupted_at
from tiny import SENTENCES, data, fitted, model


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    monkeypatch.setattr(run_folder, "plot_run", lambda rows, path: None)


def test_two_runs_do_not_share_a_folder(tmp_path):
    with one_run(tmp_path / "run"):
        lm = model()
        with pytest.raises(OSError, match="a run is going on in .*run; wait for its end, or train into another folder"):
            fitted(lm, checkpoint_dir=tmp_path / "run")
        assert list((tmp_path / "run").iterdir()) == [] and lm.tokenizer is None, "a refused run changed something"
    fitted(checkpoint_dir=tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):  # a run that ends early lets go of it
        fitted(interrupted_at(model(), 2), checkpoint_dir=tmp_path / "run")
    fitted(checkpoint_dir=tmp_path / "run", resume="auto")


def test_a_folder_that_vanishes_ends_in_the_error_of_the_save(tmp_path, caplog):
    lm, folder = model(), tmp_path / "run"
    calls = []

    def vanish(*_) -> None:
        calls.append(1)
        if len(calls) == 3:
            shutil.rmtree(folder)

    lm.module.register_forward_hook(vanish)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(FileNotFoundError, match="cannot save step 3: .* has vanished .*elsewhere"),
    ):
        fitted(lm, checkpoint_dir=folder, save_interval_steps=1)
    assert "cannot write" in caplog.text and "README.md" in caplog.text, "what could not be written after that is logged"
    lm.save(tmp_path / "elsewhere")


def test_a_full_disk_is_named_where_a_row_is_written(tmp_path, monkeypatch):
    real, rows = run_folder.RunFolder._write, []

    def full(self, row) -> None:
        rows.append(row)
        if len(rows) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, row)

    monkeypatch.setattr(run_folder.RunFolder, "_write", full)
    with pytest.raises(OSError, match=r"cannot write .*metrics.csv: No space left on device; checkpoints .* stay whole") as caught:
        fitted(checkpoint_dir=tmp_path, save_interval_steps=1)
    assert caught.value.errno == errno.ENOSPC and checkpoints.newest(tmp_path).step == 2


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(FileExistsError, match="cannot write .*run: File exists"):
        fitted(checkpoint_dir=tmp_path / "run")


@pytest.mark.parametrize(
    "call, told", [(1, "SIGINT: nothing was saved"), (4, "SIGINT: saved after step 3 of 4"), (3, "SIGINT: saved after step 2 of 4")]
)
def test_an_interruption_says_what_is_saved(tmp_path, caplog, call, told):
    """Step 2 was saved before, on its own account."""
    lm, calls = model(), []

    def interrupt(*_) -> None:
        calls.append(1)
        if len(calls) == call:
            raise Interrupted(signal.SIGINT)

    lm.module.register_forward_hook(interrupt)
    with caplog.at_level(logging.WARNING, "psann_fast"), pytest.raises(KeyboardInterrupt):
        fitted(lm, checkpoint_dir=tmp_path, save_interval_steps=2)
    assert [message for message in caplog.messages if message.startswith("SIGINT")] == [told]


def test_the_command_line_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text(" ".join(SENTENCES))
    small = "--tokenizer simple --d-model 16 --n-layers 1 --n-heads 2 --max-length 16 --batch-tokens 64 --device cpu --amp fp32"
    arguments = ["train", "--data", str(tmp_path / "a.txt"), "--out", str(tmp_path / "run"), *small.split(), "--max-steps", "4"]
    arguments += ["--save-interval-steps", "1", "--no-progress"]
    real = checkpoints.Checkpoints._write_last

    def interrupted(self, snapshot) -> None:
        real(self, snapshot)
        if snapshot.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.Checkpoints, "_write_last", interrupted)
    assert main(arguments) == 130
    error = capsys.readouterr().err
    assert f"to go on: the same line with --out {tmp_path / 'run'} --resume auto\n" in error
    assert error.endswith("psann-fast train: interrupted\n")
    monkeypatch.undo()
    assert main([*arguments, "--resume", "auto"]) == 0
    assert main([*arguments, "--resume", "auto", "--d-mlp", "24"]) == 2
    assert "resume: the model is not that of the run to continue (the tensor blocks.0.mlp" in capsys.readouterr().err


def test_what_cannot_be_continued_says_why(tmp_path, caplog):
    with pytest.raises(
        ValueError, match="resume is 'nowhere', and there is no such folder; pass 'auto' or a folder of checkpoints/"
    ):
        fitted(checkpoint_dir=tmp_path / "run", resume="nowhere")
    with caplog.at_level(logging.INFO, "psann_fast"):
        fitted(checkpoint_dir=tmp_path / "run", resume="auto")
    assert f"no checkpoint is in {tmp_path / 'run'}: the run begins" in caplog.messages
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text('{"name": "x"}')
    with pytest.raises(ValueError, match="manifest.json is damaged, or of something else; train into another folder, or remove it"):
        fitted(checkpoint_dir=tmp_path / "web")


def test_runs_that_are_damaged_are_listed_or_named(tmp_path, capsys):
    for name, rows in (("cut", '{"step": 3, "loss": 2.5}\n{"st'), ("list", "[1]\n"), ("text", '{"step": "a"}\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(rows)
    assert main(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "2.5000" in shown and shown.count("\n") == 4
    for content in ("a: [", "[1]", "model: 5", "[" * 5000):
        (tmp_path / "cut" / "config.yaml").write_text(content)
        assert main(["runs", str(tmp_path)]) == 2
        assert f"{tmp_path / 'cut' / 'config.yaml'} is not " in capsys.readouterr().err


def test_a_run_shorter_than_it_is_says_so(tmp_path, caplog):
    fitted(checkpoint_dir=tmp_path, max_steps=4)
    with caplog.at_level(logging.WARNING, "psann_fast"):
        fitted(model(), data(), checkpoint_dir=tmp_path, max_steps=2, resume="auto")
    assert "the run has gone 4 steps already, and is to have 2" in caplog.messages
