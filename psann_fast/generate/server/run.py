"""Starts the server: uvicorn around one model."""

from __future__ import annotations

import logging
import math

import uvicorn

from ...estimator import psannLM
from ..chat_template import ChatTemplate
from ..engine import Engine, tokens_that_fit
from ..options import EngineOptions
from .app import Server
from .protocol import Limits

_LOG = logging.getLogger("psann_fast")


def serve(
    model: psannLM,
    name: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    template: ChatTemplate | None = None,
    cache_tokens: int | None = None,
    max_rows: int = 64,
    max_waiting: int = 256,
    limits: Limits = Limits(),
    drain_seconds: float = 30.0,
    options: EngineOptions = EngineOptions(),
) -> None:
    """Serve `model` until SIGTERM or SIGINT; then running requests get `drain_seconds` to end.

    cache_tokens  default: what half of the free memory holds, at most 2^20

    Raises ValueError for a model without a tokenizer or a cache that does not fit.
    """
    if model.tokenizer is None:
        raise ValueError("serve: the model has no tokenizer; train it with one, or set model.tokenizer")
    fits = tokens_that_fit(model.module)
    if cache_tokens is None:
        cache_tokens = min(fits // 2, 1 << 20)
    if not 16 <= cache_tokens <= fits:
        raise ValueError(f"cache_tokens is {cache_tokens}; it must be from 16 to {fits}, which is what free memory holds")
    engine = Engine(
        model.module,
        model.tokenizer.eos_id,
        model.tokenizer.vocab_size,
        cache_tokens=cache_tokens,
        max_rows=max_rows,
        options=options,
    )
    server = Server(
        engine, model.tokenizer, name, limits=limits, max_waiting=max_waiting, api_key=api_key, template=template,
        drain_seconds=drain_seconds,
    )  # fmt: skip
    if api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
        _LOG.warning("serving %s without an API key: whoever reaches port %d can use the model; pass --api-key-file", host, port)
    _LOG.info("serving %s on http://%s:%d (a cache of %s tokens); try it in a browser at /", name, host, port, f"{cache_tokens:,}")
    uvicorn.run(
        server.app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=math.ceil(drain_seconds),
        server_header=False,
    )  # fmt: skip
