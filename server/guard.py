"""Who may call the server: names of hosts, origins of pages, keys."""

from __future__ import annotations

import fnmatch
import hmac
import time
import uuid
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders

from qrun.server.errors import APIError, path_of, shape_of
from qrun.server.settings import Settings

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1", "[::1]")
# Pages of apps on this machine: schemes that no web site can have.
_LOCAL_SCHEMES = ("app", "tauri", "vscode-webview", "vscode-file", "file")
_OPEN_PATHS = frozenset({"/", "/health", "/v1/health", "/ping", "/favicon.ico"})
_MAX_AGE = "86400"


def host_name(value: str) -> str:
    """The name in a Host header, without port, in lower case."""
    value = value.strip().lower()
    if value.startswith("["):
        return value.partition("]")[0] + "]"
    return value.rpartition(":")[0] if value.count(":") == 1 else value


class Guard:
    """Looks at each request before the application does, and writes one line about it afterwards."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        given_id = headers.get("x-request-id", "")
        request_id = given_id if given_id.isascii() and given_id.isprintable() and 0 < len(given_id) <= 128 else ""
        request_id = request_id or uuid.uuid4().hex
        knows_origin = origin is not None and self._knows_origin(origin, headers)
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                marked = MutableHeaders(scope=message)
                marked["x-request-id"] = request_id
                if origin is not None and knows_origin:
                    marked["access-control-allow-origin"] = origin
                    marked["access-control-expose-headers"] = "x-request-id, retry-after"
                    marked.add_vary_header("Origin")
            await send(message)

        try:
            error = self._refusal(scope, headers, None if knows_origin else origin)
            if error is not None:
                await self._answer(scope, error, send_marked)
            elif scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await self._preflight(headers, send_marked)
            else:
                await self._app(scope, receive, send_marked)
        finally:
            if self._settings.log is not None:
                milliseconds = (time.perf_counter() - start) * 1e3
                shown = scope["path"] if scope["path"].isprintable() else repr(scope["path"])
                self._settings.log(f"{scope['method']} {shown[:200]} {status or 'gone'} {milliseconds:.0f} ms")

    def _refusal(self, scope: Scope, headers: Headers, strange_origin: str | None) -> APIError | None:
        host = headers.get("host", "")
        if not self._knows_host(host):
            return APIError(
                f"the host name {host_name(host)!r} is not known here: --allow-host can name it", 403,
                "permission_error", code="host_not_allowed",
            )  # fmt: skip
        if strange_origin is not None:
            return APIError(
                f"pages of {strange_origin!r} may not call this server: --allow-origin can name it", 403,
                "permission_error", code="origin_not_allowed",
            )  # fmt: skip
        is_preflight = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        path = path_of(scope)
        is_open = path in _OPEN_PATHS or path.startswith("/static/")
        if self._keys and not is_preflight and not is_open and not self._has_key(headers):
            return APIError(
                "an API key is wanted: Authorization: Bearer KEY, or X-Api-Key: KEY", 401, "authentication_error",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        return None

    def _knows_host(self, value: str) -> bool:
        name = host_name(value)
        allowed = self._settings.allow_hosts
        if name in _LOCAL_NAMES or name.endswith(".localhost") or not name:
            return True
        if self._settings.public and not allowed:
            return True
        return any(fnmatch.fnmatchcase(name, one.lower()) for one in allowed)

    def _knows_origin(self, origin: str, headers: Headers) -> bool:
        if any(fnmatch.fnmatchcase(origin.lower(), one.lower()) for one in self._settings.allow_origins):
            return True
        try:
            parts = urlsplit(origin)
            name = parts.hostname or ""
        except ValueError:
            return False
        if parts.scheme in _LOCAL_SCHEMES:
            return True
        if parts.scheme not in ("http", "https"):
            return False
        return name in _LOCAL_NAMES or name.endswith(".localhost") or (
            parts.netloc.lower() == headers.get("host", "").lower()  # the server's own page
        )

    def _has_key(self, headers: Headers) -> bool:
        kind, _, token = headers.get("authorization", "").partition(" ")
        given = [token.strip()] if kind.lower() == "bearer" else []
        given += [headers[name] for name in ("x-api-key", "api-key") if name in headers]
        right = False
        for one in given:
            for key in self._keys:  # all of them, so that the time tells nothing
                right |= hmac.compare_digest(one.encode("utf-8", "replace"), key)
        return right

    async def _preflight(self, headers: Headers, send: Send) -> None:
        answer = MutableHeaders()
        answer["access-control-allow-methods"] = "GET, POST, DELETE, HEAD, OPTIONS"
        asked = headers.get("access-control-request-headers", "")
        answer["access-control-allow-headers"] = asked or "authorization, content-type, x-api-key"
        answer["access-control-max-age"] = _MAX_AGE
        if headers.get("access-control-request-private-network") == "true":
            answer["access-control-allow-private-network"] = "true"
        answer["content-length"] = "0"
        await send({"type": "http.response.start", "status": 204, "headers": answer.raw})
        await send({"type": "http.response.body", "body": b""})

    async def _answer(self, scope: Scope, error: APIError, send: Send) -> None:
        from qrun.server.exchange import encode

        body = encode(shape_of(scope)(error))
        raw = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        raw += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
        await send({"type": "http.response.start", "status": error.status, "headers": raw})
        await send({"type": "http.response.body", "body": body})
