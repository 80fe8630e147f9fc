"""Builds csrc/cuda for a CPU (cuda_emulator.h says how it runs there), and lets the "native" backend call it.

    with emulated(build()) as gpu:
        damped_sine(z, amplitude, frequency, damping, backend="native")     # on CPU tensors: the CUDA kernels

Everything between the public function and the kernel's last line is what a GPU gets: the *_native.py, the bindings, launchers and
kernels. Only the sources' three constructs that are no C++ are rewritten (`translate`), line by line. Results are kept in a cache
by content, a file at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Iterator, NamedTuple, Sequence
from unittest import mock

import torch
from gate import default_cache
from psann_kernels.registry import OPS, not_at_once
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which("g++")
FLAGS = (
    "-std=c++17 -O1 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -U_FORTIFY_SOURCE "
    "-Wall -Wno-unknown-pragmas -Werror"
).split()
# What __ubsan_handle_... in cuda_emulator.cpp answers.
SANITIZE = (
    "-fsanitize=alignment,null,bounds,signed-integer-overflow,integer-divide-by-zero,shift,pointer-overflow,bool,enum "
    "-fno-sanitize-recover=all"
).split()
HEADERS = ("cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h")
CALLERS = ("damped_sine", "rms_norm", "wave_conv", "paged_append", "paged_attention")
ORDERS = ("ascending", "descending", "random")


class Fault(NamedTuple):
    """In csrc/cuda/<file>.cu, or common.cuh, the only `right` becomes `wrong`, where FAULTY is whether the fault is to act."""

    file: str
    right: str
    wrong: str


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    raise ValueError(f"nothing closes {text[start : start + 60]!r}")


def translate(source: str, name: str) -> str:
    """CUDA C++ as g++ takes it: launches, shared memory and launch bounds written as calls of cuda_emulator.h."""
    # kernel<T, N><<<grid, block, shared, stream>>>(a, b)
    # ->   emulator::Launch("name kernel", grid, block, shared, stream)(kernel<T, N>, a, b)
    source, launches = re.subn(
        r"(\w+)(<[^<>;]*>)?<<<(.+?)>>>\(", lambda m: f'emulator::Launch("{name} {m[1]}", {m[3]})({m[1]}{m[2] or ""}, ', source
    )
    if "<<<" in source or launches == 0:
        raise ValueError(f"{name}: a launch is written in a way that translate does not know")
    source = re.sub(
        r"extern __shared__ (\w+) (\w+)\[\];", r"\1* \2 = static_cast<\1*>(emulator::dynamic_shared(alignof(\1)));", source
    )
    source = re.sub(
        r"__shared__ (\w+) (\w+)((?:\[[^\]]+\])+);",
        r"auto& \2 = *static_cast<\1(*)\3>(emulator::static_shared(__COUNTER__, sizeof(\1\3), alignof(\1)));",
        source,
    )
    if "__shared__" in source:
        raise ValueError(f"{name}: shared memory is declared in a way that translate does not know")
    pieces = re.split(r"__launch_bounds__\((\w+)(?:, \d+)?\)", source)
    for i in range(2, len(pieces), 2):
        body = _closing(pieces[i], pieces[i].index("(")) + 1
        assert pieces[i][body:].startswith(" {"), pieces[i][:200]
        pieces[i] = f"{pieces[i][: body + 2]} emulator::check_bounds({pieces[i - 1]});{pieces[i][body + 2 :]}"
    return f'#line 1 "{name}.cu"\n' + "".join(pieces[::2])


def _once(path: Path, *parts: str | bytes, make: Callable[[Path], None]) -> Path:
    """`path` with a hash of `parts` in its name, made if the cache lacks it."""
    digest = hashlib.sha256(b"\0".join(p.encode() if isinstance(p, str) else p for p in parts)).hexdigest()[:16]
    path = path.with_name(f"{path.stem}-{digest}{path.suffix}")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{os.getpid()}-{path.name}")
        make(unfinished)
        unfinished.replace(path)
    return path


def _run(command: list[str], text: str | None = None) -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[:3000]}")


def build(faults: Sequence[Fault] = (), *flags: str) -> Path:
    """The library, `_native_cuda` with the emulator in it.

    faults   built in, of which Gpu.fault chooses one
    flags    of the compiler, more of them
    """
    cache = default_cache() / "cuda_emulated"
    sources = {path.stem: path.read_text() for path in (*sorted((CSRC / "cuda").glob("*.cu")), HERE / "cuda_probe.cu")}
    common = (CSRC / "cuda" / "common.cuh").read_text()
    sources["common.cuh"] = common
    for number, fault in enumerate(faults, 1):
        text = sources[fault.file]
        if text.count(fault.right) != 1:
            raise ValueError(f"{fault.file} has {fault.right!r} {text.count(fault.right)} times; it must be there once")
        sources[fault.file] = text.replace(fault.right, fault.wrong.replace("FAULTY", f"(emulator::fault == {number})"))
    changed = sources.pop("common.cuh")
    if changed != common:
        for name, text in sources.items():
            above, include, below = text.partition('#include "common.cuh"\n')
            if include:
                here = f'#line {above.count(chr(10)) + 2} "{name}.cu"\n'
                sources[name] = f'{above}#line 1 "common.cuh"\n{changed.replace("#pragma once", "")}{here}{below}'
    shadows = cache / "include"
    shadows.mkdir(parents=True, exist_ok=True)
    for header in HEADERS:
        (shadows / header).write_text('#pragma once\n#include "cuda_emulator.h"\n')
    headers = [p.read_text() for p in (HERE / "cuda_emulator.h", *sorted(CSRC.glob("*.h")), *sorted((CSRC / "cuda").glob("*.cuh")))]
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout

    def compiled(name: str, text: str, *own: str) -> Path:
        folders = (f"-I{folder}" for folder in (shadows, HERE, CSRC / "cuda", CSRC))
        command = [COMPILER, *FLAGS, *own, *folders, *"-x c++ -c - -o".split()]
        parts = version, " ".join((*FLAGS, *own)), text, *headers
        return _once(cache / f"{name}.o", *parts, make=lambda path: _run([*command, str(path)], text))

    kernels = [compiled(name, translate(text, name), *SANITIZE, *flags) for name, text in sources.items()]
    emulator = compiled("emulator", (HERE / "cuda_emulator.cpp").read_text(), *flags)
    # torch brings pybind11's headers.
    folders = Path(torch.__file__).parent / "include", sysconfig.get_paths()["include"]
    python = ["-O0", *(f"-I{folder}" for folder in folders), '-DPSANN_SOURCE_HASH="emulated"']
    bindings = compiled(
        "bindings", (CSRC / "cuda" / "bindings.cpp").read_text().replace('"../arguments.h"', '"arguments.h"'), *python
    )
    objects = [*kernels, emulator, bindings]
    return _once(
        cache / "_native_cuda.so",
        *(path.name for path in objects),
        make=lambda path: _run([COMPILER, "-shared", *map(str, objects), "-o", str(path)]),
    )


class Gpu:
    """What stands in for one: the module, and the order in which its threads run."""

    def __init__(self, path: Path) -> None:
        # pybind11 gives the same module for the same name, whatever the file.
        spec = importlib.util.spec_from_file_location(f"{path.stem}._native_cuda", path)
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self._emulator = ctypes.CDLL(str(path))
        self._emulator.emulator_order.argtypes = [ctypes.c_int, ctypes.c_uint64]
        self._emulator.emulator_launched.restype = ctypes.c_char_p
        self._emulator.emulator_convert.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        self._emulator.emulator_probe.argtypes = [ctypes.c_void_p]

    def order(self, which: str, seed: int = 0) -> None:
        self._emulator.emulator_order(ORDERS.index(which), seed)

    def fault(self, number: int) -> None:
        """Let the build's fault of that number act, counted from 1; 0: none."""
        self._emulator.emulator_fault(number)

    def convert(self, what: int, bits: Tensor) -> Tensor:
        """int32 (n,) bits: 0 float32 to bfloat16, 1 float32 to float16, 2 float16 to float32."""
        out = torch.empty_like(bits)
        self._emulator.emulator_convert(what, bits.data_ptr(), out.data_ptr(), len(bits))
        return out

    def probe(self) -> Tensor:
        """(64, 9) int32: what cuda_probe.cu's threads got."""
        out = torch.full((64, 9), -(2**31), dtype=torch.int32)
        self._emulator.emulator_probe(out.data_ptr())
        return out

    def launched(self) -> set[str]:
        """"file kernel" of every kernel that ran so far."""
        return set(self._emulator.emulator_launched().decode().split("\n")[:-1])

    def launch(self, name: str, t: Tensor, *numbers: Any, scratch: Callable[[ModuleType], int] | None = None) -> None:
        """As native.launch does for a tensor on a GPU."""
        memory = None if scratch is None else torch.empty(scratch(self.module), dtype=torch.float32)
        getattr(self.module, name)(*numbers, 0, 0 if memory is None else memory.data_ptr())


@contextlib.contextmanager
def emulated(gpu: Gpu) -> Iterator[Gpu]:
    """backend="native" runs the CUDA kernels, on CPU tensors."""
    with contextlib.ExitStack() as stack:
        for name in CALLERS:
            module = importlib.import_module(f"psann_kernels.{name}_native")
            stack.enter_context(mock.patch.object(module, "launch", gpu.launch))
        for op in OPS.values():  # what serves a CPU's calls at once launches nothing
            stack.enter_context(mock.patch.object(op, "at_once", not_at_once))
        yield gpu
