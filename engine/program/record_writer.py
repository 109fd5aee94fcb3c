"""What lowering writes with: places for values, records, matmuls, packing.

Here is what all operations share; `program.lowering` and `program.lowering_experts` say what each operation becomes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qrun.engine.kernels import records as R
from qrun.engine.program.arena import Arena, Place
from qrun.engine.program.kv_cache import CacheLayout
from qrun.engine.program.record import InRecord, InStep, Record, Routing
from qrun.engine.program.rope_table import RopeTable
from qrun.engine.simd.target import Target
from qrun.formats import TensorType
from qrun.formats.blocks import BLOCK_FORMATS
from qrun.models import graph as G

FLOAT_TYPES = (TensorType.F32, TensorType.F16, TensorType.BF16)
# Activations that multiply nothing: max(x, 0)^2 is max(x, 0) * x.
ALONE_KERNELS: dict[str, str] = {
    "gelu": "gelu_alone", "relu": "relu_alone", "relu_squared": "relu", "xielu": "xielu", "silu": "silu_alone",
    "sigmoid": "sigmoid", "softplus": "softplus", "signed_root": "signed_root", "exp": "exp",
}  # fmt: skip
# How rows are packed for matrices that tiles multiply.
TILED = ("f16", "bf16", "whole")
# A matmul's chunk is about this many bytes of weights: long enough to be worth handing out, short enough to share. Of
# few rows there are as many chunks as this for each thread: with two, a token of a small model takes as long on 16
# threads and 1.05 to 1.2 times as long on 4 and 8; with one it takes 1.2 to 1.3 times as long.
CHUNK_BYTES = 128 * 1024
CHUNKS_A_THREAD = 4


class RecordWriter:
    """Places values of a graph in an arena, and collects records that work on them.

    index: the operation that is being lowered. places: where each value lies, by its id. The other attributes are those
    of `Lowering`.
    """

    def __init__(
        self,
        graph: G.Graph,
        layout: CacheLayout,
        target: Target,
        *,
        batch: int,
        head_rows: int,
        context: int,
        threads: int,
        rope_tables: list[RopeTable] | None = None,
    ) -> None:
        """rope_tables: of another program of the same model, to be used by this one, too."""
        self.graph, self.layout, self.target = graph, layout, target
        self.batch, self.head_rows, self.context, self.threads = batch, head_rows, context, threads
        self.rope_tables: list[RopeTable] = [] if rope_tables is None else rope_tables
        self.arena = Arena()
        self.records: list[Record] = []
        self.n_body = 0
        self.index = 0
        self._in_head = False
        self.places: dict[int, Place] = {}
        self._packed: dict[tuple[int, str], Place] = {}
        self._lifetimes()
        self._takers = self._matmuls_by_input()

    @property
    def kernel_keys(self) -> list[str]:
        return list(dict.fromkeys(record.kernel for record in self.records))

    # What is known before anything is placed

    def _lifetimes(self) -> None:
        """The first and last operation of each value; slices and what they are taken from live together."""
        self._last: dict[int, int] = {}
        self._source: dict[int, int] = {}
        for index, operation in enumerate(self.graph.operations):
            for value in inputs(operation):
                root = self._root(value)
                # The head may run several times for one body: what it starts from outlives it.
                self._last[root] = len(self.graph.operations) if isinstance(operation, G.SelectRows) else index
            if isinstance(operation, G.Slice):
                self._source[operation.out.id] = operation.x.id
        for result in (self.graph.logits, self.graph.hidden):
            if result is not None:
                self._last[self._root(result)] = len(self.graph.operations)

    def _matmuls_by_input(self) -> dict[int, list[tuple[int, G.Weight]]]:
        """For each value the weights of the matmuls that take it, with the numbers of their operations."""
        takers: dict[int, list[tuple[int, G.Weight]]] = {}
        for index, operation in enumerate(self.graph.operations):
            if isinstance(operation, G.Linear):
                takers.setdefault(operation.x.id, []).append((index, operation.weight))
            elif isinstance(operation, G.MoE):
                router = operation.router
                weights = [router, *(change.a for change in operation.changes if change.weight is router)]
                takers.setdefault((operation.router_x or operation.x).id, []).extend((index, w) for w in weights)
        return takers

    def _root(self, value: G.Value) -> int:
        """The value that this one is a slice of, or itself."""
        root = value.id
        while root in self._source:
            root = self._source[root]
        return root

    def _last_use(self, value: G.Value) -> int:
        return self._last.get(self._root(value), self.index)

    # Placing values

    @property
    def rows(self) -> int:
        return self.head_rows if self._in_head else self.batch

    def new(self, value: G.Value, over: G.Value | None = None) -> Place:
        """Where a value goes. over: one that it may take the place of, where nothing else wants that any more."""
        last = self._last_use(value)
        if over is not None and over.width == value.width and self._last_use(over) == self.index:
            place = self.places[over.id]
            if place.stride == 4 * over.width:
                place.buffer.last = max(place.buffer.last, last)
                self.places[value.id] = place
                return place
        place = Place(self.arena.buffer(self.rows * value.width * 4, self.index, last), 0, value.width * 4)
        self.places[value.id] = place
        return place

    def packing(self, weight: G.Weight) -> str:
        """How rows are packed for a matrix: see `kernels.columns.packer_of`."""
        if weight.type in FLOAT_TYPES:
            by_tiles = self.target.tiles and weight.type.name.lower() in TILED and weight.shape[-1] % 32 == 0
            return weight.type.name.lower() if by_tiles else "f32"
        # Of matrices of experts or heads each gets few of a step's rows.
        return "whole" if self.target.whole_tiles and len(weight.shape) == 2 else "q8"

    def packed_place(self, value: G.Value, packing: str, rows: int | None = None, last: int | None = None) -> Place:
        """Where value's packed columns go. They live as long as the value."""
        panel = R.TILE_COLUMNS if packing == "whole" else self.target.columns
        columns = -(-(rows or self.rows) // panel) * panel
        quantised = {"q8": R.ROUNDED_BYTES if self.target.folded else R.PACKED_BYTES, "whole": R.TILE_PACKED_BYTES}
        column_bytes = -(-value.width // 32) * quantised[packing] if packing in quantised else value.width * 4
        last = self._last_use(value) if last is None else last
        return Place(self.arena.buffer(columns * column_bytes, self.index, last), 0, column_bytes)

    # Records

    def emit(
        self, kernel: str, fields: dict[int, object], reads: list[object], writes: list[object], by_rows: bool
    ) -> Record:
        record = Record(kernel, fields, [r for r in reads if r is not None], writes, by_rows)  # type: ignore[arg-type]
        self.records.append(record)
        return record

    def row_operation(
        self, name: str, out: Place, width: int, x: Place, z: Place | None = None, *, factor: float = 1.0,
        packed: tuple[str, Place] | None = None, count: InStep | InRecord | None = None, **fields: object,
    ) -> Record:  # fmt: skip
        packing, packed_place = packed or ("", None)
        extra = {getattr(R, name.upper()): value for name, value in fields.items()}
        return self.emit(
            f"{name}-{packing}",
            {
                R.ROW_COUNT: count or InStep(R.N_ROWS), R.ROW_X: x, R.ROW_X_STRIDE: x.stride,
                R.ROW_Z: z or x, R.ROW_Z_STRIDE: (z or x).stride, R.ROW_Y: out, R.ROW_Y_STRIDE: out.stride,
                R.ROW_WIDTH: width, R.ROW_GROUPS: 1, R.ROW_FACTOR: float(factor),
                R.ROW_PACKED: packed_place or 0, **extra,
            },
            [x, z], [out, *([packed_place] if packed_place else [])], True,
        )  # fmt: skip

    def _packings(self, value: G.Value) -> list[str]:
        """How the matmuls that are still to take `value` want it, each way once."""
        weights = [weight for index, weight in self._takers.get(value.id, []) if index >= self.index]
        return list(dict.fromkeys(self.packing(weight) for weight in weights))

    def _produce(
        self, name: str, out: G.Value, x: Place, z: Place | None = None, over: G.Value | None = None, **fields: object
    ) -> Record:
        """A row operation that makes `out`, and packs it for the matmuls that take it. over: as for `new`."""
        place = self.new(out, over)
        packings = self._packings(out)
        packed = None
        if packings:
            packed = (packings[0], self.packed_place(out, packings[0]))
            self._packed[out.id, packings[0]] = packed[1]
        record = self.row_operation(name, place, out.width, x, z, packed=packed, **fields)  # type: ignore[arg-type]
        for packing in packings[1:]:
            self._pack(out, packing)
        return record

    def packed_input(self, value: G.Value, packing: str) -> Place:
        """The rows of a value, packed. They are packed in all ways at once, so that no matmul waits for it later."""
        if (value.id, packing) not in self._packed:
            for wanted in self._packings(value):
                self._pack(value, wanted)
        return self._packed[value.id, packing]

    def _pack(self, value: G.Value, packing: str) -> None:
        place, x = self.packed_place(value, packing), self.places[value.id]
        self.row_operation("pack", x, value.width, x, packed=(packing, place)).writes = [place]
        self._packed[value.id, packing] = place

    def matmul(
        self, weight: G.Weight, out: Place, x: Place, *, ranges: InStep | Place | None = None, bias: object = None,
        residual: Place | None = None, scale: float = 1.0,
    ) -> None:  # fmt: skip
        *_, rows, width = weight.shape
        blocks, tail = blocks_and_tail(weight.type, width)
        row_bytes = len(weight.raw) // int(np.prod(weight.shape[:-1]))
        lanes = self.target.lanes
        wanted = max(CHUNK_BYTES // row_bytes, 1)
        share = -(-rows // (self.threads * CHUNKS_A_THREAD))
        chunk = max(-(-min(wanted, share) // lanes) * lanes, lanes)
        self.emit(
            f"matmul-{weight.type.name}{'-tiles' if self.packing(weight) in TILED else ''}",
            {
                R.MM_WEIGHTS: weight.raw, R.MM_ROW_BYTES: row_bytes, R.MM_MATRIX_BYTES: rows * row_bytes,
                R.MM_ROWS: rows,
                R.MM_BLOCKS: blocks, R.MM_TAIL: tail, R.MM_INPUT: x, R.MM_COLUMN_BYTES: x.stride,
                R.MM_RANGES: ranges or InStep(R.ROW_RANGES), R.MM_OUT: out, R.MM_OUT_STRIDE: out.stride,
                R.MM_BIAS: 0 if bias is None else bias, R.MM_RESIDUAL: residual or 0,
                R.MM_RESIDUAL_STRIDE: residual.stride if residual else 0, R.MM_SCALE: float(scale), R.MM_CHUNK: chunk,
            },
            [x, residual, ranges if isinstance(ranges, Place) else None], [out], False,
        )  # fmt: skip

    # For those who watch: see program.observing

    def taken(self, weight: G.Weight, value: G.Value) -> None:
        """A matmul is about to take the float32 rows of `value`."""

    def taken_by_experts(self, weights: list[G.Weight], x: Place, routing: Routing) -> None:
        """Matmuls of experts are about to take the float32 rows at x."""


def matrices(operation: G.Operation) -> Iterator[G.Weight]:
    """The weights of the matmuls that an operation becomes."""
    if isinstance(operation, G.Linear | G.HeadLinear):
        yield operation.weight
    elif isinstance(operation, G.MoE):
        yield from (operation.router, *operation.matrices)
        for change in operation.changes:
            yield from (change.a, change.b)


def limits(operation: G.Activate | G.MoE) -> object:
    """For the record of an activation with two limits: both, or 0 for others."""
    return np.array([operation.limit, operation.up_limit], np.float32) if operation.kind == "situ" else 0


def inputs(operation: G.Operation) -> Iterator[G.Value]:
    for name, value in vars(operation).items():
        if name != "out" and isinstance(value, G.Value):
            yield value


def blocks_and_tail(type_: TensorType, width: int) -> tuple[int, int]:
    """How many blocks a row has, and how many single weights are left. A float type's block is 16 bytes."""
    if type_ in FLOAT_TYPES:
        return divmod(width, 16 // BLOCK_FORMATS[type_].block_bytes)
    return width // BLOCK_FORMATS[type_].block_size, 0
