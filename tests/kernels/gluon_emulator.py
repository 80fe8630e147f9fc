"""Runs a warp-specialised Gluon kernel's own source on the CPU: a stand-in of the part of the language that it uses.

A partition is a thread; one runs at a time, and a seeded choice says who goes on at every barrier, copy, product and atomic.
Copies of the tensor memory accelerator (TMA) land at any moment after they were issued. Programs start in any order, a few at a
time, as on a GPU with few multiprocessors. Found are:

- a product that reads a tile whose bytes its partition has not waited for, or one that was never filled;
- a copy into a tile that some product may still read: a chain of arrivals and waits must say that each read is done before;
- a product's result, or registers it reads, used or left before the wait that covers it;
- shared memory that is written or read by partitions of which no chain of arrivals and waits says who comes first, and a product
  that reads what was stored there without a fence in between;
- atomic additions to one element of which no chain, through other programs too, says which comes first: their sum would have other
  bits in another run;
- barriers that are arrived at too often or get more bytes than were announced; deadlocks; copies that nobody waited for;
- accesses outside a tensor, or two stores to one element.

Shared memory begins as NaN (integers: a huge one), and is that again when a copy into it starts. Layouts are ignored: the compiler
checks those, and gluon_gate.py compiles. Division of negative numbers rounds down here and towards zero on a GPU. What warps of one
partition do apart is not modelled. A kernel's last statement must be its warp_specialize.
"""

from __future__ import annotations

import ast
import threading
from copy import copy
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
    """One group of warps. `clock[p]` is how far it knows partition p, of any program, to have come."""

    def __init__(self, block: Block, place: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        super().__init__(daemon=True)
        self.block, self.place, self.function, self.arguments = block, place, function, arguments
        self.machine = block.machine
        self.clock: Clock = {self: 0}
        self.polled: dict[tuple[int, int], int] = {}  # the last value that it saw in a place of global memory
        self.seen: dict[Barrier, int] = {}  # phases of each barrier that it has waited for
        self.products: list[Product] = []  # under way, oldest first
        self.turn = threading.Semaphore(0)
        self.is_ready: Callable[[], bool] = lambda: True
        self.waits_for = ""
        self.is_done, self.error = False, None

    def run(self) -> None:
        self.turn.acquire()
        try:
            if not self.machine.is_abandoned:
                self.function(*self.arguments)
                if self.products:
                    raise Hazard(f"partition {self.place} ends with {len(self.products)} products under way")
        except _Abandoned:
            pass
        except BaseException as error:  # handed to the thread that runs the block, which raises it
            self.error = error
        self.is_done = True
        self.machine.main.release()

    def step(self) -> None:
        """Let it run to its next pause. Called by the machine."""
        self.turn.release()
        self.machine.main.acquire()
        if self.error is not None:
            raise self.error

    def pause(self, is_ready: Callable[[], bool] = lambda: True, waits_for: str = "") -> None:
        """Let others go on, until it is chosen again and ready. Called by itself."""
        self.clock[self] += 1
        self.is_ready, self.waits_for = is_ready, waits_for
        self.machine.main.release()
        self.turn.acquire()
        if self.machine.is_abandoned:
            raise _Abandoned

    def learn(self, clock: Clock) -> None:
        for partition, time in clock.items():
            self.clock[partition] = max(self.clock.get(partition, 0), time)

    def knows(self, event: Event) -> bool:
        partition, time = event
        return self.clock.get(partition, 0) >= time

    def now(self) -> Event:
        return self, self.clock[self]


Clock = dict[Partition, int]
Event = tuple[Partition, int]  # what a partition did, and its own time then


def later(a: Clock, b: Clock) -> Clock:
    return {partition: max(a.get(partition, 0), b.get(partition, 0)) for partition in {*a, *b}}


class Barrier:
    def __init__(self, name: str) -> None:
        self.name, self.count, self.pending, self.bytes, self.phase = name, 0, 0, 0, 0
        self.gathering: Clock = {}  # what those know who arrived in this phase
        self.released: Clock = {}  # the same of the last complete one

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, clock: Clock) -> None:
        if not self.pending:
            raise Hazard(f"{self.name} is arrived at more than {self.count} times in phase {self.phase}")
        self.pending -= 1
        self.gathering = later(self.gathering, clock)
        self.complete()

    def receive(self, count: int) -> None:
        self.bytes -= count
        if self.bytes < 0:
            raise Hazard(f"{self.name} gets {-self.bytes} bytes more than were announced")
        self.complete()

    def complete(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count
            self.released, self.gathering = self.gathering, {}


class Tile:
    """One slot of shared memory."""

    def __init__(self, name: str, shape: list[int], dtype: torch.dtype) -> None:
        poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
        self.name, self.data = name, torch.full(shape, poison, dtype=dtype)
        self.copy: tuple[Barrier, int] | None = None  # the last that landed: its barrier and phase
        self.is_written = False
        self.stored: Event | None = None  # the last store by a partition
        self.fenced: Event | None = None  # its fence after that
        self.readers: set[Product] = set()
        self.reads: Clock = {}  # when each partition's last read was done

    def check_free(self, here: Partition, what: str) -> None:
        """Whether whatever used the tile before is known to be done."""
        if self.is_written:
            raise Hazard(f"{what} {self.name} while a copy to it is under way")
        if self.readers or not all(map(here.knows, self.reads.items())):
            raise Hazard(f"{what} {self.name} while it may still be read")
        if self.stored is not None and not here.knows(self.stored):
            raise Hazard(f"{what} {self.name} without knowing of the store before")


class View:
    """A tile, or its reshaped, permuted or sliced form."""

    def __init__(self, block: Block, tile: Tile, data: Tensor) -> None:
        self.block, self.tile, self.data, self.shape, self.dtype = block, tile, data, [*data.shape], data.dtype

    def reshape(self, shape: list[int]) -> View:
        return View(self.block, self.tile, self.data.reshape(shape))

    def permute(self, order: tuple[int, ...]) -> View:
        return View(self.block, self.tile, self.data.permute(order))

    def slice(self, start: int, length: int, dim: int) -> View:
        return View(self.block, self.tile, self.data.narrow(dim, start, length))

    def store(self, value: Tensor) -> None:
        here = self.block.here()
        here.pause()
        self.tile.check_free(here, "a store to")
        if value.dtype != self.dtype or [*value.shape] != self.shape:
            raise Hazard(f"{value.dtype} {[*value.shape]} is stored to {self.tile.name}, {self.dtype} {self.shape}")
        self.data.copy_(value)
        self.tile.stored, self.tile.fenced = here.now(), None

    def load(self, layout: Any) -> Tensor:
        here = self.block.here()
        here.pause()
        if self.tile.stored is None or not here.knows(self.tile.stored):
            raise Hazard(f"{self.tile.name} is read before its store was waited for")
        self.tile.reads[here] = here.clock[here]
        return self.data.clone()


class Memory:
    """What allocate_shared_memory returns: tiles, or barriers for integers."""

    def __init__(self, block: Block, name: str, dtype: torch.dtype, shape: list[int]) -> None:
        self.block, self.shape, self.dtype = block, shape, dtype
        make = Barrier if dtype == torch.int64 else lambda name: Tile(name, shape[1:], dtype)
        self.slots = [make(f"{name}[{i}]") for i in range(shape[0])]

    def index(self, i: int) -> Any:
        if not 0 <= i < len(self.slots):
            raise Hazard(f"slot {i} of {len(self.slots)} is taken")
        slot = self.slots[i]
        return View(self.block, slot, slot.data) if isinstance(slot, Tile) else slot


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
    """Global memory from some element on, and what the programs of a launch did to it."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.offset = memory, torch.tensor(0)
        self.written = torch.zeros(memory.numel(), dtype=torch.bool)
        self.adds: list[Event] = []
        self.added = torch.full((memory.numel(),), -1)  # which of the adds was the last to each element
        self.released: dict[int, Clock] = {}  # what those know who released an element
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, more: Any) -> Pointer:
        moved = copy(self)
        moved.offset = self.offset + more
        return moved

    def inside(self, offset: Tensor) -> Tensor:
        if offset.numel() and not 0 <= offset.min() <= offset.max() < self.memory.numel():
            raise Hazard("an access lies outside its tensor")
        return offset

    def load(self, mask: Tensor, other: float) -> Tensor:
        offset, mask = torch.broadcast_tensors(self.offset, mask)
        value = torch.full(offset.shape, other, dtype=self.memory.dtype)
        value[mask] = self.memory.view(-1)[self.inside(offset[mask])]
        return value

    def store(self, value: Tensor, mask: Any = True) -> None:
        offset, value, mask = torch.broadcast_tensors(self.offset, value, torch.as_tensor(mask))
        if value.dtype != self.memory.dtype:
            raise Hazard(f"{value.dtype} is stored in {self.memory.dtype}")
        offset, value = self.inside(offset[mask]), value[mask]
        if self.written[offset].any():
            raise Hazard("an element is stored twice")
        self.written[offset] = True
        self.memory.view(-1)[offset] = value

    def add(self, here: Partition, value: Tensor) -> None:
        """Adds a tile in no order with others that `here` does not know of, which is what this finds."""
        offset, value = torch.broadcast_tensors(self.inside(self.offset), value)
        if not all(here.knows(self.adds[place]) for place in self.added[offset].unique().tolist() if place >= 0):
            raise Hazard("an element is added to without knowing of the addition before")
        self.added[offset] = len(self.adds)
        self.adds.append(here.now())
        self.memory.view(-1)[offset] += value

    def exchange(self, here: Partition | None, value: int, sem: str) -> Tensor:
        """One element before `value` is added to it; by nobody where a program begins."""
        place = int(self.inside(self.offset))
        if here is not None and "acquire" in sem:
            here.learn(self.released.get(place, {}))
        if here is not None and "release" in sem:
            self.released[place] = later(self.released.get(place, {}), here.clock)
        before = self.memory.view(-1)[place].clone()
        self.memory.view(-1)[place] += value
        return before


class Machine:
    """A launch: `resident` programs at a time, started in any order, and the copies that are under way."""

    def __init__(self, random: Random, resident: int) -> None:
        self.random, self.resident = random, resident
        self.main = threading.Semaphore(0)
        self.blocks: list[Block] = []
        self.copies: list[Callable[[], None]] = []
        self.is_abandoned = False

    def run(self, programs: list[int], begin: Callable[[Block], None]) -> None:
        """begin(block) executes a program up to its warp_specialize."""

        def start() -> None:
            block = Block(self, programs.pop())
            begin(block)
            self.blocks.append(block)

        try:
            while programs or self.blocks:
                partitions = [p for block in self.blocks for p in block.partitions if not p.is_done]
                choices = [p.step for p in partitions if p.is_ready()] + self.copies
                if programs and len(self.blocks) < self.resident:
                    choices.append(start)
                if not choices:
                    waiting = [f"partition {p.place} of program {p.block.program} waits for {p.waits_for}" for p in partitions]
                    raise Deadlock("; ".join(waiting))
                choice = self.random.choice(choices)
                if choice in self.copies:
                    self.copies.remove(choice)
                choice()
                for block in [block for block in self.blocks if all(p.is_done for p in block.partitions)]:
                    self.blocks.remove(block)
                    block.end()
        finally:
            self.is_abandoned = True
            for partition in [p for block in self.blocks for p in block.partitions]:
                partition.turn.release()
                partition.join()


class Block:
    """One program."""

    def __init__(self, machine: Machine, program: int) -> None:
        self.machine, self.program = machine, program
        self.memories: list[Memory] = []
        self.partitions: list[Partition] = []

    def specialize(self, functions: list[tuple[Callable[..., None], tuple[Any, ...]]], *resources: Any) -> None:
        self.partitions = [Partition(self, place, *each) for place, each in enumerate(functions)]
        for partition in self.partitions:
            partition.start()

    def end(self) -> None:
        for partition in self.partitions:
            partition.join()
        for tile in (slot for memory in self.memories for slot in memory.slots if isinstance(slot, Tile)):
            if tile.copy is not None and all(p.seen.get(tile.copy[0], 0) <= tile.copy[1] for p in self.partitions):
                raise Hazard(f"nobody waited for the copy to {tile.name}")

    def here(self) -> Partition:
        return next(p for p in self.partitions if p is threading.current_thread())

    # ---- the language

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Memory:
        self.memories.append(Memory(self, f"memory {len(self.memories)}", dtype, shape))
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
        here.learn(barrier.released)

    def load(self, descriptor: Descriptor, start: list[Any], barrier: Barrier, result: View) -> None:
        here, tile = self.here(), result.tile
        here.pause()
        tile.check_free(here, "a copy to")
        tile.is_written = True
        tile.data.fill_(float("nan"))
        start, phase = [int(s) for s in start], barrier.phase

        def land() -> None:
            tile.data.copy_(descriptor.tile(start))
            tile.is_written, tile.copy = False, (barrier, phase)
            barrier.receive(descriptor.nbytes)

        self.machine.copies.append(land)

    def multiply(self, a: Any, b: View, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
        here = self.here()
        here.pause()
        tiles = [operand.tile for operand in (a, b) if isinstance(operand, View)]
        for tile in tiles:
            if tile.copy is None and tile.stored is not None:
                if tile.fenced is None or not here.knows(tile.fenced):
                    raise Hazard(f"a product reads {tile.name} before its store was fenced and waited for")
            elif tile.is_written or tile.copy is None or here.seen.get(tile.copy[0], 0) <= tile.copy[1]:
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
                tile.reads[here] = here.clock[here]
        if any(dep in here.products for dep in deps if isinstance(dep, Product)):
            raise Hazard("a result is taken from a wait that does not cover its product")
        values = tuple(dep.result if isinstance(dep, Product) else dep for dep in deps)
        return values[0] if len(values) == 1 else values

    def fence(self) -> None:
        here = self.here()
        here.pause()
        for tile in (slot for memory in self.memories for slot in memory.slots if isinstance(slot, Tile)):
            if tile.stored is not None and tile.stored[0] is here:
                tile.fenced = here.now()

    def add(self, pointer: Pointer, value: Any, *, sem: str, scope: str) -> Tensor | None:
        """One element and a number are a counter; a tile is a sum, of which a kernel may use no result."""
        if isinstance(value, Tensor):
            self.here().pause()
            return pointer.add(self.here(), value)
        if not self.partitions:
            return pointer.exchange(None, value, sem)
        here, key = self.here(), (pointer.memory.data_ptr(), int(pointer.offset))
        if value:
            here.pause()
            return pointer.exchange(here, value, sem)
        # A loop that asks again and again needs no turn before there is something new.
        element = pointer.memory.view(-1)[key[1]]
        here.pause(lambda: here.polled.get(key) != element.item(), f"element {key[1]} of a counter to change from {element.item()}")
        here.polled[key] = element.item()
        return pointer.exchange(here, 0, sem)

    def names(self) -> dict[str, Any]:
        def number(x: Any) -> Tensor:
            return torch.as_tensor(x)

        gl = SimpleNamespace(
            constexpr=lambda x: x, static_range=range, float32=torch.float32, int32=torch.int32, int64=torch.int64,
            program_id=lambda axis: torch.tensor(self.program, dtype=torch.int32),
            arange=lambda start, end, layout: torch.arange(start, end, dtype=torch.int32),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            maximum=lambda a, b: torch.maximum(number(a), number(b)), minimum=lambda a, b: torch.minimum(number(a), number(b)),
            where=torch.where, exp2=torch.exp2, log2=torch.log2, max=torch.amax, sum=torch.sum, convert_layout=lambda x, layout: x,
            load=lambda pointer, mask, other: pointer.load(mask, other), store=Pointer.store, atomic_add=self.add,
            allocate_shared_memory=self.allocate, warp_specialize=self.specialize, NVMMADistributedLayout=lambda **parts: None,
            SliceLayout=lambda *parts: None, DotOperandLayout=lambda *parts: None, BlockedLayout=lambda *parts: None,
            NVMMASharedLayout=lambda **parts: None, SwizzledSharedLayout=lambda *parts: None,
        )  # fmt: skip
        mbarrier = SimpleNamespace(
            init=lambda barrier, count: barrier.init(count), expect=self.expect, arrive=self.arrive, wait=self.wait,
            MBarrierLayout=lambda: None,
        )  # fmt: skip
        tma = SimpleNamespace(async_load=self.load)
        return dict(
            gl=gl, mbarrier=mbarrier, tma=tma, warpgroup_mma=self.multiply, warpgroup_mma_wait=self.settle,
            fence_async_shared=self.fence,
        )  # fmt: skip


def executable(path: Path, edit: Callable[[str], str]) -> list[ast.stmt]:
    """A kernel's file without its imports, after what it imports from files beside it."""
    kept: list[ast.stmt] = []
    for node in ast.parse(edit(path.read_text())).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            kept += executable(path.with_name(f"{node.module}.py"), lambda source: source)
        elif isinstance(node, (ast.FunctionDef, ast.Assign)):
            kept.append(node)
        if isinstance(node, ast.FunctionDef):
            node.decorator_list, node.returns = [], None
            for argument in node.args.args:
                argument.annotation = None
    return kept


class Kernel:
    """Stands for a jitted kernel: `Kernel(path, name, seed)[grid](*arguments, **constants)`. edit(source) may spoil it first."""

    def __init__(self, path: Path, name: str, seed: int = 0, edit: Callable[[str], str] = lambda source: source) -> None:
        self.code = compile(ast.Module(executable(path, edit), []), str(path), "exec")
        self.name, self.random = name, Random(seed)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, **constants: Any) -> None:
            mine = [Descriptor(a) if hasattr(a, "block_shape") else Pointer(a) if isinstance(a, Tensor) else a for a in arguments]

            def begin(block: Block) -> None:
                names = block.names()
                exec(self.code, names)  # the kernel's own source, of this repository
                names[self.name](*mine, **constants)

            programs = self.random.sample(range(grid[0]), grid[0])
            Machine(self.random, resident=self.random.randint(1, 4)).run(programs, begin)

        return launch
