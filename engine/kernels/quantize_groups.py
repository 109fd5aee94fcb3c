"""The searches of `formats.blocks.grid_fitting`, in vectors whose lanes are blocks: read that file first.

What a lane looks for lies elsewhere than what its neighbour looks for, so tables are read by gathering. Candidates come
two to a word of 32 bits, and the levels of a group four to a word.

The search leaves magnitudes (or weights with their signs) in the place of the weights, and at the end, for each group,
its index in the place of its first weight and bits in that of its second: its minus signs, or 1 where levels are lower.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from qrun.engine.kernels import records as R
from qrun.engine.kernels.quantize_fit import SCALES, half_scale, tiny
from qrun.engine.simd import operations as v
from qrun.engine.simd.operations import VectorType, operation
from qrun.engine.simd.vector import F32, I32, Emitter, Vector
from qrun.formats.blocks.fitting import Groups, Search
from qrun.formats.blocks.grid_fitting import CANDIDATES, FIRST_CANDIDATES, SHIFT, UNSURE

WORDS = CANDIDATES // 2  # of a corner


def _i32(*_: Any) -> VectorType:
    return VectorType("i32", v.target().lanes)


def _f32(*_: Any) -> VectorType:
    return VectorType("f32", v.target().lanes)


@operation(_i32)
def load_ints(e: Emitter, address: ir.Value) -> Vector:
    return e.load(address, 0, I32, e.lanes)


@operation(_i32)
def low_half(e: Emitter, word: Vector) -> Vector:
    return word & 0xFFFF


@operation(_i32)
def high_half(e: Emitter, word: Vector) -> Vector:
    return word >> 16


@operation(_i32)
def gather(e: Emitter, table: ir.Value, indices: Vector) -> Vector:
    return e.gather(table, indices)


@operation(_i32)
def sign_bit(e: Emitter, value: Vector, place: ir.Value) -> Vector:
    """1 << place where the value is below zero, else 0."""
    one = e.splat(e.builder.shl(ir.Constant(I32, 1), e.builder.trunc(place, I32)))
    return value.less(0.0).choose(one, one.constant(0))


@operation(_i32)
def or_bits(e: Emitter, a: Vector, b: Vector) -> Vector:
    return a | b


@operation(_i32)
def xor_bits(e: Emitter, a: Vector, b: Vector) -> Vector:
    return a ^ b


@operation(_i32)
def odd(e: Emitter, a: Vector) -> Vector:
    """All bits set where an odd number of the low eight is, else none."""
    a = a ^ (a >> 4)
    a = a ^ (a >> 2)
    a = a ^ (a >> 1)
    return a.constant(0) - (a & 1)


@operation(_i32)
def shifted_one(e: Emitter, place: Vector) -> Vector:
    return place.constant(1) << place


@operation(lambda *_: VectorType("bit", v.target().lanes))
def any_bit(e: Emitter, a: Vector) -> Vector:
    return a.constant(0).less(a)


def _levels(e: Emitter, levels: Groups, table: ir.Value, indices: Vector) -> list[Vector]:
    """The levels of groups, weight by weight, as float32."""
    n_words = levels.size // 4
    result = []
    scaled = indices * n_words if n_words > 1 else indices
    for i in range(n_words):
        word = e.gather(table, scaled + i if i else scaled)
        for j in range(4):
            byte = (word << (24 - 8 * j)) if j < 3 else word
            result.append(byte.shift_right_signed(24).to_float())
    return result


def build_nearest_group(levels: Groups) -> Any:
    """nearest(table, candidates, words, y, w, costs): the best group of each lane, and in memory at `costs` its cost.

    y: weights over their scale, a vector for each of the group. words: how many of the candidates' words are looked at.
    """
    vector = 4 * v.target().lanes
    size = levels.size

    @operation(_i32)
    def corner(e: Emitter, y: ir.Value) -> Vector:
        """Where the candidates of the nearest corner begin, in words."""
        number = e.constant(0.0)
        for j in range(size):
            t = ((e.load(y, j * vector, F32, e.lanes) - levels.first) * (1 / levels.step)).intrinsic("llvm.rint")
            t = t.constant(0.0).less(t).choose(t, t.constant(0.0))  # also of what is not a number
            t = t.less(levels.count - 1).choose(t, t.constant(levels.count - 1))
            number = number * levels.count + t if j else t
        return number.to_int() * WORDS

    @operation(_f32)
    def cost(e: Emitter, table: ir.Value, indices: Vector, y: ir.Value, w: ir.Value) -> Vector:
        total = e.constant(0.0)
        for j, level in enumerate(_levels(e, levels, table, indices)):
            miss = level - e.load(y, j * vector, F32, e.lanes)
            total = total + (e.load(w, j * vector, F32, e.lanes) * miss) * miss
        return total

    @operation(_i32)
    def plus(e: Emitter, a: Vector, b: ir.Value) -> Vector:
        return a + e.splat(e.builder.trunc(e.index(b), I32))

    @v.helper
    def nearest(table, candidates, words, y, w, costs):  # type: ignore[no-untyped-def]
        first = corner(y)
        word = gather(candidates, first)
        best = low_half(word)
        least = cost(table, best, y, w)
        index = high_half(word)
        tried = cost(table, index, y, w)
        better = tried < least
        least, best = v.choose(better, tried, least), v.choose(better, index, best)
        for k in range(1, words):
            word = gather(candidates, plus(first, k))
            index = low_half(word)
            tried = cost(table, index, y, w)
            better = tried < least
            least, best = v.choose(better, tried, least), v.choose(better, index, best)
            index = high_half(word)
            tried = cost(table, index, y, w)
            better = tried < least
            least, best = v.choose(better, tried, least), v.choose(better, index, best)
        v.store(costs, least)
        return best

    return nearest


def build_fit_groups(search: Search) -> Any:
    """fit(op, x, w, head, stats), as in `quantize_fit`."""
    levels = search.levels
    assert isinstance(levels, Groups)
    lanes = v.target().lanes
    vector = 4 * lanes
    groups, size, high, unit = search.groups, search.size, search.scale_high, float(levels.unit)
    sub_bytes = size * vector  # of a sub-block
    per_group, n_in_sub = levels.size, size // levels.size
    group_bytes = per_group * vector
    block_size = search.block_size
    weights_bytes = block_size * vector
    shifted, together = levels.shifted > 0, levels.shifted > levels.size
    signs, even = levels.signs != "none", levels.signs == "even"
    both_bytes = 2 * n_in_sub * vector
    scales_bytes, signs_bytes = groups * vector, block_size // 8 * vector
    one_over_high, one_over_unit = 1 / (high * unit), 1 / unit
    one_over_size, unsure, shift_by = 1 / block_size, float(UNSURE), float(SHIFT)
    all_words, first_words = WORDS, FIRST_CANDIDATES // 2
    nearest = build_nearest_group(levels)

    @operation(lambda *_: v.types.void)
    def store_levels(e: Emitter, table: ir.Value, indices: Vector, q: ir.Value) -> None:
        for j, level in enumerate(_levels(e, levels, table, indices)):
            e.store(level.value, q, vector * j)

    @operation(lambda *_: v.types.void)
    def store_ints(e: Emitter, address: ir.Value, value: Vector) -> None:
        e.store(value.value, address)

    @operation(_i32)
    def choose_ints(e: Emitter, bits: Vector, yes: Vector, no: Vector) -> Vector:
        return bits.choose(yes, no)

    @v.helper
    def scaled(x, inverse, shift, y):  # type: ignore[no-untyped-def]
        for j in range(per_group):
            v.store(y + j * vector, v.load(x + j * vector) * inverse - shift)

    @v.helper
    def round_plain(op, words, x, w, inverse, q, found):  # type: ignore[no-untyped-def]
        """Sub-block by sub-block: the levels to q, the indices and shifts (1 or 0) to `found`, a vector each."""
        y, costs = v.scratch(group_bytes), v.scratch(vector)
        table, candidates = v.load_i64(op + R.Q_LEVELS), v.load_i64(op + R.Q_CANDIDATES)
        for i in range(n_in_sub):
            for j in range(per_group):
                v.store(y + j * vector, v.load(x + i * group_bytes + j * vector) * inverse)
            index = nearest(table, candidates, words, y, w + i * group_bytes, costs)
            store_levels(table, index, q + i * group_bytes)
            store_ints(found + 2 * i * vector, index)

    @v.helper
    def round_shifted(op, words, x, w, inverse, q, found):  # type: ignore[no-untyped-def]
        """The same with levels that are shifted up or down, whichever costs less."""
        y, costs, other = v.scratch(group_bytes), v.scratch(both_bytes), v.scratch(both_bytes)
        table, candidates = v.load_i64(op + R.Q_LEVELS), v.load_i64(op + R.Q_CANDIDATES)
        up_sum, down_sum = v.splat(0.0), v.splat(0.0)
        for i in range(n_in_sub):
            w_group, x_group, place = w + i * group_bytes, x + i * group_bytes, 2 * i * vector
            scaled(x_group, inverse, v.splat(shift_by), y)
            index = nearest(table, candidates, words, y, w_group, costs + place)
            store_ints(found + place, index)
            up_sum = up_sum + v.load(costs + place)
            scaled(x_group, inverse, v.splat(-shift_by), y)
            index = nearest(table, candidates, words, y, w_group, other + place)
            store_ints(found + place + vector, index)
            down_sum = down_sum + v.load(other + place)
        for i in range(n_in_sub):
            place = 2 * i * vector
            lower = down_sum < up_sum if together else v.load(other + place) < v.load(costs + place)
            index = choose_ints(lower, load_ints(found + place + vector), load_ints(found + place))
            store_levels(table, index, q + i * group_bytes)
            shift = v.choose(lower, v.splat(-shift_by), v.splat(shift_by))
            for j in range(per_group):
                v.store(q + i * group_bytes + j * vector, v.load(q + i * group_bytes + j * vector) + shift)
            store_ints(found + place, index)
            store_ints(found + place + vector, choose_ints(lower, v.splat_int(1), v.splat_int(0)))

    round_group = round_shifted if shifted else round_plain

    @v.helper
    def moments(op, words, x, w, inverse):  # type: ignore[no-untyped-def]
        q, found = v.scratch(sub_bytes), v.scratch(both_bytes)
        round_group(op, words, x, w, inverse, q, found)
        xq, qq = v.splat(0.0), v.splat(0.0)
        for j in range(size):
            level = v.load(q + j * vector)
            wq = v.load(w + j * vector) * level
            xq = xq + wq * v.load(x + j * vector)
            qq = qq + wq * level
        return xq, qq

    @v.helper
    def take_signs(x, w, bits):  # type: ignore[no-untyped-def]
        """Leaves magnitudes at x, and the signs of each eight at `bits`."""
        zero = v.splat(0.0)
        for i in range(block_size // 8):
            eight = x + 8 * i * vector
            minus = v.splat_int(0)
            for j in range(8):
                value = v.load(eight + j * vector)
                minus = or_bits(minus, sign_bit(value, j))
                v.store(eight + j * vector, v.magnitude(value))
            if even:
                size_ = v.load(eight)
                least, place = (v.load(w + 8 * i * vector) * size_) * size_, v.splat_int(0)
                for j in range(1, 8):
                    size_ = v.load(eight + j * vector)
                    cost = (v.load(w + (8 * i + j) * vector) * size_) * size_
                    less = cost < least
                    least, place = v.choose(less, cost, least), choose_ints(less, v.splat_int(j), place)
                turned = odd(minus) & shifted_one(place)
                minus = xor_bits(minus, turned)
                for j in range(8):
                    value = v.load(eight + j * vector)
                    v.store(
                        eight + j * vector,
                        v.choose(any_bit(turned & v.splat_int(1 << j)), zero - value, value),
                    )
            store_ints(bits + i * vector, minus)

    @v.helper
    def first_scale(op, x, w):  # type: ignore[no-untyped-def]
        top = v.magnitude(v.load(x))
        for j in range(1, size):
            value = v.magnitude(v.load(x + j * vector))
            top = v.choose(top < value, value, top)
        zero = v.splat(0.0)
        best, scale = zero, zero
        n_starts, refinements = v.load_i64(op + R.Q_N_TRIALS), v.load_i64(op + R.Q_REFINEMENTS)
        for i in range(n_starts + refinements):
            seeking = i < n_starts
            inverse = v.divide(v.splat(1.0), scale, tiny)
            words = all_words
            if seeking:
                start = v.splat(v.load_f32(v.load_i64(op + R.Q_TRIALS) + 8 * i))
                inverse, words = v.divide(start, top, tiny), first_words
            xq, qq = moments(op, words, x, w, inverse)
            tried = v.divide(xq, qq, tiny)
            gain = tried * xq
            better = zero < tried
            if seeking:
                better = (best < gain) & better
                best = v.choose(better, gain, best)
            scale = v.choose(better, tried, scale)
        return scale

    @v.helper
    def go_over(op, x, w, super_scale, integers):  # type: ignore[no-untyped-def]
        """One round: better integers, and the super-scale that is best for them."""
        zero = v.splat(0.0)
        above, below = zero, zero
        for i in range(groups):
            before = v.load(integers + i * vector)
            best, integer, best_xq, best_qq = zero, before, zero, zero
            for trial in range(3):
                change = 0 if trial == 0 else 4 * trial - 6  # 0, -2, 2
                tried = v.clamp(before + v.splat(v.as_float(change)), 1, high)
                scale = super_scale * tried
                inverse = v.divide(v.splat(1.0), scale, tiny)
                xq, qq = moments(op, all_words, x + i * sub_bytes, w + i * sub_bytes, inverse)
                gain = scale * ((xq + xq) - scale * qq)
                if trial == 0:
                    best, integer, best_xq, best_qq = gain, tried, xq, qq
                else:
                    better = best < gain
                    best, integer = v.choose(better, gain, best), v.choose(better, tried, integer)
                    best_xq, best_qq = v.choose(better, xq, best_xq), v.choose(better, qq, best_qq)
            v.store(integers + i * vector, integer)
            above = above + integer * best_xq
            below = below + (integer * integer) * best_qq
        solved = half_scale(v.divide(above, below, tiny) * v.splat(one_over_unit)) * v.splat(unit)
        gain = super_scale * ((above + above) - super_scale * below)
        better = (zero < solved) & (gain < solved * ((above + above) - solved * below))
        return v.choose(better, solved, super_scale)

    @v.helper
    def finish(op, x, w, bits, integers, super_scale, head, stats):  # type: ignore[no-untyped-def]
        """Indices and bits over the weights, and what all that costs."""
        q, found = v.scratch(sub_bytes), v.scratch(both_bytes)
        errors, energies = v.load(stats), v.load(stats + vector)
        weighted_errors, weighted_energies = v.load(stats + 2 * vector), v.load(stats + 3 * vector)
        for i in range(groups):
            x_sub, w_sub, integer = x + i * sub_bytes, w + i * sub_bytes, v.load(integers + i * vector)
            v.store(head + (SCALES + i) * vector, integer)
            scale = super_scale * integer
            round_group(op, all_words, x_sub, w_sub, v.divide(v.splat(1.0), scale, tiny), q, found)
            for j in range(size):
                value, weight = v.load(x_sub + j * vector), v.load(w_sub + weights_bytes + j * vector)
                miss = value - scale * v.load(q + j * vector)
                error, energy = miss * miss, value * value
                errors, energies = errors + error, energies + energy
                weighted_errors = weighted_errors + weight * error
                weighted_energies = weighted_energies + weight * energy
            for k in range(n_in_sub):
                place = x_sub + k * group_bytes
                store_ints(place, load_ints(found + 2 * k * vector))
                if shifted:
                    store_ints(place + vector, load_ints(found + (2 * k + 1) * vector))
                if signs:
                    store_ints(place + vector, load_ints(bits + (i * size + k * per_group) // 8 * vector))
        v.store(stats, errors)
        v.store(stats + vector, energies)
        v.store(stats + 2 * vector, weighted_errors)
        v.store(stats + 3 * vector, weighted_energies)

    @v.helper
    def to_numbers(head):  # type: ignore[no-untyped-def]
        """Odd factors to what is stored of them: 1, 3, 5, ... to 0, 1, 2, ..."""
        for i in range(groups):
            place = head + (SCALES + i) * vector
            store_ints(place, v.to_int((v.load(place) - v.splat(1.0)) * v.splat(0.5)))

    @v.helper
    def fit(op, x, w, head, stats):  # type: ignore[no-untyped-def]
        integers, bits = v.scratch(scales_bytes), v.scratch(signs_bytes)
        zero = v.splat(0.0)
        ridge = zero
        if v.load_i64(op + R.Q_IMPORTANCE) != 0:
            for j in range(block_size):
                ridge = ridge + v.load(w + j * vector)
            ridge = (ridge * v.splat(one_over_size)) * v.splat(unsure)
            for j in range(block_size):
                v.store(w + j * vector, v.load(w + j * vector) + ridge)
        if signs:
            take_signs(x, w, bits)
        top = zero
        for i in range(groups):
            scale = first_scale(op, x + i * sub_bytes, w + i * sub_bytes)
            v.store(integers + i * vector, scale)
            top = v.choose(top < scale, scale, top)
        super_scale = half_scale(top * v.splat(one_over_high)) * v.splat(unit)
        inverse = v.divide(v.splat(0.5), super_scale, tiny)
        for i in range(groups):
            steps = v.round_to_whole(v.load(integers + i * vector) * inverse - v.splat(0.5))
            v.store(integers + i * vector, v.clamp(steps + steps + v.splat(1.0), 1, high))
        for _ in range(v.load_i64(op + R.Q_ROUNDS)):
            super_scale = go_over(op, x, w, super_scale, integers)
        finish(op, x, w, bits, integers, super_scale, head, stats)
        to_numbers(head)
        v.store(head, super_scale * v.splat(one_over_unit))

    return fit
