"""Operations that keep a state of a sequence: against their definition, in any split, and going back."""

from collections.abc import Callable

import numpy as np
import pytest

from qrun.engine.errors import GenerationCancelled
from qrun.engine.generation.token_cache import TokenCache
from qrun.engine.program.runtime import Runtime
from qrun.engine.program.state_blocks import MAX_CHECKPOINTS
from qrun.engine.simd.target import host_target
from qrun.models import graph as G
from tests.reference import forward
from tests.unit.test_operations import Maker

N_ROWS = 75
SPLITS = ([75], [1] * 75, [15, 1, 1, 31, 27], [16, 16, 43], [7, 60, 8], [33, 33, 9])


def convolved(width: int, taps: int, *, silu: bool = True, biased: bool = True) -> Callable[[Maker], G.Value]:
    def make(maker: Maker) -> G.Value:
        x = maker.embed(width)
        bias = maker.constant(width) if biased else None
        weight = maker.constant(taps, width)
        return maker.add(G.Convolution(maker.value(width), x, weight, bias, silu, maker.state()))

    return make


def attended(
    dim_k: int, dim_v: int, heads: int, key_heads: int, *, delta: bool, by_dimension: bool = False,
    tiled: bool = False, fixed: bool = False,
) -> Callable[[Maker], G.Value]:  # fmt: skip
    def make(maker: Maker) -> G.Value:
        q, k, v = (maker.embed(width) for width in (key_heads * dim_k, key_heads * dim_k, heads * dim_v))
        k = maker.add(G.RMSNorm(maker.value(k.width), k, np.full(dim_k, dim_k**-0.5, np.float32), 1e-6, key_heads))
        decay: G.Value | np.ndarray = -np.abs(maker.constant(heads))
        if not fixed:
            x = maker.embed(heads * dim_k if by_dimension else heads)
            fading = maker.add(G.ActivateAlone(maker.value(x.width), x, "softplus"))
            decay = maker.add(G.Scale(maker.value(x.width), fading, -0.5))
        beta = maker.add(G.ActivateAlone(maker.value(heads), maker.embed(heads), "sigmoid")) if delta else None
        operation = G.LinearAttention(
            maker.value(v.width), q, k, v, decay, beta, heads, key_heads, tiled, dim_k**-0.5, maker.state()
        )
        return maker.add(operation)

    return make


def scanned(width: int, n_state: int) -> Callable[[Maker], G.Value]:
    def make(maker: Maker) -> G.Value:
        x, b, c = (maker.embed(size) for size in (width, n_state, n_state))
        time = maker.add(G.ActivateAlone(maker.value(width), maker.embed(width), "softplus"))
        fading = -np.abs(maker.constant(width, n_state))
        return maker.add(
            G.SelectiveScan(maker.value(width), x, time, b, c, fading, maker.constant(width), maker.state())
        )

    return make


def remembered(heads: int, dim: int, *, delta: bool) -> Callable[[Maker], G.Value]:
    def make(maker: Maker) -> G.Value:
        width = heads * dim
        r, k, v, x, y = (maker.embed(width) for _ in range(5))
        kept = maker.add(G.ActivateAlone(maker.value(width), x, "sigmoid"))
        a = b = None
        if delta:
            unit = np.full(dim, dim**-0.5, np.float32)
            key = maker.add(G.RMSNorm(maker.value(width), y, unit, 1e-6, heads))
            a = maker.add(G.Scale(maker.value(width), key, -1.0))
            b = maker.add(G.Gate(maker.value(width), x, key, "sigmoid"))
        return maker.add(G.WKV(maker.value(width), r, kept, k, v, a, b, heads, maker.state()))

    return make


def hashed(width: int, per_length: int, multipliers: tuple[int, ...]) -> Callable[[Maker], G.Value]:
    def make(maker: Maker) -> G.Value:
        count = per_length * (len(multipliers) - 1)
        sizes = tuple(range(40, 40 + count))
        weight = maker.weight("table", sum(sizes) + 3, width)
        hashes = G.Hashes(multipliers, per_length, sizes, tuple(np.cumsum((3, *sizes))[:-1].tolist()), 7)
        return maker.add(G.EmbedHashes(maker.value(count * width), weight, hashes, maker.state()))

    return make


CASES = {
    "wkv": remembered(3, 32, delta=True),
    "wkv without a delta rule": remembered(2, 64, delta=False),
    "hashes of the last three": hashed(24, 2, (11, (1 << 64) - 3, 0x9E3779B97F4A7C15)),
    "hashes of the last two": hashed(13, 3, (1, 3)),
    "hashes of the last eight": hashed(8, 1, tuple(range(1, 16, 2))),
    "convolution": convolved(70, 4),
    "convolution of two": convolved(33, 2, silu=False, biased=False),
    "convolution of three": convolved(16, 3, biased=False),
    "plain": attended(24, 40, 3, 1, delta=False),
    "plain and fixed": attended(32, 32, 2, 2, delta=False, fixed=True),
    "delta": attended(128, 128, 4, 2, delta=True),
    "delta, tiled": attended(31, 17, 6, 3, delta=True, tiled=True),
    "delta by dimension": attended(40, 24, 2, 2, delta=True, by_dimension=True),
    "selective scan": scanned(64, 16),
    "selective scan of odd sizes": scanned(77, 5),
    "selective scan of one channel": scanned(1, 130),
}


@pytest.mark.parametrize("form", ["best", "plain"])
@pytest.mark.parametrize("case", CASES)
def test_as_defined_and_the_same_in_any_split(rng: np.random.Generator, case: str, form: str) -> None:
    maker = Maker(rng)
    graph = maker.graph(CASES[case](maker))
    tokens = rng.integers(0, graph.n_vocab, N_ROWS)
    expected = forward(graph, tokens.tolist())
    runtime = Runtime(graph, threads=2, context=96, target=host_target(form))
    results = []
    for split in SPLITS:
        sequence = runtime.sequence()
        ends = np.cumsum(split)
        parts = [runtime.evaluate(sequence, tokens[end - n : end], "all") for n, end in zip(split, ends, strict=True)]
        results.append(np.concatenate([part for part in parts if part is not None]))
    np.testing.assert_allclose(results[0], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert all(np.array_equal(result, results[0]) for result in results[1:])
    runtime.close()


@pytest.fixture
def runtime(rng: np.random.Generator) -> Runtime:
    """A model with every kind of state, and attention behind."""
    maker = Maker(rng)
    x = convolved(48, 4)(maker)
    y = attended(16, 16, 2, 1, delta=True)(maker)
    for make in (scanned(32, 6), remembered(1, 32, delta=True), hashed(16, 1, (3, 5, 7))):
        y = maker.add(G.Add(maker.value(32), y, make(maker)))
    q, k, v = (maker.linear(x, 32) for _ in range(3))
    maker.caches.append(G.CacheLayer(1, 1, 32, 32, None))
    z = maker.add(G.Attention(maker.value(32), q, k, v, 0, 32**-0.5, None))
    return Runtime(maker.graph(maker.add(G.Add(maker.value(32), y, z))), threads=2, context=400, batch=64)


def logits(runtime: Runtime, tokens: np.ndarray) -> np.ndarray:
    result = runtime.evaluate(runtime.sequence(), tokens, "all")
    assert result is not None
    return result


def test_guesses_can_be_taken_back_anywhere(runtime: Runtime, rng: np.random.Generator) -> None:
    tokens = rng.integers(0, runtime.n_vocab, 120)
    expected = logits(runtime, tokens)
    sequence = runtime.sequence()
    n = 0
    while n < len(tokens):
        room = sequence.returnable()
        assert room == min(15, runtime.context - n - 1)
        right = tokens[n : n + 1 + int(rng.integers(0, room + 1))]
        guesses = np.concatenate([right, rng.integers(0, runtime.n_vocab, room + 1 - len(right))])
        result = runtime.evaluate(sequence, guesses, "all")
        assert result is not None and np.array_equal(result[: len(right)], expected[n : n + len(right)])
        n += len(right)
        assert sequence.truncate(n) == n


def test_a_cancelled_step_spoils_nothing(
    runtime: Runtime, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime._pace, "piece_seconds", 1e-9)
    tokens = rng.integers(0, runtime.n_vocab, 90)
    expected = logits(runtime, tokens)
    sequence = runtime.sequence()
    runtime.evaluate(sequence, tokens[:37], "none")
    for count, pieces in ((3, 2), (40, 5), (64, 8), (20, 6)):
        asked = iter([False] * pieces + [True])
        with pytest.raises(GenerationCancelled):
            runtime.evaluate(sequence, rng.integers(0, runtime.n_vocab, count), "last", lambda asked=asked: next(asked))
    result = runtime.evaluate(sequence, tokens[37:], "all")
    assert result is not None and np.array_equal(result, expected[37:])


def test_going_back_reaches_a_checkpoint(runtime: Runtime, rng: np.random.Generator) -> None:
    tokens = rng.integers(0, runtime.n_vocab, 300)
    expected = logits(runtime, tokens)
    sequence = runtime.sequence()
    runtime.evaluate(sequence, tokens[:210], "none")  # batches of 64 leave one each: of positions 64, 128, 192
    sequence.mark()
    for token in tokens[210:]:
        runtime.evaluate(sequence, [token], "none")
    for wanted, reached in ((290, 290), (250, 224), (213, 213), (207, 192), (150, 128), (127, 127), (60, 60), (20, 0)):
        assert sequence.truncate(wanted) == reached
        twin = sequence.fork()
        result = runtime.evaluate(twin, tokens[reached:], "all")
        assert result is not None and np.array_equal(result, expected[reached:])
        twin.close()


def test_only_so_many_checkpoints_are_kept(runtime: Runtime, rng: np.random.Generator) -> None:
    sequence = runtime.sequence()
    tokens = rng.integers(0, runtime.n_vocab, 20 * 18)
    for part in np.split(tokens, 18):
        runtime.evaluate(sequence, part, "none")
        sequence.mark()
    assert MAX_CHECKPOINTS <= len(sequence.states.blocks) <= MAX_CHECKPOINTS + 2
    assert sequence.truncate(300) == 300 and sequence.truncate(150) == 0


def test_forks_go_their_own_ways(runtime: Runtime, rng: np.random.Generator) -> None:
    tokens, others = rng.integers(0, runtime.n_vocab, (2, 60))
    for n in (16, 21, 32):
        sequence = runtime.sequence()
        runtime.evaluate(sequence, tokens[:n], "none")
        twin = sequence.fork()
        mixed = np.concatenate([tokens[:n], others[n:]])
        for i in range(n, 60):
            together = runtime.evaluate_together([sequence, twin], [tokens[i], others[i]])
        assert np.array_equal(together[0], logits(runtime, tokens)[-1])
        assert np.array_equal(together[1], logits(runtime, mixed)[-1])


def test_blocks_come_back_to_the_pool(runtime: Runtime, rng: np.random.Generator) -> None:
    tokens = rng.integers(0, runtime.n_vocab, 200)
    for _ in range(3):
        sequence = runtime.sequence()
        runtime.evaluate(sequence, tokens, "none")
        twin = sequence.fork()
        runtime.evaluate(twin, tokens[:5], "none")
        sequence.close()
        del twin
    allocated = runtime.memory()["cache"]
    runtime.evaluate(runtime.sequence(), tokens, "none")
    assert runtime.memory()["cache"] == allocated


def test_a_saved_state_is_checked_and_restored(runtime: Runtime, rng: np.random.Generator) -> None:
    tokens = rng.integers(0, runtime.n_vocab, 100)
    sequence = runtime.sequence()
    runtime.evaluate(sequence, tokens[:77], "none")
    state = {name: values.copy() for name, values in sequence.state().items()}
    loaded = runtime.sequence()
    loaded.restore(state)
    result = runtime.evaluate(loaded, tokens[77:], "all")
    assert result is not None and np.array_equal(result, logits(runtime, tokens)[77:])
    damaged = state["states"].copy()
    damaged[-1, :4] = np.array([np.nan], np.float32).view(np.uint8)
    for wrong in (
        {"states": damaged}, {"states": state["states"][:, :-64]}, {"blocks": state["blocks"] + 1},
        {"blocks": state["blocks"] - 100}, {"blocks": state["blocks"][:0], "states": state["states"][:0]},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="the saved state"):
            runtime.sequence().restore(state | wrong)
    with pytest.raises(ValueError, match="another model"):
        runtime.sequence().restore({name: values for name, values in state.items() if name != "states"})


def test_a_talk_reads_no_more_than_what_lies_behind_the_last_message(
    runtime: Runtime, rng: np.random.Generator
) -> None:
    end = 7

    def message(length: int) -> list[int]:  # those of different lengths begin with different tokens
        return [length % 9 + 8, *(int(token) for token in rng.integers(8, runtime.n_vocab, length - 2)), end]

    cache = TokenCache(runtime, runtime.sequence())
    first, second, question, thoughts, other = (message(n) for n in (50, 41, 23, 37, 30))
    cache.advance_to(first + second + question, lambda: False, frozenset({end}))
    for token in thoughts:
        cache.advance(token, lambda: False)
    # The thoughts are left out of what comes next.
    prompt = first + second + question + other
    result, n_held = cache.advance_to(prompt, lambda: False, frozenset({end}))
    assert n_held == 50 + 41 + 23 and np.array_equal(result, logits(runtime, np.array(prompt))[-1])
    # Another question in the place of the one before.
    _, n_held = cache.advance_to(first + second + other, lambda: False, frozenset({end}))
    assert n_held == 50 + 41
