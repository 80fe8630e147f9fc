"""Reads a file of torch.save without executing anything in it.

Such a file is a zip of `data.pkl`, a pickle, and one record of raw numbers for each storage. Unpickling can call any function.
Here the pickle's opcodes are read one by one, and only those that build plain values; the three functions that torch.save needs
are known by name and never called. torch.load(weights_only=True) executes nothing either, but it reads past a record that is
shorter than its pickle claims, and loads the optimizer's state, which nobody asked for.
"""

from __future__ import annotations

import contextlib
import math
import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping

import torch
from torch import Tensor

# Storages that torch.save names, and what they hold.
DTYPES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
# The pickle names things and holds no weights: 2,000 tensors take 300 KB. A tokenizer may stand in it, so there is room for one.
LARGEST_PICKLE = 64 << 20
VALUES = ("BINFLOAT", "BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "BINBYTES", "SHORT_BINBYTES")
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}


class UnsafeFile(ValueError):
    """A file asks for something that its kind has no need of, or is damaged. Nothing of it was executed."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the file, not yet read: the storage's record, and where in it the elements lie."""

    record: str
    storage_size: int
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    record: str
    size: int
    dtype: torch.dtype


class TorchFile:
    """An open file of torch.save. Use it in a `with` statement.

    content   the saved object, of dicts, lists, tuples, str, bytes, numbers and StoredTensor; tensor() reads one of the latter

    Raises UnsafeFile, before anything is read into tensors, for what torch.save of such values does not write.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not zipfile.is_zipfile(self.path):
            raise UnsafeFile(
                f"{self.path} is not a zip of torch.save; files older than torch 1.6 and bare pickles are not read: load the file "
                "with the torch that wrote it, and save it again"
            )
        with contextlib.ExitStack() as opened:
            try:
                self._zip = opened.enter_context(zipfile.ZipFile(self.path))
            except (zipfile.BadZipFile, ValueError) as error:
                raise UnsafeFile(f"{self.path} is a damaged zip ({error})") from error
            self.content = self._read_content()
            self._opened = opened.pop_all()

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def tensors(self, stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
        """The tensors, on the CPU, each in memory of its own. Raises UnsafeFile where the records do not hold them."""
        records: dict[str, dict[str, StoredTensor]] = {}
        total = 0
        for name, tensor in stored.items():
            self._check(name, tensor)
            records.setdefault(tensor.record, {})[name] = tensor
            total += math.prod(tensor.shape) * tensor.dtype.itemsize
        if total > self.path.stat().st_size:
            raise UnsafeFile(f"{self.path}: its tensors would take {total} bytes, more than the file has; they overlap")
        tensors: dict[str, Tensor] = {}
        for record, inside in records.items():
            buffer = bytearray(self._bytes(record))
            for name, tensor in inside.items():
                if math.prod(tensor.shape) == 0:
                    tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
                else:
                    numbers = torch.frombuffer(buffer, dtype=tensor.dtype)
                    tensors[name] = numbers.as_strided(tensor.shape, tensor.stride, tensor.offset).clone(
                        memory_format=torch.contiguous_format
                    )
        return {name: tensors[name] for name in stored}

    def _check(self, name: str, tensor: StoredTensor) -> None:
        wanted, found = tensor.storage_size * tensor.dtype.itemsize, self._sizes.get(tensor.record)
        if found != wanted:
            raise UnsafeFile(f"{self.path}: the record {tensor.record} of {name:.200} has {found} bytes, and should have {wanted}")
        last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride))
        is_inside = math.prod(tensor.shape) == 0 or last < tensor.storage_size
        if min(tensor.offset, *tensor.shape, *tensor.stride, 0) < 0 or not is_inside:
            raise UnsafeFile(f"{self.path}: the tensor {name:.200} reaches outside its record of {tensor.storage_size} elements")

    def _bytes(self, name: str) -> bytes:
        try:
            return self._zip.read(name)
        # What zipfile raises for damage; RuntimeError is for encryption, and for a version or compression that it lacks.
        except (zipfile.BadZipFile, EOFError, OSError, RuntimeError) as error:
            raise UnsafeFile(f"{self.path}: {name} cannot be read ({error}); the file is damaged") from error

    def _read_content(self) -> Any:
        for entry in self._zip.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise UnsafeFile(f"{self.path}: {entry.filename} is compressed or encrypted, which torch.save never does")
        self._sizes = {entry.filename: entry.file_size for entry in self._zip.infolist()}
        pickles = [name for name in self._sizes if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(pickles) != 1:
            raise UnsafeFile(f"{self.path} holds {len(pickles)} files named data.pkl; a file of torch.save holds one")
        if self._sizes[pickles[0]] > LARGEST_PICKLE:
            raise UnsafeFile(f"{self.path}: data.pkl has {self._sizes[pickles[0]]} bytes; at most {LARGEST_PICKLE} are read")
        self._prefix = pickles[0].removesuffix("data.pkl")
        byte_order = f"{self._prefix}byteorder"
        if byte_order in self._sizes and self._bytes(byte_order) != b"little":
            raise UnsafeFile(f"{self.path} was written on a big-endian machine; save it again on a little-endian one")
        try:
            return self._bounded(*self._unpickle(self._bytes(pickles[0])))
        except (IndexError, TypeError, KeyError, AttributeError) as error:
            raise UnsafeFile(f"{self.path}: data.pkl is damaged ({type(error).__name__}: {error})") from error
        except UnsafeFile:
            raise
        except ValueError as error:
            raise UnsafeFile(f"{self.path}: data.pkl is damaged ({error})") from error

    def _unpickle(self, pickle: bytes) -> tuple[Any, int]:
        """What the pickle's opcodes build, on a stack as in the pickle module, whose names for them these are; and their number."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def pop_mark() -> list[Any]:
            place = marks.pop()
            items = stack[place:]
            del stack[place:]
            return items

        for count, (opcode, argument, _) in enumerate(pickletools.genops(pickle), 1):
            name = opcode.name
            if name in VALUES:
                stack.append(argument)
            elif name in CONSTANTS:
                stack.append(CONSTANTS[name]())
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "MARK":
                marks.append(len(stack))
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                size = int(name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            elif name == "TUPLE":
                items = pop_mark()
                stack.append(tuple(items))
            elif name in ("APPEND", "APPENDS"):
                items = pop_mark() if name == "APPENDS" else [stack.pop()]
                list.extend(stack[-1], items)
            elif name in ("SETITEM", "SETITEMS"):
                items = pop_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                if not all(isinstance(key, (str, int)) for key in items[::2]):
                    raise UnsafeFile(f"{self.path}: data.pkl has a dict whose keys are neither str nor int")
                dict.update(stack[-1], zip(items[::2], items[1::2], strict=True))
            elif name == "GLOBAL":
                stack.append(_Global(argument))
            elif name == "BINPERSID":
                stack.append(self._storage(stack.pop()))
            elif name == "REDUCE":
                arguments = stack.pop()
                stack.append(self._reduce(stack.pop(), arguments))
            elif name == "BUILD":
                # What an OrderedDict carries beside its items: the versions of the modules, which nothing here reads.
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise UnsafeFile(f"{self.path}: data.pkl sets attributes of something; nothing was executed")
            elif name == "STOP":
                return stack.pop(), count
            elif name != "PROTO":
                raise UnsafeFile(
                    f"{self.path}: data.pkl uses the opcode {name}, which plain values and tensors do not need; nothing was "
                    "executed"
                )
        raise UnsafeFile(f"{self.path}: data.pkl has no end")

    def _bounded(self, content: Any, opcodes: int) -> Any:
        """`content`, if walking it takes about as long as reading it did: a few lists that hold one another often, or themselves,
        would take for ever."""
        left, waiting = 4 * opcodes, [content]
        while waiting:
            value = waiting.pop()
            waiting.extend(value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ())
            left -= 1
            if left < len(waiting):
                raise UnsafeFile(f"{self.path}: data.pkl holds containers that repeat one another; no model does")
        return content

    def _storage(self, description: Any) -> _Storage:
        kind, storage, key, _, size = description
        if kind != "storage" or not isinstance(storage, _Global) or storage.name not in DTYPES:
            raise UnsafeFile(f"{self.path}: data.pkl refers to something that is no storage of numbers")
        if not isinstance(size, int) or size < 0:
            raise UnsafeFile(f"{self.path}: a storage has a size that is no count of elements")
        if not isinstance(key, str):
            raise UnsafeFile(f"{self.path}: a storage is named by something that is no str")
        return _Storage(f"{self._prefix}data/{key}", size, DTYPES[storage.name])

    def _reduce(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """The value of the few calls that torch.save writes, without the call."""
        called = function.name if isinstance(function, _Global) else type(function).__name__
        if called == "collections OrderedDict":
            return dict(*arguments)
        if called == "torch._utils _rebuild_tensor_v2":
            storage, offset, shape, stride = arguments[:4]
            numbers = (offset, *shape, *stride)
            if not isinstance(storage, _Storage) or len(shape) != len(stride) or not all(isinstance(n, int) for n in numbers):
                raise UnsafeFile(f"{self.path}: data.pkl describes a tensor by something else than numbers")
            return StoredTensor(storage.record, storage.size, storage.dtype, offset, tuple(shape), tuple(stride))
        if called == "torch._utils _rebuild_parameter":
            return arguments[0]
        if called == "_codecs encode":  # bytes, in the protocol that torch.save uses
            text, encoding = arguments
            if encoding == "latin1":
                return str.encode(text, "latin1")
        raise UnsafeFile(
            f"{self.path}: data.pkl wants to call {called.replace(' ', '.')}, which a file of weights and options has no need "
            "of; it was "
            "not called, and nothing was executed"
        )
