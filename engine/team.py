"""Threads that run a program together: each makes one compiled call a step, and meets the others at barriers.

Between steps threads spin for a moment, then sleep on a semaphore until a step wakes them.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time

import numpy as np

from qrun.engine import records as R
from qrun.engine.compiler import Kernels

TEAM_KERNELS = ("begin_step", "run_step", "serve")

# Generating a token takes milliseconds, and has hundreds of barriers. If another program gets one of the cores, for
# milliseconds at a time, all threads wait for the one that is without. Where a step took longer by that than one thread
# needs for all of it, the next steps are run alone: so many at first, twice as many each time after, and fewer again
# after steps without a stall.
STEPS_ALONE, MOST_STEPS_ALONE = 4, 128
# With more rows than this, an uneven end of an operation may look like a stall; and there is more to do together.
FEW_ROWS = 8


def _yield_address() -> int:
    """The C function by which a thread offers its core to others."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


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
        self._alone, self._penalty = 0, STEPS_ALONE
        self._seconds_alone: dict[tuple[int, int], float] = {}  # of the newest step alone, by rows and operations
        self._shared[R.YIELD // 8] = _yield_address()
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
        shared, rows = self._shared, int(step[R.N_ROWS // 8])
        few = 0 < rows <= FEW_ROWS
        threads = 1 if few and self._alone else self.size
        shared[R.N_THREADS // 8] = step[R.STEP_THREADS // 8] = threads
        shared[R.PROGRAM // 8] = program.ctypes.data
        shared[R.N_OPERATIONS // 8] = len(program)
        shared[R.STEP // 8] = step.ctypes.data
        start = time.perf_counter()
        self._begin(self._address, 0, 0)
        if threads > 1:
            self._wake_sleepers()
        self._run(self._address, 0, 0)
        if few and self.size > 1:
            self._mind_stalls(threads, (rows, len(program)), time.perf_counter() - start)

    def _mind_stalls(self, threads: int, work: tuple[int, int], seconds: float) -> None:
        """Decide whether the next steps are better run alone. work: what kind of step this was."""
        if threads == 1:
            self._alone -= 1
            self._seconds_alone[work] = seconds
        elif not self._shared[R.STALLS // 8]:
            self._penalty = max(self._penalty - 1, STEPS_ALONE)
        elif work not in self._seconds_alone:
            self._alone = 1  # to learn how long it takes
        elif seconds > self._seconds_alone[work]:
            self._alone = self._penalty
            self._penalty = min(2 * self._penalty, MOST_STEPS_ALONE)

    def close(self) -> None:
        self._shared[R.CLOSING // 8] = 1
        for semaphore in self._wake:
            semaphore.release()
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _wake_sleepers(self) -> None:
        asleep = R.ASLEEP // 8
        for i in range(1, self.size):
            if self._shared[asleep + i]:
                self._shared[asleep + i] = 0
                self._wake[i].release()

    def _work(self, number: int) -> None:
        seen = np.zeros(8, np.int64)
        while not self._shared[R.CLOSING // 8]:
            self._serve(self._address, int(seen.ctypes.data), number)
            self._wake[number].acquire()
