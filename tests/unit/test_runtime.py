"""Steps in pieces: what comes of them is the same, and they can be cancelled and watched meanwhile."""

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from tiny_model import ARCHITECTURES

from qrun.engine.errors import GenerationCancelled
from qrun.engine.program import pieces
from qrun.engine.program.runtime import Runtime
from qrun.formats import GGUFReader
from qrun.models import build_graph

CONTEXT = 256


@pytest.fixture(params=["llama-dense", "qwen3moe-moe"])
def runtime(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    reader = GGUFReader(ARCHITECTURES / f"{request.param}.gguf")
    with closing(Runtime(build_graph(reader, CONTEXT), threads=2, context=CONTEXT, batch=64)) as runtime:
        yield runtime


def tokens_for(runtime: Runtime, rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, runtime.n_vocab, count)


def all_logits(runtime: Runtime, tokens: np.ndarray) -> np.ndarray:
    logits = runtime.evaluate(runtime.sequence(), tokens, "all")
    assert logits is not None
    return logits


def test_pieces_change_no_bit(runtime: Runtime, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tokens_for(runtime, rng, 150)
    expected = all_logits(runtime, tokens)
    for seconds, first in ((0.0, 1), (1e-5, 3), (1e9, 10_000)):
        monkeypatch.setattr(pieces, "FIRST_PIECE", first)
        monkeypatch.setattr(runtime, "_pace", pieces.Pace(seconds))
        assert np.array_equal(all_logits(runtime, tokens), expected)
        sequence = runtime.sequence()
        one_by_one = [runtime.evaluate(sequence, [token]) for token in tokens[:20]]
        assert np.array_equal(np.stack(one_by_one), expected[:20])  # type: ignore[arg-type]


def test_a_batch_can_be_cancelled_half_way_and_goes_on_later(
    runtime: Runtime, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tokens_for(runtime, rng, 150)
    expected = all_logits(runtime, tokens)
    monkeypatch.setattr(runtime._pace, "piece_seconds", 0.0)
    asked: list[int] = []  # the sequence's progress, each time

    def cancelled_after(times: int) -> bool:
        asked.append(runtime.progress(sequence))
        return len(asked) > times

    sequence = runtime.sequence()
    runtime.evaluate(sequence, tokens, cancelled=lambda: cancelled_after(10**9))
    n_pieces = len(asked)
    assert n_pieces > 3 * 10, "three batches, each of many pieces"
    assert asked == sorted(asked) and len(set(asked)) > 20 and runtime.progress(sequence) == len(tokens)
    for times in rng.integers(0, n_pieces, 6).tolist():
        asked.clear()
        sequence = runtime.sequence()
        with pytest.raises(GenerationCancelled):
            runtime.evaluate(sequence, tokens, cancelled=lambda: cancelled_after(times))  # noqa: B023
        assert sequence.n_past in (0, 64, 128) and runtime.progress(sequence) == sequence.n_past
        rest = runtime.evaluate(sequence, tokens[sequence.n_past :], "all")
        assert rest is not None
        assert np.array_equal(rest, expected[len(tokens) - len(rest) :])


def test_pages_of_dropped_sequences_are_used_again(runtime: Runtime, rng: np.random.Generator) -> None:
    tokens = tokens_for(runtime, rng, 70)
    for _ in range(5):
        sequence = runtime.sequence()
        runtime.evaluate(sequence, tokens)
        twin = sequence.fork()
        runtime.evaluate(twin, tokens[:3])
        del sequence
        runtime.evaluate(twin, tokens[:3])
        del twin
    in_use = runtime.memory()["cache"]
    sequence = runtime.sequence()
    runtime.evaluate(sequence, tokens)
    assert runtime.memory()["cache"] == in_use


def test_logits_lie_where_they_are_wanted_and_nowhere_else(runtime: Runtime, rng: np.random.Generator) -> None:
    tokens = tokens_for(runtime, rng, 64)
    expected = all_logits(runtime, tokens)
    for count in (1, 2, 5, 8, 17, 64):
        sequence = runtime.sequence()
        sequence.reserve(count)
        paper = np.full((count + 2, runtime.width), np.nan, np.float32)
        found = runtime._run([(sequence, tokens[:count])], range(count), paper[1:-1])
        assert np.shares_memory(found, paper) and np.array_equal(found, expected[:count])
        assert np.isnan(paper[[0, -1]]).all()
        sequence.close()


def test_a_step_leaves_what_was_returned_before_as_it_was(runtime: Runtime, rng: np.random.Generator) -> None:
    tokens = tokens_for(runtime, rng, 3)
    sequence = runtime.sequence()
    first = runtime.evaluate(sequence, tokens[:1])
    assert first is not None
    before = first.copy()
    runtime.evaluate(sequence, tokens[1:], "all")
    runtime.evaluate(sequence, tokens[:1])
    assert np.array_equal(first, before)
