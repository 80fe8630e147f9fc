"""README's snippets run as they stand, and its commands are the ones that CI calls."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet(number, tmp_path, monkeypatch, capsys):
    (tmp_path / "snippet.py").write_text(SNIPPETS[number], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path("snippet.py")
    assert capsys.readouterr().out.strip()


def test_ci_calls_the_test_command_of_the_readme():
    steps = [step.strip() for step in COMMANDS[1].split("&&")]
    called = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert len(SNIPPETS) >= 2 and steps[-1].endswith("pytest")
    assert all(step in called for step in steps)
