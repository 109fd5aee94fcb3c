"""Linear attention: each head keeps a matrix instead of keys and values (Katharopoulos et al., "Transformers are RNNs",
2020), which fades (gated linear attention, Mamba-2) and may be corrected (the delta rule: Yang et al., "Gated Delta
Networks", 2024; "Kimi Linear", 2025).

Position by position, S = exp(decay) S + k u and out = scale q S, where u is v, or with the delta rule
beta (v - k exp(decay) S). Unrolled from where a chunk of 16 positions begins, with S there, c_t the sum of decays from
there to t, and s running over the chunk's positions:

    u_t = beta_t (v_t - exp(c_t) k_t S - sum over s < t of exp(c_t - c_s) (k_t . k_s) u_s)
    out_t = scale (exp(c_t) q_t S + sum over s <= t of exp(c_t - c_s) (q_t . k_s) u_s)

So S is read once for all rows of a chunk, as a matrix product, and written once for each chunk. In a block of state
(`program.state_blocks`) a head has S [dim_k, dim_v], the keys of its chunk [dim_k, 16], the sums of decays [16], or
[dim_k, 16] where each dimension fades by itself, and u [16, dim_v]; dim_v is padded with zeros to a multiple of 16.
Everything is added in one fixed order, so a row's bits do not depend on the rows it is computed with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from qrun.engine.kernels import records as R
from qrun.engine.kernels.team import claim, more_wanted
from qrun.engine.simd import operations as v
from qrun.engine.simd.operations import operation
from qrun.engine.simd.vector import F32, Emitter, Vector

Kernel = Callable[[int, int, int], None]

ROWS = R.STATE_ROWS
# Rows of a head lie on the stack, each in this many bytes.
ROW = 4 * R.MAX_STATE_DIM


def _products(columns: int, parts: int) -> Any:
    """`columns` rows times a matrix of float32, for `parts` of its vectors: out[column] = sum of x[column][d] m[d]."""

    @operation(lambda tile, *_: tile)
    def add(e: Emitter, tile: list[Vector], x: ir.Value, matrix: ir.Value) -> list[Vector]:
        """One dimension more."""
        vectors = [e.load(matrix, 4 * e.lanes * i, F32, e.lanes) for i in range(parts)]
        for column in range(columns):
            factor = e.broadcast(x, column * ROW, F32)
            for i in range(parts):
                tile[parts * column + i] = vectors[i].fma(factor, tile[parts * column + i])
        return tile

    count = columns * parts

    @v.helper
    def products(x, dims, matrix, stride, out):  # type: ignore[no-untyped-def]
        tile = v.zero_tile(count)
        for d in range(dims):
            tile = add(tile, x + 4 * d, matrix + d * stride)
        v.store_rows(tile, parts, out, ROW)

    return products


def _product(columns: int, parts: int) -> Any:
    """`count` rows times a matrix [dims] of rows of so many bytes. More rows may be read and written: a multiple of
    `columns`."""
    several, single = _products(columns, parts), _products(columns, 1)
    vector = 4 * v.target().lanes
    width = vector * parts

    @v.helper
    def product(x, count, dims, matrix, stride, bytes_, out):  # type: ignore[no-untyped-def]
        for first in range(0, count, columns):
            whole = bytes_ // width * width
            for place in range(0, whole, width):
                several(x + first * ROW, dims, matrix + place, stride, out + first * ROW + place)
            for place in range(whole, bytes_, vector):
                single(x + first * ROW, dims, matrix + place, stride, out + first * ROW + place)

    return product


def _mix(parts: int) -> Any:
    """tile += factor * `parts` vectors at `row`."""

    @operation(lambda tile, *_: tile)
    def mix(e: Emitter, tile: list[Vector], row: ir.Value, factor: ir.Value) -> list[Vector]:
        factors = e.broadcast(factor, 0, F32)
        return [e.load(row, 4 * e.lanes * i, F32, e.lanes).fma(factors, tile[i]) for i in range(parts)]

    return mix


def _fade(dims: int, parts: int) -> Any:
    """tile += for each of `dims` rows of 16 factors: factor[s] * `parts` vectors of u[s]."""

    @operation(lambda tile, *_: tile)
    def fade(e: Emitter, tile: list[Vector], factors: ir.Value, change: ir.Value) -> list[Vector]:
        vectors = [e.load(change, 4 * e.lanes * i, F32, e.lanes) for i in range(parts)]
        for d in range(dims):
            factor = e.broadcast(factors, 4 * ROWS * d, F32)
            for i in range(parts):
                tile[parts * d + i] = vectors[i].fma(factor, tile[parts * d + i])
        return tile

    return fade


def linear_attention(variant: str) -> Kernel:
    """The variant: "plain" or "delta", then by what it fades: "head" or "dimension"."""
    rule, _, fading = variant.partition("-")
    delta, by_dimension = rule == "delta", fading == "dimension"
    lanes = v.target().lanes
    wide = 4 if lanes == 16 else 2  # vectors side by side
    few, many = 2 if delta else 1, 4 if lanes == 8 else 8  # rows side by side
    product_of_few, product_of_many = _product(few, wide), _product(many, 2)
    mix = _mix(wide)
    mix_one = _mix(1)
    fade_dims = 4
    fade, fade_one = _fade(fade_dims, wide), _fade(1, 1)
    fade_count = fade_dims * wide
    width, vector = 4 * lanes * wide, 4 * lanes
    n_columns = 2 * ROWS + many
    rows_bytes, factor_bytes = n_columns * ROW, 4 * ROWS * R.MAX_STATE_DIM
    score_bytes, weights_bytes = n_columns * ROW, 4 * ROWS
    row_bytes = ROW

    @v.helper
    def copy(source, out, count):  # type: ignore[no-untyped-def]
        whole = count // lanes * lanes
        for i in range(0, whole, lanes):
            v.store(out + 4 * i, v.load(source + 4 * i))
        for i in range(whole, count):
            v.store_f32(out + 4 * i, v.load_f32(source + 4 * i))

    @v.helper
    def padded_bytes(op):  # type: ignore[no-untyped-def]
        return (v.load_i64(op + R.LIN_DIM_V) + ROWS - 1) // ROWS * ROWS * 4

    @v.helper
    def product(x, columns, dims, matrix, stride, bytes_, out):  # type: ignore[no-untyped-def]
        """`columns` rows times a matrix whose rows have that many bytes."""
        if columns <= few:
            product_of_few(x, columns, dims, matrix, stride, bytes_, out)
        else:
            product_of_many(x, columns, dims, matrix, stride, bytes_, out)

    @v.helper
    def next_chunk(op, head, out):  # type: ignore[no-untyped-def]
        """S where the chunk ends, from S where it began and its 16 positions."""
        dims = v.load_i64(op + R.LIN_DIM_K)
        padded = padded_bytes(op)
        keys = head + dims * padded
        decays = keys + 4 * dims * ROWS
        changes = decays + (4 * dims * ROWS if by_dimension else 4 * ROWS)
        factors = v.scratch(factor_bytes)
        weights = v.scratch(weights_bytes)
        kept = v.scratch(row_bytes)
        for d in range(dims):
            if by_dimension or d == 0:
                total = v.load_f32(decays + 4 * (ROWS * d + ROWS - 1))
                remains = v.first_lane(v.exp(v.splat(total)))
                for i in range(0, 4 * ROWS, vector):
                    v.store(weights + i, v.exp(v.splat(total) - v.load(decays + 4 * ROWS * d + i)))
            v.store_f32(kept + 4 * d, remains)
            for i in range(0, 4 * ROWS, vector):
                v.store(factors + 4 * ROWS * d + i, v.load(keys + 4 * ROWS * d + i) * v.load(weights + i))
        place = 0
        while place + width <= padded:
            whole = dims // fade_dims * fade_dims
            for d in range(0, whole, fade_dims):
                tile = v.load_rows(fade_count, wide, head + d * padded + place, padded)
                tile = scale_rows(tile, kept + 4 * d)
                for s in range(ROWS):
                    tile = fade(tile, factors + 4 * (ROWS * d + s), changes + s * padded + place)
                v.store_rows(tile, wide, out + d * padded + place, padded)
            for d in range(whole, dims):
                for i in range(place, place + width, vector):
                    fade_vector(head, out, d, padded, i, kept, factors, changes)
            place += width
        while place < padded:
            for d in range(dims):
                fade_vector(head, out, d, padded, place, kept, factors, changes)
            place += vector

    @operation(lambda tile, *_: tile)
    def scale_rows(e: Emitter, tile: list[Vector], factors: ir.Value) -> list[Vector]:
        return [value * e.broadcast(factors, 4 * (i // wide), F32) for i, value in enumerate(tile)]

    @v.helper
    def fade_vector(head, out, d, padded, place, kept, factors, changes):  # type: ignore[no-untyped-def]
        """One vector of one row of S."""
        value = v.load(head + d * padded + place) * v.splat(v.load_f32(kept + 4 * d))
        tile = v.zero_tile(1)
        v.store(out + d * padded + place, value)
        tile = v.load_rows(1, 1, out + d * padded + place, padded)
        for s in range(ROWS):
            tile = fade_one(tile, factors + 4 * (ROWS * d + s), changes + s * padded + place)
        v.store_rows(tile, 1, out + d * padded + place, padded)

    @v.helper
    def scores(op, head, x, t, count, columns, out):  # type: ignore[no-untyped-def]
        """For each of the columns that belong to rows t, t + 1, ... (count of them, then again): the products with the
        keys of the chunk, faded."""
        dims = v.load_i64(op + R.LIN_DIM_K)
        keys = head + dims * padded_bytes(op)
        decays = keys + 4 * dims * ROWS
        if by_dimension:
            for column in range(columns):
                number = t + column % count
                for i in range(0, ROWS, lanes):
                    total = v.splat(0.0)
                    for d in range(dims):
                        sums = decays + 4 * ROWS * d
                        later = v.load_f32(sums + 4 * number)
                        weight = v.exp(v.splat(later) - v.load(sums + 4 * i))
                        factor = v.splat(v.load_f32(x + column * ROW + 4 * d))
                        total = v.fma(factor * weight, v.load(keys + 4 * (ROWS * d + i)), total)
                    v.store(out + column * ROW + 4 * i, total)
        else:
            product(x, columns, dims, keys, 4 * ROWS, 4 * ROWS, out)
            for column in range(columns):
                later = v.load_f32(decays + 4 * (t + column % count))
                for i in range(0, 4 * ROWS, vector):
                    weight = v.exp(v.splat(later) - v.load(decays + i))
                    v.store(out + column * ROW + i, v.load(out + column * ROW + i) * weight)

    @v.helper
    def some_rows(op, head, number, t, row, count):  # type: ignore[no-untyped-def]
        """Rows `row` ... of the step, which are positions t ... of the head's chunk."""
        dims = v.load_i64(op + R.LIN_DIM_K)
        dim_v = v.load_i64(op + R.LIN_DIM_V)
        padded = padded_bytes(op)
        keys = head + dims * padded
        decays = keys + 4 * dims * ROWS
        changes = decays + (4 * dims * ROWS if by_dimension else 4 * ROWS)
        key_heads = v.load_i64(op + R.LIN_KEY_HEADS)
        heads = v.load_i64(op + R.LIN_HEADS)
        key_head = number % key_heads if v.load_i64(op + R.LIN_TILED) != 0 else number * key_heads // heads
        columns = 2 * count if delta else count
        x = v.scratch(rows_bytes)  # queries, then keys
        faded = v.scratch(rows_bytes)  # the same, faded since the chunk began
        from_state = v.scratch(rows_bytes)
        from_chunk = v.scratch(score_bytes)
        v.scratch(weights_bytes)
        result = v.scratch(row_bytes)
        for i in range(count):
            q = v.load_i64(op + R.LIN_Q) + (row + i) * v.load_i64(op + R.LIN_Q_STRIDE) + 4 * key_head * dims
            k = v.load_i64(op + R.LIN_K) + (row + i) * v.load_i64(op + R.LIN_K_STRIDE) + 4 * key_head * dims
            decay = v.load_i64(op + R.LIN_DECAY) + (row + i) * v.load_i64(op + R.LIN_DECAY_STRIDE)
            if by_dimension:
                decay += 4 * number * dims
            copy(q, x + i * ROW, dims)
            key_row = x + (count + i) * ROW
            copy(k, key_row, dims)
            for d in range(dims):
                v.store_f32(keys + 4 * (ROWS * d + t + i), v.load_f32(key_row + 4 * d))
            if by_dimension:
                for d in range(dims):
                    total = v.load_f32(decay + 4 * d)
                    if t + i > 0:
                        total += v.load_f32(decays + 4 * (ROWS * d + t + i - 1))
                    v.store_f32(decays + 4 * (ROWS * d + t + i), total)
                    part = v.first_lane(v.exp(v.splat(total)))
                    v.store_f32(faded + i * ROW + 4 * d, v.load_f32(x + i * ROW + 4 * d) * part)
                    v.store_f32(faded + (count + i) * ROW + 4 * d, v.load_f32(key_row + 4 * d) * part)
            else:
                total = v.load_f32(decay + 4 * number)
                if t + i > 0:
                    total += v.load_f32(decays + 4 * (t + i - 1))
                v.store_f32(decays + 4 * (t + i), total)
        product(faded if by_dimension else x, columns, dims, head, padded, padded, from_state)
        scores(op, head, x, t, count, columns, from_chunk)
        scale = v.load_f32(op + R.LIN_SCALE)
        for i in range(count):
            value = v.load_i64(op + R.LIN_V) + (row + i) * v.load_i64(op + R.LIN_V_STRIDE) + 4 * number * dim_v
            out = v.load_i64(op + R.LIN_OUT) + (row + i) * v.load_i64(op + R.LIN_OUT_STRIDE) + 4 * number * dim_v
            change = changes + (t + i) * padded
            kept = v.float32(1.0)
            if not by_dimension:
                kept = v.first_lane(v.exp(v.splat(v.load_f32(decays + 4 * (t + i)))))
            copy(value, change, dim_v)
            for j in range(dim_v, padded // 4):
                v.store_f32(change + 4 * j, v.float32(0.0))
            if delta:
                row_of_beta = v.load_i64(op + R.LIN_BETA) + (row + i) * v.load_i64(op + R.LIN_BETA_STRIDE)
                beta = v.splat(v.load_f32(row_of_beta + 4 * number))
                mixed(from_chunk + (count + i) * ROW, t + i, changes, padded, result)
                for j in range(0, padded, vector):
                    known = v.fma(v.load(from_state + (count + i) * ROW + j), v.splat(kept), v.load(result + j))
                    v.store(change + j, beta * (v.load(change + j) - known))
            mixed(from_chunk + i * ROW, t + i + 1, changes, padded, result)
            for j in range(0, padded, vector):
                total_row = v.fma(v.load(from_state + i * ROW + j), v.splat(kept), v.load(result + j))
                v.store(result + j, total_row * v.splat(scale))
            copy(result, out, dim_v)

    @v.helper
    def mixed(weights, count, changes, padded, out):  # type: ignore[no-untyped-def]
        """The sum of the first `count` rows of u by their weights."""
        place = 0
        while place + width <= padded:
            tile = v.zero_tile(wide)
            for s in range(count):
                tile = mix(tile, changes + s * padded + place, weights + 4 * s)
            v.store_rows(tile, wide, out + place, ROW)
            place += width
        while place < padded:
            tile = v.zero_tile(1)
            for s in range(count):
                tile = mix_one(tile, changes + s * padded + place, weights + 4 * s)
            v.store_rows(tile, 1, out + place, ROW)
            place += vector

    def kernel(op, step, thread):  # type: ignore[no-untyped-def]
        heads = v.load_i64(op + R.LIN_HEADS)
        units = v.load_i64(step + R.N_SEGMENTS) * heads
        while more_wanted(step, thread):
            unit = claim(op, units)
            if unit >= units:
                return
            segment = v.load_i64(step + R.SEGMENTS) + unit // heads * R.SEG_BYTES
            number = unit % heads
            place = v.load_i64(op + R.LIN_STATE) + number * v.load_i64(op + R.LIN_HEAD_BYTES)
            head = v.load_i64(segment + R.SEG_IN) + place
            row = v.load_i64(segment + R.SEG_FIRST_ROW)
            end = row + v.load_i64(segment + R.SEG_ROWS)
            t = v.load_i64(segment + R.SEG_LOGGED)
            while row < end:
                if t == ROWS:
                    following = v.load_i64(segment + R.SEG_OUT) + place
                    next_chunk(op, head, following)
                    head = following
                    t = 0
                count = min(ROWS - t, end - row)
                some_rows(op, head, number, t, row, count)
                row += count
                t += count

    return kernel
