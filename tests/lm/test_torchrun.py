"""The real launcher: equal to one process, interrupted by SIGTERM, continued bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from psann_fast.train import checkpoint, checkpoints
from safetensors.torch import load_file
from test_chaos import last_row
from test_distributed import check_equal

SECONDS = 150


def launched(count: int, *arguments: str) -> subprocess.Popen[str]:
    """`torchrun --nproc-per-node=count arguments`, one thread in each process."""
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    ]  # fmt: skip
    return subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def train_some(count: int, function: object, folder: Path, base: str, packed: bool, options: dict[str, Any]) -> list[int]:
    """As processes.together."""
    target = Path(__file__).with_name("under_torchrun.py")
    run = launched(count, str(target), str(folder), base, json.dumps(packed), json.dumps(options))
    out, err = run.communicate(timeout=SECONDS)
    assert run.returncode == 0, err
    return [0] * count


def test_two_processes_are_one(tmp_path):
    check_equal(tmp_path, 2, "waveresnet", False, 1e-6, accumulation=2, launch=train_some)


@pytest.mark.campaign(weight=0.1)
@pytest.mark.parametrize("is_sharded", [False, True], ids=["ddp", "fsdp"])
def test_four_processes_are_one(tmp_path, is_sharded):
    check_equal(
        tmp_path, 4, "respsann", True, 1e-5 if is_sharded else 1e-6, rows=1, accumulation=2, fsdp=is_sharded, launch=train_some
    )


# -- the command line -----------------------------------------------------------------------------------------------------------


def training(folder: Path, run: str, *options: str, count: int = 2) -> subprocess.Popen[str]:
    (folder / "text.txt").write_text("The sea was calm and the boat went slowly home. Rain fell all night. " * 60)
    return launched(
        count, "-m", "psann_fast.cli", "train", "--data", str(folder / "text.txt"), "--out", str(folder / run),
        "--tokenizer", "simple", "--d-model", "16", "--n-layers", "1", "--n-heads", "2", "--max-steps", "60", "--epochs", "99",
        "--batch-tokens", "64", "--max-length", "16", "--dropout", "0.1", "--log-interval-steps", "1",
        "--save-interval-steps", "7", "--device", "cpu", "--amp", "fp32", "--ddp", "on", *options,
    )  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.read(folder)["model.safetensors"])


@pytest.mark.campaign(weight=0.3)
@pytest.mark.parametrize("options", [(), ("--fsdp",)], ids=["ddp", "fsdp"])
def test_sigterm_to_torchrun_and_the_run_goes_on(tmp_path, options):
    whole = training(tmp_path, "whole", *options)
    out, err = whole.communicate(timeout=SECONDS)
    assert whole.returncode == 0, err
    assert out.count("run folder:") == 1 and checkpoints.newest(tmp_path / "whole").state["processes"] == 2
    run = training(tmp_path, "run", *options)
    end = time.monotonic() + SECONDS
    while not (tmp_path / "run" / "metrics.csv").exists() or last_row(tmp_path / "run") < 10:
        assert time.monotonic() < end and run.poll() is None, run.communicate()[1]
        time.sleep(0.005)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=SECONDS)
    assert run.returncode != 0
    found = checkpoints.newest(tmp_path / "run")
    assert found.step == last_row(tmp_path / "run") < 60 and f"SIGTERM: saved after step {found.step} of 60" in err
    again = training(tmp_path, "run", "--resume", "auto", *options)
    _, err = again.communicate(timeout=SECONDS)
    assert again.returncode == 0, err
    wanted, got = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert wanted.keys() == got.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.campaign(weight=0.1)
def test_an_error_is_said_once_and_ends_all(tmp_path):
    """The message of process 0, which the launcher's own traceback would hide."""
    run = training(tmp_path, "run", "--d-model", "15")
    _, err = run.communicate(timeout=SECONDS)
    assert run.returncode != 0
    assert "n_heads is 2, which does not divide d_model 15; choose a divisor" in err
