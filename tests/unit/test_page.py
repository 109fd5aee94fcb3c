"""The chat page: what its files may be, and, where Chromium is there, what it does against a server that answers as it
is told."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import ALT, ENTER, ESCAPE, IS_THERE, SHIFT, UP, Browser
from tests.page_stub import STATIC, Frames, PageStub, Refused, delta, end, progress, words

FILES = sorted(STATIC.iterdir())
ANSWER, DONE = ".assistant .body:not(.thoughts *)", ".assistant:not(.growing) .foot .tools"


def test_is_small_and_whole() -> None:
    names = {file.name for file in FILES}
    assert {"index.html", "app.js", "style.css"} <= names
    assert sum(file.stat().st_size for file in FILES) < 100_000
    page = (STATIC / "index.html").read_text("utf-8")
    asked = re.findall(r'(?:src|href)="static/([^"]+)"', page)
    for script in STATIC.glob("*.js"):
        asked += re.findall(r'^(?:import|\}) .*from "\./([^"]+)";', script.read_text("utf-8"), re.MULTILINE)
    assert set(asked) <= names
    assert names - set(asked) == {"index.html"}, "files that nothing asks for"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_asks_nothing_of_the_network(file: Path) -> None:
    text = file.read_text("utf-8").replace('"http://www.w3.org/2000/svg"', "")  # a name, not an address
    assert not re.search(r"""(?:https?:)?//[\w-]+\.\w|@import|url\(""", text)


def test_has_nothing_inline() -> None:
    """A strict Content-Security-Policy allows neither scripts nor styles within the page."""
    page = (STATIC / "index.html").read_text("utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", page)
    assert re.findall(r"<script[^>]*>([^<]*)</script>", page) == ["", ""]
    for script in STATIC.glob("*.js"):
        text = script.read_text("utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)


def test_labels_stand_for_fields_that_are_there() -> None:
    page = (STATIC / "index.html").read_text("utf-8")
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for name in ("for", "aria-labelledby", "aria-describedby", "aria-controls"):
        assert set(re.findall(rf'{name}="([^"]+)"', page)) <= set(ids)
    for button in re.findall(r"<button.*?</button>", page, re.DOTALL):
        assert "aria-label" in button or re.sub("<[^>]*>", "", button).strip(), button


browsing = pytest.mark.skipif(not IS_THERE, reason="needs chromium and chromedriver")


@pytest.fixture(scope="module")
def stub() -> Iterator[PageStub]:
    with PageStub() as stub:
        yield stub


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def page(window: Browser, stub: PageStub) -> Iterator[Browser]:
    """The page as somebody sees it who comes for the first time. At the end, nothing may have gone wrong in it."""
    stub.reset()
    window.size(1000, 700)
    window.open(f"{stub.url}static/icon.svg")
    window.run("localStorage.clear()")
    window.open(stub.url)
    window.wait_for("#model", "tiny-chat")
    window.messages()
    yield window
    bad = [one for one in window.messages() if "Uncaught" in one or "Content Security Policy" in one]
    assert not bad


def ask(page: Browser, text: str) -> None:
    page.type("#box", text)
    page.press(ENTER)


def ask_and_wait(page: Browser, text: str) -> None:
    count = page.count(DONE)
    ask(page, text)
    page.wait(lambda: page.count(DONE) > count, "the answer")


def stored(page: Browser) -> list[dict[str, Any]]:
    """The talks that the browser keeps."""
    script = """const names = Object.keys(localStorage).filter((name) => name.startsWith("qrun.talk."));
        return names.map((name) => localStorage[name]);"""
    return [json.loads(text) for text in page.run(script)]


def rendered(page: Browser, text: str) -> str:
    """The HTML that a text of Markdown becomes."""
    script = """(async (text) => {
        const { showMarkdown } = await import("/static/markdown.js");
        const place = document.createElement("div");
        showMarkdown(place, text);
        return place.innerHTML;
    })(arguments[0]).then(done, (error) => done(String(error)));"""
    return str(page.run_async(script, text))


@browsing
def test_an_answer_streams_and_tells_its_speed_and_cache(page: Browser, stub: PageStub) -> None:
    go_on = threading.Event()

    def reply(body: dict[str, Any]) -> Frames:
        yield delta("The **first**")
        yield go_on
        yield delta(" part")
        yield from end(prompt=1046, cached=1024, answer=2)

    stub.reply = reply
    ask(page, "Hello")
    page.wait_for(ANSWER, "The first")
    assert page.run("return document.querySelector('.assistant').getAttribute('aria-busy')") == "true"
    assert page.text("#work-text") == "Writing"
    go_on.set()
    page.wait_for(".stats", "first token after")
    assert page.text(ANSWER) == "The first part"
    assert "2 tokens at 57.3/s · prompt 1,046 (1,024 from cache) at 812/s" in page.text(".stats")
    assert page.text("#context") == "Context: 1,048 of 8,192 tokens"
    [request] = stub.requests
    assert request["messages"] == [{"role": "user", "content": "Hello"}]
    assert request["model"] == "tiny-chat" and request["stream"] is True
    assert not {"temperature", "top_p", "top_k", "max_tokens", "seed"} & request.keys()


@browsing
def test_a_listener_hears_the_answer_once(page: Browser, stub: PageStub) -> None:
    page.run("""window.heard = [];
        const status = document.getElementById("status");
        new MutationObserver(() => heard.push(status.textContent)).observe(status, { childList: true });""")
    stub.reply = lambda body: [*words("one two three four five", 0.06), *end()]
    ask_and_wait(page, "Count")
    assert page.run("return heard") == ["The model is answering", "Answer: one two three four five"]
    live = page.run("return [...document.querySelectorAll('[aria-live], [role=status], [role=alert]')].map((e) => e.id)"
                    )  # fmt: skip
    assert sorted(live) == ["notice", "status", "toast"]


@browsing
def test_escape_stops_an_answer_and_keeps_what_came(page: Browser, stub: PageStub) -> None:
    stub.reply = lambda body: iter([delta("So far"), threading.Event()])
    ask(page, "Go on for ever")
    page.wait_for(ANSWER, "So far")
    page.press(ESCAPE)
    page.wait_for(".stats", "stopped")
    assert stub.dropped.wait(60), "the server was not told"
    assert page.text(ANSWER) == "So far"
    [talk] = stored(page)
    assert talk["messages"][1]["content"] == "So far" and talk["messages"][1]["end"] == "stopped"
    stub.reply = lambda body: [delta("again"), *end()]
    page.press(ALT, "r")
    page.wait(lambda: page.text(ANSWER) == "again", "the answer once more")


@browsing
def test_the_prompt_s_progress_and_thoughts_are_shown(page: Browser, stub: PageStub) -> None:
    read, thought = threading.Event(), threading.Event()

    def reply(body: dict[str, Any]) -> Frames:
        yield progress(1536, 4000, 1024)
        yield read
        yield delta(reasoning="Is it *so*?")
        yield thought
        yield delta("It is.")
        yield from end()

    stub.reply = reply
    ask(page, "Think")
    page.wait_for("#work-text", "Reading the prompt: 1,536 of 4,000 tokens, 1,024 from cache")
    assert page.run("return document.getElementById('work-bar').position") == 1536 / 4000
    read.set()
    page.wait_for(".thoughts summary", "Thinking…")
    thought.set()
    page.wait_for(".stats", "tokens")
    assert re.fullmatch(r"Thought for \d\.\d s|Thoughts", page.text(".thoughts summary"))
    assert page.text(".thoughts .body") == "", "thoughts are folded at first"
    page.click(".thoughts summary")
    assert page.text(".thoughts .body") == "Is it so?"
    ask_and_wait(page, "Sure?")
    assert stub.requests[1]["messages"][1] == {
        "role": "assistant", "content": "It is.", "reasoning_content": "Is it *so*?"
    }  # fmt: skip


@browsing
def test_editing_cuts_what_follows_and_shift_enter_begins_a_line(page: Browser, stub: PageStub) -> None:
    ask_and_wait(page, "One")
    ask_and_wait(page, "Two")
    page.press(UP)
    page.press(ESCAPE)
    assert page.texts(".user .body") == ["One", "Two"]
    page.click(".user:nth-of-type(1) [aria-label^=Edit]")
    page.press(SHIFT, ENTER)
    page.press("!")
    page.press(ENTER)
    page.wait(lambda: page.texts(".user .body") == ["One\n!"] and page.count(DONE) == 1, "the talk without its end")
    assert stub.requests[-1]["messages"] == [{"role": "user", "content": "One\n!"}]
    page.click(".assistant [aria-label^='Answer once more']")
    page.wait(lambda: len(stub.requests) == 4, "the request once more")
    assert stub.requests[-1] == stub.requests[-2]


@browsing
def test_settings_reach_the_server_and_last(page: Browser, stub: PageStub) -> None:
    page.press(ALT, ",")
    assert page.run("return document.getElementById('temperature').placeholder") == "0.8"
    page.type("#system", "Be brief.")
    for name, value in {"temperature": "0.5", "top_p": "1.5", "top_k": "12", "max_tokens": "99", "seed": "7"}.items():
        page.type(f"#{name}", value)
    assert page.run("return document.getElementById('top_p').getAttribute('aria-invalid')") == "true"
    page.type("#thinking", "Off")
    page.press(ESCAPE)
    page.type("#model", "other-model")
    ask_and_wait(page, "Hi")
    page.open(stub.url + "?again")
    page.wait_for("#model", "other-model")
    page.click("#talks .open")
    ask_and_wait(page, "More")
    for request in stub.requests:
        assert request["messages"][0] == {"role": "system", "content": "Be brief."}
        assert request["model"] == "other-model"
        found = {name: request.get(name) for name in ("temperature", "top_p", "top_k", "max_tokens", "seed")}
        assert found == {"temperature": 0.5, "top_p": None, "top_k": 12, "max_tokens": 99, "seed": 7}
        assert request["chat_template_kwargs"] == {"enable_thinking": False}


@browsing
@pytest.mark.parametrize(
    "status, body, shown",
    [
        (400, {"error": {"message": "the prompt is too long", "code": "context_length_exceeded"}}, "is too long"),
        (503, {"error": {"message": "the queue is full"}}, "the queue is full (try again in 2 s)"),
        (502, "<html><h1>Bad gateway</h1></html>", "The server answered 502"),
        (500, {"detail": [{"loc": ["body"]}]}, '[{"loc":["body"]}]'),
        (404, "nothing here", "nothing here"),
    ],
)
def test_refusals_are_shown_in_their_own_words(
    page: Browser, stub: PageStub, status: int, body: Any, shown: str
) -> None:
    def reply(request: dict[str, Any]) -> Frames:
        raise Refused(status, body, Retry_After="2")
        yield

    stub.reply = reply
    ask(page, "Hello")
    page.wait_for(".error", shown)
    assert "<" not in page.text(".error")
    stub.reply = lambda request: [delta("Now it works"), *end()]
    page.click(".assistant [aria-label^='Answer once more']")
    page.wait_for(ANSWER, "Now it works")


@browsing
def test_errors_within_streams_and_broken_connections_keep_what_came(page: Browser, stub: PageStub) -> None:
    stub.reply = lambda body: [delta("Half"), {"error": {"message": "there is no more memory", "code": 500}}]
    ask_and_wait(page, "One")
    assert page.text(ANSWER) == "Half" and page.text(".error") == "there is no more memory"
    stub.reply = lambda body: [delta("A third"), 0.1, None]
    ask_and_wait(page, "Two")
    assert page.text(ANSWER) == "A third" and "connection broke" in page.text(".error")
    stub.reply = lambda body: [delta("A quarter")]
    ask_and_wait(page, "Three")
    assert "before the answer was complete" in page.text(".error")
    stub.reply = lambda body: ["data: {no json\n\n"]
    ask_and_wait(page, "Four")
    assert "not JSON" in page.text(".error")
    stub.reply = lambda body: [delta("Whole"), *end()]
    ask_and_wait(page, "Five")
    sent = stub.requests[-1]["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant"] * 3 + ["user"]
    assert sent[-1]["content"] == "Four\n\nFive", "an answer that failed leaves no gap"


@browsing
def test_frames_may_be_cut_anywhere(page: Browser, stub: PageStub) -> None:
    text = json.dumps(delta("grün 🙂"), ensure_ascii=False)
    stream = f": hello\r\n\r\nevent: x\r\ndata: {text}\r\n\r\ndata:{text}\n\n"
    stub.reply = lambda body: [*stream, *end()]
    ask_and_wait(page, "Hello")
    assert page.text(ANSWER) == "grün 🙂grün 🙂"


@browsing
def test_a_key_is_asked_for_and_kept(page: Browser, stub: PageStub) -> None:
    stub.key = "secret"
    page.open(stub.url + "?locked")
    page.wait_for("#notice", "The server wants an API key.")
    page.click("#notice button")
    assert page.run("return document.activeElement.id") == "key"
    page.type("#key", "wrong")
    page.press(ENTER)
    page.wait_for("#notice", "does not take this API key")
    page.click("#notice button")
    page.run("document.getElementById('key').select()")
    page.type("#key", "secret")
    page.press(ENTER)
    page.wait_for("#model", "tiny-chat")
    ask_and_wait(page, "Hello")
    page.open(stub.url + "?again")
    page.wait_for("#model", "tiny-chat")
    assert not page.text("#notice")
    assert "secret" not in json.dumps(stored(page))


@browsing
def test_talks_are_listed_renamed_deleted_and_brought_back(page: Browser, stub: PageStub) -> None:
    ask_and_wait(page, "First talk")
    page.press(ALT, "n")
    ask_and_wait(page, "Second talk")
    assert page.texts("#talks .open") == ["Second talk", "First talk"]
    page.click("#talks [aria-label='Rename \"Second talk\"']")
    page.press("N")
    page.press(ENTER)
    assert page.texts("#talks .open") == ["N", "First talk"] and page.text("#title") == "N"
    page.click("#talks [aria-label='Delete \"N\"']")
    assert page.texts("#talks .open") == ["First talk"] and len(stored(page)) == 1
    page.click("#toast button")
    assert page.texts("#talks .open") == ["N", "First talk"] and len(stored(page)) == 2
    page.click("#talks li:last-child .open")
    page.wait_for(".user .body", "First talk")
    page.open(page.run("return location.href").replace("#", "?again#"))
    page.wait_for(".user .body", "First talk")
    page.wait_for(ANSWER, "You said: First talk")


@browsing
def test_talks_go_out_as_a_file_and_come_in_again(page: Browser, stub: PageStub, tmp_path: Path) -> None:
    ask_and_wait(page, "Keep <b>this</b>")
    before = stored(page)
    page.click("#export")
    page.wait(lambda: [*page.downloads.glob("qrun-talks-*.json")], "the download")
    [file] = page.downloads.glob("qrun-talks-*.json")
    assert json.loads(file.read_text("utf-8"))["talks"] == before
    page.click("#talks [aria-label^=Delete]")
    page.type("#file", str(file))
    page.wait_for("#toast", "Imported 1 talk")
    assert stored(page) == before
    page.click("#talks .open")
    page.wait_for(".user .body", "Keep <b>this</b>")
    page.type("#file", str(file))
    page.wait_for("#toast", "here already")
    no_talk = '[{"messages": [{"role": "x"}]}]'
    for content, told in (("{", "not JSON"), ('{"talks": 3}', "no talks"), (no_talk, "no talk")):
        bad = tmp_path / "bad.json"
        bad.write_text(content)
        page.type("#file", str(bad))
        page.wait_for("#toast", told)
    assert stored(page) == before


@browsing
def test_two_talks_are_answered_at_a_time(page: Browser, stub: PageStub) -> None:
    go_on = threading.Event()

    def reply(body: dict[str, Any]) -> Frames:
        text = body["messages"][-1]["content"]
        yield delta(f"{text}: ")
        if text == "slow":
            yield go_on
        yield delta("done")
        yield from end()

    stub.reply = reply
    ask(page, "slow")
    page.wait_for(ANSWER, "slow:")
    page.press(ALT, "n")
    ask_and_wait(page, "quick")
    assert page.text(ANSWER) == "quick: done"
    assert page.count("#talks .running") == 1
    go_on.set()
    page.wait(lambda: page.count("#talks .running") == 0, "the other answer")
    assert page.text(ANSWER) == "quick: done"
    page.click("#talks li:not(:has([aria-current])) .open")
    assert page.text(ANSWER) == "slow: done"


@browsing
def test_a_model_that_is_loaded_by_an_answer_is_told_as_loaded(page: Browser, stub: PageStub) -> None:
    other = stub.models[1]
    assert "/props" in stub.paths and page.text("#model option:last-child") == "other-model (not loaded)"
    page.type("#model", "other-model")

    def reply(body: dict[str, Any]) -> Frames:
        stub.models[1] = other | {"state": "loaded", "context_length": 4096}
        yield from end()

    stub.reply = reply
    try:
        ask_and_wait(page, "Hello")
        page.wait(lambda: page.text("#model option:last-child") == "other-model", "the model's new state")
        assert page.run("return document.getElementById('model').value") == "other-model"
        assert page.text("#context") == "Context: 49 of 4,096 tokens"
        assert "ended without an answer" in page.text(".stats")
    finally:
        stub.models[1] = other


@browsing
def test_buttons_that_change_a_talk_wait_for_its_answer(page: Browser, stub: PageStub) -> None:
    go_on = threading.Event()
    ask_and_wait(page, "One")
    stub.reply = lambda body: iter([delta("Now"), go_on, *end()])
    ask(page, "Two")
    page.wait_for(ANSWER, "Now")
    visible = """return [...document.querySelectorAll("#log .tools button")].filter((one) => one.checkVisibility())
        .map((one) => one.getAttribute("aria-label").split(/[ ;]/, 1)[0])"""
    assert page.run(visible) == ["Copy"] * 3
    page.run("document.querySelector('.tools button').focus()")
    page.press(ENTER)
    go_on.set()
    page.wait(lambda: page.run(visible) == ["Copy", "Edit", "Copy", "Answer"] * 2, "buttons")
    label = page.run("return document.activeElement.getAttribute('aria-label')")
    assert label == "Copy the text", "the focus stays where it was"


@browsing
def test_colours_follow_the_system_until_they_are_chosen(page: Browser, stub: PageStub) -> None:
    def background() -> str:
        return str(page.run("return getComputedStyle(document.body).backgroundColor"))

    page.prefer(color_scheme="light")
    light = background()
    page.prefer(color_scheme="dark")
    dark = background()
    assert light != dark
    page.click("#theme")
    assert background() == light
    page.open(stub.url + "?again")
    assert background() == light
    page.click("#theme")
    page.prefer(color_scheme="light")
    assert background() == dark


@browsing
def test_fits_a_phone(page: Browser, stub: PageStub) -> None:
    page.size(360, 640, touch=True)
    page.open(stub.url + "?phone")
    wide = "x" * 300
    stub.reply = lambda body: [delta(f"{wide}\n\n```\n{wide}\n```\n\n| a | b |\n|--|--|\n| {wide} | {wide} |"), *end()]
    page.type("#box", wide)
    page.click("#send")
    page.wait(lambda: page.count(DONE), "the answer")
    for selector in ("html", "#scroller", "header"):
        widths = "const e = document.querySelector(arguments[0]); return [e.scrollWidth, e.clientWidth, innerWidth]"
        scroll, client, inner = page.run(widths, selector)
        assert scroll <= client <= inner == 360
    assert page.run("return getComputedStyle(document.getElementById('side')).visibility") == "hidden"
    page.click("#open-side")
    page.wait(lambda: "xxx" in page.text("#talks .open"), "the list of talks")
    page.press(ESCAPE)
    assert page.run("return document.activeElement.id") == "open-side"


@browsing
def test_code_is_copied_as_it_is(page: Browser, stub: PageStub) -> None:
    origin = stub.url.rstrip("/")
    permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    page.command("Browser.grantPermissions", origin=origin, permissions=permissions)
    stub.reply = lambda body: [*words("Here:\n\n```html\n<b>\n  *x*\n</b>\n```\n"), *end()]
    ask_and_wait(page, "Code")
    page.click(".copy-code")
    page.wait_for(".copy-code", "Copied")
    copied = page.run_async("navigator.clipboard.readText().then(done, (error) => done(String(error)))")
    assert copied == "<b>\n  *x*\n</b>"


@browsing
def test_what_a_model_writes_is_never_markup(page: Browser, stub: PageStub) -> None:
    evil = (
        "<img src=x onerror=alert(1)> <script>alert(1)</script>\n\n[a](javascript:alert(1)) [b](JaVaScRiPt:x)"
        " [c](data:text/html,x) ![d](http://example.org/x.png) <javascript:alert(1)>\n\n"
        '```"><img src=x>\n</code><img src=x>\n```\n\n| <svg onload=x> | b |\n|--|--|\n| <iframe> | c |'
    )
    stub.reply = lambda body: [*words(evil), *end()]
    page.run("document.getElementById('box').value = arguments[0]", evil)
    ask_and_wait(page, "")
    assert page.text(".user .body") == evil.strip()
    assert page.count("#log img, #log script, #log iframe, #log svg[onload]") == 0
    links = page.run("return [...document.querySelectorAll('#log .body a')].map((a) => a.href)")
    assert links == ["http://example.org/x.png"]
    assert "<script>alert(1)</script>" in page.text(ANSWER)
    assert not any("example.org" in path or path == "/x" for path in stub.paths)


@browsing
@pytest.mark.parametrize(
    "text, html",
    [
        ("a *b* **c** ***d*** ~~e~~ `f*`", "<p>a <em>b</em> <strong>c</strong> <em><strong>d</strong></em> "
         "<del>e</del> <code>f*</code></p>"),
        ("snake_case_name 2*3*4 _x_ **un*closed", "<p>snake_case_name 2<em>3</em>4 <em>x</em> **un*closed</p>"),
        ("a * b * c \\*d\\*", "<p>a * b * c *d*</p>"),
        ("``a ` b`` `unclosed", "<p><code>a ` b</code> `unclosed</p>"),
        ("one\ntwo<br>three", "<p>one<br>two<br>three</p>"),
        ("# A #\n### B\nc", "<h3>A</h3><h5>B</h5><p>c</p>"),
        ("- a\n- b\n  - c\n    1. d\n- [x] e", '<ul class="tight"><li><p>a</p></li><li><p>b</p><ul class="tight"><li>'
         '<p>c</p><ol class="tight"><li><p>d</p></li></ol></li></ul></li><li><p>☑ e</p></li></ul>'),
        ("3. a\n\n   b\n4. c", '<ol start="3"><li><p>a</p><p>b</p></li><li><p>c</p></li></ol>'),
        ("> a\n> - b\n\n---", '<blockquote><p>a</p><ul class="tight"><li><p>b</p></li></ul></blockquote><hr>'),
        ("a|b\n:-:|-:\n`x\\|y`|", '<div class="table" tabindex="0"><table><thead><tr><th class="center">a</th>'
         '<th class="right">b</th></tr></thead><tbody><tr><td class="center"><code>x|y</code></td>'
         '<td class="right"></td></tr></tbody></table></div>'),
        ("\\[ x_1 * y_2 * z \\]", '<pre class="math" tabindex="0"><code>x_1 * y_2 * z</code></pre>'),
        ("so \\(a_1*b_1*c\\) is", '<p>so <code class="math">a_1*b_1*c</code> is</p>'),
        ("&lt;b&gt; AT&T <i>", "<p>&lt;b&gt; AT&amp;T &lt;i&gt;</p>"),
    ],
)  # fmt: skip
def test_markdown(page: Browser, text: str, html: str) -> None:
    assert rendered(page, text) == html


@browsing
def test_markdown_links(page: Browser) -> None:
    text = 'See https://example.org/a_(b)_c. [x *y*](https://example.org/q?a=1&b=2 "t") (<mailto:a@b.c>)'
    html = rendered(page, text)
    assert re.findall('href="([^"]*)"', html) == [
        "https://example.org/a_(b)_c", "https://example.org/q?a=1&amp;b=2", "mailto:a@b.c"
    ]  # fmt: skip
    assert html.count('rel="noopener noreferrer nofollow"') == 3


@browsing
def test_markdown_takes_no_time_for_the_worst_of_texts(page: Browser) -> None:
    """Time must not grow with the square of the length, whatever a model repeats."""
    worst = ["*a ", "**", "_a*", "[", "![", "[a](", "`a", "``` `", "<", "> ", "- ", "|", "a|b\n-|-\n", "\\(", "&",
             "~~a", "https://", "1. a\n", " ", "\\", "*a_ b*c_ ", "# ", "\\[\n", "x\n"]  # fmt: skip
    script = """(async (texts) => {
        const { showMarkdown } = await import("/static/markdown.js");
        const slow = [];
        for (const text of texts) {
            const place = document.createElement("div");
            const start = performance.now();
            showMarkdown(place, text);
            if (performance.now() - start > 2500) slow.push([text.slice(0, 8), performance.now() - start]);
        }
        return slow;
    })(arguments[0]).then(done, (error) => done(String(error)));"""
    assert page.run_async(script, [one * (40_000 // len(one)) for one in worst]) == []


@browsing
def test_a_growing_answer_keeps_the_elements_that_are_done(page: Browser, stub: PageStub) -> None:
    go_on = threading.Event()

    def reply(body: dict[str, Any]) -> Frames:
        yield delta("Done.\n\n```py\nx = 1\n")
        yield go_on
        yield delta("y = 2\n```\n\nEnd")
        yield from end()

    stub.reply = reply
    ask(page, "Hello")
    page.wait_for(ANSWER, "x = 1")
    page.run("window.was = [...document.querySelectorAll('.assistant .body > *')].slice(-2)")
    go_on.set()
    page.wait_for(".stats", "tokens")
    assert page.run("return was.every((one) => one.isConnected)")
    assert page.text(".assistant pre") == "x = 1\ny = 2"
