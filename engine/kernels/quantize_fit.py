"""The searches of `formats.blocks.fitting`, in vectors whose lanes are blocks.

Read that file first: names and order are its. A fit takes the addresses of weights and of what their errors count for
(one vector for each weight of a block; behind these, their importance alone). It writes what it finds to `head` (laid
out below), the codes over the weights, and to `stats` four sums: squared errors and squared weights, and both once more
with each multiplied by its importance. A fit that is not `weighted` takes all importance to be 1 without reading it: a
product with 1 is exact, so the bytes are the same.
"""

from __future__ import annotations

from typing import Any

from qrun.engine.kernels import records as R
from qrun.engine.simd import operations as v
from qrun.formats.blocks.fitting import ALIKE, INFINITY, OVERFLOW, SKEWED, SMALLEST, TINY, Search

STATS = 4
# `head`, in vectors: scale, minimum, the integer scales (int32), the integer minimums.
SCALES, MINIMUMS, HEAD_VECTORS = 2, 18, 34

tiny, alike, skewed = float(TINY), float(ALIKE), float(SKEWED)
overflow, smallest, infinity = float(OVERFLOW), float(SMALLEST), float(INFINITY)


@v.helper
def half_scale(value):  # type: ignore[no-untyped-def]
    magnitude = v.magnitude(value)
    least = v.choose(value < v.splat(0.0), v.splat(-smallest), v.splat(smallest))
    vanishes = (magnitude < v.splat(smallest)) & (v.splat(tiny) < magnitude)
    return v.choose(vanishes, least, v.round_to_half(value))


def build_finish(search: Search, nearest: Any, code: Any, weighted: bool) -> Any:
    """finish(x, w, stats, inverse, scale, minimum, first, last): from weights to codes, and what that costs."""
    vector = 4 * v.target().lanes
    importance = search.block_size * vector

    @v.helper
    def finish(x, w, stats, inverse, scale, minimum, first, last):  # type: ignore[no-untyped-def]
        errors, energies = v.load(stats), v.load(stats + vector)
        weighted_errors, weighted_energies = v.load(stats + 2 * vector), v.load(stats + 3 * vector)
        for j in range(first, last):
            value = v.load(x + j * vector)
            q = nearest((value + minimum) * inverse)
            miss = value - (scale * q - minimum)
            error, energy = miss * miss, value * value
            errors, energies = errors + error, energies + energy
            if weighted:
                weight = v.load(w + importance + j * vector)
                weighted_errors = weighted_errors + weight * error
                weighted_energies = weighted_energies + weight * energy
            v.store(x + j * vector, code(q))
        if not weighted:
            weighted_errors, weighted_energies = errors, energies
        v.store(stats, errors)
        v.store(stats + vector, energies)
        v.store(stats + 2 * vector, weighted_errors)
        v.store(stats + 3 * vector, weighted_energies)

    return finish


def build_fit_without_minimum(search: Search, nearest: Any, code: Any, weighted: bool) -> Any:
    groups, size, low, high = search.groups, search.size, search.scale_low, search.scale_high
    vector = 4 * v.target().lanes
    group_bytes = size * vector
    scales_bytes = groups * vector
    two_level = high > 0
    one_over_low = 1 / low if low else 1.0
    largest_top = float(OVERFLOW) * search.levels.largest
    finish = build_finish(search, nearest, code, weighted)

    @v.helper
    def moments(x, w, inverse):  # type: ignore[no-untyped-def]
        xq, qq = v.splat(0.0), v.splat(0.0)
        for j in range(size):
            value = v.load(x + j * vector)
            q = nearest(value * inverse)
            wq = v.load(w + j * vector) * q if weighted else q
            xq = xq + wq * value
            qq = qq + wq * q
        return xq, qq

    @v.helper
    def fit_group(op, x, w):  # type: ignore[no-untyped-def]
        top = v.load(x)
        for j in range(1, size):
            value = v.load(x + j * vector)
            top = v.choose(v.magnitude(top) < v.magnitude(value), value, top)
        bound = v.splat(infinity)
        if not two_level:
            bound = v.choose(v.magnitude(top) < v.splat(largest_top), v.splat(overflow), bound)
        best, scale = v.splat(0.0), v.splat(0.0)
        for i in range(v.load_i64(op + R.Q_N_TRIALS)):
            start = v.splat(v.load_f32(v.load_i64(op + R.Q_TRIALS) + 8 * i))
            xq, qq = moments(x, w, v.divide(start, top, tiny))
            tried = v.divide(xq, qq, tiny)
            gain = tried * xq
            better = (best < gain) & (v.magnitude(tried) < bound)
            best, scale = v.choose(better, gain, best), v.choose(better, tried, scale)
        for _ in range(v.load_i64(op + R.Q_REFINEMENTS)):
            xq, qq = moments(x, w, v.divide(v.splat(1.0), scale, tiny))
            refined = v.divide(xq, qq, tiny)
            scale = v.choose(v.magnitude(refined) < bound, refined, scale)
        return scale

    @v.helper
    def go_over(x, w, super_scale, integers):  # type: ignore[no-untyped-def]
        """One round: better integers, and the super-scale that is best for them."""
        above, below = v.splat(0.0), v.splat(0.0)
        for i in range(groups):
            before = v.load(integers + i * vector)
            best, integer, best_xq, best_qq = v.splat(0.0), before, v.splat(0.0), v.splat(0.0)
            for change in (0, -1, 1):
                tried = v.clamp(before + v.splat(v.as_float(change)), low, high)
                scale = super_scale * tried
                xq, qq = moments(x + i * group_bytes, w + i * group_bytes, v.divide(v.splat(1.0), scale, tiny))
                gain = scale * ((xq + xq) - scale * qq)
                if change == 0:
                    best, integer, best_xq, best_qq = gain, tried, xq, qq
                else:
                    better = best < gain
                    best, integer = v.choose(better, gain, best), v.choose(better, tried, integer)
                    best_xq, best_qq = v.choose(better, xq, best_xq), v.choose(better, qq, best_qq)
            v.store(integers + i * vector, integer)
            above = above + integer * best_xq
            below = below + (integer * integer) * best_qq
        solved = half_scale(v.divide(above, below, tiny))
        gain = super_scale * ((above + above) - super_scale * below)
        better = gain < solved * ((above + above) - solved * below)
        return v.choose(better, solved, super_scale)

    @v.helper
    def fit_two_levels(op, x, w, head):  # type: ignore[no-untyped-def]
        integers = v.scratch(scales_bytes)
        top = v.splat(0.0)
        for i in range(groups):
            scale = fit_group(op, x + i * group_bytes, w + i * group_bytes)
            v.store(integers + i * vector, scale)
            top = v.choose(v.magnitude(top) < v.magnitude(scale), scale, top)
        super_scale = half_scale(top * v.splat(one_over_low))
        inverse = v.divide(v.splat(1.0), super_scale, tiny)
        for i in range(groups):
            rounded = v.round_to_whole(v.load(integers + i * vector) * inverse)
            v.store(integers + i * vector, v.clamp(rounded, low, high))
        for _ in range(v.load_i64(op + R.Q_ROUNDS)):
            super_scale = go_over(x, w, super_scale, integers)
        for i in range(groups):
            integer = v.load(integers + i * vector)
            v.store(head + (SCALES + i) * vector, v.to_int(integer))
            v.store(integers + i * vector, super_scale * integer)
        v.store(head, super_scale)
        return integers

    @v.helper
    def fit(op, x, w, head, stats):  # type: ignore[no-untyped-def]
        zero = v.splat(0.0)
        if two_level:
            scales = fit_two_levels(op, x, w, head)
            for i in range(groups):
                scale = v.load(scales + i * vector)
                finish(x, w, stats, v.divide(v.splat(1.0), scale, tiny), scale, zero, i * size, (i + 1) * size)
        else:
            scale = half_scale(fit_group(op, x, w))
            v.store(head, scale)
            finish(x, w, stats, v.divide(v.splat(1.0), scale, tiny), scale, zero, 0, size)

    return fit


def build_fit_with_minimum(search: Search, nearest: Any, code: Any, weighted: bool) -> Any:
    groups, size, high = search.groups, search.size, search.scale_high
    vector = 4 * v.target().lanes
    group_bytes = size * vector
    numbers_bytes = 4 * groups * vector
    n_bytes = groups * vector
    two_level = high > 0
    one_over_high = 1 / high if high else 1.0
    largest_range = float(OVERFLOW) * search.levels.largest
    finish = build_finish(search, nearest, code, weighted)

    @v.helper
    def moments(x, w, inverse, minimum):  # type: ignore[no-untyped-def]
        sum_q, qq, qx = v.splat(0.0), v.splat(0.0), v.splat(0.0)
        for j in range(size):
            value = v.load(x + j * vector)
            q = nearest((value + minimum) * inverse)
            wq = v.load(w + j * vector) * q if weighted else q
            sum_q = sum_q + wq
            qq = qq + wq * q
            qx = qx + wq * value
        return sum_q, qq, qx

    @v.helper
    def solved(w_sum, x_sum, q, qq, qx):  # type: ignore[no-untyped-def]
        squares = w_sum * qq
        determinant = squares - q * q
        apart = squares * v.splat(alike) < determinant
        scale = v.divide(w_sum * qx - x_sum * q, determinant, tiny)
        minimum = v.divide(q * qx - x_sum * qq, determinant, tiny)
        if two_level:
            apart = apart & (v.splat(0.0) < minimum)
        scale = v.choose(apart, scale, v.divide(qx, qq, tiny))
        minimum = v.choose(apart, minimum, v.splat(0.0))
        return scale, minimum, scale * qx - minimum * x_sum

    @v.helper
    def ends(x, count):  # type: ignore[no-untyped-def]
        low, high = v.load(x), v.load(x)
        for j in range(1, count):
            value = v.load(x + j * vector)
            low, high = v.choose(value < low, value, low), v.choose(high < value, value, high)
        return low, high

    @v.helper
    def turn_upright(x):  # type: ignore[no-untyped-def]
        """Turns the weights of blocks upside down that are to be fitted so. Returns their sign, else 1."""
        low, high = ends(x, groups * size)
        upside_down = v.splat(skewed) * v.magnitude(high) < v.splat(0.0) - low
        sign = v.choose(upside_down, v.splat(-1.0), v.splat(1.0))
        for j in range(groups * size):
            v.store(x + j * vector, v.load(x + j * vector) * sign)
        return sign

    @v.helper
    def fit_group(op, x, w, w_sum, x_sum):  # type: ignore[no-untyped-def]
        low, high = ends(x, size)
        if two_level:
            low = v.choose(v.splat(0.0) < low, v.splat(0.0), low)
        first = v.splat(0.0) - low
        bound = v.splat(infinity)
        if not two_level:
            small_enough = (v.magnitude(first) < v.splat(overflow)) & (high - low < v.splat(largest_range))
            bound = v.choose(small_enough, v.splat(overflow), bound)
        best = v.splat(0.0) - first * (first * w_sum + (x_sum + x_sum))
        scale, minimum = v.splat(0.0), first
        for i in range(v.load_i64(op + R.Q_N_TRIALS)):
            trial = v.load_i64(op + R.Q_TRIALS) + 8 * i
            inverse = v.divide(v.splat(v.load_f32(trial)), high - low, tiny)
            offset = first - v.divide(v.splat(v.load_f32(trial + 4)), inverse, tiny)
            q, qq, qx = moments(x, w, inverse, offset)
            tried, below, gain = solved(w_sum, x_sum, q, qq, qx)
            better = (best < gain) & (v.magnitude(tried) < bound) & (v.magnitude(below) < bound)
            best = v.choose(better, gain, best)
            scale, minimum = v.choose(better, tried, scale), v.choose(better, below, minimum)
        for _ in range(v.load_i64(op + R.Q_REFINEMENTS)):
            q, qq, qx = moments(x, w, v.divide(v.splat(1.0), scale, tiny), minimum)
            tried, below, _gain = solved(w_sum, x_sum, q, qq, qx)
            better = (v.splat(tiny) < tried) & (tried < bound) & (v.magnitude(below) < bound)
            scale, minimum = v.choose(better, tried, scale), v.choose(better, below, minimum)
        return scale, minimum

    @v.helper
    def sums(x, w):  # type: ignore[no-untyped-def]
        w_sum, x_sum = v.splat(0.0), v.splat(0.0)
        for j in range(size):
            weight = v.load(w + j * vector) if weighted else v.splat(1.0)
            w_sum = w_sum + weight
            x_sum = x_sum + weight * v.load(x + j * vector)
        return w_sum, x_sum

    @v.helper
    def gain_of(scale, minimum, ss, sm, mm, sx, mx):  # type: ignore[no-untyped-def]
        first = scale * (((sx + sx) - scale * ss) + (minimum + minimum) * sm)
        return first - minimum * (minimum * mm + (mx + mx))

    @v.helper
    def go_over(x, w, super_scale, super_minimum, integers):  # type: ignore[no-untyped-def]
        """One round: better integers, and the super-scale and super-minimum that are best for them."""
        zero = v.splat(0.0)
        ss, sm, mm, sx, mx = zero, zero, zero, zero, zero
        for i in range(groups):
            place = integers + i * vector
            before, depth_before = v.load(place), v.load(place + n_bytes)
            w_sum, x_sum = v.load(place + 2 * n_bytes), v.load(place + 3 * n_bytes)
            offset = super_minimum * depth_before
            best, integer, depth, best_q, best_qq, best_qx = zero, before, depth_before, zero, zero, zero
            for change in (0, -1, 1):
                tried = v.clamp(before + v.splat(v.as_float(change)), 0, high)
                scale = super_scale * tried
                inverse = v.divide(v.splat(1.0), scale, tiny)
                q, qq, qx = moments(x + i * group_bytes, w + i * group_bytes, inverse, offset)
                below = v.divide(scale * q - x_sum, w_sum * super_minimum, tiny)
                below = v.clamp(v.round_to_whole(below), 0, high)
                minimum = super_minimum * below
                gain = scale * (((qx + qx) - scale * qq) + (minimum + minimum) * q)
                gain = gain - minimum * (minimum * w_sum + (x_sum + x_sum))
                if change == 0:
                    best, integer, depth, best_q, best_qq, best_qx = gain, tried, below, q, qq, qx
                else:
                    better = best < gain
                    best, integer = v.choose(better, gain, best), v.choose(better, tried, integer)
                    depth, best_q = v.choose(better, below, depth), v.choose(better, q, best_q)
                    best_qq, best_qx = v.choose(better, qq, best_qq), v.choose(better, qx, best_qx)
            v.store(place, integer)
            v.store(place + n_bytes, depth)
            ss = ss + (integer * integer) * best_qq
            sm = sm + (integer * depth) * best_q
            mm = mm + (depth * depth) * w_sum
            sx = sx + integer * best_qx
            mx = mx + depth * x_sum
        determinant = ss * mm - sm * sm
        new_scale = half_scale(v.divide(sx * mm - mx * sm, determinant, tiny))
        new_minimum = half_scale(v.divide(sx * sm - mx * ss, determinant, tiny))
        gain = gain_of(super_scale, super_minimum, ss, sm, mm, sx, mx)
        better = (v.splat(tiny) < new_scale) & (v.splat(tiny) < new_minimum)
        better = better & (gain < gain_of(new_scale, new_minimum, ss, sm, mm, sx, mx))
        return v.choose(better, new_scale, super_scale), v.choose(better, new_minimum, super_minimum)

    @v.helper
    def fit_two_levels(op, x, w, head):  # type: ignore[no-untyped-def]
        integers = v.scratch(numbers_bytes)
        largest, deepest = v.splat(0.0), v.splat(0.0)
        for i in range(groups):
            place = integers + i * vector
            w_sum, x_sum = sums(x + i * group_bytes, w + i * group_bytes)
            scale, minimum = fit_group(op, x + i * group_bytes, w + i * group_bytes, w_sum, x_sum)
            v.store(place, scale)
            v.store(place + n_bytes, minimum)
            v.store(place + 2 * n_bytes, w_sum)
            v.store(place + 3 * n_bytes, x_sum)
            largest = v.choose(largest < scale, scale, largest)
            deepest = v.choose(deepest < minimum, minimum, deepest)
        super_scale = half_scale(largest * v.splat(one_over_high))
        super_minimum = half_scale(deepest * v.splat(one_over_high))
        inverse, inverse_minimum = (
            v.divide(v.splat(1.0), super_scale, tiny), v.divide(v.splat(1.0), super_minimum, tiny)
        )  # fmt: skip
        for i in range(groups):
            place = integers + i * vector
            v.store(place, v.clamp(v.round_to_whole(v.load(place) * inverse), 0, high))
            place += n_bytes
            v.store(place, v.clamp(v.round_to_whole(v.load(place) * inverse_minimum), 0, high))
        for _ in range(v.load_i64(op + R.Q_ROUNDS)):
            super_scale, super_minimum = go_over(x, w, super_scale, super_minimum, integers)
        for i in range(groups):
            place = integers + i * vector
            integer, depth = v.load(place), v.load(place + n_bytes)
            v.store(head + (SCALES + i) * vector, v.to_int(integer))
            v.store(head + (MINIMUMS + i) * vector, v.to_int(depth))
            v.store(place, super_scale * integer)
            v.store(place + n_bytes, super_minimum * depth)
        v.store(head, super_scale)
        v.store(head + vector, super_minimum)
        return integers

    @v.helper
    def fit(op, x, w, head, stats):  # type: ignore[no-untyped-def]
        sign = turn_upright(x)
        if two_level:
            numbers = fit_two_levels(op, x, w, head)
            for i in range(groups):
                scale, minimum = v.load(numbers + i * vector), v.load(numbers + i * vector + n_bytes)
                finish(x, w, stats, v.divide(v.splat(1.0), scale, tiny), scale, minimum, i * size, (i + 1) * size)
        else:
            w_sum, x_sum = sums(x, w)
            scale, minimum = fit_group(op, x, w, w_sum, x_sum)
            scale, minimum = half_scale(scale), v.round_to_half(minimum)
            v.store(head, scale)
            v.store(head + vector, minimum)
            finish(x, w, stats, v.divide(v.splat(1.0), scale, tiny), scale, minimum, 0, size)
        v.store(head, v.load(head) * sign)
        v.store(head + vector, v.load(head + vector) * sign)

    return fit
