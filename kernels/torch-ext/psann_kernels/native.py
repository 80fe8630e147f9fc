"""Loads `_native`, the kernels of csrc, or says why it cannot be. The *_native.py files offer its kernels to the registry.

The kernels know no torch: each *_native.py checks device, dtype and layout, allocates, and passes addresses, sizes and strides.
They run on torch's own OpenMP threads, as many as torch.get_num_threads() says, and give the same bits for any number of them.

Environment:

    PSANN_FAST_NATIVE_ISA   moves the default instruction set: one of those that `instruction_sets()` lists
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

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
    isa = os.environ.get("PSANN_FAST_NATIVE_ISA")
    if isa is not None and not native.use_isa(isa):
        raise ValueError(f"PSANN_FAST_NATIVE_ISA is {isa!r}; this build and processor have {', '.join(instruction_sets(native))}")
    return ""


def instruction_sets(native: ModuleType) -> list[str]:
    """Names that PSANN_FAST_NATIVE_ISA takes here, widest first."""
    return native.usable_isas().split()


NATIVE, WHY_NOT = load()


def attach(modules: dict[str, Op]) -> None:
    """Import the *_native.py that offer kernels to these ops, or record for each op why there are none."""
    for name, op in modules.items():
        if NATIVE is None:
            op.unavailable["native"] = WHY_NOT
        else:
            importlib.import_module(f".{name}", __package__)


def address(t: Tensor | None) -> int:
    """Where t's first element lies; None is 0, which the kernels read as absent."""
    return 0 if t is None else t.data_ptr()


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
    """Why the C++ kernels cannot run on t's device, or None."""
    if t.device.type == "cpu":
        return None
    if t.device.type == "cuda":
        # They compile for every target (test_native_cuda.py); until a GPU has run them against the references they are not offered.
        return f"the tensors are on {t.device}; csrc/cuda has kernels for it that no GPU has run yet, so they are not offered"
    return f"the tensors are on {t.device}; the C++ kernels run on the CPU"


def refuses_dtype(name: str, t: Tensor) -> str | None:
    """Why the kernels cannot take t's dtype, or None."""
    return None if t.dtype in TYPES else f"{name} is {t.dtype}; the kernel serves float16, bfloat16 and float32"
