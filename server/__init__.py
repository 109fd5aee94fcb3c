"""Serves models over HTTP, as OpenAI's clients and others expect it. Needs the extra `qrun-gguf[server]`.

    from qrun.server import Server

    with Server(["model.gguf"]) as server:
        print(server.url)

`app` gives the ASGI application alone, to mount in another one.
"""

from qrun.server.app import Application, app
from qrun.server.settings import Settings
from qrun.server.thread import Server

__all__ = ["Application", "Server", "Settings", "app"]
