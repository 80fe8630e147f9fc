"""What setup.py records of the native build and native.py reads back. Imports the standard library only: setup.py loads this
file by its path, where there may be no torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

RECORD = "_native_build.json"


def source_hash(csrc: Path, cuda: bool = False) -> str:
    """16 hexadecimal digits over the names and bytes of what a module is built from: equal for equal kernels, and for no others.

    cuda   of `_native_cuda`: everything; else of `_native`, of which csrc/cuda is no part
    """
    digest = hashlib.sha256()
    suffixes = (".h", ".cpp", ".cu", ".cuh") if cuda else (".h", ".cpp")
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in suffixes and (cuda or p.parent.name != "cuda")):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def write_record(folder: Path, **record: Any) -> None:
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The build's record: status "built", "failed" or "skipped", reason, source_hash, and how it was built; "cuda" has the same of
    the CUDA kernels. None: there was no build."""
    try:
        return json.loads((folder / RECORD).read_text())
    except FileNotFoundError:
        return None


def checkout_sources(folder: Path) -> Path | None:
    """csrc of the checkout that `folder` (the package) lies in, or None in an installed copy."""
    csrc = folder.resolve().parents[2] / "csrc"
    return csrc if csrc.is_dir() else None
