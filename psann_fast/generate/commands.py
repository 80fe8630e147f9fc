"""The commands that write text: psann-fast generate | chat | serve."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable

from .. import config as configuration
from ..estimator import psannLM
from .chat_template import TRANSCRIPT, TRANSCRIPT_STOP, ChatTemplate
from .options import EngineOptions
from .sampling import SamplingParams

API_KEY_VARIABLE = "PSANN_FAST_API_KEY"


def add_to(commands: Any, add_model: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add the commands to argparse's subparsers; add_model adds the arguments that name a model."""
    generate = commands.add_parser("generate", help="continue a prompt with a trained model")
    generate.set_defaults(run=_generate)
    add_model(generate)
    generate.add_argument("--prompt", default="", help="text to continue; '-' reads standard input (default: begin a document)")
    _add_fields(generate, SamplingParams, EngineOptions)

    chat = commands.add_parser("chat", help="talk to a model in the terminal", description="A model answers well only if it was "
                               "trained on conversations of the template's form. An empty line or Ctrl-D ends.")  # fmt: skip
    chat.set_defaults(run=_chat)
    add_model(chat)
    chat.add_argument("--system", metavar="TEXT", help="a first message of the role system")
    chat.add_argument(
        "--template", metavar="FILE", help="Jinja chat template (default: a transcript, 'User: ...', 'Assistant: ...')"
    )
    _add_fields(chat, SamplingParams, EngineOptions)

    serve = commands.add_parser("serve", help="serve a model over HTTP, in OpenAI's protocol", description="Routes: "
                                "/v1/completions, /v1/chat/completions (with --template), /v1/models, /health, "
                                "/metrics, a page at /.")  # fmt: skip
    serve.set_defaults(run=_serve)
    add_model(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    serve.add_argument("--name", help="the model's name to clients (default: its folder's)")
    serve.add_argument(
        "--api-key-file",
        metavar="FILE",
        help=f"clients must send this key (default: ${API_KEY_VARIABLE}; without one, all are served)",
    )
    serve.add_argument("--template", metavar="FILE", help="Jinja chat template; without one chats are refused")
    serve.add_argument(
        "--cache-tokens", type=int, metavar="N", help="tokens that the cache holds at most (default: from free memory)"
    )
    serve.add_argument("--max-rows", type=int, default=64, metavar="N", help="texts written at once (default: 64)")
    serve.add_argument(
        "--max-waiting", type=int, default=256, metavar="N", help="texts that may wait besides; then 429 (default: 256)"
    )
    serve.add_argument(
        "--max-tokens", type=int, default=1 << 15, metavar="N", help="tokens that one text may ask for (default: 32768)"
    )
    serve.add_argument("--max-body-bytes", type=int, default=1 << 20, metavar="N", help="size of a request (default: 1 MB)")
    serve.add_argument(
        "--drain-seconds", type=float, default=30.0, metavar="S", help="for running texts after SIGTERM (default: 30)"
    )
    _add_fields(serve, EngineOptions)


def _add_fields(parser: argparse.ArgumentParser, *kinds: type) -> None:
    for kind in kinds:
        for f in dataclasses.fields(kind):
            many = {"nargs": "+"} if f.name == "stop" else {}
            flag = "--" + f.name.replace("_", "-")
            parser.add_argument(flag, default=argparse.SUPPRESS, metavar="VALUE", help=f"default: {f.default}", **many)


def _given(options: argparse.Namespace, *kinds: type) -> dict[str, Any]:
    """The fields of these classes that stood on the command line."""
    given = {f.name: getattr(options, f.name) for kind in kinds for f in dataclasses.fields(kind) if hasattr(options, f.name)}
    return {name: value if name in ("stop", "weights") else configuration.coerced_scalar(value) for name, value in given.items()}


def _generate(options: argparse.Namespace) -> int:
    model = psannLM.load(options.model, backend=options.backend, device=options.device)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    print(prompt, end="", flush=True)
    statistics = _write(model, prompt, _given(options, SamplingParams, EngineOptions))[1]
    print(f"\n\n[{statistics}]", file=sys.stderr)
    return 0


def _write(model: psannLM, prompt: str, options: dict[str, Any]) -> tuple[str, str]:
    """Print what follows the prompt as it comes; returns it, and a line about how long it took."""
    began, first = time.perf_counter(), None
    requests, engine_options = model._requests("generate", [prompt], options, options.pop("seed", None))
    for _, piece in model._run(requests, engine_options):
        first = first or time.perf_counter()
        print(piece, end="", flush=True)
    seconds = time.perf_counter() - began
    (request,) = requests
    tokens = len(request.tokens) - request.prompt_length
    return request.text.text, (
        f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s; the first {first - began:.2f} s after a prompt of "
        f"{request.prompt_length}; ended by {request.finish_reason}"
    )


def _chat(options: argparse.Namespace) -> int:
    model = psannLM.load(options.model, backend=options.backend, device=options.device)
    template = ChatTemplate(TRANSCRIPT) if options.template is None else ChatTemplate.from_file(options.template)
    given = _given(options, SamplingParams, EngineOptions)
    if options.template is None and "stop" not in given:
        given["stop"] = [TRANSCRIPT_STOP]
    messages = [] if options.system is None else [{"role": "system", "content": options.system}]
    while True:
        try:
            said = input("> ")
        except EOFError:
            break
        if not said:
            break
        messages.append({"role": "user", "content": said})
        answer, statistics = _write(model, template(messages), dict(given))
        messages.append({"role": "assistant", "content": answer.strip()})
        print(f"\n[{statistics}]", file=sys.stderr)
    return 0


def _serve(options: argparse.Namespace) -> int:
    try:
        from .server.protocol import Limits
        from .server.run import serve
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"serving needs {error.name}, which is not installed; pip install 'psann-fast[serve]'") from error
    key = os.environ.get(API_KEY_VARIABLE)
    if options.api_key_file is not None:
        key = Path(options.api_key_file).read_text(encoding="utf-8").strip()
        if not key:
            raise ValueError(f"--api-key-file {options.api_key_file} is empty; write the key into it")
    for name in ("max_rows", "max_waiting", "max_tokens", "max_body_bytes"):
        if getattr(options, name) < (0 if name == "max_waiting" else 1):
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least {0 if name == 'max_waiting' else 1}"
            )
    model = psannLM.load(options.model, backend=options.backend, device=options.device)
    serve(
        model, options.name or Path(options.model).resolve().name, host=options.host, port=options.port, api_key=key or None,
        template=None if options.template is None else ChatTemplate.from_file(options.template), cache_tokens=options.cache_tokens,
        max_rows=options.max_rows, max_waiting=options.max_waiting,
        limits=Limits(body_bytes=options.max_body_bytes, max_tokens=options.max_tokens), drain_seconds=options.drain_seconds,
        options=EngineOptions(**_given(options, EngineOptions)),
    )  # fmt: skip
    return 0
