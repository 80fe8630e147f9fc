"""Reads documents, checks them, and divides them into training and validation parts."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Iterable, Sequence

from .cutting import check_unicode

LOGGER = logging.getLogger("psann_fast")


def checked_texts(texts: Iterable[str]) -> list[str]:
    """The texts that are not empty. Raises ValueError for what is not an iterable of valid str, or holds no text."""
    if isinstance(texts, (str, bytes)):
        raise ValueError("texts is one string; pass a list of texts, [text], or paths=[...] to read files")
    if not isinstance(texts, Iterable):
        raise ValueError(f"texts is a {type(texts).__name__}; pass a list of texts, or paths=[...] to read files")
    texts = list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            hint = "; decode it, or pass paths= to read files" if isinstance(text, (bytes, os.PathLike)) else ""
            raise ValueError(f"texts[{index}] is a {type(text).__name__}; every text must be a str{hint}")
        check_unicode(text, f"texts[{index}]")
    if not texts:
        raise ValueError("texts is empty; pass at least one text")
    documents = [text for text in texts if text]
    if not documents:
        raise ValueError(f"all {len(texts)} texts are empty strings; pass at least one character")
    if len(documents) < len(texts):
        LOGGER.warning("%d of %d texts are empty strings and are left out", len(texts) - len(documents), len(texts))
    return documents


def read_paths(paths: str | Path | Iterable[str | Path]) -> list[str]:
    """One document for each file; a folder means its .txt files, those of its subfolders too, in the order of their names.

    Files are read as UTF-8, byte for byte: line ends and a byte order mark stay. Raises FileNotFoundError for a path that does not
    exist; ValueError for a file that is empty or not UTF-8 (with the offset), and for a folder without .txt files.
    """
    documents = []
    for path in map(Path, [paths] if isinstance(paths, (str, os.PathLike)) else paths):
        if path.is_dir():
            files = sorted((file for file in path.rglob("*.txt") if file.is_file()), key=lambda file: file.relative_to(path).parts)
            if not files:
                raise ValueError(f"paths: the folder {path} holds no .txt file")
            documents += map(_read, files)
        elif path.exists():
            documents.append(_read(path))
        else:
            raise FileNotFoundError(f"paths: {path} does not exist")
    if not documents:
        raise ValueError("paths is empty; pass at least one file or folder")
    return documents


def _read(file: Path) -> str:
    content = file.read_bytes()
    if not content:
        raise ValueError(f"paths: {file} is empty; take it out")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"paths: {file} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start} ({error.reason}); "
            "convert the file"
        ) from None


def split_documents(documents: Sequence[str], val_split: float, seed: int) -> tuple[list[str], list[str]]:
    """Training and validation documents, in their order. Nothing is lost, and equal documents stand on one side.

    Documents go to validation in the order of a hash of `seed` and their content, each that still fits into `val_split` of all
    characters; if none fits, the shortest goes. If all documents are equal, each is split: its first int(length * (1 - val_split))
    characters are for training, the rest for validation. Raises ValueError if that leaves one part empty.
    """
    if val_split == 0:
        return list(documents), []
    sizes = Counter()
    for text in documents:
        sizes[text] += len(text)
    if len(sizes) == 1:
        text = documents[0]
        place = int(len(text) * (1 - val_split))
        if not 0 < place < len(text):
            raise ValueError(
                f"val_split is {val_split}, but the only document has {len(text)} characters, too few for two parts; "
                "pass more text or val_split=0"
            )
        return [text[:place]] * len(documents), [text[place:]] * len(documents)
    salt = f"{seed}:".encode()
    by_hash = sorted(sizes, key=lambda text: hashlib.blake2b(salt + text.encode("utf-8"), digest_size=16).digest())
    room = val_split * sum(sizes.values())
    held_out = set()
    for text in by_hash:
        if sizes[text] <= room:
            held_out.add(text)
            room -= sizes[text]
    if not held_out:
        held_out = {min(by_hash, key=len)}
    return [text for text in documents if text not in held_out], [text for text in documents if text in held_out]
