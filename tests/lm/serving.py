"""A server in a thread of this process, around a small model."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Any, Iterator

import torch
import uvicorn
from engine_traffic import TOKENIZER
from psann_fast.generate.engine import Engine
from psann_fast.generate.server.app import Server
from tiny import tiny


def small_module(**options: Any) -> torch.nn.Module:
    module = tiny(base="waveresnet", n_kv_heads=1, vocab_size=TOKENIZER.vocab_size, **options)
    with torch.no_grad():  # writes lower-case letters, and hardly ends
        weight = module.lm_head.weight
        weight.mul_(4)
        weight[: ord("a") + 2] *= 0.1
        weight[ord("z") + 3 :] *= 0.1
    return module


def small_server(cache_tokens: int = 2048, max_rows: int = 8, **options: Any) -> Server:
    engine = Engine(small_module(), TOKENIZER.eos_id, TOKENIZER.vocab_size, cache_tokens=cache_tokens, max_rows=max_rows)
    return Server(engine, TOKENIZER, "small", drain_seconds=5.0, **options)


@contextlib.contextmanager
def running(server: Server) -> Iterator[str]:
    """The address of the server while it runs."""
    # asyncio turns Nagle's delay off only where the socket names its protocol.
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(512)
        config = uvicorn.Config(server.app, log_level="critical", access_log=False, timeout_graceful_shutdown=5)
        http = uvicorn.Server(config)
        thread = threading.Thread(target=http.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not http.started:
            time.sleep(0.005)
            assert thread.is_alive(), "the server did not start"
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            http.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server did not stop"
