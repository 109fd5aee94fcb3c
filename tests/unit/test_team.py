"""Threads that run steps together, join them, and leave them."""

import ctypes
import functools
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import numpy as np
import pytest
from tiny_model import ARCHITECTURES

from qrun.engine.kernels import records as R
from qrun.engine.kernels.team import MOST_IN_VAIN, NANOSECONDS_AT_A_TIME
from qrun.engine.native.compiler import Kernels, load_kernels
from qrun.engine.native.team import TEAM_KERNELS, Team
from qrun.engine.program.arena import Buffer, Place
from qrun.engine.program.program import place_barriers
from qrun.engine.program.record import Record
from qrun.engine.program.runtime import Runtime
from qrun.formats import GGUFReader
from qrun.models import build_graph
from tests.kernel_harness import record


@functools.cache  # their code stays where it is
def kernels() -> Kernels:
    return load_kernels([*TEAM_KERNELS, "scale-"])


def doubling(steps: int, rows: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A program of `steps` operations, each with a barrier, that double rows in turn: its records, step and rows. The
    counters lie behind the step."""
    x = np.ones((rows, 33), np.float32)
    step = record(R.STEP_BYTES + 8 * steps, {R.N_ROWS: rows})
    fields = {
        R.OP_KERNEL: kernels()["scale-"], R.OP_BARRIER: 1, R.OP_IN_PARTS: 1, R.ROW_COUNT: step.ctypes.data + R.N_ROWS,
        R.ROW_X: x.ctypes.data, R.ROW_X_STRIDE: 132, R.ROW_Z: x.ctypes.data, R.ROW_Z_STRIDE: 132,
        R.ROW_Y: x.ctypes.data, R.ROW_Y_STRIDE: 132, R.ROW_WIDTH: 33, R.ROW_FACTOR: 2.0,
    }  # fmt: skip
    program = np.stack([record(R.RECORD_BYTES, fields)] * steps)
    program[:, R.OP_COUNTER // 8] = step[R.STEP_BYTES // 8 :].ctypes.data + 8 * np.arange(steps)
    return program, step, x


def make_team(threads: int) -> Team:
    return Team(kernels(), threads)


def own_field(team: Team, thread: int, field: int) -> int:
    return (R.THREAD + thread * R.THREAD_BYTES + field) // 8


@contextmanager
def short_of_time(team: Team) -> Iterator[None]:
    """While it lasts, the time of threads drawn by lot is up again and again, and OPENED is written late."""
    over = threading.Event()

    def disturb() -> None:
        chance = random.Random(3)
        while not over.is_set():
            team._crew.shared[own_field(team, chance.randrange(team.size), R.DEADLINE)] = 1
            team._crew.shared[R.OPENED // 8] -= chance.randrange(3)
            time.sleep(chance.random() * 2e-4)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_team_runs_every_operation_once(threads: int) -> None:
    program, step, x = doubling(10)
    before = set(threading.enumerate())  # other tests' servers may still be there
    team = make_team(threads)
    for round_ in range(1, 4):
        team.run(program, step)
        assert np.all(x == 2.0 ** (10 * round_))
        time.sleep(0.05)  # long enough for the others to go to sleep
    team.close()
    assert not set(threading.enumerate()) - before


def test_a_team_has_at_least_one_thread() -> None:
    with pytest.raises(ValueError, match="threads is 0"):
        make_team(0)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 2, 101, 701])
def test_nothing_is_lost_or_done_twice_where_threads_leave_and_join(threads: int, rows: int) -> None:
    program, step, x = doubling(100, rows)
    program[::2, R.OP_IN_PARTS // 8] = program[7::9, R.OP_IN_PARTS // 8] = R.IN_PARTS_BY_ROWS
    with closing(make_team(threads)) as team, short_of_time(team):
        for _ in range(200):
            x[:] = 2.0**-50
            team.run(program, step)
            assert np.all(x == 2.0**50)


def test_a_step_waits_for_no_thread_that_does_not_come() -> None:
    program, step, x = doubling(10)
    team = make_team(2)
    team.close()  # its second thread has gone for good
    team.run(program, step)
    assert np.all(x == 2.0**10)


def test_a_thread_that_gives_its_core_away_in_vain_does_so_for_a_while_only() -> None:
    program, step, _ = doubling(1)
    with closing(make_team(1)) as team:
        if sys.platform != "win32":  # nobody takes the core, whoever else wants it
            team._crew.shared[R.YIELD // 8] = ctypes.cast(ctypes.CDLL(None).getppid, ctypes.c_void_p).value
        tries, deadline = (own_field(team, 0, field) for field in (R.IN_VAIN, R.DEADLINE))
        patience = time.monotonic() + 60
        while time.monotonic() < patience:
            team._crew.shared[deadline] = 1
            before = int(team._crew.shared[tries])
            team.run(program, step)
            # Where it loses the core all the same, it counts from the beginning.
            over = team._crew.shared[deadline] == 0
            assert team._crew.shared[tries] in (0, before + 1) or (before == MOST_IN_VAIN and over)
            if over:
                break
        assert team._crew.shared[deadline] == 0
        assert team._crew.shared[tries] == MOST_IN_VAIN


def test_a_thread_that_others_have_waited_for_looks_at_the_time() -> None:
    program, step, _ = doubling(2)
    with closing(make_team(1)) as team:
        deadline = own_field(team, 0, R.DEADLINE)
        team.run(program, step)
        assert team._crew.shared[deadline] == 0
        team._crew.shared[R.LATE // 8] = 1
        before = time.monotonic_ns()
        team.run(program, step)
        assert team._crew.shared[R.LATE // 8] == 0
        assert before < team._crew.shared[deadline] - NANOSECONDS_AT_A_TIME < time.monotonic_ns()


@pytest.mark.parametrize("name", ["llama-dense", "gemma3-dense", "qwen3moe-moe"])
def test_logits_are_the_same_bits_where_threads_leave_and_join(name: str) -> None:
    with GGUFReader(ARCHITECTURES / f"{name}.gguf") as reader:
        graph = build_graph(reader, 256)
        tokens = np.random.default_rng(5).integers(0, graph.n_vocab, 90)

        def logits(runtime: Runtime) -> np.ndarray:
            sequence = runtime.sequence()
            prompt = runtime.evaluate(sequence, tokens, "all")
            return np.concatenate([prompt, *(runtime.evaluate(sequence, [t], "last")[None] for t in tokens[:40])])

        with closing(Runtime(graph, threads=1, context=256)) as alone:
            expected = logits(alone)
        with closing(Runtime(graph, threads=3, context=256)) as together:
            assert together._team is not None
            with short_of_time(together._team):
                for _ in range(5):
                    assert np.array_equal(logits(together), expected)


def test_rows_need_no_barrier_within_a_run_of_operations_in_parts() -> None:
    first, second = Buffer(64, 0, 9, 0), Buffer(64, 0, 9, 64)

    def barriers(*operations: tuple[str, Buffer, bool]) -> list[bool]:
        records = [Record(kernel, {}, [], [Place(buffer, 0, 4)], by_rows) for kernel, buffer, by_rows in operations]
        place_barriers(records, len(records))
        return [record.barrier for record in records]

    assert barriers(("scale-", first, True), ("add-", first, True)) == [False, True]
    assert barriers(("scale-", first, True), ("add-", first, False)) == [True, True]
    assert barriers(("scale-", first, True), ("matmul-F32", second, False)) == [False, True]
    # Behind the matmul, another thread may get the part.
    in_between = ("matmul-F32", second, False)
    assert barriers(("scale-", first, True), in_between, ("add-", first, True)) == [False, True, True]
