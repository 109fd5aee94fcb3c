"""How well a text is predicted, and how far one model is from another."""

import math
from itertools import chain

import numpy as np
import pytest
from engine_fakes import FakeRuntime, FakeTokenizer, ids_of

from qrun.engine.judging import scoring
from qrun.engine.judging.divergence import Divergence, check_same_vocabulary, kl_divergences
from qrun.engine.judging.scoring import Chunks, Estimate, Score, negative_log_likelihoods, scored_logits


def test_negative_log_likelihoods() -> None:
    logits = np.array([[0.0, 0.0], [math.log(3), 0.0], [1e4, 0.0]], np.float32)
    found = negative_log_likelihoods(logits, [0, 1, 0])
    assert found == pytest.approx([math.log(2), math.log(4), 0])


def test_the_second_half_of_a_chunk_is_scored() -> None:
    runtime = FakeRuntime()
    chunk = ids_of("0123456789")
    parts = list(scored_logits(runtime, chunk, None))  # type: ignore[arg-type]
    assert list(chain.from_iterable(targets for _, targets in parts)) == chunk[6:]
    expected = [runtime.logits_after(chunk[: i + 1]) for i in range(5, 9)]
    np.testing.assert_array_equal(np.concatenate([logits for logits, _ in parts]), expected)


def test_all_of_a_chunk_is_evaluated_and_bos_takes_the_place_of_its_first_token() -> None:
    runtime = FakeRuntime()
    list(scored_logits(runtime, ids_of("0123456789"), 0))  # type: ignore[arg-type]
    assert list(chain.from_iterable(runtime.evaluated)) == [0, *ids_of("123456789")]
    assert all(sequence.closed for sequence in runtime.sequences)


def test_many_logits_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = ids_of("0123456789" * 8)
    whole = list(scored_logits(FakeRuntime(), chunk, None))  # type: ignore[arg-type]
    monkeypatch.setattr(scoring, "LOGIT_BYTES", 1)
    parts = list(scored_logits(FakeRuntime(), chunk, None))  # type: ignore[arg-type]
    assert (len(whole), [len(targets) for _, targets in parts]) == (1, [16, 16, 7])
    np.testing.assert_array_equal(whole[0][0], np.concatenate([logits for logits, _ in parts]))


def test_a_text_is_cut_into_chunks() -> None:
    chunks = Chunks.of("abcdefghij", FakeTokenizer(), 4)  # type: ignore[arg-type]
    assert list(chunks) == [ids_of("abcd"), ids_of("efgh")]
    assert (len(chunks), chunks.scored, chunks.bos) == (2, 1, None)
    assert list(Chunks.of("abcdefghij", FakeTokenizer(), 4, 1)) == [ids_of("abcd")]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3 tokens, but one chunk takes 4"):
        Chunks.of("abc", FakeTokenizer(), 4)  # type: ignore[arg-type]


def test_perplexity_and_its_standard_error() -> None:
    score = Score([np.array([1.0, 2.0]), np.array([3.0, 6.0])])
    assert score.count == 4
    assert score.perplexity.value == pytest.approx(math.exp(3))
    assert score.perplexity.error == pytest.approx(math.exp(3) * np.std([1, 2, 3, 6], ddof=1) / 2)
    assert Score([np.array([1e4])]).perplexity == Estimate(math.inf, math.inf)


# Divergence


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def test_kl_divergence_is_that_of_the_probabilities(rng: np.random.Generator) -> None:
    a, b = (rng.normal(5, 4, (9, 1023)).astype(np.float32) for _ in range(2))
    p, q = softmax(a), softmax(b)
    np.testing.assert_allclose(kl_divergences(a, b), (p * np.log(p / q)).sum(1), rtol=1e-5)
    near = a + rng.normal(0, 1e-2, a.shape).astype(np.float32)
    p, q = softmax(a), softmax(near)
    np.testing.assert_allclose(kl_divergences(a, near), (p * np.log(p / q)).sum(1), rtol=1e-2, atol=1e-7)
    assert (kl_divergences(a, a) < 1e-7).all()
    np.testing.assert_allclose(kl_divergences(a, a + 3), 0, atol=1e-6)


def test_all_measures_against_their_definitions(rng: np.random.Generator) -> None:
    a = rng.normal(0, 3, (50, 77)).astype(np.float32)
    b = a + rng.normal(0, 1, a.shape).astype(np.float32)
    targets = rng.integers(0, 77, 50)
    divergence = Divergence()
    for part in (slice(0, 13), slice(13, 50)):
        divergence.add(a[part], b[part], targets[part].tolist())
    p, q = softmax(a), softmax(b)
    came = np.arange(50), targets
    ratios = np.log(p[came]) - np.log(q[came])
    change = q[came] - p[came]
    same = p.argmax(1) == q.argmax(1)

    def error(values: np.ndarray) -> float:
        return float(np.std(values, ddof=1) / math.sqrt(50))

    assert divergence.reference.perplexity.value == pytest.approx(math.exp(-np.log(p[came]).mean()), rel=1e-5)
    assert divergence.model.perplexity.value == pytest.approx(math.exp(-np.log(q[came]).mean()), rel=1e-5)
    kl = (p * np.log(p / q)).sum(1)
    rms = math.sqrt((change**2).mean())
    for found, value, uncertainty in (
        (divergence.mean_kl, kl.mean(), error(kl)),
        (divergence.perplexity_ratio, math.exp(ratios.mean()), math.exp(ratios.mean()) * error(ratios)),
        (divergence.agreement, same.mean(), math.sqrt(same.mean() * (1 - same.mean()) / 49)),
        (divergence.probability_change, change.mean(), error(change)),
        (divergence.rms_probability_change, rms, error(change**2) / (2 * rms)),
    ):
        assert (found.value, found.error) == pytest.approx((value, uncertainty), rel=1e-4, abs=1e-7)


def test_vocabularies_must_be_the_same() -> None:
    class Larger(FakeTokenizer):
        n_vocab = 3

    class Other(FakeTokenizer):
        def token_bytes(self, id: int) -> bytes:
            return b"?" if id == 5 else super().token_bytes(id)

    check_same_vocabulary(FakeTokenizer(), FakeTokenizer())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"its vocabulary has 3 tokens, the model's \d+"):
        check_same_vocabulary(FakeTokenizer(), Larger())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"token 5 of its vocabulary is b'\?', the model's b'\\x03'"):
        check_same_vocabulary(FakeTokenizer(), Other())  # type: ignore[arg-type]
