"""The training loop."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from dataclasses import dataclass
from typing import Any, Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..config import TrainConfig, to_dict
from ..cuda_graphs import CUDACapture
from ..data.packing import IGNORED, Examples
from . import feed, graphs, run_folder, snapshot
from .clipping import clip
from .distributed import Group, check_launch, processes
from .feed import Plan, on_device
from .graphs import StepGraphs
from .guard import Guard, TrainingDiverged, weights_are_finite
from .heap import kept_heap
from .interrupts import Interrupted, Interrupts
from .loss import LossModule, activation_checkpointing
from .optim import build_optimizers, learning_rate, warmup_length
from .precision import autocast, resolve_amp
from .progress import Progress
from .run_folder import RunFolder
from .snapshot import Snapshot
from .speed import utilization

_LOG = logging.getLogger("psann_fast")

# Options that may change when a run is continued: they move no weight. The others would make it another run.
FREE_TO_CHANGE = (
    "checkpoint_dir", "resume", "progress", "log_interval_steps", "save_interval_steps", "eval_interval_steps", "keep_checkpoints",
    "async_checkpoints", "activation_checkpointing", "compile", "cuda_graphs", "ddp", "fsdp", "sample_interval_steps",
    "sample_prompt", "tensorboard",
)  # fmt: skip
# And these, which make it longer or shorter: the schedule follows them from there on.
FREE_WITH_NOTICE = ("epochs", "max_steps")

Row = dict[str, Any]


def train(
    module: nn.Module,
    examples: Examples,
    config: TrainConfig,
    *,
    val_examples: Examples | None = None,
    run: RunFolder | None = None,
    save: Callable[[str, Snapshot], None] | None = None,
    sample: Callable[[int], None] | None = None,
    resumed: Snapshot | None = None,
    history: list[Row] | None = None,
) -> list[Row]:
    """Train `module` in place on its own device; returns the rows of metrics (every log interval, and the last step).

    save     save(name, snapshot) writes a checkpoint: "last" every save_interval_steps, at the end and when a signal ends it,
             "best" at each new lowest validation loss
    sample   sample(step) every sample_interval_steps; the module is in eval mode then
    resumed  what to continue from; the module holds its weights already. On a CPU the run goes on bit for bit
    history  the list that receives the rows, so that those of a run that is interrupted are not lost (default: a new one)

    Under torchrun every process calls this with the same arguments; process 0 writes. SIGINT and SIGTERM end the run at its last
    finished step: KeyboardInterrupt, SystemExit(143).

    Raises ValueError for options that this device cannot serve or that differ from the resumed run's, TrainingDiverged at NaN or
    infinity, what `save` raises.
    """
    device = next(module.parameters()).device
    dtype = check(config, device)
    group = Group(config, device)
    try:
        history = [] if history is None else history
        training = _Training(module, examples, config, dtype, group, val_examples, run, save, sample, history)
        training.run_from(resumed)
    finally:
        group.close()
    return training.history


def check(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """The autocast dtype, or None. Raises ValueError for options that cannot be served here, ModuleNotFoundError where tensorboard
    is wanted and not installed, before anything is touched."""
    for name, default in (("lr", "default_rate"), ("optimizer", "default_optimizer")):
        if getattr(config, name) is None:
            raise ValueError(f"{name} is None; give train one (fit takes {default}'s)")
    check_launch(config)
    if config.tensorboard:
        run_folder.tensorboard_writer()
    dtype = resolve_amp(config.amp, device)
    if dtype == torch.float16 and config.optimizer == "muon":
        raise ValueError(
            "optimizer is 'muon' and amp is 'fp16', whose overflows could stop one half of a step alone; use amp='bf16', or "
            "optimizer='adamw'"
        )
    reason = graphs.refuses(config, device, processes(config)) if config.cuda_graphs else None
    if reason is not None:
        raise ValueError(f"cuda_graphs is True, and {reason}; leave cuda_graphs out")
    return dtype


@dataclass(frozen=True)
class Position:
    """Where a run stands after a finished step; replaced as a whole, so that an interruption finds one or the other.

    random   torch's random states after the step
    pending  the row of this step, if its validation has not ended yet
    """

    step: int
    tokens: int
    seconds: float
    random: Mapping[str, Tensor]
    pending: Row | None = None


class _Training:
    """One call of train."""

    def __init__(
        self, module: nn.Module, examples: Examples, config: TrainConfig, dtype: torch.dtype | None, group: Group,
        val_examples: Examples | None, run: RunFolder | None, save: Callable[[str, Snapshot], None] | None,
        sample: Callable[[int], None] | None, history: list[Row],
    ) -> None:  # fmt: skip
        self.examples, self.config, self.dtype, self.group, self.val_examples = examples, config, dtype, group, val_examples
        self.run, self.save, self.sample, self.history = run, save, sample, history
        self.device, self.given = group.device, module
        self.plan = Plan.of(examples, config, group.size)
        self.warmup = warmup_length(config, self.plan.total_steps)
        self.module = group.own(module)
        self.loss_module = LossModule(self.module, config.label_smoothing)
        if config.compile:
            self.loss_module.compile()
        self.wrapped = group.wrapped(self.loss_module)
        self.optimizers = build_optimizers(self.module, config)
        self.learning = [p for p in self.module.parameters() if p.requires_grad]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.guard = Guard(self.optimizers, self.scaler, config, self.device)
        self.graphs: StepGraphs | None = None  # made when training begins
        self.interrupts = Interrupts(at_once=group.size == 1)
        self.best, self.saved_step = math.inf, -1

    # -- the run --------------------------------------------------------------------------------------------------------------

    def run_from(self, resumed: Snapshot | None) -> None:
        bar = self.bar = Progress(self.plan.total_steps, shown=self.config.progress and self.group.is_main)
        self.module.train()
        try:
            with (
                self.interrupts,
                torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []),
                activation_checkpointing(self.module, self.config.activation_checkpointing),
                kept_heap() if self.device.type == "cpu" else contextlib.nullcontext(),
            ):
                # Processes must drop out different features; process 0 draws what a run of one process does.
                torch.manual_seed(self.config.seed + self.group.rank)
                self.at = Position(0, 0, 0.0, snapshot.random_state(self.device))
                if resumed is not None:
                    self._restore(resumed)
                try:
                    self._loop()
                except Interrupted as signal:
                    self._end_early(signal)
        finally:
            bar.close()
            for parameter in self.learning:
                parameter.grad = None
            self.module.eval()
            if self.module is not self.given:
                self.given.load_state_dict(self.group.state_dict(self.module))
            self.given.eval()

    def _loop(self) -> None:
        if self.config.cuda_graphs:
            self.graphs = StepGraphs(self._micro_batch, self.learning, self.plan.rows, CUDACapture(self.device))
        self.bar.step(self.at.step)
        self._start_clock()
        if self.at.pending is not None:
            self._finish_row(dict(self.at.pending))
        source = feed.steps(
            self.examples, self.plan, self.config, first=self.at.step, rank=self.group.rank, processes=self.group.size
        )
        if self.device.type == "cuda":
            source = feed.pinned(source)
        with contextlib.closing(source):
            for data in source:
                self._step(data)
                self._poll()
        if self.save is not None and self.saved_step < self.at.step:
            self._save_last()

    def _step(self, data: feed.StepData) -> None:
        step, config = self.at.step, self.config
        rate = learning_rate(step, self.plan.total_steps, self.warmup, config)
        with self.interrupts.region():
            loss = self._backward(data)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                self.scaler.unscale_(optimizer)  # before clipping, which must see true norms
            norm = clip(self.learning, config.grad_clip if config.grad_clip > 0 else math.inf)
        self.guard.step(step + 1, loss, norm)
        if self.graphs is None:
            for parameter in self.learning:
                parameter.grad = None
        self.at = Position(step + 1, self.at.tokens + data.targets, self._seconds(), snapshot.random_state(self.device))
        self.bar.step(1)
        self._after(loss, norm, rate)

    def _backward(self, data: feed.StepData) -> Tensor:
        """Gradients of the mean loss over the targets of the step; returns that loss."""
        if self.graphs is not None:
            return self.graphs.step([on_device(batch, self.device) for batch in data.batches], data.targets)
        parts = []
        for index, batch in enumerate(data.batches):
            with self.group.exchange(self.wrapped, index + 1 == len(data.batches)):
                parts.append(self._micro_batch(*on_device(batch, self.device), data.targets))
        return self.group.sum(torch.stack(parts).sum())

    def _micro_batch(self, input_ids: Tensor, targets: Tensor, starts: Tensor | None, count: int | Tensor) -> Tensor:
        """Add the gradients of the loss over `count`, the targets of the whole step; returns that."""
        with autocast(self.dtype, self.device):
            # Of the whole step: micro-batches of few tokens must not weigh more.
            part = self.wrapped(input_ids, targets, starts) / count
        # The processes' gradients are averaged; their losses are parts of one mean.
        self.scaler.scale(part * self.group.size if self.group.size > 1 else part).backward()
        return part.detach()

    def _after(self, loss: Tensor, norm: Tensor, rate: float) -> None:
        """What is due after a step: a row, a validation, a sample, a checkpoint."""
        config, step = self.config, self.at.step
        is_last = step == self.plan.total_steps
        due = lambda interval: is_last or step % interval == 0  # noqa: E731 (three uses)
        is_logged = is_last or (step - 1) % config.log_interval_steps == 0
        is_validated = self.val_examples is not None and due(config.eval_interval_steps)
        is_saved = self.save is not None and due(config.save_interval_steps)
        if is_logged or is_validated or is_saved:
            skipped = self.guard.check()
        if is_logged or is_validated:
            speed = (self.at.tokens - self.logged_tokens) / max(time.perf_counter() - self.logged_at, 1e-9)
            row = {
                "step": step,
                "epoch": 1 + (step - 1) // self.plan.steps_per_epoch,
                "loss": loss.item(),
                "val_loss": None,
                "lr": rate,
                "grad_norm": norm.item(),
                "skipped_steps": skipped,
                "tokens": self.at.tokens,
                "tokens_per_second": speed,
                "mfu": utilization(speed, self.module, self.dtype, self.group.size),
                "seconds": self.at.seconds,
            }
            if is_validated:
                self.at = Position(**{**vars(self.at), "pending": row})
            self._finish_row(row)
        if self.sample is not None and config.sample_interval_steps is not None and due(config.sample_interval_steps):
            self._sample()
        if is_saved:
            self._save_last()

    def _finish_row(self, row: Row) -> None:
        """Validate if that is due, then keep the row."""
        self.bar.note(
            loss=f"{row['loss']:.3f}", **{"tokens/s": f"{row['tokens_per_second']:,.0f}", "MFU": f"{100 * row['mfu']:.0f}%"}
        )
        if self.at.pending is not None:
            row["val_loss"] = self._validate()
            self.bar.note(val=f"{row['val_loss']:.3f}")
            self.at = Position(**{**vars(self.at), "pending": None})
        self.history.append(row)
        if self.run is not None:
            self.run.add(row)
        if row["val_loss"] is not None and row["val_loss"] < self.best:
            self.best = row["val_loss"]
            if self.save is not None:
                self._check_weights()
                taken = Snapshot(self.at.step, self._weights())
                self.group.on_main(lambda: self.save("best", taken))
        # After the validation, whose time is not training's.
        self._start_clock()

    def _validate(self) -> float:
        self.loss_module.eval()
        try:
            return _mean_loss(
                self.wrapped if self.group.is_sharded else self.loss_module, self.val_examples, self.plan.rows, self.dtype,
                self.device, group=self.group, interrupts=self.interrupts,
            )  # fmt: skip
        finally:
            self.loss_module.train()
            self.group.reshard(self.wrapped)

    def _sample(self) -> None:
        self.module.eval()
        if not self.group.is_sharded:  # no process holds the model then
            self.group.on_main(lambda: self.sample(self.at.step))
        self.module.train()
        self._start_clock()

    def _start_clock(self) -> None:
        self.logged_at, self.logged_tokens = time.perf_counter(), self.at.tokens
        self.began = time.perf_counter() - self.at.seconds

    def _seconds(self) -> float:
        return time.perf_counter() - self.began

    # -- interruption, checkpoints --------------------------------------------------------------------------------------------

    def _poll(self) -> None:
        """Raise Interrupted if a signal has come, to any process."""
        received = self.group.most(self.interrupts.received or 0)
        if received:
            raise Interrupted(received)

    def _end_early(self, signal: Interrupted) -> None:
        """Save the last finished step, then end as the signal wants it."""
        if self.save is None or self.at.step == 0:
            _LOG.warning("%s: nothing was saved", signal)
        elif self.at.step == self.saved_step:
            _LOG.warning("%s: saved after step %d of %d", signal, self.at.step, self.plan.total_steps)
        else:
            try:
                self._save_last()
                _LOG.warning("%s: saved after step %d of %d", signal, self.at.step, self.plan.total_steps)
            except TrainingDiverged as error:
                _LOG.warning("%s: nothing was saved, because %s", signal, error)
        raise signal.as_exit() from None

    def _save_last(self) -> None:
        self.guard.check()
        self._check_weights()
        taken = self._snapshot()
        self.group.on_main(lambda: self.save("last", taken))
        self.saved_step = self.at.step
        self._start_clock()

    def _check_weights(self) -> None:
        """Raise TrainingDiverged if a weight is not finite, so that none such is ever saved."""
        if self.group.most(int(not weights_are_finite(self.module))):
            raise TrainingDiverged(
                f"a weight is NaN or infinite after optimizer step {self.at.step}; nothing was saved since. "
                "Lower lr or lengthen warmup_steps"
            )

    def _weights(self) -> dict[str, Tensor]:
        return snapshot.on_cpu(self.group.state_dict(self.module), copy=self.config.async_checkpoints)

    def _snapshot(self) -> Snapshot:
        moments = snapshot.on_cpu(snapshot.moments(self.module, self.optimizers), copy=self.config.async_checkpoints)
        random = {f"{snapshot.RANDOM}/{name}": tensor for name, tensor in self.group.gather(self.at.random).items()}
        state = {
            "tokens": self.at.tokens,
            "seconds": self.at.seconds,
            "pending": self.at.pending,
            "best": None if self.best == math.inf else self.best,
            "scaler": self.scaler.state_dict(),
            "guard": self.guard.state(),
            "processes": self.group.size,
            "train": to_dict(self.config),
            "data": self.examples.fingerprint,
        }
        return Snapshot(self.at.step, self._weights(), {**moments, **random}, state)

    def _restore(self, resumed: Snapshot) -> None:
        state = resumed.state
        snapshot.restore_moments(self.module, self.optimizers, resumed.tensors)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.guard.restore(state["guard"])
        self.best = math.inf if state["best"] is None else state["best"]
        prefix = f"{snapshot.RANDOM}/{self.group.rank}/"
        random = {name.removeprefix(prefix): tensor for name, tensor in resumed.tensors.items() if name.startswith(prefix)}
        snapshot.set_random_state(random, self.device)
        self.at = Position(resumed.step, state["tokens"], state["seconds"], random, state["pending"])
        self.saved_step = resumed.step
        if resumed.step > self.plan.total_steps:
            _LOG.warning("the run has gone %d steps already, and is to have %d", resumed.step, self.plan.total_steps)
        else:
            _LOG.info("continuing after step %d of %d", resumed.step, self.plan.total_steps)


def check_same_run(state: Mapping[str, Any], config: TrainConfig, examples: Examples) -> None:
    """Raise ValueError unless options, data and number of processes are those of the run that `state` is of."""
    # The optimizer first: the default rate follows from it.
    for name, value in sorted(to_dict(config).items(), key=lambda option: option[0] != "optimizer"):
        before = state["train"].get(name, value)
        if before == value or name in FREE_TO_CHANGE:
            continue
        if name not in FREE_WITH_NOTICE:
            raise ValueError(
                f"resume: {name} was {before!r} in the run to continue and is {value!r} now; give the same options, or start anew "
                "with resume=None in another checkpoint_dir"
            )
        _LOG.warning("resume: %s was %r and is %r now; the learning rate follows the new length from here on", name, before, value)
    if state["processes"] != processes(config):
        raise ValueError(
            f"resume: the run had {state['processes']} processes and now has {processes(config)}; start as many"
        )
    if state["data"] != examples.fingerprint:
        raise ValueError("resume: the data is not that of the run to continue; pass the same texts, window, tokenizer and seed")


def batch_loss(module: nn.Module, batch: feed.Batch, device: torch.device, label_smoothing: float = 0.0) -> Tensor:
    """Sum over the targets of a batch of their cross-entropy in nats, smoothed whatever the module's mode."""
    return LossModule(module, label_smoothing)(*on_device(batch, device))


@torch.no_grad()
def evaluate(
    module: nn.Module, examples: Examples, rows: int, dtype: torch.dtype | None = None, *, count_separators: bool = True
) -> float:
    """Mean cross-entropy in nats per target token over all of `examples`; the module's mode is left as it was.

    count_separators  whether the separator after each document counts as a target
    """
    device = next(module.parameters()).device
    was_training = module.training
    module.eval()
    try:
        return _mean_loss(LossModule(module), examples, rows, dtype, device, count_separators=count_separators)
    finally:
        module.train(was_training)


@torch.no_grad()
def _mean_loss(
    loss_module: nn.Module, examples: Examples, rows: int, dtype: torch.dtype | None, device: torch.device, *,
    count_separators: bool = True, group: Group | None = None, interrupts: Interrupts | None = None,
) -> float:  # fmt: skip
    """The mean over all targets; several processes take batches in turn, as many each."""
    rank, size = (0, 1) if group is None else (group.rank, group.size)
    total, targets = 0.0, 0
    for first in range(0, len(examples), rows * size):
        mine = np.arange(first + rank * rows, min(first + (rank + 1) * rows, len(examples)))
        batch = examples.batch(mine) if len(mine) else examples.blank()
        if not count_separators:
            batch["targets"][batch["targets"] == examples.eos_id] = IGNORED
        with contextlib.nullcontext() if interrupts is None else interrupts.region(), autocast(dtype, device):
            total += loss_module(*on_device(batch, device)).item()
        targets += int((batch["targets"] != IGNORED).sum())
    if group is not None:
        total, targets = group.sum(torch.tensor((total, targets), dtype=torch.float64)).tolist()
    return total / targets
