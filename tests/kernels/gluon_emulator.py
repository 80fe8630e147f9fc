"""Runs a warp-specialised Gluon kernel's own source on the CPU: a stand-in of the part of the language that it uses.

A partition is a thread; one runs at a time, and a seeded choice says who goes on at every barrier, copy and product. Copies of the
tensor memory accelerator (TMA) land at any moment after they were issued. Found are:

- a product that reads a tile whose bytes its partition has not waited for, or one that was never filled;
- a copy into a tile that some product may still read: a chain of arrivals and waits must say that each read is done before;
- a product's result, or registers it reads, used or left before the wait that covers it;
- barriers that are arrived at too often or get more bytes than were announced; deadlocks; copies that nobody waited for;
- stores outside a tensor, or twice to one element.

Shared memory begins as NaN, and again when a copy into it starts. Layouts are ignored: the compiler checks those, and gluon_gate.py
compiles. Division of negative numbers rounds down here and towards zero on a GPU. Proxy fences, and what warps of one partition do
apart, are not modelled.
"""

from __future__ import annotations

import ast
import threading
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, Callable

import torch
from torch import Tensor


class Hazard(RuntimeError):
    """The kernel did what a GPU does not define."""


class Deadlock(Hazard):
    """No partition can go on and no copy is under way."""


class _Abandoned(BaseException):
    """Ends a partition's thread after another one failed."""


class Partition(threading.Thread):
    """One group of warps. `clock[i]` is how far it knows partition i to have come."""

    def __init__(self, block: Block, place: int, count: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        super().__init__(daemon=True)
        self.block, self.place, self.function, self.arguments = block, place, function, arguments
        self.clock = [0] * count
        self.seen: dict[Barrier, int] = {}  # phases of each barrier that it has waited for
        self.products: list[Product] = []  # under way, oldest first
        self.turn = threading.Semaphore(0)
        self.is_ready: Callable[[], bool] = lambda: True
        self.waits_for = ""
        self.is_done, self.error = False, None

    def run(self) -> None:
        self.turn.acquire()
        try:
            if not self.block.is_abandoned:
                self.function(*self.arguments)
                if self.products:
                    raise Hazard(f"partition {self.place} ends with {len(self.products)} products under way")
        except _Abandoned:
            pass
        except BaseException as error:  # handed to the thread that runs the block, which raises it
            self.error = error
        self.is_done = True
        self.block.main.release()

    def step(self) -> None:
        """Let it run to its next pause. Called by the block."""
        self.turn.release()
        self.block.main.acquire()
        if self.error is not None:
            raise self.error

    def pause(self, is_ready: Callable[[], bool] = lambda: True, waits_for: str = "") -> None:
        """Let others go on, until it is chosen again and ready. Called by itself."""
        self.clock[self.place] += 1
        self.is_ready, self.waits_for = is_ready, waits_for
        self.block.main.release()
        self.turn.acquire()
        if self.block.is_abandoned:
            raise _Abandoned


class Barrier:
    def __init__(self, name: str) -> None:
        self.name, self.count, self.pending, self.bytes, self.phase = name, 0, 0, 0, 0
        self.gathering: list[int] | None = None  # what those know who arrived in this phase
        self.released: list[int] | None = None  # the same of the last complete one

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, clock: list[int]) -> None:
        if not self.pending:
            raise Hazard(f"{self.name} is arrived at more than {self.count} times in phase {self.phase}")
        self.pending -= 1
        self.gathering = clock[:] if self.gathering is None else [*map(max, self.gathering, clock)]
        self.complete()

    def receive(self, count: int) -> None:
        self.bytes -= count
        if self.bytes < 0:
            raise Hazard(f"{self.name} gets {-self.bytes} bytes more than were announced")
        self.complete()

    def complete(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count
            self.released, self.gathering = self.gathering, None


class Tile:
    """One slot of shared memory."""

    def __init__(self, name: str, shape: list[int], dtype: torch.dtype) -> None:
        self.name, self.data = name, torch.full(shape, float("nan"), dtype=dtype)
        self.copy: tuple[Barrier, int] | None = None  # the last that landed: its barrier and phase
        self.is_written = False
        self.readers: set[Product] = set()
        self.reads: dict[int, int] = {}  # partition -> its own time when its last read was done


class View:
    """A tile, or its reshaped or permuted form."""

    def __init__(self, tile: Tile, data: Tensor) -> None:
        self.tile, self.data, self.shape, self.dtype = tile, data, [*data.shape], data.dtype

    def reshape(self, shape: list[int]) -> View:
        return View(self.tile, self.data.reshape(shape))

    def permute(self, order: tuple[int, ...]) -> View:
        return View(self.tile, self.data.permute(order))


class Memory:
    """What allocate_shared_memory returns: tiles, or barriers for integers."""

    def __init__(self, name: str, dtype: torch.dtype, shape: list[int]) -> None:
        self.shape = shape
        make = Barrier if dtype == torch.int64 else lambda name: Tile(name, shape[1:], dtype)
        self.slots = [make(f"{name}[{i}]") for i in range(shape[0])]

    def index(self, i: int) -> Any:
        if not 0 <= i < len(self.slots):
            raise Hazard(f"slot {i} of {len(self.slots)} is taken")
        slot = self.slots[i]
        return View(slot, slot.data) if isinstance(slot, Tile) else slot


class Product:
    """A product under way. As a value it stands for a result that may not be used yet."""

    def __init__(self, result: Tensor, tiles: list[Tile], registers: list[Tensor]) -> None:
        self.result, self.tiles, self.registers = result, tiles, registers

    @classmethod
    def __torch_function__(cls, *args: Any) -> None:
        raise Hazard("the result of a product is used before it was waited for")


class Descriptor:
    def __init__(self, described: Any) -> None:
        self.memory, self.block_shape = described.base, described.block_shape
        self.dtype, self.layout = self.memory.dtype, None
        self.nbytes = self.memory.new_empty(0).element_size() * torch.Size(described.block_shape).numel()

    def tile(self, start: list[int]) -> Tensor:
        """Its elements from `start` on; 0 outside the tensor."""
        out = torch.zeros(self.block_shape, dtype=self.dtype)
        ends = [min(s + length, size) for s, length, size in zip(start, self.block_shape, self.memory.shape)]
        firsts = [max(s, 0) for s in start]
        if all(first < end for first, end in zip(firsts, ends)):
            inside = tuple(slice(f - s, e - s) for f, e, s in zip(firsts, ends, start))
            out[inside] = self.memory[tuple(slice(f, e) for f, e in zip(firsts, ends))]
        return out


class Pointer:
    def __init__(self, memory: Tensor, written: Tensor, offset: Any = 0) -> None:
        self.memory, self.written, self.offset = memory, written, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.written, self.offset + more)

    def store(self, value: Tensor, mask: Tensor) -> None:
        offset, value, mask = torch.broadcast_tensors(self.offset, value, mask)
        if value.dtype != self.memory.dtype:
            raise Hazard(f"{value.dtype} is stored in {self.memory.dtype}")
        offset, value = offset[mask], value[mask]
        if offset.numel() and not 0 <= offset.min() <= offset.max() < self.memory.numel():
            raise Hazard("a store lies outside its tensor")
        if self.written[offset].any():
            raise Hazard("an element is stored twice")
        self.written[offset] = True
        self.memory.view(-1)[offset] = value


class Block:
    """One program: its partitions, and the copies that are under way."""

    def __init__(self, program: int, random: Random) -> None:
        self.program, self.random = program, random
        self.main = threading.Semaphore(0)
        self.copies: list[Callable[[], None]] = []
        self.memories: list[Memory] = []
        self.partitions: list[Partition] = []
        self.is_abandoned = False

    def specialize(self, functions: list[tuple[Callable[..., None], tuple[Any, ...]]], *resources: Any) -> None:
        self.partitions = [Partition(self, place, len(functions), *each) for place, each in enumerate(functions)]
        for partition in self.partitions:
            partition.start()
        try:
            while True:
                choices = [p.step for p in self.partitions if not p.is_done and p.is_ready()] + self.copies
                if choices:
                    choice = self.random.choice(choices)
                    if choice in self.copies:
                        self.copies.remove(choice)
                    choice()
                elif all(p.is_done for p in self.partitions):
                    break
                else:
                    waiting = [p for p in self.partitions if not p.is_done]
                    raise Deadlock("; ".join(f"partition {p.place} waits for {p.waits_for}" for p in waiting))
        finally:
            self.is_abandoned = True
            for partition in self.partitions:
                partition.turn.release()
                partition.join()
        for tile in (slot for memory in self.memories for slot in memory.slots if isinstance(slot, Tile)):
            if tile.copy is not None and all(p.seen.get(tile.copy[0], 0) <= tile.copy[1] for p in self.partitions):
                raise Hazard(f"nobody waited for the copy to {tile.name}")

    def here(self) -> Partition:
        return next(p for p in self.partitions if p is threading.current_thread())

    # ---- the language

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Memory:
        self.memories.append(Memory(f"memory {len(self.memories)}", dtype, shape))
        return self.memories[-1]

    def expect(self, barrier: Barrier, count: int) -> None:
        self.here().pause()
        barrier.bytes += count
        barrier.arrive(self.here().clock)

    def arrive(self, barrier: Barrier) -> None:
        self.here().pause()
        barrier.arrive(self.here().clock)

    def wait(self, barrier: Barrier, phase: int) -> None:
        here = self.here()
        here.pause(lambda: barrier.phase & 1 != phase, f"phase {phase} of {barrier.name}, which is now at {barrier.phase}")
        here.seen[barrier] = barrier.phase
        if barrier.released is not None:
            here.clock[:] = map(max, here.clock, barrier.released)

    def load(self, descriptor: Descriptor, start: list[Any], barrier: Barrier, result: View) -> None:
        here, tile = self.here(), result.tile
        here.pause()
        if tile.is_written:
            raise Hazard(f"two copies to {tile.name} at once")
        if tile.readers or any(time > here.clock[place] for place, time in tile.reads.items()):
            raise Hazard(f"a copy to {tile.name} while a product may still read it")
        tile.is_written = True
        tile.data.fill_(float("nan"))
        start, phase = [int(s) for s in start], barrier.phase

        def land() -> None:
            tile.data.copy_(descriptor.tile(start))
            tile.is_written, tile.copy = False, (barrier, phase)
            barrier.receive(descriptor.nbytes)

        self.copies.append(land)

    def multiply(self, a: Any, b: View, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
        here = self.here()
        here.pause()
        tiles = [operand.tile for operand in (a, b) if isinstance(operand, View)]
        for tile in tiles:
            if tile.is_written or tile.copy is None or here.seen.get(tile.copy[0], 0) <= tile.copy[1]:
                raise Hazard(f"a product reads {tile.name} before its bytes were waited for")
        left, right = (operand.data if isinstance(operand, View) else operand for operand in (a, b))
        if left.dtype != right.dtype:
            raise Hazard(f"a product of {left.dtype} and {right.dtype}")
        result = left.float() @ right.float()
        if use_acc:
            result = result + (acc.result if isinstance(acc, Product) else acc)
        product = Product(result, tiles, [] if isinstance(a, View) else [a])
        here.products.append(product)
        for tile in tiles:
            tile.readers.add(product)
        return product if is_async else self.settle(0, [product])

    def settle(self, outstanding: int, deps: list[Any]) -> Any:
        here = self.here()
        here.pause()
        while len(here.products) > outstanding:
            product = here.products.pop(0)
            if any(all(register is not dep for dep in deps) for register in product.registers):
                raise Hazard("a wait does not keep the registers that its product reads")
            for tile in product.tiles:
                tile.readers.discard(product)
                tile.reads[here.place] = here.clock[here.place]
        if any(dep in here.products for dep in deps if isinstance(dep, Product)):
            raise Hazard("a result is taken from a wait that does not cover its product")
        values = tuple(dep.result if isinstance(dep, Product) else dep for dep in deps)
        return values[0] if len(values) == 1 else values

    def names(self) -> dict[str, Any]:
        def number(x: Any) -> Tensor:
            return torch.as_tensor(x)

        gl = SimpleNamespace(
            constexpr=lambda x: x, static_range=range, float32=torch.float32, int64=torch.int64,
            program_id=lambda axis: torch.tensor(self.program), arange=lambda start, end, layout: torch.arange(start, end),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            maximum=lambda a, b: torch.maximum(number(a), number(b)), minimum=lambda a, b: torch.minimum(number(a), number(b)),
            where=torch.where, exp2=torch.exp2, log2=torch.log2, max=torch.amax, sum=torch.sum, convert_layout=lambda x, layout: x,
            store=lambda pointer, value, mask: pointer.store(value, mask),
            allocate_shared_memory=self.allocate, warp_specialize=self.specialize, NVMMADistributedLayout=lambda **parts: None,
            SliceLayout=lambda *parts: None, DotOperandLayout=lambda *parts: None,
        )  # fmt: skip
        mbarrier = SimpleNamespace(
            init=lambda barrier, count: barrier.init(count), expect=self.expect, arrive=self.arrive, wait=self.wait,
            MBarrierLayout=lambda: None,
        )  # fmt: skip
        tma = SimpleNamespace(async_load=self.load)
        return dict(gl=gl, mbarrier=mbarrier, tma=tma, warpgroup_mma=self.multiply, warpgroup_mma_wait=self.settle)


class Kernel:
    """Stands for a jitted kernel: `Kernel(path, name, seed)[grid](*arguments, **constants)`. edit(source) may spoil it first."""

    def __init__(self, path: Path, name: str, seed: int = 0, edit: Callable[[str], str] = lambda source: source) -> None:
        tree = ast.parse(edit(path.read_text()))
        kept = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.Assign))]
        for node in kept:
            if isinstance(node, ast.FunctionDef):
                node.decorator_list, node.returns = [], None
                for argument in node.args.args:
                    argument.annotation = None
        self.code = compile(ast.Module(kept, []), str(path), "exec")
        self.name, self.random = name, Random(seed)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, **constants: Any) -> None:
            mine = [
                Descriptor(a) if hasattr(a, "block_shape")
                else Pointer(a, torch.zeros(a.numel(), dtype=torch.bool)) if isinstance(a, Tensor)
                else a
                for a in arguments
            ]  # fmt: skip
            for program in self.random.sample(range(grid[0]), grid[0]):
                names = Block(program, self.random).names()
                exec(self.code, names)  # the kernel's own source, of this repository
                names[self.name](*mine, **constants)

        return launch
