"""How a server behaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `app` and `Server` take as keyword arguments. The defaults are safe for a server on this machine alone."""

    api_keys: tuple[str, ...] = ()
    """Keys of which a request has to show one; none asks for no key."""
    allow_hosts: tuple[str, ...] = ()
    """More names by which clients may call the server, "*" for any. Names of this machine's own loopback always may."""
    allow_origins: tuple[str, ...] = ()
    """More origins whose pages may call the server, such as "https://example.org" or "chrome-extension://*"; "*" for
    any."""
    public: bool = False
    """Whether the server is bound to more than the loopback: then any host name may be called, unless `allow_hosts`
    names some."""
    max_body: int = 100 << 20
    """The most bytes of a request's body."""
    max_queue: int = 256
    """The most requests that wait for their turn; more are answered with 503."""
    parallel: int = 32
    """The most requests that are computed at a time."""
    stored_bytes: int = 64 << 20
    """The most memory for answers of `/v1/responses` that later requests go on from; 0 keeps none."""
    ping_seconds: float = 1.0
    """How long a stream may be silent before it says that it lives."""
    ttl: float | None = None
    """Seconds after which a model that nobody uses is unloaded."""
    most_loaded: int | None = None
    """The most models that are loaded at a time."""
    models_dir: Path | None = None
    """A folder, all of whose models are served, loaded when they are asked for."""
    with_store: bool = False
    """Serve all models of the store, and fetch and delete them there for clients of Ollama's interface."""
    always_usage: bool = False
    """Send usage at the end of every stream, also where it was not asked for."""
    log: Callable[[str], None] | None = None
    """Gets a line about each request: never what is in it."""
