"""What setup.py records of the native build and native.py reads back. Imports the standard library only: setup.py loads this
file by its path, where there may be no torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

RECORD = "_native_build.json"


def source_hash(csrc: Path) -> str:
    """16 hexadecimal digits over the names and bytes of what `_native` is built from: equal for equal kernels, and for no others.

    csrc/cuda is no part of it: no build contains it yet.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in (".h", ".cpp")):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def write_record(folder: Path, **record: Any) -> None:
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The build's record: status "built", "failed" or "skipped", reason, source_hash, and how it was built. None: there was no build."""
    try:
        return json.loads((folder / RECORD).read_text())
    except FileNotFoundError:
        return None


def checkout_sources(folder: Path) -> Path | None:
    """csrc of the checkout that `folder` (the package) lies in, or None in an installed copy."""
    csrc = folder.resolve().parents[2] / "csrc"
    return csrc if csrc.is_dir() else None
