"""Random texts that are hard on tokenizers: every kind of white space, control and private-use character, and special names."""

from __future__ import annotations

import random

SPECIAL_NAMES = (
    "[EOS]", "[PAD]", "[BOS]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>", "<pad>", "<unk>", "<eos>", "<bos>", "<mask>",
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<0x00>", "<0x41>", "<0xFF>", "<extra_id_0>", "\u2581", "\u2581</s>",
)  # fmt: skip
AWKWARD = (
    " ", "  ", "\n", "\n\n", "\r\n", "\r", "\t", "\0", "\x1b", "\x85", "\xa0", "\u2028", "\u3000", "\u200b", "\u200d", "\ufeff",
    "\u2581", "\u2585", "\u2047", "\ufffd", "\ufffe", "\uffff", "\U0010ffff", "\ue000", "\U000f0000", "e\u0301", "\u0301", "\ufb01",
    "\U0001f469\u200d\U0001f680", "\U0001f1e9\U0001f1ea", "\u0130", "\u1e9e",
    "\u4e2d\u6587", "\u0627\u0644", "\ud55c", "\u1112\u1161",
)  # fmt: skip
WORDS = ("the", "The", "statement", "don't", "x1", "3.14", "__init__", "na\u00efve", "A", "a", "--", "...", "if", "==", '"""')


def random_text(draw: random.Random, longest: int = 20) -> str:
    """Up to `longest` units: words, awkward characters, special names, characters from anywhere, and runs of one of them."""
    units = []
    for _ in range(draw.randrange(longest + 1)):
        kind = draw.random()
        if kind < 0.3:
            unit = draw.choice(WORDS)
        elif kind < 0.6:
            unit = draw.choice(AWKWARD)
        elif kind < 0.7:
            unit = draw.choice(SPECIAL_NAMES)
        elif kind < 0.85:
            unit = chr(draw.randrange(0x20, 0x7F))
        else:
            unit = random_character(draw)
        units.append(unit * draw.choice((1, 1, 1, 2, 3, 9)))
    return "".join(units)


def random_character(draw: random.Random) -> str:
    """Any character that valid Unicode may hold, assigned or not, small code points as often as large ones."""
    code = draw.randrange(1 << draw.randint(1, 16)) if draw.random() < 0.7 else draw.randrange(0x110000)
    return chr(code) if not 0xD800 <= code < 0xE000 else "\ufffd"


def adversarial_text(draw: random.Random) -> str:
    """Special names, whole, doubled, nested and cut, between words."""
    parts = []
    for _ in range(draw.randrange(1, 8)):
        name = draw.choice(SPECIAL_NAMES)
        place = draw.randrange(len(name) + 1)
        parts += draw.choice(([name], [name, name], [name[:place], draw.choice(SPECIAL_NAMES), name[place:]], [name[place:]]))
        parts.append(draw.choice(("", "", " ", "\n", draw.choice(WORDS))))
    return "".join(parts)
