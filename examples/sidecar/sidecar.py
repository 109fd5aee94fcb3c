"""A program that starts a server of its own beside itself, asks it over HTTP, and never leaves it behind.

    pip install 'qrun-gguf[server]'
    python sidecar.py model.gguf "Why is the sky blue?"

Here is nothing but the standard library: a program in any language can do the same. Three things make it safe:

- The child runs with --exit-with-stdin. The other end of its standard input is held by this process alone, and closes
  with it: also where it is killed or crashes.
- Its address is read from the one line that --ready-json prints, so that no port has to be agreed on.
- It listens on this machine only, and for whoever knows a key that was made for this run. The key is in the
  environment, where no other user sees it.
"""

import collections
import http.client
import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Self
from urllib.parse import urlsplit

COMMAND = (sys.executable, "-m", "qrun.cli.main")  # in an app that was packed: the path of a packed qrun


class Sidecar:
    """A server with one model, which lives as long as this process at most."""

    def __init__(self, model: str, *options: str, command: Sequence[str] = COMMAND) -> None:
        """Returns once the model is loaded. Raises RuntimeError, with the line that it said, if it cannot be."""
        self._key = secrets.token_urlsafe(24)
        # Ctrl-C in a terminal goes to all of a group. This process decides what becomes of the child.
        group: dict[str, Any] = (
            {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
            if sys.platform == "win32"
            else {"process_group": 0}
        )
        self._process = subprocess.Popen(
            [*command, "serve", model, "--port", "0", "--ready-json", "--exit-with-stdin", "--quiet", *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace",
            env=os.environ | {"QRUN_API_KEY": self._key}, **group,
        )  # fmt: skip
        self.said: collections.deque[str] = collections.deque(maxlen=50)
        """The newest lines of its log."""
        # A pipe that nobody reads fills up, and then the child waits.
        reading = threading.Thread(target=lambda: self.said.extend(self._process.stderr or ()), daemon=True)
        reading.start()
        try:
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            if not line:
                reading.join(5)
                raise RuntimeError(self.said[-1].strip() if self.said else "qrun ended without a word")
            self.url = str(json.loads(line)["url"])
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether it runs. Where it does not, start another."""
        return self._process.poll() is None

    def chat(self, messages: list[dict[str, str]], **options: Any) -> Iterator[str]:
        """The answer to a chat, as it comes; dropping the iterator ends it in the server, too.

        options: those of OpenAI's interface. Raises RuntimeError with what the server says is wrong, and OSError where
        it is gone.
        """
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port)
        body = json.dumps({"messages": messages, "stream": True, **options})
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        try:
            connection.request("POST", "/v1/chat/completions", body, headers)
            with connection.getresponse() as response:
                if response.status != 200:
                    raise RuntimeError(json.loads(response.read())["error"]["message"])
                for line in response:
                    if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise RuntimeError(event["error"]["message"])
                    for choice in event["choices"]:
                        yield choice["delta"].get("content") or ""
        finally:
            connection.close()

    def close(self, seconds: float = 5) -> None:
        """End it, in good time or by force."""
        with suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def main(model: str, *questions: str) -> None:
    messages: list[dict[str, str]] = []
    with Sidecar(model) as server:
        for question in questions or iter(lambda: input("> "), ""):
            messages.append({"role": "user", "content": question})
            answer = ""
            for piece in server.chat(messages, max_tokens=300):
                print(piece, end="", flush=True)
                answer += piece
            print()
            messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (RuntimeError, OSError) as error:
        sys.exit(str(error))
    except (KeyboardInterrupt, EOFError):
        sys.exit(130)
