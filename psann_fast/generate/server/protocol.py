"""Request bodies: what they may hold, and what they mean. A field that would be ignored is refused, naming it."""

from __future__ import annotations

import difflib
import json
import secrets
from dataclasses import dataclass
from typing import Any, Mapping

from ..sampling import SamplingParams

MOST_LOGPROBS = 20
MOST_STOPS = 16


class BadRequest(Exception):
    """A request that cannot be served as it is.

    param  the field that is wrong, or None
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    body_bytes    size of its body
    prompts       texts in `prompt`
    choices       n times the number of prompts
    max_tokens    tokens to write
    """

    body_bytes: int = 1 << 20
    prompts: int = 64
    choices: int = 128
    max_tokens: int = 1 << 15


@dataclass(frozen=True)
class Asked:
    """A request body, understood.

    prompts   texts, or ids
    params    with a seed
    logprobs  likeliest tokens to report beside each, or None
    """

    model: str | None
    prompts: list[str | list[int]]
    messages: list[dict[str, str]] | None
    params: SamplingParams
    n: int
    stream: bool
    includes_usage: bool
    echo: bool
    logprobs: int | None


_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")
_COMMON = {*_SAMPLING, "model", "n", "stream", "stream_options", "user", "logprobs", "max_tokens"}
_COMPLETION = _COMMON | {"prompt", "echo"}
_CHAT = _COMMON | {"messages", "max_completion_tokens", "top_logprobs"}
# Fields of OpenAI's that change the text and that we do not have, with the values at which they do nothing.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
}


def parse(body: bytes, is_chat: bool, limits: Limits) -> Asked:
    """The meaning of a body. Raises BadRequest for one that is not JSON, unknown fields and values out of range."""
    try:
        fields = json.loads(body, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadRequest(f"the body is a JSON {type(fields).__name__}; it must be an object")
    _refuse_unknown(fields, _CHAT if is_chat else _COMPLETION)
    get = lambda name, default=None: default if fields.get(name) is None else fields[name]  # noqa: E731 (null is the default)

    n = _whole(fields, "n", 1, 1, limits.choices)
    prompts = [] if is_chat else _prompts(get("prompt"), limits)
    if n * len(prompts) > limits.choices:
        raise BadRequest(f"n is {n} for {len(prompts)} prompts; at most {limits.choices} texts are written for one request", "n")
    stream = _flag(fields, "stream")
    options = get("stream_options", {})
    if (
        not isinstance(options, dict)
        or set(options) - {"include_usage"}
        or not isinstance(options.get("include_usage", False), bool)
    ):
        raise BadRequest(
            f"stream_options is {_short(options)}; it must be an object with include_usage, true or false", "stream_options"
        )
    if options and not stream:
        raise BadRequest("stream_options is given without stream; leave it out, or set stream to true", "stream_options")
    user = get("user", "")
    if not isinstance(user, str):
        raise BadRequest(f"user is {_short(user)}; it must be a string", "user")
    model = get("model")
    if model is not None and not isinstance(model, str):
        raise BadRequest(f"model is {_short(model)}; it must be a string", "model")
    return Asked(
        model=model,
        prompts=prompts,
        messages=_messages(get("messages")) if is_chat else None,
        params=_params(fields, _max_tokens(fields, is_chat, limits)),
        n=n,
        stream=stream,
        includes_usage=bool(options.get("include_usage", False)),
        echo=_flag(fields, "echo"),
        logprobs=_chat_logprobs(fields) if is_chat else _logprobs(fields),
    )


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. JSON leaves open which of two equal names counts, so a proxy may have checked the other one."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{_short(next(name for name in made if names.count(name) > 1))} stands twice in one object")
    return made


def _refuse_unknown(fields: Mapping[str, Any], known: set[str]) -> None:
    for name, value in fields.items():
        if name in known or value is None:
            continue
        if name in _WITHOUT_EFFECT:
            if value not in _WITHOUT_EFFECT[name] or isinstance(value, bool):
                raise BadRequest(f"{name} is {_short(value)}, and this server does not have {name}; leave it out", name)
            continue
        near = difflib.get_close_matches(name[:100], sorted(known), n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known))}"
        raise BadRequest(f"the request has no field {_short(name)}; {hint}", name[:100])


def _prompts(prompt: Any, limits: Limits) -> list[str | list[int]]:
    """OpenAI's four forms: a text, several, ids, several lists of ids."""
    if isinstance(prompt, str) or _are_ids(prompt):
        return [prompt]
    if not isinstance(prompt, list) or not prompt or not (all(isinstance(p, str) for p in prompt) or all(map(_are_ids, prompt))):
        raise BadRequest(f"prompt is {_short(prompt)}; it must be a string, strings, token ids, or lists of token ids", "prompt")
    if len(prompt) > limits.prompts:
        raise BadRequest(f"prompt has {len(prompt)} texts; at most {limits.prompts} are served in one request", "prompt")
    return prompt


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise BadRequest(f"messages is {_short(messages)}; it must be a list of objects with role and content", "messages")
    for index, message in enumerate(messages):
        is_plain = isinstance(message, dict) and set(message) == {"role", "content"}
        if not is_plain or not all(isinstance(value, str) for value in message.values()):
            raise BadRequest(
                f"messages[{index}] is {_short(message)}; it must be an object of role and content, both strings", "messages"
            )
    return messages


def _params(fields: Mapping[str, Any], max_tokens: int) -> SamplingParams:
    given = {name: fields[name] for name in _SAMPLING if fields.get(name) is not None}
    stop = given.get("stop")
    if isinstance(stop, list) and len(stop) > MOST_STOPS:
        raise BadRequest(f"stop has {len(stop)} strings; at most {MOST_STOPS} are served", "stop")
    defaults = {"seed": secrets.randbelow(1 << 62), "top_p": None}
    try:
        return SamplingParams(max_new_tokens=max_tokens, **{**defaults, **given})
    except ValueError as error:
        raise BadRequest(str(error)[:500], str(error).split(" ", 1)[0]) from error


def _max_tokens(fields: Mapping[str, Any], is_chat: bool, limits: Limits) -> int:
    names = [name for name in ("max_completion_tokens", "max_tokens") if fields.get(name) is not None]
    if len(names) > 1:
        raise BadRequest("max_completion_tokens and max_tokens are the same; give one of them", "max_tokens")
    return _whole(fields, names[0] if names else "max_tokens", 256 if is_chat else 16, 1, limits.max_tokens)


def _logprobs(fields: Mapping[str, Any]) -> int | None:
    return None if fields.get("logprobs") is None else _whole(fields, "logprobs", 0, 0, MOST_LOGPROBS)


def _chat_logprobs(fields: Mapping[str, Any]) -> int | None:
    wants = _flag(fields, "logprobs")
    top = _whole(fields, "top_logprobs", 0, 0, MOST_LOGPROBS)
    if top and not wants:
        raise BadRequest("top_logprobs is given without logprobs; set logprobs to true", "top_logprobs")
    return top if wants else None


def _whole(fields: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = default if fields.get(name) is None else fields[name]
    if type(value) is not int or not least <= value <= most:
        raise BadRequest(f"{name} is {_short(value)}; it must be a whole number from {least} to {most}", name)
    return value


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = False if fields.get(name) is None else fields[name]
    if not isinstance(value, bool):
        raise BadRequest(f"{name} is {_short(value)}; it must be true or false", name)
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
