"""The chat page as the server has it, from the first look to an answer, in Chromium where that is there."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

pytest.importorskip("qrun.server", reason="needs the server's extra")

from asgi_client import call
from server_fakes import make_model

from qrun.server import Server, app
from tests.browser import ENTER, ESCAPE, IS_THERE, Browser
from tests.page_stub import STATIC

browsing = pytest.mark.skipif(not IS_THERE, reason="needs chromium and chromedriver")


def test_the_page_and_its_files_need_no_key() -> None:
    served = app(make_model(), api_keys=("secret",))
    page = call(served, "GET", "/", headers={"accept": "text/html,*/*;q=0.8"})
    assert page.status == 200 and page.headers["content-type"].startswith("text/html")
    assert page.body == (STATIC / "index.html").read_bytes()
    assert page.headers["content-security-policy"].startswith("default-src 'self';")
    for file in STATIC.iterdir():
        answer = call(served, "GET", f"/static/{file.name}")
        assert answer.status == 200 and answer.body == file.read_bytes()
        kind = {".js": "javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}[file.suffix]
        assert kind in answer.headers["content-type"]
        for name in ("content-security-policy", "x-content-type-options", "cache-control"):
            assert answer.headers[name] == page.headers[name]
    assert call(served, "GET", "/static/../app.py").status == 404
    assert call(served, "GET", "/v1/models").status == 401


@browsing
def test_a_talk_with_a_model_that_thinks(tmp_path: Path) -> None:
    model = make_model("<think>\nhm\n</think>\n\nIt is **so**.")
    with Server({"thinker": model}, api_keys=("secret",)) as server, Browser(tmp_path) as browser:
        browser.open(server.url)
        browser.wait_for("#notice", "The server wants an API key.")
        browser.click("#notice button")
        browser.type("#key", "secret")
        browser.press(ENTER)
        browser.wait_for("#model", "thinker")
        browser.type("#box", "Why?")
        browser.press(ENTER)
        browser.wait_for(".stats", "first token after")
        assert browser.run("return document.querySelector('.assistant article > .body').innerHTML") == (
            "<p>It is <strong>so</strong>.</p>"
        )
        browser.click(".thoughts summary")
        assert browser.text(".thoughts .body") == "hm"
        assert "of 400 tokens" in browser.text("#context")
        browser.type("#box", "And so?")
        browser.press(ENTER)
        browser.wait(lambda: browser.count(".stats") == 2, "the second answer")
        assert "from cache" in browser.text(".stats")
        browser.click("#new")
        browser.type("#box", "long " * 100)
        browser.press(ENTER)
        browser.wait_for(".error", "maximum context length is 400 tokens")
        bad = [one for one in browser.messages() if "Uncaught" in one or "Content Security Policy" in one]
        assert not bad


@browsing
def test_stopping_ends_the_generation(tmp_path: Path) -> None:
    model = make_model("on and " * 20_000, context=100_000)
    with Server(model) as server, Browser(tmp_path) as browser:
        browser.open(server.url)
        browser.wait_for("#model", "fake")
        browser.type("#box", "Go on")
        browser.press(ENTER)
        browser.wait_for(".assistant .body", "on and")
        assert server.application.state.turns.running == 1
        browser.press(ESCAPE)
        browser.wait_for(".stats", "stopped")
        end = time.monotonic() + 60
        while server.application.state.turns.running:
            assert time.monotonic() < end
            time.sleep(0.02)
