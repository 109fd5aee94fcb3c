"""Each sampling step against a plain statement of its definition, on random candidates."""

import math

import numpy as np
import pytest

from qrun.engine.sampling import sampler

SIZES = [1, 2, 7, 64, 100, 1000, 5000]


def random_candidates(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    ids = random.permutation(10 * n)[:n]
    return ids, (random.standard_normal(n) * random.choice([0.5, 2, 6])).astype(np.float32)


def softmax(logits: np.ndarray) -> list[float]:
    weights = [math.exp(float(x) - float(logits.max())) for x in logits]
    return [w / sum(weights) for w in weights]


def falling(values: np.ndarray | list[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])


def shortest_prefix(order: list[int], chances: list[float], mass: float) -> set[int]:
    total, kept = 0.0, set()
    for i in order:
        kept.add(i)
        total += chances[i]
        if total >= mass:
            break
    return kept


def assert_keeps(result: sampler.Candidates, ids: np.ndarray, logits: np.ndarray, positions: set[int]) -> None:
    kept_ids, kept_logits = result
    assert dict(zip(kept_ids.tolist(), kept_logits.tolist(), strict=True)) == {
        int(ids[i]): float(logits[i]) for i in positions
    }


@pytest.mark.parametrize("n", [*SIZES, 50257])
@pytest.mark.parametrize("k", [1, 2, 40, 300, 5000])
def test_largest_are_those_that_a_full_sort_puts_first(n: int, k: int) -> None:
    values = random_candidates(n, n)[1]
    assert sampler.largest(values, k).tolist() == falling(values)[:k]


@pytest.mark.parametrize("n", [100, 6400, 50257])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_largest_breaks_ties_by_position(n: int, k: int) -> None:
    values = np.random.default_rng(n).integers(0, 4, n).astype(np.float32)
    assert sampler.largest(values, k).tolist() == falling(values)[:k]
    assert sampler.largest(np.zeros(n, np.float32), k).tolist() == list(range(k))


def test_largest_puts_minus_infinity_last() -> None:
    values = np.full(6400, -np.inf, np.float32)
    values[[17, 6399]] = [1, 2]
    assert sampler.largest(values, 4).tolist() == [6399, 17, 0, 1]


@pytest.mark.parametrize("offset", [0, 100, -100])
@pytest.mark.parametrize("n", SIZES)
def test_log_sum_exp(n: int, offset: int) -> None:
    logits = random_candidates(n, n)[1] + np.float32(offset)
    expected = offset + math.log(math.fsum(math.exp(float(x) - offset) for x in logits))
    assert sampler.log_sum_exp(logits, float(logits.max()), np.empty_like(logits)) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("n", SIZES)
def test_probabilities(n: int) -> None:
    logits = random_candidates(n, n)[1]
    assert sampler.probabilities(logits) == pytest.approx(softmax(logits), rel=1e-5)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("k", [0, 1, 40, 10000])
def test_top_k(n: int, k: int) -> None:
    ids, logits = random_candidates(n, n)
    assert_keeps(sampler.top_k(ids, logits, k), ids, logits, set(falling(logits)[: k or n]))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("p", [0.0, 0.3, 0.95, 0.999])
def test_top_p(n: int, p: float) -> None:
    ids, logits = random_candidates(n, n)
    expected = shortest_prefix(falling(logits), softmax(logits), p)
    assert_keeps(sampler.top_p(ids, logits, p), ids, logits, expected)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 1.0])
def test_min_p(n: int, p: float) -> None:
    ids, logits = random_candidates(n, n)
    chances = softmax(logits)
    expected = {i for i in range(n) if chances[i] >= p * max(chances) * (1 - 1e-9)}
    assert_keeps(sampler.min_p(ids, logits, p), ids, logits, expected)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("p", [0.2, 0.9, 0.99])
def test_typical_p(n: int, p: float) -> None:
    ids, logits = random_candidates(n, n)
    chances = softmax(logits)
    entropy = -math.fsum(c * math.log(c) for c in chances)
    order = falling([-abs(-math.log(c) - entropy) for c in chances])
    assert_keeps(sampler.typical_p(ids, logits, p), ids, logits, shortest_prefix(order, chances, p))


def test_typical_p_never_keeps_what_is_banned() -> None:
    ids, logits = np.arange(3), np.array([1, -np.inf, 0], np.float32)
    assert 1 not in sampler.typical_p(ids, logits, 0.999)[0]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("threshold", [0.001, 0.02, 0.1, 0.4])
def test_xtc(n: int, threshold: float) -> None:
    ids, logits = random_candidates(n, n)
    chances = softmax(logits)
    top = [i for i in falling(logits) if chances[i] >= threshold]
    assert_keeps(sampler.xtc(ids, logits, threshold), ids, logits, set(range(n)) - set(top[:-1]))


@pytest.mark.parametrize("degrees", [0.1, 1.0, 1.7])
def test_temperature(degrees: float) -> None:
    logits = random_candidates(3, 100)[1]
    hot = [math.exp(float(x) / degrees) for x in logits]
    assert softmax(sampler.temperature(logits, degrees)) == pytest.approx([h / sum(hot) for h in hot], rel=1e-4)


def test_a_temperature_near_zero_leaves_the_likeliest() -> None:
    assert softmax(sampler.temperature(np.array([1, 3, 2], np.float32), 1e-300)) == [0, 1, 0]


def test_penalties_never_make_a_token_likelier() -> None:
    logits, counts = np.array([2, 2, -2, 0, -np.inf], np.float32), np.array([1, 3, 1, 2, 1], np.float32)
    penalized = sampler.penalize(logits, counts, repetition=1.25, presence=0.5, frequency=0.1)
    assert penalized == pytest.approx([1.6 - 0.6, 1.6 - 0.8, -2.5 - 0.6, -0.7, -math.inf])
    assert penalized.dtype == np.float32


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("bits", [-3.0, 0.5, 4.0, 11.0, 5000.0])
def test_mirostat_keeps_what_surprises_little_enough(n: int, bits: float) -> None:
    ids, logits = random_candidates(n, n)
    chances = softmax(logits)
    expected = {i for i in range(n) if -math.log2(chances[i]) <= bits} or {falling(logits)[0]}
    assert_keeps(sampler.surprise_at_most(ids, logits, bits), ids, logits, expected)


@pytest.mark.parametrize("n", [1, 3, 512, 513, 3000])
def test_choose_gives_each_candidate_its_share(n: int) -> None:
    logits = random_candidates(n, n)[1]
    bounds = np.cumsum(softmax(logits))
    for uniform in [0.0, *np.random.default_rng(n).random(200), math.nextafter(1.0, 0.0)]:
        chosen = sampler.choose(logits, uniform)
        assert (bounds[chosen - 1] if chosen else 0.0) <= uniform + 1e-6
        assert uniform <= bounds[chosen] + 1e-6


@pytest.mark.parametrize("n", [4, 2000])
@pytest.mark.parametrize("uniform", [0.0, 0.5, math.nextafter(1.0, 0.0)])
def test_choose_never_picks_what_is_banned(n: int, uniform: float) -> None:
    logits = np.full(n, -np.inf, np.float32)
    logits[[1, n - 2]] = 0
    assert sampler.choose(logits, uniform) in (1, n - 2)
