"""Choosing groups of levels, for the formats that have a table of those (`grids`): the searches of `fitting` with them.

Of a weight alone the nearest level is known at once. Of eight weights together it is not: there are 256 to 2,048 groups
to choose from, and which is best depends on the importance of each weight. Weights are first rounded one by one, which
names a corner; for each corner the nearest groups were sought once, and of those the best is taken, by

    cost = sum over the weights of a group of  w * (level - x / scale)^2

The integers of these formats are odd: a block's scale times 1, 3, 5 to 2 n - 1, so that none is zero.

Where eight weights must have an even number of minus signs, and have not, the one with the least w * x^2 gets the wrong
sign: from then on it is a weight below zero among magnitudes.

An importance is measured on a text, and of a weight that the text hardly used it says too little. So a tenth of the
block's mean is added to each: with groups, a weight that does not count at all would be given any level whatever.
"""

from __future__ import annotations

import functools
from dataclasses import field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrun.formats.blocks.fitting import (
    Groups,
    Search,
    clamp,
    divide,
    half_scale,
    over_groups,
    total,
)
from qrun.formats.blocks.grids import grid
from qrun.formats.blocks.layout import F32Array, U8Array
from qrun.formats.dataclass import dataclass

I32Array = NDArray[np.int32]

# How many groups are tried for each corner: of the first while a scale is sought from several starts, of all later.
CANDIDATES, FIRST_CANDIDATES = 16, 8
# What is added to each importance, as a part of the mean of its block.
UNSURE = np.float32(0.1)
# How far the levels of IQ1 are shifted.
SHIFT = np.float32(0.125)


@dataclass(frozen=True)
class Tables:
    """levels: float32 [groups, size]. candidates: int32 [corners, CANDIDATES], the nearest first."""

    levels: F32Array
    candidates: I32Array

    @functools.cached_property
    def level_words(self) -> I32Array:
        """The levels as bytes, four to a word: [groups, size / 4]."""
        return self.levels.astype(np.int8).view(np.int32)

    @functools.cached_property
    def candidate_words(self) -> I32Array:
        """The candidates as uint16, two to a word, the first in the low half: [corners, CANDIDATES / 2]."""
        return self.candidates.astype(np.uint16).view(np.int32)


@functools.cache
def tables(levels: Groups) -> Tables:
    """Of a format's groups. Takes a few tenths of a second, once."""
    groups = grid(levels.grid).astype(np.float32)
    number = np.arange(levels.count**levels.size)
    places = levels.count ** np.arange(levels.size - 1, -1, -1)
    corners = levels.first + levels.step * (number[:, None] // places % levels.count).astype(np.float32)
    nearest = np.empty((len(corners), CANDIDATES), np.int32)
    for start in range(0, len(corners), 512):
        some = corners[start : start + 512]
        # All are multiples of a half, and small: exact in single precision, in whatever order it is added up.
        distance = (groups * groups).sum(axis=1) - 2 * (some @ groups.T)
        # Of groups that are equally near the first: a stable order, so that it is the same everywhere.
        nearest[start : start + 512] = np.argsort(distance, axis=1, kind="stable")[:, :CANDIDATES]
    return Tables(groups, nearest)


@dataclass
class GroupFit:
    """What a search found. n blocks.

    scale: float32 [n], as its half-precision number is stored. scales: [n, sub-blocks], 0 for the least. indices: int32
    [n, groups of weights]. minus: bool [n, weights]. shifted: bool [n, weights / 8], where the levels lie lower.
    """

    scale: F32Array
    scales: I32Array
    indices: I32Array
    minus: NDArray[np.bool_]
    shifted: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))

    @property
    def sign_bytes(self) -> U8Array:
        """A byte for eight weights, the first one in the lowest bit: uint8 [n, weights / 8]."""
        return np.packbits(self.minus, axis=-1, bitorder="little")


@dataclass
class _Rounded:
    """levels: [sub-blocks, size, n]. indices: [sub-blocks, groups, n]. shifted: [sub-blocks, groups, n]."""

    levels: F32Array
    indices: I32Array
    shifted: NDArray[np.bool_]


def fit_groups(search: Search, values: F32Array, importance: F32Array | None) -> GroupFit:
    """Solve for blocks of weights. values, importance: float32 [n, block_size]."""
    with np.errstate(all="ignore"):
        return _Solver(search, values, importance).solve()


class _Solver:
    def __init__(self, search: Search, values: F32Array, importance: F32Array | None) -> None:
        assert isinstance(search.levels, Groups)
        self.search, self.levels = search, search.levels
        self.tables = tables(search.levels)
        self.effort = search.effort(importance is not None)
        self.x = self._by_lanes(values)
        self.w = np.ones_like(self.x) if importance is None else self._by_lanes(importance).copy()
        if importance is not None:
            mean: F32Array = total(self.w.reshape(1, search.block_size, -1))[0] * np.float32(1 / search.block_size)
            self.w += mean * UNSURE
        self.minus = np.zeros(self.x.shape, np.bool_)
        if self.levels.signs != "none":
            self._take_signs()

    def _by_lanes(self, array: F32Array) -> F32Array:
        by_group = array.reshape(-1, self.search.groups, self.search.size)
        return np.ascontiguousarray(by_group.transpose(1, 2, 0), np.float32)

    def _take_signs(self) -> None:
        self.minus = self.x < np.float32(0)
        x = np.abs(self.x)
        if self.levels.signs == "even":
            # [eights, 8, n] are views, so that what is turned here is turned in self.
            eights, minus = x.reshape(-1, 8, x.shape[-1]), self.minus.reshape(-1, 8, x.shape[-1])
            cost = (self.w.reshape(eights.shape) * eights) * eights
            least = cost[:, 0]
            place = np.zeros(least.shape, np.int64)
            for j in range(1, 8):
                less = cost[:, j] < least
                least, place = np.where(less, cost[:, j], least), np.where(less, j, place)
            odd = np.bitwise_xor.reduce(minus, axis=1)
            turned = (np.arange(8)[:, None] == place[:, None]) & odd[:, None]
            eights[turned] *= np.float32(-1)
            minus ^= turned
        self.x = x

    def _nearest(self, v: F32Array, w: F32Array, count: int) -> tuple[I32Array, F32Array]:
        """Of groups of weights [m, size, n]: the best group's index, and its cost: [m, n]."""
        levels, size = self.levels, self.levels.size
        t = np.rint((v - np.float32(levels.first)) * np.float32(1 / levels.step))
        t = np.where(np.float32(0) < t, t, np.float32(0))  # also of what is not a number
        t = np.where(t < np.float32(levels.count - 1), t, np.float32(levels.count - 1))
        corner = t[:, 0]
        for j in range(1, size):
            corner = corner * np.float32(levels.count) + t[:, j]
        candidates = self.tables.candidates[corner.astype(np.int32)]  # [m, n, CANDIDATES]
        best = candidates[..., 0]
        cost: F32Array = np.empty(0, np.float32)
        for k in range(count):
            index = candidates[..., k]
            level = self.tables.levels[index]  # [m, n, size]
            tried = np.zeros(index.shape, np.float32)
            for j in range(size):
                miss = level[..., j] - v[:, j]
                tried = tried + (w[:, j] * miss) * miss
            if k == 0:
                cost = tried
                continue
            better = tried < cost
            best, cost = np.where(better, index, best), np.where(better, tried, cost)
        return best.astype(np.int32), cost

    def _round(self, inverse: F32Array, count: int) -> _Rounded:
        """All weights, with x / scale = x * inverse. inverse: [sub-blocks, n]."""
        size = self.levels.size
        v = self.x * inverse[:, None]
        v, w = v.reshape(-1, size, v.shape[-1]), self.w.reshape(-1, size, v.shape[-1])
        shape = (self.search.groups, self.search.size // size, v.shape[-1])
        if not self.levels.shifted:
            index, _ = self._nearest(v, w, count)
            shift = np.zeros(shape, np.bool_)
        else:
            up, cost = self._nearest(v - SHIFT, w, count)
            down, other = self._nearest(v + SHIFT, w, count)
            lower = other < cost
            if self.levels.shifted > size:
                sums = total(np.stack([cost, other]).reshape(-1, *shape[1:])).reshape(2, shape[0], -1)
                lower = np.broadcast_to((sums[1] < sums[0])[:, None], shape).reshape(index_shape(shape))
            index, shift = np.where(lower, down, up), lower.reshape(shape)
        levels = self.tables.levels[index].swapaxes(-1, -2)  # [m, size, n]
        if self.levels.shifted:
            levels = levels + np.where(shift.reshape(index.shape), -SHIFT, SHIFT)[:, None]
        return _Rounded(levels.reshape(self.x.shape), index.reshape(shape), shift)

    def _moments(self, inverse: F32Array, count: int) -> tuple[F32Array, F32Array]:
        """Sums of w*q*x, of w*q*q: [sub-blocks, n]."""
        q = self._round(inverse, count).levels
        wq = self.w * q
        return total(wq * self.x), total(wq * q)

    def solve(self) -> GroupFit:
        unit = np.float32(self.levels.unit)
        scale = self._first_scales()
        top = scale[0]
        for i in range(1, self.search.groups):
            top = np.where(top < scale[i], scale[i], top)
        one_over_high = np.float32(1 / (self.search.scale_high * self.levels.unit))
        super_scale = half_scale(top * one_over_high) * unit
        half_steps = np.rint(scale * divide(0.5, super_scale) - np.float32(0.5))
        integers = clamp(half_steps + half_steps + np.float32(1), 1, self.search.scale_high)
        for _ in range(self.search.rounds):
            super_scale, integers = self._go_over(super_scale, integers)
        scale = super_scale * integers
        rounded = self._round(divide(1, scale), CANDIDATES)
        n = self.x.shape[-1]
        shifted = rounded.shifted if self.levels.shifted else np.zeros((0, 0, n), np.bool_)
        return GroupFit(
            super_scale * np.float32(1 / self.levels.unit),
            ((integers - np.float32(1)) * np.float32(0.5)).T.astype(np.int32),
            _by_block(rounded.indices), _by_block(self.minus), _by_block(shifted),
        )  # fmt: skip

    def _first_scales(self) -> F32Array:
        """The best scale of each sub-block by itself."""
        top = np.abs(self.x[:, 0])
        for j in range(1, self.search.size):
            top = np.where(top < np.abs(self.x[:, j]), np.abs(self.x[:, j]), top)
        best = scale = np.zeros_like(top)
        for start, _ in self.effort.trials:
            xq, qq = self._moments(divide(start, top), FIRST_CANDIDATES)
            tried = divide(xq, qq)
            gain = tried * xq
            better = (best < gain) & (np.float32(0) < tried)
            best, scale = np.where(better, gain, best), np.where(better, tried, scale)
        for _ in range(self.effort.refinements):
            tried = divide(*self._moments(divide(1, scale), CANDIDATES))
            scale = np.where(np.float32(0) < tried, tried, scale)
        return scale

    def _go_over(self, super_scale: F32Array, integers: F32Array) -> tuple[F32Array, F32Array]:
        """One round: better integers, and the super-scale that is best for them."""
        best = chosen = best_xq = best_qq = np.zeros_like(integers)
        for change in (0, -2, 2):
            integer = clamp(integers + np.float32(change), 1, self.search.scale_high)
            scale = super_scale * integer
            xq, qq = self._moments(divide(1, scale), CANDIDATES)
            gain = scale * ((xq + xq) - scale * qq)
            if change == 0:
                best, chosen, best_xq, best_qq = gain, integer, xq, qq
                continue
            better = best < gain
            best, chosen = np.where(better, gain, best), np.where(better, integer, chosen)
            best_xq, best_qq = np.where(better, xq, best_xq), np.where(better, qq, best_qq)
        above, below = over_groups(chosen * best_xq), over_groups((chosen * chosen) * best_qq)
        unit = np.float32(self.levels.unit)
        solved = half_scale(divide(above, below) * np.float32(1 / self.levels.unit)) * unit
        gain = super_scale * ((above + above) - super_scale * below)
        better = (np.float32(0) < solved) & (gain < solved * ((above + above) - solved * below))
        return np.where(better, solved, super_scale), chosen


def index_shape(shape: tuple[int, int, int]) -> tuple[int, int]:
    """[sub-blocks, groups, n] as [sub-blocks * groups, n]."""
    return shape[0] * shape[1], shape[2]


def _by_block(array: NDArray[Any]) -> NDArray[Any]:
    """[sub-blocks, m, n] -> [n, sub-blocks * m]."""
    return np.ascontiguousarray(array.reshape(-1, array.shape[-1]).T)
