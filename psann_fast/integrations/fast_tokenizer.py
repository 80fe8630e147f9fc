"""Our tokenizers as tokenizers of the `tokenizers` library, which transformers reads: the same ids for every text, the same text
for ids. Where ids spell no UTF-8, one of SentencePiece writes U+FFFD for each byte of the run of bytes,
and ours for what is broken alone."""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from ..data import Tokenizer
from ..data.losses import PROBES
from ..data.sentencepiece_tokenizer import SPACE
from ..data.simple_tokenizer import FIRST_BYTE, FIRST_CHARACTER

# Names that no text is likely to hold; transformers is told not to look for them in texts anyway.
PAD, EOS = "<|psann_pad|>", "<|psann_eos|>"


class NotExpressible(ValueError):
    """A tokenizer of ours has no counterpart in the `tokenizers` library; the message says why."""


def fast_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer in the `tokenizers` library, special ids named PAD and EOS.

    Raises NotExpressible, also where a probe text gets other ids or does not come back alike. A real U+2581 in a text, which
    SentencePiece cannot tell from a space, is the one thing that goes unprobed: it becomes a space.
    """
    builder = {"simple": _simple, "sentencepiece": _sentencepiece, "tokenizers": _byte_pairs}[tokenizer.name]
    fast = builder(tokenizer)
    fast.encode_special_tokens = True
    for text in (
        *(text for _, text in PROBES if SPACE not in text),
        "The river runs past the mill; 3.14, naïve Ünïcödé 中文 🙂.\n\n  x  ",
        "\0",
        "a" * 300,
    ):
        ids = tokenizer.encode(text)
        found = fast.encode(text, add_special_tokens=False).ids
        if found != ids or fast.decode(ids, skip_special_tokens=False) != tokenizer.decode(ids):
            raise NotExpressible(f"it gives {text[:40]!r} the ids {ids[:12]}, and its counterpart {found[:12]}")
    return fast


def _simple(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    # Each character is a word: whole where it has an id, else its bytes, which is what no merges leave. Over bytes rather than with
    # byte_fallback, whose decoder turns all bytes around a broken one, and here that is all ASCII, to U+FFFD.
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelt = {character: words.pre_tokenize_str(character)[0][0] for character in tokenizer.characters}
    vocabulary = {PAD: tokenizer.pad_id, EOS: tokenizer.eos_id}
    vocabulary |= {character: FIRST_BYTE + byte for byte, character in _byte_alphabet().items()}
    vocabulary |= {spelt[character]: FIRST_CHARACTER + i for i, character in enumerate(tokenizer.characters)}
    fast = _named(tokenizers.Tokenizer(models.BPE(vocabulary, [], ignore_merges=True)))
    fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated"), words])
    fast.decoder = decoders.ByteLevel()
    return fast


def _byte_alphabet() -> dict[int, str]:
    """The character that the library writes for each byte: printable ones of Latin-1 for themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def _sentencepiece(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    processor = tokenizer.processor
    size = processor.get_piece_size()
    pieces = processor.id_to_piece(list(range(size)))
    if len(set(pieces)) != size or not all(map(processor.is_byte, processor.piece_to_id([f"<0x{b:02X}>" for b in range(256)]))):
        raise NotExpressible("its SentencePiece model has no bytes to fall back to")
    if not tokenizer.can_cut:
        raise NotExpressible("its SentencePiece model changes white space")
    names = {tokenizer.pad_id: PAD, tokenizer.eos_id: EOS}
    vocabulary = {names.get(i, piece): i for i, piece in enumerate(pieces)}
    vocabulary |= {name: i for i, name in names.items()}
    # SentencePiece joins the pair whose result has the highest score; the library, the pair that comes first.
    ranked = sorted(
        (i for i in range(size) if processor.is_unused(i) or _is_word(processor, i)), key=lambda i: -processor.get_score(i)
    )
    merges = [
        (piece[:cut], piece[cut:])
        for piece in (pieces[i] for i in ranked)
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    fast = _named(tokenizers.Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True)))
    fast.normalizer = normalizers.Replace(" ", SPACE)
    fast.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(f"{SPACE}*[^{SPACE}]+|{SPACE}+"), "isolated")
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Replace(SPACE, " "), decoders.Fuse()])
    return fast


def _is_word(processor: Any, i: int) -> bool:
    return not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))


def _named(fast: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (PAD, EOS)])
    return fast


def _byte_pairs(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    settings = json.loads(tokenizer.library.to_str())
    held = {token["id"]: token["content"] for token in settings["added_tokens"]}
    for i, name in ((tokenizer.pad_id, PAD), (tokenizer.eos_id, EOS)):
        if i not in held:
            if i < len(settings["model"]["vocab"]):
                raise NotExpressible(f"its special id {i} is a word of its vocabulary")
            settings["added_tokens"].append(
                dict(id=i, content=name, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
            )
    return tokenizers.Tokenizer.from_str(json.dumps(settings))
