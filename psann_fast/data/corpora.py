"""Documents of large corpora, a piece at a time: text, JSON lines and Parquet files, never a whole file in memory."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Iterable, Iterator, Sequence

from .cutting import check_unicode

CHUNK_BYTES = 1 << 20
KINDS = (".txt", ".jsonl", ".parquet")


def corpus_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files of some paths; a folder means its .txt, .jsonl and .parquet files, those of its subfolders too, by name.

    Raises FileNotFoundError for a path that does not exist; ValueError for a folder without such files, and for no path at all.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(
                (file for file in path.rglob("*") if file.suffix in KINDS), key=lambda file: file.relative_to(path).parts
            )
            if not found:
                raise ValueError(f"{path} holds no {', '.join(KINDS)} file")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path} does not exist")
    if not files:
        raise ValueError("no file was given; pass files or folders")
    return files


def documents(files: Sequence[Path], *, field: str = "text", by_line: bool = False) -> Iterator[Iterator[str]]:
    """Each document as the chunks of its text, to be read before the next one is asked for.

    A .jsonl file has one a line and a .parquet file one a row, in `field`; another file is one document, or with by_line one a line
    (without its line end). Raises ValueError, naming file and place, for what is not UTF-8, not JSON or without the field;
    ModuleNotFoundError for a .parquet file without pyarrow.
    """
    for file in files:
        if file.suffix == ".jsonl":
            yield from map(_one, _json_lines(file, field))
        elif file.suffix == ".parquet":
            yield from map(_one, _parquet_rows(file, field))
        elif by_line:
            yield from _line_chunks(file)
        else:
            yield _chunks(file)


def _one(text: str) -> Iterator[str]:
    yield text


def _chunks(file: Path) -> Iterator[str]:
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    with open(file, "rb") as source:
        while True:
            content = source.read(CHUNK_BYTES)
            try:
                text = decoder.decode(content, final=not content)
            except UnicodeDecodeError as error:
                # The decoder's own position counts from the bytes that it had kept back.
                place = position - (len(error.object) - len(content)) + error.start
                raise ValueError(
                    f"{file} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {place} ({error.reason}); "
                    "convert the file"
                ) from None
            position += len(content)
            if text:
                yield text
            if not content:
                return


def _line_chunks(file: Path) -> Iterator[Iterator[str]]:
    """Each line as its chunks, without the line end; a line of any length takes no more memory than a chunk."""
    source = _chunks(file)
    text, place = "", 0

    def line() -> Iterator[str]:
        nonlocal text, place
        while True:
            end = text.find("\n", place)
            piece = text[place:] if end < 0 else text[place:end]
            text, place = ("", 0) if end < 0 else (text, end + 1)
            if piece:
                yield piece
            if end >= 0:
                return
            text = next(source, "")
            if not text:
                return

    while True:
        if place == len(text):
            text, place = next(source, ""), 0
            if not text:
                return
        yield line()


def _lines(file: Path) -> Iterator[str]:
    rest: list[str] = []
    for chunk in _chunks(file):
        *whole, last = chunk.split("\n")
        if whole:
            yield "".join([*rest, whole[0]])
            yield from whole[1:]
            rest = []
        rest.append(last)
    if "".join(rest):
        yield "".join(rest)


def _json_lines(file: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {number}, is not JSON ({error}); mend or remove the line") from None
        yield _text_of(row if isinstance(row, dict) else {}, field, f"{file}, line {number},")


def _parquet_rows(file: Path, field: str) -> Iterator[str]:
    try:
        from pyarrow import lib, parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{file} needs the package pyarrow, which is not installed; pip install pyarrow") from error
    try:
        table = parquet.ParquetFile(file)
        if field not in table.schema_arrow.names:
            raise ValueError(f"{file} has no column {field!r}; it has {', '.join(table.schema_arrow.names)}: name one with --field")
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=[field]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield _text_of({field: text}, field, f"{file}, row {number},")
    except lib.ArrowInvalid as error:
        raise ValueError(f"{file} is not a Parquet file ({error})") from error


def _text_of(row: dict[str, object], field: str, where: str) -> str:
    text = row.get(field)
    if not isinstance(text, str):
        has = ", ".join(map(str, row)) or "nothing by name"
        raise ValueError(f"{where} has no text in {field!r} (it has {has}); name the field with --field")
    check_unicode(text, f"{where} field {field!r}")
    return text
