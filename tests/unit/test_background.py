"""Batches that are computed a while at a time: the same bits, whatever steps come in between."""

import gc
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from adapter_files import matrices
from test_adapter import random_adapter
from tiny_model import ARCHITECTURES

from qrun.engine import Model
from qrun.engine.errors import ContextOverflow
from qrun.engine.program import background
from qrun.engine.program.kv_cache import KVSequence
from qrun.engine.program.runtime import Part, Runtime
from qrun.formats import FormatError, GGUFReader
from qrun.models import build_graph
from tests import sketches

CONTEXT = 256
# With attention to everything, with windows, with experts; and with states of its own.
FILES = ["llama-dense", "gemma3-dense", "qwen3moe-moe"]
SKETCHES = ["lfm2-dense", "falcon-h1-dense"]


@pytest.fixture(params=[*FILES, *SKETCHES])
def runtime(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    name = request.param
    source = sketches.model(sketches.load()[name]) if name in SKETCHES else GGUFReader(ARCHITECTURES / f"{name}.gguf")
    with closing(Runtime(build_graph(source, CONTEXT), threads=2, context=CONTEXT, batch=64)) as runtime:
        yield runtime


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "PIECE_SECONDS", 0.0)


def step_of_others(runtime: Runtime, rng: np.random.Generator) -> Callable[[], None]:
    """One, which several sequences take, and some rows of a prompt."""
    others = [runtime.sequence() for _ in range(3)]
    for other in others:
        runtime.evaluate(other, rng.integers(0, runtime.n_vocab, 20), "none")

    def step() -> None:
        counts = zip(others, (1, 1, 5), strict=True)
        runtime.step([Part(other, rng.integers(0, runtime.n_vocab, n).tolist()) for other, n in counts])
        for other in others:
            other.truncate(other.n_past - 1 if other is not others[-1] else 20)

    return step


def read(
    runtime: Runtime, sequence: KVSequence, tokens: list[int], between: Callable[[], None]
) -> tuple[np.ndarray, int]:
    """Logits after tokens that are appended in the background, and how often others came in between."""
    count = 0
    while True:
        batch = runtime.begin_in_background(Part(sequence, tokens))
        before = sequence.n_past
        while not batch.run(0.0):
            assert sequence.n_past == before and not len(batch.logits)
            between()
            count += 1
        assert sequence.n_past == before + len(batch)
        tokens = tokens[len(batch) :]
        if not tokens:
            return batch.logits, count


def test_the_bits_are_those_of_any_batch(runtime: Runtime, rng: np.random.Generator) -> None:
    tokens = rng.integers(0, runtime.n_vocab, 150).tolist()
    expected = runtime.evaluate(runtime.sequence(), tokens, "all")
    assert expected is not None
    sequence, twins = runtime.sequence(), []
    steps = step_of_others(runtime, rng)

    def between() -> None:
        steps()
        if len(twins) < 3:  # what others go on from meanwhile
            twins.append((sequence.n_past, sequence.fork()))

    logits, count = read(runtime, sequence, tokens[:140], between)
    assert np.array_equal(logits[0], expected[139]) and count > 20
    rest = runtime.evaluate(sequence, tokens[140:], "all")
    assert rest is not None and np.array_equal(rest, expected[140:])
    for n, twin in twins:
        rest = runtime.evaluate(twin, tokens[n:], "last")
        assert rest is not None and np.array_equal(rest, expected[-1])


def test_what_is_dropped_half_way_has_spoilt_nothing(runtime: Runtime, rng: np.random.Generator) -> None:
    tokens = rng.integers(0, runtime.n_vocab, 120).tolist()
    expected = runtime.evaluate(runtime.sequence(), tokens, "all")
    assert expected is not None
    for pieces in (1, 5, 12):
        sequence = runtime.sequence()
        runtime.evaluate(sequence, tokens[:40])
        batch = runtime.begin_in_background(Part(sequence, rng.integers(0, runtime.n_vocab, 60).tolist()))
        for _ in range(pieces):
            batch.run(0.0)
        rest = runtime.evaluate(sequence, tokens[40:], "all")
        assert rest is not None and np.array_equal(rest, expected[40:])
        assert not batch.valid
        with pytest.raises(ValueError, match="has changed"):
            batch.run(1.0)


def test_there_is_one_at_a_time(rng: np.random.Generator) -> None:
    graph = build_graph(GGUFReader(ARCHITECTURES / "llama-dense.gguf"), CONTEXT)
    with closing(Runtime(graph, threads=1, context=CONTEXT)) as runtime:
        first, second = (
            runtime.begin_in_background(Part(runtime.sequence(), [1, 2, 3], logits)) for logits in ("last", "none")
        )
        assert not first.valid and second.valid
        assert second.run(60.0) and second.logits.shape == (0, runtime.width)
        with pytest.raises(ValueError, match="another batch"):
            first.run(1.0)
        full = runtime.sequence()
        runtime.evaluate(full, [1] * (CONTEXT - 2))
        with pytest.raises(ContextOverflow):
            runtime.begin_in_background(Part(full, [1, 2, 3]))
        with pytest.raises(ValueError, match="vocabulary"):
            runtime.begin_in_background(Part(runtime.sequence(), [runtime.n_vocab]))
        third = runtime.begin_in_background(Part(runtime.sequence(), [1, 2, 3]))
    with pytest.raises(ValueError, match="closed"):
        third.run(1.0)
    with pytest.raises(ValueError, match="closed"):
        runtime.prepare_background()


def test_what_nobody_wants_any_more_is_given_back_at_once(rng: np.random.Generator) -> None:
    graph = build_graph(GGUFReader(ARCHITECTURES / "llama-dense.gguf"), CONTEXT)
    with closing(Runtime(graph, threads=1, context=CONTEXT)) as runtime:
        gc.disable()
        try:
            batch = runtime.begin_in_background(Part(runtime.sequence(), [1] * 100))
            batch.run(0.0)
            assert runtime.cache_bytes > 0
            del batch
            assert runtime.cache_bytes == 0
        finally:
            gc.enable()


def test_adapters_are_those_of_the_sequence(rng: np.random.Generator, tmp_path: Path) -> None:
    path = ARCHITECTURES / "llama-dense.gguf"
    names = [name for name, shape in matrices(path).items() if len(shape) == 2 and name != "token_embd.weight"]
    files = {
        name: random_adapter(rng, path, tmp_path / f"{name}.gguf", names=names[i::2]) for i, name in enumerate("ab")
    }
    with Model.load(path, threads=2, context=CONTEXT, batch=64, adapters=files) as model:
        runtime = model._runtime
        tokens = rng.integers(0, runtime.n_vocab, 100).tolist()
        for chosen in ((), ((0, 1.0),), ((0, 0.5), (1, -1.0))):
            others = step_of_others(runtime, rng)
            plain, sequence = runtime.sequence(), runtime.sequence()
            plain.adapters = sequence.adapters = chosen
            expected = runtime.evaluate(plain, tokens)
            logits, _ = read(runtime, sequence, tokens, others)
            assert expected is not None and np.array_equal(logits[0], expected)


def test_a_file_that_was_cut_is_told_of(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes((ARCHITECTURES / "llama-dense.gguf").read_bytes())
    with closing(Runtime(build_graph(GGUFReader(path), CONTEXT), threads=1, context=CONTEXT)) as runtime:
        batch = runtime.begin_in_background(Part(runtime.sequence(), [1, 2, 3]))
        batch.run(0.0)
        with path.open("r+b") as file:
            file.truncate(1000)
        with pytest.raises(FormatError, match="cut"):
            batch.run(60.0)
