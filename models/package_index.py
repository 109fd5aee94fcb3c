"""Wheels from a package index where there is no pip to ask: in a packed app, or an environment that uv has made.

The simple interface of an index (https://packaging.python.org/specifications/simple-repository-api), as JSON or HTML.
Of pip's settings, and uv's, those that say where packages come from are heeded.
"""

from __future__ import annotations

import configparser
import contextlib
import http.client
import json
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from qrun.formats.dataclass import dataclass
from qrun.models.store import PullError
from qrun.models.web import open_url, with_password_of, without_password

DEFAULT_INDEX = "https://pypi.org/simple"
_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_MOST_BYTES = 64 << 20  # of a page of an index


@dataclass(frozen=True)
class Wheel:
    """A file of an index. sha256: in hex, if the index gives it."""

    file_name: str
    url: str
    sha256: str | None


@dataclass(frozen=True)
class Settings:
    """Where packages come from. links: folders, or pages, that hold wheels themselves."""

    indexes: tuple[str, ...]
    links: tuple[str, ...] = ()
    proxy: str | None = None


def find_wheel(requirement: str, settings: Settings) -> Wheel:
    """The wheel for any system of a package, given as `name==version`. PullError, one line, if there is none."""
    name, _, version = requirement.partition("==")
    wanted = re.compile(rf"{_normalized(name)}-{re.escape(version)}(-\d[^-]*)?-[^-]+-none-any\.whl", re.IGNORECASE)
    problems: list[str] = []
    for place in settings.links:
        for wheel in _of_link(place, problems):
            if wanted.fullmatch(wheel.file_name):
                return wheel
    for index in settings.indexes:
        page = f"{index.rstrip('/')}/{_normalized(name).replace('_', '-')}/"
        for wheel in _of_page(page, settings.proxy, problems):
            if wanted.fullmatch(wheel.file_name):
                return wheel
    places = ", ".join(map(without_password, (*settings.indexes, *settings.links)))
    reason = problems[0] if problems else f"not in {places}" if places else "settings of pip forbid every index"
    raise PullError(f"{requirement}: {reason}")


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def _of_link(place: str, problems: list[str]) -> Iterator[Wheel]:
    """The wheels of a folder or a page."""
    path = Path(urllib.request.url2pathname(urllib.parse.urlsplit(place).path) if place.startswith("file:") else place)
    if path.is_dir():
        for file in sorted(path.glob("*.whl")):
            yield Wheel(file.name, file.absolute().as_uri(), None)
    elif place.startswith(("http:", "https:")):
        yield from _of_page(place, None, problems)


def _of_page(page: str, proxy: str | None, problems: list[str]) -> Iterator[Wheel]:
    """The wheels that a page of an index names. What is wrong with it is added to `problems`."""
    shown = without_password(page)
    try:
        if page.startswith("file:"):
            page += "index.html" if page.endswith("/") else ""
        with open_url(page, {"Accept": _ACCEPT}, proxy=proxy) as answer:
            content, kind, base = answer.read(_MOST_BYTES), answer.headers.get_content_type(), answer.url or page
        yield from _read_json(content, base, page) if kind.endswith("json") else _read_html(content, base, page)
    except urllib.error.HTTPError as error:
        with error:
            if error.code != 404:  # then it has no such package
                problems.append(f"{shown}: the server answers {error.code} {error.reason}")
    except (OSError, http.client.HTTPException) as error:
        if not (isinstance(error, urllib.error.URLError) and isinstance(error.reason, FileNotFoundError)):
            problems.append(f"{shown}: {getattr(error, 'reason', None) or error or type(error).__name__}")
    except (ValueError, KeyError, TypeError, AttributeError):
        problems.append(f"{shown}: no page of a package index")


def _read_json(content: bytes, base: str, page: str) -> Iterator[Wheel]:
    for file in json.loads(content)["files"]:
        url = urllib.parse.urljoin(base, file["url"])
        yield Wheel(str(file["filename"]), with_password_of(url, page), file.get("hashes", {}).get("sha256"))


def _read_html(content: bytes, base: str, page: str) -> Iterator[Wheel]:
    links = _Links()
    links.feed(content.decode("utf-8", "replace"))
    for link in links.found:
        url, _, fragment = urllib.parse.urljoin(base, link).partition("#")
        digest = re.search(r"sha256=([0-9a-fA-F]{64})", fragment)
        name = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])
        yield Wheel(name, with_password_of(url, page), digest[1].lower() if digest else None)


class _Links(HTMLParser):
    """What a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def read_settings() -> Settings:
    """Those of pip's variables and files, and of uv's variables; else the usual index."""
    files = _pip_files()

    def value(name: str, *others: str) -> str | None:
        variables = (f"PIP_{name.upper().replace('-', '_')}", *others)
        return next(filter(None, map(os.environ.get, variables)), None) or files.get(name)

    index = value("index-url", "UV_DEFAULT_INDEX", "UV_INDEX_URL") or DEFAULT_INDEX
    more = value("extra-index-url", "UV_INDEX", "UV_EXTRA_INDEX_URL") or ""
    # uv's may have names before them: NAME=https://...
    indexes = [re.sub(r"^[\w.-]+=(?=\w+://)", "", one) for one in (index, *more.split())]
    if (value("no-index") or "").lower() in ("1", "true", "yes", "on", "y", "t"):
        indexes = []
    return Settings(tuple(indexes), tuple((value("find-links") or "").split()), value("proxy"))


def _pip_files() -> dict[str, str]:
    """What pip's own files say, the user's above those of the system."""
    found: dict[str, str] = {}
    for path in _pip_paths():
        parser = configparser.RawConfigParser()
        with contextlib.suppress(OSError, configparser.Error, UnicodeDecodeError):
            parser.read(path, encoding="utf-8")
            for section in ("global", "download"):
                if parser.has_section(section):
                    found |= {name.replace("_", "-"): text for name, text in parser.items(section) if text}
    return found


def _pip_paths() -> list[Path]:
    """Where pip looks, what counts more behind what counts less."""
    chosen = os.environ.get("PIP_CONFIG_FILE")
    if chosen == os.devnull:
        return []
    home = Path(os.path.expanduser("~"))
    name = "pip.ini" if sys.platform == "win32" else "pip.conf"
    if sys.platform == "win32":
        system = [Path(os.environ.get("PROGRAMDATA", "C:/ProgramData"))]
        user = [home / "pip", Path(os.environ.get("APPDATA", home)) / "pip"]
        paths = [*(folder / "pip" for folder in system), *user]
    elif sys.platform == "darwin":
        paths = [Path("/Library/Application Support/pip"), home / ".pip", home / ".config/pip",
                 home / "Library/Application Support/pip"]  # fmt: skip
    else:
        configured = os.environ.get("XDG_CONFIG_HOME") or home / ".config"
        shared = (os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":")
        paths = [*(Path(folder, "pip") for folder in reversed(shared)), Path("/etc"), home / ".pip",
                 Path(configured, "pip")]  # fmt: skip
    files = [*(folder / name for folder in paths), Path(sys.prefix) / name]
    return [*files, Path(chosen)] if chosen else files
