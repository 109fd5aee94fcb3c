"""Writing keys and values to the cache, and attention over it.

A page holds 64 positions of every layer that shares it. In it, for each layer and head: the keys transposed
([dimension][position], so that a lane of a vector is a position and scores need no sums across lanes), and the values
([position][dimension]). Dimensions are padded with zeros to a multiple of 32.

    f32    4 bytes a value, for layers whose results depend on every digit
    f16    2 bytes a value
    q8_0   int8, then a float16 scale for each 32 dimensions of a position: scale = max |x| / 127
    q4_0   4 bits, dimensions i and i + 16 of a block of 32 in one byte; scale = x of largest size / -8, value (q - 8)

Where values are a part of their keys, only keys are kept, laid out as values are: scores then take a sum across lanes
for each position, which is little beside the hundreds of products of such long heads.

Quantised keys lie four bytes of a position together ([4 bytes][position][byte]): so they are the weights of a matrix
with a row for each position, and queries are its columns, packed and multiplied as all columns are (`kernels.columns`).

Scales lie as [block of 32][position], those of values too: no value is multiplied by its scale, but the weights that a
block of values gets.

Attention goes page by page with a running maximum (Milakov and Gimelshein, "Online normalizer calculation for softmax",
2018; Dao et al., "FlashAttention", 2022). Pages begin at multiples of 64, dimensions and positions are added in order,
and what a row must not see counts exactly nothing: so a row's bits do not depend on which rows it is computed with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from qrun.engine.kernels import records as R
from qrun.engine.kernels.columns import dot_quantised, first_row, pack_quantised
from qrun.engine.kernels.query_lanes import HIDDEN, query_lanes
from qrun.engine.kernels.team import claim, more_wanted
from qrun.engine.kernels.unpack import TYPES, Quantised, Rows
from qrun.engine.simd import operations as v
from qrun.engine.simd.operations import operation
from qrun.engine.simd.vector import F16, F32, I8, I32, I64, Emitter, Vector

Kernel = Callable[[int, int, int], None]

POSITIONS = R.PAGE_POSITIONS
# Queries of a tile and their sums lie on the stack, each in a row of this many bytes.
ROW = 4 * R.MAX_HEAD_DIM
# Rows of one sequence that are computed together where a lane is a position; and where it can be a query, so few that
# each is computed for itself.
TILE, FEW = 8, 2
# A window without an end.
EVERYTHING = 1 << 40


# Rows of one sequence whose keys are turned together, so that they are neighbours where they go.
TURNED = 16


def _transposed(rows: list[Vector]) -> list[Vector]:
    """As many vectors as lanes: rows become columns. Blocks of 8 change places first, blocks of 1 last."""
    block = len(rows) // 2
    while block:
        first = [lane if not lane & block else len(rows) + (lane ^ block) for lane in range(len(rows))]
        second = [lane ^ block if not lane & block else len(rows) + lane for lane in range(len(rows))]
        turned = list(rows)
        for i in (i for i in range(len(rows)) if not i & block):
            turned[i] = rows[i].shuffle(rows[i | block], first)
            turned[i | block] = rows[i].shuffle(rows[i | block], second)
        rows, block = turned, block // 2
    return rows


def _float_operations(is_half: bool) -> tuple[Any, Any]:
    """put(x, place): 32 floats side by side. put_turned(x, stride, place): 32 floats of each of TURNED rows, `stride`
    bytes apart: each row to a position of its own, its floats as far apart as a page has positions."""

    def kept(vector: Vector) -> ir.Value:
        return (vector.to_half() if is_half else vector).value

    size = 2 if is_half else 4

    @operation(lambda *_: types.void)
    def put(e: Emitter, x: ir.Value, place: ir.Value) -> None:
        for i in range(0, 32, 16):
            e.store(kept(e.load(x, 4 * i, F32, 16)), place, size * i)

    @operation(lambda *_: types.void)
    def put_turned(e: Emitter, x: ir.Value, stride: ir.Value, place: ir.Value) -> None:
        for first in range(0, 32, TURNED):
            rows, row = [], x
            for _ in range(TURNED):
                rows.append(e.load(row, 4 * first, F32, TURNED))
                row = e.builder.add(row, stride)
            for i, vector in enumerate(_transposed(rows)):
                e.store(kept(vector), place, size * POSITIONS * (first + i))

    return put, put_turned


def append(cache_type: str) -> Kernel:
    """Put each row's key and value at its position."""
    is_f32, is_q8 = cache_type == "f32", cache_type == "q8_0"
    is_float = cache_type in ("f16", "f32")
    put, put_turned = _float_operations(is_half=not is_f32)

    @v.helper
    def put_block(x, count, place, four_apart, apart, scale_place):  # type: ignore[no-untyped-def]
        """`count` (up to 32) values of a block: four of them `apart` bytes from each other, and the next four
        `four_apart` bytes on. q4_0: byte i holds i and i + 16."""
        if is_float:
            for i in range(32):
                at = place + i // 4 * four_apart + i % 4 * apart
                value = v.load_f32(x + 4 * i) if i < count else v.float32(0.0)
                if is_f32:
                    v.store_f32(at, value)
                else:
                    v.store_f16(at, value)
            return
        largest = v.float32(0.0)
        signed = v.float32(0.0)
        for i in range(count):
            value = v.load_f32(x + 4 * i)
            if abs(value) > largest:
                largest = abs(value)
                signed = value
        scale = largest / v.float32(127.0) if is_q8 else signed / v.float32(-8.0)
        v.store_f16(scale_place, scale)
        inverse = v.float32(1.0) / scale if largest > v.float32(1e-30) else v.float32(0.0)
        for i in range(32 if is_q8 else 16):
            at = place + i // 4 * four_apart + i % 4 * apart
            value = v.load_f32(x + 4 * i) if i < count else v.float32(0.0)
            if is_q8:
                v.store_u8(at, v.round_to_int(value * inverse))
            else:
                high = v.load_f32(x + 4 * (i + 16)) if i + 16 < count else v.float32(0.0)
                a = min(max(v.round_to_int(value * inverse) + 8, 0), 15)
                b = min(max(v.round_to_int(high * inverse) + 8, 0), 15)
                v.store_u8(at, a + 16 * b)

    bits = R.KIND_BITS[cache_type]
    size = max(bits // 8, 1)
    key_apart = size * POSITIONS if is_float else 1

    def kernel(op, step, part):  # type: ignore[no-untyped-def]
        n_rows = v.load_i64(step + R.N_ROWS)
        parts = v.load_i64(step + R.STEP_PARTS)
        dim_k = v.load_i64(op + R.KV_DIM_K)
        dim_v = v.load_i64(op + R.KV_DIM_V)
        blocks_k = (dim_k + 31) // 32
        blocks_v = (dim_v + 31) // 32
        every = v.load_i64(op + R.KV_EVERY)
        tables = v.load_i64(step + R.PAGE_TABLES) + 8 * v.load_i64(op + R.KV_GROUP) * n_rows
        positions = v.load_i64(step + R.POSITIONS)
        end = first_row(n_rows, part + 1, parts)
        turned = 0  # rows before this one have put their keys there
        for row in range(first_row(n_rows, part, parts), end):
            position = v.load_i64(positions + 8 * row)
            if (position + 1) % every != 0:
                continue
            entry = position // every
            page = v.load_i64(v.load_i64(tables + 8 * row) + 8 * (entry // POSITIONS))
            slot = entry % POSITIONS
            if is_float and slot % TURNED == 0 and row + TURNED <= end and every == 1:
                last = row + TURNED - 1
                # Who writes a page has it alone: then what lies between is of the same sequence.
                consecutive = v.load_i64(positions + 8 * last) == position + TURNED - 1
                if consecutive and page == v.load_i64(v.load_i64(tables + 8 * last) + 8 * (entry // POSITIONS)):
                    turned = row + TURNED
            for head in range(v.load_i64(op + R.KV_HEADS)):
                k = v.load_i64(op + R.KV_K) + row * v.load_i64(op + R.KV_K_STRIDE) + 4 * head * dim_k
                keys = page + v.load_i64(op + R.KV_K_OFFSET) + head * v.load_i64(op + R.KV_K_HEAD_BYTES)
                scales = keys + blocks_k * 32 * POSITIONS * bits // 8
                for block in range(blocks_k):
                    place = keys + block * 32 * POSITIONS * bits // 8 + slot * (size if is_float else 4)
                    scale_place = scales + 2 * (block * POSITIONS + slot)
                    if is_float and row < turned and 32 * block + 32 <= dim_k:
                        if row + TURNED == turned:
                            put_turned(k + 128 * block, v.load_i64(op + R.KV_K_STRIDE), place)
                    else:
                        put_block(
                            k + 128 * block, min(32, dim_k - 32 * block), place, 4 * size * POSITIONS, key_apart,
                            scale_place,
                        )
                x = v.load_i64(op + R.KV_V) + row * v.load_i64(op + R.KV_V_STRIDE) + 4 * head * dim_v
                values = page + v.load_i64(op + R.KV_V_OFFSET) + head * v.load_i64(op + R.KV_V_HEAD_BYTES)
                scales = values + blocks_v * 32 * POSITIONS * bits // 8
                for block in range(blocks_v):
                    place = values + (slot * blocks_v + block) * 32 * bits // 8
                    scale_place = scales + 2 * (block * POSITIONS + slot)
                    if is_float and 32 * block + 32 <= dim_v:
                        put(x + 128 * block, place)
                    else:
                        put_block(x + 128 * block, min(32, dim_v - 32 * block), place, 4 * size, size, scale_place)

    return kernel


def vectors_beside(rows: int, most: int) -> int:
    """Vectors that a tile of `rows` rows has side by side: enough for sums to overlap, and to fit the registers: AVX2
    has 16, of which 12 can be sums."""
    registers = {16: 16, 8: 12}.get(v.target().lanes, 8)
    parts = most
    while parts > 1 and rows * parts > registers:
        parts //= 2
    return parts


def _registers_are_short(rows: int, parts: int) -> bool:
    """Whether AVX2 has, beside the sums of so large a tile, hardly any left."""
    return v.target().lanes == 8 and rows * parts > 8


def _score_dims(rows: int, parts: int) -> int:
    """Dimensions that the loop over them takes at a time: with more products in its body than this leaves, LLVM would
    load keys and queries ahead of them until it runs out of registers."""
    return 1 if _registers_are_short(rows, parts) else max(2, 32 >> (rows * parts - 1).bit_length())


def _add_products(
    e: Emitter, tile: list[Vector], rows: int, parts: int, vector: Callable[[int], Vector],
    number: Callable[[int], Vector],
) -> list[Vector]:  # fmt: skip
    """tile[row][part] + vector(part) * number(row). Where registers are short, of vectors and numbers those stay in
    them of which there are fewer."""
    tile, are_short = list(tile), _registers_are_short(rows, parts)

    def add(row: int, part: int, one: Vector, other: Vector) -> None:
        tile[parts * row + part] = one.fma(other, tile[parts * row + part])

    if are_short and parts > rows:
        numbers = [number(row) for row in range(rows)]
        for part in range(parts):
            e.fence()  # else LLVM would load the others before there are registers for them
            one = vector(part)
            for row in range(rows):
                add(row, part, one, numbers[row])
    else:
        vectors = [vector(part) for part in range(parts)]
        for row in range(rows):
            if are_short:
                e.fence()
            one = number(row)
            for part in range(parts):
                add(row, part, vectors[part], one)
    return tile


def score_floats(cache_type: str, rows: int) -> Any:
    """Scores of a page of keys that are floats: score_page(queries, keys, scales, blocks, scores, asked).

    queries: float32, a row each. blocks: of 32 dimensions. scores: [row][position]. asked: memory to be asked for.
    """
    parts = vectors_beside(rows, POSITIONS // v.target().lanes)
    dims, vectors, width = _score_dims(rows, parts), parts * rows, parts * v.target().lanes
    element, size = (F32, 4) if cache_type == "f32" else (F16, 2)
    asked_bytes = size * dims * width

    @operation(lambda tile, *_: tile)
    def score(e: Emitter, tile: list[Vector], queries: ir.Value, keys: ir.Value) -> list[Vector]:
        """tile += queries[row][d] . keys[d][`parts` vectors of positions], over a few dimensions."""
        for d in range(dims):
            e.fence()  # else LLVM would load the next dimension's queries before there are registers for them

            def key(part: int, d: int = d) -> Vector:
                loaded = e.load(keys, size * (d * POSITIONS + part * e.lanes), element, e.lanes)
                return loaded if element is F32 else loaded.to_float()

            def query(row: int, d: int = d) -> Vector:
                return e.broadcast_word(e.offset(queries, row * ROW), d, dims, F32)

            tile = _add_products(e, tile, rows, parts, key, query)
        return tile

    @v.helper
    def score_page(queries, keys, scales, blocks, scores, asked):  # type: ignore[no-untyped-def]
        for position in range(0, POSITIONS, width):
            tile = v.zero_tile(vectors)
            for first in range(0, 32 * blocks, dims):
                v.prefetch(asked, asked_bytes)
                asked += asked_bytes
                tile = score(tile, queries + 4 * first, keys + size * (first * POSITIONS + position))
            v.store_rows(tile, parts, scores + 4 * position, 4 * POSITIONS)

    return score_page


class _Keys(Rows):
    """A block of 32 dimensions of neighbouring quantised keys, read as the rows of a matrix are."""

    def __init__(self, e: Emitter, keys: ir.Value, scales: ir.Value) -> None:
        self.e, self.keys, self.scales = e, keys, scales

    def words(self, offset: int, count: int) -> list[Vector]:
        return [self.e.load(self.keys, 4 * POSITIONS * i, I32, self.e.lanes) for i in range(count)]

    def half(self, offset: int) -> Vector:
        return self.e.load(self.scales, 0, F16, self.e.lanes).to_float()


def score_quantised(cache_type: str, rows: int) -> Any:
    """Scores of a page of quantised keys, as those of `score_floats`. queries: a panel of `rows` packed columns."""
    spec = TYPES[cache_type.upper()]
    assert isinstance(spec, Quantised)
    lanes = v.target().lanes
    block_bytes, query_bytes = 32 * POSITIONS * R.KIND_BITS[cache_type] // 8, R.PACKED_BYTES * rows
    asked_bytes = block_bytes * lanes // POSITIONS

    @operation(lambda tile, *_: tile)
    def score(e: Emitter, tile: list[Vector], queries: ir.Value, keys: ir.Value, scales: ir.Value) -> list[Vector]:
        groups = list(spec.groups(_Keys(e, keys, scales)))
        return dot_quantised(e, spec, rows, groups, tile, queries)

    @v.helper
    def score_page(queries, keys, scales, blocks, scores, asked):  # type: ignore[no-untyped-def]
        for position in range(0, POSITIONS, lanes):
            tile = v.zero_tile(rows)
            for block in range(blocks):
                v.prefetch(asked, asked_bytes)
                asked += asked_bytes
                place = scales + 2 * (block * POSITIONS + position)
                tile = score(tile, queries + block * query_bytes, keys + block * block_bytes + 4 * position, place)
            v.store_rows(tile, 1, scores + 4 * position, 4 * POSITIONS)

    return score_page


class KeysInRows:
    """Products of queries, which are float32, and keys that are laid out as values: [row][key], lane by lane.

    rows: of queries. together: keys that are multiplied at a time, so that they share what is loaded of queries.
    """

    def __init__(self, cache_type: str, rows: int) -> None:
        self.cache_type, self.rows = cache_type, rows
        self.together = max((16 if v.target().lanes == 16 else 8) // rows, 1)
        while POSITIONS % self.together:
            self.together -= 1
        self.vectors = self.together * rows

    def add_block(
        self, e: Emitter, tile: list[Vector], queries: ir.Value, keys: list[ir.Value], scales: list[ir.Value],
        first: ir.Value,
    ) -> list[Vector]:  # fmt: skip
        """tile[row][key] += queries[row][d] * key[d] over the block of 32 dimensions that begins with `first`. keys,
        scales: where each key lies, and its scale of the block."""
        quantised = R.KIND_BITS[self.cache_type] < 16
        b, block = e.builder, list(tile)
        place = b.add(queries, b.shl(first, ir.Constant(I64, 2)))
        for i in range(0, 32, e.lanes):
            e.fence()
            at = e.offset(first, i)
            for number, key_place in enumerate(keys):
                key = value_vector(e, self.cache_type, key_place, at)
                for row in range(self.rows):
                    query, index = e.load(place, row * ROW + 4 * i, F32, e.lanes), row * self.together + number
                    block[index] = key * query if quantised and i == 0 else key.fma(query, block[index])
        if not quantised:
            return block
        for number, scale_place in enumerate(scales):
            scale = e.broadcast(scale_place, 0, F16).to_float()
            for row in range(self.rows):
                index = row * self.together + number
                block[index] = block[index].fma(scale, tile[index])
        return block

    def finish(self) -> Any:
        """finish(tile, scores): the sums of all lanes to [row][POSITIONS]."""

        @operation(lambda *_: types.void)
        def finish(e: Emitter, tile: list[Vector], scores: ir.Value) -> None:
            for index, vector in enumerate(tile):
                row, number = divmod(index, self.together)
                e.store(vector.reduce("add"), scores, 4 * (row * POSITIONS + number))

        return finish


def _score_rows(cache_type: str, rows: int) -> Any:
    """Scores of a page of keys that are laid out as values, as those of `score_floats`. queries: float32."""
    bits, products = R.KIND_BITS[cache_type], KeysInRows(cache_type, rows)
    together, vectors, finish = products.together, products.vectors, products.finish()

    @operation(lambda tile, *_: tile)
    def score(
        e: Emitter, tile: list[Vector], queries: ir.Value, keys: ir.Value, scales: ir.Value, apart: ir.Value,
        first: ir.Value,
    ) -> list[Vector]:  # fmt: skip
        b = e.builder
        places = [b.add(keys, b.mul(apart, ir.Constant(I64, position))) for position in range(together)]
        scale_places = [b.add(scales, ir.Constant(I64, 2 * position)) for position in range(together)]
        return products.add_block(e, tile, queries, places, scale_places, first)

    @v.helper
    def score_page(queries, keys, scales, blocks, scores, asked):  # type: ignore[no-untyped-def]
        apart = blocks * 32 * bits // 8
        for position in range(0, POSITIONS, together):
            tile = v.zero_tile(vectors)
            for block in range(blocks):
                place = scales + 2 * (block * POSITIONS + position)
                tile = score(tile, queries, keys + position * apart, place, apart, 32 * block)
            finish(tile, scores + 4 * position)

    return score_page


def mix_operation(cache_type: str, rows: int, parts: int) -> Any:
    """tile += weights[row] of one position * `parts` vectors of its value, from dimension `first` on."""

    @operation(lambda tile, *_: tile)
    def mix(e: Emitter, tile: list[Vector], weights: ir.Value, values: ir.Value, first: ir.Value) -> list[Vector]:
        def value(part: int) -> Vector:
            return value_vector(e, cache_type, values, e.offset(first, e.lanes * part))

        def weight(row: int) -> Vector:
            return e.broadcast(weights, row * 4 * POSITIONS, F32)

        return _add_products(e, tile, rows, parts, value, weight)

    return mix


def value_vector(e: Emitter, cache_type: str, values: ir.Value, first: ir.Value) -> Vector:
    """One position's value from dimension `first` on, one vector of it, as float32, without its scale."""
    b = e.builder
    if cache_type == "f32":
        return e.load(b.add(values, b.shl(first, ir.Constant(I64, 2))), 0, F32, e.lanes)
    if cache_type == "f16":
        return e.load(b.add(values, b.shl(first, ir.Constant(I64, 1))), 0, F16, e.lanes).to_float()
    if cache_type == "q8_0":
        return e.load(b.add(values, first), 0, I8, e.lanes).widen_signed(I32).to_float()
    block, inside = b.lshr(first, ir.Constant(I64, 5)), b.and_(first, ir.Constant(I64, 15))
    place = b.add(values, b.add(b.shl(block, ir.Constant(I64, 4)), inside))
    four_in_the_upper_half = b.trunc(b.lshr(b.and_(first, ir.Constant(I64, 16)), ir.Constant(I64, 2)), I32)
    both = e.load(place, 0, I8, e.lanes).widen_unsigned(I32)
    return (((both >> e.splat(four_in_the_upper_half)) & 15) - 8).to_float()


def weighing() -> Any:
    """weigh(scores, largest, state, sums, dims): in the place of a page's scores, of which the largest is given, the
    exponentials of what they are below the largest so far. state: float32, the largest so far and the sum of
    exponentials; that sum and those of values, `dims` of them, fade where there is a larger one now."""
    lanes = v.target().lanes

    @v.helper
    def weigh(scores, largest, state, sums, dims):  # type: ignore[no-untyped-def]
        old = v.load_f32(state)
        new = max(old, largest)
        total = v.splat(v.float32(0.0))
        for i in range(0, POSITIONS, lanes):
            value = v.falling_exp(v.load(scores + 4 * i) - v.splat(new))
            total = total + value
            v.store(scores + 4 * i, value)
        kept = v.load_f32(state + 4)
        if old < new:  # else what there is would fade by 1
            fading = v.falling_exp(v.splat(old - new))
            kept *= v.first_lane(fading)
            for i in range(0, dims, lanes):
                v.store(sums + 4 * i, v.load(sums + 4 * i) * fading)
        v.store_f32(state, new)
        v.store_f32(state + 4, kept + v.sum_lanes(total))

    return weigh


def attention(variant: str) -> Kernel:
    """softmax(scale * q . k) . v over the positions that each row may see. The variant: cache type, heads together, and
    "rows" where keys are laid out as values, and values are the first dimensions of them; then also "entries" where a
    second cache has one entry for every so many positions, which all count from the last of these on.

    A head may have a sink, a score that takes its part of the weights and gives nothing (Xiao et al., "Efficient
    Streaming Language Models with Attention Sinks", 2023: here learned, as in gpt-oss), and a slope, by which scores
    fall with the distance (Press et al., "Train Short, Test Long", 2021: ALiBi), or a bias for each distance.

    A single row is taken with several query heads that share a key and value head, so that those are read less often.
    So are several rows of a sequence where keys and values are floats and lie apart (`kernels.query_lanes`); elsewhere
    they are taken head by head.
    """
    cache_type, together_text, *layout = variant.split("-")
    together, in_rows, with_entries = int(together_text), "rows" in layout, "entries" in layout
    n_caches = 2 if with_entries else 1
    lanes = v.target().lanes
    bits = R.KIND_BITS[cache_type]
    of_queries = bits >= 16 and not in_rows  # whether a lane can be a query
    weigh = weighing()

    def tile_function(rows: int, of_heads: bool) -> Any:
        quantised = bits < 16
        packs = quantised and not in_rows
        if in_rows:
            score_page = _score_rows(cache_type, rows)
        else:
            score_page = score_quantised(cache_type, rows) if quantised else score_floats(cache_type, rows)
        mix_parts = vectors_beside(rows, 32 // lanes)
        mix = mix_operation(cache_type, rows, mix_parts)
        mix_vectors, mix_width = mix_parts * rows, mix_parts * lanes
        mixed_bytes = mix_width * bits // 8
        row_bytes, score_bytes = rows * ROW, rows * 4 * POSITIONS
        state_bytes = max(64, 8 * rows)
        page_bytes = 4 * POSITIONS
        packed_bytes = rows * R.PACKED_BYTES * R.MAX_HEAD_DIM // 32
        n = rows

        @v.helper
        def compute(op, step, first_row, count, first_position, end, head):  # type: ignore[no-untyped-def]
            """Rows first_row .. of one head; or one row's heads from `head` on. end: of the positions there are."""
            queries = v.scratch(row_bytes)
            packed = v.scratch(packed_bytes)
            sums = v.scratch(row_bytes)
            scores = v.scratch(score_bytes)
            scaled = v.scratch(score_bytes)
            state = v.scratch(state_bytes)  # for each row: the maximum so far, the sum of exponentials so far
            numbers = v.scratch(page_bytes)  # 0, 1, 2 ... as floats
            if v.load_i64(op + R.ATT_SLOPES) != 0:
                for i in range(POSITIONS):
                    v.store_f32(numbers + 4 * i, v.as_float(i))
            dim_k = v.load_i64(op + R.ATT_DIM_K)
            dim_v = v.load_i64(op + R.ATT_DIM_V)
            blocks_k = (dim_k + 31) // 32
            blocks_v = (dim_v + 31) // 32
            row_blocks = blocks_k if in_rows else blocks_v
            scale = v.load_f32(op + R.ATT_SCALE)
            cap = v.load_f32(op + R.ATT_SOFTCAP)
            window = v.load_i64(op + R.ATT_WINDOW)
            sinks = v.load_i64(op + R.ATT_SINKS)
            slopes = v.load_i64(op + R.ATT_SLOPES)
            biases = v.load_i64(op + R.ATT_BIASES)
            reach = v.load_i64(op + R.ATT_REACH)
            placed = slopes != 0 or biases != 0
            kv_head = head * v.load_i64(op + R.ATT_KV_HEADS) // v.load_i64(op + R.ATT_HEADS)
            query_stride = 4 * dim_k if of_heads else v.load_i64(op + R.ATT_Q_STRIDE)
            out_stride = 4 * dim_v if of_heads else v.load_i64(op + R.ATT_OUT_STRIDE)
            query = v.load_i64(op + R.ATT_Q) + first_row * v.load_i64(op + R.ATT_Q_STRIDE) + 4 * head * dim_k
            out = v.load_i64(op + R.ATT_OUT) + first_row * v.load_i64(op + R.ATT_OUT_STRIDE) + 4 * head * dim_v
            for row in range(n):
                for i in range(blocks_k * 32):
                    value = v.float32(0.0)
                    if row < count and i < dim_k:
                        value = v.load_f32(query + row * query_stride + 4 * i)
                        if of_queries:
                            value *= scale
                    v.store_f32(queries + row * ROW + 4 * i, value)
                if packs:
                    pack_quantised(queries + row * ROW, blocks_k * 32, packed, row, n)
                for i in range(blocks_v * 32):
                    v.store_f32(sums + row * ROW + 4 * i, v.float32(0.0))
                v.store_f32(state + 8 * row, v.float32(-1e30))
                v.store_f32(state + 8 * row + 4, v.float32(0.0))
                if sinks != 0:  # as if a position of that score had been seen
                    v.store_f32(state + 8 * row, v.load_f32(sinks + 4 * (head + (row if of_heads else 0))))
                    v.store_f32(state + 8 * row + 4, v.float32(1.0))
            tables = v.load_i64(step + R.PAGE_TABLES) + 8 * first_row
            n_rows = v.load_i64(step + R.N_ROWS)
            ahead = v.load_i64(op + R.ATT_AHEAD)
            last_position = min((first_position if of_heads else first_position + count - 1) + ahead, end - 1)
            chunked = v.load_i64(op + R.ATT_CHUNKED) != 0
            lowest = first_position // window * window if chunked else max(first_position - window + 1, 0)
            group, k_offset, every = v.load_i64(op + R.ATT_GROUP), v.load_i64(op + R.ATT_K_OFFSET), 1
            for _ in range(n_caches):
                # From here on, positions are those of entries.
                table = v.load_i64(tables + 8 * group * n_rows)
                last = (last_position + 1) // every - 1
                for page_index in range(lowest // POSITIONS, last // POSITIONS + 1):
                    page = v.load_i64(table + 8 * page_index)
                    page_position = page_index * POSITIONS
                    keys = page + k_offset + kv_head * v.load_i64(op + R.ATT_K_HEAD_BYTES)
                    values = page + v.load_i64(op + R.ATT_V_OFFSET) + kv_head * v.load_i64(op + R.ATT_V_HEAD_BYTES)
                    if in_rows:
                        values = keys
                    key_scales = keys + blocks_k * 32 * POSITIONS * bits // 8
                    value_scales = values + row_blocks * 32 * POSITIONS * bits // 8
                    # Values are asked for during scores, and the next page's keys during the mix.
                    score_page(packed if packs else queries, keys, key_scales, blocks_k, scores, values)
                    for row in range(n):
                        place = scores + row * 4 * POSITIONS
                        position = first_position + (0 if of_heads else row)
                        own = (position + 1) // every - 1 - page_position
                        highest = min(own + ahead, end - 1 - page_position)
                        seen = window
                        if chunked:  # as far back as its chunk begins
                            seen = (page_position + own) % window + 1
                        after = v.splat_int(highest + 1)
                        before = v.splat_int(max(own - seen, -1))
                        some_hidden = highest < POSITIONS - 1 or own >= seen
                        this_head = head + (row if of_heads else 0)
                        slope, bias = v.float32(0.0), 0
                        if slopes != 0:
                            slope = v.load_f32(slopes + 4 * this_head)
                        if biases != 0:  # of the page's first position; the others lie behind it
                            distance = min(max(page_position - position, -reach - POSITIONS), reach)
                            bias = biases + 4 * (this_head * 2 * (reach + POSITIONS) + distance + reach + POSITIONS)
                        largest = v.splat(v.float32(-1e30))
                        for i in range(0, POSITIONS, lanes):
                            value = v.load(place + 4 * i)
                            if not of_queries:
                                value = value * v.splat(scale)
                            if cap > v.float32(0.0):
                                value = v.splat(cap) * v.tanh(value / v.splat(cap))
                            if placed:
                                if biases != 0:
                                    value = value + v.load(bias + 4 * i)
                                else:
                                    away = v.splat(v.as_float(own)) - v.load(numbers + 4 * i)
                                    away = v.maximum(away, v.splat(v.float32(0.0)) - away)
                                    value = v.fma(v.splat(-slope), away, value)
                            if some_hidden:
                                number = v.lane_numbers() + v.splat_int(i)
                                value = v.choose(number < after, value, v.splat(v.float32(HIDDEN)))
                                value = v.choose(before < number, value, v.splat(v.float32(HIDDEN)))
                            largest = v.maximum(largest, value)
                            v.store(place + 4 * i, value)
                        weigh(place, v.max_lanes(largest), state + 8 * row, sums + row * ROW, blocks_v * 32)
                    visible = min(POSITIONS, last - page_position + 1)
                    next_page = v.load_i64(table + 8 * min(page_index + 1, last // POSITIONS))
                    asked = next_page + (keys - page)
                    weights = scaled if quantised else scores
                    for first in range(0, blocks_v * 32, mix_width):
                        if quantised and first % 32 == 0:
                            for i in range(0, POSITIONS, lanes):
                                factor = v.load_halves(value_scales + 2 * (first // 32 * POSITIONS + i))
                                for place in range(4 * i, score_bytes, 4 * POSITIONS):
                                    v.store(scaled + place, v.load(scores + place) * factor)
                        tile = v.load_rows(mix_vectors, mix_parts, sums + 4 * first, ROW)
                        for position in range(visible):
                            value = values + position * row_blocks * 32 * bits // 8
                            v.prefetch(asked, mixed_bytes)
                            asked += mixed_bytes
                            tile = mix(tile, weights + 4 * position, value, first)
                        v.store_rows(tile, mix_parts, sums + 4 * first, ROW)
                if with_entries:
                    group, every = v.load_i64(op + R.ATT_ENTRIES_GROUP), v.load_i64(op + R.ATT_ENTRIES_EVERY)
                    k_offset, window, lowest = v.load_i64(op + R.ATT_ENTRIES_OFFSET), EVERYTHING, 0
            for row in range(count):
                total = v.load_f32(state + 8 * row + 4)
                for i in range(dim_v):
                    v.store_f32(out + row * out_stride + 4 * i, v.load_f32(sums + row * ROW + 4 * i) / total)

        return compute

    single = tile_function(together, True)
    if of_queries:
        several, heads_at_once = query_lanes(cache_type, together)

        @v.helper
        def compute(op, step, first_row, count, position, end, head):  # type: ignore[no-untyped-def]
            if head % together != 0:
                return
            if count <= FEW:
                for row in range(count):
                    single(op, step, first_row + row, together, position + row, end, head)
                return
            most = heads_at_once(op)
            for first in range(0, together, most):
                several(op, step, first_row, count, position, end, head + first, min(most, together - first))

    else:
        several = tile_function(TILE, False)

        @v.helper
        def compute(op, step, first_row, count, position, end, head):  # type: ignore[no-untyped-def]
            if count == 1:
                if head % together == 0:
                    single(op, step, first_row, together, position, end, head)
                return
            for row in range(0, count, TILE):
                several(op, step, first_row + row, min(count - row, TILE), position + row, end, head)

    def kernel(op, step, thread):  # type: ignore[no-untyped-def]
        heads = v.load_i64(op + R.ATT_HEADS)
        tiles = v.load_i64(step + R.TILES)
        units = v.load_i64(step + R.N_TILES) * heads
        while more_wanted(step, thread):
            unit = claim(op, units)
            if unit >= units:
                return
            # The last tiles see the most positions: they go first, so that threads finish together.
            tile = tiles + (units - 1 - unit) // heads * R.TILE_BYTES
            head = unit % heads
            first_row = v.load_i64(tile + R.TILE_FIRST_ROW)
            position = v.load_i64(tile + R.TILE_FIRST_POSITION)
            count = min(v.load_i64(tile + R.TILE_ROWS), v.load_i64(op + R.ATT_BEFORE) - position)
            end = v.load_i64(tile + v.load_i64(op + R.ATT_OF_TILE))
            compute(op, step, first_row, count, position, end, head)

    return kernel
