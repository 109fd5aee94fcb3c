"""Threads that run a program together: each makes one compiled call a step (see `engine.kernels.team`).

Between steps threads spin for a moment, then sleep until a step wakes them. A step does not wait for those that are
still asleep: its caller begins alone.

A thread holds the machine code that it runs and the memory that it looks at, and not the team. So a team that nobody
holds any more goes away, and its threads end: by themselves, since nobody may be in a position to wait for them.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading
import time
import weakref
from queue import SimpleQueue

import numpy as np

from qrun.engine.cpu.code_memory import CodeMemory
from qrun.engine.cpu.features import architecture
from qrun.engine.kernels import records as R
from qrun.engine.native.compiler import Kernels
from qrun.engine.native.stacks import has_room, roomy_threads

TEAM_KERNELS = ("lead", "serve")

# With many rows, operations on rows come in more parts than there are threads: then nobody waits long for one of them.
PARTS_A_THREAD = 4
# With few, the thread that is the last to arrive at a barrier does those that follow before the others go on.
FEW_ROWS = 2


def _yield_function() -> int | CodeMemory:
    """The C function by which a thread offers its core to others: its address, or a piece of code that calls it."""
    if sys.platform == "win32":
        address = ctypes.cast(ctypes.windll.kernel32.SwitchToThread, ctypes.c_void_p).value or 0
        return CodeMemory(called_as_on_windows(address)) if architecture() == "x86_64" else address
    return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0


def called_as_on_windows(address: int) -> bytes:
    """The x86-64 code of a function without arguments for kernels to call, which call by the convention of System V
    everywhere (see `linker`). It calls another, that is Windows's own: above what that returns to, it may write 32
    bytes."""
    return bytes.fromhex("4883ec28 48b8") + struct.pack("<Q", address) + bytes.fromhex("ffd0 4883c428 c3")
    # sub rsp, 40; mov rax, address; call rax; add rsp, 40; ret


def _clock() -> tuple[int, int]:
    """The C function `clock_gettime`, and which clock; zeros where there is none."""
    if sys.platform == "win32":
        return 0, 0
    return ctypes.cast(ctypes.CDLL(None).clock_gettime, ctypes.c_void_p).value or 0, time.CLOCK_MONOTONIC


class _Crew:
    """What the threads of a team hold: the record that they share, their code, and what wakes them."""

    def __init__(self, kernels: Kernels, threads: int) -> None:
        self.process = os.getpid()
        memory = np.zeros(R.SHARED_BYTES + 64, np.uint8)
        start = -memory.ctypes.data % 64
        self.shared = memory[start : start + R.SHARED_BYTES].view(np.int64)
        self.address = int(self.shared.ctypes.data)
        self._yield = _yield_function()
        self.shared[R.YIELD // 8] = self._yield.address if isinstance(self._yield, CodeMemory) else self._yield
        self.shared[R.CLOCK // 8], self.shared[R.CLOCK_ID // 8] = _clock()
        # A function holds its kernels.
        self.lead, self.serve = (kernels.function(key) for key in TEAM_KERNELS)
        # Of all queues and locks, this one alone may be used by what the garbage collector runs, wherever it runs.
        self.wake: list[SimpleQueue[None]] = [SimpleQueue() for _ in range(threads)]

    def work(self, number: int) -> None:
        """The life of a thread."""
        while not self.shared[R.CLOSING // 8]:
            self.serve(self.address, 0, number)
            self.wake[number].get()

    def wake_sleepers(self) -> None:
        for number in range(1, len(self.wake)):
            asleep = (R.THREAD + number * R.THREAD_BYTES + R.ASLEEP) // 8
            if self.shared[asleep]:
                self.shared[asleep] = 0
                self.wake[number].put(None)

    def dismiss(self) -> None:
        """Have the threads end. Waits for nothing, and does nothing in a child process, which has none of them."""
        if self.process == os.getpid():
            self.shared[R.CLOSING // 8] = 1
            for queue in self.wake:
                queue.put(None)


class Team:
    """`threads` threads, the caller's own among them. `run` is for one caller at a time.

    In a child process (`os.fork`) the team has new threads from its first step on.
    """

    def __init__(self, kernels: Kernels, threads: int) -> None:
        if not 1 <= threads <= R.MAX_THREADS:
            raise ValueError(f"threads is {threads}: it can be 1 to {R.MAX_THREADS}")
        self.size = threads
        self._kernels = kernels
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._crew = self._start()

    def run(self, program: np.ndarray, step: np.ndarray) -> None:
        """Run the operations of `program` (int64 [operations, RECORD_BYTES / 8]) on the step's rows."""
        if self._crew.process != os.getpid():
            self._crew = self._start()
        crew = self._crew
        shared = crew.shared
        many = step[R.N_ROWS // 8] >= R.MANY_ROWS
        step[R.STEP_PARTS // 8] = self.size * (PARTS_A_THREAD if many else 1)
        step[R.STEP_TEAM // 8] = crew.address
        alone = step.copy()
        alone[R.STEP_PARTS // 8] = 1
        shared[R.ALONE // 8] = alone.ctypes.data if step[R.N_ROWS // 8] <= FEW_ROWS else 0
        shared[R.PROGRAM // 8] = program.ctypes.data
        shared[R.N_OPERATIONS // 8] = len(program)
        shared[R.STEP // 8] = step.ctypes.data
        # Who falls asleep between this and the step sleeps through it. To begin first would be worse: an interrupt
        # (Ctrl-C) between the two calls would leave a step that goes on without its caller.
        crew.wake_sleepers()
        if has_room():
            crew.lead(crew.address, 0, 0)
        else:
            _lead_elsewhere(crew, program, step, alone)

    def close(self) -> None:
        """End the threads, and wait until they have ended. Not during a step."""
        self._closed = True
        self._crew.dismiss()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._threads = []

    def _start(self) -> _Crew:
        """A crew, and its threads."""
        crew = _Crew(self._kernels, self.size)
        self._threads = []
        weakref.finalize(self, crew.dismiss)
        for number in range(1, 1 if self._closed else self.size):
            thread = threading.Thread(target=crew.work, args=(number,), name=f"qrun-{number}", daemon=True)
            with roomy_threads():
                thread.start()
            self._threads.append(thread)
        return crew


def _lead_elsewhere(crew: _Crew, *held: np.ndarray) -> None:
    """A step whose caller's stack has too little room, in a thread for it alone. held: what the step looks at."""
    done: SimpleQueue[None] = SimpleQueue()

    def lead(*_: np.ndarray) -> None:
        crew.lead(crew.address, 0, 0)
        done.put(None)

    with roomy_threads():
        threading.Thread(target=lead, args=held, name="qrun-0", daemon=True).start()
    interrupt: BaseException | None = None
    while True:
        try:
            done.get()
            break
        except BaseException as error:  # Ctrl-C; the step goes on, and with what it looks at
            interrupt = error
    if interrupt is not None:
        raise interrupt
