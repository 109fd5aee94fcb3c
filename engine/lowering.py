"""Lowering: from a graph's operations on values to the records that kernels read.

What is decided here, once per load: which kernels are needed, how long every value lives, and which operations become
one (a norm or an activation packs its rows for the matmul that follows; a matmul adds the residual).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from qrun.engine import records as R
from qrun.engine.arena import Arena, Place
from qrun.engine.kv_cache import CacheLayout
from qrun.engine.lowering_experts import lower_experts
from qrun.engine.program_records import InRecord, InStep, Record, Routing
from qrun.engine.rope_table import RopeTable
from qrun.engine.simd.target import Target
from qrun.formats import TensorType
from qrun.formats.blocks import BLOCK_FORMATS
from qrun.models import graph as G

FLOAT_TYPES = (TensorType.F32, TensorType.F16, TensorType.BF16)
# A matmul's chunk is about this many bytes of weights: long enough to be worth handing out, short enough to share.
CHUNK_BYTES = 128 * 1024


class Lowering:
    """The records of a graph for batches of up to `batch` rows (`head_rows` in the head), on `threads` threads.

    records: all operations; those from `n_body` on are the head. arena: where their values will be placed.
    logits: the head's result.
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
    ) -> None:
        self.graph, self.layout, self.target = graph, layout, target
        self.batch, self.head_rows, self.context, self.threads = batch, head_rows, context, threads
        self.rope_tables: list[RopeTable] = []
        self.arena = Arena()
        self.records: list[Record] = []
        self.n_body = 0
        self.index = 0
        self._in_head = False
        self.places: dict[int, Place] = {}
        self._packed: dict[tuple[int, str], Place] = {}
        self._lifetimes()
        self._fuse()
        for self.index, operation in enumerate(graph.operations):
            if operation.out.id not in self._fused:
                self._lower(operation)
        self.logits = self.places[graph.logits.id]

    @property
    def kernel_keys(self) -> list[str]:
        return list(dict.fromkeys(record.kernel for record in self.records))

    # What is known before anything is placed

    def _lifetimes(self) -> None:
        """The first and last operation of each value; slices and what they are taken from live together."""
        self._last: dict[int, int] = {}
        self._source: dict[int, int] = {}
        for index, operation in enumerate(self.graph.operations):
            for value in _inputs(operation):
                root = self._root(value)
                # The head may run several times for one body: what it starts from outlives it.
                self._last[root] = len(self.graph.operations) if isinstance(operation, G.SelectRows) else index
            if isinstance(operation, G.Slice):
                self._source[operation.out.id] = operation.x.id
        self._last[self.graph.logits.id] = len(self.graph.operations)

    def _root(self, value: G.Value) -> int:
        """The value that this one is a slice of, or itself."""
        root = value.id
        while root in self._source:
            root = self._source[root]
        return root

    def _last_use(self, value: G.Value) -> int:
        return self._last.get(self._root(value), self.index)

    def _fuse(self) -> None:
        """Find matmuls whose result only goes into a sum: they add the other side themselves."""
        uses = Counter(value.id for operation in self.graph.operations for value in _inputs(operation))
        made = {operation.out.id: operation for operation in self.graph.operations}
        order = {operation.out.id: index for index, operation in enumerate(self.graph.operations)}
        self._residual: dict[int, tuple[G.Value, G.Value]] = {}  # linear's out -> (other side, sum)
        self._fused: set[int] = set()
        for operation in self.graph.operations:
            if not isinstance(operation, G.Add):
                continue
            for value, other in ((operation.a, operation.b), (operation.b, operation.a)):
                linear = made.get(value.id)
                if isinstance(linear, G.Linear) and uses[value.id] == 1 and order.get(other.id, 0) < order[value.id]:
                    self._residual[value.id] = (other, operation.out)
                    self._fused.add(operation.out.id)
                    break

    # Placing values

    @property
    def rows(self) -> int:
        return self.head_rows if self._in_head else self.batch

    def new(self, value: G.Value) -> Place:
        last = self._last_use(value)
        place = Place(self.arena.buffer(self.rows * value.width * 4, self.index, last), 0, value.width * 4)
        self.places[value.id] = place
        return place

    def packing(self, weight: G.Weight) -> str:
        return "f32" if weight.type in FLOAT_TYPES else "q8"

    def packed_place(self, value: G.Value, packing: str, rows: int | None = None, last: int | None = None) -> Place:
        """Where value's packed columns go. They live as long as the value."""
        columns = -(-(rows or self.rows) // self.target.columns) * self.target.columns
        column_bytes = value.width * 4 if packing == "f32" else -(-value.width // 32) * R.PACKED_BYTES
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
        """How the matmuls that take `value` want it, each way once."""
        weights: list[G.Weight] = []
        for operation in self.graph.operations[self.index :]:
            if isinstance(operation, G.Linear) and operation.x.id == value.id:
                weights.append(operation.weight)
            elif isinstance(operation, G.MoE) and operation.x.id == value.id:
                router = operation.router
                weights += [router, *(change.a for change in operation.changes if change.weight is router)]
        return list(dict.fromkeys(self.packing(weight) for weight in weights))

    def _produce(self, name: str, out: G.Value, x: Place, z: Place | None = None, **fields: object) -> None:
        """A row operation that makes `out`, and packs it for the matmuls that take it."""
        place = self.new(out)
        packings = self._packings(out)
        packed = None
        if packings:
            packed = (packings[0], self.packed_place(out, packings[0]))
            self._packed[out.id, packings[0]] = packed[1]
        self.row_operation(name, place, out.width, x, z, packed=packed, **fields)  # type: ignore[arg-type]
        for packing in packings[1:]:
            self._pack(out, packing)

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
        share = -(-rows // (self.threads * 4))
        chunk = max(-(-min(wanted, share) // lanes) * lanes, lanes)
        self.emit(
            f"matmul-{weight.type.name}",
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

    # For those who watch: see engine.observing

    def taken(self, weight: G.Weight, value: G.Value) -> None:
        """A matmul is about to take the float32 rows of `value`."""

    def taken_by_experts(self, weights: list[G.Weight], x: Place, routing: Routing) -> None:
        """Matmuls of experts are about to take the float32 rows at x."""

    # One method for each operation

    def _lower(self, operation: G.Operation) -> None:
        getattr(self, f"_lower_{type(operation).__name__.lower()}")(operation)

    def _lower_embed(self, o: G.Embed) -> None:
        out = self.new(o.out)
        rows, width = o.weight.shape
        blocks, tail = blocks_and_tail(o.weight.type, width)
        self.emit(
            f"embed-{o.weight.type.name}",
            {
                R.EMBED_WEIGHTS: o.weight.raw, R.EMBED_ROW_BYTES: len(o.weight.raw) // rows, R.EMBED_BLOCKS: blocks,
                R.EMBED_TAIL: tail, R.EMBED_OUT: out, R.EMBED_OUT_STRIDE: out.stride, R.EMBED_SCALE: float(o.scale),
            },
            [], [out], True,
        )  # fmt: skip

    def _lower_rmsnorm(self, o: G.RMSNorm) -> None:
        weight = 0 if o.weight is None else np.ascontiguousarray(o.weight, np.float32)
        self._produce("rms_norm", o.out, self.places[o.x.id], factor=o.eps, row_groups=o.groups, row_weight=weight)

    def _lower_linear(self, o: G.Linear) -> None:
        x = self.packed_input(o.x, self.packing(o.weight))
        residual = None
        out = o.out
        if o.out.id in self._residual:
            other, out = self._residual[o.out.id]
            residual = self.places[other.id]
        bias = None if o.bias is None else np.ascontiguousarray(o.bias, np.float32)
        self.taken(o.weight, o.x)
        self.matmul(o.weight, self.new(out), x, bias=bias, residual=residual, scale=o.scale)

    def _lower_slice(self, o: G.Slice) -> None:
        x = self.places[o.x.id]
        self.places[o.out.id] = Place(x.buffer, x.offset + 4 * o.start, x.stride)

    def _lower_rope(self, o: G.Rope) -> None:
        table = self._rope_table(o)
        self.row_operation(
            "rope", self.new(o.out), o.out.width, self.places[o.x.id], row_rope_head_dim=o.head_dim,
            row_rope_dims=o.n_rot, row_rope_interleaved=int(o.interleaved), row_rope_table=table.values,
        )  # fmt: skip

    def _rope_table(self, o: G.Rope) -> RopeTable:
        for table in self.rope_tables:
            if table.magnitude == o.magnitude and np.array_equal(table.frequencies, o.frequencies):
                return table
        values = np.empty((self.context, o.n_rot // 2, 2), np.float32)
        self.rope_tables.append(RopeTable(np.asarray(o.frequencies, np.float32), o.magnitude, values))
        return self.rope_tables[-1]

    def _lower_attention(self, o: G.Attention) -> None:
        layer, place = self.graph.cache_layers[o.layer], self.layout.places[o.layer]
        q, k, v = (self.places[value.id] for value in (o.q, o.k, o.v))
        cache = f"cache of layer {o.layer}"
        kind = self.layout.cache_type
        if max(layer.head_dim_k, layer.head_dim_v) > R.MAX_HEAD_DIM:
            raise ValueError(f"layer {o.layer} has heads of more than {R.MAX_HEAD_DIM} dimensions: not supported")
        self.emit(
            f"append-{kind}",
            {
                R.KV_K: k, R.KV_K_STRIDE: k.stride, R.KV_V: v, R.KV_V_STRIDE: v.stride, R.KV_HEADS: layer.n_kv_heads,
                R.KV_DIM_K: layer.head_dim_k, R.KV_DIM_V: layer.head_dim_v, R.KV_K_OFFSET: place.k_offset,
                R.KV_V_OFFSET: place.v_offset, R.KV_K_HEAD_BYTES: place.k_head_bytes,
                R.KV_V_HEAD_BYTES: place.v_head_bytes,
                R.KV_GROUP: place.group,
            },
            [k, v], [cache], True,
        )  # fmt: skip
        out = self.new(o.out)
        self.emit(
            attention_key(layer, kind, self.threads),
            {
                R.ATT_Q: q, R.ATT_Q_STRIDE: q.stride, R.ATT_OUT: out, R.ATT_OUT_STRIDE: out.stride,
                R.ATT_HEADS: layer.n_heads, R.ATT_KV_HEADS: layer.n_kv_heads, R.ATT_DIM_K: layer.head_dim_k,
                R.ATT_DIM_V: layer.head_dim_v, R.ATT_K_OFFSET: place.k_offset, R.ATT_V_OFFSET: place.v_offset,
                R.ATT_K_HEAD_BYTES: place.k_head_bytes, R.ATT_V_HEAD_BYTES: place.v_head_bytes,
                R.ATT_GROUP: place.group,
                R.ATT_SCALE: float(o.scale), R.ATT_SOFTCAP: float(o.softcap or 0.0),
                R.ATT_WINDOW: layer.window or 1 << 40,
            },
            [q, cache], [out], False,
        )  # fmt: skip

    def _lower_activate(self, o: G.Activate) -> None:
        self._produce(o.kind, o.out, self.places[o.gate.id], self.places[o.up.id])

    def _lower_add(self, o: G.Add) -> None:
        self._produce("add", o.out, self.places[o.a.id], self.places[o.b.id])

    def _lower_scale(self, o: G.Scale) -> None:
        self._produce("scale", o.out, self.places[o.x.id], factor=o.factor)

    def _lower_softcap(self, o: G.Softcap) -> None:
        self._produce("softcap", o.out, self.places[o.x.id], factor=o.cap)

    def _lower_selectrows(self, o: G.SelectRows) -> None:
        if not self._in_head:
            self.n_body = len(self.records)
        self._in_head = True
        self._produce("select_rows", o.out, self.places[o.x.id])

    def _lower_moe(self, o: G.MoE) -> None:
        lower_experts(self, o)


def attention_key(layer: G.CacheLayer, cache_type: str, threads: int) -> str:
    """The kernel for a layer: with as many together of the query heads that share a key and value head as possible,
    but so that there is work for every thread."""
    group = layer.n_heads // layer.n_kv_heads
    most = max(min(R.TILE_SIZE, layer.n_heads // threads), 1)
    together = max(n for n in range(1, most + 1) if group % n == 0)
    return f"attention-{cache_type}-{together}"


def _inputs(operation: G.Operation) -> Iterator[G.Value]:
    for name, value in vars(operation).items():
        if name != "out" and isinstance(value, G.Value):
            yield value


def blocks_and_tail(type_: TensorType, width: int) -> tuple[int, int]:
    """How many blocks a row has, and how many single weights are left. A float type's block is 16 bytes."""
    if type_ in FLOAT_TYPES:
        return divmod(width, 16 // BLOCK_FORMATS[type_].block_bytes)
    return width // BLOCK_FORMATS[type_].block_size, 0
