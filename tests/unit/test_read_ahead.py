"""Files that are not in the page cache are read ahead, and no others."""

import os
import threading
from pathlib import Path

import pytest

from qrun.engine.native import read_ahead as module
from qrun.engine.native.machine import Memory
from qrun.engine.native.read_ahead import read_ahead

pytestmark = pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="only Linux tells what is in its page cache")


def forget(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


@pytest.fixture
def cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four megabytes that the page cache has forgotten."""
    monkeypatch.setattr(module, "MIN_BYTES", 4 << 20)
    path = tmp_path / "cold"
    path.write_bytes(bytes(4 << 20))
    forget(path)
    try:
        if not module._is_cold(path):
            pytest.skip("this file system keeps what it has written")
    except OSError:
        pytest.skip("this file system does not tell what is in the page cache")
    forget(path)  # looking has the system begin to read
    return path


def test_a_cold_file_is_read_and_a_warm_one_is_not(cold: Path) -> None:
    thread = read_ahead([cold])
    assert thread is not None
    thread.join(60)
    assert not thread.is_alive() and not module._is_cold(cold)
    assert read_ahead([cold]) is None


def test_what_is_small_or_too_large_for_memory_is_left_alone(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "memory", lambda: Memory(1 << 40, (4 << 20) - 1))
    assert read_ahead([cold]) is None
    monkeypatch.setattr(module, "memory", lambda: Memory(None, None))
    assert read_ahead([cold]) is None
    monkeypatch.undo()
    assert read_ahead([cold]) is None  # less than MIN_BYTES


def test_a_file_that_went_is_no_matter(cold: Path) -> None:
    assert read_ahead([cold.with_name("gone")]) is None
    module._read([cold.with_name("gone"), cold], lambda: True)
    assert not module._is_cold(cold)


def test_what_is_not_wanted_any_more_is_not_read_on(cold: Path) -> None:
    asked: list[bool] = []

    def wanted() -> bool:
        asked.append(len(asked) < 1)
        return asked[-1]

    thread = read_ahead([cold], wanted)
    assert thread is not None
    thread.join(60)
    assert asked == [True, False]


def test_without_a_thread_nothing_is_read_ahead(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert read_ahead([cold]) is None
