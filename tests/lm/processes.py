"""Work done in processes of its own, forked from one that has torch imported already:
to be killed, signalled, or to train together."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Callable

import torch
from psann_fast import TrainConfig
from psann_fast.cli import main as command_line  # noqa: F401 (imported once, before the fork)
from psann_fast.train import run_folder
from psann_fast.train.checkpoints import Checkpoints
from psann_fast.train.snapshot import Snapshot
from psann_fast.train.trainer import train
from safetensors.torch import save_file
from tiny import data, fitted, model, tiny, tokens

SERVER: list[bool] = []
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def start(function: Callable[..., None], *arguments: Any, environment: dict[str, str] | None = None) -> BaseProcess:
    """function(*arguments), a function of this module, in a new process on one thread."""
    if not SERVER:
        # The server imports this module before it forks only if it finds it: Python 3.11 gives it no path.
        before = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *before.split(os.pathsep)])
        try:
            multiprocessing.forkserver.ensure_running()
            SERVER.append(True)
        finally:
            os.environ["PYTHONPATH"] = before
    process = CONTEXT.Process(target=_run, args=(function, arguments, environment or {}), daemon=True)
    process.start()
    return process


def _run(function: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job of a shell ignores
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1, open(_stacks_of(os.getpid()), "w"), all_threads=True)
    run_folder.plot_run = lambda rows, path: None  # takes longer than these runs
    try:
        function(*arguments)
    except KeyboardInterrupt:
        sys.exit(130)  # as the command line does


def exit_status(process: BaseProcess, seconds: float = 60) -> int:
    process.join(seconds)
    stacks = _stacks_of(process.pid)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGUSR1)
        process.join(1)
        process.kill()
        told = stacks.read_text() if stacks.exists() else "it had not begun"
        raise AssertionError(f"the process did not end within {seconds} s; where it stood:\n{told}")
    stacks.unlink(missing_ok=True)
    return process.exitcode


def _stacks_of(pid: int) -> Path:
    return Path(tempfile.gettempdir()) / f"psann-fast-stacks-{pid}"


def together(count: int, function: Callable[..., None], *arguments: Any) -> list[int]:
    """The exit statuses of `count` processes that run function(*arguments) as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        start(function, *arguments, environment={
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        })
        for rank in range(count)
    ]  # fmt: skip
    return [exit_status(process) for process in processes]


def rank() -> int:
    return int(os.environ.get("RANK", 0))


# -- what is run in them --------------------------------------------------------------------------------------------------------


def train_some(folder: Path, base: str, packed: bool, options: dict[str, Any]) -> None:
    """Some steps of a float64 model on ragged examples; leaves weights-<rank>.safetensors and history-<rank>.json."""
    from test_trainer import examples

    module = tiny(rank(), base=base).double()  # the processes start with different weights and must end with equal ones
    settings = TrainConfig(
        **{
            "log_interval_steps": 1, "progress": False, "amp": "fp32", "eval_interval_steps": 3, "lr": 1e-3, "optimizer": "muon",
            **options,
        }
    )  # fmt: skip
    leave(folder, module, train(module, examples(37, packed=packed), settings, val_examples=examples(9)))


def fit_some(folder: Path, seed: int, options: dict[str, Any]) -> None:
    """fit, with dropout and validation; leaves what train_some leaves."""
    lm = model(seed=seed, dropout=0.2)
    fitted(lm, data(val_split=0.3), **options)
    leave(folder, lm.module, lm.history_)


def leave(folder: Path, module: torch.nn.Module, history: list[dict[str, Any]]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, folder / f"weights-{rank()}.safetensors")
    (folder / f"history-{rank()}.json").write_text(json.dumps(history))


def save_forever(folder: Path) -> None:
    """Checkpoints without end; each acknowledged step is one line in folder/acknowledged."""
    written = os.open(folder / "acknowledged", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    kept = Checkpoints(folder, model_files, keep=2, is_resumed=True)
    first = max((int(line) for line in (folder / "acknowledged").read_text().split()), default=0) + 1
    for step in range(first, first + 100_000):
        kept.save("last", numbered(step))
        if step % 3 == 0:
            kept.save("best", numbered(step))
        os.write(written, f"{step}\n".encode())


def numbered(step: int) -> Snapshot:
    """A snapshot whose every number is its step."""
    filled = torch.full((700,), float(step))
    return Snapshot(step, {"w": filled}, {"optimizer/w/m": filled, "random/0/cpu": filled.to(torch.uint8)}, {"value": step})


def model_files(weights: Any) -> dict[str, Any]:
    return {"model.safetensors": weights, "config.json": json.dumps({"value": int(weights["w"][0])}).encode()}


def fit_until_told(folder: Path, options: dict[str, Any]) -> None:
    """A long fit, for signals."""
    with contextlib.suppress(FileExistsError):
        (folder / "started").touch()
    fit_some(folder, 0, {"checkpoint_dir": folder / "run", "max_steps": 400, "epochs": 400, **options})


def fit_and_save_slowly(folder: Path, seconds: float) -> None:
    """A fit whose checkpoint takes long, and says when it begins."""
    real = Checkpoints._write_last

    def slow(self: Checkpoints, snapshot: Snapshot) -> None:
        (folder / "saving").touch()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.01)
        real(self, snapshot)

    Checkpoints._write_last = slow
    fit_until_told(folder, {"save_interval_steps": 5})


def save_under_a_limit(folder: Path) -> None:
    """A save that the system stops in the middle of a file; the error must say so, and the one before must stay."""
    kept = Checkpoints(folder, model_files, keep=2)
    kept.save("last", numbered(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        kept.save("last", numbered(2))
    except OSError as error:
        assert "bytes are needed" in str(error), error
    else:
        raise AssertionError("a file larger than the limit was written")
