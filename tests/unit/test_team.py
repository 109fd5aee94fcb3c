"""Threads that run steps together, and when they do not."""

from contextlib import closing

import numpy as np

from qrun.engine import records as R
from qrun.engine.compiler import load_kernels
from qrun.engine.team import MOST_STEPS_ALONE, STEPS_ALONE, TEAM_KERNELS, Team
from tests.kernel_harness import record


def test_after_a_stall_some_steps_run_alone_and_more_after_the_next() -> None:
    kernels = load_kernels([*TEAM_KERNELS, "read-"])
    memory, sums = np.ones(8 * R.READ_BLOCK // 4, np.int32), np.zeros((2, 16), np.int32)
    fields = {
        R.OP_KERNEL: kernels["read-"], R.OP_BARRIER: 1, R.READ_ADDRESS: memory.ctypes.data, R.READ_BLOCKS: 8,
        R.READ_OUT: sums.ctypes.data,
    }  # fmt: skip
    program, step = record(R.RECORD_BYTES, fields)[None], record(R.STEP_BYTES, {R.N_ROWS: 1})

    def threads_of_a_step(stalled: bool) -> int:
        sums[:] = 0
        team.run(program, step)
        assert sums.sum() == memory.sum()
        used = int((sums.sum(axis=1) > 0).sum())
        if used > 1:
            # Whether this step met a stall is the machine's doing: it is undone, and played as wanted.
            team._alone, team._penalty = 0, penalty
            team._shared[R.STALLS // 8] = stalled
            team._mind_stalls(used)
        return used

    with closing(Team(kernels, 2)) as team:
        penalty = STEPS_ALONE
        assert threads_of_a_step(stalled=False) == 2
        assert threads_of_a_step(stalled=True) == 2
        assert [threads_of_a_step(False) for _ in range(STEPS_ALONE)] == [1] * STEPS_ALONE
        penalty = 2 * STEPS_ALONE
        assert threads_of_a_step(stalled=True) == 2
        assert [threads_of_a_step(False) for _ in range(2 * STEPS_ALONE)] == [1] * (2 * STEPS_ALONE)
        penalty = MOST_STEPS_ALONE
        threads_of_a_step(stalled=True)
        assert team._penalty == MOST_STEPS_ALONE
        step[R.N_ROWS // 8] = 512
        assert threads_of_a_step(stalled=False) == 2, "with many rows, all threads take part"
