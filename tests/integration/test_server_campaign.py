"""Random requests to the server: whatever comes, nobody gets a 5xx, and nothing is left behind."""

from __future__ import annotations

import http.client
import json
import logging
import random
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Callable

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "lm"))

from psann_fast.generate.chat_template import TRANSCRIPT, ChatTemplate  # noqa: E402
from psann_fast.generate.server.protocol import Limits  # noqa: E402
from serving import running, small_server  # noqa: E402
from test_server import wait_until_free  # noqa: E402

FIELDS = (
    "model prompt messages max_tokens max_completion_tokens temperature top_p top_k min_p repetition_penalty n stream "
    "stream_options logprobs top_logprobs echo stop seed user suffix best_of logit_bias presence_penalty frequency_penalty tools "
    "response_format nonsense"
).split()
VALUES = [
    None, True, False, 0, 1, 2, 3, 5, -1, 0.0, 0.5, 1.5, 1e308, -0.0, 1 << 62, 1 << 63, 10**30, "", "small", "x", "hello world",
    "\x00", "\u00e9\U0001f600", "\ud800", "x" * 3000, [], {}, [""], ["a", "b"], [1, 2, 3], [[1], [2, 3]], [0], [257], [258], [-1], 
    [1 << 70],
    ["x"] * 100, [[]],
    {"include_usage": True},
    [{"role": "user", "content": "hi"}], [{"role": "user", "content": ["hi"]}], {"type": "text"}, {"a": {"b": [{}]}}, [None],
]  # fmt: skip
PATHS = (
    ["/v1/completions"] * 12
    + ["/v1/chat/completions"] * 4
    + ["/", "/health", "/metrics", "/v1/models", "/v1/models/x/../y", "/v1", "/\x7f%00", "/v1/completions/"]
)
# What a server may say to nonsense. 499 is never seen by a client.
ALLOWED = {200, 307, 400, 404, 405, 413, 429}


def random_body(choose: random.Random) -> bytes:
    body = {"prompt": "x", "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]}
    del body[choose.choice(("prompt", "messages"))]
    for _ in range(choose.choice((0, 0, 0, 1, 1, 2, 4))):
        body[choose.choice(FIELDS)] = choose.choice(VALUES)
    content = json.dumps(body).encode()
    if choose.random() < 0.3:
        content = bytearray(content)
        for _ in range(choose.randint(1, 4)):
            at = choose.randrange(len(content) + 1)
            content[at : at + choose.randint(0, 3)] = bytes(choose.choices(b'{}[]",:0e-.\\u\xff\x00ntfN', k=choose.randint(0, 3)))
    return choose.choice((bytes(content), bytes(content), bytes(content), b"", b"[" * choose.randint(1, 5000)))


def fuzz(address: str, seed: int, requests: int) -> Counter[int]:
    choose = random.Random(seed)
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    seen: Counter[int] = Counter()
    for _ in range(requests):
        path, method, body = choose.choice(PATHS), choose.choice(("POST",) * 20 + ("GET", "PUT", "DELETE")), random_body(choose)
        headers = choose.choice(({}, {"Content-Type": "application/json"}, {"Content-Type": "\xff"}, {"Authorization": "Basic =="}))
        connection.request(method, path.replace("\x7f", ""), body, headers)
        answer = connection.getresponse()
        content = answer.read()
        seen[answer.status] += 1
        assert answer.status in ALLOWED, (answer.status, method, path, body[:500], content[:500])
        if answer.status in (400, 413):
            assert json.loads(content)["error"]["message"], content
    connection.close()
    return seen


def fuzzed_server():
    return small_server(template=ChatTemplate(TRANSCRIPT), limits=Limits(max_tokens=20, choices=8, prompts=8))


def test_nonsense_gets_no_5xx():
    with running(server := fuzzed_server()) as address:
        seen = fuzz(address, 0, 400)
        wait_until_free(server)
    assert seen[200] > 25 and seen[400] > 100, seen


# 50,000 requests are 100 cases.
@pytest.mark.campaign(weight=1)
def test_fuzzed_requests(campaign):
    with running(server := fuzzed_server()) as address:
        for seed in campaign:
            fuzz(address, seed, 500)
            wait_until_free(server)


def visit(address: str, seed: int) -> str:
    """One client: what became of its request."""
    choose = random.Random(seed)
    host = address.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=60)
    draw = choose.random()
    body = dict(
        prompt="shared beginning " * choose.randint(0, 3) + str(seed),
        max_tokens=choose.randint(1, 12),
        seed=seed,
        stream=choose.random() < 0.5,
    )
    if draw < 0.01:
        connection.request("POST", "/v1/completions", b" " * (Limits().body_bytes + 1))
        wanted, name = 413, "oversize"
    elif draw < 0.06:
        connection.request("POST", "/v1/completions", json.dumps({**body, "temperature": "hot"}))
        wanted, name = 400, "invalid"
    else:
        cancels = draw < 0.16
        connection.request("POST", "/v1/completions", json.dumps({**body, "max_tokens": 400} if cancels else body))
        if cancels:
            if choose.random() < 0.5:
                connection.sock.settimeout(choose.random() * 0.05 + 0.001)
                try:
                    connection.getresponse().read(10)
                except TimeoutError:
                    pass  # it leaves while it waits for the first word
            connection.close()
            return "cancelled"
        wanted, name = 200, "done"
    try:
        answer = connection.getresponse()
        content = answer.read()
    except ConnectionResetError:
        # The server refused the body and hung up before all of it was sent.
        assert name == "oversize"
        return name
    connection.close()
    if answer.status == 429:
        return "turned away"
    assert answer.status == wanted, (answer.status, content[:300])
    if name == "done":
        finishes = content.count(b'"finish_reason":"')
        assert finishes == 1, f"{finishes} ends in {content[:300]}"
    return name


def visits(address: str, seed: int, clients: int) -> Counter[str]:
    with ThreadPoolExecutor(16) as pool:
        return Counter(pool.map(lambda i: visit(address, seed + i), range(clients)))


def soak(address: str, server, seed: int, clients: int, run: Callable[..., Counter[str]] = visits) -> Counter[str]:
    outcomes = run(address, seed, clients)
    assert outcomes.total() == clients
    wait_until_free(server)
    scheduler = server.serving.engine.scheduler
    assert not scheduler.running and not scheduler.waiting and len(scheduler._rows) == scheduler.max_rows
    assert not server.serving._stream_of and not server.serving.engine._request_of
    return outcomes


def test_a_small_soak():
    with running(server := small_server(cache_tokens=1024)) as address:
        outcomes = soak(address, server, 0, 300)
        assert server.serving.engine.scheduler.preemptions + server.serving.engine.scheduler.reused_tokens > 0
    assert outcomes["done"] > 200 and outcomes["cancelled"] > 10 and outcomes["invalid"] > 3, outcomes


# 200,000 requests are 200 cases.
@pytest.mark.campaign(weight=4)
def test_soak(campaign, caplog):
    # What grows is to be the server's: the clients have a process of their own, and pytest does not keep, as it would until the
    # test ends, what asyncio says of those that hang up.
    caplog.set_level(logging.ERROR, logger="asyncio")
    process = psutil.Process()
    with (
        ProcessPoolExecutor(1, get_context("spawn")) as clients,
        running(server := small_server(cache_tokens=1024)) as address,
    ):

        def thousand(seed: int) -> Counter[str]:
            return soak(address, server, seed, 1000, lambda *arguments: clients.submit(visits, *arguments).result())

        for warm in range(3):
            thousand(warm * 1000)
        before = process.memory_info().rss
        total: Counter[str] = Counter()
        for seed in campaign:
            total += thousand(seed)
        growth = process.memory_info().rss / before - 1
    print(dict(total), f"memory grew by {100 * growth:.2f} %")
    assert growth < 0.02
