"""What an observing runtime sees, against the inputs of a plain NumPy forward pass."""

from pathlib import Path

import numpy as np
import pytest

from qrun.engine.kernels import records as R
from qrun.engine.program.runtime import Runtime
from qrun.engine.quantize.importance import Collector
from qrun.engine.simd.target import host_target
from qrun.formats import GGUFReader
from qrun.models import build_graph
from qrun.models.graph import Graph
from tests import reference
from tests.kernel_harness import Harness

ARCHITECTURES = Path(__file__).parents[1] / "data" / "arch"
FILES = sorted(ARCHITECTURES.glob("*.gguf"))


@pytest.fixture(scope="module", params=["best", "plain"])
def harness(request: pytest.FixtureRequest) -> Harness:
    return Harness(host_target(request.param), ["observe-rows", "observe-experts", "observe-keep"])


@pytest.mark.parametrize("width", [1, 16, 33, 96, 101])
def test_rows_are_squared_and_summed(harness: Harness, rng: np.random.Generator, width: int) -> None:
    x = rng.normal(size=(7, width + 3)).astype(np.float32)
    sums, counts = rng.uniform(0, 1, width).astype(np.float32), np.array([5], np.int64)
    before = sums.copy()
    harness.run("observe-rows", fields(x, sums, counts, width), 7)
    np.testing.assert_allclose(sums, before + (x[:, :width].astype(np.float64) ** 2).sum(0), rtol=1e-6)
    assert counts[0] == 12


def test_rows_are_kept_as_they_are(harness: Harness, rng: np.random.Generator) -> None:
    x = rng.normal(size=(7, 40)).astype(np.float32)
    rows, counts = np.zeros((9, 37), np.float32), np.array([5], np.int64)
    harness.run("observe-keep", fields(x, rows, counts, 37), 7)
    np.testing.assert_array_equal(rows[:7], x[:, :37])
    assert counts[0] == 7 and not rows[7:].any()


@pytest.mark.parametrize("by_slot", [False, True])
def test_rows_of_experts_count_for_each_expert_that_they_go_to(
    harness: Harness, rng: np.random.Generator, by_slot: bool
) -> None:
    rows, used, experts, width = 9, 2, 5, 37
    chosen = np.array([rng.choice([0, 1, 2, 4], used, replace=False) for _ in range(rows)])  # the fourth has none
    ranges, slots, first = [], np.zeros((rows, used), np.int64), 0
    for expert in (0, 1, 2, 4):
        where = np.argwhere(chosen == expert)
        slots[tuple(where.T)] = first + np.arange(len(where))
        if len(where):
            ranges += [expert, first, len(where)]
        first += len(where) + 3  # panels are padded
    table = np.array([len(ranges) // 3, *ranges], np.int64)
    x = rng.normal(size=(first if by_slot else rows, width)).astype(np.float32)
    sums, counts = np.zeros((experts, width), np.float32), np.zeros(experts, np.int64)
    expected, expected_counts = np.zeros((experts, width)), np.zeros(experts, int)
    for row in range(rows):
        for i in range(used):
            expected[chosen[row, i]] += x[slots[row, i] if by_slot else row].astype(np.float64) ** 2
            expected_counts[chosen[row, i]] += 1
    harness.run("observe-experts", fields(x, sums, counts, width) | {
        R.OBS_SLOTS: slots.ctypes.data, R.OBS_RANGES: table.ctypes.data, R.OBS_USED: used, R.OBS_BY_SLOT: int(by_slot),
    }, rows)  # fmt: skip
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    np.testing.assert_array_equal(counts, expected_counts)


def fields(x: np.ndarray, sums: np.ndarray, counts: np.ndarray, width: int) -> dict[int, int | float]:
    return {
        R.OBS_X: x.ctypes.data, R.OBS_X_STRIDE: x.strides[0], R.OBS_WIDTH: width, R.OBS_SUMS: sums.ctypes.data,
        R.OBS_COUNTS: counts.ctypes.data,
    }  # fmt: skip


Seen = dict[str, tuple[np.ndarray, list[int]]]


def observed(graph: Graph, tokens: np.ndarray, threads: int, cuts: list[int]) -> Seen:
    """What a runtime sees of a text: name -> sums [experts, inputs], counts."""
    runtime = Runtime(graph, threads=threads, context=64, observe=True)
    sequence, collector = runtime.sequence(), Collector(runtime)
    for part in np.split(tokens, cuts):
        runtime.evaluate(sequence, part, "last")
        collector.take()
    found = {name: (entry.sums, entry.counts.tolist()) for name, entry in collector.sums.items()}
    runtime.close()
    return found


@pytest.mark.usefixtures("half_precision_cache")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_inputs_of_all_matrices_of_the_layers(path: Path, rng: np.random.Generator) -> None:
    with GGUFReader(path) as reader:
        graph = build_graph(reader, 64)
        tokens = rng.integers(0, graph.n_vocab, 45)
        expected = reference.input_squares(graph, tokens)
        found = observed(graph, tokens, 2, [16, 17])
    assert found.keys() == {name for name in expected if name.startswith("blk.")}
    for name, (sums, counts) in found.items():
        assert counts == expected[name][1].tolist(), name
        squares = expected[name][0]
        # As a whole, for a value between two of float16 may be rounded either way, and shows in its column: in 400 runs
        # the most was 0.6e-4.
        assert np.linalg.norm(sums - squares) <= 2e-4 * np.linalg.norm(squares), name


@pytest.mark.parametrize("name", ["llama-dense", "qwen3moe-moe"])
def test_sums_are_the_same_on_any_number_of_threads(name: str, rng: np.random.Generator) -> None:
    with GGUFReader(ARCHITECTURES / f"{name}.gguf") as reader:
        graph = build_graph(reader, 64)
        tokens = rng.integers(0, graph.n_vocab, 33)
        one, three = (observed(graph, tokens, threads, [20]) for threads in (1, 3))
    for name in one:
        np.testing.assert_array_equal(one[name][0], three[name][0])


def test_observing_changes_no_logits_and_costs_nothing_when_it_is_off(rng: np.random.Generator) -> None:
    with GGUFReader(ARCHITECTURES / "qwen3moe-moe.gguf") as reader:
        graph = build_graph(reader, 64)
        tokens = rng.integers(0, graph.n_vocab, 20)
        results, kernels = [], []
        for observe in (False, True):
            runtime = Runtime(graph, threads=2, context=64, observe=observe)
            results.append(runtime.evaluate(runtime.sequence(), tokens, "all"))
            kernels.append([record.kernel for record in runtime._program.records])
            runtime.close()
    np.testing.assert_array_equal(*results)
    assert not any(kernel.startswith("observe") for kernel in kernels[0])
    # Behind the last attention, those who do not observe drop the rows that nobody wants.
    watched = [kernel for kernel in kernels[1] if not kernel.startswith("observe")]
    same = 1 + max(i for i, kernel in enumerate(watched) if kernel.startswith("attention"))
    assert kernels[0][:same] == watched[:same]
