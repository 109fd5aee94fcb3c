"""A server in a thread of its own, for programs that do something else besides."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

import uvicorn

from qrun.server.app import Application, app
from qrun.server.hub import Source

if TYPE_CHECKING:
    from qrun.engine import Model

_LAST_WORDS = 1  # seconds in which answers may end once the server is to


def config(application: Application, **more: Any) -> uvicorn.Config:
    """How uvicorn runs the application: all names of its parts are given, so that packers see them, and nothing is
    logged but what the application logs."""
    return uvicorn.Config(
        application,
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_LAST_WORDS,
        **more,
    )


class Listener(uvicorn.Server):
    """uvicorn's server, which ends answers under way when it is to end."""

    def __init__(self, application: Application, settings: uvicorn.Config) -> None:
        super().__init__(settings)
        self._application = application

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._application.stop()
        await super().shutdown(sockets)


class Server:
    """models and settings are those of `app`. `start` returns the URL; a `with` statement starts and stops."""

    def __init__(
        self, models: Iterable[Source | Model] | Mapping[str, Source | Model] | Source | Model, **settings: Any
    ) -> None:
        self.application = app(models, **settings)
        self.url = ""
        """Where it listens, once it does."""
        self._thread: threading.Thread | None = None
        self._listener: Listener | None = None

    def start(self, port: int = 0, host: str = "127.0.0.1") -> str:
        """Listen, and return the URL. Port 0 takes one that is free. OSError where the port is taken."""
        if self._thread is not None:
            raise RuntimeError("the server runs already")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((host, port))
            bound.listen(128)
        except BaseException:
            bound.close()
            raise
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{bound.getsockname()[1]}"
        self._listener = Listener(self.application, config(self.application))
        listener = self._listener

        def serve() -> None:
            asyncio.run(listener.serve(sockets=[bound]))

        self._thread = threading.Thread(target=serve, name="qrun server", daemon=True)
        self._thread.start()
        return self.url

    def stop(self) -> None:
        """End answers under way and listen no more; models that the server has loaded are freed."""
        if self._thread is None or self._listener is None:
            return
        self._listener.should_exit = True
        self._thread.join()
        self._thread = self._listener = None
        self.application.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
