"""What unkind or unlucky clients do to the server, each named after what it once broke or might."""

from __future__ import annotations

import asyncio
import http.client
import json
import resource
import socket
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "lm"))

from engine_traffic import TOKENIZER  # noqa: E402
from psann_fast.generate.engine import TokenLogprob  # noqa: E402
from psann_fast.generate.server import app as app_module  # noqa: E402
from psann_fast.generate.server.answers import Choice  # noqa: E402
from serving import running, small_server  # noqa: E402
from test_server import call, complete, events, wait_until_free  # noqa: E402


@pytest.fixture(scope="module")
def served():
    with running(server := small_server(cache_tokens=32768)) as address:
        yield server, address


def refusal(address: str, body: object) -> dict:
    status, content, _ = call(address, body=body)
    assert status == 400, (status, content[:300])
    return json.loads(content)["error"]


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_a_whole_number_beyond_all_floats_is_refused(served, field):
    error = refusal(served[1], b'{"prompt": "x", "%s": 1%s}' % (field.encode(), b"0" * 400))
    assert error["param"] == field and error["message"].startswith(f"{field} is 1000")


@pytest.mark.parametrize("field", ["presence_penalty", "seed", "n", "max_tokens", "logprobs", "stop", "user"])
def test_a_whole_number_of_4000_digits_is_refused(served, field):
    assert refusal(served[1], b'{"prompt": "x", "%s": %s}' % (field.encode(), b"9" * 4000))["param"] == field


@pytest.mark.parametrize("depth", [50, 300, 600, 900, 990, 5000])
def test_deep_nesting_is_refused(served, depth):
    for field in ("prompt", "stop", "logit_bias", "nonsense"):
        refusal(served[1], b'{"%s": %s%s}' % (field.encode(), b"[" * depth, b"]" * depth))


def test_a_field_that_is_given_twice_is_refused(served):
    assert "'temperature' stands twice" in refusal(served[1], b'{"prompt": "x", "temperature": 1, "temperature": 0}')["message"]


@pytest.mark.parametrize("name", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_what_is_no_number_in_json_is_refused(served, name):
    for field in (b"temperature", b"n", b"prompt", b"seed"):
        refusal(served[1], b'{"prompt": "x", "%s": %s}' % (field, name))


def test_extreme_but_allowed_numbers_do_not_stop_the_engine(served):
    for extreme in (
        dict(repetition_penalty=1e-308), dict(repetition_penalty=1e308), dict(temperature=1e-300), dict(temperature=1e308),
        dict(top_p=5e-324), dict(min_p=1), dict(top_k=10**300), dict(seed=(1 << 63) - 1),
    ):  # fmt: skip
        complete(served[1], prompt="hello", max_tokens=5, **extreme)
    assert call(served[1], "/health")[0] == 200


def test_a_long_prompt_that_does_not_fit_is_refused_before_it_is_copied(served):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "the cache holds 32768; shorten the prompt" in refusal(served[1], dict(prompt="x" * 1_000_000, n=128))["message"]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 150 << 10, f"{grown} KiB for one refused request"


def test_the_only_token_of_an_echoed_prompt_has_its_place_in_logprobs(served):
    (choice,) = complete(served[1], prompt="h", max_tokens=3, temperature=0, logprobs=0, echo=True)["choices"]
    found = choice["logprobs"]
    assert found["tokens"][0] == "h" and found["token_logprobs"][0] is None and found["text_offset"] == [0, 1, 2, 3]
    assert "".join(found["tokens"]) == choice["text"] and found["top_logprobs"] == [None, {}, {}, {}]


def test_offsets_count_what_stands_for_broken_characters():
    """A byte that is no character stands in the text as U+FFFD, and what follows it starts one further on."""

    class Asked:
        logprobs, given_logprobs = 0, []
        ids = TOKENIZER.encode("a") + [2 + 0xFF] + TOKENIZER.encode("\u00e9b")
        drawn_logprobs = [TokenLogprob(token, -1.0, ()) for token in ids]

    choice = Choice(Asked(), 0, TOKENIZER.decode_bytes, TOKENIZER.eos_id)
    text = TOKENIZER.decode_bytes(Asked.ids).decode("utf-8", errors="replace")
    assert text == "a\ufffd\u00e9b"
    assert choice.completion(None)["logprobs"]["text_offset"] == [0, 1, 2, 2, 3]


def test_more_texts_than_the_queue_ever_holds_are_refused_for_good():
    """A 429 would have them come back for ever."""
    with running(small_server(max_rows=2, max_waiting=1)) as address:
        assert "4 texts are asked for at once, and at most 3 run or wait here" in refusal(address, dict(prompt="x", n=4))["message"]
        assert len(complete(address, prompt="x", n=3, max_tokens=2)["choices"]) == 3


def test_an_empty_prompt_begins_a_document(served):
    (choice,) = complete(served[1], prompt="", max_tokens=3, temperature=0, logprobs=1, echo=True)["choices"]
    assert len(choice["logprobs"]["tokens"]) == 3 and choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert complete(served[1], prompt="", max_tokens=1)["usage"]["prompt_tokens"] == 1


def test_who_leaves_before_the_first_chunk_is_forgotten():
    """The answer's body is then never iterated, so its own end cannot cancel."""

    async def leave_at_once(server) -> None:
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": "", "scheme": "http",
            "headers": [], "client": None, "server": ("test", 80),
        }  # fmt: skip
        body = json.dumps(dict(prompt="x", max_tokens=30000, temperature=0, stream=True)).encode()
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict:
            if (message := next(messages, None)) is not None:
                return message
            while not server.serving.engine.counts["steps"]:
                await asyncio.sleep(0.001)
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            await asyncio.sleep(3600)  # the connection takes nothing more

        async with server.serving:
            await asyncio.wait_for(server.app(scope, receive, send), 10)
            assert server.serving.engine.counts["steps"], "it left before it had asked"
            for _ in range(500):
                if not server.serving.outstanding:
                    return
                await asyncio.sleep(0.01)
            raise AssertionError("its text is still being written")

    asyncio.run(leave_at_once(small_server(cache_tokens=32768)))


def test_who_leaves_during_the_prompt_gives_the_blocks_back(served):
    server, address = served
    drawn = server.serving.engine.counts["drawn_tokens"]
    for stream in (True, False):
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
        connection.request("POST", "/v1/completions", json.dumps(dict(prompt="x" * 20000, max_tokens=10000, stream=stream)))
        while not server.serving.engine.scheduler.pool.in_use:
            time.sleep(0.001)
        connection.close()
        wait_until_free(server)
    assert server.serving.engine.counts["drawn_tokens"] - drawn < 1000


def test_half_a_body_does_not_hold_a_connection_for_ever(monkeypatch):
    monkeypatch.setattr(app_module, "BODY_SECONDS", 0.2)
    with running(server := small_server()) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{\"prompt\": ")
            assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{\"prompt\": ")
        assert call(address, "/health")[0] == 200
        wait_until_free(server)


def test_header_names_in_any_case_and_schemes_too():
    with running(small_server(api_key="k")) as address:
        for name in ("AUTHORIZATION", "authorization", "aUtHoRiZaTiOn"):
            for scheme in ("Bearer", "BEARER", "bearer"):
                assert call(address, "/v1/models", headers={name: f"{scheme} k"})[0] == 200
        for wrong in ("k", "Bearer", "Bearer ", "Bearer K", "Bearer k k", "Token k", "Bearer\tk"):
            assert call(address, "/v1/models", headers={"Authorization": wrong})[0] == 401, wrong


@pytest.mark.parametrize("options, message", [
    (dict(port=99999), "port is 99999; it must be from 0 to 65535"),
    (dict(drain_seconds=float("nan")), "drain_seconds is nan"),
    (dict(drain_seconds=-1.0), "drain_seconds is -1.0; it must be a number of seconds, at least 0"),
    (dict(port=None), "cannot listen on 127.0.0.1, port .*: Address already in use"),
    (dict(host="no.such.host.invalid"), "cannot listen on no.such.host.invalid, port"),
])  # fmt: skip
def test_an_address_that_cannot_be_served_is_named_before_it_is_announced(options, message, caplog):
    from psann_fast import psannLM
    from psann_fast.generate.server.run import serve

    model = psannLM(d_model=16, n_layers=1, n_heads=2, vocab_size=TOKENIZER.vocab_size, device="cpu")
    model.tokenizer = TOKENIZER
    with socket.create_server(("127.0.0.1", 0)) as taken, caplog.at_level("INFO"):
        given = {"cache_tokens": 64, "port": 0, **options}
        if given["port"] is None:
            given["port"] = taken.getsockname()[1]
        with pytest.raises((ValueError, OSError), match=message):
            serve(model, "small", **given)
    assert "serving" not in caplog.text


def test_a_stop_string_across_chunks_is_never_shown(served):
    whole = complete(served[1], prompt="hello", max_tokens=40, temperature=0)["choices"][0]["text"]
    stop = whole[10:20]
    body = dict(prompt="hello", max_tokens=40, temperature=0, stop=[stop, stop + "longer"], stream=True, n=3)
    pieces = ["", "", ""]
    for chunk in events(call(served[1], body=body)[1]):
        for choice in chunk["choices"]:
            pieces[choice["index"]] += choice["text"]
            assert choice["finish_reason"] in (None, "stop")
    assert pieces == [whole[: whole.find(stop)]] * 3
