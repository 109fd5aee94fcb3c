"""Weights that are locked in memory, as long as their model is there."""

import gc
import mmap
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import run
from tiny_model import write_tiny_model

from qrun.engine import Model
from qrun.engine.native import memory_lock
from qrun.engine.native.machine import Memory
from qrun.engine.native.memory_lock import lock_in_memory
from qrun.formats.mapping import map_file

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="mlock")


@pytest.fixture
def file(tmp_path: Path) -> Iterator[mmap.mmap]:
    (tmp_path / "file").write_bytes(bytes(5 << 15))
    yield map_file(tmp_path / "file")


def locked_kilobytes() -> int:
    found = re.search(r"VmLck:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) if found else 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says how much is locked")
def test_weights_are_locked_until_the_model_goes(tmp_path: Path) -> None:
    path, said = write_tiny_model(tmp_path / "model.gguf"), []
    before = locked_kilobytes()
    with Model.load(path, threads=1, context=64, mlock=True, notice=said.append):
        if said:
            pytest.skip(said[0])  # a container that allows none
        assert locked_kilobytes() - before >= path.stat().st_size // 1024
    gc.collect()
    assert locked_kilobytes() == before


def test_what_a_limit_leaves_is_locked_and_the_rest_is_said(file: mmap.mmap, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def limited(address: int, size: int) -> int:
        asked.append(size)
        return 12 if len(asked) > 2 else 0

    monkeypatch.setattr(memory_lock, "PIECE", 1 << 16)
    monkeypatch.setattr(memory_lock, "system_lock", lambda: limited)
    text = lock_in_memory([file])
    assert text is not None and re.match(r"0\.1 MB of 0\.2 MB of the weights are locked in memory: \w", text)
    assert "\n" not in text and asked == [1 << 16, 1 << 16, 1 << 15]


def test_what_memory_has_no_room_for_is_not_tried(file: mmap.mmap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_lock, "memory", lambda: Memory(1 << 30, 1000))
    text = lock_in_memory([file])
    assert text == "the weights are not locked in memory: they take 0.2 MB, and 0.0 MB are free"
    monkeypatch.setattr(memory_lock, "system_lock", lambda: None)
    text = lock_in_memory([file])
    assert text == "the weights are not locked in memory: not supported on this system"


def test_a_system_that_locks_nothing_is_told_once_and_the_model_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tiny_model(tmp_path / "model.gguf")
    monkeypatch.setattr(memory_lock, "system_lock", lambda: lambda address, size: 1)
    status, out, errors = run("run", path, "th", "--max-tokens", 2, "-t", 1, "--mlock", capsys=capsys)
    assert status == 0 and out and errors.count("of the weights are locked in memory: ") == 1
    with (
        pytest.warns(RuntimeWarning, match="of the weights are locked in memory"),
        Model.load(path, threads=1, context=64, mlock=True) as model,
    ):
        assert model.context == 64
