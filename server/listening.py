"""Listening: sockets, uvicorn's settings, and how a server begins and ends."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn

from qrun.server.app import Application
from qrun.server.connection import Connection

log = logging.getLogger("qrun.server")

_LAST_WORDS = 1  # seconds in which answers may end once the server is to
_SILENCE = 60  # seconds between two lines that say the same


def config(application: Application, certificate: tuple[Path, Path] | None = None) -> uvicorn.Config:
    """How uvicorn runs the application: all its parts are named, and nothing is logged but what the application
    logs."""
    more: dict[str, Any] = {}
    if certificate is not None:
        check_certificate(*certificate)
        more = {"ssl_certfile": os.fspath(certificate[0]), "ssl_keyfile": os.fspath(certificate[1])}
    return uvicorn.Config(
        application,
        http=Connection,
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


def check_certificate(certificate: Path, key: Path) -> None:
    """Raises OSError or ValueError, naming the file, unless both can be read and go together."""
    import ssl

    for path in (certificate, key):
        path.read_bytes()
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except ssl.SSLError:
        raise ValueError(f"{certificate}: no certificate in PEM that goes with the key in {key}") from None


class Listener(uvicorn.Server):
    """uvicorn's server, which ends answers under way when it is to end."""

    def __init__(self, application: Application, settings: uvicorn.Config) -> None:
        super().__init__(settings)
        self._application = application
        self.signals: list[int] = []
        """Those that have ended it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            try:
                yield
            finally:  # uvicorn would raise them again, in the event loop
                self.signals = list(self._captured_signals)
                self._captured_signals.clear()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(_FewFiles())
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._application.stop()
        await super().shutdown(sockets)


class _FewFiles:
    """What an event loop does about errors that nobody handles: when no more files can be opened, asyncio tells so some
    thousand times a second, and this once a minute."""

    def __init__(self) -> None:
        self._said = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif loop.time() >= self._said + _SILENCE:
            self._said = loop.time()
            log.error("connections wait: %s", error.strerror)


def bind(host: str, port: int, path: Path | None = None, *, secure: bool = False) -> tuple[socket.socket, str]:
    """A socket that listens, and its URL. OSError, naming the address, where it is taken."""
    if path is not None:
        if not hasattr(socket, "AF_UNIX"):
            raise OSError("this system has no sockets in the file system")
        with suppress(FileNotFoundError):
            if stat.S_ISSOCK(path.stat().st_mode) and not _answers(path):
                path.unlink()  # of a server that ended without a word
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        address: Any = os.fspath(path)
    else:
        bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        if os.name == "posix":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        address = (host, port)
    try:
        if path is not None:
            before = os.umask(0o177)  # for this user alone
            try:
                bound.bind(address)
            finally:
                os.umask(before)
        else:
            bound.bind(address)
        bound.listen(2048)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        shown = os.fspath(path) if path is not None else f"{host}:{port}"
        raise OSError(error.errno, error.strerror or str(error), shown) from None
    if path is not None:
        return bound, f"unix:{path}"
    name = f"[{host}]" if ":" in host else host
    return bound, f"{'https' if secure else 'http'}://{name}:{bound.getsockname()[1]}"


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False
        return True


async def serve(
    application: Application,
    bound: socket.socket,
    *,
    certificate: tuple[Path, Path] | None = None,
    end: asyncio.Event | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> int | None:
    """Serve until a signal comes, which is returned, or `end` is set. The first model is loaded meanwhile; what is
    wrong with it is raised and ends the server. on_ready: called when it has been loaded."""
    listener = Listener(application, config(application, certificate))
    listening = asyncio.create_task(listener.serve(sockets=[bound]))
    state = application.state
    state.hub.is_ready = False
    loading = asyncio.create_task(_load_first(application, on_ready))
    ending = asyncio.create_task(end.wait()) if end is not None else None
    waited: set[asyncio.Task[Any]] = {listening, loading, *([ending] if ending is not None else [])}
    try:
        while not listening.done():
            done, waited = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            failed = loading in done and not loading.cancelled() and loading.exception() is not None
            if failed or (ending is not None and ending in done):
                listener.should_exit = True
                waited = {listening}
        await listening
        if loading.done():
            loading.result()
        return listener.signals[0] if listener.signals else None
    finally:
        loading.cancel()
        if ending is not None:
            ending.cancel()


async def _load_first(application: Application, on_ready: Callable[[], None]) -> None:
    hub = application.state.hub
    first = hub.default
    if first is not None and first.model is None and not hub.is_lazy(first):
        await hub.load(first, plainly=True)
        hub.expire_later(first)
    hub.is_ready = True
    on_ready()
