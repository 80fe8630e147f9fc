"""The routes: /v1/completions, /v1/chat/completions (with a template), /v1/models, /health, /metrics and a page to try it at /."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from pathlib import Path
from typing import Any, AsyncIterator, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from ...data import Tokenizer
from ..async_engine import AsyncEngine, EngineClosed, QueueFull, Stream
from ..chat_template import ChatTemplate
from ..engine import Engine, Request
from ..sampling import seed_of_sample
from ..text import TextStream
from .answers import Choice, Json, error_body, usage
from .guard import Guard
from .metrics import Metrics
from .protocol import Asked, BadRequest, Limits, parse

PAGE = Path(__file__).with_name("page.html")
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'"
)
GONE = 499  # nobody reads it; the metrics count it
BODY_SECONDS = 30.0  # within which a body must have come
RETRY_AFTER = "1"  # seconds; a place in the queue comes free with every text that ends


class Server:
    """One model behind HTTP; `app` is the ASGI application.

    engine         serves it, and nobody else
    tokenizer      the model's
    name           of the model in /v1/models and in answers
    limits         of one request
    max_waiting    requests that may wait beside the running ones; beyond, 429
    api_key        asked for on every route but /health; None: nobody is asked
    template       makes prompts of chats; None: chats are refused
    drain_seconds  given to running requests when the server stops
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        name: str,
        *,
        limits: Limits = Limits(),
        max_waiting: int = 256,
        api_key: str | None = None,
        template: ChatTemplate | None = None,
        drain_seconds: float = 30.0,
    ) -> None:
        self.tokenizer, self.name, self.limits, self.template = tokenizer, name, limits, template
        self.serving = AsyncEngine(engine, max_waiting)
        self.metrics = Metrics(self.serving)
        self._drain_seconds = drain_seconds
        self._created = int(time.time())
        routes = [
            Route("/", self._page),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        inner = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=_HANDLERS)
        self.app = Guard(inner, api_key, self.metrics.responded, known_paths={route.path for route in routes})

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        async with self.serving:
            yield
            await self.serving.close(self._drain_seconds)

    # -- small routes -------------------------------------------------------------------------------------------------------

    async def _page(self, request: HttpRequest) -> Response:
        page = PAGE.read_text(encoding="utf-8").replace("{{model}}", json.dumps(self.name).replace("<", "\\u003c"))
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    async def _health(self, request: HttpRequest) -> Response:
        if self.serving.failure is not None:
            return JSONResponse({"status": "failed", "reason": str(self.serving.failure)}, 503)
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: HttpRequest) -> Response:
        return PlainTextResponse(self.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    def _model_object(self) -> Json:
        return {"id": self.name, "object": "model", "created": self._created, "owned_by": "psann-fast"}

    async def _models(self, request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_object()]})

    async def _model(self, request: HttpRequest) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model_object())

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise BadRequest(f"there is no model {name[:80]!r}; this server has {self.name!r}", "model", 404, "model_not_found")

    # -- texts --------------------------------------------------------------------------------------------------------------

    async def _completions(self, request: HttpRequest) -> Response:
        asked = parse(await _body(request, self.limits.body_bytes), False, self.limits)
        return await self._answer(request, asked, asked.prompts, Completions(self.name))

    async def _chat(self, request: HttpRequest) -> Response:
        if self.template is None:
            raise BadRequest(
                "this server has no chat template, and the model may not know conversations; POST to /v1/completions, or start the "
                "server with --template FILE", status=404, code="no_chat_template",
            )  # fmt: skip
        asked = parse(await _body(request, self.limits.body_bytes), True, self.limits)
        try:
            prompt = self.template(asked.messages)
        except ValueError as error:
            raise BadRequest(str(error), "messages") from error
        return await self._answer(request, asked, [prompt], ChatCompletions(self.name))

    async def _answer(self, http: HttpRequest, asked: Asked, prompts: list[str | list[int]], form: Completions) -> Response:
        began = time.perf_counter()
        self._check_model(asked.model)
        try:
            choices = await asyncio.to_thread(self._choices, asked, prompts)
            stream = self.serving.submit([choice.request for choice in choices])
        except ValueError as error:
            raise BadRequest(str(error), "prompt") from error
        except QueueFull as error:
            return JSONResponse(error_body(str(error), "rate_limit_error", code="queue_full"), 429, {"Retry-After": RETRY_AFTER})
        except EngineClosed as error:
            return JSONResponse(error_body(str(error), "server_error"), 503, {"Retry-After": RETRY_AFTER})
        if asked.stream:
            chunks = self._chunks(stream, asked, choices, len(prompts), form, began)
            return EventStream(stream, chunks)
        return await self._whole(http, stream, choices, len(prompts), form, began)

    def _choices(self, asked: Asked, prompts: list[str | list[int]]) -> list[Choice]:
        """A choice for each sample of each prompt. Raises ValueError for a text that is not valid Unicode, or does not fit."""
        tokenizer, choices = self.tokenizer, []
        for prompt in prompts:
            tokens = tokenizer.encode(prompt) or [tokenizer.eos_id] if isinstance(prompt, str) else prompt
            if min(tokens) < 0 or max(tokens) >= tokenizer.vocab_size:
                raise ValueError(f"prompt holds an id outside the tokenizer's 0 to {tokenizer.vocab_size - 1}")
            echo = (prompt if isinstance(prompt, str) else tokenizer.decode(prompt)) if asked.echo else None
            for sample in range(asked.n):
                params = asked.params.with_seed(seed_of_sample(asked.params.seed, sample))
                request = Request(
                    len(choices), list(tokens), params, TextStream(tokenizer.decode_bytes, params.stop_strings),
                    logprobs=asked.logprobs, prompt_logprobs=asked.echo and asked.logprobs is not None,
                )  # fmt: skip
                if sample == 0:  # before a prompt that cannot fit is copied n times
                    self.serving.engine.check(request)
                choices.append(Choice(request, len(choices), tokenizer.decode_bytes, tokenizer.eos_id, echo))
        return choices

    async def _whole(
        self, http: HttpRequest, stream: Stream, choices: list[Choice], prompts: int, form: Completions, began: float
    ) -> Response:
        collecting = asyncio.ensure_future(self._collect(stream, choices, began))
        leaving = asyncio.ensure_future(_until_disconnect(http))
        try:
            await asyncio.wait([collecting, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=GONE)
            collecting.result()
        except EngineClosed as error:
            return JSONResponse(error_body(str(error), "server_error"), 503)
        finally:
            leaving.cancel()
            collecting.cancel()
            stream.cancel()
        return JSONResponse(
            {**form.head(False), "choices": [form.whole(choice) for choice in choices], "usage": usage(choices, prompts)}
        )

    async def _collect(self, stream: Stream, choices: list[Choice], began: float) -> None:
        is_first = True
        async for piece in stream:
            if is_first:
                self.metrics.first_token.add(time.perf_counter() - began)
                is_first = False
            choices[piece.request.index].take(piece)
        self.metrics.whole.add(time.perf_counter() - began)

    async def _chunks(
        self, stream: Stream, asked: Asked, choices: list[Choice], prompts: int, form: Completions, began: float
    ) -> AsyncIterator[bytes]:
        """Server-sent events, a piece each."""
        head = form.head(True)
        tail = {"usage": None} if asked.includes_usage else {}
        is_first = True
        try:
            for choice in choices:
                for opening in form.openings(choice):
                    yield _event({**head, "choices": [opening], **tail})
            async with contextlib.aclosing(aiter(stream)) as pieces:
                async for piece in pieces:
                    if is_first:
                        self.metrics.first_token.add(time.perf_counter() - began)
                        is_first = False
                    yield _event({**head, "choices": [form.piece(choices[piece.request.index], piece)], **tail})
            if asked.includes_usage:
                yield _event({**head, "choices": [], "usage": usage(choices, prompts)})
            yield b"data: [DONE]\n\n"
            self.metrics.whole.add(time.perf_counter() - began)
        except EngineClosed as error:  # too late for a status
            yield _event(error_body(str(error), "server_error"))


class EventStream(StreamingResponse):
    """Server-sent events that are made of a Stream, which ends with them."""

    def __init__(self, stream: Stream, chunks: AsyncIterator[bytes]) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._stream = stream

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.cancel()  # where the client left before the first chunk, nothing of `chunks` has run


class Completions:
    """The form of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str) -> None:
        self._id, self._created, self._model = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time()), model

    def head(self, is_chunk: bool) -> Json:
        kind = self.chunk_kind if is_chunk else self.kind
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def whole(self, choice: Choice) -> Json:
        return choice.completion(None)

    def openings(self, choice: Choice) -> list[Json]:
        return []

    def piece(self, choice: Choice, piece: Any) -> Json:
        return choice.completion(piece)


class ChatCompletions(Completions):
    """The form of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, choice: Choice) -> Json:
        message = {"role": "assistant", "content": choice.text}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": choice.chat_logprobs(None),
            "finish_reason": choice.finish_reason,
        }

    def openings(self, choice: Choice) -> list[Json]:
        return [{"index": choice.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]

    def piece(self, choice: Choice, piece: Any) -> Json:
        choice.take(piece)
        delta = {"content": piece.text} if piece.text else {}
        return {
            "index": choice.index,
            "delta": delta,
            "logprobs": choice.chat_logprobs(piece.drawn),
            "finish_reason": choice.finish_reason,
        }


def _event(content: Json) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _body(request: HttpRequest, most: int) -> bytes:
    """The body, refused as soon as it is known to be too large, or too slow.

    A body that says that it is a little too large is read and forgotten first: answered earlier, a client that still sends would
    see a broken connection and not the reason.
    """
    too_large = BadRequest(f"the body is larger than {most} bytes, which is this server's limit", status=413)
    stated = request.headers.get("content-length", "")
    is_stated = stated.isdecimal() and int(stated) > most
    if is_stated and int(stated) > 4 * most:
        raise too_large

    async def read() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size <= most:
                parts.append(part)
            elif not is_stated:
                raise too_large
        if is_stated:
            raise too_large
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError as error:
        raise BadRequest(f"the body did not come within {BODY_SECONDS:g} seconds", status=408) from error


async def _until_disconnect(request: HttpRequest) -> None:
    receive: Callable[[], Any] = request.receive
    while (await receive())["type"] != "http.disconnect":
        pass


async def _bad_request(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, BadRequest)
    return JSONResponse(error_body(str(error), "invalid_request_error", error.param, error.code), error.status)


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = f"{request.method} {request.url.path[:80]}: {error.detail}"
    return JSONResponse(error_body(detail, "invalid_request_error"), error.status_code, error.headers)


async def _gone(request: HttpRequest, error: Exception) -> Response:
    return Response(status_code=GONE)


_HANDLERS = {BadRequest: _bad_request, HTTPException: _http_error, ClientDisconnect: _gone}
