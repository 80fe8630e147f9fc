"""A folder of named files that is always either the old version or the new one, whole.

Files carry a generation in their name. manifest.json lists them with sizes and checksums; it is renamed into place last, older
files go afterwards, and reading touches only what the manifest names. (Renaming a folder cannot replace one that has files.)
No pickle: weights are safetensors, everything else JSON or the tokenizer library's own model file.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Callable, Mapping

import xxhash

MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "psann-fast", 1


class CheckpointError(ValueError):
    """A model folder is missing, incomplete, damaged or of another format. The message names the file and what to do."""


def write(folder: str | Path, parts: Mapping[str, Callable[[Path], object]]) -> None:
    """Replace the contents of `folder` by `parts`: name -> function that writes that file at the path it is given.

    Each file is flushed to disk before the manifest names it. Raises OSError as the file system does; the previous version then
    stays whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    previous = _read_manifest(folder) if (folder / MANIFEST).exists() else {"generation": 0, "files": {}}
    generation = previous["generation"] + 1
    files = {}
    for name, writer in parts.items():
        stem, dot, suffix = name.partition(".")
        path = folder / f"{stem}-{generation:06d}{dot}{suffix}"
        writer(path)
        _flush(path)
        files[name] = {"file": path.name, "size": path.stat().st_size, "xxh3_128": _checksum(path)}
    manifest = {"format": FORMAT, "version": FORMAT_VERSION, "generation": generation, "files": files}
    waiting = folder / f"{MANIFEST}.new"
    waiting.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    _flush(waiting)
    os.replace(waiting, folder / MANIFEST)
    _flush(folder)
    for entry in previous["files"].values():
        (folder / entry["file"]).unlink(missing_ok=True)


def read(folder: str | Path) -> dict[str, Path]:
    """The verified files of `folder`: name -> path. Raises CheckpointError before anything of a damaged folder is used."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; pass the folder that save() wrote")
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST}, so it is not a saved psann-fast model; pass the folder that save() wrote")
    paths = {}
    for name, entry in _read_manifest(folder)["files"].items():
        path = folder / entry["file"]
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though {MANIFEST} lists it; restore the file, or load another checkpoint")
        if path.stat().st_size != entry["size"]:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes and should have {entry['size']}; it is damaged: load another checkpoint"
            )
        if _checksum(path) != entry["xxh3_128"]:
            raise CheckpointError(f"{path} does not match its checksum; it is damaged: load another checkpoint")
        paths[name] = path
    return paths


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    damaged = f"{path} is damaged; load another checkpoint"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number of thousands of digits; brackets without end
        raise CheckpointError(f"{damaged} ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a {FORMAT} manifest; pass the folder that save() wrote")
    if manifest.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {manifest.get('version')!r}; this psann-fast reads version {FORMAT_VERSION}: install the one that wrote it"
        )
    files = manifest.get("files")
    ok = isinstance(files, dict) and isinstance(manifest.get("generation"), int)
    if not ok or not all(_is_entry(entry) for entry in files.values()):
        raise CheckpointError(damaged)
    return manifest


def _is_entry(entry: Any) -> bool:
    """True for {"file", "size", "xxh3_128"} whose file is a plain name, so that no manifest reaches outside its folder or at itself."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("size"), int)
        and isinstance(entry.get("xxh3_128"), str)
        and isinstance(entry.get("file"), str)
        and re.fullmatch(r"\w[\w.-]*", entry["file"]) is not None
        and entry["file"] != MANIFEST
    )


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
