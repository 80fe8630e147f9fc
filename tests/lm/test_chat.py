"""psann-fast generate's statistics, chat, and chat templates."""

from __future__ import annotations

import re

import pytest
from psann_fast import cli
from psann_fast.generate.chat_template import TRANSCRIPT, ChatTemplate
from scripted import scripted
from psann_fast import psannLM

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def told(monkeypatch):
    """A model that answers "123" to whatever ends in ":", and is found at any path."""
    model = scripted(monkeypatch, ":123\n")
    monkeypatch.setattr(psannLM, "load", classmethod(lambda cls, *args, **options: model))
    return model


def test_generate_says_how_long_it_took(told, capsys):
    assert cli.main(["generate", "anywhere", "--prompt", "a:"]) == 0
    out, err = capsys.readouterr()
    assert out == "a:123\n" and re.search(
        r"\[5 tokens in [\d.]+ s, \d+ tokens/s; the first [\d.]+ s after a prompt of 2; ended by eos\]", err
    )


def test_chat_keeps_the_conversation(told, capsys, monkeypatch):
    lines = iter(["hello", "again", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert cli.main(["chat", "anywhere", "--system", "Be brief.", "--temperature", "0"]) == 0
    fed = [told.tokenizer.decode(step) for step in told.module.steps if len(step) > 1]
    # The second prompt begins as the first did: cached blocks or not, the model saw all of it.
    assert fed[0] == "System: Be brief.\nUser: hello\nAssistant:"
    assert fed[1] == "System: Be brief.\nUser: hello\nAssistant: 123\nUser: again\nAssistant:"
    assert capsys.readouterr().out.count("123") == 2


def test_chat_takes_a_template(told, capsys, monkeypatch, tmp_path):
    (tmp_path / "template").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}:")
    lines = iter(["hello", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert cli.main(["chat", "anywhere", "--template", str(tmp_path / "template"), "--stop", "3"]) == 0
    assert "12" in capsys.readouterr().out and told.tokenizer.decode(told.module.steps[0]) == "<user>hello:"


def test_the_transcript():
    assert ChatTemplate(TRANSCRIPT)([{"role": "system", "content": "s"}, *HI]) == "System: s\nUser: hi\nAssistant:"


@pytest.mark.parametrize("source, message", [
    ("{% for %}", "the chat template is not valid Jinja: line 1"),
])  # fmt: skip
def test_a_template_that_is_not_valid(source, message):
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source)


@pytest.mark.parametrize("source, message", [
    ("{{ messages[0].name }}", "cannot take these messages"),
    ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
    ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "cannot take these messages"),
    ("{{ messages.append(1) }}", "cannot take these messages"),
    ("{{ cycler.__init__.__globals__.os.system('true') }}", "cannot take these messages"),
    ("{{ messages + 1 }}", "cannot take these messages"),
])  # fmt: skip
def test_messages_that_a_template_cannot_take(source, message):
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source)(HI)


@pytest.mark.parametrize("flags, message", [
    (["--api-key-file", "EMPTY"], "is empty; write the key into it"),
    (["--max-rows", "0"], "--max-rows is 0; it must be at least 1"),
    (["--cache-tokens", "4"], "cache_tokens is 4; it must be from 16 to"),
    (["--weights", "fp4"], "weights is 'fp4'; choose one of"),
])  # fmt: skip
def test_serve_refuses(told, capsys, tmp_path, flags, message):
    (tmp_path / "EMPTY").write_text("\n")
    assert cli.main(["serve", "anywhere", *(str(tmp_path / f) if f == "EMPTY" else f for f in flags)]) == 2
    assert message in capsys.readouterr().err
