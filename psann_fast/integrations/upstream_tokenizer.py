"""psannlm's fitted tokenizers as ours, where every text gets the same ids."""

from __future__ import annotations

import json
from typing import Any, Mapping

from ..data import Tokenizer
from ..data.bpe_tokenizer import BPETokenizer
from ..data.sentencepiece_tokenizer import SentencePieceTokenizer

SPECIALS = ("[PAD]", "[BOS]", "[EOS]", "[UNK]")  # ids 0 to 3 of theirs


class NotCarried(ValueError):
    """A tokenizer of theirs has no counterpart here; the message says why."""


def convert_tokenizer(state: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a psannlm file's `tokenizer` entry (what its Tokenizer.to_state() gives). Raises NotCarried."""
    backend = state.get("backend") if isinstance(state, Mapping) else None
    try:
        if backend == "simple":
            return BPETokenizer(_characters(state["vocabulary"]), pad_id=0, eos_id=2, what="psannlm's character tokenizer")
        if backend == "sentencepiece":
            return SentencePieceTokenizer(state["model"], "psannlm's SentencePiece model")
        if backend == "tokenizers" and state["passthrough_ids"] is True:
            special = state["special_ids"]
            return BPETokenizer(
                state["model"].encode("utf-8"), pad_id=special["pad"], eos_id=special["eos"], what="psannlm's tokenizer.json"
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise NotCarried(f"its description is damaged ({type(error).__name__}: {error})") from error
    except ValueError as error:
        raise NotCarried(str(error)) from error
    if backend == "tokenizers":
        raise NotCarried(
            "it renumbers the ids of the `tokenizers` library (hf_passthrough_ids=False), which that library cannot express"
        )
    raise NotCarried(f"its backend {backend!r} is unknown here")


def _characters(vocabulary: list[str]) -> bytes:
    """A tokenizer.json with one id for each character from 4 on; [UNK] for every other character."""
    if not all(isinstance(c, str) and len(c) == 1 for c in vocabulary) or len(set(vocabulary)) != len(vocabulary):
        raise NotCarried("its vocabulary is not a list of distinct characters")
    specials = [
        {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i, name in enumerate(SPECIALS)
    ]
    # Byte-pair encoding with no pairs: every character stands alone.
    model = {
        "type": "BPE", "dropout": None, "unk_token": SPECIALS[3], "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {token: i for i, token in enumerate((*SPECIALS, *vocabulary))}, "merges": [],
    }  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": specials, "normalizer": None, "pre_tokenizer": None,
        "post_processor": None, "decoder": {"type": "Fuse"}, "model": model,
    }  # fmt: skip
    return json.dumps(tokenizer).encode("utf-8")
