"""Byte-level BPE of Hugging Face's `tokenizers`, trained so that nothing is lost, or a prebuilt `.json`.

The padding and end-of-document ids of ours stand after the library's vocabulary. The library does not know them, so no text can
produce them, and it splits no text at names such as <|endoftext|>.
"""

from __future__ import annotations

import json
import re
from typing import Any, Iterable, Mapping, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from .sampling import sample
from .tokenizer import DESCRIPTION, Tokenizer
from .words import WordEncoder

FILE = "tokenizer.json"
# How other people spell padding and end of text, in the order of preference.
PADS = ("<pad>", "[pad]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
ENDS = ("</s>", "<|endoftext|>", "<eos>", "<|eos|>", "[eos]", "<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
# GPT-2 splits before white space, or before the last space of a run if a word follows; never inside these.
WHITE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # as the library sees it; re's \s has more
WORD = re.compile(f"[{WHITE}]*[^{WHITE}]+|[{WHITE}]+")
LARGEST_VOCABULARY = 1 << 22  # ids; there is a table of them, holes included
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class BPETokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library."""

    name = "tokenizers"
    least_vocab_size = 256 + 2

    def __init__(self, content: bytes, pad_id: int | None = None, eos_id: int | None = None, what: str = "the tokenizer") -> None:
        """content   a tokenizer.json;   pad_id, eos_id   None: found by their names, or appended;   what   names it in errors

        Raises ValueError if `content` is not a tokenizer of the library.
        """
        settings = _settings(content, what)
        try:
            self.library = tokenizers.Tokenizer.from_buffer(json.dumps(settings).encode("utf-8"))
        except ValueError as error:
            raise ValueError(f"{what} is not a tokenizer of the `tokenizers` library ({error})") from None
        # Names of special tokens in a text are text.
        self.library.encode_special_tokens = True
        added = self.library.get_added_tokens_decoder()
        vocabulary = self.library.get_vocab(with_added_tokens=True)
        size = 1 + max(vocabulary.values(), default=-1)
        if size > LARGEST_VOCABULARY:
            raise ValueError(f"{what} has the id {size - 1:,}; the largest may be {LARGEST_VOCABULARY - 1:,}")
        # Unknown characters are text, which comes back as the name of this token.
        unknown = _unknown_id(settings["model"], vocabulary)
        added_special = [i for i, token in added.items() if token.special and i != unknown]
        by_name = {added[i].content.lower(): i for i in added_special}
        eos_id = _named(by_name, ENDS) if eos_id is None else _checked_id("eos_id", eos_id, size, what)
        pad_id = _named(by_name, PADS) if pad_id is None else _checked_id("pad_id", pad_id, size, what)
        if pad_id is None or pad_id == eos_id:
            pad_id = size
        if eos_id is None:
            eos_id = max(size, pad_id + 1)
        self._specials = frozenset((pad_id, eos_id, *added_special))
        self._is_byte_level = isinstance(self.library.decoder, decoders.ByteLevel)
        table = [b""] * max(size, pad_id + 1, eos_id + 1)
        for token, i in vocabulary.items():
            if i not in self._specials:
                table[i] = token.encode("utf-8") if i in added else self._bytes_of(token, i)
        super().__init__(table, pad_id, eos_id, can_cut=_splits_words_as_ours(settings))
        self._words = WordEncoder(WORD, self._library_encode)
        # Special tokens of the library's own vocabulary, which its model might find in a text. Longest first, because one name
        # may begin another.
        names = sorted((token for token, i in vocabulary.items() if i in self._specials), key=len, reverse=True)
        self._special_names = re.compile(f"({'|'.join(map(re.escape, names))})") if names else None

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, seed: int) -> BPETokenizer:
        library = tokenizers.Tokenizer(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            min_frequency=2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        library.train_from_iterator(sample(texts, seed), trainer)
        return cls(library.to_str().encode("utf-8"))

    @classmethod
    def prebuilt(cls, content: bytes, what: str) -> BPETokenizer:
        """From the content of a tokenizer.json made elsewhere."""
        return cls(content, what=what)

    def to_files(self) -> dict[str, bytes]:
        return {DESCRIPTION: self._describe(file=FILE), FILE: (self.library.to_str(pretty=True) + "\n").encode("utf-8")}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], description: Mapping[str, Any]) -> BPETokenizer:
        if FILE not in files:
            raise ValueError(f"{DESCRIPTION} does not name {FILE}, which a tokenizer of the `tokenizers` library needs")
        return cls(files[FILE], description.get("pad_id"), description.get("eos_id"), FILE)

    def decode(self, ids: Sequence[int]) -> str:
        if self._is_byte_level:
            return super().decode(ids)
        # Other decoders treat the start of a text in a way of their own.
        return self.library.decode([i for i in self._checked(ids) if i not in self._specials], skip_special_tokens=False)

    def _encode_pieces(self, pieces: Sequence[str]) -> list[np.ndarray]:
        if self.can_cut:
            return self._words.encode(pieces)
        return [np.array(ids, np.int32) for ids in self._library_encode(pieces)]

    def _library_encode(self, texts: Sequence[str]) -> list[list[int]]:
        rows = [encoding.ids for encoding in self.library.encode_batch_fast(list(texts), add_special_tokens=False)]
        if self._special_names:
            for index, ids in enumerate(rows):
                if not self._specials.isdisjoint(ids):
                    rows[index] = self._without_special_ids(texts[index])
        return rows

    def _without_special_ids(self, text: str) -> list[int]:
        """The ids of a text in which the library sees special tokens: those are encoded character by character."""
        ids: list[int] = []
        for index, part in enumerate(self._special_names.split(text)):
            for unit in part if index % 2 else [part]:
                found = self.library.encode(unit, add_special_tokens=False).ids
                if not self._specials.isdisjoint(found):
                    special = next(i for i in found if i in self._specials)
                    raise ValueError(
                        f"encode: this tokenizer turns {unit[:40]!r} into the special id {special}; take it out of the text"
                    )
                ids.extend(found)
        return ids

    def _bytes_of(self, token: str, id: int) -> bytes:
        if self._is_byte_level:
            return bytes(BYTE_OF[character] for character in token) if all(c in BYTE_OF for c in token) else token.encode("utf-8")
        once = self.library.decode([id], skip_special_tokens=False)
        spelt = BYTE_TOKEN.fullmatch(token)
        if spelt and once != token:
            return bytes([int(spelt[1], 16)])
        # What the token adds after itself: at the start of a text some decoders drop a space.
        return self.library.decode([id, id], skip_special_tokens=False)[len(once) :].encode("utf-8")


def _settings(content: bytes, what: str) -> dict[str, Any]:
    """The parsed file without the settings that cut a text off, fill it up or draw at random."""
    try:
        settings = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON ({error}); a tokenizer of the `tokenizers` library is") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        raise ValueError(f"{what} is JSON, but not a tokenizer of the `tokenizers` library: it has no model")
    settings = {**settings, "truncation": None, "padding": None, "model": dict(settings["model"])}
    if "dropout" in settings["model"]:
        settings["model"]["dropout"] = None
    # Only a token marked special is left alone in texts; ours of these names must be.
    added = settings.get("added_tokens") or []
    names = {*PADS, *ENDS}
    settings["added_tokens"] = [
        {**token, "special": True} if str(token.get("content")).lower() in names else token for token in added
    ]
    return settings


def _checked_id(field: str, value: Any, size: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size + 2:
        raise ValueError(f"{what}: {field} is {value!r}; it must be a whole number from 0 to {size + 1}")
    return value


def _unknown_id(model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> int | None:
    return model["unk_id"] if "unk_id" in model else vocabulary.get(model.get("unk_token"))


def _named(by_name: Mapping[str, int], names: Sequence[str]) -> int | None:
    return next((by_name[name] for name in names if name in by_name), None)


def _splits_words_as_ours(settings: Mapping[str, Any]) -> bool:
    """Whether no token can cross a place where `cut` cuts: GPT-2's splitting, and nothing else that looks at the text."""
    splitter = settings.get("pre_tokenizer") or {}
    return (
        splitter.get("type") == "ByteLevel"
        and not splitter.get("add_prefix_space")
        and splitter.get("use_regex", True)
        and settings.get("normalizer") is None
        and all(token.get("special") for token in settings["added_tokens"])
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: bytes that print are themselves, the others follow from U+0100 on, in order."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in prints]
    return {**{chr(byte): byte for byte in prints}, **{chr(256 + n): byte for n, byte in enumerate(rest)}}


BYTE_OF = _byte_alphabet()
TOKENIZER = BPETokenizer
