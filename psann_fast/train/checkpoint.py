"""A folder of named files that is always either the old version or the new one, whole.

Files carry a generation in their name. manifest.json lists them with sizes and checksums, and has one of itself; it is renamed into
place last, older files go afterwards, and reading touches only what it names. (Renaming a folder cannot replace one that has
files.) No pickle: weights are safetensors, everything else JSON or the tokenizer library's own model file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, Callable, Collection, Mapping, Union

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..sealed import is_sealed, sealed

MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "psann-fast", 1
LARGEST_JSON = 1 << 20  # bytes; a checkpoint has some seven files and a hundred options
MOST_TENSORS = 1 << 15  # reading one takes 20 microseconds, and a layer has some twenty
# What a file is made of: its bytes, tensors by name (safetensors), a file of the same content, or a function that writes it.
Part = Union[bytes, Mapping[str, Tensor], Path, Callable[[Path], object]]
SAFETENSORS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class CheckpointError(ValueError):
    """A model folder is missing, incomplete, damaged or of another format. The message names the file and what to do."""


def write(folder: str | Path, parts: Mapping[str, Part]) -> dict[str, Path]:
    """Replace the contents of `folder` by `parts`: name -> what that file holds. Returns name -> path of the new files.

    Each file is flushed to disk before the manifest names it. Raises OSError, naming the path, the bytes needed and those that are
    free, where the file system does; the previous version then stays whole, and the new files are removed.
    """
    folder = Path(folder)
    new: list[Path] = []
    try:
        return _write(folder, parts, new)
    except OSError as error:
        for path in new:
            with contextlib.suppress(OSError):  # the error that is reported came first
                path.unlink(missing_ok=True)
        raise _explained(error, folder, sum(map(size_of, parts.values()))) from error


def _write(folder: Path, parts: Mapping[str, Part], new: list[Path]) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    previous = _read_manifest(folder) if (folder / MANIFEST).exists() else {"generation": 0, "files": {}}
    generation = previous["generation"] + 1
    files = {}
    for name, part in parts.items():
        stem, dot, suffix = name.partition(".")
        path = folder / f"{stem}-{generation:06d}{dot}{suffix}"
        new.append(path)
        _write_part(path, part)
        _flush(path)
        files[name] = {"file": path.name, "size": path.stat().st_size, "xxh3_128": _checksum(path)}
    manifest = {"format": FORMAT, "version": FORMAT_VERSION, "generation": generation, "files": files}
    waiting = folder / f"{MANIFEST}.new"
    new.append(waiting)
    with open(waiting, "wb") as file:
        file.write(sealed(manifest))
    _flush(waiting)
    os.replace(waiting, folder / MANIFEST)
    new.clear()  # they are the folder's version now
    _flush(folder)
    for entry in previous["files"].values():
        (folder / entry["file"]).unlink(missing_ok=True)
    return {name: folder / entry["file"] for name, entry in files.items()}


def _write_part(path: Path, part: Part) -> None:
    path.unlink(missing_ok=True)  # what an interrupted save left, perhaps a link to a file of another folder
    if isinstance(part, Path):
        try:
            os.link(part, path)
        except OSError:  # a file system without links, or with too many
            shutil.copyfile(part, path)
    elif callable(part):
        part(path)
    else:
        with open(path, "wb") as file:
            if isinstance(part, bytes):
                file.write(part)
            else:
                _write_tensors(file, part)


def _write_tensors(file: Any, tensors: Mapping[str, Tensor]) -> None:
    """The safetensors format, tensor by tensor: the library's own writer hides the system's error and cannot be interrupted.

    Source: https://huggingface.co/docs/safetensors, section "Format".
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": SAFETENSORS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, place + size]}
        place += size
    head = json.dumps(header).encode("utf-8")
    head += b" " * (-len(head) % 8)  # tensors begin at a multiple of 8, as readers that map the file like it
    file.write(len(head).to_bytes(8, "little") + head)
    for tensor in tensors.values():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        file.write(memoryview(flat.view(torch.uint8).numpy()))


def size_of(part: Part) -> int:
    """Bytes that a part needs on disk, about; 0 for a link or where only its function knows."""
    if isinstance(part, bytes):
        return len(part)
    return sum(t.numel() * t.element_size() for t in part.values()) if isinstance(part, Mapping) else 0


def _explained(error: OSError, folder: Path, needed: int) -> OSError:
    """The same kind of OSError, with what a person needs to mend it."""
    try:
        free = f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        free = "an unknown number of"
    where = error.filename if error.filename is not None else folder
    return OSError(
        error.errno,
        f"cannot save to {folder} ({where}: {error.strerror or error}); {needed:,} bytes are needed and {free} are free: "
        "what was saved before stays whole",
    )


def read(folder: str | Path) -> dict[str, Path]:
    """The verified files of `folder`: name -> path. Raises CheckpointError before anything of a damaged folder is used."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; pass the folder that save() wrote")
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}, so it is not a saved psann-fast model; pass the folder that save() wrote"
        )
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


def read_json(path: Path) -> Any:
    """What a JSON file of a checkpoint says. Raises ValueError for one that is damaged or larger than any."""
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes; at most {LARGEST_JSON:,} are read")
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error


def check_readable(weights: Collection[object]) -> None:
    """Raise ValueError for more weights than `read_tensors` takes: a model that could not be loaded is not saved."""
    if len(weights) > MOST_TENSORS:
        raise ValueError(
            f"the model has {len(weights):,} tensors, and a saved model can have {MOST_TENSORS:,}, since no more are read back; "
            "make it of fewer layers, or keep module.state_dict() in a file of your own"
        )


def read_tensors(path: Path, most: int = MOST_TENSORS) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises SafetensorError for a damaged one, ValueError for more than `most`."""
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > 256 * most:  # a tensor takes some 100 bytes
        raise ValueError(f"{path.name} has a header of {header:,} bytes; at most {256 * most:,} are read")
    with safe_open(path, "pt") as file:
        count = len(file.keys())
    if count > most:
        raise ValueError(f"{path.name} has {count:,} tensors; at most {most:,} are read")
    return load_file(path)


def check_ours(folder: str | Path) -> None:
    """Raise CheckpointError unless the manifest of `folder` is one of ours and whole."""
    _read_manifest(Path(folder))


def sync(folder: Path) -> None:
    """Make the names in a folder reach the disk."""
    _flush(folder)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    damaged = f"{path} is damaged; load another checkpoint"
    if path.stat().st_size > LARGEST_JSON:
        raise CheckpointError(f"{damaged} (it has {path.stat().st_size:,} bytes)")
    content = path.read_bytes()
    try:
        manifest = json.loads(content)
        is_whole = is_sealed(manifest, content)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number of thousands of digits; brackets without end
        raise CheckpointError(f"{damaged} ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a {FORMAT} manifest; pass the folder that save() wrote")
    if manifest.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {manifest.get('version')!r}; this psann-fast reads version {FORMAT_VERSION}: "
            "install the one that wrote it"
        )
    files = manifest.get("files")
    ok = isinstance(files, dict) and isinstance(manifest.get("generation"), int)
    # A wrong generation alone would make the next save overwrite the files of this one and then remove them.
    if not is_whole or not ok or not all(_is_entry(entry) for entry in files.values()):
        raise CheckpointError(damaged)
    return manifest


def _is_entry(entry: Any) -> bool:
    """True for {"file", "size", "xxh3_128"} whose file is a plain name, so that no manifest reaches outside its folder or at
    itself."""
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
