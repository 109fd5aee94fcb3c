"""Attention to chosen positions of a long context (`models.graph.Index`): DeepSeek V3.2's lightning indexer
(arXiv:2512.02556) and its relatives.

An index has a key for each position, or for several, in a cache of its own. Every row scores all of them, chooses the
best, and attends to those: what attention costs grows with their number then, and not with the context.

A row's scores, and its sums, are added in an order that depends on the row alone, as in `kernels.attention`: by heads
and dimensions; and over the chosen positions as they rise, 64 at a time. So its bits do not depend on which rows it is
computed with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from qrun.engine.kernels import records as R
from qrun.engine.kernels.attention import (
    POSITIONS,
    ROW,
    KeysInRows,
    mix_operation,
    score_floats,
    score_quantised,
    vectors_beside,
    weighing,
)
from qrun.engine.kernels.columns import pack_quantised
from qrun.engine.kernels.team import claim, more_wanted
from qrun.engine.simd import operations as v
from qrun.engine.simd.operations import operation
from qrun.engine.simd.vector import F16, I64, Emitter, Vector

Kernel = Callable[[int, int, int], None]

# Pages of keys that are scored for one row at a time: they stay in the second-level cache while its heads take turns.
PAGES = 16
# Scores of what is always chosen, and of what never is.
ALWAYS, NEVER = 3e38, -3.4e38
# Rows from which on a thread takes all heads of one.
MANY_ROWS = 32


def _score_pages(variant: str) -> Any:
    """score_pages(op, row, table, first_page, end_page, scores): a row's scores of all keys in some pages. The variant:
    what keys are kept as, and how many heads are taken together."""
    cache_type, rows_text = variant.split("-")
    rows, lanes = int(rows_text), v.target().lanes
    score_page = score_floats(cache_type, rows)
    query_bytes, product_bytes = rows * ROW, rows * 4 * POSITIONS

    @v.helper
    def score_pages(op, row, table, first_page, end_page, scores):  # type: ignore[no-untyped-def]
        queries = v.scratch(query_bytes)
        products = v.scratch(product_bytes)
        dim = v.load_i64(op + R.IDX_DIM)
        blocks = (dim + 31) // 32
        heads = v.load_i64(op + R.IDX_HEADS)
        groups = v.load_i64(op + R.IDX_GROUPS)
        group_bytes = v.load_i64(op + R.IDX_GROUP_BYTES)
        keys_offset = v.load_i64(op + R.IDX_KEYS)
        clipped = v.load_i64(op + R.IDX_CLIPPED) != 0
        weights = v.load_i64(op + R.IDX_WEIGHTS)
        weights += row * v.load_i64(op + R.IDX_WEIGHTS_STRIDE)
        q = v.load_i64(op + R.IDX_Q) + row * v.load_i64(op + R.IDX_Q_STRIDE)
        for group in range(groups):
            for i in range(first_page * POSITIONS, end_page * POSITIONS, lanes):
                v.store(scores + group * group_bytes + 4 * i, v.splat(v.float32(0.0)))
        for first in range(0, heads, rows):
            count = min(rows, heads - first)
            for r in range(rows):
                for i in range(32 * blocks):
                    value = v.float32(0.0)
                    if r < count and i < dim:
                        value = v.load_f32(q + 4 * ((first + r) * dim + i))
                    v.store_f32(queries + r * ROW + 4 * i, value)
            for page in range(first_page, end_page):
                keys = v.load_i64(table + 8 * page) + keys_offset
                following = v.load_i64(table + 8 * min(page + 1, end_page - 1)) + keys_offset
                score_page(queries, keys, keys, blocks, products, following)
                for r in range(count):
                    head = first + r
                    weight = v.float32(1.0)
                    if v.load_i64(op + R.IDX_WEIGHTS) != 0:
                        weight = v.load_f32(weights + 4 * head)
                    place = scores + head * groups // heads * group_bytes + 4 * page * POSITIONS
                    for i in range(0, POSITIONS, lanes):
                        value = v.load(products + 4 * (r * POSITIONS + i))
                        if clipped:
                            value = v.maximum(value, v.splat(v.float32(0.0)))
                        v.store(place + 4 * i, v.fma(value, v.splat(weight), v.load(place + 4 * i)))

    return score_pages


@v.helper
def _table_of(op, step, row):  # type: ignore[no-untyped-def]
    """The pages of an index, for a row."""
    n_rows = v.load_i64(step + R.N_ROWS)
    tables = v.load_i64(step + R.PAGE_TABLES) + 8 * v.load_i64(op + R.IDX_PAGES) * n_rows
    return v.load_i64(tables + 8 * row)


@v.helper
def _position_of(step, row):  # type: ignore[no-untyped-def]
    return v.load_i64(v.load_i64(step + R.POSITIONS) + 8 * row)


def index_scores(variant: str) -> Kernel:
    """The scores of a step of few rows: all threads have a part of each."""
    score_pages = _score_pages(variant)

    def kernel(op, step, thread):  # type: ignore[no-untyped-def]
        n_rows = v.load_i64(step + R.N_ROWS)
        if n_rows > R.INDEXED_ROWS:
            return
        row_bytes = v.load_i64(op + R.IDX_GROUPS) * v.load_i64(op + R.IDX_GROUP_BYTES)
        every = v.load_i64(op + R.IDX_EVERY)
        longest = 0
        for row in range(n_rows):
            longest = max(longest, (_position_of(step, row) + 1) // every)
        parts = (longest + PAGES * POSITIONS - 1) // (PAGES * POSITIONS)
        while more_wanted(step, thread):
            unit = claim(op, n_rows * parts)
            if unit >= n_rows * parts:
                return
            row, first = unit // parts, unit % parts * PAGES
            position = _position_of(step, row)
            end = ((position + 1) // every + POSITIONS - 1) // POSITIONS
            if position >= v.load_i64(op + R.IDX_START) and first < end:
                scores = v.load_i64(op + R.IDX_SCORES) + row * row_bytes
                score_pages(op, row, _table_of(op, step, row), first, min(first + PAGES, end), scores)

    return kernel


def index_choose(variant: str) -> Kernel:
    """What each row attends to. Of a step of many rows, each thread makes the scores of one row first."""
    score_pages = _score_pages(variant)
    lanes = v.target().lanes

    @v.helper
    def at_least(scores, n, limit):  # type: ignore[no-untyped-def]
        """How many of n scores, a multiple of the lanes, are not less than this."""
        found = v.splat(v.float32(0.0))
        for i in range(0, n, lanes):
            less = v.load(scores + 4 * i) < v.splat(limit)
            found = found + v.choose(less, v.splat(v.float32(0.0)), v.splat(v.float32(1.0)))
        return v.round_to_int(v.sum_lanes(found))

    @v.helper
    def as_float_bits(place, number):  # type: ignore[no-untyped-def]
        """The float32 of a number from `rising`."""
        v.store_i32(place, number if number >= 0 else number ^ 0x7FFFFFFF)
        return v.load_f32(place)

    @v.helper
    def rising(place, value):  # type: ignore[no-untyped-def]
        """A whole number for a float32, which rises as it does."""
        v.store_f32(place, value)
        number = v.load_i32(place)
        return number if number >= 0 else number ^ 0x7FFFFFFF

    @v.helper
    def choose_best(op, scores, n, position, out):  # type: ignore[no-untyped-def]
        """From n scores of a row at a position to what is chosen. Scores are spoilt."""
        place = v.scratch(64)
        every = v.load_i64(op + R.IDX_EVERY)
        block = v.load_i64(op + R.IDX_BLOCK)
        budget = v.load_i64(op + R.IDX_BUDGET)
        of_entries = v.load_i64(op + R.IDX_OF_ENTRIES) != 0
        units = (n + block - 1) // block
        if block > 1:
            for unit in range(units):
                best = v.load_f32(scores + 4 * unit * block)
                for i in range(unit * block + 1, min((unit + 1) * block, n)):
                    best = max(best, v.load_f32(scores + 4 * i))
                v.store_f32(scores + 4 * unit, best)
        for unit in range(max(units - v.load_i64(op + R.IDX_LOCAL), 0), units):
            v.store_f32(scores + 4 * unit, v.float32(ALWAYS))
        whole = (units + lanes - 1) // lanes * lanes
        for unit in range(units, whole):
            v.store_f32(scores + 4 * unit, v.float32(NEVER))
        # The least score that is chosen, by halving. `low` is one that as many as wanted, or more, are not less than.
        largest = v.load(scores)
        smallest = v.splat(v.float32(0.0)) - largest
        for i in range(lanes, whole, lanes):
            largest = v.maximum(largest, v.load(scores + 4 * i))
            smallest = v.maximum(smallest, v.splat(v.float32(0.0)) - v.load(scores + 4 * i))
        high = rising(place, v.max_lanes(largest))
        low = rising(place, v.float32(0.0) - v.max_lanes(smallest))
        while low < high:
            middle = low + (high - low + 1) // 2
            found = at_least(scores, whole, as_float_bits(place, middle))
            if found < budget:
                high = middle - 1
            else:
                low = middle
                if found == budget:
                    high = low
        limit = as_float_bits(place, low)
        # Of those that are equal to it, the first ones.
        equal = budget
        for unit in range(units):
            if v.load_f32(scores + 4 * unit) > limit:
                equal -= 1
        size = block if of_entries else block * every
        end = n if of_entries else n * every
        count, left = 0, budget
        for unit in range(units):
            value = v.load_f32(scores + 4 * unit)
            if value >= limit and left > 0:
                if value == limit:
                    equal -= 1
                if value > limit or equal >= 0:
                    left -= 1
                    for i in range(unit * size, min((unit + 1) * size, end)):
                        count += 1
                        v.store_i32(out + 4 * count, i)
        if not of_entries:
            for i in range(end, position + 1):
                count += 1
                v.store_i32(out + 4 * count, i)
        v.store_i32(out, count)

    def kernel(op, step, thread):  # type: ignore[no-untyped-def]
        n_rows = v.load_i64(step + R.N_ROWS)
        groups = v.load_i64(op + R.IDX_GROUPS)
        group_bytes = v.load_i64(op + R.IDX_GROUP_BYTES)
        while more_wanted(step, thread):
            row = claim(op, n_rows)
            if row >= n_rows:
                return
            position = _position_of(step, row)
            if position >= v.load_i64(op + R.IDX_START):
                n = (position + 1) // v.load_i64(op + R.IDX_EVERY)
                few = n_rows <= R.INDEXED_ROWS
                scores = v.load_i64(op + R.IDX_SCORES) + (row if few else thread) * groups * group_bytes
                if not few:
                    table = _table_of(op, step, row)
                    end = (n + POSITIONS - 1) // POSITIONS
                    for first in range(0, end, PAGES):
                        score_pages(op, row, table, first, min(first + PAGES, end), scores)
                out = v.load_i64(op + R.IDX_CHOSEN) + row * v.load_i64(op + R.IDX_CHOSEN_STRIDE)
                for group in range(groups):
                    place = out + group * v.load_i64(op + R.IDX_CHOSEN_GROUP)
                    choose_best(op, scores + group * group_bytes, n, position, place)

    return kernel


@operation(lambda address: types.float32)
def load_f16(e: Emitter, address: ir.Value) -> ir.Value:
    return e.vector(e.builder.load(e.pointer(address, 0, ir.VectorType(F16, 1)), align=1)).to_float().lane(0)


def _score_chosen(cache_type: str, rows: int) -> Any:
    """Scores of keys that are laid out as values: score(queries, places, scales, blocks, scores, count). places: where
    each key lies, as many as POSITIONS; scales: where its scales do. scores: [row][key]."""
    products = KeysInRows(cache_type, rows)
    together, vectors, finish = products.together, products.vectors, products.finish()

    @operation(lambda tile, *_: tile)
    def add_block(
        e: Emitter, tile: list[Vector], queries: ir.Value, places: ir.Value, scales: ir.Value, first: ir.Value
    ) -> list[Vector]:
        b = e.builder
        scale_offset = b.mul(b.lshr(first, ir.Constant(I64, 5)), ir.Constant(I64, 2 * POSITIONS))
        keys = [e.load_scalar(places, 8 * number, I64) for number in range(together)]
        scale_places = [b.add(e.load_scalar(scales, 8 * number, I64), scale_offset) for number in range(together)]
        return products.add_block(e, tile, queries, keys, scale_places, first)

    @v.helper
    def score(queries, places, scales, blocks, scores, count):  # type: ignore[no-untyped-def]
        for number in range(0, count, together):
            tile = v.zero_tile(vectors)
            for block in range(blocks):
                tile = add_block(tile, queries, places + 8 * number, scales + 8 * number, 32 * block)
            finish(tile, scores + 4 * number)

    return score


def sparse_attention(variant: str) -> Kernel:
    """softmax(scale * q . k) . v over what is chosen for each row. The variant: as that of `kernels.attention`. With
    "entries", what is chosen are entries, beside the single positions that a window has."""
    cache_type, rows_text, *layout = variant.split("-")
    n, in_rows, with_entries = int(rows_text), "rows" in layout, "entries" in layout
    lanes, bits = v.target().lanes, R.KIND_BITS[cache_type]
    quantised = bits < 16
    packs = quantised and not in_rows
    if in_rows:
        score_chosen = score_page = _score_chosen(cache_type, n)
    else:
        score_page = score_chosen = score_quantised(cache_type, n) if quantised else score_floats(cache_type, n)
    weigh = weighing()
    mix_parts = vectors_beside(n, 32 // lanes)
    mix = mix_operation(cache_type, n, mix_parts)
    mix_vectors, mix_width = mix_parts * n, mix_parts * lanes
    row_bytes, score_bytes, state_bytes = n * ROW, n * 4 * POSITIONS, max(64, 8 * n)
    places_bytes, packed_bytes = 8 * POSITIONS, n * R.PACKED_BYTES * R.MAX_HEAD_DIM // 32
    n_caches = 2 if with_entries else 1

    @v.helper
    def compute(op, step, row, position, head):  # type: ignore[no-untyped-def]
        """A row's heads from `head` on, which share a key and value head."""
        queries = v.scratch(row_bytes)
        packed = v.scratch(packed_bytes)
        sums = v.scratch(row_bytes)
        page_scores = v.scratch(score_bytes)  # of all positions of a page
        scores = v.scratch(score_bytes)
        scaled = v.scratch(score_bytes)
        state = v.scratch(state_bytes)  # for each head: the maximum so far, the sum of exponentials so far
        keys = v.scratch(places_bytes)  # where each position's key lies, where keys are laid out as values
        values = v.scratch(places_bytes)
        scales = v.scratch(places_bytes)  # of values
        dim_k = v.load_i64(op + R.SPA_DIM_K)
        dim_v = v.load_i64(op + R.SPA_DIM_V)
        blocks_k = (dim_k + 31) // 32
        blocks_v = (dim_v + 31) // 32
        row_blocks = blocks_k if in_rows else blocks_v
        value_bytes = row_blocks * 32 * bits // 8
        scale = v.splat(v.load_f32(op + R.SPA_SCALE))
        sinks = v.load_i64(op + R.SPA_SINKS)
        kv_head = head * v.load_i64(op + R.SPA_KV_HEADS) // v.load_i64(op + R.SPA_HEADS)
        query = v.load_i64(op + R.SPA_Q) + row * v.load_i64(op + R.SPA_Q_STRIDE) + 4 * head * dim_k
        out = v.load_i64(op + R.SPA_OUT) + row * v.load_i64(op + R.SPA_OUT_STRIDE) + 4 * head * dim_v
        for r in range(n):
            for i in range(blocks_k * 32):
                value = v.float32(0.0)
                if i < dim_k:
                    value = v.load_f32(query + 4 * (r * dim_k + i))
                v.store_f32(queries + r * ROW + 4 * i, value)
            if packs:
                pack_quantised(queries + r * ROW, blocks_k * 32, packed, r, n)
            for i in range(blocks_v * 32):
                v.store_f32(sums + r * ROW + 4 * i, v.float32(0.0))
            v.store_f32(state + 8 * r, v.float32(-1e30))
            v.store_f32(state + 8 * r + 4, v.float32(0.0))
            if sinks != 0:  # as if a position of that score had been seen
                v.store_f32(state + 8 * r, v.load_f32(sinks + 4 * (head + r)))
                v.store_f32(state + 8 * r + 4, v.float32(1.0))
        n_rows = v.load_i64(step + R.N_ROWS)
        tables = v.load_i64(step + R.PAGE_TABLES) + 8 * row
        k_head = kv_head * v.load_i64(op + R.SPA_K_HEAD_BYTES)
        v_head = v.load_i64(op + R.SPA_V_OFFSET) + kv_head * v.load_i64(op + R.SPA_V_HEAD_BYTES)
        chosen = v.load_i64(op + R.SPA_CHOSEN) + row * v.load_i64(op + R.SPA_CHOSEN_STRIDE)
        chosen += kv_head * v.load_i64(op + R.SPA_CHOSEN_GROUP)
        for cache in range(n_caches):
            # With entries, first the window's positions, one after the other.
            in_window = with_entries and cache == 0
            group, k_offset = v.load_i64(op + R.SPA_GROUP), v.load_i64(op + R.SPA_K_OFFSET) + k_head
            first_seen, n_seen = 0, v.load_i32(chosen)
            if in_window:
                first_seen = max(position - v.load_i64(op + R.SPA_WINDOW) + 1, 0)
                n_seen = position + 1 - first_seen
            elif with_entries:
                group, k_offset = v.load_i64(op + R.SPA_ENTRIES_GROUP), v.load_i64(op + R.SPA_ENTRIES_OFFSET) + k_head
            table = v.load_i64(tables + 8 * group * n_rows)
            scored = -1  # the page whose scores there are
            for first in range(0, n_seen, POSITIONS):
                count = min(POSITIONS, n_seen - first)
                for i in range(POSITIONS):
                    # What fills up a vector of keys is the last one again.
                    number = first + min(i, count - 1)
                    at = first_seen + number if in_window else v.load_i32(chosen + 4 + 4 * number)
                    page = v.load_i64(table + 8 * (at // POSITIONS))
                    slot = at % POSITIONS
                    key = page + k_offset
                    value = key if in_rows else page + v_head
                    v.store_i64(values + 8 * i, value + slot * value_bytes)
                    v.store_i64(scales + 8 * i, value + value_bytes * POSITIONS + 2 * slot)
                    if in_rows:
                        v.store_i64(keys + 8 * i, key + slot * value_bytes)
                    elif i < count:
                        if at // POSITIONS != scored:
                            scored = at // POSITIONS
                            key_scales = key + blocks_k * 32 * POSITIONS * bits // 8
                            score_page(
                                packed if packs else queries, key, key_scales, blocks_k, page_scores, page + v_head
                            )
                        for r in range(n):
                            product = v.load_f32(page_scores + 4 * (r * POSITIONS + slot))
                            v.store_f32(scores + 4 * (r * POSITIONS + i), product)
                if in_rows:
                    score_chosen(queries, keys, scales, blocks_k, scores, count)
                for r in range(n):
                    place = scores + r * 4 * POSITIONS
                    largest = v.splat(v.float32(-1e30))
                    for i in range(0, POSITIONS, lanes):
                        seen = v.lane_numbers() + v.splat_int(i) < v.splat_int(count)
                        value = v.choose(seen, v.load(place + 4 * i) * scale, v.splat(v.float32(-1e30)))
                        largest = v.maximum(largest, value)
                        v.store(place + 4 * i, value)
                    weigh(place, v.max_lanes(largest), state + 8 * r, sums + r * ROW, blocks_v * 32)
                weights = scaled if quantised else scores
                for start in range(0, blocks_v * 32, mix_width):
                    if quantised and start % 32 == 0:
                        for i in range(count):
                            factor = load_f16(v.load_i64(scales + 8 * i) + start // 32 * 2 * POSITIONS)
                            for r in range(n):
                                weight = v.load_f32(scores + 4 * (r * POSITIONS + i))
                                v.store_f32(scaled + 4 * (r * POSITIONS + i), weight * factor)
                    tile = v.load_rows(mix_vectors, mix_parts, sums + 4 * start, ROW)
                    for i in range(count):
                        tile = mix(tile, weights + 4 * i, v.load_i64(values + 8 * i), start)
                    v.store_rows(tile, mix_parts, sums + 4 * start, ROW)
        for r in range(n):
            total = v.load_f32(state + 8 * r + 4)
            for i in range(dim_v):
                v.store_f32(out + 4 * (r * dim_v + i), v.load_f32(sums + r * ROW + 4 * i) / total)

    def kernel(op, step, thread):  # type: ignore[no-untyped-def]
        heads = v.load_i64(op + R.SPA_HEADS)
        n_rows = v.load_i64(step + R.N_ROWS)
        taken = heads if n_rows >= MANY_ROWS else n  # heads of a row at a time
        while more_wanted(step, thread):
            unit = claim(op, n_rows * (heads // taken))
            if unit >= n_rows * (heads // taken):
                return
            row, first = unit // (heads // taken), unit % (heads // taken) * taken
            position = _position_of(step, row)
            if position >= v.load_i64(op + R.SPA_START):
                for head in range(first, first + taken, n):
                    compute(op, step, row, position, head)

    return kernel
