"""HTTP connections: uvicorn's, but for clients that send their request, close their side and read on; and for those
that hold connections for which they have no use."""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_LOOKS = (0.05, 0.05, 0.2, 1.0)  # seconds between looks at whether such a client is there; the last from then on
_UNREAD_SECONDS = 300  # for which a client may read nothing of an answer that it is sent
_OTHER_FILES = 64  # that the process may have open, besides connections
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 2\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def most_connections() -> int | None:
    """How many there may be at a time; None where the system sets no limit. Beyond it no model could be opened, nor any
    connection accepted."""
    if sys.platform == "win32":
        return None
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if files == resource.RLIM_INFINITY else max(files - _OTHER_FILES, files // 2)


class Connection(H11Protocol):
    """One connection.

    A client that closes its side may have gone altogether: both look the same. So it is sent an interim answer, which
    clients that are there pass over, and which the system of one that has gone refuses.

    A request has to begin, and its head to end, within the time that a connection is kept for one; each part of its
    body has to follow the part before within that time. Where there are too many connections, the one that has been
    without a request for longest goes.
    """

    _patience: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _idle_since = 0.0
    """Since when there is no request, while there is none."""

    @property
    def _idle(self) -> bool:
        return self.cycle is None or bool(self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_client()
        most = most_connections()
        if most is not None and len(self.connections) > most:
            idle: list[Connection] = [one for one in self.connections if isinstance(one, Connection) and one._idle]
            oldest = min(idle, key=lambda one: one._idle_since)  # there is one: this
            if oldest is self:
                transport.write(_BUSY)
            self.connections.discard(oldest)  # several may come before it has ended
            oldest.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._patience, self._unread):
            if timer is not None:
                timer.cancel()
        self._patience = self._unread = None

    def data_received(self, data: bytes) -> None:
        was_idle = self._idle
        super().data_received(data)
        if not (was_idle and self._idle):  # parts of a head give no more time
            self._await_client()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_client()

    def _await_client(self) -> None:
        """From now on, it is the client's turn, or no longer."""
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        if self._idle:
            self._idle_since = self.loop.time()
        if (self._idle or self.cycle.more_body) and not self.transport.is_closing():
            self._patience = self.loop.call_later(self.timeout_keep_alive, self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(_UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """True keeps the way to the client open."""
        cycle = self.cycle
        if self.scheme == "https" or cycle is None or cycle.more_body or cycle.response_complete:
            return None
        if cycle.response_started and not self.scope["state"].get("pings"):
            return None  # nobody would notice for long that the client has gone
        cycle.keep_alive = False  # nothing more will come
        self._look_later(cycle, 0)
        return True

    def _look_later(self, cycle: Any, number: int) -> None:
        seconds = _LOOKS[min(number, len(_LOOKS) - 1)]
        asyncio.get_running_loop().call_later(seconds, self._look, cycle, number)

    def _look(self, cycle: Any, number: int) -> None:
        """Let go of a client that has gone, now or later, until it has its answer."""
        if self.transport.is_closing() or cycle.response_complete:
            return
        if number == 0 and not cycle.response_started and self.scope["http_version"] == "1.1":
            self.transport.write(self.conn.send(h11.InformationalResponse(status_code=100, headers=[])))
        connected = self.transport.get_extra_info("socket")
        if connected is not None and connected.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
            return
        self._look_later(cycle, number + 1)
