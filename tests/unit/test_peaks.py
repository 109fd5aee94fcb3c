"""The highest logits of parts of a row: found by all threads, and what is chosen with their help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from qrun.engine.kernels import records as R
from qrun.engine.program.runtime import Part, Runtime
from qrun.engine.sampling.options import SamplingOptions
from qrun.engine.sampling.sampler import Sampler, first_of, largest, largest_by
from qrun.engine.simd.target import host_target
from qrun.formats import GGUFReader
from qrun.models import build_graph
from tests.bench.random_model import llama, write
from tests.kernel_harness import Harness

VOCABULARY = 20_300  # 19 groups, and some that are in none


def expected_of(rows: np.ndarray) -> np.ndarray:
    """The definition."""
    groups = rows.shape[-1] // R.PEAK_GROUP
    with np.errstate(invalid="ignore"):
        odd = rows - rows
    columns = (part[..., : groups * R.PEAK_GROUP].reshape(len(rows), groups, -1, R.PEAKS) for part in (rows, odd))
    highest, nothing = next(columns).max(axis=2), next(columns).sum(axis=2)
    return (highest + nothing).reshape(len(rows), -1)


@pytest.mark.parametrize("form", ["best", "plain"])
@pytest.mark.parametrize("parts", [1, 3, 64])
def test_the_kernel_finds_the_highest_of_each_column(form: str, parts: int, rng: np.random.Generator) -> None:
    harness = Harness(host_target(form), ["peaks-"])
    x = rng.normal(size=(3, VOCABULARY)).astype(np.float32)
    x[0, 5], x[1, 2000], x[2, 70], x[2, -1] = np.nan, np.inf, -np.inf, np.nan
    found = np.full_like(expected_of(x), -7)
    fields: dict[int, int | float] = {
        R.PEAKS_X: x.ctypes.data, R.PEAKS_X_STRIDE: x.strides[0], R.PEAKS_Y: found.ctypes.data,
        R.PEAKS_GROUPS: VOCABULARY // R.PEAK_GROUP,
    }  # fmt: skip
    for part in range(parts):
        harness.run("peaks-", fields, 3, {R.STEP_PARTS: parts}, part)
    assert np.array_equal(found, expected_of(x), equal_nan=True)
    assert np.isnan(found).sum() == 3


@pytest.mark.parametrize("n", [1000, R.PEAK_GROUP, 5 * R.PEAK_GROUP + 1, VOCABULARY, VOCABULARY - 900])
def test_they_show_where_the_largest_are(n: int, rng: np.random.Generator) -> None:
    for number in range(60):
        row = rng.normal(size=VOCABULARY).astype(np.float32)
        if number % 3 == 0:
            row = np.round(row)  # of which many are equal
        if number % 4 == 0:
            row[rng.integers(0, n)] = 9
        if number % 20 == 0:
            row[rng.integers(0, VOCABULARY)] = -np.inf
        peaks, values = expected_of(row[np.newaxis])[0], row[:n]
        assert first_of(values, peaks) == values.argmax()
        for k in (1, 40, 160, n):
            assert largest_by(values, k, peaks).tolist() == largest(values, k).tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [3, VOCABULARY - 1])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_no_number_is_noticed(bad: float, place: int, temperature: float, rng: np.random.Generator) -> None:
    row = rng.normal(size=VOCABULARY).astype(np.float32)
    row[place] = bad
    sampler = Sampler(SamplingOptions(temperature=temperature, top_k=20), VOCABULARY)
    with pytest.raises(ValueError, match="not finite"):
        sampler.sample(row, peaks=expected_of(row[np.newaxis])[0])


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 0}, {"top_k": 3, "repetition_penalty": 1.5}])
@pytest.mark.parametrize("banned", [(), (7, 8, 9)])
def test_they_change_no_choice(options: dict[str, float], banned: tuple[int, ...], rng: np.random.Generator) -> None:
    one, other = (Sampler(SamplingOptions(seed=1, **options), VOCABULARY, [7, 8]) for _ in range(2))  # type: ignore[arg-type]
    for _ in range(20):
        row = (3 * rng.normal(size=VOCABULARY)).astype(np.float32)
        row[7] += 9
        peaks = expected_of(row[np.newaxis])[0]
        assert one.sample(row, None, banned) == other.sample(row, None, banned, peaks)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    path: Path = tmp_path_factory.mktemp("model") / "wide.gguf"
    write(path, "Q8_0", llama(layers=1, width=64, ffn=64, heads=2, kv_heads=2, vocabulary=VOCABULARY))
    with closing(Runtime(build_graph(GGUFReader(path), 64), threads=2, context=64)) as runtime:
        yield runtime


def test_a_step_finds_them_for_each_row(runtime: Runtime) -> None:
    sequences = [runtime.sequence() for _ in range(4)]
    kinds = ("last", "none", "all", "last")
    rows = runtime.step([Part(s, [5 + i, 9], kinds[i]) for i, s in enumerate(sequences)])  # type: ignore[arg-type]
    assert [len(some) for some in rows] == [1, 0, 2, 1]
    for row in np.concatenate(rows):
        assert runtime.peaks_of(row) is None, "a copy is nobody's"
    for some in rows:
        for row in some:
            peaks = runtime.peaks_of(row)
            assert peaks is not None and np.array_equal(peaks, expected_of(row[np.newaxis])[0])


def test_and_so_does_an_evaluation_until_the_next_one(runtime: Runtime) -> None:
    sequence = runtime.sequence()
    for tokens in ([3], [4, 5, 6]):
        row = runtime.evaluate(sequence, tokens)
        assert row is not None
        peaks = runtime.peaks_of(row)
        assert peaks is not None and np.array_equal(peaks, expected_of(row[np.newaxis])[0])
    runtime.evaluate(sequence, [7])
    assert runtime.peaks_of(row) is None
