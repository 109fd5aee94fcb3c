"""How fast this machine reads memory."""

from __future__ import annotations

import time
from contextlib import closing

import numpy as np

from qrun.engine.kernels import records as R
from qrun.engine.native.compiler import Progress, load_kernels
from qrun.engine.native.team import TEAM_KERNELS, Team

BUFFER_BYTES = 512 * 1024 * 1024
"""What is read: many times what caches hold."""


def read_bandwidth(
    threads: int, *, passes: int = 3, size: int = BUFFER_BYTES, progress: Progress | None = None
) -> float:
    """Bytes a second at which `threads` threads read memory: the best of `passes`, after one to warm up."""
    kernels = load_kernels([*TEAM_KERNELS, "read-"], progress=progress)
    buffer = np.ones(size // 4, np.int32)  # ones: pages that were never written are all the same one
    out = np.zeros(16 * threads, np.int32)
    step = np.zeros(R.STEP_BYTES // 8, np.int64)
    program, counter = np.zeros((1, R.RECORD_BYTES // 8), np.int64), np.zeros(1, np.int64)
    for field, value in (
        (R.OP_KERNEL, kernels["read-"]), (R.OP_BARRIER, 1), (R.OP_COUNTER, counter.ctypes.data), (R.OP_IN_PARTS, 1),
        (R.READ_ADDRESS, buffer.ctypes.data),
        (R.READ_BLOCKS, buffer.nbytes // R.READ_BLOCK), (R.READ_OUT, out.ctypes.data),
    ):  # fmt: skip
        program[0, field // 8] = value
    best = 0.0
    with closing(Team(kernels, threads)) as team:
        for _ in range(passes + 1):
            start = time.perf_counter()
            team.run(program, step)
            best = max(best, buffer.nbytes / (time.perf_counter() - start))
    if int(out.sum()) != buffer.nbytes // R.READ_BLOCK * (R.READ_BLOCK // 4):
        raise AssertionError("not all of the memory was read")
    return best
