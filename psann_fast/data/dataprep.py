"""`psannLMDataPrep`: texts or files to a tokenizer and training examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterable, Sequence

import numpy as np

from ..config import DataConfig, build, option_names, unknown_option
from .documents import checked_texts, read_paths, split_documents
from .packing import Examples, pack
from .shards import Shards
from .tokenizer import Tokenizer, load_tokenizer, resolve, train_tokenizer


class psannLMDataPrep:
    """Text, tokenized and cut into training examples.

    texts       an iterable of str, one for each document; never taken for file names
    paths       instead: a file or folder, or a list of them; a file is one document, a folder means its .txt files; UTF-8
    tokenizer   "auto", "simple", "sentencepiece" or "tokenizers", trained on the training part; or a Tokenizer, used as it is
    options     the other fields of DataConfig, with its defaults: tokenizer_model_path (a .model, a .json or a folder that a
                tokenizer was saved in), tokenizer_vocab_size, max_length, pack_sequences, val_split, seed

    Attributes
        config                      the resolved DataConfig
        tokenizer, tokenizer_backend, vocab_size, pad_id, eos_id
        dataset                     the training Examples; len() of this object is the number of them
        val_dataset                 the validation Examples, or None if val_split is 0
        val_texts                   the validation documents
        train_tokens, val_tokens    targets of one pass, the separator after each document included
        train_bytes, val_bytes      UTF-8 bytes of the documents
        used_ids                    the ids that occur in the training part, rising

    Empty texts are left out, and the log says so. `val_split` is a fraction of the characters; equal documents are never on both
    sides, and a single document gives its last part to validation.

    Raises TypeError for an unknown option, naming the nearest right one; ValueError for texts, files or values that cannot be
    used; FileNotFoundError; ModuleNotFoundError if a tokenizer asked for by name is not installed.
    """

    def __init__(
        self,
        texts: Iterable[str] | None = None,
        *,
        paths: str | Path | Sequence[str | Path] | None = None,
        tokenizer: str | Tokenizer = "auto",
        **options: Any,
    ) -> None:
        known = option_names(DataConfig)
        for name in options:
            if name not in known:
                raise unknown_option("psannLMDataPrep", name, [*known, "texts", "paths"])
        given = tokenizer if isinstance(tokenizer, Tokenizer) else None
        self.config = build(DataConfig, "psannLMDataPrep", {"tokenizer": given.name if given else tokenizer, **options})
        if given and self.config.tokenizer_model_path is not None:
            raise ValueError("psannLMDataPrep: tokenizer is a Tokenizer already; leave out tokenizer_model_path")
        if (texts is None) == (paths is None):
            raise ValueError("psannLMDataPrep: pass texts=[...] or paths=[...], one of them")
        documents = checked_texts(texts) if paths is None else checked_texts(read_paths(paths))
        train_texts, self.val_texts = split_documents(documents, self.config.val_split, self.config.seed)
        self.tokenizer = given or _make_tokenizer(self.config, train_texts)
        self.tokenizer_backend = self.tokenizer.name
        self.vocab_size = self.tokenizer.vocab_size
        self.pad_id, self.eos_id = self.tokenizer.pad_id, self.tokenizer.eos_id
        self.dataset = self._examples(train_texts, self.config.max_length, "training text")
        # Not longer than the training windows, beyond which the model has seen no position.
        self.val_dataset = self._examples(self.val_texts, self.dataset.window, "validation text") if self.val_texts else None
        self.train_tokens = self.dataset.target_tokens
        self.val_tokens = self.val_dataset.target_tokens if self.val_dataset else 0
        self.train_bytes, self.val_bytes = _bytes_in(train_texts), _bytes_in(self.val_texts)
        self.used_ids = np.flatnonzero(np.bincount(self.dataset.stream, minlength=self.vocab_size))

    @classmethod
    def from_shards(
        cls, folder: str | Path, *, max_length: int = DataConfig.max_length, seed: int = DataConfig.seed, verify: bool = True
    ) -> psannLMDataPrep:
        """The token shards that `psann-fast tokenize` wrote, for fit: memory-mapped, in constant memory whatever their size.

        max_length  tokens of a window
        seed        of the order of the examples
        verify      read everything once and compare checksums

        val_texts is empty and used_ids None: nothing is kept of the texts. Raises ValueError for a folder that cannot be used.
        """
        shards = Shards(folder, verify=verify)
        self = cls.__new__(cls)
        self.config = DataConfig(tokenizer=shards.tokenizer.name, max_length=max_length, seed=seed)
        self.tokenizer = shards.tokenizer
        self.tokenizer_backend, self.vocab_size = shards.tokenizer.name, shards.tokenizer.vocab_size
        self.pad_id, self.eos_id = shards.tokenizer.pad_id, shards.tokenizer.eos_id
        self.dataset = shards.examples("train", max_length, seed)
        self.val_dataset = shards.examples("validation", max_length, seed) if "validation" in shards.parts else None
        self.train_tokens, self.val_tokens = (shards.parts.get(part, {}).get("tokens", 0) for part in ("train", "validation"))
        self.train_bytes, self.val_bytes = (shards.parts.get(part, {}).get("bytes", 0) for part in ("train", "validation"))
        self.val_texts, self.used_ids = [], None
        return self

    def __len__(self) -> int:
        return len(self.dataset)

    def __repr__(self) -> str:
        return (
            f"psannLMDataPrep({len(self)} examples of {self.dataset.window} tokens, {self.tokenizer_backend} tokenizer of "
            f"{self.vocab_size} ids, {self.train_tokens} training and {self.val_tokens} validation tokens)"
        )

    def _examples(self, texts: Sequence[str], max_length: int, name: str) -> Examples:
        stream = pack(self.tokenizer.encode_batch(texts), self.eos_id, self.vocab_size)
        return Examples(
            stream,
            max_length,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
            pack=self.config.pack_sequences,
            seed=self.config.seed,
            name=name,
        )


def _make_tokenizer(config: DataConfig, train_texts: Sequence[str]) -> Tokenizer:
    if config.tokenizer_model_path is None:
        name = resolve(config.tokenizer)
        return train_tokenizer(name, train_texts, None if name == "simple" else config.tokenizer_vocab_size, seed=config.seed)
    tokenizer = load_tokenizer(config.tokenizer_model_path)
    if config.tokenizer not in ("auto", tokenizer.name):
        raise ValueError(
            f"psannLMDataPrep: tokenizer is {config.tokenizer!r}, but tokenizer_model_path {config.tokenizer_model_path} holds a "
            f"{tokenizer.name!r} tokenizer; leave tokenizer='auto'"
        )
    return tokenizer


def _bytes_in(texts: Sequence[str]) -> int:
    return sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts)
