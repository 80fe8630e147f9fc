"""Messages to the text that a model continues, by a Jinja template as Hugging Face tokenizers carry them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Sequence

# For `psann-fast chat` without a template: a plain transcript. A model answers well only if it was trained on such text.
TRANSCRIPT = "{% for m in messages %}{{ m.role|capitalize }}: {{ m.content }}\n{% endfor %}Assistant:"
TRANSCRIPT_STOP = "\nUser:"


class ChatTemplate:
    """A template over `messages` (objects of role and content) and `add_generation_prompt` (True).

    Runs in Jinja's sandbox: it reaches nothing but what it is given. Raises ModuleNotFoundError without jinja2, ValueError for a
    template that is not valid.
    """

    def __init__(self, source: str) -> None:
        if importlib.util.find_spec("jinja2") is None:
            raise ModuleNotFoundError("a chat template needs the package 'jinja2', which is not installed; pip install jinja2")
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._error = jinja2.TemplateError
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error

    @classmethod
    def from_file(cls, path: str | Path) -> ChatTemplate:
        return cls(Path(path).read_text(encoding="utf-8"))

    def __call__(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt. Raises ValueError where the template refuses the messages."""
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True)
        except (self._error, TypeError) as error:
            raise ValueError(f"the chat template cannot take these messages: {error}") from error


def _refuse(message: str) -> Any:
    raise ValueError(f"the chat template refuses these messages: {message}")
