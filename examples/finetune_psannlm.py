"""Takes a psannlm model over, trains it on, and saves it here:
`python examples/finetune_psannlm.py --model final_model.pt --data my.txt`.

Nothing in the file is executed. Without --model the installed psannlm trains a small one first, on the other half of the text.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

from psann_fast import psannLM, psannLMDataPrep
from psann_fast.data import default_corpus


def small_psannlm_model(texts: list[str], folder: Path) -> Path:
    """A file as psannlm 2.0.1 writes it."""
    import psannlm
    from psannlm.architectures import LMConfig

    data = psannlm.PSANNLMDataPrep(texts, tokenizer="simple", max_length=64)
    model = psannlm.PSANNLM(config=LMConfig(architecture="wave", d_model=64, n_layers=2, n_heads=4, d_mlp=256), device="cpu")
    training = dict(epochs=1, batch_tokens=1024, warmup_steps=1, lr=3e-3, amp="fp32", dataloader_num_workers=0)
    model.fit(data, train={**training, "checkpoint_dir": str(folder / "run")})
    model.save(str(folder / "model.pt"))
    return folder / "model.pt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a .pt file of psannlm 2.0.1 or 0.12 that holds its tokenizer")
    parser.add_argument("--data", type=Path, help="a text file (default: the prose that comes with Python)")
    parser.add_argument("--characters", type=int, default=200_000, help="how much of the text is used")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("finetuned"))
    options = parser.parse_args()

    text = "\n".join(default_corpus()) if options.data is None else options.data.read_text(encoding="utf-8")
    text = text[: options.characters]
    first, second, held_out = (text[int(a * len(text)) : int(b * len(text))] for a, b in ((0, 0.45), (0.45, 0.9), (0.9, 1)))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        source = options.model or small_psannlm_model([first], Path(folder))
        notes.clear()
        model = psannLM.from_psannlm(source)
    for note in notes:
        print(f"note: {note.message}")

    before = model.score([held_out])["bits_per_byte"]
    # Its tokenizer comes along; a window is at most as long as the text.
    data = psannLMDataPrep([second], tokenizer=model.tokenizer, max_length=64)
    model.fit(data, max_steps=options.steps, epochs=1000, batch_tokens=1024, lr=options.lr, progress=False)
    after = model.score([held_out])["bits_per_byte"]
    print(f"held-out text: {before:.3f} bits per byte before, {after:.3f} after {options.steps} steps")
    print("The " + model.generate("The ", max_new_tokens=60, temperature=0.8, seed=0))
    model.save(options.out)
    print(f"saved in {options.out}: psann-fast generate {options.out} --prompt 'The '")


if __name__ == "__main__":
    main()
