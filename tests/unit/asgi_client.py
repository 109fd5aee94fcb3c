"""Calls an ASGI application without a network, as a client that may leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """status is 0 where the application said nothing."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    parts: list[bytes] = field(default_factory=list)
    ended: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The JSON of server-sent events, comments and the final mark left out."""
        lines = [line.removeprefix("data: ") for line in self.text.split("\n") if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    @property
    def event_names(self) -> list[str]:
        return [line.removeprefix("event: ") for line in self.text.split("\n") if line.startswith("event: ")]

    @property
    def lines(self) -> list[Any]:
        """The JSON of a stream with one object a line."""
        return [json.loads(line) for line in self.text.splitlines()]


async def request(
    app: Any,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    *,
    leave_when: Callable[[Answer], bool] = lambda answer: False,
    leave: asyncio.Event | None = None,
) -> Answer:
    """One request. The client leaves when something has come, or an event is set."""
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    answer = Answer()
    gone = leave or asyncio.Event()
    sent = False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": raw, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            assert not answer.status, "an answer has one status"
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            assert answer.status and not answer.ended, "nothing comes before the status, or after the end"
            answer.parts.append(message.get("body", b""))
            answer.ended = not message.get("more_body", False)
        if leave_when(answer):
            gone.set()
        await asyncio.sleep(0)

    names = {"host": "localhost", "content-type": "application/json", "content-length": str(len(raw))} | (headers or {})
    url, _, query = path.partition("?")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": url,
        "raw_path": url.encode(), "query_string": query.encode(), "root_path": "", "scheme": "http",
        "headers": [(name.lower().encode(), value.encode()) for name, value in names.items()],
        "server": ("localhost", 80), "client": ("127.0.0.1", 1),
    }  # fmt: skip
    await app(scope, receive, send)
    return answer


def call(app: Any, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
    """One request, in an event loop of its own."""
    return asyncio.run(request(app, method, path, body, headers))
