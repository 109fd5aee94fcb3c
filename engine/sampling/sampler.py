"""From logits to a token.

Each step is a pure function over candidates: their token ids (int [n]) and their logits (float32 [n]),
of which it returns those that stay. The first step meets the whole vocabulary, so what runs there must
not sort it: `largest` finds the top of 262,144 logits in 0.06 ms, where a full sort takes 15.
"""

import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from functools import cached_property, lru_cache

import numpy as np

from qrun.engine.errors import NotFinite
from qrun.engine.kernels.records import PEAK_GROUP, PEAKS
from qrun.engine.sampling import dry
from qrun.engine.sampling.options import SamplingOptions

Candidates = tuple[np.ndarray, np.ndarray]
"""Token ids, int64 [n], and their logits, float32 [n]."""

Step = Callable[["Sampler", np.ndarray, np.ndarray], Candidates]

Ask = Callable[[list[int], int], list[int] | None]
"""Of some tokens, the likeliest first, so many that may be chosen; None if these cannot be found by asking."""

# Rows into which `largest` folds the values; as many as keep the folding a plain vector maximum.
_FOLDS = 64

_CHOICE_BLOCK = 512
_LOOK, _MOST_WANTED = 4, 64  # of tokens that a mask allows: so many times as many are looked at, if few are wanted
_FEW = 16  # of so many tokens one is allowed: from there on a row with the others masked is faster
_NOT_FINITE = "the model's logits are not finite numbers"
_NOTHING = np.empty(0, np.float32)
_BELOW_ONE = math.nextafter(1.0, 0.0)


def largest(values: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k largest values (all, if there are fewer), the largest first, ties in order of position.

    `values` is float32 [n] without NaN, k at least 1; returns int64 [min(k, n)].
    """
    n = len(values)
    if k >= n:
        return np.argsort(-values, kind="stable")
    positions = _top_columns(values, k) if _few(k, n) else _at_least(values, np.partition(values, n - k)[n - k])
    # They ascend, which the stable sort turns into the tie rule.
    return positions[np.argsort(-values[positions], kind="stable")[:k]]


def first_of(values: np.ndarray, peaks: np.ndarray | None) -> int:
    """The position of the largest value, the first one if there are several; that of a NaN if there is one.

    peaks: what is known of float32 [n], as for `largest_by`.
    """
    groups, highest, bound = _of_whole_groups(values, peaks)
    if groups is None:
        return int(values.argmax())
    first = int(_reaching(groups, highest, bound).min())
    n_grouped = groups.size
    if n_grouped < len(values):
        behind = n_grouped + int(values[n_grouped:].argmax())
        return first if values[behind] <= values[first] else behind
    return first


def largest_by(values: np.ndarray, k: int, peaks: np.ndarray | None) -> np.ndarray:
    """The same as `largest`; NotFinite where there is a NaN.

    peaks: of values in groups [., PEAK_GROUP / PEAKS, PEAKS] the maxima of columns, one after the other, and those of
    what lies behind the values; a NaN where a column has one, or an infinity. None if they are not known.
    """
    groups, highest, _ = _of_whole_groups(values, peaks)
    if groups is None or 2 * k > len(highest):
        return largest(values, k)
    bound = np.partition(highest, len(highest) - k)[len(highest) - k]
    behind = groups.size + _at_least(values[groups.size :], bound)
    if np.isnan(values[groups.size :]).any():
        raise NotFinite(_NOT_FINITE)
    positions = np.sort(np.concatenate([_reaching(groups, highest, bound), behind]))
    return positions[np.argsort(-values[positions], kind="stable")[:k]]


def _of_whole_groups(values: np.ndarray, peaks: np.ndarray | None) -> tuple[np.ndarray | None, np.ndarray, np.float32]:
    """The values, as far as they are whole groups, the maxima of their columns, and of all; None where that is no
    help."""
    n_groups = 0 if peaks is None else len(values) // PEAK_GROUP
    if peaks is None or not n_groups:
        return None, _NOTHING, np.float32(0)
    highest = peaks[: n_groups * PEAKS]
    if math.isnan(bound := highest.max()):
        return None, _NOTHING, bound
    return values[: n_groups * PEAK_GROUP].reshape(n_groups, PEAK_GROUP // PEAKS, PEAKS), highest, bound


def _reaching(groups: np.ndarray, highest: np.ndarray, bound: np.float32) -> np.ndarray:
    """Positions, in no order, of the values in groups that reach a bound."""
    columns = np.flatnonzero(highest >= bound)
    group, column = columns // PEAKS, columns % PEAKS
    at, row = np.nonzero(groups[group, :, column] >= bound)
    return group[at] * PEAK_GROUP + row * PEAKS + column[at]


def _few(k: int, n: int) -> bool:
    """Are k of n values so few that `_top_columns` is the way to them?"""
    return 2 * k <= n // _FOLDS


def _top_columns(values: np.ndarray, k: int) -> np.ndarray:
    """Positions, ascending, of at least k values among which the k largest are; k is at most n // _FOLDS. NotFinite
    where there is a NaN.

    Folded into columns, the k-th largest column maximum is a bound that at least k values reach.
    """
    n_columns = len(values) // _FOLDS
    n_folded = n_columns * _FOLDS
    folded = values[:n_folded].reshape(_FOLDS, n_columns)
    maxima = folded.max(axis=0)
    if math.isnan(maxima.max()) or np.isnan(values[n_folded:]).any():
        raise NotFinite(_NOT_FINITE)
    bound = np.partition(maxima, n_columns - k)[n_columns - k]
    # Only columns whose own maximum reaches the bound can hold such values: k of them, where none are equal.
    columns = _at_least(maxima, bound)
    rows, hits = np.nonzero(folded[:, columns] >= bound)
    return np.concatenate([rows * n_columns + columns[hits], n_folded + _at_least(values[n_folded:], bound)])


def _at_least(values: np.ndarray, bound: np.float32) -> np.ndarray:
    return np.flatnonzero(values >= bound)


def log_sum_exp(logits: np.ndarray, highest: float, scratch: np.ndarray) -> float:
    """log(sum(exp(logits))) of float32 [n], given the highest of them, with float32 [n] to work in."""
    with np.errstate(under="ignore"):  # whatever the program has NumPy do then: small numbers become 0
        if abs(highest) < 60:  # then e**highest times any vocabulary fits float32, and a pass over the logits is saved
            highest = 0.0
            np.exp(logits, out=scratch)
        else:
            np.subtract(logits, np.float32(highest), out=scratch)
            np.exp(scratch, out=scratch)
    # Column sums first: a plain vector addition, twice as fast as NumPy's pairwise sum of the whole.
    n_columns = len(logits) // _FOLDS
    n_folded = n_columns * _FOLDS
    total = float(scratch[:n_folded].reshape(_FOLDS, n_columns).sum(axis=0).sum()) + float(scratch[n_folded:].sum())
    return highest + math.log(total)


def likeliest(logits: np.ndarray, k: int, total: float) -> list[tuple[int, float]]:
    """The k likeliest tokens with their log probabilities, the likeliest first, by logits float32 [n] and the log of
    the sum of their exponentials."""
    return [(id, float(logits[id]) - total) for id in largest(logits, k).tolist()]


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax: float32 [n] -> float32 [n]."""
    with np.errstate(under="ignore"):
        weights = np.exp(logits - logits.max())
        return weights / np.float32(weights.sum(dtype=np.float64))


def _fewest(order_key: np.ndarray, weights: np.ndarray, mass: float) -> np.ndarray:
    """Positions of the fewest candidates, by falling key, whose weights sum to at least `mass` (at least one)."""
    k = 256
    while True:
        positions = largest(order_key, k)
        reached = np.cumsum(weights[positions], dtype=np.float64) >= mass
        if reached[-1] or k >= len(weights):
            # Rounding can leave the sum of all weights just under a mass near 1: then all stay.
            return positions[: int(reached.argmax()) + 1] if reached[-1] else positions
        k *= 4


def top_k(ids: np.ndarray, logits: np.ndarray, k: int) -> Candidates:
    """The k likeliest candidates; k = 0 keeps all."""
    if k == 0:
        return ids, logits
    chosen = largest(logits, k)
    return ids[chosen], logits[chosen]


def top_p(ids: np.ndarray, logits: np.ndarray, p: float) -> Candidates:
    """Nucleus sampling (arXiv:1904.09751): the fewest likeliest candidates that together have probability p."""
    if p >= 1:
        return ids, logits
    chosen = _fewest(logits, probabilities(logits), p)
    return ids[chosen], logits[chosen]


def min_p(ids: np.ndarray, logits: np.ndarray, p: float) -> Candidates:
    """Candidates at least p times as likely as the likeliest (arXiv:2407.01082)."""
    if p <= 0:
        return ids, logits
    kept = np.flatnonzero(logits >= logits.max() + np.float32(math.log(p)))
    return ids[kept], logits[kept]


def typical_p(ids: np.ndarray, logits: np.ndarray, p: float) -> Candidates:
    """Locally typical sampling (arXiv:2202.00666): the fewest candidates with probability p in all, taken in the
    order of how near their surprise (-log probability) is to the entropy of the distribution."""
    if p >= 1:
        return ids, logits
    possible = logits > -np.inf
    ids, logits = ids[possible], logits[possible]
    chances = probabilities(logits)
    surprise = np.float32(log_sum_exp(logits, float(logits.max()), np.empty_like(logits))) - logits
    entropy = np.float32(np.sum(chances * surprise, dtype=np.float64))
    chosen = _fewest(-np.abs(surprise - entropy), chances, p)
    return ids[chosen], logits[chosen]


def xtc(ids: np.ndarray, logits: np.ndarray, threshold: float) -> Candidates:
    """Exclude top choices (https://github.com/oobabooga/text-generation-webui/pull/6335): of the candidates with
    probability `threshold` or more, only the least likely stays."""
    top = np.flatnonzero(probabilities(logits) >= threshold)
    if len(top) < 2:
        return ids, logits
    kept = np.ones(len(ids), bool)
    kept[top[largest(logits[top], len(top) - 1)]] = False
    return ids[kept], logits[kept]


def temperature(logits: np.ndarray, degrees: float) -> np.ndarray:
    """Logits divided by a temperature above 0, moved so that the largest is 0."""
    with np.errstate(over="ignore"):  # a temperature near 0 makes the difference to the likeliest infinite
        return (logits - logits.max()) / np.float32(max(degrees, 1e-30))


def penalize(
    logits: np.ndarray, counts: np.ndarray, repetition: float, presence: float, frequency: float
) -> np.ndarray:
    """Logits of tokens that were seen counts [n] times each (at least once), after the three penalties.

    Repetition divides positive logits and multiplies negative ones (arXiv:1909.05858, mended so that it never
    favours a token), then presence is subtracted once and frequency for every time.
    """
    repeated = np.where(logits > 0, logits / repetition, logits * repetition)
    return (repeated - (presence + frequency * counts)).astype(np.float32)


def surprise_at_most(ids: np.ndarray, logits: np.ndarray, bits: float) -> Candidates:
    """Mirostat 2's truncation (arXiv:2007.14966): candidates of surprise -log2(p) <= bits; the likeliest at least."""
    chances = probabilities(logits)
    kept = np.flatnonzero(chances >= min(2.0 ** -max(bits, 0.0), float(chances.max())))
    return ids[kept], logits[kept]


def choose(logits: np.ndarray, uniform: float) -> int:
    """The position that a number from [0, 1) picks, where each candidate's share of [0, 1) is its probability."""
    weights = np.exp(logits - logits.max())
    if len(weights) <= _CHOICE_BLOCK:
        return _pick(weights, uniform)[0]
    # First a block, then a candidate in it: a running sum over a whole vocabulary would take 3 ms.
    starts = np.arange(0, len(weights), _CHOICE_BLOCK)
    block, uniform = _pick(np.add.reduceat(weights, starts), uniform)
    start = int(starts[block])
    return start + _pick(weights[start : start + _CHOICE_BLOCK], uniform)[0]


def _pick(weights: np.ndarray, uniform: float) -> tuple[int, float]:
    """The position whose share of [0, 1) holds `uniform`, and how far through that share, in [0, 1), it lies."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    target = uniform * cumulative[-1]
    position = int(np.searchsorted(cumulative, target, side="right"))
    before = cumulative[position - 1] if position else 0.0
    return position, min(float((target - before) / (cumulative[position] - before)), _BELOW_ONE)


@lru_cache(maxsize=4)
def all_ids(n_vocab: int) -> np.ndarray:
    """The tokens of a vocabulary, the same array for all who have one of this size."""
    ids = np.arange(n_vocab)
    ids.setflags(write=False)
    return ids


class Sampler:
    """Chooses tokens by one set of options, and remembers what penalties, DRY and mirostat look back on.

    `history` are the tokens so far, the prompt's. `breakers` are DRY's, from `dry.find_breakers`.
    `seed` is the one in use, drawn from the system if the options have none. Raises ValueError for a
    logit bias on a token that the vocabulary does not have. Not for use from two threads at once.
    """

    def __init__(
        self, options: SamplingOptions, n_vocab: int, history: Iterable[int] = (), breakers: dry.Breakers | None = None
    ) -> None:
        for token in options.logit_bias:
            if token >= n_vocab:
                raise ValueError(f"logit_bias: token {token} is not in the vocabulary of {n_vocab}")
        self.options = options
        self.n_vocab = n_vocab
        self.seed = int.from_bytes(os.urandom(4)) if options.seed is None else options.seed
        self._random = np.random.Generator(np.random.PCG64(self.seed))
        self._breakers = breakers or {}
        self._history = array("i", history)
        self._counts = Counter(_last(self._history, options.repetition_window))
        self._surprise_limit = 2 * options.mirostat_tau  # where Mirostat's authors start
        self._all_ids = all_ids(n_vocab)
        self._steps = self._make_steps()
        self._wanted = self._wanted_first()
        self._takes_first = self.greedy and not self._steps and not options.logit_bias
        self.top: list[tuple[int, float]] | None = None
        """The likeliest tokens of the last sample with their log probabilities, if the options want any."""

    # Of a row's size each, and so not there before they are needed.

    @cached_property
    def _row(self) -> np.ndarray:
        """Logits that may be written to."""
        return np.empty(self.n_vocab, np.float32)

    @cached_property
    def _scratch(self) -> np.ndarray:
        return np.empty(self.n_vocab, np.float32)

    def sample(
        self, logits: np.ndarray, allowed: np.ndarray | None = None, banned: Collection[int] = (),
        peaks: np.ndarray | None = None,
    ) -> tuple[int, float | None]:  # fmt: skip
        """The next token for logits float32 [n_vocab], which are left as they are.

        allowed: uint32 [n], a bit for each token that may be chosen, the lowest of the first word for token 0; None
        for all. banned: tokens that may not be. peaks: what is known of the logits, see `largest_by`.

        With it its log probability (natural) by the logits as they came, before bias, truncation and temperature;
        None if the options have `logprobs` off. Raises ValueError if the highest logit is not a finite number, or no
        token is left.
        """
        count = self._wanted if allowed is None else _LOOK * self._wanted  # some may not be allowed
        top = self._look(logits, allowed, count and count + len(banned), peaks)
        first = first_of(logits, peaks) if top is None else int(top[0])
        if top is not None and banned:
            top = top[[token not in banned for token in top.tolist()]][:count]
        highest = float(logits[first])  # a NaN, if there is one
        if not math.isfinite(highest):
            raise NotFinite(_NOT_FINITE)
        if self._takes_first and allowed is None and first not in banned:
            token = first
        else:
            with np.errstate(all="ignore"):  # logits may be infinite, and their exponentials 0
                token = self._choose(*self._candidates(logits, allowed, banned, top))
        return self._told(logits, token, highest)

    def sample_asking(
        self, logits: np.ndarray, ask: Ask, peaks: np.ndarray | None = None
    ) -> tuple[int, float | None] | None:
        """The same of those tokens of which somebody who is asked says that they may be chosen. None where more than a
        few would have to be asked about; then nothing has happened."""
        if not self._wanted or self.greedy or (top := self._look(logits, None, _LOOK * self._wanted, peaks)) is None:
            return None
        highest = float(logits[top[0]])
        if not math.isfinite(highest):
            raise NotFinite(_NOT_FINITE)
        found = ask(top.tolist(), self._wanted)
        if found is None or logits[found[-1]] == -math.inf:
            return None
        ids = np.array(found)
        with np.errstate(all="ignore"):
            token = self._choose(*self._after_steps(ids, logits[ids]))
        return self._told(logits, token, highest)

    def _told(self, logits: np.ndarray, token: int, highest: float) -> tuple[int, float | None]:
        """A token that was chosen, with its log probability. highest: of all logits."""
        if not self.options.logprobs:
            return token, None
        total = log_sum_exp(logits, highest, self._scratch)
        if self.options.top_logprobs:
            self.top = likeliest(logits, self.options.top_logprobs, total)
        return token, float(logits[token]) - total

    def _look(
        self, row: np.ndarray, allowed: np.ndarray | None, count: int, peaks: np.ndarray | None
    ) -> np.ndarray | None:
        """The likeliest tokens of all, so many, if the steps go on from a few of the likeliest. None where there is a
        better way to these, or biases may make others likelier."""
        if not count or self.options.logit_bias or not _few(count, len(row)) or (allowed is None and self.greedy):
            return None
        return largest_by(row, count, peaks) if allowed is None or not _in_few_words(allowed) else None

    def _candidates(
        self, row: np.ndarray, allowed: np.ndarray | None, banned: Collection[int], top: np.ndarray | None
    ) -> Candidates:
        """What is left to choose from after all steps. top: see `_look`."""
        if allowed is None and top is not None and row[top[0]] > -math.inf:
            return self._after_steps(top, row[top])
        if self.options.logit_bias:
            row = self._own(row)
            row[list(self.options.logit_bias)] += np.array(list(self.options.logit_bias.values()), np.float32)
            if row.max() == -math.inf:
                raise ValueError("logit_bias bans every token")
        if banned:
            row = self._own(row)
            row[[token for token in banned if token < len(row)]] = -np.inf
            if row.max() == -math.inf:
                raise ValueError("no token is left that does not end the text")
        return self._after_steps(*((self._all_ids, row) if allowed is None else self._among(allowed, row, top)))

    def _after_steps(self, ids: np.ndarray, logits: np.ndarray) -> Candidates:
        for step in self._steps:
            ids, logits = step(self, ids, logits)
        return ids, logits

    @property
    def greedy(self) -> bool:
        """Whether the next token is the likeliest of those allowed, and so the same whichever unlikelier ones are."""
        return self.options.temperature == 0

    def logprob(self, logits: np.ndarray, token: int) -> float | None:
        """The log probability of a token that was not chosen but is known; None if the options have them off."""
        if not self.options.logprobs:
            return None
        return float(logits[token]) - log_sum_exp(logits, float(logits.max()), self._scratch)

    def accept(self, token: int) -> None:
        """Note that `token` comes next in the text."""
        self._history.append(token)
        self._counts[token] += 1
        window = self.options.repetition_window
        if 0 <= window < len(self._history):
            gone = self._history[-1 - window]
            self._counts[gone] -= 1
            if self._counts[gone] == 0:
                del self._counts[gone]

    def _make_steps(self) -> list[Step]:
        """The steps for which these options leave something to do, in order."""
        o = self.options
        steps: dict[str, Step] = {}
        if o.repetition_penalty != 1 or o.presence_penalty != 0 or o.frequency_penalty != 0:
            steps["penalties"] = Sampler._penalties
        if o.dry_multiplier > 0:
            steps["dry"] = Sampler._dry
        if o.temperature > 0:
            steps["temperature"] = lambda _, ids, logits: (ids, temperature(logits, o.temperature))
        if o.temperature > 0 and not o.mirostat:
            steps["top_k"] = lambda _, ids, logits: top_k(ids, logits, o.top_k)
            steps["typical_p"] = lambda _, ids, logits: typical_p(ids, logits, o.typical_p)
            steps["top_p"] = lambda _, ids, logits: top_p(ids, logits, o.top_p)
            steps["min_p"] = lambda _, ids, logits: min_p(ids, logits, o.min_p)
            if o.xtc_probability > 0:
                steps["xtc"] = Sampler._xtc
        names = [name for name in o.samplers if name in steps]
        self._begins_with_top_k = names[:1] == ["top_k"]
        return [steps[name] for name in names]

    def _wanted_first(self) -> int:
        """How many of the likeliest allowed tokens are all that the steps go on from; 0 for more than a few."""
        if not self._steps and self.options.temperature == 0:
            return 1
        top_k = self.options.top_k
        return top_k if self._begins_with_top_k and top_k <= _MOST_WANTED else 0

    def _among(self, allowed: np.ndarray, row: np.ndarray, top: np.ndarray | None) -> Candidates:
        """The tokens with a bit in `allowed`: on their own if they are few, else in a row where the others are out.
        Where only a few of the likeliest are wanted, those, if they are among the likeliest of all, `top`."""
        few_words = _in_few_words(allowed)
        if top is None and self._wanted and not few_words:
            top = largest(row, _LOOK * self._wanted)
        if top is not None:
            top = top[(allowed[top >> 5] >> (top & 31).astype(np.uint32)) & 1 == 1][: self._wanted]
            if len(top) == self._wanted and row[top[-1]] > -math.inf:
                return top, row[top]
        words = np.flatnonzero(allowed) if few_words else None
        bits = np.unpackbits((allowed if words is None else allowed[words]).view(np.uint8), bitorder="little")
        if words is not None:
            places = np.flatnonzero(bits)
            ids = 32 * words[places >> 5] + (places & 31)
            ids = ids[: np.searchsorted(ids, len(row))]
            logits = row[ids]
        elif np.count_nonzero(bits := bits[: len(row)]) <= len(row) // _FEW:
            ids = np.flatnonzero(bits)
            logits = row[ids]
        else:
            ids, logits = self._all_ids, self._own(row)
            np.putmask(logits, bits == 0, np.float32(-np.inf))
        if not len(ids) or logits.max() == -math.inf:
            raise ValueError("no token is left: none that is allowed has a finite logit")
        return ids, logits

    def _own(self, logits: np.ndarray) -> np.ndarray:
        """The same logits where they may be written to. The one buffer spares a step two allocations of a row."""
        if logits is self._row:
            return logits
        if len(logits) < self.n_vocab:
            return logits.copy()
        np.copyto(self._row, logits)
        return self._row

    def _positions(self, ids: np.ndarray, tokens: Iterable[int]) -> np.ndarray:
        """Where the candidates are that are among `tokens`."""
        wanted = np.fromiter(tokens, np.int64)
        return wanted if ids is self._all_ids else np.flatnonzero(np.isin(ids, wanted))

    def _penalties(self, ids: np.ndarray, logits: np.ndarray) -> Candidates:
        o = self.options
        logits = self._own(logits)
        at = self._positions(ids, self._counts)
        counts = np.array([self._counts[token] for token in ids[at].tolist()], np.float32)
        logits[at] = penalize(logits[at], counts, o.repetition_penalty, o.presence_penalty, o.frequency_penalty)
        return ids, logits

    def _dry(self, ids: np.ndarray, logits: np.ndarray) -> Candidates:
        o = self.options
        history = np.array(_last(self._history, o.dry_range), np.int32)
        found = dry.penalties(history, self._breakers, o.dry_multiplier, o.dry_base, o.dry_allowed_length)
        logits = self._own(logits)
        at = self._positions(ids, found)
        logits[at] -= np.array([found[token] for token in ids[at].tolist()], np.float32)
        return ids, logits

    def _xtc(self, ids: np.ndarray, logits: np.ndarray) -> Candidates:
        if self._random.random() >= self.options.xtc_probability:
            return ids, logits
        return xtc(ids, logits, self.options.xtc_threshold)

    def _choose(self, ids: np.ndarray, logits: np.ndarray) -> int:
        o = self.options
        if o.temperature == 0:
            return int(ids[logits.argmax()])
        if not o.mirostat:
            return int(ids[choose(logits, self._random.random())])
        ids, logits = surprise_at_most(ids, logits, self._surprise_limit)
        chosen = choose(logits, self._random.random())
        surprise = -math.log2(probabilities(logits)[chosen])
        self._surprise_limit -= o.mirostat_eta * (surprise - o.mirostat_tau)
        return int(ids[chosen])


def _in_few_words(allowed: np.ndarray) -> bool:
    """Have so few words of a mask any bits that these are better looked at alone?"""
    return int(np.count_nonzero(allowed)) <= len(allowed) // _FEW


def _last(history: array, n: int) -> array:
    """The last n tokens; all for n = -1."""
    return history[max(len(history) - n, 0) :] if n >= 0 else history
