"""The kernel cache."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qrun.engine.native.compiler import CompileError, cache_folder, load_kernels
from qrun.engine.native.object_cache import UNUSED_DAYS
from qrun.engine.simd.target import host_target

KEYS = ["pack-f32", "scale-"]


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QRUN_CACHE", str(tmp_path))
    return tmp_path


def test_kernels_are_compiled_once_with_progress(empty_cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_kernels(KEYS, progress=lambda done, total: seen.append((done, total)))
    assert list(dict.fromkeys(seen)) == [(0, 2), (1, 2), (2, 2)]  # again and again, so that it can be ended
    assert sorted(path.name for path in cache_folder(host_target()).iterdir()) == ["pack-f32.code", "scale-.code"]
    seen.clear()
    load_kernels(KEYS, progress=lambda done, total: seen.append((done, total)))
    assert seen == []


def test_kernels_that_nobody_has_used_for_long_are_removed(empty_cache: Path) -> None:
    load_kernels(KEYS[:1])
    ours, long_ago = cache_folder(host_target()), time.time() - (UNUSED_DAYS + 1) * 86400
    others = [ours.with_name(name) for name in ("old", "recent")]
    for folder in others:
        folder.mkdir()
        (folder / "scale-.code").write_bytes(b"code")
    for folder in (ours, others[0]):
        os.utime(folder, (long_ago, long_ago))
    load_kernels(KEYS)
    assert [folder.exists() for folder in (ours, *others)] == [True, False, True]
    os.utime(ours, (long_ago, long_ago))
    load_kernels(KEYS)
    assert ours.stat().st_mtime > long_ago + 86400, "loading says that they are in use"


def test_loading_compiled_kernels_does_not_import_numba() -> None:
    load_kernels(KEYS)
    load = f"from qrun.engine.native.compiler import load_kernels; load_kernels({KEYS})"
    code = f"import sys; {load}; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_two_processes_at_once_do_not_harm_each_other(empty_cache: Path) -> None:
    code = f"from qrun.engine.native.compiler import load_kernels; k = load_kernels({KEYS}); assert k['scale-']"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert not [path for path in cache_folder(host_target()).iterdir() if path.suffix != ".code"]


def test_a_damaged_object_is_compiled_again(empty_cache: Path) -> None:
    load_kernels(["scale-"])
    path = cache_folder(host_target()) / "scale-.code"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", bytes(len(whole)), whole[:-9] + b"\xff" * 9):
        path.write_bytes(damaged)
        assert load_kernels(["scale-"])["scale-"]
        assert path.read_bytes() == whole


def test_what_does_not_compile_is_named(empty_cache: Path) -> None:
    with pytest.raises(CompileError, match="matmul-Q9_9"):
        load_kernels(["matmul-Q9_9"])
