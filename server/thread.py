"""A server in a thread of its own, for programs that do something else besides."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

from qrun.server.app import app
from qrun.server.hub import Source
from qrun.server.listening import Listener, bind, config

if TYPE_CHECKING:
    from qrun.engine import Model


class Server:
    """models and settings are those of `app`. `start` returns the URL; a `with` statement starts and stops."""

    def __init__(
        self, models: Iterable[Source | Model] | Mapping[str, Source | Model] | Source | Model, **settings: Any
    ) -> None:
        self.application = app(models, **settings)
        """What is served."""
        self.url = ""
        """Where it listens, once it does."""
        self._thread: threading.Thread | None = None
        self._listener: Listener | None = None

    def start(self, port: int = 0, host: str = "127.0.0.1") -> str:
        """Listen, and return the URL. Port 0 takes one that is free. OSError where the port is taken."""
        if self._thread is not None:
            raise RuntimeError("the server runs already")
        bound, self.url = bind(host, port)
        listener = self._listener = Listener(self.application, config(self.application))
        self._thread = threading.Thread(
            target=lambda: asyncio.run(listener.serve(sockets=[bound])), name="qrun server", daemon=True
        )
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
