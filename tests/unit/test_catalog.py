"""The catalog and the store: names, places, what may be deleted."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
from pathlib import Path

import pytest

from qrun.formats.samples import samples
from qrun.models import store
from qrun.models.catalog import CATALOG, DEFAULT_MODEL, NotPulled, catalog_entry, entry_of_file, resolve


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's data folder that is new for every test."""
    monkeypatch.setenv("QRUN_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def put(relative: str, content: bytes = b"GGUF....") -> Path:
    path = store.models_folder() / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_the_default_model_is_in_the_catalog() -> None:
    assert DEFAULT_MODEL in CATALOG


@pytest.mark.parametrize("entry", CATALOG.values(), ids=lambda entry: entry.name)
def test_entries_are_pinned(entry) -> None:
    assert len(bytes.fromhex(entry.sha256)) == 32
    assert all("==" in member.requirement for member in entry.source)
    assert len(bytes.fromhex(entry.samples)) == 32
    assert entry.licence
    assert catalog_entry(entry.name.upper()) is entry


def test_a_file_of_the_catalog_is_known_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(300_000)
    (tmp_path / "a").write_bytes(content)
    digest = hashlib.sha256(b"".join(samples(tmp_path / "a"))).hexdigest()
    entry = dataclasses.replace(CATALOG[DEFAULT_MODEL], size=len(content), samples=digest)
    monkeypatch.setitem(CATALOG, entry.name, entry)
    assert entry_of_file(tmp_path / "a") is entry
    os.rename(tmp_path / "a", tmp_path / "b.gguf")
    assert entry_of_file(tmp_path / "b.gguf") is entry
    # as long, but another: a model that was fine-tuned, say
    (tmp_path / "c").write_bytes(content[:100_000] + os.urandom(100_000) + content[200_000:])
    assert entry_of_file(tmp_path / "c") is None
    (tmp_path / "d").write_bytes(content + b"1")
    assert entry_of_file(tmp_path / "d") is None
    assert entry_of_file(tmp_path / "missing") is None


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert store.home() == tmp_path / "home"
    monkeypatch.delenv("QRUN_HOME")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert store.home() == tmp_path / "data" / "qrun"


def test_resolve_takes_a_path_first(tmp_path: Path) -> None:
    (tmp_path / DEFAULT_MODEL).write_bytes(b"GGUF")
    assert resolve(DEFAULT_MODEL) == Path(DEFAULT_MODEL)


def test_resolve_finds_catalog_names_once_they_are_pulled() -> None:
    with pytest.raises(NotPulled, match=f"qrun pull {DEFAULT_MODEL}"):
        resolve(DEFAULT_MODEL.lower())
    path = put(CATALOG[DEFAULT_MODEL].file_name)
    assert resolve(DEFAULT_MODEL) == path


def test_resolve_finds_stored_models_by_full_name_or_last_part() -> None:
    path = put("org/repo/model-Q4_K_M.gguf")
    for name in ("org/repo/model-Q4_K_M", "model-q4_k_m", "model-Q4_K_M.gguf", "repo/model-Q4_K_M"):
        assert resolve(name) == path
    put("other/model-Q4_K_M.gguf")
    with pytest.raises(FileNotFoundError):  # two models end like this
        resolve("model-Q4_K_M")


def test_resolve_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file, and no model of this name"):
        resolve("nonsense")
    with pytest.raises(FileNotFoundError, match="no such file") as caught:
        resolve("folder/nonsense.gguf")
    assert caught.value.filename == "folder/nonsense.gguf"
    with pytest.raises(IsADirectoryError):
        resolve(tmp_path)


def test_a_split_model_is_listed_once_and_only_when_whole() -> None:
    first = put("org/big-00001-of-00002.gguf", b"GGUF")
    assert store.stored_models() == []
    second = put("org/big-00002-of-00002.gguf", b"more")
    (model,) = store.stored_models()
    assert model == store.StoredModel("org/big", first, (first, second))
    assert model.size == 8


def test_remove_deletes_a_model_and_the_folders_that_become_empty() -> None:
    put("org/repo/a.gguf")
    put("org/b.gguf")
    model = store.find_stored("org/repo/a")
    assert model is not None
    assert store.remove(model) == 8
    assert [left.name for left in store.stored_models()] == ["org/b"]
    assert not (store.models_folder() / "org" / "repo").exists()


def test_a_staging_folder_goes_when_its_work_is_done_and_stays_when_it_is_not() -> None:
    target = store.models_folder() / "m.gguf"
    with pytest.raises(RuntimeError), store.staging(target) as folder:
        (folder / "m.gguf.part").write_bytes(b"x" * 100)
        raise RuntimeError
    assert (folder / "m.gguf.part").exists()
    assert store.partial_bytes() > 0
    assert store.stored_models() == []
    with store.staging(target) as folder:
        assert (folder / "m.gguf.part").exists()
    assert not folder.exists()


def test_a_second_pull_waits_for_the_first_and_says_so() -> None:
    target = store.models_folder() / "m.gguf"
    order: list[str] = []
    said = threading.Event()

    def second() -> None:
        with store.staging(target, lambda text: said.set()):
            order.append("second")

    thread = threading.Thread(target=second)
    with store.staging(target):
        thread.start()
        assert said.wait(60)
        assert store.remove_partial() == 0  # what is under way is spared
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]


def test_interrupted_downloads_can_be_deleted() -> None:
    with pytest.raises(RuntimeError), store.staging(store.models_folder() / "m.gguf") as folder:
        (folder / "m.gguf.part").write_bytes(os.urandom(10_000))
        raise RuntimeError
    assert store.remove_partial() > 0
    assert store.partial_bytes() == 0


def test_too_little_space_is_said_before_anything_is_fetched() -> None:
    with pytest.raises(store.PullError, match="are needed"):
        store.check_space(1 << 60)


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.gguf"
    page.write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(store.PullError, match="not a GGUF file"):
        store.check_magic(page, "https://example.org/page.gguf")
    assert not page.exists()


def test_a_home_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("QRUN_HOME", str(tmp_path / "file" / "home"))
    assert store.stored_models() == []
    with (
        pytest.raises(store.PullError, match=r"no model can be kept in .*models: .*QRUN_HOME can name another"),
        store.staging(store.models_folder() / "model.gguf"),
    ):
        pass
    with pytest.raises(store.PullError, match="QRUN_HOME"):
        store.check_space(1)


def test_folders_of_the_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QRUN_HOME")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", "relative")  # to be ignored, by the specification
    assert store.home() == tmp_path / ".local" / "share" / "qrun"
    monkeypatch.setenv("QRUN_HOME", "~/models")
    assert store.home() == tmp_path / "models"
    monkeypatch.setenv("QRUN_HOME", "here")
    assert store.home() == Path.cwd() / "here"
