"""Cuts long texts where no token crosses, and refuses texts that are not Unicode."""

from __future__ import annotations


def check_unicode(text: str, what: str, start: int = 0) -> None:
    """Raise ValueError if `text` holds a lone surrogate, which no UTF-8 file can hold; TypeError if it is no str.

    what    names the text in the message
    start   position of text[0] within what the caller calls the text, in characters
    """
    if not isinstance(text, str):
        raise TypeError(f"{what} is a {type(text).__name__}; pass a str")
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds a lone surrogate, {text[error.start]!r}, at character {start + error.start}; that is not valid Unicode: "
            "decode its bytes as UTF-8 without errors='surrogateescape'"
        ) from None


def cut(text: str, size: int) -> tuple[list[str], str]:
    """Pieces of at most `size` characters, and a rest of at most `size`; end to end they are `text`.

    A piece ends before a space that follows a character which is not white space. No token of a tokenizer that splits words
    there can cross such a place, so encoding piece by piece changes nothing. Where `size` characters hold none, a piece
    ends after `size`. A cut depends on the text from the last cut on and on nothing after the next `size` + 1 characters.
    """
    pieces, start = [], 0
    while len(text) - start > size:
        end = _word_start(text, start + 1, start + size + 1)
        pieces.append(text[start:end])
        start = end
    return pieces, text[start:]


def _word_start(text: str, low: int, high: int) -> int:
    """The last position in low to high - 1 of a space after a character that is not white space; high - 1 if there is none."""
    place = text.rfind(" ", low, high)
    while place != -1 and text[place - 1].isspace():
        place = text.rfind(" ", low, place)
    return high - 1 if place == -1 else place
