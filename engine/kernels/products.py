"""What the kernels of all matrix products share: how rows are handed out, and how results come to their places."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir

from qrun.engine.kernels import records as R
from qrun.engine.kernels.team import claim, more_wanted
from qrun.engine.kernels.unpack import Group, Quantised, Rows
from qrun.engine.simd import operations as v
from qrun.engine.simd.vector import Emitter
from qrun.formats.dataclass import dataclass

# With few columns each lane has a run of rows, and this much of it is asked for ahead. Of what a plain loop over memory
# reads with two threads (Zen 4), a column of Q8_0, Q4_K and Q6_K gets 0.84, 0.85 and 0.83 with neighbouring rows, the
# next of which are asked for; with runs and 512 bytes 0.96, 0.93 and 0.90, with 1024 bytes 1.02, 1.00 and 0.91, with
# 1536 bytes 1.01, 1.01 and 0.94; 2048 bytes are no better.
AHEAD_BYTES = 1536

# With many columns, chunks of rows are so small that there are so many for each part of a step: eight for a thread.
CHUNKS_A_PART = 2


def neighbouring_lines(e: Emitter, ahead: ir.Value, block_bytes: int) -> list[ir.Value]:
    """The cache lines from `ahead` on that are as much as a block of each row."""
    return [e.offset(ahead, offset) for offset in range(0, e.lanes * block_bytes, 64)]


def lines_of_runs(e: Emitter, ahead: ir.Value, stride: ir.Value, block_bytes: int) -> list[ir.Value]:
    """The cache lines of a block of each lane's row; of `1 / turns_of` of the lanes where blocks are short."""
    rows = Rows(e, ahead, stride).addresses[: e.lanes // turns_of(block_bytes)]
    return [e.offset(row, offset) for offset in range(0, block_bytes, 64) for row in rows]


def turns_of(block_bytes: int) -> int:
    """Lanes ask for memory by turns, so that none skips a line and few ask twice for one."""
    return 4 if block_bytes <= 16 else 2 if block_bytes <= 32 else 1


def groups_of(
    e: Emitter, spec: Quantised, address: ir.Value, stride: ir.Value, lines: list[ir.Value]
) -> Iterator[Group]:
    """The groups of a block of each row. The lines are asked for meanwhile: at once, a block of 256 weights of each row
    is more lines than a core can wait for, and loads that miss the first level would queue behind them."""
    share = -(-len(lines) * 32 // spec.block_size)
    for index, group in enumerate(spec.groups(Rows(e, address, stride))):
        for line in lines[share * index : share * (index + 1)]:
            e.prefetch(line)
        e.fence()
        yield group


def writers() -> tuple[Any, Any]:
    """write(op, totals, column, row, apart), for rows that lie apart and for neighbours."""

    @v.helper
    def load_neighbours(address, _):  # type: ignore[no-untyped-def]
        return v.load(address)

    @v.helper
    def store_neighbours(address, value, _):  # type: ignore[no-untyped-def]
        v.store(address, value)

    def writer(load: Any, store: Any) -> Any:
        @v.helper
        def write(op, totals, column, row, apart):  # type: ignore[no-untyped-def]
            """One column of a row group to its place: times the factor, with bias and residual. A lane's row is `apart`
            rows from the lane's before; 0 where all lanes have the same."""
            value = v.load(totals) * v.splat(v.load_f32(op + R.MM_SCALE))
            bias = v.load_i64(op + R.MM_BIAS)
            residual = v.load_i64(op + R.MM_RESIDUAL)
            if bias != 0:
                value = value + load(bias + 4 * row, 4 * apart)
            if residual != 0:
                place = residual + column * v.load_i64(op + R.MM_RESIDUAL_STRIDE) + 4 * row
                value = value + load(place, 4 * apart)
            out = v.load_i64(op + R.MM_OUT) + column * v.load_i64(op + R.MM_OUT_STRIDE) + 4 * row
            store(out, value, 4 * apart)

        return write

    return writer(v.load_apart, v.store_apart), writer(load_neighbours, store_neighbours)


@v.helper
def _matrix_of(op, chosen):  # type: ignore[no-untyped-def]
    """The address of a range's matrix."""
    return v.load_i64(op + R.MM_WEIGHTS) + v.load_i64(chosen) * v.load_i64(op + R.MM_MATRIX_BYTES)


def few_columns_of(dot_few: Any, write_apart: Any) -> Any:
    """few_columns(op, matrix, begin, end, first_column, n_columns, narrow, after, totals), with
    dot_few(weights, stride, n_blocks, tail, x, run_end, jump, totals, n_columns, narrow) for the rows of all lanes: it
    puts totals into memory, and asks behind the first lane's `run_end` for what is `jump` bytes further on.

    write_apart: one of `writers`.
    """
    lanes = v.target().lanes

    @v.helper
    def few_columns(op, matrix, begin, end, first_column, n_columns, narrow, after, totals):  # type: ignore[no-untyped-def]
        """Rows `begin` to `end` times a panel at most, or a column that is packed for itself (`narrow`).

        after: where the chunk begins that follows, or 0.
        """
        row_bytes = v.load_i64(op + R.MM_ROW_BYTES)
        n_rows = v.load_i64(op + R.MM_ROWS)
        n_blocks = v.load_i64(op + R.MM_BLOCKS)
        tail = v.load_i64(op + R.MM_TAIL)
        x = v.load_i64(op + R.MM_INPUT) + first_column * v.load_i64(op + R.MM_COLUMN_BYTES)
        first = matrix + begin * row_bytes
        # With fewer rows than lanes, one row is in all lanes.
        whole = n_rows >= lanes
        run_rows = (end - begin) // lanes if whole else end - begin
        apart = run_rows if whole else 0
        run = apart * row_bytes
        run_end = first + run
        jump = after - run_end if whole and after != 0 else -AHEAD_BYTES
        for row in range(begin, begin + run_rows):
            dot_few(first, run, n_blocks, tail, x, run_end, jump, totals, n_columns, narrow)
            for column in range(n_columns):
                write_apart(op, totals + column * (4 * lanes), first_column + column, row, apart)
            first += row_bytes
        if whole and begin + run_rows * lanes < end:
            # Fewer rows are left than lanes: the last ones of all, and some before them once more, to the same bits.
            last = matrix + (n_rows - lanes) * row_bytes
            dot_few(last, row_bytes, n_blocks, tail, x, last, -AHEAD_BYTES, totals, n_columns, narrow)
            for column in range(n_columns):
                write_apart(op, totals + column * (4 * lanes), first_column + column, n_rows - lanes, 1)

    return few_columns


@v.helper
def nothing(_):  # type: ignore[no-untyped-def]
    pass


@dataclass(frozen=True)
class ManyColumns:
    """function(op, matrix, begin, end, first_column, n_columns, after, unpacked, totals) for many columns.

    rows, most_columns: how many rows, and columns at most, it takes; fewer columns, down to `least_columns`, where
    these would be more than `pass_bytes`. All rows are multiplied by so many columns, then by the next ones. A thread
    calls `begin` and `end` with the number of all columns before the first chunk and after the last one.
    Where a column is longer than `long_bytes`, a chunk has `rows_of_long` rows. Where every thread gets many chunks
    even so, they have more rows, up to `most_rows`.
    """

    function: Any
    unpacked_bytes: int
    totals_bytes: int
    rows: int
    most_columns: int
    pass_bytes: int = 1 << 60
    least_columns: int = 256
    begin: Any = nothing
    end: Any = nothing
    long_bytes: int = 1 << 60
    rows_of_long: int = 0
    most_rows: int = 0


def kernel_of(few_columns: Any, many: ManyColumns, tiles: ManyColumns | None = None) -> Callable[[int, int, int], None]:
    """The kernel that takes chunks of rows until none is left. tiles: for steps with more columns than
    MOST_WITHOUT_TILES, which are packed otherwise."""
    lanes, columns = v.target().lanes, v.target().columns
    has_tiles, most = tiles is not None, tiles or many
    many_columns, tile_columns = many.function, most.function
    begin_kernel, end_kernel = most.begin, most.end
    unpacked_bytes = max(many.unpacked_bytes, most.unpacked_bytes)
    totals_bytes = max(many.totals_bytes, most.totals_bytes)
    many_rows, tile_rows = many.rows, most.rows
    most_rows = many.most_rows or many.rows
    most_columns, pass_bytes, least_columns = most.most_columns, most.pass_bytes, most.least_columns
    long_bytes, rows_of_long = most.long_bytes, most.rows_of_long

    def kernel(op, step, thread):  # type: ignore[no-untyped-def]
        n_rows = v.load_i64(op + R.MM_ROWS)
        ranges = v.load_i64(op + R.MM_RANGES)
        all_columns = v.load_i64(step + R.N_ROWS)
        in_tiles = has_tiles and all_columns > R.MOST_WITHOUT_TILES
        # With many columns even a few rows take long, and share the work most evenly.
        chunk_rows = v.load_i64(op + R.MM_CHUNK)
        if all_columns > columns:
            chunk_rows = many_rows
            wanted_chunks = CHUNKS_A_PART * v.load_i64(step + R.STEP_PARTS)
            fit = n_rows * v.load_i64(ranges) // wanted_chunks if all_columns >= R.MANY_ROWS else 0
            while 2 * chunk_rows <= min(fit, most_rows):
                chunk_rows *= 2
            if in_tiles:
                is_long = v.load_i64(op + R.MM_COLUMN_BYTES) > long_bytes
                chunk_rows = rows_of_long if is_long else tile_rows
        chunk_bytes = chunk_rows * v.load_i64(op + R.MM_ROW_BYTES)
        chunks = (n_rows + chunk_rows - 1) // chunk_rows
        pass_columns = most_columns
        while pass_columns > least_columns and v.load_i64(op + R.MM_COLUMN_BYTES) * pass_columns > pass_bytes:
            pass_columns //= 2
        pass_chunks = chunks * v.load_i64(ranges)
        n_chunks = (all_columns + pass_columns - 1) // pass_columns * pass_chunks
        next_bytes = v.load_i64(op + R.MM_NEXT_BYTES)
        after_all = v.load_i64(op + R.MM_NEXT) + thread * next_bytes
        unpacked = v.scratch(unpacked_bytes)
        totals = v.scratch(totals_bytes)
        begin_kernel(all_columns)
        chunk = claim(op, n_chunks)
        while chunk < n_chunks:
            # The next chunk is taken before this one is computed, so that its weights can be asked for in time.
            following = claim(op, n_chunks) if more_wanted(step, thread) else n_chunks
            after = 0
            if following < n_chunks:
                after = _matrix_of(op, ranges + 8 + 24 * (following % pass_chunks // chunks))
                after += following % chunks * chunk_bytes
            chosen = ranges + 8 + 24 * (chunk % pass_chunks // chunks)
            matrix = _matrix_of(op, chosen)
            begin = chunk % chunks * chunk_rows
            end = min(begin + chunk_rows, n_rows)
            done = chunk // pass_chunks * pass_columns
            first, count = v.load_i64(chosen + 8) + done, min(v.load_i64(chosen + 16) - done, pass_columns)
            if in_tiles:
                after = after if after != 0 else after_all
                tile_columns(op, matrix, begin, end, first, count, after, unpacked, totals)
            elif count > columns:
                after = after if after != 0 else after_all
                many_columns(op, matrix, begin, end, first, count, after, unpacked, totals)
            elif count > 0:
                few_columns(op, matrix, begin, end, first, count, all_columns == 1, after, totals)
            chunk = following
        end_kernel(all_columns)
        # While the others finish, and while small operations run, memory can bring what the next matmul begins with.
        if all_columns <= columns:
            run = next_bytes // lanes
            for lane in range(lanes):
                for offset in range(0, min(run, AHEAD_BYTES), 256):
                    v.prefetch(after_all + lane * run + offset, 256)

    return kernel
