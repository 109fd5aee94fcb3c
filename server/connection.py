"""HTTP connections: uvicorn's, but for clients that send their request, close their side and read on."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_LOOKS = (0.05, 0.05, 0.2, 1.0)  # seconds between looks at whether such a client is there; the last from then on


class Connection(H11Protocol):
    """One connection.

    A client that closes its side may have gone altogether: both look the same. So it is sent an interim answer, which
    clients that are there pass over, and which the system of one that has gone refuses.
    """

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
