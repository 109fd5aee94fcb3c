"""Pictures of the chat page, in headless Chromium: `python -m tests.page_screenshots docs`."""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from tests.browser import ENTER, Browser
from tests.page_stub import Frames, PageStub, Refused, delta, end, progress, words

THOUGHTS = (
    "The user wants the **n-th Fibonacci number**. Plain recursion takes exponential time, so:\n\n"
    "- a loop that keeps two numbers, or\n- `functools.cache`\n\nThe loop is the shorter one to explain."
)
ANSWER = """\
Keep the last two numbers and go on from there:

```python
def fibonacci(n: int) -> int:
    \"\"\"The n-th Fibonacci number; fibonacci(0) is 0.\"\"\"
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a
```

This takes **n additions** and two variables:

| n | `fibonacci(n)` | additions |
|--:|---------------:|----------:|
| 10 | 55 | 10 |
| 50 | 12,586,269,025 | 50 |

1. Python's integers have no limit, so nothing *overflows*.
2. For very large n, [fast doubling](https://en.wikipedia.org/wiki/Fibonacci_sequence) needs only log n steps.
"""


def reply(body: dict[str, Any]) -> Frames:
    question = body["messages"][-1]["content"]
    if "Fibonacci" in question:
        yield from words(THOUGHTS, reasoning=True)
        yield 1.2
        yield from words(ANSWER)
        yield from end(prompt=1046, cached=1024, answer=213)
    elif "whole book" in question:
        message = (
            "This model's maximum context length is 8192 tokens, and the prompt has 10342: the request exceeds the "
            "available context size. Shorten it, or start the server with more (--ctx)"
        )
        raise Refused(400, {"error": {"message": message}})
    elif "report" in question:
        yield progress(1536, 4000, 1024)
        yield threading.Event()
    else:
        yield delta("It is the largest planet of the Solar System: more than twice as heavy as all others together.")
        yield from end(prompt=1290, cached=1259, answer=22)


def main(folder: Path) -> None:
    with PageStub() as stub, tempfile.TemporaryDirectory() as place, Browser(Path(place)) as browser:
        stub.reply = reply
        stub.models[0]["id"] = "SmolLM3-3B-Q4_K_M"

        def ask(text: str) -> None:
            browser.type("#box", text)
            browser.press(ENTER)

        def shoot(name: str) -> None:
            browser.run_async("document.activeElement.blur(); document.fonts.ready.then(() => setTimeout(done, 300))")
            browser.screenshot(folder / f"page-{name}.png")

        browser.prefer(color_scheme="light", reduced_motion="reduce")
        browser.size(1080, 720)
        browser.open(stub.url)
        browser.wait_for("#model", "SmolLM3")
        ask("What is Jupiter?")
        browser.wait_for(".assistant .stats", "from cache")
        browser.click("#new")
        ask("Write a Python function for the n-th Fibonacci number, please.")
        browser.wait_for(".assistant .stats", "from cache")
        shoot("light")
        browser.prefer(color_scheme="dark", reduced_motion="reduce")
        browser.click(".thoughts summary")
        browser.run("document.getElementById('scroller').scrollTop = 0")
        shoot("dark-thoughts")
        browser.click("#open-settings")
        browser.type("#system", "You are a terse assistant.")
        shoot("settings")
        browser.click("#settings .main.close")
        browser.size(390, 760, touch=True)
        browser.run("location.reload()")
        browser.wait_for(".assistant .stats", "from cache")
        browser.run("document.querySelector('.code').scrollIntoView()")
        shoot("phone")
        browser.prefer(color_scheme="light", reduced_motion="reduce")
        browser.size(1080, 560)
        browser.click("#new")
        ask("Sum up this whole book: ...")
        browser.wait_for(".error", "maximum context length")
        shoot("error")
        browser.click("#new")
        ask("Read this report and tell me what is new in it: ...")
        browser.wait_for("#work-text", "Reading")
        shoot("prompt")
        browser.click("#send")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
