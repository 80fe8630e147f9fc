"""What the quickstart's model writes: the share of its words that the corpus knows, and whether it repeats itself.

    psann-fast train --out runs/quickstart
    python -m bench.quickstart runs/quickstart

Words are runs of three or more letters. A repeat is a sequence of 20 tokens that occurs twice in one text.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter

from psann_fast import psannLM
from psann_fast.data import default_corpus

from .conditions import conditions

WORD = re.compile(r"[^\W\d_]{3,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="run folder of `psann-fast train`")
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=200, help="tokens of each text")
    options = parser.parse_args()
    model = psannLM.load(options.model)
    known = set(WORD.findall(" ".join(default_corpus())))
    texts = model.generate_batch(
        ["The "] * options.texts, max_new_tokens=options.tokens, temperature=0.8, seed=range(options.texts)
    )
    words = [word for text in texts for word in WORD.findall(text)]
    repeating = 0
    for text in texts:
        ids = model.tokenizer.encode(text)
        repeating += any(count > 1 for count in Counter(tuple(ids[i : i + 20]) for i in range(len(ids) - 19)).values())
    print(f"{conditions()}\n\nThe {texts[0]}\n")
    print(
        f"{len(words)} words of three letters or more, {sum(word in known for word in words) / len(words):.1%} of them "
        "in the corpus"
    )
    print(f"{repeating} of {len(texts)} texts repeat 20 tokens")


if __name__ == "__main__":
    main()
