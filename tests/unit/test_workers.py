"""Compiling in processes of its own: what they import, and that none of them stays."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import llvmlite  # noqa: F401 (some tests change where modules are found)
import pytest

from qrun.engine.native import workers
from qrun.engine.native.codegen import CompileError
from qrun.engine.native.compiler import load_images
from qrun.engine.simd.target import host_target

KEYS = ["pack-f32", "scale-"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QRUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """All processes that the compiler starts."""
    processes: list[subprocess.Popen[bytes]] = []

    start = workers._Worker.__init__

    def start_and_note(worker: workers._Worker, *arguments: Any) -> None:
        start(worker, *arguments)
        processes.append(worker._process)

    monkeypatch.setattr(workers._Worker, "__init__", start_and_note)
    return processes


def all_ended(processes: list[subprocess.Popen[bytes]]) -> bool:
    threads = [thread for thread in threading.enumerate() if thread.name == "qrun-compile"]
    return len(processes) > 0 and not threads and all(process.returncode is not None for process in processes)


def compile_in(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python that compiles a kernel, there, with an empty cache."""
    return subprocess.run(
        [sys.executable, *command], cwd=folder, text=True, capture_output=True,
        env=os.environ | {"QRUN_CACHE": str(folder.parent / "cache-of-it")} | environment,
    )  # fmt: skip


COMPILE = (
    "import sys; from qrun.engine.native.compiler import load_kernels; load_kernels(['scale-'])\n"
    "sys.exit('numba' in sys.modules)"
)


@pytest.mark.parametrize("way", ["command", "module", "script"])
def test_what_lies_in_the_working_directory_is_not_run(tmp_path: Path, way: str) -> None:
    here = tmp_path / "here"
    here.mkdir()
    names = ["numba", "scipy", "yaml", "coverage"]
    if way == "script":  # then the working directory is not on the path of the first process, either
        names += ["re", "json", "numpy", "llvmlite", "sitecustomize"]
    for name in names:
        (here / f"{name}.py").write_text("open('it-was-run', 'w'); raise SystemExit(9)")
    (here / ".numba_config.yaml").write_text("disable_jit: 1")
    script = tmp_path / "elsewhere" / "tool.py"
    script.parent.mkdir()
    script.write_text(COMPILE)
    (here / "tool.py").write_text(COMPILE)
    words = {"command": ["-c", COMPILE], "module": ["-m", "tool"], "script": [str(script)]}[way]
    done = compile_in(here, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (here / "it-was-run").exists()


def test_settings_for_python_and_numba_as_a_whole_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    startup = tmp_path / "startup.py"
    startup.write_text(f"open({str(tmp_path / 'it-was-run')!r}, 'w')")
    done = compile_in(
        tmp_path / "here", "-c", COMPILE, NUMBA_DISABLE_JIT="1", NUMBA_DUMP_IR="1", PYTHONIOENCODING="utf-16",
        PYTHONINSPECT="", PYTHONSTARTUP=str(startup), PYTHONWARNINGS="error::DeprecationWarning",
    )  # fmt: skip
    assert done.returncode == 0
    assert not (tmp_path / "it-was-run").exists()


def test_a_folder_that_an_app_put_on_its_path_counts(tmp_path: Path) -> None:
    """An app that carries qrun with it, in a folder that Python does not know."""
    app = tmp_path / "app"
    for room in ("engine", "formats", "models"):
        shutil.copytree(ROOT / room, app / "libraries" / "qrun" / room, ignore=shutil.ignore_patterns("__pycache__"))
    others = {str(Path(str(find_spec(name).origin)).parents[1]) for name in ("numpy", "numba")}  # type: ignore[union-attr]
    code = f"import sys; sys.path[1:1] = ['libraries', *{sorted(others)}]; import qrun.engine\n"
    code += "assert 'libraries' in qrun.engine.__file__\n" + COMPILE
    done = compile_in(app, "-S", "-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_path_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugins").mkdir()
    monkeypatch.chdir(tmp_path)
    elsewhere = str(ROOT)
    monkeypatch.setattr(sys, "path", ["", ".", str(tmp_path), "plugins", "a hook's name", elsewhere])
    assert workers.import_path() == [str(tmp_path / "plugins"), "a hook's name", elsewhere]
    monkeypatch.setattr(workers, "__file__", str(tmp_path / "qrun" / "engine" / "native" / "workers.py"))
    assert workers.import_path() == [
        str(tmp_path), str(tmp_path), str(tmp_path / "plugins"), "a hook's name", elsewhere
    ], "qrun itself lies there"  # fmt: skip


def test_a_worker_that_is_killed_is_replaced(
    cache: Path, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[str] = []
    compile_key = workers._Worker.compile

    def compile_once(worker: workers._Worker, key: str) -> bytes:
        if not killed:
            killed.append(key)
            worker.kill()
        return compile_key(worker, key)

    monkeypatch.setattr(workers._Worker, "compile", compile_once)
    assert sorted(load_images(KEYS, host_target())) == sorted(KEYS)
    assert killed and all_ended(started)


def test_a_kernel_that_kills_its_worker_is_named(
    cache: Path, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_never(worker: workers._Worker, key: str) -> bytes:
        worker.kill()
        raise workers._Died

    monkeypatch.setattr(workers._Worker, "compile", compile_never)
    with pytest.raises(CompileError, match="the kernel scale- did not compile: its process was ended by signal 9"):
        load_images(["scale-"], host_target())
    assert all_ended(started)
    assert not list(cache.rglob("*.*"))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_progress_raises_ends_the_compilation(
    cache: Path, started: list[subprocess.Popen[bytes]], error: type[BaseException]
) -> None:
    def progress(done: int, total: int) -> None:
        if done == 1:
            raise error

    with pytest.raises(error):
        load_images(KEYS, host_target(), progress)
    assert all_ended(started)
    assert [path.suffix for path in cache.rglob("*.*")] == [".code"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_workers_too(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "from qrun.cli.main import terminating\n"
        "from qrun.engine.native.compiler import load_kernels\n"
        "with terminating(for_good=False):\n"
        "    keys = [f'attention-f16-{i}' for i in range(1, 9)]\n"
        "    load_kernels(keys, progress=lambda *counts: print(counts, flush=True))"
    )
    environment = os.environ | {"QRUN_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    assert eventually(lambda: len(children(process.pid)) > 0)
    theirs = children(process.pid)
    process.send_signal(number)
    process.wait(timeout=60)
    process.stdout.close()
    assert eventually(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in theirs))
    assert [path for path in tmp_path.rglob("*.*") if path.suffix != ".code"] == []


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def eventually(condition: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("problem", ["no interpreter", "does not start", "another version"])
def test_without_workers_kernels_are_compiled_here(
    cache: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    if problem == "no interpreter":
        monkeypatch.setattr(workers, "interpreter", lambda: None)
    elif problem == "does not start":
        monkeypatch.setattr(workers, "interpreter", lambda: [str(cache / "python")])
    else:
        monkeypatch.setattr(workers, "_BOOTSTRAP", workers._BOOTSTRAP.replace("sys.version !=", "'3.9' !="))
    seen: list[tuple[int, int]] = []
    objects = load_images(["scale-"], host_target(), lambda *counts: seen.append(counts))
    assert len(objects["scale-"]) > 500
    assert list(dict.fromkeys(seen)) == [(0, 1), (1, 1)]
    assert gc.get_freeze_count() < workers.FROZEN_BY_PYTHON  # the collector of garbage sees everything again
    with pytest.raises(CompileError, match=r"the kernel matmul-Q9_9 did not compile: KeyError: 'Q9_9'"):
        load_images(["matmul-Q9_9"], host_target())


def test_threads_of_a_packed_app_may_load_at_once(tmp_path: Path) -> None:
    """None of them finds Numba half imported, and its settings are as before when they are done."""
    (tmp_path / "here").mkdir()
    code = """
import sys, threading
sys.frozen = True
from concurrent.futures import ThreadPoolExecutor
from qrun.engine.native.compiler import load_kernels
barrier = threading.Barrier(3)
def load(key):
    barrier.wait()
    return load_kernels([key, 'softcap-'])[key]
with ThreadPoolExecutor(3) as pool:
    assert all(pool.map(load, ['scale-', 'add-', 'pack-f32']))
import numba
assert str(numba.config.OPT) != '0'
assert numba.njit(lambda x: x + 1)(1) == 2
"""
    done = compile_in(tmp_path / "here", "-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_a_program_keeps_from_the_collector_stays_with_it() -> None:
    objects = [[] for _ in range(2 * workers.FROZEN_BY_PYTHON)]
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with workers.little_to_collect() as pass_over:
            more = [[] for _ in range(1000)]
            pass_over()
        # A few of what was frozen may have gone meanwhile.
        assert frozen - 100 < gc.get_freeze_count() <= frozen and len(objects) > len(more)
    finally:
        gc.unfreeze()
