"""Where machine code is kept: what others could have put there is not used, and a disk is not needed."""

import errno
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from qrun.engine import CacheWarning
from qrun.engine.native import object_cache, workers
from qrun.engine.native.compiler import cache_folder, compile_kernels, load_images
from qrun.engine.simd.target import host_target
from qrun.models import store

posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """An empty cache, and the keys that are compiled: to their own names."""
    monkeypatch.setenv("QRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(object_cache, "_in_memory", {})
    monkeypatch.setattr(object_cache, "_said", set())
    keys: list[str] = []

    def compile_all(missing: list[str], target: object) -> Iterator[tuple[str, bytes]]:
        for key in missing:
            keys.append(key)
            yield key, key.encode()

    monkeypatch.setattr(workers, "compile_all", compile_all)
    return keys


def load(*keys: str) -> dict[str, bytes]:
    objects = load_images(keys, host_target())
    assert objects == {key: key.encode() for key in keys}
    return objects


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("place", ["a file", "under a file", "/proc"])
def test_without_a_place_kernels_are_held_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[str], place: str
) -> None:
    (tmp_path / "file").write_bytes(b"")
    places = {"a file": tmp_path / "file", "under a file": tmp_path / "file" / "cache", "/proc": "/proc/cache"}
    monkeypatch.setenv("QRUN_CACHE", str(places[place]))
    with pytest.warns(CacheWarning, match=r"compiled kernels are not kept: .*QRUN_CACHE can name another") as said:
        load("a", "b")
    assert len(said) == 1 and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("b", "a")
        load("c", "a")  # said once
    assert compiled == ["a", "b", "c"]
    with pytest.raises(OSError, match=r"compiled kernels cannot be kept: .*QRUN_CACHE can name another"):
        compile_kernels(["d"], host_target())


def test_without_a_home_kernels_are_held_in_memory(monkeypatch: pytest.MonkeyPatch, compiled: list[str]) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("QRUN_CACHE", "XDG_CACHE_HOME", "XDG_DATA_HOME", "QRUN_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.warns(CacheWarning, match="no home folder: QRUN_CACHE can name a folder instead$"):
        load("a")
    load("a")
    assert compiled == ["a"]
    with pytest.raises(OSError, match="no home folder: QRUN_HOME can name"):
        store.home()
    assert store.stored_models() == [] and store.partial_bytes() == 0


def test_a_disk_that_fills_up_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[str]
) -> None:
    replace, n_kept = os.replace, 0

    def fill_up(source: Path, target: Path) -> None:
        nonlocal n_kept
        if n_kept == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        n_kept += 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", fill_up)
    with pytest.warns(CacheWarning, match=r"b\.code: No space left on device") as said:
        load("a", "b", "c")
    assert len(said) == 1
    assert files(tmp_path / "cache") == ["a.code"]
    load("a", "b", "c")
    assert compiled == ["a", "b", "c"]


@posix
@pytest.mark.parametrize("mode", [0o777, 0o757, 0o775])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_folder_that_others_can_write_to_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, compiled: list[str], mode: int, depth: int
) -> None:
    monkeypatch.setattr(object_cache, "_is_own_group", lambda gid: False)
    load("a")
    folder = [cache_folder(host_target()), *cache_folder(host_target()).parents][depth]
    folder.chmod(mode)
    with pytest.warns(CacheWarning, match=rf"not kept: {folder}: other users may write to it \(chmod go-w"):
        load("a", "b")
    assert compiled == ["a", "a", "b"]
    assert files(cache_folder(host_target())) == ["a.code"]
    folder.chmod(0o755)
    monkeypatch.setattr(object_cache, "_in_memory", {})
    load("a")
    assert compiled == ["a", "a", "b"]


@posix
def test_a_folder_in_which_only_owners_rename_will_do(tmp_path: Path, compiled: list[str]) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o1777)
    load("a")
    load("a")
    assert compiled == ["a"]


@posix
def test_a_group_of_the_user_alone_is_no_other(monkeypatch: pytest.MonkeyPatch, compiled: list[str]) -> None:
    monkeypatch.setattr(object_cache, "_is_own_group", lambda gid: True)
    load("a")
    cache_folder(host_target()).chmod(0o775)
    load("a")
    assert compiled == ["a"]


@posix
def test_what_belongs_to_another_user_is_passed_over(tmp_path: Path) -> None:
    status = list(os.stat(tmp_path))
    for uid, private in [(os.geteuid(), True), (0, True), (os.geteuid() + 1, False)]:
        status[4] = uid
        try:
            object_cache._check_status(os.stat_result(status), tmp_path)
        except object_cache.NotPrivate as error:
            assert not private and "it belongs to another user" in str(error)
        else:
            assert private


@posix
def test_an_object_that_others_can_write_to_is_compiled_anew(compiled: list[str]) -> None:
    load("a", "b", "c")
    folder = cache_folder(host_target())
    (folder / "a.code").chmod(0o666)
    (folder / "b.code").rename(folder.parent / "moved")
    (folder / "b.code").symlink_to(folder.parent / "moved")
    (folder / "c.code").unlink()
    os.mkfifo(folder / "c.code")
    with pytest.warns(CacheWarning) as said:
        load("a", "b", "c")
    texts = [str(warning.message) for warning in said]
    assert len(texts) == 2 and all(str(folder) in text for text in texts)
    assert "are not used, and compiled anew: other users may write to it" in texts[0]
    assert compiled == ["a", "b", "c"] * 2
    paths = [folder / name for name in ("a.code", "b.code", "c.code")]
    assert all(path.is_file() and not path.is_symlink() for path in paths)
    load("a", "b", "c")
    assert len(compiled) == 6


@posix
def test_what_is_made_is_private_whatever_the_umask_says(compiled: list[str]) -> None:
    before = os.umask(0)
    try:
        load("a")
    finally:
        os.umask(before)
    folder = cache_folder(host_target())
    made = [folder / "a.code", folder, folder.parent, folder.parent.parent]
    assert [path.stat().st_mode & 0o777 for path in made] == [0o644, 0o755, 0o755, 0o755]
    load("a")
    assert compiled == ["a"]


def test_what_a_killed_process_left_is_removed(compiled: list[str]) -> None:
    load("a")
    folder = cache_folder(host_target())
    for name, age in [("old", 7200), ("new", 60)]:
        path = folder / f".b.code.{name}.tmp"
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    load("b")
    assert files(folder) == [".b.code.new.tmp", "a.code", "b.code"]


def test_an_app_that_has_closed_its_standard_error_goes_on() -> None:
    program = (
        "import sys, warnings; sys.stderr.close(); warnings.simplefilter('always')\n"
        "from qrun.engine.native.object_cache import warn_once\n"
        "from qrun.engine.text.tokenizer.pretokenizers import pre_tokenizer\n"
        "warn_once('not kept'); pre_tokenizer('none of this name'); print('goes on')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "goes on\n"
