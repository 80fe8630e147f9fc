"""Loads `_native` and `_native_cuda`, the kernels of csrc, or says why it cannot be.
The *_native.py files offer them to the registry.

The kernels know no torch: each *_native.py checks device, dtype and layout, allocates, and passes addresses, sizes and strides.
On a CPU they run on torch's own OpenMP threads, as many as torch.get_num_threads() says, and give the same bits for any number
of them. On a GPU they run on torch's current stream and can be captured in a graph. No GPU has run the CUDA kernels yet: they
compile for every target without warnings (test_native_cuda.py), are right where a CPU emulates one (test_cuda_emulated.py), and
serve only calls that name backend="native".

Environment:

    PSANN_FAST_NATIVE_ISA   moves the default instruction set: one of those that `instruction_sets()` lists
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from .direct import TENSORS, set_up_at_once
from .native_build import checkout_sources, read_record, source_hash
from .registry import Op

FOLDER = Path(__file__).parent
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_REBUILD = "pip install -e . (or: pip install .) in the checkout builds it"


def load(folder: Path = FOLDER) -> tuple[ModuleType | None, str]:
    """(`_native`, "") or (None, why there is none). A build of other sources than those at hand is refused."""
    record = read_record(folder)
    if record is None:
        return None, f"the native kernels were never built here; {_REBUILD}"
    if record["status"] != "built":
        return None, f"the native kernels were not built: {record['reason']}"
    csrc = checkout_sources(folder)
    if csrc is not None and source_hash(csrc) != record["source_hash"]:
        return None, f"the native kernels are stale: csrc changed after they were built; {_REBUILD} anew"
    # torch is imported above: its OpenMP must be in the process first.
    try:
        native = importlib.import_module("._native", __package__)
    except ImportError as error:
        return None, f"the native kernels were built but do not load: {error}; {_REBUILD} anew"
    if native.source_hash != record["source_hash"]:
        return None, f"the native kernels are stale: _native was built from other sources than the record says; {_REBUILD} anew"
    return native, _choose(native)


def _choose(native: ModuleType) -> str:
    native.share_openmp(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    set_up_at_once(native, tuple(TYPES))
    isa = os.environ.get("PSANN_FAST_NATIVE_ISA")
    if isa is not None and not native.use_isa(isa):
        raise ValueError(f"PSANN_FAST_NATIVE_ISA is {isa!r}; this build and processor have {', '.join(instruction_sets(native))}")
    return ""


def instruction_sets(native: ModuleType) -> list[str]:
    """Names that PSANN_FAST_NATIVE_ISA takes here, widest first."""
    return native.usable_isas().split()


def load_cuda(folder: Path = FOLDER) -> tuple[ModuleType | None, str]:
    """(`_native_cuda`, "") or (None, why there is none)."""
    record = read_record(folder)
    cuda = None if record is None else record.get("cuda")
    if cuda is None:
        return None, f"the CUDA kernels were never built here; PSANN_FAST_CUDA=1 {_REBUILD}"
    if cuda["status"] != "built":
        return None, f"the CUDA kernels were not built: {cuda['reason']}"
    csrc = checkout_sources(folder)
    if csrc is not None and source_hash(csrc, cuda=True) != cuda["source_hash"]:
        return None, f"the CUDA kernels are stale: csrc changed after they were built; {_REBUILD} anew"
    try:
        module = importlib.import_module("._native_cuda", __package__)
    except ImportError as error:
        return None, f"the CUDA kernels were built but do not load: {error}"
    if module.source_hash != cuda["source_hash"]:
        return None, f"the CUDA kernels are stale: _native_cuda was built from other sources than the record says; {_REBUILD} anew"
    return module, ""


NATIVE, WHY_NOT = load()
CUDA, WHY_NO_CUDA = load_cuda()


def attach(modules: dict[str, Op]) -> None:
    """Import the *_native.py that offer kernels to these ops, or record for each op why there are none."""
    for name, op in modules.items():
        if NATIVE is None:
            op.unavailable["native"] = WHY_NOT
        else:
            importlib.import_module(f".{name}", __package__)


def launch(name: str, t: Tensor, *numbers: Any, scratch: Callable[[ModuleType], int] | None = None) -> None:
    """Run kernel `name` of t's device.

    numbers   what csrc/arguments.h takes
    scratch   gives the floats of scratch memory that the CUDA kernel needs, from `_native_cuda`; None: it needs none
    """
    if not t.is_cuda:
        getattr(NATIVE, name)(*numbers, torch.get_num_threads())
        return
    with torch.cuda.device(t.device):
        # The type is named because the default one is the user's to change.
        memory = None if scratch is None else torch.empty(scratch(CUDA), dtype=torch.float32, device=t.device)
        getattr(CUDA, name)(*numbers, torch.cuda.current_stream().cuda_stream, address(memory))


def address(t: Tensor | None) -> int:
    """Where t's first element lies; None is 0, which the kernels read as absent."""
    return 0 if t is None else t.data_ptr()


def serves_lists(*lists: Sequence[Tensor]) -> bool:
    """Whether kernels that take lists of addresses can take these tensors as they lie: plain contiguous float32 on a CPU."""
    if NATIVE is None or torch.compiler.is_compiling():
        return False
    # A plain loop: of a hundred small tensors at every step, a generator's turns are a third of the time.
    for tensors in lists:
        for t in tensors:
            if type(t) not in TENSORS or t.dtype is not torch.float32 or not t.is_cpu or not t.is_contiguous() or t.is_neg():
                return False
    return True


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Where the first element of each lies."""
    return [t.data_ptr() for t in tensors]


def as_rows(t: Tensor) -> Tensor:
    """t (..., F) as (rows, F) with unit stride along F; copied only where no view has that form."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def rows_of(t: Tensor) -> tuple[Tensor, int, int]:
    """t (..., F) as memory to read (keep it alive), the number of its rows, and the elements from one to the next; F >= 1."""
    if t.is_contiguous():
        features = t.shape[-1]
        return t, t.numel() // features, features
    rows = as_rows(t)
    return rows, rows.shape[0], rows.stride(0)


def refuses_device(t: Tensor) -> str | None:
    """Why the kernels cannot run on t's device, or None."""
    if t.device.type == "cpu":
        return None
    if t.device.type == "cuda":
        return None if CUDA is not None else f"the tensors are on {t.device}; {WHY_NO_CUDA}"
    return f"the tensors are on {t.device}; the native kernels run on a CPU or with CUDA"


def refuses_dtype(name: str, t: Tensor) -> str | None:
    """Why the kernels cannot take t's dtype, or None."""
    return None if t.dtype in TYPES else f"{name} is {t.dtype}; the kernel serves float16, bfloat16 and float32"
