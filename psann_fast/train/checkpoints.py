"""The checkpoints of a run folder: the last few steps to continue from, the best and the newest model to use.

    run/manifest.json ...              the newest model, readable by psannLM.load(run)
    run/best/                          the model of the lowest validation loss
    run/checkpoints/step-00000500/     model, optimizer, random states, position: what `resume` continues from; also a model to load
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Mapping

from safetensors import SafetensorError
from torch import Tensor

from . import checkpoint
from .checkpoint import CheckpointError, Part
from .snapshot import Snapshot

_LOG = logging.getLogger("psann_fast")

WEIGHTS, TENSORS, STATE = "model.safetensors", "training.safetensors", "training.json"
ModelParts = Callable[[Mapping[str, Tensor]], "dict[str, Part]"]


class Checkpoints:
    """Writes snapshots into a run folder.

    folder       the run folder; it exists
    model_parts  the files of a model, given its state dict
    keep         newest steps that stay
    is_async     write in a thread, one snapshot at a time; an error shows at the next call
    is_resumed   the folder is that of the run that goes on: damage to what can be written anew is put aside

    Raises CheckpointError if the folder holds a manifest of others, before hours of training and not after.
    """

    def __init__(
        self, folder: str | Path, model_parts: ModelParts, *, keep: int, is_async: bool = False, is_resumed: bool = False
    ) -> None:
        self.folder, self.model_parts, self.keep, self.is_async = Path(folder), model_parts, keep, is_async
        for place in (self.folder, self.folder / "best"):
            if not _is_usable(place):
                if not is_resumed:
                    raise CheckpointError(
                        f"{place / checkpoint.MANIFEST} is damaged, or of something else; train into another folder, or remove it"
                    )
                _LOG.warning("%s is damaged and is put aside", place / checkpoint.MANIFEST)
                os.replace(place / checkpoint.MANIFEST, place / f"{checkpoint.MANIFEST}.damaged")
        self._pool = ThreadPoolExecutor(1, "checkpoint") if is_async else None
        self._writing: Future[None] | None = None

    def save(self, name: str, snapshot: Snapshot) -> None:
        """Write `snapshot` as "last" (a step to continue from, and the run's model) or as "best". Raises OSError."""
        action = {"last": self._write_last, "best": self._write_best}[name]
        self.wait()
        if self._pool is None:
            action(snapshot)
        else:
            self._writing = self._pool.submit(action, snapshot)

    def wait(self) -> None:
        """Until what was given to `save` is on disk. Raises the error of a write in the background."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write_best(self, snapshot: Snapshot) -> None:
        checkpoint.write(self.folder / "best", self.model_parts(snapshot.weights))

    def _write_last(self, snapshot: Snapshot) -> None:
        steps = self.folder / "checkpoints"
        place = steps / f"step-{snapshot.step:08d}"
        described = json.dumps({"step": snapshot.step, **snapshot.state}, indent=2).encode("utf-8")
        parts = self.model_parts(snapshot.weights)
        try:
            # Not with parents: a run folder that vanished is an error, not a new folder with one checkpoint.
            steps.mkdir(exist_ok=True)
            if place.exists() and not _is_usable(place):
                _remove(place)  # damaged, and the run was continued from an earlier step
            saved = checkpoint.write(place, {**parts, TENSORS: snapshot.tensors, STATE: described})
            checkpoint.sync(steps)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                error.errno,
                f"cannot save step {snapshot.step}: {self.folder} has vanished ({error.strerror}); the weights are in memory: "
                "save them elsewhere",
            ) from error
        checkpoint.write(self.folder, {name: saved[name] for name in parts})
        for old in _steps(self.folder)[self.keep :]:
            _remove(old)


def newest_step(folder: str | Path) -> int | None:
    """The step of the newest finished checkpoint of a run folder, unread; None if there is none."""
    return next(
        (int(place.name.partition("-")[2]) for place in _steps(Path(folder)) if (place / checkpoint.MANIFEST).exists()), None
    )


def newest(folder: str | Path) -> Snapshot | None:
    """The newest snapshot of a run folder that is whole, or None if there never was one; the log names the ones passed over.

    Raises CheckpointError if there are only damaged ones.
    """
    passed_over = []
    for place in _steps(Path(folder)):
        if not (place / checkpoint.MANIFEST).exists():
            _LOG.info("%s was not finished and is passed over", place)
            continue
        try:
            return read(place)
        except CheckpointError as error:
            _LOG.warning("%s; stepping back to the checkpoint before it", error)
            passed_over.append(place)
    if passed_over:
        names = ", ".join(place.name for place in passed_over)
        raise CheckpointError(f"all checkpoints of {folder} are damaged ({names}); restore one, or train anew elsewhere")
    return None


def read(place: str | Path) -> Snapshot:
    """The snapshot in the folder of one step, verified. Raises CheckpointError."""
    files = checkpoint.read(place)
    for name in (WEIGHTS, TENSORS, STATE):
        if name not in files:
            raise CheckpointError(
                f"{place} holds no {name}, so no run can be continued from it; load it as a model, or pass a folder of checkpoints/"
            )
    try:
        state = checkpoint.read_json(files[STATE])
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise ValueError(f"{STATE} says no step")
        weights = checkpoint.read_tensors(files[WEIGHTS])
        # Up to three of each parameter, and random states.
        return Snapshot(state["step"], weights, checkpoint.read_tensors(files[TENSORS], 4 * len(weights) + 10_000), state)
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"{place} does not hold a usable checkpoint: {error}") from error


def _steps(folder: Path) -> list[Path]:
    """The folders of steps, newest first."""
    steps = folder / "checkpoints"
    held = [place for place in steps.iterdir() if re.fullmatch(r"step-\d{8,}", place.name)] if steps.is_dir() else []
    return sorted(held, key=lambda place: int(place.name.partition("-")[2]), reverse=True)


def _is_usable(place: Path) -> bool:
    if not (place / checkpoint.MANIFEST).exists():
        return True  # nothing there, or an interrupted save, which the next one replaces
    try:
        checkpoint.check_ours(place)
    except CheckpointError:
        return False
    return True


def _remove(place: Path) -> None:
    """Remove the folder of a step, the manifest first, so that what is left of it is never taken for a checkpoint."""
    (place / checkpoint.MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(place)
