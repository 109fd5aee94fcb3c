"""A small web server on the loopback interface, for tests of downloads."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Site:
    """What the server serves, how it misbehaves, and what it was asked."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, dict[str, str]] = {}  # more headers, by path
        self.break_after: list[int] = []  # bytes after which the next answers break off
        self.ranges_work = True
        self.refuse: list[tuple[int, dict[str, str]]] = []  # status and headers of the next answers of a Hub
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.address = ""


@contextmanager
def serve() -> Iterator[Site]:
    """A site that is up while the body runs."""
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else a body waits for the headers before it to be acknowledged

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            wanted = self.headers.get("Range")
            site.asked.append((self.command, path, wanted))
            content = site.files.get(path)
            refusal = (404, site.headers.get(path, {})) if content is None else None
            if site.refuse and ("/models/" in path or "/resolve/" in path):  # the Hub's library asks for more
                refusal = site.refuse.pop(0)
            if content is None or refusal:
                self.send_response(refusal[0] if refusal else 404)
                for name, value in (refusal[1] if refusal else {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            status, start = 200, 0
            etag = f'"{len(content)}-{content[-4:].hex()}"'
            fresh = self.headers.get("If-Range") in (None, etag)
            if wanted and site.ranges_work and fresh:
                start = int(wanted.removeprefix("bytes=").partition("-")[0])
                status = 206 if start < len(content) else 416
            body = content[start:]
            self.send_response(status)
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", etag)
            for name, value in site.headers.get(path, {}).items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                if site.break_after:
                    body = body[: site.break_after.pop(0)]
                    self.close_connection = True
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def add_repository(site: Site, repo: str, files: dict[str, bytes], card: dict[str, str] | None = None) -> None:
    """Serves a repository as the Hub does: its listing, with what its card says, and its files with their commit and
    checksum."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    siblings = [
        {
            "rfilename": name,
            "size": len(content),
            "blobId": "0" * 40,
            "lfs": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 134},
        }
        for name, content in files.items()
    ]
    facts = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings} | ({"cardData": card} if card else {})
    listing = json.dumps(facts).encode()
    for path in (f"/api/models/{repo}", f"/api/models/{repo}/revision/main"):
        site.files[path] = listing
        site.headers[path] = {"Content-Type": "application/json"}
    for name, content in files.items():
        path = f"/{repo}/resolve/{commit}/{name}"
        site.files[path] = content
        site.headers[path] = {
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(len(content)),
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
        }


def run_with_hub(site: Site, *arguments: str) -> subprocess.CompletedProcess[str]:
    """qrun with the site as the Hub."""
    return python_with_hub(site, "-m", "qrun.cli.main", *arguments)


def python_with_hub(site: Site, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the site as the Hub; in a process of its own, since the Hub's library reads HF_ENDPOINT when it is
    imported."""
    environment = os.environ | {
        "HF_ENDPOINT": site.address, "HF_HOME": os.environ["QRUN_HOME"] + "/hf", "HF_HUB_DISABLE_TELEMETRY": "1"
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
