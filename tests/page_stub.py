"""A server that has the chat page and answers like a model, as it is told: for tests of the page alone."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

STATIC = Path(__file__).parents[1] / "server" / "static"
CSP = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'"
_TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}

Frames = Iterable[Any]
"""Of a stream: an object is sent as data, a text as it is, a number of seconds waited, an event waited for, None
breaks the connection."""


class Refused(Exception):
    """The answer is an error."""

    def __init__(self, status: int, body: str | dict[str, Any], **headers: str) -> None:
        super().__init__(status)
        self.status, self.body, self.headers = status, body, headers


def delta(content: str = "", reasoning: str = "") -> dict[str, Any]:
    told = {name: text for name, text in (("content", content), ("reasoning_content", reasoning)) if text}
    return {"choices": [{"index": 0, "delta": told, "finish_reason": None}]}


def progress(processed: int, total: int, cache: int = 0) -> dict[str, Any]:
    told = {"total": total, "cache": cache, "processed": processed, "time_ms": processed}
    return {"choices": [], "prompt_progress": told}


def end(reason: str = "stop", *, prompt: int = 42, cached: int = 32, answer: int = 7) -> Iterator[Any]:
    """The last frames of an answer."""
    timings = {"cache_n": cached, "prompt_n": prompt - cached, "prompt_per_second": 812.4, "predicted_n": answer,
               "predicted_per_second": 57.31}  # fmt: skip
    yield {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}], "timings": timings}
    usage = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer,
             "prompt_tokens_details": {"cached_tokens": cached}}  # fmt: skip
    yield {"choices": [], "usage": usage}
    yield "data: [DONE]\n\n"


def words(text: str, seconds: float = 0.0, *, reasoning: bool = False) -> Iterator[Any]:
    """The pieces of a text."""
    for piece in re.findall(r"\s*\S+\s*$|\s*\S+", text):
        yield delta(reasoning=piece) if reasoning else delta(piece)
        if seconds:
            yield seconds


def echo(body: dict[str, Any]) -> Frames:
    yield from words(f"You said: {body['messages'][-1]['content']}")
    yield from end()


class PageStub:
    """reply: gives the frames of the answer to a request. requests: the bodies that came. dropped: is set when a
    client went before its answer was complete."""

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any]], Frames] = echo
        self.models: list[dict[str, Any]] = [
            {"id": "tiny-chat", "state": "loaded", "context_length": 8192},
            {"id": "other-model", "state": "not-loaded"},
        ]
        self.key = ""
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.dropped = threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                stub._get(self)

            def do_POST(self) -> None:
                stub._post(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def __enter__(self) -> PageStub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.socket.close()

    def reset(self) -> None:
        """As it was when it began."""
        self.reply, self.key = echo, ""
        self.requests.clear()
        self.dropped.clear()

    def _get(self, handler: BaseHTTPRequestHandler) -> None:
        path = urlsplit(handler.path).path
        self.paths.append(path)
        file = STATIC / (path.removeprefix("/static/") if path != "/" else "index.html")
        if path == "/" or (path.startswith("/static/") and file.is_file()):
            answer(handler, 200, file.read_bytes(), _TYPES[file.suffix], {"Content-Security-Policy": CSP})
        elif path in ("/v1/models", "/props") and self._has_key(handler):
            params = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "n_predict": -1}
            told: Any = {"default_generation_settings": {"n_ctx": 8192, "params": params}}
            if path == "/v1/models":
                told = {"object": "list", "data": self.models}
            answer(handler, 200, json.dumps(told).encode())
        elif path not in ("/v1/models", "/props"):
            answer(handler, 404, b'{"error":{"message":"there is nothing"}}')

    def _has_key(self, handler: BaseHTTPRequestHandler) -> bool:
        if self.key and handler.headers.get("Authorization") != f"Bearer {self.key}":
            answer(handler, 401, b'{"error":{"message":"an API key is wanted","code":"invalid_api_key"}}')
            return False
        return True

    def _post(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        if not self._has_key(handler):
            return
        self.requests.append(body)
        try:
            frames = iter(self.reply(body))
            first = next(frames)
        except Refused as error:
            data = error.body if isinstance(error.body, str) else json.dumps(error.body)
            answer(handler, error.status, data.encode(), "text/plain", error.headers)
            return
        handler.close_connection = True
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Connection", "close")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        try:
            for frame in (":\n\n", first):
                _send(handler, frame)
            for frame in frames:
                if frame is None:
                    return  # without the last chunk
                _send(handler, frame)
            handler.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.dropped.set()


def _send(handler: BaseHTTPRequestHandler, frame: Any) -> None:
    if isinstance(frame, threading.Event):
        while not frame.wait(0.02):  # as servers do, so that they notice when nobody listens
            _send(handler, ":\n\n")
    elif isinstance(frame, int | float):
        time.sleep(frame)
    else:
        data = (frame if isinstance(frame, str) else f"data: {json.dumps(frame)}\n\n").encode()
        handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def answer(
    handler: BaseHTTPRequestHandler,
    status: int,
    data: bytes,
    content_type: str = "application/json",
    headers: dict[str, str] | None = None,
) -> None:
    handler.send_response(status)
    for name, value in {"Content-Type": content_type, "Content-Length": str(len(data)), **(headers or {})}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)
