"""How well a model predicts a text, measured as llama-perplexity does.

The text is cut into chunks of the context's length. In each, the tokens of the second half are scored, each with at
least half a chunk before it; where the model's tokenizer begins texts with a BOS token, it takes the place of the
first token of every chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qrun.engine.program.runtime import Runtime
from qrun.engine.text.tokenizer import Tokenizer
from qrun.formats import QrunError

F32Array = NDArray[np.float32]
F64Array = NDArray[np.float64]

LOGIT_BYTES = 64 << 20  # the logits that are held at a time


class TextTooShort(QrunError, ValueError):
    """A text has fewer tokens than one chunk."""


@dataclass(frozen=True)
class Chunks:
    """A text in chunks of `size` tokens. bos: what takes the place of each chunk's first token, or None."""

    tokens: list[int]
    size: int
    count: int
    bos: int | None

    @classmethod
    def of(cls, text: str, tokenizer: Tokenizer, size: int, limit: int | None = None) -> Chunks:
        """The first `limit` chunks of a text, or all; the rest is left out. Raises TextTooShort if it has none."""
        tokens = tokenizer.encode(text, add_special=True)
        count = len(tokens) // size
        if count == 0:
            raise TextTooShort(f"{len(tokens)} tokens, but one chunk takes {size} (see --ctx)")
        return cls(tokens, size, min(count, limit or count), tokenizer.bos_id if tokenizer.add_bos else None)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        return (self.tokens[i * self.size : (i + 1) * self.size] for i in range(self.count))

    @property
    def scored(self) -> int:
        """How many tokens of each chunk are scored."""
        return self.size - 1 - self.size // 2


def scored_logits(runtime: Runtime, chunk: Sequence[int], bos: int | None) -> Iterator[tuple[F32Array, Sequence[int]]]:
    """Evaluates all of a chunk, and gives what its second half is scored by, some rows at a time: logits
    [n, n_vocab], and the n tokens that came next."""
    if not runtime.causal:
        raise ValueError("tokens of this model see those behind them, which they would have to predict: no perplexity")
    first = len(chunk) // 2
    inputs = [bos, *chunk[1:]] if bos is not None else chunk
    rows = rows_at_a_time(runtime.n_vocab)
    with closing(runtime.sequence()) as sequence:
        runtime.evaluate(sequence, inputs[:first], logits="none")
        for start in range(first, len(chunk) - 1, rows):
            end = min(start + rows, len(chunk) - 1)
            logits = runtime.evaluate(sequence, inputs[start:end], logits="all")
            assert logits is not None
            yield logits, chunk[start + 1 : end + 1]
        # Nothing follows the last token, but whoever observes the runtime counts it too.
        runtime.evaluate(sequence, inputs[-1:], logits="none")


def rows_at_a_time(n_vocab: int) -> int:
    """How many rows of logits are held at a time."""
    return max(16, LOGIT_BYTES // (4 * n_vocab))


def negative_log_likelihoods(logits: F32Array, targets: Sequence[int]) -> F64Array:
    """-log softmax(logits)[target] of each row, in nats: float64 [n] from float32 [n, n_vocab]."""
    top = logits.max(axis=1, keepdims=True)
    sums = np.exp(logits - top).sum(axis=1, dtype=np.float64)
    chosen = logits[np.arange(len(targets)), targets].astype(np.float64)
    result: F64Array = np.log(sums) + top[:, 0] - chosen
    return result


@dataclass
class Estimate:
    """A mean with its standard error (infinite for less than two values)."""

    value: float
    error: float

    @classmethod
    def of(cls, values: F64Array) -> Estimate:
        error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
        return cls(float(np.mean(values)), error)

    def exp(self) -> Estimate:
        """Of the exponential, to first order."""
        with np.errstate(over="ignore"):  # a broken model's is infinite
            power = float(np.exp(self.value))
        return Estimate(power, self.error * power)

    def root(self) -> Estimate:
        """Of the square root, to first order."""
        root = math.sqrt(self.value)
        return Estimate(root, self.error / (2 * root) if root else 0.0)


@dataclass
class Score:
    """The negative log likelihoods of the tokens scored so far, in nats."""

    parts: list[F64Array] = field(default_factory=list)

    def add(self, logits: F32Array, targets: Sequence[int]) -> None:
        """Take in some tokens: the logits before each, float32 [n, n_vocab], and the tokens that came."""
        self.parts.append(negative_log_likelihoods(logits, targets))

    @property
    def values(self) -> F64Array:
        return np.concatenate(self.parts) if self.parts else np.empty(0)

    @property
    def count(self) -> int:
        return sum(map(len, self.parts))

    @property
    def perplexity(self) -> Estimate:
        """exp of the mean negative log likelihood."""
        return Estimate.of(self.values).exp()
