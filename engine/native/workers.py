"""Compiling several kernels at once, in processes of their own, so that this one never imports Numba.

A worker gets keys on its standard input and answers with images on its standard output: it writes nothing to the
disk, so one that is killed leaves nothing there. Where there is no Python to start, or it does not start, kernels are
compiled one after another in this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import IO

from qrun.engine.native.codegen import OLDEST, CompileError, compile_kernel, compiler_place
from qrun.engine.native.cpu_count import available_cores
from qrun.engine.simd.target import Target
from qrun.models.interpreter import clean_environment, in_background, interpreter

TRIES = 2
"""So often a kernel is begun whose worker dies, as one does that the system ends for want of memory."""

TICK = 0.1
"""Seconds."""

# What a worker begins with. Its path is this process's: what an app has put there for itself counts, too.
_BOOTSTRAP = """\
import json, sys
begin = json.loads(sys.stdin.buffer.readline())
if sys.version != begin["version"]:
    sys.exit("another version of Python")
sys.path[:] = begin["path"]
from qrun.engine.native.workers import serve
serve(begin["target"], begin["parent"])
"""


def compile_all(keys: Sequence[str], target: Target) -> Generator[tuple[str, bytes] | None, None, None]:
    """Each of `keys` with its image, as they are done. CompileError if one does not compile. None where nothing was
    done for a tenth of a second, so that whoever waits can end it.

    Once it is exhausted or closed, no process is left.
    """
    waiting = sorted(keys, key=_cost)
    if python := interpreter():
        pool = _Pool(waiting, target, python)
        try:
            yield from pool.results()
        finally:
            pool.close()
    if not waiting:
        return
    with little_to_collect() as pass_over:
        while waiting:  # no worker could be started
            key = waiting.pop()
            code = compile_kernel(key, target)
            pass_over()
            yield key, code


FROZEN_BY_PYTHON = 5000
"""More than Python 3.12 puts there by itself: objects that live for ever, some hundreds."""


@contextlib.contextmanager
def little_to_collect() -> Iterator[Callable[[], None]]:
    """Have the collector of garbage pass over what there is already, and over what there is when the function is called
    that this gives. Numba makes so many objects that looking through all of them would hold up other threads, as that
    of a window, for a tenth of a second at a time."""
    if gc.get_freeze_count() > FROZEN_BY_PYTHON:  # a program that has its own reasons
        yield lambda: None
        return
    with contextlib.suppress(ImportError):  # `compile_kernel` says what is missing
        import numba  # noqa: F401
    gc.freeze()
    try:
        yield gc.freeze
    finally:
        gc.unfreeze()


def _cost(key: str) -> int:
    return 2 if key.startswith("matmul") else 1 if key.startswith("attention") else 0


class _Died(Exception):
    """A worker ended before it answered."""


class _Worker:
    """One process that compiles."""

    def __init__(self, target: Target, python: Sequence[str]) -> None:
        """Raises OSError if there can be no process."""
        folder = Path(__file__).parent  # not the working directory, where settings for Numba may lie
        self._errors = _temporary_file()
        try:
            self._process = subprocess.Popen(
                [*python, "-W", "ignore", "-c", _BOOTSTRAP],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors or subprocess.DEVNULL,
                cwd=folder if folder.is_dir() else None,
                env=clean_environment(),
                **in_background(),
            )
        except BaseException:
            self._close_errors()
            raise
        self._target = target

    def begin(self) -> None:
        """Have it import the compiler. Raises _Died if it cannot."""
        begin = {"version": sys.version, "path": import_path(), "target": dataclasses.astuple(self._target)}
        self._send(json.dumps(begin | {"parent": os.getpid()}))
        if self._answer() != b"ready":
            raise _Died

    def compile(self, key: str) -> bytes:
        """The image of a kernel. Raises CompileError, or _Died if the process ends meanwhile."""
        self._send(key)
        word, _, length = self._answer().partition(b" ")
        content = self._out.read(int(length or 0))
        if word == b"object" and len(content) == int(length):
            return content
        if word == b"failed":
            raise CompileError(content.decode("utf-8", "replace"))
        raise _Died

    def last_words(self) -> str:
        """Why it ended, once it has."""
        try:
            status: int | None = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            status = None
        said = ""
        if self._errors is not None:
            self._errors.seek(0)
            said = (self._errors.read().decode("utf-8", "replace").strip().splitlines() or [""])[-1].strip()
        how = f"was ended by signal {-status}" if status is not None and status < 0 else f"ended with status {status}"
        return f"its process {how}" + (f": {said}" if said else "")

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """End it if it runs still, and let go of what belongs to it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        self._close_errors()

    @property
    def _out(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise _Died from error

    def _answer(self) -> bytes:
        line = self._out.readline()
        if not line.endswith(b"\n"):
            raise _Died
        return line[:-1]

    def _close_errors(self) -> None:
        if self._errors is not None:
            self._errors.close()


class _Pool:
    """A worker for each core, each with a thread that feeds it from `waiting`. Results are for one other thread."""

    def __init__(self, waiting: list[str], target: Target, python: Sequence[str]) -> None:
        self._waiting = waiting
        self._target, self._python = target, python
        self._results: queue.SimpleQueue[tuple[str, bytes] | BaseException | None] = queue.SimpleQueue()
        self._tries: dict[str, int] = {}
        self._lock = threading.Lock()  # guards what follows
        self._workers: list[_Worker] = []
        self._closed = False
        jobs = max(1, min(len(waiting), available_cores()))
        self._threads = [threading.Thread(target=self._feed, name="qrun-compile", daemon=True) for _ in range(jobs)]
        for thread in self._threads:
            thread.start()

    def results(self) -> Iterator[tuple[str, bytes] | None]:
        """What the workers have made, as `compile_all` gives it. If none of them starts, keys stay in `waiting`."""
        feeding = len(self._threads)
        while feeding:
            try:
                result = self._results.get(timeout=TICK)
            except queue.Empty:
                yield None
                continue
            if result is None:
                feeding -= 1
            elif isinstance(result, BaseException):
                raise result
            else:
                yield result

    def close(self) -> None:
        """End the workers and their threads."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.kill()
        for thread in self._threads:
            thread.join()

    def _feed(self) -> None:
        try:
            while self._waiting and self._use_worker():
                pass
        except BaseException as error:
            self._results.put(error)
        finally:
            self._results.put(None)

    def _use_worker(self) -> bool:
        """Have one worker compile what is waiting. False if it does not start."""
        with self._lock:
            if self._closed:
                return False
            try:
                worker = _Worker(self._target, self._python)
            except OSError:
                return False
            self._workers.append(worker)
        try:
            try:
                worker.begin()
            except _Died:
                return False
            while not self._closed:
                try:
                    key = self._waiting.pop()
                except IndexError:
                    break
                try:
                    self._results.put((key, worker.compile(key)))
                except _Died:
                    self._tries[key] = self._tries.get(key, 0) + 1
                    if self._tries[key] == TRIES:
                        raise CompileError(f"the kernel {key} did not compile: {worker.last_words()}") from None
                    self._waiting.append(key)
                    break
            return True
        finally:
            with self._lock:
                self._workers.remove(worker)
                worker.close()


def import_path() -> list[str]:
    """Where this process finds modules, without the working directory: that holds whatever the user works at.

    It stays if qrun, Numba or llvmlite is imported from there.
    """
    ours = [str(Path(__file__).parents[3])]
    ours += [str(place.parents[1]) for name in OLDEST if (place := compiler_place(name)) is not None]
    path = []
    for entry in filter(None, sys.path):
        here = os.path.abspath(entry) if os.path.exists(entry) else entry  # what does not exist may mean a hook
        if not _is_working_directory(here) or any(_same(here, folder) for folder in ours):
            path.append(here)
    return path


def _is_working_directory(folder: str) -> bool:
    return _same(folder, os.curdir)


def _same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _temporary_file() -> IO[bytes] | None:
    """For what a worker says before it dies; where nothing can be written, that is lost."""
    try:
        return tempfile.TemporaryFile()
    except OSError:
        return None


def serve(target: Sequence[object], parent: int) -> None:
    """A worker: keys on standard input; on standard output a line and an image for each one."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anybody prints is no answer
    if os.name == "posix":
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    chosen = Target(*target)  # type: ignore[arg-type]
    gc.set_threshold(50_000)  # of so many new objects most are gone when they are looked through
    with little_to_collect():
        answers.write(b"ready\n")
        answers.flush()
        for line in sys.stdin.buffer:
            try:
                content, word = compile_kernel(line.decode().strip(), chosen), "object"
            except CompileError as error:
                content, word = str(error).encode("utf-8", "replace"), "failed"
            answers.write(f"{word} {len(content)}\n".encode() + content)
            answers.flush()


def _end_with(parent: int) -> None:
    """End this process as soon as the one that started it is gone, in the midst of compiling."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
