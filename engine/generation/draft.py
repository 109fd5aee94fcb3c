"""Speculative decoding: a draft guesses the next tokens one by one, and the model checks them in one batch
(Y. Leviathan, M. Kalman, Y. Matias: "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192).

A draft is a smaller model with the same vocabulary (`ModelDrafter`), or layers of the model's own file that are made
for it (`engine.generation.draft_layers`). How many tokens it guesses, and whether any, follows from what a step of the
draft, steps of the model with some rows, and guesses of the same confidence have cost and gained so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import numpy as np

from qrun.engine.generation.guesses import MAX_GUESSES, Account
from qrun.engine.generation.token_cache import TokenCache, common_prefix

if TYPE_CHECKING:
    from qrun.engine.program.runtime import Runtime, Tap

_RISK = 0.02  # of the time of a session may be lost to guesses that fail
_PLAIN_FIRST = 3  # steps without guesses, before the first: the very first are slower than others
_PLAIN_EVERY = 64  # steps with guesses, one goes without, to know what that takes
_LEAST_READ = 32  # tokens that are read of a text at first, as long as nothing is gained
_BUCKETS = 8  # of confidence
_PRIOR = 4.0  # guesses that a bucket's middle counts for
_RIGHT = (np.arange(_BUCKETS) + 0.5) / _BUCKETS * _PRIOR
_FORGET = 0.98  # what guesses of a bucket count for after each new one
_RENEW = 0.1  # of what was learned is forgotten with each text that the draft is not sure enough of
# What steps with some rows take until it is known, in steps of one: kernels compute so many at once.
_ROWS = {1: 1.0, 2: 1.2, 4: 1.4, 8: 2.0, 12: 2.9, MAX_GUESSES + 1: 3.5}


class Reading(NamedTuple):
    """What a drafter has made of a text."""

    logits: np.ndarray
    """After the text: float32 [n_vocab]."""
    room: int
    """How many tokens can be guessed."""
    evaluated: int
    """How many tokens it took."""


class Drafter(Protocol):
    """Says what is likely to follow a text, token by token."""

    def read(self, text: list[int], most: int, cancelled: Callable[[], bool]) -> Reading:
        """Get ready to go on from `text`. Where that takes more than `most` tokens, only the last of them are read."""

    def follow(self, token: int) -> np.ndarray:
        """Logits after one token more, a guess."""

    @property
    def tap(self) -> Tap | None:
        """What is to be told of all that the model evaluates, if anything."""

    def fork(self) -> Self:
        """Another with the same past."""

    def close(self) -> None:
        """Give back what it holds."""


class ModelDrafter:
    """Another model. It has a sequence of its own, which holds the text, or only the end of it."""

    def __init__(self, runtime: Runtime, cache: TokenCache | None = None, start: int = 0) -> None:
        self._runtime = runtime
        self._cache = cache or TokenCache(runtime, runtime.sequence())
        self._start = start  # where in the text that begins which the sequence holds

    def read(self, text: list[int], most: int, cancelled: Callable[[], bool]) -> Reading:
        known = len(text) - self._start
        unread = known - min(common_prefix(self._cache.tokens, text[self._start :]), known - 1)
        longest = self._runtime.context
        view = min(most, len(text) if len(text) <= longest else (longest + 1) // 2)
        grows = self._start > 0 and view >= min(2 * known, len(text))
        if known < 1 or known > longest or unread > most or grows:
            self._start = len(text) - view
        tokens = [min(token, self._runtime.n_vocab - 1) for token in text[self._start :]]
        logits, n_held = self._cache.advance_to(tokens, cancelled)
        room = min(self._cache.returnable_after(len(tokens)), self._cache.n_free) + 1
        return Reading(logits, room, len(tokens) - n_held)

    def follow(self, token: int) -> np.ndarray:
        return self._cache.advance(token, lambda: False)

    @property
    def tap(self) -> None:
        """It reads the text by itself."""

    def fork(self) -> ModelDrafter:
        return ModelDrafter(self._runtime, self._cache.fork(), self._start)

    def close(self) -> None:
        self._cache.close()


class Draft:
    """A session's draft, and what it has learned of it. Used by whoever holds the lock of the session's cache.

    n_vocab: tokens that can be guessed. share: what one guess is thought to take, in steps of the model, until it is
    known.
    """

    def __init__(self, drafter: Drafter, n_vocab: int, share: float = 0.1) -> None:
        self._drafter = drafter
        self._n_vocab = n_vocab
        self._share = share
        self._n_read = 0  # tokens of the text that the drafter had read
        self._account = Account(_RISK)
        self._earned = 0.0  # seconds, and not capped: that much may be spent on reading
        self._token_seconds = 0.0  # of reading one
        self._step: float | None = None  # seconds that the draft takes for one guess
        self._rows: dict[int, float] = {}  # seconds of a step with up to so many rows
        self._right = _RIGHT.copy()  # of guesses, by their confidence
        self._made = np.full(_BUCKETS, _PRIOR)
        self._plain = 0  # steps without guesses so far
        self._since_plain = 0
        self._guessing = 0.0  # seconds, for the guesses that are being checked
        self._confidences: list[int] = []  # of these guesses, as buckets

    @property
    def tap(self) -> Tap | None:
        """What is to be told of all that the model evaluates, if anything."""
        return self._drafter.tap

    def fork(self) -> Draft:
        """Another of the same past, for another session."""
        return Draft(self._drafter.fork(), self._n_vocab, self._share)

    def close(self) -> None:
        """Give back what the draft holds of the text."""
        self._drafter.close()

    def guess(self, text: list[int], room: int, cancelled: Callable[[], bool]) -> list[int]:
        """Tokens that may follow `text`: see `Guesser.guess`."""
        self._confidences, self._guessing = [], 0.0
        if room < 1 or self._plain < _PLAIN_FIRST or self._since_plain >= _PLAIN_EVERY:
            return []
        if not self._account.allows(self._loss(len(text))):
            return []
        logits, room = self._read(text, room, cancelled)
        guesses: list[int] = []
        chances: list[float] = []  # that this guess and all before it are right
        start = time.perf_counter()
        while room:
            token, confidence = likeliest(logits[: self._n_vocab])
            bucket = min(int(confidence * _BUCKETS), _BUCKETS - 1)
            chance = (chances[-1] if chances else 1.0) * float(self._right[bucket] / self._made[bucket])
            guesses.append(token)
            chances.append(chance)
            self._confidences.append(bucket)
            if len(guesses) >= min(room, MAX_GUESSES) or not self._goes_on(len(guesses), chance):
                break
            begin = time.perf_counter()
            logits = self._drafter.follow(token)
            self._step = smoothed(self._step, time.perf_counter() - begin)
        self._guessing += time.perf_counter() - start
        count = self._best_count(chances)
        if not count:  # what was learned gets old: some day, guesses are tried again
            self._right += _RENEW * (_RIGHT - self._right)
            self._made += _RENEW * (_PRIOR - self._made)
        del self._confidences[count:]
        return guesses[:count]

    def learn(self, guessed: int, accepted: int, seconds: float) -> None:
        """A step with `guessed` guesses took so long, and `accepted` of them were right."""
        if not guessed:
            if self._guessing:
                self._account.lost(self._guessing)
            self._account.plain(seconds)
            self._plain += 1
            self._since_plain = 0
            return
        gain = self._account.guessed(guessed, accepted, seconds, self._guessing)
        self._earned = max(self._earned + gain, 0.0)
        self._since_plain += 1
        rows = at_least(guessed + 1)
        self._rows[rows] = smoothed(self._rows.get(rows), seconds)
        for number, bucket in enumerate(self._confidences[: accepted + 1]):
            self._right[bucket] = _FORGET * self._right[bucket] + (number < accepted)
            self._made[bucket] = _FORGET * self._made[bucket] + 1

    def _read(self, text: list[int], room: int, cancelled: Callable[[], bool]) -> tuple[np.ndarray, int]:
        """Logits after the text, and how many tokens can be guessed. A long text is read as far as that is paid for."""
        most = len(text)
        if self._token_seconds * most >= self._earned:
            most = max(int(self._earned / self._token_seconds) if self._token_seconds else 0, _LEAST_READ)
        start = time.perf_counter()
        reading = self._drafter.read(text, most, cancelled)
        seconds = time.perf_counter() - start
        self._n_read = len(text)
        if reading.evaluated > _LEAST_READ:
            self._earned = max(self._earned - seconds, 0.0)
            self._account.spent += seconds
        else:
            self._guessing += seconds
        if reading.evaluated > MAX_GUESSES:
            self._token_seconds = seconds / reading.evaluated
        return reading.logits, min(room, reading.room)

    @property
    def _step_seconds(self) -> float:
        """What one guess takes, or is thought to."""
        assert self._account.single is not None
        return self._share * self._account.single if self._step is None else self._step

    def _loss(self, length: int) -> float:
        """What a single wrong guess costs: the draft reads what it has not, and the model computes a row more."""
        assert self._account.single is not None or not self._plain
        if self._account.single is None:
            return 0.0
        unread = min(max(length - self._n_read, 1), _LEAST_READ)
        whole, rest = divmod(unread, MAX_GUESSES + 1)
        steps = whole * _ROWS[MAX_GUESSES + 1] + (_ROWS[at_least(rest)] if rest else 0.0)
        return steps * self._step_seconds + self._seconds(at_least(2)) - self._account.single

    def _goes_on(self, count: int, chance: float) -> bool:
        """Is one more guess expected to be worth a step of the draft?"""
        single, step = self._account.single, self._step_seconds
        assert single is not None
        likely = float(self._right.sum() / self._made.sum())
        rows, next_rows = at_least(count + 1), at_least(count + 2)
        if rows == next_rows:
            return chance * likely * single > step
        # From here on the model computes more rows at once, and some more guesses cost it nothing.
        expected = chance * sum(likely**i for i in range(1, next_rows - rows + 1))
        cost = self._seconds(next_rows) - self._seconds(rows) + (next_rows - rows) * step
        return expected * single > cost

    def _best_count(self, chances: list[float]) -> int:
        """How many of these guesses are best checked: those that were made are paid for."""
        assert self._account.single is not None
        values = [0.0]
        for count in range(1, len(chances) + 1):
            gained = sum(chances[:count]) * self._account.single
            values.append(gained - (self._seconds(at_least(count + 1)) - self._account.single))
        return int(np.argmax(values))

    def _seconds(self, rows: int) -> float:
        """What a step with so many rows takes."""
        assert self._account.single is not None
        return self._rows.get(rows, _ROWS[rows] * self._account.single) if rows > 1 else self._account.single


class DraftGuesser:
    """A session's draft, at work on one text."""

    def __init__(self, draft: Draft, text: Iterable[int]) -> None:
        self._draft = draft
        self._text = list(text)

    def push(self, token: int) -> None:
        self._text.append(token)

    def restart(self, text: list[int]) -> None:
        self._text = list(text)

    def guess(self, room: int, cancelled: Callable[[], bool]) -> list[int]:
        return self._draft.guess(self._text, room, cancelled)

    def learn(self, guessed: int, accepted: int, seconds: float) -> None:
        self._draft.learn(guessed, accepted, seconds)


def likeliest(logits: np.ndarray) -> tuple[int, float]:
    """The likeliest token, and its probability."""
    token = int(logits.argmax())
    with np.errstate(under="ignore"):
        return token, float(1.0 / np.exp(logits - logits[token]).sum())


def at_least(rows: int) -> int:
    """How many rows a step of so many computes."""
    return next(size for size in _ROWS if size >= rows)


def smoothed(average: float | None, value: float) -> float:
    """A moving average, which a single slow step moves little."""
    return value if average is None else average + 0.2 * (min(value, 2 * average) - average)
