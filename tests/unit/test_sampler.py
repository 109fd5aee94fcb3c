"""The sampler as a whole: what it chooses, how often, and that it depends on nothing but seed and input."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from qrun.engine.sampling.options import SamplingOptions
from qrun.engine.sampling.sampler import Sampler, probabilities

EVERYTHING: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}


def draw(logits: Any, n: int = 4000, history: tuple[int, ...] = (), **options: Any) -> dict[int, float]:
    """How often each token comes, as a share, when the logits are the same at each of n draws."""
    logits = np.asarray(logits, np.float32)
    sampler = Sampler(SamplingOptions(seed=1).replace(**options), len(logits), history)
    return {token: count / n for token, count in Counter(sampler.sample(logits)[0] for _ in range(n)).items()}


def shares(chances: dict[int, float]) -> Any:
    """Within four standard deviations of 4,000 draws."""
    return pytest.approx(chances, abs=4 * 0.5 / math.sqrt(4000))


def test_without_truncation_tokens_come_as_often_as_their_probability_says() -> None:
    logits = np.array([1, 0, -1, 2, 0.5], np.float32)
    assert draw(logits, **EVERYTHING) == shares(dict(enumerate(probabilities(logits).tolist())))


def test_temperature_sharpens() -> None:
    logits = np.array([1, 0], np.float32)
    likelier = 1 / (1 + math.exp(-1 / 0.5))
    assert draw(logits, **EVERYTHING | {"temperature": 0.5}) == shares({0: likelier, 1: 1 - likelier})


def test_top_k_comes_before_top_p_before_min_p() -> None:
    logits = np.log([0.4, 0.3, 0.15, 0.1, 0.05])
    # Of the top 3, with 0.47, 0.35 and 0.18, the first two make 0.8.
    assert draw(logits, **EVERYTHING | {"top_k": 3, "top_p": 0.8}) == shares({0: 4 / 7, 1: 3 / 7})
    assert draw(logits, **EVERYTHING | {"top_p": 0.8, "min_p": 0.5}) == shares({0: 4 / 7, 1: 3 / 7})


def test_truncation_comes_before_temperature() -> None:
    logits = np.log([0.6, 0.4])
    assert set(draw(logits, **EVERYTHING | {"top_p": 0.5, "temperature": 100.0})) == {0}
    hot_first = {"samplers": ("temperature", "top_p")}
    assert set(draw(logits, **EVERYTHING | {"top_p": 0.5003, "temperature": 1000.0} | hot_first)) == {0, 1}


def test_a_step_that_is_not_named_does_not_run() -> None:
    logits = np.log([0.6, 0.4])
    assert draw(logits, samplers=("top_p",), top_p=1.0, temperature=100.0, top_k=1) == shares({0: 0.6, 1: 0.4})


def test_xtc_strikes_with_its_probability() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    rates = draw(logits, **EVERYTHING | {"xtc_probability": 0.5, "xtc_threshold": 0.1})
    # Half the time as it is, half the time with 0 and 1 gone, of which 2 and 3 have 3/4 and 1/4.
    assert rates == shares({0: 0.25, 1: 0.15, 2: 0.075 + 0.375, 3: 0.025 + 0.125})


def test_mirostat_approaches_its_surprise() -> None:
    random = np.random.default_rng(0)
    n_vocab, tau = 5000, 4.0
    logits = (-1.1 * np.log(1 + random.permutation(n_vocab))).astype(np.float32)
    sampler = Sampler(SamplingOptions(mirostat=2, mirostat_tau=tau, temperature=1.0, seed=3), n_vocab)
    surprises = []
    for _ in range(3000):
        logits = random.permutation(logits)
        before = sampler._surprise_limit
        sampler.sample(logits)
        surprises.append(tau + (before - sampler._surprise_limit) / sampler.options.mirostat_eta)
    assert np.mean(surprises[500:]) == pytest.approx(tau, abs=0.1)


def test_mirostat_does_not_truncate_otherwise() -> None:
    logits = np.log([0.5, 0.3, 0.2])
    options = {"mirostat": 2, "mirostat_tau": 50.0, "temperature": 1.0, "top_k": 1, "min_p": 1.0}
    assert draw(logits, **options) == shares({0: 0.5, 1: 0.3, 2: 0.2})


@pytest.mark.parametrize("others", [{}, {"mirostat": 2}, {"xtc_probability": 1.0}, {"typical_p": 0.1}])
def test_temperature_zero_takes_the_likeliest(others: dict[str, Any]) -> None:
    assert draw([0.1, 0.3, 0.2, 0.29], n=50, temperature=0, **others) == {1: 1.0}


def test_greedy_heeds_bias_and_penalties() -> None:
    logits = [3.0, 2.9, 0.0]
    assert draw(logits, n=1, temperature=0, logit_bias={2: 5.0}) == {2: 1.0}
    assert draw(logits, n=1, temperature=0, logit_bias={0: -math.inf}) == {1: 1.0}
    assert draw(logits, n=1, temperature=0, history=(0,), repetition_penalty=1.2) == {1: 1.0}
    assert draw(logits, n=1, temperature=0, history=(0,), presence_penalty=0.2) == {1: 1.0}
    assert draw(logits, n=1, temperature=0, history=(0, 0, 0, 1), frequency_penalty=0.1) == {1: 1.0}
    repeat = (1, 2, 0, 1, 2)
    assert draw(logits, n=1, temperature=0, history=repeat) == {0: 1.0}
    assert draw(logits, n=1, temperature=0, history=repeat, dry_multiplier=1.0) == {1: 1.0}
    assert draw(logits, n=1, temperature=0, history=repeat, dry_multiplier=1.0, dry_range=3) == {0: 1.0}


def test_penalties_forget_what_leaves_the_window() -> None:
    logits = np.array([3.0, 2.9, 0.0], np.float32)
    sampler = Sampler(SamplingOptions(temperature=0, presence_penalty=1.0, repetition_window=2), 3, [0, 0])
    chosen = []
    for _ in range(6):
        chosen.append(sampler.sample(logits)[0])
        sampler.accept(2)
    assert chosen == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("window", [-1, 0, 1, 5, 64])
def test_the_window_holds_the_same_whether_given_or_accepted(window: int) -> None:
    tokens = np.random.default_rng(window + 1).integers(0, 9, 100).tolist()
    options = SamplingOptions(repetition_window=window)
    given, accepted = Sampler(options, 9, tokens), Sampler(options, 9)
    for token in tokens:
        accepted.accept(token)
    assert given._counts == accepted._counts == Counter(tokens[-window:] if window > 0 else tokens if window else [])


def test_penalties_find_their_tokens_among_few_candidates_too() -> None:
    order = {"samplers": ("top_k", "penalties", "dry")}
    logits = [0.0, 1.0, 3.0, 2.9, -1.0]
    options = {"temperature": 0, "top_k": 3} | order
    assert draw(logits, n=1, history=(2, 0), presence_penalty=1.0, **options) == {3: 1.0}
    assert draw(logits, n=1, history=(4, 1, 2, 4, 1), dry_multiplier=1.0, **options) == {3: 1.0}


def test_same_seed_same_choices() -> None:
    rows = (np.random.default_rng(5).standard_normal((50, 2000)) * 3).astype(np.float32)

    def choices(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingOptions(seed=seed, xtc_probability=0.3, temperature=1.2), 2000)
        return [sampler.sample(row)[0] for row in rows]

    assert choices(1) == choices(1) != choices(2)
    assert choices(None) != choices(None)


def test_a_seed_from_the_system_can_be_used_again() -> None:
    logits = np.zeros(1000, np.float32)
    first = Sampler(SamplingOptions(), 1000)
    again = Sampler(SamplingOptions(seed=first.seed), 1000)
    assert [first.sample(logits)[0] for _ in range(9)] == [again.sample(logits)[0] for _ in range(9)]


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"logit_bias": {5: 20.0}}, {"repetition_penalty": 2.0}])
def test_log_probability_is_that_of_the_model(options: dict[str, Any]) -> None:
    logits = (np.random.default_rng(6).standard_normal(3000) * 3).astype(np.float32)
    before = logits.copy()
    token, logprob = Sampler(SamplingOptions(seed=1, **options), 3000, [5, 6, 7]).sample(logits)
    exact = logits.astype(np.float64)
    assert logprob == pytest.approx(exact[token] - np.log(np.exp(exact).sum()), abs=1e-5)
    assert np.array_equal(logits, before), "the caller's logits were changed"


def test_log_probabilities_can_be_left_out() -> None:
    assert Sampler(SamplingOptions(logprobs=False, temperature=0), 2).sample(np.array([0, 1], np.float32)) == (1, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_an_error(bad: float, temperature: float) -> None:
    sampler = Sampler(SamplingOptions(temperature=temperature), 10)
    with pytest.raises(ValueError, match="not finite"):
        sampler.sample(np.array([0.0] * 9 + [bad], np.float32))
    with pytest.raises(ValueError, match="not finite"):
        sampler.sample(np.full(10, -np.inf, np.float32))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 4711, 9999])
def test_nor_are_they_among_many_of_which_the_likeliest_are_wanted(bad: float, place: int) -> None:
    logits = np.random.default_rng(7).standard_normal(10_000).astype(np.float32)
    logits[place] = bad
    allowed = np.full(313, 0xFFFFFFFF, np.uint32)
    for mask in (None, allowed):
        with pytest.raises(ValueError, match="not finite"):
            Sampler(SamplingOptions(top_k=10), 10_000).sample(logits, mask)
    with pytest.raises(ValueError, match="not finite"):
        Sampler(SamplingOptions(top_k=10), 10_000).sample_asking(logits, lambda tokens, count: tokens[:count])


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_k": 0}, {"temperature": 0}, {"logit_bias": {5: 1.0}}])
@pytest.mark.parametrize("share", [0.0005, 0.01, 0.5, 0.999])
def test_a_mask_is_the_same_as_a_vocabulary_without_what_it_bans(options: dict[str, Any], share: float) -> None:
    rng = np.random.default_rng(8)
    n = 20_001
    for seed in range(20):
        logits = (rng.standard_normal(n) * 3).astype(np.float32)
        bits = np.zeros(n + 31, np.uint8)  # what is behind the vocabulary is nobody's
        bits[:] = rng.random(n + 31) < share
        if share < 0.001:  # all in one place, as numbers or the letters of a script are
            bits[:] = 0
            bits[19_000 : 19_000 + 10] = 1
        allowed = np.packbits(bits[: n // 32 * 32 + 32], bitorder="little").view(np.uint32)
        among = np.where(bits[:n] == 1, logits, np.float32(-np.inf))
        made = [Sampler(SamplingOptions(seed=seed, logprobs=False, **options), n) for _ in range(2)]
        assert made[0].sample(logits, allowed) == made[1].sample(among)


def test_banning_every_token_is_an_error() -> None:
    sampler = Sampler(SamplingOptions(logit_bias={0: -math.inf, 1: -math.inf}), 2)
    with pytest.raises(ValueError, match="bans every token"):
        sampler.sample(np.zeros(2, np.float32))


def test_a_bias_outside_the_vocabulary_is_an_error() -> None:
    with pytest.raises(ValueError, match="token 10 is not in the vocabulary of 10"):
        Sampler(SamplingOptions(logit_bias={10: 1.0}), 10)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 5}, {"top_k": 40, "min_p": 0.0}, {"top_k": 64}])
@pytest.mark.parametrize("share", [0.001, 0.02, 0.3, 0.99])
def test_looking_at_the_likeliest_first_changes_nothing(
    rng: np.random.Generator, options: dict[str, Any], share: float
) -> None:
    n = 20000
    quick, plain = (Sampler(SamplingOptions(seed=1, **options), n) for _ in range(2))
    assert quick._wanted
    plain._wanted = 0
    for i in range(30):
        logits = rng.normal(0, 3, n).astype(np.float32)
        if i % 3 == 0:
            logits = np.round(logits)  # many are equal
        bits = rng.random(n) < share
        bits[int(rng.integers(n))] = True
        allowed = np.zeros((n + 31) // 32, np.uint32)
        allowed.view(np.uint8)[: (n + 7) // 8] = np.packbits(bits, bitorder="little")
        assert quick.sample(logits, allowed) == plain.sample(logits, allowed)


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.1}, {"top_k": 0}, {"samplers": ("min_p", "top_k")}])
def test_where_other_steps_come_first_all_that_is_allowed_is_looked_at(options: dict[str, Any]) -> None:
    assert Sampler(SamplingOptions(**options), 100)._wanted == 0


@pytest.mark.parametrize("options", [
    {"temperature": 0, "top_logprobs": 2}, {"temperature": 1e-9}, {"temperature": 50.0}, {"top_p": 0.9},
    {"min_p": 1e-9}, {"typical_p": 0.9}, {"xtc_probability": 1.0}, {"mirostat": 2}, {"repetition_penalty": 1.5},
])  # fmt: skip
def test_a_program_that_has_numpy_raise_gets_the_same_tokens(options: dict[str, Any]) -> None:
    """np.seterr(all="raise") is the program's, and in logits there is much that comes to nothing, or is infinite."""
    logits = np.linspace(-300, 80, 3000).astype(np.float32)
    logits[7] = -np.inf

    def tokens() -> list[tuple[int, float | None]]:
        sampler = Sampler(SamplingOptions(seed=2, logprobs=True).replace(**EVERYTHING | options), len(logits), [2999])
        return [sampler.sample(logits, banned=[3]) for _ in range(3)]

    usual = tokens()
    with np.errstate(all="raise"):
        assert tokens() == usual
