"""Threads that run a program together: each makes one compiled call a step (see `engine.kernels.team`).

Between steps threads spin for a moment, then sleep on a semaphore until a step wakes them. A step does not wait for
those that are still asleep: its caller begins alone.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time

import numpy as np

from qrun.engine.kernels import records as R
from qrun.engine.native.compiler import Kernels

TEAM_KERNELS = ("begin_step", "run_step", "serve")

# With many rows, operations on rows come in more parts than there are threads: then nobody waits long for one of them.
MANY_ROWS, PARTS_A_THREAD = 64, 4


def _yield_address() -> int:
    """The C function by which a thread offers its core to others."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _clock() -> tuple[int, int]:
    """The C function `clock_gettime`, and which clock; zeros where there is none."""
    if sys.platform == "win32":
        return 0, 0
    return ctypes.cast(ctypes.CDLL(None).clock_gettime, ctypes.c_void_p).value or 0, time.CLOCK_MONOTONIC


class Team:
    """`threads` threads, the caller's own among them. `run` is for one caller at a time."""

    def __init__(self, kernels: Kernels, threads: int) -> None:
        if not 1 <= threads <= R.MAX_THREADS:
            raise ValueError(f"threads is {threads}: it can be 1 to {R.MAX_THREADS}")
        self.size = threads
        memory = np.zeros(R.SHARED_BYTES + 64, np.uint8)
        start = -memory.ctypes.data % 64
        self._shared = memory[start : start + R.SHARED_BYTES].view(np.int64)
        self._address = int(self._shared.ctypes.data)
        self._shared[R.YIELD // 8] = _yield_address()
        self._shared[R.CLOCK // 8], self._shared[R.CLOCK_ID // 8] = _clock()
        self._begin = kernels.function("begin_step")
        self._run = kernels.function("run_step")
        self._serve = kernels.function("serve")
        self._wake = [threading.Semaphore(0) for _ in range(threads)]
        self._threads = [
            threading.Thread(target=self._work, args=(i,), name=f"qrun-{i}", daemon=True) for i in range(1, threads)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, program: np.ndarray, step: np.ndarray) -> None:
        """Run the operations of `program` (int64 [operations, RECORD_BYTES / 8]) on the step's rows."""
        shared = self._shared
        many = step[R.N_ROWS // 8] >= MANY_ROWS
        step[R.STEP_PARTS // 8] = self.size * (PARTS_A_THREAD if many else 1)
        step[R.STEP_TEAM // 8] = self._address
        shared[R.PROGRAM // 8] = program.ctypes.data
        shared[R.N_OPERATIONS // 8] = len(program)
        shared[R.STEP // 8] = step.ctypes.data
        self._begin(self._address, 0, 0)
        self._wake_sleepers()
        self._run(self._address, 0, 0)

    def close(self) -> None:
        self._shared[R.CLOSING // 8] = 1
        for semaphore in self._wake:
            semaphore.release()
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _wake_sleepers(self) -> None:
        for i in range(1, self.size):
            asleep = (R.THREAD + i * R.THREAD_BYTES + R.ASLEEP) // 8
            if self._shared[asleep]:
                self._shared[asleep] = 0
                self._wake[i].release()

    def _work(self, number: int) -> None:
        while not self._shared[R.CLOSING // 8]:
            self._serve(self._address, 0, number)
            self._wake[number].acquire()
