"""A request and its answer, which may be a stream."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request

from qrun.server.errors import APIError, Shape, from_exception, shape_of

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

log = logging.getLogger("qrun.server")

_LARGE = 1 << 16  # bytes of a body that are parsed off the event loop

_STREAM_HEADERS = [
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)  # `json.dumps` would make one for each value


def dumps(value: Any) -> str:
    """JSON on one line, in ASCII: no text of a model or a client can spoil it."""
    return _ENCODER.encode(value)


def encode(value: Any) -> bytes:
    return dumps(value).encode()


def in_parts(value: Any) -> str:
    """The same JSON as `dumps` makes of a value with many items, which nobody shall wait for: the encoder lets no other
    thread run until it is done, so that it gets one item at a time."""
    return "".join(_parts(value))


def _parts(value: Any) -> Iterator[str]:
    is_object = isinstance(value, dict)
    items = value.values() if is_object else value if isinstance(value, list) else ()
    if not any(isinstance(item, list | dict) for item in items):  # as a vector is
        yield dumps(value)
        return
    before = "{" if is_object else "["
    for key, item in value.items() if is_object else enumerate(value):
        yield f"{before}{dumps(str(key))}:" if is_object else before
        yield from _parts(item)
        before = ","
    yield "}" if is_object else "]"


def event(name: str, data: Any) -> bytes:
    """A server-sent event with a name."""
    return f"event: {name}\ndata: {dumps(data)}\n\n".encode()


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def parse(body: bytes) -> Any:
    """The JSON of a body. Half of a character's pair, as clients send that cut texts anywhere, becomes U+FFFD."""
    try:
        value = json.loads(body.decode("utf-8-sig"), parse_constant=_refuse_constant)
        if b"\\ud" in body.lower():
            whole = json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            value = json.loads(whole)
    except (ValueError, RecursionError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())
        if "integer string conversion" in reason:
            reason = "a number has too many digits"
        raise APIError(f"the body is no JSON that can be read: {reason}") from None
    return value


class Exchange:
    """One request. `body` is its JSON object, an empty one where there is none."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, shape: Shape) -> None:
        self.request = Request(scope, receive)
        self.shape = shape
        self.body: dict[str, Any] = {}
        self.size = 0
        """Bytes of that."""
        self.started = False
        """Whether the answer has begun, so that its status cannot change."""
        self.arrived = time.perf_counter()
        self._receive, self._send = receive, send
        self._sent = 0.0
        self.error_frame: Callable[[APIError], bytes] = lambda error: b""
        """How an error is said within the stream that has begun."""

    @property
    def path_parameters(self) -> dict[str, Any]:
        return self.request.path_params

    async def read_body(self, most: int, executor: Executor) -> None:
        """Read `body`. APIError where it is too large, packed, or no JSON object."""
        packed = self.request.headers.get("content-encoding", "identity").strip().lower()
        if packed not in ("identity", ""):
            raise APIError(f"the body is packed ({packed[:40]}): this server reads plain JSON", 415,
                           code="unsupported_media_type", headers={"Accept-Encoding": "identity"})  # fmt: skip
        declared = self.request.headers.get("content-length", "")
        too_large = APIError(f"the body is larger than {most} bytes: --max-body sets the limit", 413,
                             code="request_too_large")  # fmt: skip
        if declared.isdecimal() and int(declared) > most:
            raise too_large
        parts: list[bytes] = []
        size = 0
        async for part in self.request.stream():
            size += len(part)
            if size > most:
                raise too_large
            parts.append(part)
        raw = b"".join(parts)
        self.size = size
        if not raw.strip():
            return
        if len(raw) > _LARGE:
            value = await asyncio.get_running_loop().run_in_executor(executor, parse, raw)
        else:
            value = parse(raw)
        if not isinstance(value, dict):
            raise APIError("the body must be a JSON object")
        self.body = value

    async def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """The whole answer."""
        await self.raw(encode(value), "application/json", status, headers)

    async def raw(
        self, body: bytes, content_type: str, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        raw = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode())]
        raw += [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        raw.append((b"openai-processing-ms", str(int((time.perf_counter() - self.arrived) * 1e3)).encode()))
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": raw})
        await self._send({"type": "http.response.body", "body": b"" if self.request.method == "HEAD" else body})

    async def write(self, frames: bytes) -> None:
        """More of a stream."""
        self._sent = time.monotonic()
        await self._send({"type": "http.response.body", "body": frames, "more_body": True})

    @asynccontextmanager
    async def stream(
        self, content_type: str, first: bytes, ping: Callable[[], bytes] | None, seconds: float
    ) -> AsyncIterator[None]:
        """Begin a stream with its headers and first frames; end it after the `with` statement. While nothing else
        is written, `ping` is, every so many seconds."""
        self.started = True
        if ping is not None and isinstance(told := self.request.scope.get("state"), dict):
            told["pings"] = True  # see `server.connection`
        headers = [(b"content-type", content_type.encode()), *_STREAM_HEADERS]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        if first:
            await self.write(first)
        pinger = asyncio.create_task(self._ping(ping, seconds)) if ping is not None else None
        try:
            yield
        finally:
            if pinger is not None:
                pinger.cancel()
        await self._send({"type": "http.response.body", "body": b""})

    async def _ping(self, ping: Callable[[], bytes], seconds: float) -> None:
        while True:
            rest = self._sent + seconds - time.monotonic()
            if rest > 0:
                await asyncio.sleep(rest)
            else:
                await self.write(ping())

    async def run(self, function: Callable[[Exchange], Awaitable[None]]) -> None:
        """Answer by a function, which is cancelled when the client goes. Errors become answers."""
        task = asyncio.ensure_future(function(self))
        watcher = asyncio.create_task(self._gone())
        try:
            await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task
                return
            await self._settle(task)
        finally:
            watcher.cancel()
            task.cancel()

    async def _settle(self, task: asyncio.Future[None]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            await self.fail(error)

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def fail(self, error: BaseException) -> None:
        """Say that something went wrong."""
        told = from_exception(error)
        if told.status == 500:
            log.error("%s %s", self.request.method, self.request.url.path, exc_info=error)
        with suppress(OSError):
            if not self.started:
                await self.json(self.shape(told), told.status, told.headers)
                return
            if frame := self.error_frame(told):
                await self._send({"type": "http.response.body", "body": frame, "more_body": True})
            await self._send({"type": "http.response.body", "body": b""})


class Endpoint:
    """An ASGI application that answers by a function of an exchange."""

    def __init__(
        self, function: Callable[[Exchange], Awaitable[None]], most: int, executor: Executor, with_body: bool
    ) -> None:
        self._function = function
        self._most, self._executor, self._with_body = most, executor, with_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, shape_of(scope))
        try:
            if self._with_body:
                await exchange.read_body(self._most, self._executor)
            else:
                async for _ in exchange.request.stream():
                    pass
        except ClientDisconnect:
            return
        except APIError as error:
            await exchange.fail(error)
            return
        await exchange.run(self._function)
