"""The snippets of kernels/README.md run as they stand, and name everything that the package exports for others' models."""

import re
import runpy
from pathlib import Path

import psann_kernels
import pytest
from torch import nn

README = (Path(__file__).parents[2] / "kernels" / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet(number, tmp_path, monkeypatch, capsys):
    if "from kernels import" in SNIPPETS[number]:
        pytest.importorskip("kernels", reason="kernels is not installed")
    (tmp_path / "snippet.py").write_text(SNIPPETS[number], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path("snippet.py")
    assert capsys.readouterr().out.strip()


def test_every_module_has_a_snippet():
    modules = [
        name
        for name in psann_kernels.__all__
        if isinstance(getattr(psann_kernels, name), type) and issubclass(getattr(psann_kernels, name), nn.Module)
    ]
    assert len(modules) >= 5
    assert not [name for name in modules if not any(re.search(rf"\b{name}\(", snippet) for snippet in SNIPPETS)]
