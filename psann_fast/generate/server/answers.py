"""What goes back to a client: OpenAI's objects, made of what the engine says."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field
from typing import Any, Callable

from ..async_engine import Piece
from ..engine import Request, TokenLogprob

Json = dict[str, Any]
# "eos" and "stop" are one to OpenAI's clients.
FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "cancelled", None: None}


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> Json:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass
class Choice:
    """One text of an answer as it grows.

    echo  the prompt's text, where it goes before the output
    """

    request: Request
    index: int
    token_bytes: Callable[[list[int]], bytes]
    eos_id: int
    echo: str | None = None
    text: str = ""
    reported: int = 0  # drawn tokens whose log probabilities were given
    finish_reason: str | None = None
    _offset: int = field(default=0)  # characters of the tokens reported so far
    _utf8: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def take(self, piece: Piece) -> None:
        self.text += piece.text
        self.finish_reason = FINISH_REASONS[piece.finish_reason]

    def completion(self, piece: Piece | None) -> Json:
        """The choice's object: of one piece in a stream, or of all of it (None)."""
        is_first = piece is None or not self.text
        text = self.text if piece is None else piece.text
        head = self.echo if self.echo is not None and is_first else ""
        given = self.request.given_logprobs if head else []
        drawn = self._new_logprobs(None if piece is None else piece.drawn)
        if piece is not None:
            self.take(piece)
        logprobs = None
        if self.request.logprobs is not None:
            first = [self.request.tokens[0]] if head else []
            logprobs = self._legacy_logprobs(first, [*given, *drawn])
        return {"index": self.index, "text": head + text, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def chat_logprobs(self, drawn: int | None) -> Json | None:
        if self.request.logprobs is None:
            return None
        return {"content": [self._chat_token(report) for report in self._new_logprobs(drawn)]}

    def _new_logprobs(self, drawn: int | None) -> list[TokenLogprob]:
        """Reports that were not given yet, of the first `drawn` tokens; the end of the document is no token of the text."""
        if self.request.logprobs is None:
            return []
        reports = self.request.drawn_logprobs[self.reported : drawn]
        self.reported += len(reports)
        return [report for report in reports if report.token != self.eos_id]

    def _legacy_logprobs(self, unpredicted: list[int], reports: list[TokenLogprob]) -> Json:
        tokens = unpredicted + [report.token for report in reports]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._utf8.decode(self.token_bytes([token])))
        missing = [None] * len(unpredicted)
        return {
            "tokens": [self._name(token) for token in tokens],
            "token_logprobs": missing + [report.logprob for report in reports],
            "top_logprobs": missing + [{self._name(t): value for t, value in report.top} for report in reports],
            "text_offset": offsets,
        }

    def _chat_token(self, report: TokenLogprob) -> Json:
        entry = lambda token, logprob: {  # noqa: E731 (two uses)
            "token": self._name(token), "logprob": logprob, "bytes": list(self.token_bytes([token])),
        }  # fmt: skip
        return {**entry(report.token, report.logprob), "top_logprobs": [entry(*pair) for pair in report.top]}

    def _name(self, token: int) -> str:
        """The token's text; as OpenAI writes them, bytes that are no whole characters."""
        content = self.token_bytes([token])
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def usage(choices: list[Choice], prompts: int) -> Json:
    """Tokens of the prompts, each counted once, and of the texts."""
    per_prompt = len(choices) // prompts
    prompt = sum(choice.request.prompt_length for choice in choices[::per_prompt])
    written = sum(len(choice.request.tokens) - choice.request.prompt_length for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
