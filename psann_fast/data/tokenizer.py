"""What a tokenizer promises, and the way to one: train it, or load it.

Every tokenizer that is trained here is lossless: `decode(encode(text)) == text` for every str that is valid Unicode. Bytes are
part of its vocabulary, so nothing is unknown. The ids of padding and of the end of a document come from no text whatever:
`[EOS]` or `</s>` in a text stays text.
"""

from __future__ import annotations

import abc
import importlib
import importlib.util
import json
import logging
import warnings
from pathlib import Path
from typing import Any, ClassVar, Iterable, Iterator, Mapping, Sequence

import numpy as np

from ..config import TOKENIZERS, DataConfig
from .cutting import check_unicode, cut
from .losses import describe_losses

LOGGER = logging.getLogger("psann_fast")
DESCRIPTION = "psann_tokenizer.json"
FORMAT = {"format": "psann-fast tokenizer", "version": 1}
MODULES = {"simple": "simple_tokenizer", "sentencepiece": "sentencepiece_tokenizer", "tokenizers": "bpe_tokenizer"}
AUTO_ORDER = ("sentencepiece", "tokenizers", "simple")
SUFFIXES = {".model": "sentencepiece", ".json": "tokenizers"}
# The largest that are in use have 35 MB, for 262,144 tokens; reading one takes some ten times as much.
LARGEST_FILE = 64 << 20
# Characters that go to a library in one call: a result is some ten times its text, and results are copied out call by call.
GROUP_CHARACTERS = 1 << 20


class Tokenizer(abc.ABC):
    """Text to ids and back.

    name         "simple", "sentencepiece" or "tokenizers"
    vocab_size   ids are 0 to vocab_size - 1
    pad_id       fills windows; never produced by a text, decoded to nothing
    eos_id       stands between documents and opens an empty prompt; never produced by a text, decoded to nothing
    token_bytes  the bytes of each id, b"" for special ones
    """

    name: ClassVar[str]
    least_vocab_size: ClassVar[int]
    # Long texts are cut into pieces of at most this many characters, at places where no token crosses if there are any.
    piece_characters: ClassVar[int] = 4096

    def __init__(self, token_bytes: Sequence[bytes], pad_id: int, eos_id: int, can_cut: bool = True) -> None:
        self.token_bytes = tuple(token_bytes)
        self.pad_id, self.eos_id = pad_id, eos_id
        self.vocab_size = len(self.token_bytes)
        self.can_cut = can_cut

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without special ids. Raises ValueError for a str that is not valid Unicode, naming the position."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array (tokens,) for each text, equal to `encode` of it; in parallel where the library can."""
        rows: list[list[np.ndarray]] = [[] for _ in texts]
        pieces: list[str] = []
        owners: list[int] = []
        waiting = 0

        def flush() -> None:
            for owner, ids in zip(owners, self._encode_pieces(pieces)):
                rows[owner].append(ids)
            pieces.clear(), owners.clear()

        for index, text in enumerate(texts):
            check_unicode(text, "encode: the text" if len(texts) == 1 else f"encode: text {index}")
            for piece in self._pieces(text):
                pieces.append(piece)
                owners.append(index)
                waiting += len(piece)
                if waiting >= GROUP_CHARACTERS:
                    flush()
                    waiting = 0
        flush()
        return [np.concatenate(row) if row else np.empty(0, np.int32) for row in rows]

    def encode_stream(self, chunks: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of one text that arrives in chunks, cut anywhere: int32 arrays which end to end are `encode` of the whole.

        Memory stays bounded by the chunks. A prebuilt tokenizer whose text cannot be cut (`can_cut` is False) reads it whole.
        """
        rest, position = "", 0
        for chunk in chunks:
            check_unicode(chunk, "encode_stream: the text", position)
            position += len(chunk)
            rest += chunk
            # `cut` keeps what it cannot decide yet, so any threshold gives the same ids; a high one gives the library more at once.
            if self.can_cut and len(rest) > GROUP_CHARACTERS + self.piece_characters:
                pieces, rest = cut(rest, self.piece_characters)
                yield from self._encode_groups(pieces)
        yield from self._encode_groups(self._pieces(rest))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special ids are skipped, and bytes that are not UTF-8 become U+FFFD.

        Raises ValueError for an id outside 0 to vocab_size - 1.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 bytes of `ids`; decode_bytes(a + b) == decode_bytes(a) + decode_bytes(b), so streaming can add them up."""
        return b"".join(self.token_bytes[i] for i in self._checked(ids))

    @abc.abstractmethod
    def to_files(self) -> dict[str, bytes]:
        """Everything that makes this tokenizer, as file name to content; the same tokenizer always gives the same bytes."""

    @classmethod
    @abc.abstractmethod
    def from_files(cls, files: Mapping[str, bytes], description: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer that `to_files` described. Raises ValueError if the content does not fit."""

    def save(self, folder: str | Path) -> list[str]:
        """Write the tokenizer into `folder`, made if need be. Returns the names of its files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = self.to_files()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return list(files)

    @staticmethod
    def load(folder: str | Path) -> Tokenizer:
        """The tokenizer that `save` wrote. Raises FileNotFoundError or ValueError, naming the file."""
        folder = Path(folder)
        if not (folder / DESCRIPTION).is_file():
            raise FileNotFoundError(f"no tokenizer in {folder}: {DESCRIPTION} is missing; give the folder that save() wrote")
        content = read_tokenizer_file(folder / DESCRIPTION)
        named = _files_named(_description(content))
        return tokenizer_from_files({DESCRIPTION: content, **{name: read_tokenizer_file(folder / name) for name in named}})

    @abc.abstractmethod
    def _encode_pieces(self, pieces: Sequence[str]) -> list[np.ndarray]:
        """One int32 array for each piece; the texts are valid Unicode."""

    def _describe(self, **more: Any) -> bytes:
        content = {**FORMAT, "name": self.name, "vocab_size": self.vocab_size, "pad_id": self.pad_id, "eos_id": self.eos_id, **more}
        return (json.dumps(content, indent=1) + "\n").encode("ascii")

    def _pieces(self, text: str) -> list[str]:
        if not self.can_cut:
            return [text] if text else []
        pieces, rest = cut(text, self.piece_characters)
        return pieces + [rest] if rest else pieces

    def _encode_groups(self, pieces: Sequence[str]) -> Iterator[np.ndarray]:
        step = max(1, GROUP_CHARACTERS // self.piece_characters)
        for start in range(0, len(pieces), step):
            yield np.concatenate(self._encode_pieces(pieces[start : start + step]))

    def _checked(self, ids: Sequence[int]) -> list[int]:
        array = np.asarray(ids)
        if array.size == 0:
            return []
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"decode: ids have shape {array.shape} and dtype {array.dtype}; pass one row of whole numbers")
        for bad in (array.min(), array.max()):
            if not 0 <= bad < self.vocab_size:
                raise ValueError(f"decode: id {bad} is outside this tokenizer's 0 to {self.vocab_size - 1}")
        return array.tolist()


def tokenizer_from_files(files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer whose `to_files` gave `files`. Raises ValueError, naming the file, if they are damaged."""
    if DESCRIPTION not in files:
        raise ValueError(f"there is no {DESCRIPTION} among the tokenizer's files {sorted(files)}")
    description = _description(files[DESCRIPTION])
    tokenizer = tokenizer_class(description["name"]).from_files(files, description)
    for field in ("vocab_size", "pad_id", "eos_id"):
        wanted, found = description.get(field), getattr(tokenizer, field)
        if found != wanted:
            raise ValueError(
                f"{DESCRIPTION}: {field} is {wanted!r}, but the tokenizer has {found}; the files do not belong together"
            )
    return tokenizer


def _description(content: bytes) -> dict[str, Any]:
    try:
        description = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{DESCRIPTION} is not JSON ({error}); the tokenizer is damaged") from None
    if not isinstance(description, dict) or {key: description.get(key) for key in FORMAT} != FORMAT:
        raise ValueError(f"{DESCRIPTION} does not describe a psann-fast tokenizer of version {FORMAT['version']}")
    if description.get("name") not in MODULES:
        raise ValueError(f"{DESCRIPTION}: name is {description.get('name')!r}; it must be one of {', '.join(map(repr, MODULES))}")
    return description


def _files_named(description: Mapping[str, Any]) -> list[str]:
    names = [description["file"]] if "file" in description else []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{DESCRIPTION}: file is {name!r}; it must be the name of a file beside it")
    return names


def read_tokenizer_file(path: Path) -> bytes:
    """One file of a tokenizer. Raises FileNotFoundError where there is none; ValueError for one larger than any tokenizer."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, or is no file; restore it, or take another tokenizer")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a tokenizer's file has at most {LARGEST_FILE:,}")
    return path.read_bytes()


def is_importable(name: str) -> bool:
    """Whether the library behind a tokenizer is installed; "simple" needs none."""
    return name == "simple" or importlib.util.find_spec(name) is not None


def resolve(name: str) -> str:
    """The tokenizer that `name` means here: "auto" is the first of AUTO_ORDER that is importable.

    Raises ValueError for an unknown name; ModuleNotFoundError for one whose library is not installed, saying what to install.
    """
    if name not in TOKENIZERS:
        raise ValueError(f"tokenizer is {name!r}; choose one of {', '.join(map(repr, TOKENIZERS))}")
    if name == "auto":
        return next(candidate for candidate in AUTO_ORDER if is_importable(candidate))
    if not is_importable(name):
        raise ModuleNotFoundError(
            f"tokenizer={name!r} needs the package {name!r}, which is not installed; "
            f"pip install {name}, or choose tokenizer='simple'"
        )
    return name


def tokenizer_class(name: str) -> Any:
    """The class behind a resolved name; its module is imported here, because its library may be absent."""
    return importlib.import_module(f".{MODULES[resolve(name)]}", __package__).TOKENIZER


def train_tokenizer(name: str, texts: Iterable[str], vocab_size: int | None = None, *, seed: int = 1337) -> Tokenizer:
    """A lossless tokenizer, learnt from `texts`.

    name         "auto", "simple", "sentencepiece" or "tokenizers"
    texts        read once; a subword tokenizer learns from a sample of at most 16 MiB, drawn from pieces of the texts by `seed`
    vocab_size   the largest number of ids, special ones and 256 bytes included; a small corpus gives fewer and says so in the log.
                 None: every character of the texts for "simple", DataConfig's default for the others

    The same texts, in the same order, give the same tokenizer. Raises ValueError for texts that are not valid Unicode and for a
    vocab_size that cannot hold the bytes.
    """
    kind = tokenizer_class(name)
    if vocab_size is None and kind.name != "simple":
        vocab_size = DataConfig.tokenizer_vocab_size
    least = kind.least_vocab_size
    if vocab_size is not None and vocab_size < least:
        raise ValueError(
            f"vocab_size is {vocab_size}; a {kind.name!r} tokenizer needs at least {least} ids (256 bytes and its special ids)"
        )
    tokenizer = kind.train(texts, vocab_size, seed)
    if vocab_size is not None and tokenizer.vocab_size < vocab_size:
        LOGGER.info("the texts support a vocabulary of %d ids; %d were asked for", tokenizer.vocab_size, vocab_size)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from disk: a folder that `save` wrote, a SentencePiece `.model`, or a Hugging Face `.json`.

    The latter two are tried on a list of texts, and what they lose is named in a UserWarning. If they lack a padding or an
    end-of-text id, one is appended after their vocabulary. Raises FileNotFoundError; ValueError for another kind of file or a
    damaged one; ModuleNotFoundError if its library is not installed.
    """
    path = Path(path)
    if path.is_dir():
        return Tokenizer.load(path)
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}: there is no such file")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: a prebuilt tokenizer is a SentencePiece '.model' or a Hugging Face '.json' file")
    tokenizer = tokenizer_class(SUFFIXES[path.suffix]).prebuilt(read_tokenizer_file(path), str(path))
    losses = describe_losses(lambda text: tokenizer.decode(tokenizer.encode(text)))
    if losses:
        warnings.warn(f"the tokenizer {path} does not give every text back: {'; '.join(losses)}", UserWarning, stacklevel=2)
    return tokenizer
