"""The processes that train together: torch's DDP and FSDP2 under torchrun, and the few words that they exchange.

One process is a group of itself, so the training loop has one form. Every process sees the whole order of examples and takes its
own rows of each micro-batch; gradients are averaged once a step; process 0 alone writes, and its errors become everyone's.
"""

from __future__ import annotations

import contextlib
import copy
import os
from typing import Any, Callable, ContextManager, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import TrainConfig
from .snapshot import whole

LAUNCH = "torchrun --nproc-per-node=N your_script.py"


def is_launched() -> bool:
    """True if torchrun (or a launcher that speaks like it) started this process as one of several."""
    return dist.is_available() and {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def check_launch(config: TrainConfig) -> None:
    """Raise ValueError if the options want several processes and this is one by itself."""
    if config.fsdp and config.ddp == "off":
        raise ValueError("fsdp is True and ddp is 'off'; sharding needs several processes: use ddp='auto'")
    if config.fsdp and config.amp == "fp16":
        raise ValueError("fsdp is True and amp is 'fp16', whose gradient scale would differ between the shards; use amp='bf16'")
    for name, is_wanted in (("ddp", config.ddp == "on"), ("fsdp", config.fsdp)):
        if is_wanted and not is_launched():
            value = repr(getattr(config, name))
            raise ValueError(
                f"{name} is {value}, but this process was not started as one of several; use ddp='auto' or 'off', fsdp=False, "
                f"or start it with {LAUNCH}"
            )


def processes(config: TrainConfig) -> int:
    """How many processes train together under these options."""
    return int(os.environ["WORLD_SIZE"]) if config.ddp != "off" and is_launched() else 1


class Group:
    """The processes of one run.

    rank, size  this process's number, and how many there are
    is_main     True for the process that writes and shows
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.is_sharded, self.rank, self.size, self._is_mine = config.fsdp, 0, 1, False
        self.is_exchanging = processes(config) > 1 or config.fsdp
        if self.is_exchanging:
            if not dist.is_initialized():
                if device.type == "cuda":
                    torch.cuda.set_device(device)
                dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
                self._is_mine = True
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def close(self) -> None:
        """Leave the group, if it was entered here."""
        if self._is_mine:
            dist.destroy_process_group()
            self._is_mine = False

    def own(self, module: nn.Module) -> nn.Module:
        """The module to train, equal in every process: `module` itself, or for FSDP2, which changes a module's class, a copy."""
        if not self.is_exchanging:
            return module
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), 0)  # the callers' random states may have differed
        return copy.deepcopy(module) if self.is_sharded else module

    def wrapped(self, loss_module: nn.Module) -> nn.Module:
        """`loss_module` so that backward averages the gradients over the processes; FSDP2 shares each block's parameters out."""
        if not self.is_exchanging:
            return loss_module
        if not self.is_sharded:
            ids = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(loss_module, device_ids=ids, gradient_as_bucket_view=True)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        for block in getattr(loss_module.module, "blocks", ()):
            fully_shard(block, mesh=mesh)
        return fully_shard(loss_module, mesh=mesh)

    def exchange(self, wrapped: nn.Module, is_last: bool) -> ContextManager[None]:
        """Around a micro-batch: only the last one of a step exchanges gradients."""
        if not self.is_exchanging:
            return contextlib.nullcontext()
        if self.is_sharded:
            wrapped.set_requires_gradient_sync(is_last)
            return contextlib.nullcontext()
        return contextlib.nullcontext() if is_last else wrapped.no_sync()

    def reshard(self, wrapped: nn.Module) -> None:
        """Share the parameters out again after a forward without a backward, which leaves FSDP2's outermost ones whole: as other
        tensors than the optimizer's."""
        if self.is_sharded:
            wrapped.reshard()

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def most(self, number: int) -> int:
        """The largest of the processes' numbers. Waits for all of them, not for a GPU."""
        if self.size == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """The state dict of `module`, sharded or not, whole and in every process; all must call it."""
        return {name: whole(tensor) for name, tensor in module.state_dict().items()}

    def gather(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each process's tensors on the CPU, as "<rank>/<name>", in every process."""
        if self.size == 1:
            return {f"0/{name}": tensor for name, tensor in states.items()}
        gathered = {}
        for name, tensor in states.items():
            parts = [torch.empty_like(tensor) for _ in range(self.size)]
            dist.all_gather(parts, tensor)
            gathered |= {f"{rank}/{name}": part for rank, part in enumerate(parts)}
        return gathered

    def on_main(self, action: Callable[[], object]) -> None:
        """Do something in process 0; an OSError or ValueError of it is raised in all, so that none waits for another in vain."""
        error: BaseException | None = None
        if self.is_main:
            try:
                action()
            except (OSError, ValueError) as caught:
                error = caught
        if self.size > 1:
            told: list[Any] = [None if error is None else f"process 0: {error}"]
            dist.broadcast_object_list(told, 0)
            if not self.is_main and told[0] is not None:
                raise OSError(told[0])
        if error is not None:
            raise error
