"""How far one model's predictions are from another's: what quantising, say, has changed.

Over the tokens of a text: the Kullback-Leibler divergence KL(reference || model), how often both hold the same token to
be the likeliest, and how the probability of the token that came has changed. The measures are those of
llama-perplexity --kl-divergence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from qrun.engine.judging.scoring import Estimate, F32Array, F64Array, Score
from qrun.engine.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Predicted:
    """Distributions p over the next token, kept to measure how far others are from them.

    probabilities: float32 [n, n_vocab]. negative_entropies: sum p log p of each, float64 [n], in nats.
    """

    probabilities: F32Array
    negative_entropies: F64Array

    @classmethod
    def of(cls, logits: F32Array) -> Predicted:
        """softmax(logits), float32 [n, n_vocab]. Logits are taken less their row's maximum; sums are in float64."""
        shifted = logits - logits.max(axis=1, keepdims=True)
        weights = np.exp(shifted)
        total = weights.sum(axis=1, dtype=np.float64)
        weights /= total[:, None].astype(np.float32)
        return cls(weights, np.einsum("ij,ij->i", weights, shifted, dtype=np.float64) - np.log(total))

    def divergences(self, logits: F32Array) -> F64Array:
        """KL(p || q) = sum p log p - sum p log q of each row, with q = softmax(logits), in nats: float64 [n]."""
        shifted = logits - logits.max(axis=1, keepdims=True)
        cross = np.einsum("ij,ij->i", self.probabilities, shifted, dtype=np.float64)
        cross -= np.log(np.exp(shifted, out=shifted).sum(axis=1, dtype=np.float64))
        return np.maximum(self.negative_entropies - cross, 0.0)  # rounding can take it below


def kl_divergences(reference: F32Array, logits: F32Array) -> F64Array:
    """KL(softmax(reference) || softmax(logits)) of each row, in nats: float64 [n] from two float32 [n, n_vocab]."""
    return Predicted.of(reference).divergences(logits)


@dataclass
class Divergence:
    """The measures over the tokens scored so far: one float64 for each token in each of the lists' arrays."""

    model: Score = field(default_factory=Score)
    reference: Score = field(default_factory=Score)
    kl_parts: list[F64Array] = field(default_factory=list)
    agreement_parts: list[F64Array] = field(default_factory=list)

    def add(self, reference: F32Array, logits: F32Array, targets: Sequence[int]) -> None:
        """Take in some tokens: both models' logits before each, float32 [n, n_vocab], and the tokens that came."""
        self.reference.add(reference, targets)
        self.model.add(logits, targets)
        self.kl_parts.append(kl_divergences(reference, logits))
        self.agreement_parts.append((reference.argmax(axis=1) == logits.argmax(axis=1)).astype(np.float64))

    @property
    def kl(self) -> F64Array:
        """Of each token, in nats."""
        return np.concatenate(self.kl_parts)

    @property
    def mean_kl(self) -> Estimate:
        return Estimate.of(self.kl)

    @property
    def perplexity_ratio(self) -> Estimate:
        """The model's perplexity over the reference's; the error is that of the pairs, far below those of both."""
        return Estimate.of(self.model.values - self.reference.values).exp()

    @property
    def agreement(self) -> Estimate:
        """The part of the tokens before which both hold the same token to be the likeliest."""
        return Estimate.of(np.concatenate(self.agreement_parts))

    @property
    def probability_changes(self) -> F64Array:
        """Of each token that came: its probability by the model, less that by the reference."""
        changes: F64Array = np.exp(-self.model.values) - np.exp(-self.reference.values)
        return changes

    @property
    def probability_change(self) -> Estimate:
        return Estimate.of(self.probability_changes)

    @property
    def rms_probability_change(self) -> Estimate:
        """The root of the mean square."""
        return Estimate.of(self.probability_changes**2).root()


def check_same_vocabulary(model: Tokenizer, reference: Tokenizer) -> None:
    """Raises ValueError, saying where they part, unless every id stands for the same bytes in both."""
    if model.n_vocab != reference.n_vocab:
        raise ValueError(f"its vocabulary has {reference.n_vocab} tokens, the model's {model.n_vocab}")
    for id in range(model.n_vocab):
        mine, theirs = model.token_bytes(id), reference.token_bytes(id)
        if mine != theirs:
            raise ValueError(f"token {id} of its vocabulary is {theirs!r}, the model's {mine!r}")
