"""Starts the server: uvicorn around one model."""

from __future__ import annotations

import logging
import math
import socket
import sys

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
    port          0: any that is free

    Raises ValueError for a model without a tokenizer, a cache that does not fit, a port or a time that cannot be; OSError where
    the address cannot be listened on.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port is {port}; it must be from 0 to 65535, where 0 means any that is free")
    if not 0 <= drain_seconds < math.inf:
        raise ValueError(f"drain_seconds is {drain_seconds}; it must be a number of seconds, at least 0")
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
    config = uvicorn.Config(
        server.app, log_level="warning", access_log=False, timeout_graceful_shutdown=math.ceil(drain_seconds), server_header=False
    )
    with _listen(host, port) as listener:
        address = f"http://{host}:{listener.getsockname()[1]}"
        if api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
            _LOG.warning("%s asks for no API key: whoever reaches it can use the model; pass --api-key-file", address)
        _LOG.info("serving %s on %s (a cache of %s tokens); try it in a browser at /", name, address, f"{cache_tokens:,}")
        uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket. It names its protocol, else asyncio leaves Nagle's delay on and a stream comes in bursts."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        listener = socket.socket(family, kind, protocol)
        try:
            if sys.platform != "win32":  # where it would let two servers share the port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {host}, port {port}: {error.strerror}") from error
    return listener
