"""How fast this machine reads memory, and how much of that a generated token needs."""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np

from qrun.engine import records as R
from qrun.engine.compiler import Progress, load_kernels
from qrun.engine.kv_cache import PAGE_POSITIONS, CacheLayout
from qrun.engine.team import TEAM_KERNELS, Team
from qrun.models import graph as G

if TYPE_CHECKING:
    from qrun.models.graph import Graph

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
    program = np.zeros((1, R.RECORD_BYTES // 8), np.int64)
    for field, value in (
        (R.OP_KERNEL, kernels["read-"]), (R.OP_BARRIER, 1), (R.OP_IN_PARTS, 1), (R.READ_ADDRESS, buffer.ctypes.data),
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


def bytes_per_token(graph: Graph, cache_type: str, position: float) -> float:
    """Bytes of weights, keys and values that have to be read to generate the token at a position."""
    total = 0.0
    for operation in graph.operations:
        if isinstance(operation, G.Linear):
            total += operation.weight.raw.nbytes
        elif isinstance(operation, G.MoE):
            weights = [operation.router, operation.gate, operation.up, operation.down]
            weights += [weight for change in operation.changes for weight in (change.a, change.b)]
            for weight in weights:  # those of experts have three dimensions
                used = operation.n_used / weight.shape[0] if len(weight.shape) == 3 else 1
                total += weight.raw.nbytes * used
    layout = CacheLayout(graph.cache_layers, cache_type)
    for window, page_bytes in zip(layout.windows, layout.page_bytes, strict=True):
        seen = position if window is None else min(position, window)
        total += page_bytes / PAGE_POSITIONS * seen
    return total
