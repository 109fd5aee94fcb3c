"""Choosing scales, minimums and quants: the least-squares problems that all quantisers share, in plain NumPy.

A quantiser is given weights x and their importance w (1 without calibration), and seeks, for each block, the numbers of
its format that make

    E = sum over j of  w[j] * (x[j] - y[j])^2        y: what the format's formula decodes to

as small as it can. With the quants q held, E is quadratic in scale and minimum, so their best values have a closed
form; with scale and minimum held, each q is best rounded by itself. To alternate can only lower E, but it ends in the
nearest valley. So the search begins at several scales, keeps the best, alternates from there, and then does the same
one level up, among the integers that a K format stores for scales and minimums.

What is found is stored in half precision: of 11 bits, and no larger than 65,504. No number wins that would overflow
there, and a super-scale is replaced only by one that is better once it is rounded. A minimum of half precision should
be a small number, or its rounding costs more than all else: blocks whose least weight lies far below zero, and whose
largest does not lie far above, are fitted upside down, with a scale below zero.

E is never summed up weight by weight: it follows from a few moments (sums of w*q*q, w*q*x, ...), so a trial costs one
pass. Arrays have blocks along their last axis and every sum runs in the order of the weights, one operation at a time:
`engine.kernels.quantize` computes the same in vector lanes, to the bit.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrun.formats.blocks.layout import F32Array, U8Array
from qrun.formats.dataclass import dataclass

# What is smaller counts as zero: a divisor that would lead to infinity, a block of nothing.
TINY = np.float32(1e-30)
# Quants count as all alike, and a minimum as none, if their variance is no larger a part of their mean square.
ALIKE = np.float32(1e-6)
# Half precision: what is as large as this becomes infinite, and the smallest number above zero.
OVERFLOW = np.float32(65520)
SMALLEST = np.float32(2.0**-24)
INFINITY = np.float32(np.inf)
# Where large weights count for more, one that is zero counts as one with this part of the mean square.
SPARED = np.float32(0.5)
# A block is fitted upside down if its least weight lies so many times as far from zero as its largest.
SKEWED = np.float32(8)


@dataclass(frozen=True)
class Steps:
    """Evenly spaced levels: the whole numbers from low to high. The code of a level is its distance from low."""

    low: int
    high: int

    @property
    def largest(self) -> int:
        """The largest magnitude."""
        return max(-self.low, self.high)

    def nearest(self, values: F32Array) -> F32Array:
        return clamp(np.rint(values), self.low, self.high)

    def codes(self, levels: F32Array) -> U8Array:
        return (levels - np.float32(self.low)).astype(np.uint8)


@dataclass(frozen=True)
class Table:
    """Uneven levels, rising. The code of a level is its index."""

    levels: tuple[int, ...]

    @property
    def largest(self) -> int:
        """The largest magnitude."""
        return max(map(abs, self.levels))

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Halfway between neighbours."""
        return tuple((a + b) / 2 for a, b in zip(self.levels, self.levels[1:], strict=False))

    def nearest(self, values: F32Array) -> F32Array:
        return np.array(self.levels, np.float32)[np.searchsorted(np.array(self.thresholds, np.float32), values)]

    def codes(self, levels: F32Array) -> U8Array:
        return np.searchsorted(np.array(self.levels, np.float32), levels).astype(np.uint8)


@dataclass(frozen=True)
class Groups:
    """Levels that are chosen several weights at a time, from the groups that a format has: see `grid_fitting`.

    grid: the name of its table in `grids`. size: weights in a group. first, step, count: the levels of a single weight,
    of which those of all groups are at most half a step off. unit: what the half-precision scale of a block is
    multiplied by. signs: "free" beside the magnitudes of the table; "even" where eight weights have to have an even
    number of minus signs; "none" where the table has signs of its own. shifted: over how many weights the levels lie
    all a little higher or all a little lower (0: they do not).
    """

    grid: str
    size: int
    first: float
    step: float
    count: int
    unit: float = 1.0
    signs: str = "none"
    shifted: int = 0

    @property
    def largest(self) -> float:
        """The largest magnitude, or nearly."""
        return self.first + self.step * (self.count - 1)


Levels = Steps | Table
AnyLevels = Steps | Table | Groups


def spaced(first: float, last: float, count: int) -> tuple[float, ...]:
    """Numbers at equal distances, both ends among them."""
    return tuple(first + (last - first) * i / (count - 1) for i in range(count))


@dataclass(frozen=True)
class Effort:
    """How long a search goes on.

    starts: where it begins, as the level upon which the weight of largest magnitude is put; with a minimum, how many
    steps span the weights, and each of them with each of `shifts`, by how many steps the least weight lies below level
    0. refinements: how often quants and scale are then fitted to each other.
    """

    starts: tuple[float, ...]
    refinements: int
    shifts: tuple[float, ...] = (0.0,)

    @property
    def trials(self) -> F32Array:
        """All pairs of start and shift: [trials, 2]."""
        return np.array([(start, shift) for start in self.starts for shift in self.shifts], np.float32).reshape(-1, 2)


@dataclass(frozen=True)
class Search:
    """How a format's scales are sought.

    size: weights that share a scale, in `groups` groups a block. scale_low, scale_high, rounds: of the integer scales
    under a super-scale, and how often those are gone over; a format without them has scale_high = 0. quick: the effort
    where there is no importance, if it is another: E is smoother there, and few starts find nearly what many do.
    """

    groups: int
    size: int
    levels: AnyLevels
    has_minimum: bool
    thorough: Effort
    scale_low: int = 0
    scale_high: int = 0
    rounds: int = 0
    quick: Effort | None = None

    def effort(self, weighted: bool) -> Effort:
        """weighted: whether there is importance."""
        return self.thorough if weighted or self.quick is None else self.quick

    @property
    def block_size(self) -> int:
        return self.groups * self.size


@dataclass
class Fit:
    """What a search found. n blocks; scales, minimums: the integers of a K format.

    minimum is what is taken off, so where a format adds it, its negative is stored.
    """

    scale: F32Array  # [n], rounded to half precision, as all that follows from it
    codes: U8Array  # [n, block_size]
    minimum: F32Array = field(default_factory=lambda: np.empty(0, np.float32))  # [n]
    scales: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))  # [n, groups]
    minimums: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))  # [n, groups]


Moments = tuple[F32Array, ...]


def fit(search: Search, values: F32Array, importance: F32Array | None) -> Fit:
    """Solve for blocks of weights. values, importance: float32 [n, block_size]."""
    groups, size = search.groups, search.size

    def by_lanes(array: F32Array) -> F32Array:
        return np.ascontiguousarray(array.reshape(-1, groups, size).transpose(1, 2, 0), np.float32)

    x = by_lanes(values)
    w = np.ones_like(x) if importance is None else by_lanes(importance)
    solve = _with_minimum if search.has_minimum else _without_minimum
    with np.errstate(all="ignore"):
        return solve(search, search.effort(importance is not None), x, w)


def by_size(values: F32Array, importance: F32Array) -> F32Array:
    """What errors of weights count for if large weights are to come out truer: importance * sqrt(SPARED + x^2 / mean of
    all x^2 of the block). values, importance: float32 [n, block_size].

    The least squared error makes weights smaller than they are, all in the same way, and so what a matrix gives; that
    costs predictions more than errors that have nothing to do with each other. llama.cpp weighs in a like way.
    """
    x = np.ascontiguousarray(values.T, np.float32)
    size = len(x)
    with np.errstate(all="ignore"):
        inverse = divide(1, total((x * x)[None])[0] * np.float32(1 / size))
        square = (x * x) * inverse
        square = np.where(square < np.float32(size), square, np.float32(size))
        return np.ascontiguousarray((importance.T * np.sqrt(SPARED + square)).T, np.float32)


# --- arithmetic, spelt as the kernels do it ---------------------------------------------------------------------------


def larger(a: F32Array, b: Any) -> F32Array:
    return np.where(a < b, b, a).astype(np.float32)


def smaller(a: F32Array, b: Any) -> F32Array:
    return np.where(b < a, b, a).astype(np.float32)


def clamp(values: F32Array, low: float, high: float) -> F32Array:
    return smaller(larger(values, np.float32(low)), np.float32(high))


def divide(a: Any, b: F32Array) -> F32Array:
    """a / b, and 0 where b is next to nothing."""
    usable = np.abs(b) > TINY
    return np.where(usable, np.float32(a) / np.where(usable, b, np.float32(1)), np.float32(0)).astype(np.float32)


def half(values: F32Array) -> F32Array:
    """As a file will hold it."""
    return values.astype(np.float16).astype(np.float32)


def half_scale(values: F32Array) -> F32Array:
    """The same of a scale, which does not become zero: with the smallest there is, weights may still find levels."""
    smallest = np.where(values < np.float32(0), -SMALLEST, SMALLEST)
    magnitude = np.abs(values)
    return np.where((magnitude < SMALLEST) & (magnitude > TINY), smallest, half(values))


def limit(too_large: Any) -> F32Array:
    """What scales and minimums have to be below. Weights that are too large for the format may have any: they are found
    out afterwards, by what they decode to."""
    return np.where(too_large, INFINITY, OVERFLOW)


def total(terms: F32Array) -> F32Array:
    """The sum over the weights of a group, in their order: [groups, size, n] -> [groups, n]."""
    result = np.zeros_like(terms[:, 0])
    for j in range(terms.shape[1]):
        result += terms[:, j]
    return result


def over_groups(terms: F32Array) -> F32Array:
    """[groups, n] -> [n]"""
    return total(terms[None])[0]


def _best(gains: list[F32Array], *choices: list[F32Array]) -> tuple[F32Array, ...]:
    """Of several trials, lane by lane the first of those with the largest gain."""
    gain, chosen = gains[0], [choice[0] for choice in choices]
    for i in range(1, len(gains)):
        better = gain < gains[i]
        gain = np.where(better, gains[i], gain)
        chosen = [np.where(better, choice[i], old) for choice, old in zip(choices, chosen, strict=True)]
    return tuple(chosen)


# --- y = scale * q ----------------------------------------------------------------------------------------------------


def _without_minimum(search: Search, effort: Effort, x: F32Array, w: F32Array) -> Fit:
    levels = search.levels
    assert not isinstance(levels, Groups)
    zero = np.zeros_like(x[:, 0])

    def moments(inverse: F32Array) -> Moments:
        """With q = x * inverse rounded: sums of w*q*x, of w*q*q."""
        q = levels.nearest(x * inverse[:, None])
        wq = w * q
        return total(wq * x), total(wq * q)

    # The best scale for quants q is sum(wqx) / sum(wqq), and lowers E by sum(wqx)^2 / sum(wqq).
    top = x[:, 0].copy()
    for j in range(1, search.size):
        top = np.where(np.abs(top) < np.abs(x[:, j]), x[:, j], top)
    two_level = search.scale_high > 0
    bound = limit(two_level | ~(np.abs(top) < OVERFLOW * np.float32(levels.largest)))
    gains, scales = [zero], [zero]
    for start, _ in effort.trials:
        xq, qq = moments(divide(start, top))
        scale = divide(xq, qq)
        gains.append(np.where(np.abs(scale) < bound, scale * xq, zero))
        scales.append(scale)
    (scale,) = _best(gains, scales)
    for _ in range(effort.refinements):
        refined = divide(*moments(divide(1, scale)))
        scale = np.where(np.abs(refined) < bound, refined, scale)

    if not two_level:
        scale = half_scale(scale)
        q = levels.nearest(x * divide(1, scale)[:, None])
        return Fit(scale[0], _codes(levels, q))

    low, high = search.scale_low, search.scale_high
    top = scale[0].copy()
    for i in range(1, search.groups):
        top = np.where(np.abs(top) < np.abs(scale[i]), scale[i], top)
    # The largest is put on the lowest level, which is one further out.
    super_scale = half_scale(top * np.float32(1 / low))
    integers = clamp(np.rint(scale * divide(1, super_scale)), low, high)
    for _ in range(search.rounds):
        gains, chosen, xqs, qqs = [], [], [], []
        for change in (0, -1, 1):
            integer = clamp(integers + np.float32(change), low, high)
            scale = super_scale * integer
            xq, qq = moments(divide(1, scale))
            gains.append(scale * ((xq + xq) - scale * qq))
            chosen.append(integer)
            xqs.append(xq)
            qqs.append(qq)
        integers, xq, qq = _best(gains, chosen, xqs, qqs)
        above, below = over_groups(integers * xq), over_groups((integers * integers) * qq)
        solved = half_scale(divide(above, below))
        better = super_scale * ((above + above) - super_scale * below) < solved * ((above + above) - solved * below)
        super_scale = np.where(better, solved, super_scale)
    q = levels.nearest(x * divide(1, super_scale * integers)[:, None])
    return Fit(super_scale, _codes(levels, q), scales=integers.T.astype(np.int32))


# --- y = scale * q - minimum ------------------------------------------------------------------------------------------


def _with_minimum(search: Search, effort: Effort, x: F32Array, w: F32Array) -> Fit:
    levels = search.levels
    assert not isinstance(levels, Groups)
    two_level = search.scale_high > 0
    sign = _upright(x)
    x = x * sign
    w_sum, x_sum = total(w), total(w * x)

    def moments(inverse: F32Array, minimum: F32Array) -> Moments:
        """With q = (x + minimum) * inverse rounded: sums of w*q, w*q*q, w*q*x."""
        q = levels.nearest((x + minimum[:, None]) * inverse[:, None])
        wq = w * q
        return total(wq), total(wq * q), total(wq * x)

    def solved(q: F32Array, qq: F32Array, qx: F32Array) -> Moments:
        """Scale and minimum that are best for the quants, and by how much they lower E."""
        squares = w_sum * qq
        determinant = squares - q * q
        apart = squares * ALIKE < determinant
        scale = divide(w_sum * qx - x_sum * q, determinant)
        minimum = divide(q * qx - x_sum * qq, determinant)
        if two_level:  # there minimums have no sign: zero is the next best
            apart = apart & (np.float32(0) < minimum)
        scale = np.where(apart, scale, divide(qx, qq))
        minimum = np.where(apart, minimum, np.float32(0))
        return scale, minimum, scale * qx - minimum * x_sum

    low, high = _ends(x)
    if two_level:
        low = smaller(low, np.float32(0))
    zero = np.zeros_like(low)
    first = zero - low
    small_enough = (np.abs(first) < OVERFLOW) & (high - low < OVERFLOW * np.float32(levels.largest))
    bound = limit(two_level | ~small_enough)
    # Without a start: all quants 0.
    gains, scales, minimums = [zero - first * (first * w_sum + (x_sum + x_sum))], [zero], [first]
    for start, shift in effort.trials:
        inverse = divide(start, high - low)
        scale, minimum, gain = solved(*moments(inverse, first - divide(shift, inverse)))
        gains.append(np.where((np.abs(scale) < bound) & (np.abs(minimum) < bound), gain, -INFINITY))
        scales.append(scale)
        minimums.append(minimum)
    scale, minimum = _best(gains, scales, minimums)
    for _ in range(effort.refinements):
        refined, lowered, _ = solved(*moments(divide(1, scale), minimum))
        better = (refined > TINY) & (refined < bound) & (np.abs(lowered) < bound)
        scale, minimum = np.where(better, refined, scale), np.where(better, lowered, minimum)

    if not two_level:
        scale, minimum = half_scale(scale), half(minimum)
        q = levels.nearest((x + minimum[:, None]) * divide(1, scale)[:, None])
        return Fit(scale[0] * sign, _codes(levels, q), minimum[0] * sign)

    top = search.scale_high
    largest, deepest = scale[0], minimum[0]
    for i in range(1, search.groups):
        largest, deepest = larger(largest, scale[i]), larger(deepest, minimum[i])
    super_scale, super_minimum = half_scale(largest * np.float32(1 / top)), half_scale(deepest * np.float32(1 / top))
    integers = clamp(np.rint(scale * divide(1, super_scale)), 0, top)
    depths = clamp(np.rint(minimum * divide(1, super_minimum)), 0, top)
    for _ in range(search.rounds):
        trials: list[list[F32Array]] = [[] for _ in range(6)]
        for change in (0, -1, 1):
            integer = clamp(integers + np.float32(change), 0, top)
            scale = super_scale * integer
            q, qq, qx = moments(divide(1, scale), super_minimum * depths)
            depth = clamp(np.rint(divide(scale * q - x_sum, w_sum * super_minimum)), 0, top)
            minimum = super_minimum * depth
            gain = scale * (((qx + qx) - scale * qq) + (minimum + minimum) * q)
            gain = gain - minimum * (minimum * w_sum + (x_sum + x_sum))
            for trial, value in zip(trials, (gain, integer, depth, q, qq, qx), strict=True):
                trial.append(value)
        integers, depths, q, qq, qx = _best(*trials)
        super_scale, super_minimum = _solve_both(
            super_scale, super_minimum,
            over_groups((integers * integers) * qq), over_groups((integers * depths) * q),
            over_groups((depths * depths) * w_sum), over_groups(integers * qx), over_groups(depths * x_sum),
        )  # fmt: skip
    minimum = super_minimum * depths
    q = levels.nearest((x + minimum[:, None]) * divide(1, super_scale * integers)[:, None])
    fitted = Fit(super_scale * sign, _codes(levels, q), super_minimum * sign)
    fitted.scales, fitted.minimums = integers.T.astype(np.int32), depths.T.astype(np.int32)
    return fitted


def _ends(x: F32Array) -> tuple[F32Array, F32Array]:
    """The least and the largest weight of each group."""
    low = high = x[:, 0]
    for j in range(1, x.shape[1]):
        low, high = smaller(low, x[:, j]), larger(high, x[:, j])
    return low, high


def _upright(x: F32Array) -> F32Array:
    """-1 for a block that is to be fitted upside down, else 1: [n]."""
    lows, highs = _ends(x)
    low, high = lows[0], highs[0]
    for i in range(1, len(lows)):
        low, high = smaller(low, lows[i]), larger(high, highs[i])
    upside_down = SKEWED * np.abs(high) < np.float32(0) - low
    return np.where(upside_down, np.float32(-1), np.float32(1))


def _solve_both(
    scale: F32Array, minimum: F32Array, ss: F32Array, sm: F32Array, mm: F32Array, sx: F32Array, mx: F32Array
) -> tuple[F32Array, F32Array]:
    """The best super-scale and super-minimum for the integers and quants of a block; as they were if none is better.

    ss, sm, mm: sums of w times (integer scale * q) and integer minimum, squared and multiplied; sx, mx: times x.
    """

    def gain(scale: F32Array, minimum: F32Array) -> F32Array:
        first = scale * (((sx + sx) - scale * ss) + (minimum + minimum) * sm)
        return first - minimum * (minimum * mm + (mx + mx))

    determinant = ss * mm - sm * sm
    new_scale = half_scale(divide(sx * mm - mx * sm, determinant))
    new_minimum = half_scale(divide(sx * sm - mx * ss, determinant))
    better = (new_scale > TINY) & (new_minimum > TINY) & (gain(scale, minimum) < gain(new_scale, new_minimum))
    return np.where(better, new_scale, scale), np.where(better, new_minimum, minimum)


def _codes(levels: Levels, q: F32Array) -> U8Array:
    """[groups, size, n] -> uint8 [n, groups * size]."""
    return np.ascontiguousarray(levels.codes(q).reshape(-1, q.shape[-1]).T)
