"""Opening addresses: with the proxies and certificates that the user's settings name, and passwords out of sight."""

from __future__ import annotations

import base64
import contextlib
import functools
import netrc
import os
import ssl
import urllib.parse
import urllib.request
from collections.abc import Mapping
from http.client import HTTPResponse

TIMEOUT_SECONDS = 60

# Where users of other programs have said which authorities they trust. OpenSSL heeds SSL_CERT_FILE by itself.
_CERTIFICATES = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def open_url(
    url: str, headers: Mapping[str, str] | None = None, *, method: str = "GET", proxy: str | None = None
) -> HTTPResponse:
    """The answer of a server. A user and password in the address, or the user's .netrc, are sent to that host alone.

    proxy: in place of those that the environment or the system names. Raises OSError (of which HTTPError is one) or
    HTTPException.
    """
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=_trust())]
    if proxy:
        handlers.append(urllib.request.ProxyHandler({"http": proxy, "https": proxy}))
    request = urllib.request.Request(
        without_password(url),
        headers={"User-Agent": "qrun", "Accept-Encoding": "identity", **(headers or {})},
        method=method,
    )
    if authorization := _authorization(url):
        request.add_unredirected_header("Authorization", authorization)
    answer: HTTPResponse = urllib.request.build_opener(*handlers).open(request, timeout=TIMEOUT_SECONDS)
    return answer


def without_password(url: str) -> str:
    """The address without a user and password."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def with_password_of(url: str, other: str) -> str:
    """The address with the user and password of another one, if it is on the same host and has none."""
    parts, others = urllib.parse.urlsplit(url), urllib.parse.urlsplit(other)
    user, at, host = others.netloc.rpartition("@")
    if "@" in parts.netloc or (parts.scheme, parts.netloc) != (others.scheme, host):
        return url
    return urllib.parse.urlunsplit(parts._replace(netloc=user + at + host))


def _authorization(url: str) -> str | None:
    parts = urllib.parse.urlsplit(url)
    user, password = parts.username, parts.password
    if user is None and parts.hostname and parts.scheme == "https":
        with contextlib.suppress(OSError, netrc.NetrcParseError, KeyError):
            found = netrc.netrc(os.environ.get("NETRC")).authenticators(parts.hostname)
            if found:
                user, password = found[0], found[2]
    if user is None:
        return None
    words = ":".join(urllib.parse.unquote(word or "") for word in (user, password))
    return "Basic " + base64.b64encode(words.encode()).decode()


def _trust() -> ssl.SSLContext:
    """The authorities that are trusted: the system's, those of a file that the user names, and where the system's are
    not found, as in apps that were packed on another system, certifi's."""
    paths = tuple(filter(None, map(os.environ.get, _CERTIFICATES)))
    return _context(paths, os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@functools.lru_cache(maxsize=4)
def _context(paths: tuple[str, ...], *_of_openssl: str | None) -> ssl.SSLContext:
    """Reading all authorities takes 50 ms: once for all addresses."""
    context = ssl.create_default_context()
    for path in paths:
        with contextlib.suppress(OSError):
            context.load_verify_locations(**{"capath" if os.path.isdir(path) else "cafile": path})
    if not context.cert_store_stats()["x509_ca"]:
        with contextlib.suppress(ImportError, OSError):
            import certifi

            context.load_verify_locations(certifi.where())
    return context
