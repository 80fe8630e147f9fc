"""What a run leaves to look at: metrics as CSV and JSON lines, a plot, samples, the resolved configuration and a model card."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping

import yaml

from .plots import plot_run

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

_LOG = logging.getLogger("psann_fast")

COLUMNS = (
    "step", "epoch", "loss", "val_loss", "lr", "grad_norm", "skipped_steps", "tokens", "tokens_per_second", "mfu", "seconds",
)  # fmt: skip
# What belongs to one run; what an earlier run left keeps its content under other names.
HELD = ("config.yaml", "metrics.csv", "metrics.jsonl", "loss.png", "samples.txt", "README.md", "checkpoints", "best")


class RunFolder:
    """A folder for one run, created here.

    after_step   None: a new run. What an earlier one left is renamed, all with one number: metrics.csv to metrics-001.csv,
                 checkpoints to checkpoints-001 and so on. A step: the run that is here goes on after it; rows of later steps, which
                 will be made again, are kept in renamed files
    tensorboard  write the rows for TensorBoard too, into the folder tensorboard

    Raises OSError, naming what could not be written; ModuleNotFoundError if tensorboard is wanted and not installed.
    """

    def __init__(
        self, path: str | Path, configuration: Mapping[str, Any], *, after_step: int | None = None, tensorboard: bool = False
    ) -> None:
        self.path = Path(path)
        writer_class = tensorboard_writer() if tensorboard else None
        self.rows: list[dict[str, Any]] = []
        with _explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._open(configuration, after_step)
        self._board = None if writer_class is None else writer_class(str(self.path / "tensorboard"), purge_step=after_step)

    def _open(self, configuration: Mapping[str, Any], after_step: int | None) -> None:
        if after_step is None:
            set_aside(self.path, HELD)
        else:
            self._take_over(after_step)
        self._add_config(configuration)
        is_new = not (self.path / "metrics.csv").exists()
        self._csv_file = open(self.path / "metrics.csv", "a", newline="", encoding="utf-8")
        self._json_file = open(self.path / "metrics.jsonl", "a", encoding="utf-8")
        self._csv = csv.DictWriter(self._csv_file, COLUMNS)
        if is_new:
            self._csv.writeheader()
        for row in self.rows if is_new else ():
            self._write(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one row and flush it, so that a reader sees it at once."""
        self.rows.append(dict(row))
        with _explained(self.path / "metrics.csv"):
            self._write(row)
        if self._board is not None:
            for name in COLUMNS[2:]:
                if row.get(name) is not None:
                    self._board.add_scalar(name, row[name], row["step"])

    def add_sample(self, step: int, text: str) -> None:
        """Append what the model wrote after a step."""
        path = self.path / "samples.txt"
        with _explained(path), open(path, "a", encoding="utf-8") as file:
            file.write(f"--- step {step}\n{text}\n\n")

    def close(self, card: str | None = None) -> None:
        """Draw the plot; write the model card, if one is given."""
        with _explained(self.path):
            self._csv_file.close()
            self._json_file.close()
            if self._board is not None:
                self._board.close()
            if self.rows:
                plot_run(self.rows, self.path / "loss.png")
            if card is not None:
                (self.path / "README.md").write_text(card, encoding="utf-8")

    def _write(self, row: Mapping[str, Any]) -> None:
        self._csv.writerow({name: row.get(name, "") for name in COLUMNS})
        self._csv_file.flush()
        self._json_file.write(json.dumps({name: row.get(name) for name in COLUMNS}) + "\n")
        self._json_file.flush()

    def _take_over(self, after_step: int) -> None:
        """Read the rows of the run that goes on; where some will be made again, or the last one is torn, begin the files anew."""
        lines, is_whole = read_metrics(self.path)
        self.rows = [row for row in lines if row["step"] <= after_step]
        if not is_whole or len(self.rows) < len(lines):
            set_aside(self.path, ("metrics.csv", "metrics.jsonl"))

    def _add_config(self, configuration: Mapping[str, Any]) -> None:
        path, text = self.path / "config.yaml", yaml.safe_dump(dict(configuration), sort_keys=False)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            set_aside(self.path, (path.name,))
        path.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def one_run(path: str | Path) -> Iterator[None]:
    """Keeps other runs, of any process, out of a run folder, which is made if need be. Raises OSError where one is in it.

    The system lets go of the folder with the process, however that ends. Where it knows no such hold (Windows, some network
    folders), nothing is kept out.
    """
    path = Path(path)
    with _explained(path):
        path.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno, f"a run is going on in {path}; wait for its end, or train into another folder (checkpoint_dir, --out)"
            ) from None
        except OSError as error:
            _LOG.debug("%s cannot be held for one run alone: %s", path, error)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def logged_alone() -> Iterator[None]:
    """Around what must not hide an error that came before: its own is logged."""
    try:
        yield
    except OSError as error:
        _LOG.warning("%s", error)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Around writing into a run folder: an OSError says which file, and what stays."""
    try:
        yield
    except OSError as error:
        named = error.filename if error.filename is not None else path
        raise OSError(
            error.errno, f"cannot write {named}: {error.strerror or error}; checkpoints that were saved before stay whole"
        ) from error


def read_metrics(folder: str | Path) -> tuple[list[dict[str, Any]], bool]:
    """The rows of a run's metrics.jsonl, and whether the file is whole and agrees with metrics.csv;
    a torn last line is left out."""
    rows: list[dict[str, Any]] = []
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return rows, not (Path(folder) / "metrics.csv").exists()
    lines = path.read_text(encoding="utf-8").splitlines()
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return rows, False
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            return rows, False
        rows.append({name: row.get(name) for name in COLUMNS})
    csv_path = Path(folder) / "metrics.csv"
    in_csv = csv_path.read_text(encoding="utf-8").count("\n") if csv_path.exists() else 0
    return rows, in_csv == len(rows) + 1


def set_aside(folder: Path, names: Iterable[str]) -> None:
    """Rename what an earlier run left, all with the same number, the first that is free."""
    paths = [folder / name for name in names]
    number = 1
    while any(_numbered(path, number).exists() for path in paths):
        number += 1
    for path in paths:
        if path.exists():
            os.rename(path, _numbered(path, number))


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number:03d}{path.suffix}")


def tensorboard_writer() -> Any:
    """torch's class that writes for TensorBoard. Raises ModuleNotFoundError, saying what to install."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tensorboard=True needs the package tensorboard, which is not installed; pip install tensorboard"
        ) from error
    return SummaryWriter
