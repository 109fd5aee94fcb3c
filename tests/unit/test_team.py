"""Threads that run steps together, and when they do not."""

from contextlib import closing

import numpy as np

from qrun.engine import records as R
from qrun.engine.compiler import load_kernels
from qrun.engine.team import MOST_STEPS_ALONE, STEPS_ALONE, TEAM_KERNELS, Team
from tests.kernel_harness import record


def test_after_a_stall_that_costs_more_some_steps_run_alone_and_more_after_the_next() -> None:
    kernels = load_kernels([*TEAM_KERNELS, "read-"])
    memory, sums = np.ones(8 * R.READ_BLOCK // 4, np.int32), np.zeros((2, 16), np.int32)
    fields = {
        R.OP_KERNEL: kernels["read-"], R.OP_BARRIER: 1, R.READ_ADDRESS: memory.ctypes.data, R.READ_BLOCKS: 8,
        R.READ_OUT: sums.ctypes.data,
    }  # fmt: skip
    program, step = record(R.RECORD_BYTES, fields)[None], record(R.STEP_BYTES, {R.N_ROWS: 1})

    def threads_of_a_step(stalled: bool = False, seconds: float = 1.0) -> int:
        sums[:] = 0
        penalty, times = team._penalty, dict(team._seconds_alone)
        team.run(program, step)
        assert sums.sum() == memory.sum()
        used = int((sums.sum(axis=1) > 0).sum())
        if used > 1 or step[R.N_ROWS // 8] == 1:
            # How long this step took, and whether it met a stall, is the machine's doing: it is played as wanted.
            team._alone += used == 1
            team._alone, team._penalty, team._seconds_alone = team._alone if used == 1 else 0, penalty, times
            team._shared[R.STALLS // 8] = stalled
            team._mind_stalls(used, (1, 1), seconds)
        return used

    with closing(Team(kernels, 2)) as team:
        assert threads_of_a_step() == 2
        assert threads_of_a_step(stalled=True) == 2
        assert threads_of_a_step(seconds=1.5) == 1, "one step alone, to learn how long it takes"
        assert [threads_of_a_step(stalled=True, seconds=1.4) for _ in range(3)] == [2] * 3, "still faster than alone"
        for expected in (STEPS_ALONE, 2 * STEPS_ALONE):
            assert threads_of_a_step(stalled=True, seconds=1.6) == 2
            assert [threads_of_a_step(seconds=1.5) for _ in range(expected)] == [1] * expected
        assert threads_of_a_step() == 2
        assert team._penalty == 4 * STEPS_ALONE - 1
        team._penalty = MOST_STEPS_ALONE
        threads_of_a_step(stalled=True, seconds=1.6)
        assert team._penalty == MOST_STEPS_ALONE
        step[R.N_ROWS // 8] = 512
        assert threads_of_a_step() == 2, "with many rows, all threads take part"
