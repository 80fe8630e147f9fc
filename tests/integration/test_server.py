"""The server as its clients see it: OpenAI's protocol, limits, cancellation, an orderly end."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "lm"))

from engine_traffic import TOKENIZER, alone  # noqa: E402
from psann_fast.generate.chat_template import TRANSCRIPT, ChatTemplate  # noqa: E402
from psann_fast.generate.sampling import SamplingParams, seed_of_sample  # noqa: E402
from psann_fast.generate.server.protocol import Limits  # noqa: E402
from serving import running, small_module, small_server  # noqa: E402


@pytest.fixture(scope="module")
def served():
    server = small_server(template=ChatTemplate(TRANSCRIPT), limits=Limits(max_tokens=1500, choices=16, prompts=8))
    with running(server) as address:
        yield server, address


def call(address: str, path: str = "/v1/completions", body=None, headers=None, method=None):
    """(status, body, headers)"""
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def complete(address: str, **body):
    status, content, _ = call(address, body={"model": "small", **body})
    assert status == 200, content
    return json.loads(content)


def events(content: bytes) -> list[dict]:
    parts = content.decode().split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""] and all(part.startswith("data: ") for part in parts[:-1])
    return [json.loads(part[6:]) for part in parts[:-2]]


def text_alone(prompt: str, seed: int = 0, **options) -> str:
    params = SamplingParams(**{"max_new_tokens": 16, "top_p": None, "seed": seed, **options})
    return alone(small_module(), TOKENIZER.encode(prompt), params).text.text


def wait_until_free(server) -> None:
    deadline = time.monotonic() + 10
    while server.serving.outstanding or server.serving.engine.scheduler.pool.in_use:
        assert time.monotonic() < deadline, "blocks did not come back"
        time.sleep(0.01)


# -- completions ----------------------------------------------------------------------------------------------------------------


def test_a_completion_is_what_the_model_writes(served):
    _, address = served
    answer = complete(address, prompt="hello", max_tokens=20, temperature=0)
    assert answer["object"] == "text_completion" and answer["model"] == "small" and answer["id"].startswith("cmpl-")
    (choice,) = answer["choices"]
    assert choice == {
        "index": 0,
        "text": text_alone("hello", temperature=0, max_new_tokens=20),
        "logprobs": None,
        "finish_reason": "length",
    }
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 20, "total_tokens": 25}


def test_a_stream_is_the_same_text_in_pieces(served):
    _, address = served
    asked = dict(prompt="hello", max_tokens=20, seed=7, model="small")
    status, content, headers = call(address, body={**asked, "stream": True, "stream_options": {"include_usage": True}})
    chunks = events(content)
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream")
    assert len(chunks) > 10 and len({chunk["id"] for chunk in chunks}) == 1
    assert (
        "".join(c["text"] for chunk in chunks for c in chunk["choices"])
        == complete(address, **asked)["choices"][0]["text"]
        == text_alone("hello", 7, max_new_tokens=20)
    )
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 20 and chunks[0]["usage"] is None
    assert [c["finish_reason"] for chunk in chunks[:-1] for c in chunk["choices"]][-1] == "length"


def test_several_prompts_and_samples(served):
    _, address = served
    choices = complete(address, prompt=["abc", "hello"], n=3, seed=5)["choices"]
    expected = [text_alone(prompt, seed_of_sample(5, i)) for prompt in ("abc", "hello") for i in range(3)]
    assert [c["text"] for c in choices] == expected and [c["index"] for c in choices] == list(range(6))
    assert complete(address, prompt=TOKENIZER.encode("abc"), seed=5)["choices"][0]["text"] == expected[0]
    streamed = ["", "", ""]
    for chunk in events(call(address, body=dict(prompt="abc", n=3, seed=5, stream=True))[1]):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == expected[:3]


def test_stop_and_echo(served):
    _, address = served
    whole = text_alone("hello", temperature=0, max_new_tokens=30)
    stop = whole[5:7]
    (choice,) = complete(address, prompt="hello", max_tokens=30, temperature=0, stop=[stop, "#"], echo=True)["choices"]
    assert choice["text"] == "hello" + whole[: whole.find(stop)] and choice["finish_reason"] == "stop"


def test_logprobs_of_output_and_prompt(served):
    _, address = served
    (choice,) = complete(address, prompt="hello", max_tokens=4, temperature=0, logprobs=2, echo=True)["choices"]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"] and found["text_offset"] == list(range(9))
    assert found["token_logprobs"][0] is None and all(value < 0 for value in found["token_logprobs"][1:])
    assert found["top_logprobs"][0] is None and all(len(top) == 2 for top in found["top_logprobs"][1:])
    # At temperature 0 the drawn token is the likeliest.
    assert all(max(top.values()) == value for top, value in zip(found["top_logprobs"][5:], found["token_logprobs"][5:]))
    streamed = events(call(address, body=dict(prompt="hello", max_tokens=4, temperature=0, logprobs=2, echo=True, stream=True))[1])
    pieces = [chunk["choices"][0] for chunk in streamed]
    assert "".join(piece["text"] for piece in pieces) == choice["text"]
    for name in found:
        assert sum((piece["logprobs"][name] for piece in pieces), []) == found[name]


def test_chat_goes_through_the_template(served):
    _, address = served
    body = dict(model="small", messages=[{"role": "user", "content": "hi"}], max_tokens=12, temperature=0)
    status, content, _ = call(address, "/v1/chat/completions", body)
    answer = json.loads(content)
    expected = text_alone("User: hi\nAssistant:", temperature=0, max_new_tokens=12)
    assert status == 200 and answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected}
    chunks = events(call(address, "/v1/chat/completions", {**body, "stream": True, "logprobs": True, "top_logprobs": 1})[1])
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected
    tokens = [t for chunk in chunks[1:] for t in chunk["choices"][0]["logprobs"]["content"]]
    assert bytes(b for t in tokens for b in t["bytes"]).decode() == expected and all(len(t["top_logprobs"]) == 1 for t in tokens)


def test_without_a_template_there_is_no_chat():
    with running(small_server()) as address:
        status, content, _ = call(address, "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
        assert status == 404 and "start the server with --template" in json.loads(content)["error"]["message"]


# -- what is refused ------------------------------------------------------------------------------------------------------------

REFUSED = [
    (dict(prompt="x", max_tokens=0), "max_tokens", "max_tokens is 0; it must be a whole number from 1 to 1500"),
    (dict(prompt="x", max_tokens=1501), "max_tokens", "from 1 to 1500"),
    (dict(prompt="x", max_tokens="5"), "max_tokens", "max_tokens is '5'"),
    (dict(prompt="x", temperature=-1), "temperature", "temperature is -1; it must be a number at least 0"),
    (dict(prompt="x", top_p=0), "top_p", "top_p is 0"),
    (dict(prompt="x", top_k=1.5), "top_k", "top_k is 1.5"),
    (dict(prompt="x", seed=-1), "seed", "seed is -1"),
    (dict(prompt="x", stop=[""]), "stop", "stop is "),
    (dict(prompt="x", stop=["a"] * 17), "stop", "at most 16"),
    (dict(prompt="x", n=17), "n", "n is 17; it must be a whole number from 1 to 16"),
    (dict(prompt=["x"] * 8, n=3), "n", "at most 16 texts"),
    (dict(prompt=["x"] * 9), "prompt", "at most 8"),
    (dict(prompt="x", logprobs=21), "logprobs", "logprobs is 21"),
    (dict(prompt="x", stream="yes"), "stream", "true or false"),
    (dict(prompt="x", stream_options={"include_usage": True}), "stream_options", "without stream"),
    (dict(prompt="x", stream=True, stream_options={"usage": True}), "stream_options", "include_usage"),
    (dict(prompt="x", echo=1), "echo", "echo is 1"),
    (dict(prompt="x", presence_penalty=0.5), "presence_penalty", "does not have presence_penalty; leave it out"),
    (dict(prompt="x", logit_bias={"5": 1}), "logit_bias", "does not have logit_bias"),
    (dict(prompt="x", best_of=2), "best_of", "does not have best_of"),
    (dict(prompt="x", suffix="y"), "suffix", "does not have suffix"),
    (dict(prompt="x", max_token=5), "max_token", "did you mean 'max_tokens'?"),
    (dict(prompt="x", temprature=5), "temprature", "did you mean 'temperature'?"),
    (dict(), "prompt", "prompt is None; it must be a string"),
    (dict(prompt=[]), "prompt", "prompt is []"),
    (dict(prompt=[1, "a"]), "prompt", "prompt is [1, 'a']"),
    (dict(prompt=[1, True]), "prompt", "prompt is [1, True]"),
    (dict(prompt=[5, 100000]), "prompt", "an id outside the tokenizer's 0 to 257"),
    (dict(prompt="\ud800"), "prompt", "lone surrogate"),
    (dict(prompt="x" * 1000, max_tokens=1500), "prompt", "the cache holds 2048; pass max_new_tokens of at most 1049"),
    (dict(prompt="x", user=5), "user", "user is 5"),
    (dict(prompt="x", model=5), "model", "model is 5"),
    (b"[1]", None, "the body is a JSON list; it must be an object"),
    (b"{", None, "the body is not JSON"),
    (b"[" * 100_000, None, "the body is not JSON"),
    (b"\xff\xfe", None, "the body is not JSON"),
    (b'{"max_tokens": ' + b"9" * 5000 + b"}", None, "the body is not JSON"),
    (b'{"prompt": "x", "temperature": NaN}', "temperature", "temperature is nan"),
]


@pytest.mark.parametrize("body, param, message", REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_a_wrong_request_is_refused_by_name(served, body, param, message):
    status, content, _ = call(served[1], body=body)
    error = json.loads(content)["error"]
    assert status == 400 and message in error["message"] and error["param"] == param and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "messages",
    [None, [], "hi", [{}], [{"role": "user"}], [{"role": "user", "content": 5}], [{"role": "user", "content": "a", "name": "b"}]],
)
def test_wrong_messages_are_refused(served, messages):
    status, content, _ = call(served[1], "/v1/chat/completions", {"messages": messages})
    assert status == 400 and json.loads(content)["error"]["param"] == "messages"


def test_fields_that_change_nothing_at_their_defaults_are_taken(served):
    neutral = dict(presence_penalty=0, frequency_penalty=0.0, logit_bias={}, suffix=None, best_of=1, user="me", stop=None)
    assert complete(served[1], prompt="hello", temperature=0, **neutral)["choices"][0]["text"] == text_alone("hello", temperature=0)


def test_other_paths_methods_and_models(served):
    _, address = served
    assert call(address, "/v2/completions")[0] == 404
    assert call(address, "/v1/completions")[0] == 405
    status, content, _ = call(address, body=dict(prompt="x", model="gpt"))
    assert status == 404 and json.loads(content)["error"]["code"] == "model_not_found"
    assert [m["id"] for m in json.loads(call(address, "/v1/models")[1])["data"]] == ["small"]
    assert json.loads(call(address, "/v1/models/small")[1])["id"] == "small" and call(address, "/v1/models/large")[0] == 404


def test_a_large_body_is_refused_early(served):
    _, address = served
    body = json.dumps({"prompt": "x" * (1 << 20)}).encode()
    assert call(address, body=body)[0] == 413
    host = address.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=10)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    try:
        for _ in range(40):  # says nothing of its length
            connection.send(b"10000\r\n" + b" " * 65536 + b"\r\n")
    except (BrokenPipeError, ConnectionResetError):
        pass  # refused before all was sent
    assert connection.getresponse().status == 413


def test_a_full_queue_is_429_with_a_time_to_come_back():
    server = small_server(max_rows=1, max_waiting=1)
    with running(server) as address, ThreadPoolExecutor(8) as pool:
        long = dict(prompt="x", max_tokens=1000)
        answers = list(pool.map(lambda _: call(address, body=long), range(8)))
    refused = [(content, headers) for status, content, headers in answers if status == 429]
    assert {status for status, _, _ in answers} == {200, 429} and refused
    assert all(
        headers["Retry-After"] == "1" and json.loads(content)["error"]["code"] == "queue_full" for content, headers in refused
    )


def test_the_key_is_asked_for_everywhere_but_at_health():
    key = "secret key \u00e9"
    with running(small_server(api_key=key, template=ChatTemplate(TRANSCRIPT))) as address:
        basic = base64.b64encode(f"anyone:{key}".encode()).decode()
        for path in ("/", "/metrics", "/v1/models", "/v1/models/small", "/v1/completions", "/v1/chat/completions", "/nowhere"):
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "Basic !!!"},
                {"Authorization": "Basic " + basic[:-8]},
            ):
                status, content, answered = call(address, path, headers=headers)
                assert (
                    status == 401 and json.loads(content)["error"]["code"] == "invalid_api_key" and "WWW-Authenticate" in answered
                ), path
        assert call(address, "/health")[0] == 200
        assert call(address, "/v1/models", headers={"Authorization": "Basic " + basic})[0] == 200
        sent = {"Authorization": f"Bearer {key}".encode().decode("latin-1")}
        assert call(address, "/v1/models", headers=sent)[0] == 200


# -- cancellation, load, end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_gives_the_blocks_back(served, stream):
    server, address = served
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
    steps = server.serving.engine.counts["steps"]
    connection.request("POST", "/v1/completions", json.dumps(dict(prompt="x", max_tokens=1500, stream=stream)))
    if stream:
        connection.getresponse().read(100)
    while not server.serving.engine.scheduler.pool.in_use:
        time.sleep(0.001)
    connection.sock.close() if connection.sock else connection.close()
    connection.close()
    wait_until_free(server)
    assert server.serving.engine.counts["steps"] - steps < 1400, "it was written to its end"


def test_many_clients_at_once_get_their_own_texts(served):
    server, address = served
    prompts = [f"{'common beginning ' * (i % 3)}{i}" for i in range(200)]
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(lambda i: complete(address, prompt=prompts[i], seed=i, max_tokens=4), range(200)))
    texts = [answer["choices"][0]["text"] for answer in answers]
    differing = [i for i in range(0, 200, 20) if texts[i] != text_alone(prompts[i], i, max_new_tokens=4)]
    assert len(differing) <= 1, differing  # float32: a near tie may fall the other way
    wait_until_free(server)


def test_metrics_count(served):
    server, address = served
    complete(address, prompt="hello", max_tokens=3)
    lines = call(address, "/metrics")[1].decode().splitlines()
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}
    assert values['psann_http_responses_total{path="/v1/completions",status="200"}'] >= 1
    assert (
        values["psann_drawn_tokens_total"] >= 3 and values["psann_cache_blocks_used"] == 0 and values["psann_requests_waiting"] == 0
    )
    assert values['psann_first_token_seconds_bucket{le="+Inf"}'] == values["psann_first_token_seconds_count"] >= 1
    named = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert {name.split("{")[0].removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in values} <= named


def test_the_page_is_self_contained_and_shows_text_as_text(served):
    status, content, headers = call(served[1], "/")
    page = content.decode()
    assert status == 200 and 'const model = "small";' in page and "http://" not in page and "https://" not in page
    assert "default-src 'none'" in headers["Content-Security-Policy"] and "innerHTML" not in page and "textContent" in page


def test_a_failing_step_fails_everyone_and_health_says_so(monkeypatch):
    server = small_server()

    def fail(*_):
        raise RuntimeError("the device is gone")

    with running(server) as address:
        monkeypatch.setattr(server.serving.engine.decoder, "hidden", fail)
        monkeypatch.setattr(threading, "excepthook", lambda args: None)
        assert call(address, body=dict(prompt="x"))[0] == 503
        assert call(address, body=dict(prompt="x", stream=True))[0] == 503
        status, content, _ = call(address, "/health")
        assert status == 503 and "the device is gone" in content.decode()


def test_the_openai_client(served):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=served[1] + "/v1", api_key="none", max_retries=0)
    answer = client.completions.create(model="small", prompt="hello", max_tokens=20, temperature=0, logprobs=1, n=2)
    assert [c.text for c in answer.choices] == [
        text_alone("hello", temperature=0, max_new_tokens=20)
    ] * 2 and answer.usage.completion_tokens == 40
    assert len(answer.choices[0].logprobs.tokens) == 20
    stop = answer.choices[0].text[6]
    assert (
        client.completions.create(model="small", prompt="hello", max_tokens=20, temperature=0, stop=stop).choices[0].finish_reason
        == "stop"
    )
    stream = client.completions.create(model="small", prompt="hello", max_tokens=20, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text
    chat = client.chat.completions.create(model="small", messages=[{"role": "user", "content": "hi"}], max_tokens=5, seed=1)
    assert chat.choices[0].message.role == "assistant" and chat.choices[0].message.content
    parts = client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": "hi"}], max_tokens=5, seed=1, stream=True
    )
    assert "".join(part.choices[0].delta.content or "" for part in parts) == chat.choices[0].message.content
    assert [m.id for m in client.models.list()] == ["small"]
    with pytest.raises(openai.BadRequestError, match="temperature is -1"):
        client.completions.create(model="small", prompt="x", temperature=-1)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")


def test_sigterm_lets_running_texts_end(tmp_path):
    from psann_fast import psannLM

    module = small_module()
    model = psannLM(config=module.config)
    model.module.load_state_dict(module.state_dict())
    model.tokenizer = TOKENIZER
    model.save(tmp_path / "small")
    key = tmp_path / "key"
    key.write_text("k\n")
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "psann_fast.cli",
        "serve",
        str(tmp_path / "small"),
        "--port",
        str(port),
        "--api-key-file",
        str(key),
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, process)
        connection = http.client.HTTPConnection(f"127.0.0.1:{port}", timeout=30)
        body = json.dumps(dict(prompt="x", max_tokens=300, stream=True, stream_options={"include_usage": True}))
        connection.request("POST", "/v1/completions", body, {"Authorization": "Bearer k"})
        response = connection.getresponse()
        first = response.read(20)
        process.send_signal(signal.SIGTERM)
        chunks = events(first + response.read())
        assert chunks[-1]["usage"]["completion_tokens"] >= 1 and chunks[-2]["choices"][0]["finish_reason"] in ("length", "stop")
        connection.close()
        assert process.wait(20) in (0, -signal.SIGTERM, 143)
    finally:
        process.kill()
        process.communicate()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(address: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "it does not answer"
        try:
            with urllib.request.urlopen(address + "/health", timeout=1):
                return
        except OSError:
            time.sleep(0.05)
