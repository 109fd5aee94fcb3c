"""Attention of several rows of a sequence over floats: a lane of a vector is a query, a row's for one of its heads.

So all of what follows scores, largest ones, exponentials, sums, is done lane by lane. Keys and values of a page become
float32 once for all heads that share them; then scores are products of queries and keys, and results of weights and
values: tiles of a few vectors of queries and a few numbers that all their lanes are multiplied by.

Every score is added up over dimensions, every result over positions, and every sum of weights in the order that
`kernels.attention` has, where a lane is a position: so a row's bits are those that it gets alone. Where nothing changes
for a lane, what it has so far is multiplied by exactly 1.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from qrun.engine.kernels import records as R
from qrun.engine.simd import operations as v
from qrun.engine.simd.operations import VectorType, operation
from qrun.engine.simd.vector import F16, F32, I64, Emitter, Vector

POSITIONS = R.PAGE_POSITIONS
# Positions of keys, or dimensions of values, that lie side by side once they are float32: a row of 64 bytes.
COLUMNS = 16
MATRIX_BYTES = 4 * POSITIONS * R.MAX_HEAD_DIM
# Queries, and what is summed for them, take so much at most: eight heads of 128 dimensions. All of that lies on the
# stack, of which a thread of an app's may have no more than 512 KB.
QUERY_BYTES = 1 << 16
HIDDEN = float("-inf")


def _vectors_beside(vectors: int) -> int:
    """How many vectors of queries, of a full tile's, are multiplied together."""
    return next(n for n in (3, 2, 1) if vectors % n == 0)


def _columns_beside(vectors: int) -> int:
    """How many numbers they are multiplied by, so that sums overlap, and fit the registers with what they need."""
    registers = 32 if v.target().lanes == 16 or v.target().is_arm else 16
    return max(n for n in (16, 8, 4) if n * vectors <= (24 if registers == 32 else 12))


def _product(vectors: int, columns: int) -> Any:
    """product(tile, left, apart, right, count): tile[vector][column] += left[i] of each vector, `apart` bytes from each
    other, times right[i][column], for `count` of i: one at least."""

    @operation(lambda tile, *_: tile)
    def add(e: Emitter, tile: list[Vector], left: ir.Value, apart: ir.Value, right: ir.Value) -> list[Vector]:
        b = e.builder
        rows = [
            e.load(b.add(left, b.mul(e.index(apart), ir.Constant(I64, vector))), 0, F32, e.lanes)
            for vector in range(vectors)
        ]
        for column in range(columns):
            number = e.broadcast_word(right, column, columns, F32)
            for vector in range(vectors):
                index = columns * vector + column
                tile[index] = rows[vector].fma(number, tile[index])
        return tile

    row_bytes = 4 * v.target().lanes

    @v.helper
    def product(tile, left, apart, right, count):  # type: ignore[no-untyped-def]
        while True:
            tile = add(tile, left, apart, right)
            left += row_bytes
            right += 4 * COLUMNS
            count -= 1
            if count == 0:
                return tile

    return product


def _steps(element_bytes: int, vectors: int) -> tuple[Any, Any]:
    """Scores of a page and the mix of its values, for `vectors` vectors of queries:
    score(queries, apart, keys, positions, dims, scores, asked),
    mix(scores, values, positions, dims, fading, sums, apart, asked).

    Both ask for a page's keys or values from `asked` on meanwhile.
    """
    lanes = v.target().lanes
    columns = _columns_beside(vectors)
    product, count = _product(vectors, columns), vectors * columns
    row_bytes, score_bytes = 4 * lanes, 4 * lanes * POSITIONS

    @operation(lambda tile, *_: tile)
    def faded(e: Emitter, tile: list[Vector], fading: ir.Value) -> list[Vector]:
        factors = [e.load(fading, row_bytes * vector, F32, lanes) for vector in range(vectors)]
        return [sums * factors[i // columns] for i, sums in enumerate(tile)]

    @v.helper
    def ask(asked, size):  # type: ignore[no-untyped-def]
        for offset in range(0, size, 64):
            v.prefetch(asked + offset, 64)

    @v.helper
    def score(queries, apart, keys, positions, dims, scores, asked):  # type: ignore[no-untyped-def]
        for position in range(0, positions, columns):
            ask(asked + position * dims * element_bytes, columns * dims * element_bytes)
            right = keys + position // COLUMNS * (dims * 4 * COLUMNS) + position % COLUMNS * 4
            tile = product(v.zero_tile(count), queries, apart, right, dims)
            v.store_rows(tile, columns, scores + position * row_bytes, score_bytes)

    @v.helper
    def mix(scores, values, positions, dims, fading, sums, apart, asked):  # type: ignore[no-untyped-def]
        for dim in range(0, dims, columns):
            ask(asked + dim * POSITIONS * element_bytes, columns * POSITIONS * element_bytes)
            right = values + dim // COLUMNS * (POSITIONS * 4 * COLUMNS) + dim % COLUMNS * 4
            tile = faded(v.load_rows(count, columns, sums + dim * row_bytes, apart), fading)
            tile = product(tile, scores, score_bytes, right, positions)
            v.store_rows(tile, columns, sums + dim * row_bytes, apart)

    return score, mix


@operation(lambda *_: VectorType("f32", v.target().lanes))
def _largest_of(e: Emitter, scores: ir.Value, beginning: Vector) -> Vector:
    """The largest of a page's scores, lane by lane, and of what there was before."""
    chains = [beginning] * 4
    for position in range(POSITIONS):
        value = e.load(scores, 4 * e.lanes * position, F32, e.lanes)
        chains[position % 4] = chains[position % 4].larger(value)
    return chains[0].larger(chains[1]).larger(chains[2].larger(chains[3]))


@operation(lambda *_: VectorType("f32", v.target().lanes))
def _weigh(e: Emitter, scores: ir.Value, largest: Vector) -> Vector:
    """In the place of every score, beginning with this one, that is a multiple of `lanes` from here: its exponential.
    Gives their sum."""
    total = e.constant(0.0)
    for position in range(0, POSITIONS, e.lanes):
        value = e.load(scores, 4 * e.lanes * position, F32, e.lanes)
        weight = v.exp_of_difference(value - largest)
        e.store(weight.value, scores, 4 * e.lanes * position)
        total = total + weight
    return total


@operation(lambda *_: VectorType("f32", v.target().lanes))
def _sum_of(e: Emitter, sums: ir.Value) -> Vector:
    """As many vectors as there are lanes, added as lanes are in `Vector.reduce`."""
    vectors = [e.load(sums, 4 * e.lanes * i, F32, e.lanes) for i in range(e.lanes)]
    while len(vectors) > 1:
        half = len(vectors) // 2
        vectors = [low + high for low, high in zip(vectors[:half], vectors[half:], strict=True)]
    return vectors[0]


def _turned(vectors: list[Vector]) -> list[Vector]:
    """Rows as columns: as many vectors as each has lanes."""
    lanes, vectors = len(vectors), list(vectors)
    step = 1
    while step < lanes:
        low = [lane - step + lanes if lane & step else lane for lane in range(lanes)]
        high = [lane + lanes if lane & step else lane + step for lane in range(lanes)]
        for i in range(lanes):
            if not i & step:
                a, b = vectors[i], vectors[i + step]
                vectors[i], vectors[i + step] = a.shuffle(b, low), a.shuffle(b, high)
        step *= 2
    return vectors


@operation(lambda *_: v.types.void)
def _turn(e: Emitter, block: ir.Value, out: ir.Value, factor: Vector) -> None:
    """[lanes][lanes] at `block`, times `factor`, the other way round to `out`."""
    rows = [e.load(block, 4 * e.lanes * i, F32, e.lanes) * factor for i in range(e.lanes)]
    for i, column in enumerate(_turned(rows)):
        e.store(column.value, out, 4 * e.lanes * i)


@operation(lambda *_: v.types.void)
def _divide_and_turn(e: Emitter, sums: ir.Value, totals: Vector, out: ir.Value) -> None:
    rows = [e.load(sums, 4 * e.lanes * i, F32, e.lanes) / totals for i in range(e.lanes)]
    for i, column in enumerate(_turned(rows)):
        e.store(column.value, out, 4 * e.lanes * i)


def query_lanes(cache_type: str, together: int) -> Any:
    """compute(op, step, first_row, count, first_position, end, head, heads) for up to TILE_SIZE rows of a sequence and
    neighbouring heads, up to `together`, that share one of keys and values; and how many heads at once there is room
    for: heads_at_once(op)."""
    lanes = v.target().lanes
    element, element_bytes = (F32, 4) if cache_type == "f32" else (F16, 2)
    row_bytes, score_bytes, matrix_row = 4 * lanes, 4 * lanes * POSITIONS, 4 * COLUMNS
    beside = _vectors_beside(max(R.TILE_SIZE * together // lanes, 1))
    score_some, mix_some = _steps(element_bytes, beside)
    score_one, mix_one = _steps(element_bytes, 1)
    most_vectors = -(-R.TILE_SIZE * together // lanes)
    most = most_vectors * lanes
    scores_bytes, numbers_bytes, addresses_bytes = most_vectors * score_bytes, 4 * most, 8 * most
    block_bytes = row_bytes * lanes
    # A head of the longest kind has room.
    query_bytes = max(QUERY_BYTES, 4 * R.MAX_HEAD_DIM * max(R.TILE_SIZE, lanes))

    @operation(lambda *_: v.types.void)
    def widen(e: Emitter, numbers: ir.Value, out: ir.Value) -> None:
        """COLUMNS numbers as float32."""
        for i in range(0, COLUMNS, e.lanes):
            values = e.load(numbers, element_bytes * i, element, e.lanes)
            e.store((values if element is F32 else values.to_float()).value, out, 4 * i)

    @v.helper
    def widen_keys(keys, positions, dims, out):  # type: ignore[no-untyped-def]
        for dim in range(dims):
            for position in range(0, positions, COLUMNS):
                place = out + position * (dims * 4) + dim * matrix_row
                widen(keys + element_bytes * (dim * POSITIONS + position), place)

    @v.helper
    def widen_values(values, positions, dims, out):  # type: ignore[no-untyped-def]
        for position in range(positions):
            for dim in range(0, dims, COLUMNS):
                place = out + dim * (POSITIONS * 4) + position * matrix_row
                widen(values + element_bytes * (position * dims + dim), place)

    @v.helper
    def turn_rows(addresses, offset, factor, block, out):  # type: ignore[no-untyped-def]
        """`lanes` floats from each lane's address + offset on, times `factor`, the other way round."""
        for lane in range(lanes):
            v.store(block + lane * row_bytes, v.load(v.load_i64(addresses + 8 * lane) + offset))
        _turn(block, out, factor)

    @v.helper
    def softmax(scores, state, parts):  # type: ignore[no-untyped-def]
        """state: for each lane the largest score so far, the sum of exponentials, and by how much both fade now."""
        old = v.load(state)
        largest = _largest_of(scores, old)
        for lane in range(lanes):
            v.store(parts + lane * row_bytes, _weigh(scores + lane * row_bytes, largest))
        fading = v.falling_exp(old - largest)
        v.store(state, largest)
        v.store(state + numbers_bytes, v.load(state + numbers_bytes) * fading + _sum_of(parts))
        v.store(state + 2 * numbers_bytes, fading)

    @v.helper
    def heads_at_once(op):  # type: ignore[no-untyped-def]
        dims = max(v.load_i64(op + R.ATT_DIM_K), v.load_i64(op + R.ATT_DIM_V))
        return max(query_bytes // (4 * R.TILE_SIZE * ((dims + 31) // 32 * 32)), 1)

    state_bytes = 3 * numbers_bytes

    @v.helper
    def compute(op, step, first_row, count, first_position, end, head, heads):  # type: ignore[no-untyped-def]
        queries = v.scratch(query_bytes)
        sums = v.scratch(query_bytes)
        scores = v.scratch(scores_bytes)
        matrix = v.scratch(MATRIX_BYTES)
        state = v.scratch(state_bytes)
        places = v.scratch(addresses_bytes)  # of queries, and then of results
        befores = v.scratch(numbers_bytes)  # the last position before those that a lane sees
        afters = v.scratch(numbers_bytes)  # and the first one behind them
        owns = v.scratch(numbers_bytes)  # a lane's own position, as float
        block = v.scratch(block_bytes)
        biases_of_page = v.scratch(score_bytes)
        dim_k = v.load_i64(op + R.ATT_DIM_K)
        dim_v = v.load_i64(op + R.ATT_DIM_V)
        dims_k = (dim_k + 31) // 32 * 32
        dims_v = (dim_v + 31) // 32 * 32
        scale = v.splat(v.load_f32(op + R.ATT_SCALE))
        cap = v.load_f32(op + R.ATT_SOFTCAP)
        window = v.load_i64(op + R.ATT_WINDOW)
        chunked = v.load_i64(op + R.ATT_CHUNKED) != 0
        ahead = v.load_i64(op + R.ATT_AHEAD)
        sinks = v.load_i64(op + R.ATT_SINKS)
        slopes = v.load_i64(op + R.ATT_SLOPES)
        biases = v.load_i64(op + R.ATT_BIASES)
        reach = v.load_i64(op + R.ATT_REACH)
        kv_head = head * v.load_i64(op + R.ATT_KV_HEADS) // v.load_i64(op + R.ATT_HEADS)
        query = v.load_i64(op + R.ATT_Q) + first_row * v.load_i64(op + R.ATT_Q_STRIDE) + 4 * head * dim_k
        out = v.load_i64(op + R.ATT_OUT) + first_row * v.load_i64(op + R.ATT_OUT_STRIDE) + 4 * head * dim_v
        used = count * heads
        vectors = (used + lanes - 1) // lanes
        query_apart, sum_apart = dims_k * row_bytes, dims_v * row_bytes
        for lane in range(vectors * lanes):
            index = min(lane, used - 1)  # lanes that are left do what the last one does
            row = index % count
            position = first_position + row
            low = position // window * window if chunked else max(position - window + 1, 0)
            v.store_i32(befores + 4 * lane, low - 1)
            v.store_i32(afters + 4 * lane, min(position + ahead, end - 1) + 1)
            v.store_f32(owns + 4 * lane, v.as_float(position))
            v.store_f32(state + 4 * lane, v.float32(-1e30))
            v.store_f32(state + numbers_bytes + 4 * lane, v.float32(0.0))
            if sinks != 0:  # as if a position of that score had been seen
                v.store_f32(state + 4 * lane, v.load_f32(sinks + 4 * (head + index // count)))
                v.store_f32(state + numbers_bytes + 4 * lane, v.float32(1.0))
            v.store_i64(places + 8 * lane, query + row * v.load_i64(op + R.ATT_Q_STRIDE) + 4 * (index // count) * dim_k)
        for vector in range(vectors):
            place = queries + vector * query_apart
            for dim in range(0, dim_k // lanes * lanes, lanes):
                turn_rows(places + 8 * lanes * vector, 4 * dim, scale, block, place + dim * row_bytes)
            for dim in range(dim_k // lanes * lanes, dims_k):
                v.clear(place + dim * row_bytes)
                if dim < dim_k:
                    for lane in range(lanes):
                        value = v.load_f32(v.load_i64(places + 8 * (lanes * vector + lane)) + 4 * dim)
                        v.store_f32(place + dim * row_bytes + 4 * lane, value * v.load_f32(op + R.ATT_SCALE))
            for dim in range(dims_v):
                v.clear(sums + vector * sum_apart + dim * row_bytes)
        n_rows = v.load_i64(step + R.N_ROWS)
        table = v.load_i64(v.load_i64(step + R.PAGE_TABLES) + 8 * (v.load_i64(op + R.ATT_GROUP) * n_rows + first_row))
        last_row_position = first_position + count - 1
        last = min(last_row_position + ahead, end - 1)
        lowest = first_position // window * window if chunked else max(first_position - window + 1, 0)
        highest = last_row_position // window * window if chunked else max(last_row_position - window + 1, 0)
        first_last = min(first_position + ahead, end - 1)
        for page_index in range(lowest // POSITIONS, last // POSITIONS + 1):
            page = v.load_i64(table + 8 * page_index)
            page_position = page_index * POSITIONS
            keys = page + v.load_i64(op + R.ATT_K_OFFSET) + kv_head * v.load_i64(op + R.ATT_K_HEAD_BYTES)
            values = page + v.load_i64(op + R.ATT_V_OFFSET) + kv_head * v.load_i64(op + R.ATT_V_HEAD_BYTES)
            next_keys = v.load_i64(table + 8 * min(page_index + 1, last // POSITIONS)) + (keys - page)
            positions = min(POSITIONS, last - page_position + 1)  # the rest is hidden from all, whatever its scores
            widen_keys(keys, positions, dims_k, matrix)
            vector = 0
            while vector + beside <= vectors:
                place = queries + vector * query_apart
                score_some(place, query_apart, matrix, positions, dims_k, scores + vector * score_bytes, values)
                vector += beside
            for one in range(vector, vectors):
                place = queries + one * query_apart
                score_one(place, query_apart, matrix, positions, dims_k, scores + one * score_bytes, values)
            some_hidden = page_position < highest or page_position + POSITIONS - 1 > first_last
            for vector in range(vectors):
                place = scores + vector * score_bytes
                if biases != 0:  # of the page's first position; the others lie behind it
                    for lane in range(lanes):
                        index = min(vector * lanes + lane, used - 1)
                        distance = page_position - first_position - index % count
                        distance = min(max(distance, -reach - POSITIONS), reach)
                        this_head = head + index // count
                        bias = biases + 4 * (this_head * 2 * (reach + POSITIONS) + distance + reach + POSITIONS)
                        v.store_i64(places + 8 * lane, bias)
                    for i in range(0, POSITIONS, lanes):
                        turn_rows(places, 4 * i, v.splat(v.float32(1.0)), block, biases_of_page + i * row_bytes)
                if some_hidden or cap > v.float32(0.0) or slopes != 0 or biases != 0:
                    slope = v.splat(v.float32(0.0))
                    if slopes != 0:
                        for lane in range(lanes):
                            this_head = head + min(vector * lanes + lane, used - 1) // count
                            v.store_f32(block + 4 * lane, v.load_f32(slopes + 4 * this_head))
                        slope = v.splat(v.float32(0.0)) - v.load(block)
                    own = v.load(owns + vector * row_bytes)
                    before = v.load_ints(befores + vector * row_bytes)
                    after = v.load_ints(afters + vector * row_bytes)
                    for i in range(POSITIONS):
                        value = v.load(place + i * row_bytes)
                        if cap > v.float32(0.0):
                            value = v.splat(cap) * v.tanh(value / v.splat(cap))
                        if biases != 0:
                            value = value + v.load(biases_of_page + i * row_bytes)
                        elif slopes != 0:
                            away = own - v.splat(v.as_float(page_position + i))
                            away = v.maximum(away, v.splat(v.float32(0.0)) - away)
                            value = v.fma(slope, away, value)
                        if some_hidden:
                            number = v.splat_int(page_position + i)
                            value = v.choose(number < after, value, v.splat(v.float32(HIDDEN)))
                            value = v.choose(before < number, value, v.splat(v.float32(HIDDEN)))
                        v.store(place + i * row_bytes, value)
                softmax(place, state + vector * row_bytes, block)
            widen_values(values, positions, dims_v, matrix)
            vector = 0
            while vector + beside <= vectors:
                place, fading = scores + vector * score_bytes, state + 2 * numbers_bytes + vector * row_bytes
                mix_some(place, matrix, positions, dims_v, fading, sums + vector * sum_apart, sum_apart, next_keys)
                vector += beside
            for one in range(vector, vectors):
                place, fading = scores + one * score_bytes, state + 2 * numbers_bytes + one * row_bytes
                mix_one(place, matrix, positions, dims_v, fading, sums + one * sum_apart, sum_apart, next_keys)
        for lane in range(vectors * lanes):
            index = min(lane, used - 1)
            place = out + index % count * v.load_i64(op + R.ATT_OUT_STRIDE) + 4 * (index // count) * dim_v
            v.store_i64(places + 8 * lane, place)
        for vector in range(vectors):
            of_vector = sums + vector * sum_apart
            total = v.load(state + numbers_bytes + vector * row_bytes)
            used_lanes = min(used - vector * lanes, lanes)
            for dim in range(0, dim_v // lanes * lanes, lanes):
                _divide_and_turn(of_vector + dim * row_bytes, total, block)
                for lane in range(used_lanes):
                    place = v.load_i64(places + 8 * (lanes * vector + lane))
                    v.store(place + 4 * dim, v.load(block + lane * row_bytes))
            for dim in range(dim_v // lanes * lanes, dim_v):
                v.store(block, v.load(of_vector + dim * row_bytes) / total)
                for lane in range(used_lanes):
                    place = v.load_i64(places + 8 * (lanes * vector + lane))
                    v.store_f32(place + 4 * dim, v.load_f32(block + 4 * lane))

    return compute, heads_at_once
