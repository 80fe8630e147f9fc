"""JSON files that carry their own checksum, so that no bit of them changes unseen."""

from __future__ import annotations

import json
from typing import Any, Mapping

import xxhash

SEAL = "xxh3_128"


def sealed(contents: Mapping[str, Any]) -> bytes:
    """The file of some JSON contents, their checksum in it."""
    seal = xxhash.xxh3_128_hexdigest(json.dumps(contents).encode())
    return (json.dumps({**contents, SEAL: seal}, indent=2) + "\n").encode()


def is_sealed(contents: Any, file: bytes) -> bool:
    """True if `file`, which says `contents`, is what `sealed` makes of them, byte for byte."""
    return isinstance(contents, dict) and sealed({name: value for name, value in contents.items() if name != SEAL}) == file
