"""Each example runs, at a small size, and does what it says."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import matplotlib.image
import pytest
from psann_fast import psannLM

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run("name.py", flags...) -> what it prints; it runs in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *flags: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def figures(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_siren_image(run, backend, tmp_path):
    printed = run("siren_image.py", "--side", 32, "--width", 32, "--steps", 60, "--backend", backend)
    quality = figures(r"PSNR ([\d.]+) dB", printed)
    assert len(quality) == 5 and quality[-1] > quality[0] + 3 and quality[-1] > 15
    assert matplotlib.image.imread(tmp_path / "siren.png").shape == (32, 64, 4)


def test_nanogpt_mlp(run, tmp_path):
    (tmp_path / "input.txt").write_text("the river runs past the mill; " * 100, encoding="utf-8")
    size = ("--layers", 1, "--heads", 2, "--width", 32, "--window", 16, "--batch", 8, "--data", "input.txt")
    losses = figures(r"held out ([\d.]+)", run("nanogpt_mlp.py", *size, "--steps", 100, "--lr", 1e-2))
    assert losses[-1] < 0.5 * losses[0] or losses[-1] < 0.3
    assert "parameters" in run("nanogpt_mlp.py", *size, "--steps", 2, "--mlp", "gelu")


def test_llama_paged(run):
    pytest.importorskip("transformers", reason="transformers is not installed")
    printed = run("llama_paged.py", "--hidden-size", 32, "--steps", 10, "--new-tokens", 12, "--prompts", "The value of", "If", "x")
    assert printed.count(" -> ") == 3 and "but generate wrote" not in printed


def test_finetune_psannlm(run, tmp_path):
    printed = run("finetune_psannlm.py", "--characters", 8000, "--steps", 20, "--lr", 3e-3)
    before, after = figures(r"([\d.]+) (?:bits per byte before|after)", printed)
    assert after < before and "opens every text with its id 1" in printed
    assert psannLM.load(tmp_path / "finetuned", device="cpu").generate("The", max_new_tokens=3, seed=0) is not None


def test_every_example_is_run():
    tested = Path(__file__).read_text(encoding="utf-8")
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(re.findall(r'run\("(\w+\.py)"', tested)) - {"name.py"}
