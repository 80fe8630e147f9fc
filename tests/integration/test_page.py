"""The page at /, in a headless Chromium: a prompt is written on piece by piece, stopped, refused; text stays text."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "lm"))

from browser import CHROMIUM, Browser  # noqa: E402
from engine_traffic import TOKENIZER  # noqa: E402
from psann_fast.generate.engine import Engine  # noqa: E402
from psann_fast.generate.server.app import Server  # noqa: E402
from scripted import scripted  # noqa: E402
from serving import running, small_server  # noqa: E402
from test_server import complete, wait_until_free  # noqa: E402

# Starting the browser takes seconds on a busy machine, so it is no everyday test.
pytestmark = [pytest.mark.campaign(weight=0.1), pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]


@pytest.fixture
def browser(tmp_path):
    page = Browser(tmp_path / "profile")
    yield page
    page.close()


def fill(browser: Browser, **values: object) -> None:
    browser.evaluate(f"for (const [id, value] of Object.entries({json.dumps(values)})) document.getElementById(id).value = value")


def text(browser: Browser, element: str) -> str:
    return browser.evaluate(f"document.getElementById({json.dumps(element)}).textContent")


def status_is(browser: Browser, condition: str) -> None:
    browser.wait_for(f"(status => {condition})(document.getElementById('status').textContent)")


def test_a_typed_prompt_is_written_on_in_pieces_and_as_text(browser):
    with running(small_server(cache_tokens=8192)) as address:
        browser.open(address + "/")
        assert text(browser, "model") == "small"
        browser.click("prompt")
        browser.evaluate("document.getElementById('prompt').select()")
        prompt = "<b>hello</b> \u00e9\U0001f600"
        browser.type(prompt)
        fill(browser, max_tokens=30, temperature=0, top_p=1, seed=3)
        browser.click("write")
        status_is(browser, "status.startsWith('30 tokens in ') && status.endsWith('cut at the limit')")
        expected = complete(address, prompt=prompt, max_tokens=30, temperature=0, seed=3)["choices"][0]["text"]
        assert text(browser, "text") == prompt + expected
        assert browser.evaluate("document.querySelectorAll('#text b').length") == 0
        assert browser.evaluate("document.getElementById('text').childNodes.length") > 10, "it did not come in pieces"

        browser.click("continue")
        browser.wait_for(f"document.querySelector('#text .prompt').textContent === {json.dumps(prompt + expected)}")
        status_is(browser, "status.startsWith('30 tokens in ')")
        again = complete(address, prompt=prompt + expected, max_tokens=30, temperature=0, seed=3)["choices"][0]["text"]
        assert text(browser, "text") == prompt + expected + again
    assert not browser.errors


def test_markup_that_the_model_writes_is_shown_not_run(browser, monkeypatch):
    model = scripted(monkeypatch, "?<u>bold")
    engine = Engine(model.module, TOKENIZER.eos_id, TOKENIZER.vocab_size, cache_tokens=256)
    with running(Server(engine, TOKENIZER, "</script><b>&amp;")) as address:
        browser.open(address + "/")
        assert text(browser, "model") == "</script><b>&amp;"
        fill(browser, prompt="?", temperature=0)
        browser.click("write")
        status_is(browser, "status.endsWith('the text came to its end')")
        assert text(browser, "text") == "?<u>bold"
        assert browser.evaluate("document.querySelectorAll('u, b').length") == 0
    assert not browser.errors


def test_stop_ends_the_text_and_frees_its_blocks(browser):
    with running(server := small_server(cache_tokens=32768)) as address:
        browser.open(address + "/")
        for stop in (lambda: browser.click("stop"), lambda: browser.call("Input.dispatchKeyEvent", type="keyDown", key="Escape")):
            fill(browser, prompt="x", max_tokens=30000, temperature=1, top_p=1)
            browser.click("write")
            browser.wait_for("document.getElementById('text').childNodes.length > 5")
            stop()
            status_is(browser, "status === 'stopped'")
            wait_until_free(server)
            assert browser.evaluate("document.getElementById('stop').disabled && !document.getElementById('write').disabled")
    assert not browser.errors


def test_a_refusal_is_shown(browser):
    with running(small_server()) as address:
        browser.open(address + "/")
        browser.evaluate("document.getElementById('form').noValidate = true")
        fill(browser, temperature=-1)
        browser.click("write")
        status_is(browser, "status.startsWith('temperature is -1')")
        fill(browser, temperature=1, max_tokens=3000)
        browser.click("write")
        status_is(browser, "status.includes('the cache holds 2048')")
    # The refused requests are all that the console may name.
    assert len(browser.errors) == 2 and all("400" in error for error in browser.errors), browser.errors


def test_a_wrong_key_is_named_and_another_one_asked_for(browser):
    with running(server := small_server(api_key="old")) as address:
        browser.open(address.replace("//", "//me:old@") + "/")
        assert browser.evaluate("document.getElementById('key').hidden")
        server.app._key = "new"  # as a server that was started anew
        fill(browser, max_tokens=3)
        for key in ("", "wrong"):
            fill(browser, api_key=key)
            browser.click("write")
            status_is(browser, "status.startsWith('the API key is missing or wrong')")
            assert not browser.evaluate("document.getElementById('key').hidden")
        fill(browser, api_key="new")
        browser.click("write")
        status_is(browser, "status.startsWith('3 tokens in ')")
    assert len(browser.errors) == 2 and all("401" in error for error in browser.errors), browser.errors


def test_a_server_that_goes_away_is_named(browser):
    with running(small_server(cache_tokens=32768)) as address:
        browser.open(address + "/")
    fill(browser, max_tokens=3)
    browser.click("write")
    browser.wait_for("document.getElementById('status').classList.contains('is-error')")
    assert text(browser, "status")


@pytest.mark.parametrize("width", [320, 1200])
def test_nothing_is_cut_on_narrow_or_wide_screens(browser, width):
    with running(small_server()) as address:
        browser.open(address + "/")
        fill(browser, prompt="a" * 500, max_tokens=5)
        for scheme in ("light", "dark"):
            assert browser.picture(width, 800, scheme).startswith(b"\x89PNG")
        browser.click("write")
        status_is(browser, "status !== ''")
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
