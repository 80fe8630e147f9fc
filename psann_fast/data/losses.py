"""What a tokenizer made elsewhere does not give back, in words and with an example each."""

from __future__ import annotations

from typing import Callable

PROBES = (
    ("collapses runs of spaces", "two  spaces"),
    ("drops spaces at the start", " start"),
    ("drops spaces at the end", "end "),
    ("changes line breaks", "one\ntwo\n\nthree"),
    ("changes carriage returns", "one\r\ntwo"),
    ("changes tabs", "\tone\ttwo"),
    ("changes capitals", "Capital LETTERS"),
    ("changes spaces around punctuation", "I can't , do . it !"),
    ("normalizes accents", "caf\u00e9 cafe\u0301"),
    ("normalizes compatibility characters", "\ufb01\u00bd\uff21\u2460"),
    ("changes letters that it does not know", "\u0416\u05d0\u4e2d\u1f00"),
    ("changes emoji", "\U0001f600\U0001f469\u200d\U0001f680"),
    ("changes control and private-use characters", "a\0b\x07c\ue000d\ufeff"),
    ("changes U+2581", "a\u2581b"),
    ("changes words in angle or square brackets", "<s> </s> <unk> <pad> [EOS] [UNK] <|endoftext|> <0x41>"),
)


def describe_losses(round_trip: Callable[[str], str]) -> list[str]:
    """One phrase for each kind of text that `round_trip` changes, with the example that shows it."""
    return [f"it {loss} ({text!r} becomes {back!r})" for loss, text in PROBES if (back := round_trip(text)) != text]
