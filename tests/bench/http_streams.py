"""A small HTTP client for many streams at a time: raw sockets, so that it takes little of the cores that it measures.

It speaks what servers of OpenAI's interface speak, and no more: HTTP/1.1 with a length or in chunks, and
server-sent events.
"""

from __future__ import annotations

import asyncio
import json
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

_MOST = 1 << 24  # bytes of a line


@dataclass
class Stream:
    """What came of one request. Times are those of `time.perf_counter`."""

    status: int = 0
    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    """When each part of the text came."""
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def n_tokens(self) -> int:
        """Those of the answer, as the server counts them."""
        return int(self.usage.get("completion_tokens", 0))

    @property
    def first(self) -> float:
        """Seconds from the request to the first part of the text."""
        return self.times[0] - self.sent

    @property
    def end(self) -> float:
        return self.times[-1]

    def gaps(self, begin: float, end: float) -> list[float]:
        """Seconds between parts, of those that end in this time; and from the last part before the end to it."""
        times = [*(one for one in self.times if one < end), end]
        return [after - max(before, begin) for before, after in pairwise(times) if after > begin]


class Connection:
    """One request on a connection of its own, which `close` cuts."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writer: asyncio.StreamWriter | None = None
        self.status = 0
        self.headers: dict[str, str] = {}

    async def open(self, method: str, path: str, body: Any = None) -> None:
        """Send a request, and read the head of its answer."""
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=_MOST)
        raw = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(raw)}\r\nConnection: close\r\n\r\n"
        )
        self._writer.write(head.encode() + raw)
        await self._writer.drain()
        line = await self._reader.readline()
        self.status = int(line.split()[1]) if line.startswith(b"HTTP/") else 0
        while line := (await self._reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            self.headers[name.lower()] = value.strip()

    async def parts(self) -> AsyncIterator[bytes]:
        """The body, as it comes."""
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            while part := await self._reader.read(1 << 16):
                yield part
            return
        while size := int((await self._reader.readline()).split(b";")[0] or b"0", 16):
            yield (await self._reader.readexactly(size + 2))[:-2]

    async def take(self, most: int) -> bytes:
        """So many bytes at most, as they are on the wire; none at the end."""
        return await self._reader.read(most)

    async def body(self) -> bytes:
        return b"".join([part async for part in self.parts()])

    async def lines(self) -> AsyncIterator[bytes]:
        rest = b""
        async for part in self.parts():
            *found, rest = (rest + part).split(b"\n")
            for line in found:
                yield line

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


async def get(port: int, path: str) -> tuple[int, bytes]:
    connection = Connection(port)
    try:
        await connection.open("GET", path)
        return connection.status, await connection.body()
    finally:
        connection.close()


async def post(port: int, path: str, body: Any) -> tuple[int, Any]:
    """An answer that is not streamed."""
    connection = Connection(port)
    try:
        await connection.open("POST", path, body)
        return connection.status, json.loads(await connection.body() or b"null")
    finally:
        connection.close()


class _Arrivals:
    """A streamed answer as it comes. It is only looked at as a whole, when it is over: what is measured are the cores
    on which this runs too."""

    def __init__(self, found: Stream, chunked: bool) -> None:
        self._found, self._chunked = found, chunked
        self._parts: list[bytes] = []
        self._ends: list[int] = []  # bytes so far
        self._times: list[float] = []

    def add(self, part: bytes) -> None:
        now = time.perf_counter()
        self._parts.append(part)
        self._ends.append(len(part) + (self._ends[-1] if self._ends else 0))
        self._times.append(now)
        # Near enough until the end: a text that two parts share is passed over.
        self._found.times += [now] * (part.count(b'"text":"') - part.count(b'"text":""'))

    def _chunks(self) -> Iterator[tuple[bytes, int]]:
        """What the chunks hold, each with the bytes up to its end."""
        raw = b"".join(self._parts)
        if not self._chunked:
            yield from zip(self._parts, self._ends, strict=True)
            return
        place = 0
        while (line := raw.find(b"\r\n", place)) >= 0 and (size := int(raw[place:line].split(b";")[0], 16)):
            place = line + 4 + size
            yield raw[line + 2 : place - 2], place

    def settle(self) -> None:
        """Find what has come, and when."""
        found = self._found
        found.times.clear()
        rest = b""
        for data, end in self._chunks():
            now = self._times[min(bisect_left(self._ends, end), len(self._times) - 1)]
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    self._event(json.loads(line[6:]), now)

    def _event(self, event: dict[str, Any], now: float) -> None:
        found = self._found
        if "error" in event:
            found.error = str(event["error"])
        for choice in event.get("choices") or ():
            if text := choice.get("text"):
                found.times.append(now)
                found.text += text
        found.usage = event.get("usage") or found.usage


async def stream(
    port: int, body: dict[str, Any], *, path: str = "/v1/completions", until: Callable[[Stream], bool] | None = None
) -> Stream:
    """A streamed answer of `/v1/completions`, to its end, or until something is true, when the client hangs up."""
    found = Stream(sent=time.perf_counter())
    connection = Connection(port)
    try:
        await connection.open("POST", path, body | {"stream": True, "stream_options": {"include_usage": True}})
        found.status = connection.status
        if found.status != 200:
            found.error = (await connection.body()).decode("utf-8", "replace")
            return found
        arrivals = _Arrivals(found, "chunked" in connection.headers.get("transfer-encoding", ""))
        while part := await connection.take(1 << 16):
            arrivals.add(part)
            if until is not None and until(found):
                break
        arrivals.settle()
    finally:
        connection.close()
    return found
