"""Lowering: from a graph's operations on values to the records that kernels read.

What is decided here, once per load: which kernels are needed, how long every value lives, and which operations become
one (a norm or an activation packs its rows for the matmul that follows; a matmul adds the residual).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from qrun.engine.kernels import records as R
from qrun.engine.program.arena import Place, reserve
from qrun.engine.program.kv_cache import LayerPlace
from qrun.engine.program.lowering_experts import lower_experts
from qrun.engine.program.record_writer import ALONE_KERNELS, RecordWriter, blocks_and_tail, inputs, limits
from qrun.engine.program.rope_table import RopeTable
from qrun.engine.program.state_blocks import head_size
from qrun.formats import FormatError
from qrun.models import graph as G

EVERYTHING = 1 << 40
"""More positions than there can be."""
PEAKS_FROM = 1 << 14
"""Of so many logits the highest of each part are found by all threads: see `kernels.peaks`."""
INDEX_HEADS = 8
"""Heads of an index that are taken together: with more, their sums do not fit the registers."""


class Lowering(RecordWriter):
    """The records of a graph for batches of up to `batch` rows (`head_rows` in the head), on `threads` threads.

    records: all operations; those from `n_body` on are the head. arena: where their values will be placed.
    logits: the head's result. peaks: the highest of these, of a large vocabulary. hidden: what draft layers go on from,
    if the graph has that. inputs: where rows from outside go, if it takes some.
    """

    def __init__(self, graph: G.Graph, *args: Any, **settings: Any) -> None:
        """The arguments of `RecordWriter`."""
        super().__init__(graph, *args, **settings)
        self.inputs: Place | None = None
        self.peaks: Place | None = None
        self._fuse()
        for self.index, operation in enumerate(graph.operations):
            if operation.out.id not in self._fused:
                self._lower(operation)
        self.logits = self.places[graph.logits.id]
        self._end()
        self.hidden = self.places[graph.hidden.id] if graph.hidden is not None else None

    def _end(self) -> None:
        """What comes behind the graph's operations."""
        width = self.graph.logits.width
        if width < PEAKS_FROM or self.graph.embeds:
            return
        groups = width // R.PEAK_GROUP
        self.peaks = Place(self.arena.buffer(0, self.index, self.index), 0, 4 * R.PEAKS * groups)
        self.emit(
            "peaks-",
            {R.PEAKS_X: self.logits, R.PEAKS_X_STRIDE: self.logits.stride, R.PEAKS_Y: self.peaks,
             R.PEAKS_GROUPS: groups},
            [self.logits], [self.peaks], False,
        )  # fmt: skip

    def _fuse(self) -> None:
        """Find matmuls whose result only goes into a sum: they add the other side themselves."""
        uses = Counter(value.id for operation in self.graph.operations for value in inputs(operation))
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

    def _refused(self, problem: str) -> FormatError:
        """The error to raise about a model that no kernel can run."""
        return FormatError(self.graph.path, problem)

    # One method for each operation

    def _lower(self, operation: G.Operation) -> None:
        getattr(self, f"_lower_{type(operation).__name__.lower()}")(operation)

    def _lower_embed(self, o: G.Embed) -> None:
        out = self.new(o.out)
        rows, width = o.weight.shape
        if o.by_position and self.context > rows:
            raise ValueError(f"the model has {rows} positions: a context of {self.context} is not supported")
        blocks, tail = blocks_and_tail(o.weight.type, width)
        self.emit(
            f"embed-{o.weight.type.name}",
            {
                R.EMBED_WEIGHTS: o.weight.raw, R.EMBED_ROW_BYTES: len(o.weight.raw) // rows, R.EMBED_BLOCKS: blocks,
                R.EMBED_TAIL: tail, R.EMBED_OUT: out, R.EMBED_OUT_STRIDE: out.stride, R.EMBED_SCALE: float(o.scale),
                R.EMBED_BY_POSITION: int(o.by_position),
            },
            [], [out], True,
        )  # fmt: skip

    def _lower_embedhashes(self, o: G.EmbedHashes) -> None:
        out, hashes = self.new(o.out), o.hashes
        rows, width = o.weight.shape
        blocks, tail = blocks_and_tail(o.weight.type, width)
        self.emit(
            f"embed_hashes-{o.weight.type.name}",
            {
                R.EMBED_WEIGHTS: o.weight.raw, R.EMBED_ROW_BYTES: len(o.weight.raw) // rows, R.EMBED_BLOCKS: blocks,
                R.EMBED_TAIL: tail, R.EMBED_OUT: out, R.EMBED_OUT_STRIDE: out.stride,
                R.HASH_LENGTH: len(hashes.multipliers), R.HASH_PER_LENGTH: hashes.per_length, R.HASH_ROW_SIZE: width,
                R.HASH_MULTIPLIERS: np.array(hashes.multipliers, np.uint64), R.HASH_SIZES: np.array(hashes.sizes),
                R.HASH_OFFSETS: np.array(hashes.offsets), R.HASH_END: hashes.end,
                R.HASH_STATE: self.layout.state_offsets[o.state],
            },
            [], [out, f"state {o.state}"], False,
        )  # fmt: skip

    def _lower_input(self, o: G.Input) -> None:
        # They are there before the first operation.
        buffer = self.arena.buffer(self.rows * o.out.width * 4, 0, self._last_use(o.out))
        self.inputs = self.places[o.out.id] = Place(buffer, 0, o.out.width * 4)

    def _lower_rmsnorm(self, o: G.RMSNorm) -> None:
        self._norm("rms_norm", o)

    def _lower_layernorm(self, o: G.LayerNorm) -> None:
        self._norm("layer_norm", o)

    def _norm(self, name: str, o: G.RMSNorm | G.LayerNorm) -> None:
        of_groups = any(row is not None and row.ndim == 2 for row in (o.weight, o.bias))
        if of_groups:  # the weight and the bias of a group lie where the kernel steps to from group to group
            assert all(row is None or row.ndim == 2 for row in (o.weight, o.bias))
        self._produce(
            name, o.out, self.places[o.x.id], factor=o.eps, row_groups=o.groups, row_weight=floats(o.weight),
            row_bias=floats(o.bias), row_weight_stride=o.x.width // o.groups * 4 if of_groups else 0,
        )  # fmt: skip

    def _lower_linear(self, o: G.Linear) -> None:
        x = self.packed_input(o.x, self.packing(o.weight))
        residual = None
        out = o.out
        if o.out.id in self._residual:
            other, out = self._residual[o.out.id]
            residual = self.places[other.id]
        bias = None if o.bias is None else floats(o.bias)
        self.taken(o.weight, o.x)
        self.matmul(o.weight, self.new(out), x, bias=bias, residual=residual, scale=o.scale)

    def _lower_headlinear(self, o: G.HeadLinear) -> None:
        n_heads, width, columns = o.weight.shape
        x, packing = self.places[o.x.id], self.packing(o.weight)
        slots = n_heads * -(-self.rows // self.target.columns) * self.target.columns
        packed = self.packed_place(G.Value(-1, columns), packing, slots, self.index)
        ranges = Place(self.arena.buffer(8 + 24 * n_heads, self.index, self.index), 0, 0)
        self.emit(
            f"to_heads-{packing}",
            {
                R.HEADS_X: x, R.HEADS_X_STRIDE: x.stride, R.HEADS_Y: packed, R.HEADS_COUNT: n_heads,
                R.HEADS_DIM: o.x.width // n_heads, R.HEADS_START: o.start, R.HEADS_WIDTH: columns,
                R.HEADS_RANGES: ranges,
            },
            [x], [packed, ranges], False,
        )  # fmt: skip
        apart = Place(self.arena.buffer(slots * width * 4, self.index, self.index), 0, width * 4)
        self.matmul(o.weight, apart, packed, ranges=ranges)
        out = self.new(o.out)
        self.emit(
            "from_heads-",
            {
                R.HEADS_X: apart, R.HEADS_X_STRIDE: apart.stride, R.HEADS_Y: out, R.HEADS_Y_STRIDE: out.stride,
                R.HEADS_COUNT: n_heads, R.HEADS_WIDTH: width,
            },
            [apart], [out], False,
        )  # fmt: skip

    def _lower_join(self, o: G.Join) -> None:
        x = self.places[o.x.id]
        z = x if o.z is None else self.places[o.z.id]
        z_head = 0 if o.z is None or o.z_heads == 1 else o.z.width // o.z_heads
        self._produce(
            "join", o.out, x, z, row_groups=o.n_heads, row_x_head=o.x.width // o.n_heads, row_x_start=o.of_x.start,
            row_x_size=len(o.of_x), row_z_head=z_head, row_z_start=o.of_z.start, row_z_size=len(o.of_z),
        )  # fmt: skip

    def _lower_slice(self, o: G.Slice) -> None:
        x = self.places[o.x.id]
        self.places[o.out.id] = Place(x.buffer, x.offset + 4 * o.start, x.stride)

    def _lower_rope(self, o: G.Rope) -> None:
        table = self._rope_table(o)
        self.row_operation(
            "rope", self.new(o.out), o.out.width, self.places[o.x.id], row_rope_head_dim=o.head_dim,
            row_rope_dims=o.n_rot, row_rope_interleaved=int(o.interleaved), row_rope_table=table.values,
            row_rope_start=o.start, row_rope_behind=o.behind,
        )  # fmt: skip

    def _rope_table(self, o: G.Rope) -> RopeTable:
        for table in self.rope_tables:
            same = (table.magnitude, table.temperature) == (o.magnitude, o.temperature)
            if same and np.array_equal(table.frequencies, o.frequencies):
                return table
        memory = reserve(4 * self.context * o.n_rot, f"a context of {self.context} tokens", self.graph.path)
        values = memory.view(np.float32).reshape(self.context, o.n_rot // 2, 2)
        frequencies = np.asarray(o.frequencies, np.float32)
        self.rope_tables.append(RopeTable(frequencies, o.magnitude, values, temperature=o.temperature))
        return self.rope_tables[-1]

    def _lower_attention(self, o: G.Attention) -> None:
        layer, place = self.graph.cache_layers[o.layer], self.layout.places[o.layer]
        q = self.places[o.q.id]
        cache = f"cache of layer {o.layer}"
        if max(layer.head_dim_k, layer.head_dim_v) > R.MAX_HEAD_DIM:
            raise self._refused(f"layer {o.layer} has heads of more than {R.MAX_HEAD_DIM} dimensions: not supported")
        if o.k is not None and o.v is None:  # keys are kept as if they were values, and nothing else
            self._append_rows(self.places[o.k.id], layer, place, place.k_offset, cache, layer.n_kv_heads)
        elif o.k is not None and o.v is not None:
            self._append(self.places[o.k.id], self.places[o.v.id], layer, place, cache)
        entries: dict[int, object] = {}
        caches = [cache]
        if o.entries is not None:
            assert o.entries_layer is not None
            of_entries, at = self.graph.cache_layers[o.entries_layer], self.layout.places[o.entries_layer]
            assert at.kind == place.kind and layer.values_in_keys
            caches.append(f"cache of layer {o.entries_layer}")
            self._append_rows(self.places[o.entries.id], of_entries, at, at.k_offset, caches[-1])
            entries = {
                R.ATT_ENTRIES_EVERY: of_entries.every, R.ATT_ENTRIES_GROUP: at.group,
                R.ATT_ENTRIES_OFFSET: at.k_offset,
            }  # fmt: skip
        out = self.new(o.out)
        self.emit(
            attention_key(self.graph, o, place.kind, self.threads),
            {
                R.ATT_Q: q, R.ATT_Q_STRIDE: q.stride, R.ATT_OUT: out, R.ATT_OUT_STRIDE: out.stride,
                R.ATT_HEADS: layer.n_heads, R.ATT_KV_HEADS: layer.n_kv_heads, R.ATT_DIM_K: layer.head_dim_k,
                R.ATT_DIM_V: layer.head_dim_v, R.ATT_K_OFFSET: place.k_offset, R.ATT_V_OFFSET: place.v_offset,
                R.ATT_K_HEAD_BYTES: place.k_head_bytes, R.ATT_V_HEAD_BYTES: place.v_head_bytes,
                R.ATT_GROUP: place.group,
                R.ATT_SCALE: float(o.scale), R.ATT_SOFTCAP: float(o.softcap or 0.0),
                R.ATT_WINDOW: layer.behind or EVERYTHING, R.ATT_SINKS: floats(o.sinks), R.ATT_SLOPES: floats(o.slopes),
                R.ATT_CHUNKED: int(layer.chunked), R.ATT_AHEAD: layer.ahead, **entries,
                R.ATT_OF_TILE: R.TILE_SOURCE if layer.side == "source" else R.TILE_END, **of_distances(o.biases),
                R.ATT_BEFORE: EVERYTHING if o.index is None else o.index.start,
            },
            [q, *caches], [out], False,
        )  # fmt: skip
        if o.chosen is not None:
            self._attend_to_chosen(o, q, out, entries, caches)

    def _attend_to_chosen(
        self, o: G.Attention, q: Place, out: Place, entries: dict[int, object], caches: list[str]
    ) -> None:
        """The same for rows that do not see everything."""
        assert o.index is not None and o.chosen is not None
        layer, place, chosen = self.graph.cache_layers[o.layer], self.layout.places[o.layer], self.places[o.chosen.id]
        self.emit(
            f"sparse_{attention_key(self.graph, o, place.kind, self.threads)}",
            {
                R.SPA_Q: q, R.SPA_Q_STRIDE: q.stride, R.SPA_OUT: out, R.SPA_OUT_STRIDE: out.stride,
                R.SPA_HEADS: layer.n_heads, R.SPA_KV_HEADS: layer.n_kv_heads, R.SPA_DIM_K: layer.head_dim_k,
                R.SPA_DIM_V: layer.head_dim_v, R.SPA_K_OFFSET: place.k_offset, R.SPA_V_OFFSET: place.v_offset,
                R.SPA_K_HEAD_BYTES: place.k_head_bytes, R.SPA_V_HEAD_BYTES: place.v_head_bytes,
                R.SPA_GROUP: place.group, R.SPA_SCALE: float(o.scale), R.SPA_SINKS: floats(o.sinks),
                R.SPA_CHOSEN: chosen, R.SPA_CHOSEN_STRIDE: chosen.stride,
                R.SPA_CHOSEN_GROUP: 0 if o.index.n_groups == 1 else 4 * (1 + o.index.most),
                R.SPA_START: o.index.start, R.SPA_WINDOW: layer.window or EVERYTHING,
                R.SPA_ENTRIES_GROUP: entries.get(R.ATT_ENTRIES_GROUP, 0),
                R.SPA_ENTRIES_OFFSET: entries.get(R.ATT_ENTRIES_OFFSET, 0),
            },
            [q, chosen, *caches], [out], False,
        )  # fmt: skip

    def _lower_choose(self, o: G.Choose) -> None:
        index, layer, place = o.index, self.graph.cache_layers[o.layer], self.layout.places[o.layer]
        if index.dim > R.MAX_HEAD_DIM:
            raise self._refused(f"an index with heads of more than {R.MAX_HEAD_DIM} dimensions: not supported")
        q, k = self.places[o.q.id], self.places[o.k.id]
        weights = None if o.weights is None else self.places[o.weights.id]
        cache = f"cache of layer {o.layer}"
        self._append(k, k, layer, place, cache)
        page = R.PAGE_POSITIONS
        group_bytes = 4 * page * -(-self.context // (index.every * page))
        rows = max(R.INDEXED_ROWS, self.threads)
        scores = Place(self.arena.buffer(rows * index.n_groups * group_bytes, self.index, self.index), 0, 0)
        out = self.new(o.out)
        fields: dict[int, object] = {
            R.IDX_Q: q, R.IDX_Q_STRIDE: q.stride, R.IDX_WEIGHTS: weights or 0,
            R.IDX_WEIGHTS_STRIDE: weights.stride if weights else 0, R.IDX_HEADS: index.n_heads,
            R.IDX_GROUPS: index.n_groups, R.IDX_DIM: index.dim, R.IDX_KEYS: place.k_offset, R.IDX_PAGES: place.group,
            R.IDX_EVERY: index.every, R.IDX_BLOCK: index.block, R.IDX_BUDGET: index.budget,
            R.IDX_LOCAL: index.n_local, R.IDX_CLIPPED: int(index.clipped), R.IDX_OF_ENTRIES: int(index.of_entries),
            R.IDX_START: index.start, R.IDX_SCORES: scores, R.IDX_GROUP_BYTES: group_bytes, R.IDX_CHOSEN: out,
            R.IDX_CHOSEN_STRIDE: out.stride, R.IDX_CHOSEN_GROUP: 4 * (1 + index.most),
        }  # fmt: skip
        variant = f"{place.kind}-{min(index.n_heads, INDEX_HEADS)}"
        self.emit(f"index_scores-{variant}", dict(fields), [q, weights, cache], [scores], False)
        self.emit(f"index_choose-{variant}", dict(fields), [q, weights, cache, scores], [scores, out], False)

    def _lower_keep(self, o: G.Keep) -> None:
        layer, place = self.graph.cache_layers[o.layer], self.layout.places[o.layer]
        self._append(self.places[o.k.id], self.places[o.v.id], layer, place, f"cache of layer {o.layer}")
        self.places[o.out.id] = self.places[o.k.id]

    def _append(self, k: Place, v: Place, layer: G.CacheLayer, place: LayerPlace, cache: str) -> None:
        """Keys and values to their cache."""
        self.emit(
            f"append-{place.kind}",
            {
                R.KV_K: k, R.KV_K_STRIDE: k.stride, R.KV_V: v, R.KV_V_STRIDE: v.stride,
                R.KV_HEADS: layer.n_kv_heads, R.KV_DIM_K: layer.head_dim_k, R.KV_DIM_V: layer.head_dim_v,
                R.KV_K_OFFSET: place.k_offset, R.KV_V_OFFSET: place.v_offset,
                R.KV_K_HEAD_BYTES: place.k_head_bytes, R.KV_V_HEAD_BYTES: place.v_head_bytes,
                R.KV_GROUP: place.group, R.KV_EVERY: layer.every,
            },
            [k, v], [cache], True,
        )  # fmt: skip

    def _append_rows(
        self, x: Place, layer: G.CacheLayer, place: LayerPlace, offset: int, cache: str, heads: int = 1
    ) -> None:
        """Rows of some heads to a cache that keeps them as they come."""
        self.emit(
            f"append-{place.kind}",
            {
                R.KV_K: x, R.KV_K_STRIDE: x.stride, R.KV_V: x, R.KV_V_STRIDE: x.stride, R.KV_HEADS: heads,
                R.KV_DIM_K: 0, R.KV_DIM_V: layer.head_dim_k, R.KV_K_OFFSET: offset, R.KV_V_OFFSET: offset,
                R.KV_K_HEAD_BYTES: 0, R.KV_V_HEAD_BYTES: place.k_head_bytes, R.KV_GROUP: place.group,
                R.KV_EVERY: layer.every,
            },
            [x], [cache], True,
        )  # fmt: skip

    def _lower_pool(self, o: G.Pool) -> None:
        layer, place = self.graph.cache_layers[o.layer], self.layout.places[o.layer]
        cache, offsets = f"cache of layer {o.layer}", (place.k_offset, place.k_offset + place.k_head_bytes)
        for value, offset in zip((o.x, o.scores), offsets, strict=True):
            self._append_rows(self.places[value.id], layer, place, offset, cache)
        row_floats = -(-o.x.width // 32) * 32
        places = np.pad(o.by_place, ((0, 0), (0, row_floats - o.x.width)))
        out = self.new(o.out)
        self.emit(
            "pool-",
            {
                R.POOL_Y: out, R.POOL_Y_STRIDE: out.stride, R.POOL_WIDTH: o.out.width, R.POOL_EVERY: o.every,
                R.POOL_OVERLAP: int(o.overlap), R.POOL_PLACES: floats(places), R.POOL_X_OFFSET: offsets[0],
                R.POOL_SCORES_OFFSET: offsets[1], R.POOL_ROW_BYTES: 4 * row_floats, R.POOL_GROUP: place.group,
            },
            [cache], [out], False,
        )  # fmt: skip

    def _lower_convolution(self, o: G.Convolution) -> None:
        x, out = self.places[o.x.id], self.new(o.out)
        state = self.layout.state_offsets[o.state]
        self.emit(
            f"convolution-{'silu' if o.silu else ''}",
            {
                R.CONV_X: x, R.CONV_X_STRIDE: x.stride, R.CONV_Y: out, R.CONV_Y_STRIDE: out.stride,
                R.CONV_WIDTH: o.x.width, R.CONV_TAPS: len(o.weight), R.CONV_WEIGHT: floats(o.weight),
                R.CONV_BIAS: floats(o.bias), R.CONV_STATE: state,
            },
            [x], [out, f"state {o.state}"], False,
        )  # fmt: skip

    def _lower_linearattention(self, o: G.LinearAttention) -> None:
        if max(o.dim_k, o.dim_v) > R.MAX_STATE_DIM:
            most = R.MAX_STATE_DIM
            raise self._refused(f"linear attention with heads of more than {most} dimensions: not supported")
        q, k, v = (self.places[value.id] for value in (o.q, o.k, o.v))
        decay = self.places[o.decay.id] if isinstance(o.decay, G.Value) else None
        beta = None if o.beta is None else self.places[o.beta.id]
        out = self.new(o.out)
        rule, fading = "plain" if beta is None else "delta", "dimension" if o.fades_by_dimension else "head"
        self.emit(
            f"linear_attention-{rule}-{fading}",
            {
                R.LIN_Q: q, R.LIN_Q_STRIDE: q.stride, R.LIN_K: k, R.LIN_K_STRIDE: k.stride, R.LIN_V: v,
                R.LIN_V_STRIDE: v.stride, R.LIN_DECAY: decay or floats(o.decay),  # type: ignore[arg-type]
                R.LIN_DECAY_STRIDE: decay.stride if decay else 0, R.LIN_BETA: beta or 0,
                R.LIN_BETA_STRIDE: beta.stride if beta else 0, R.LIN_OUT: out, R.LIN_OUT_STRIDE: out.stride,
                R.LIN_HEADS: o.n_heads, R.LIN_KEY_HEADS: o.n_key_heads, R.LIN_TILED: int(o.tiled),
                R.LIN_DIM_K: o.dim_k, R.LIN_DIM_V: o.dim_v, R.LIN_SCALE: float(o.scale),
                R.LIN_STATE: self.layout.state_offsets[o.state], R.LIN_HEAD_BYTES: 4 * head_size(o),
            },
            [q, k, v, decay, beta], [out, f"state {o.state}"], False,
        )  # fmt: skip

    def _lower_selectivescan(self, o: G.SelectiveScan) -> None:
        x, time, b, c = (self.places[value.id] for value in (o.x, o.time, o.b, o.c))
        if o.n_state > R.MAX_STATE_DIM:
            raise self._refused(f"a scan with more than {R.MAX_STATE_DIM} numbers for each channel: not supported")
        out = self.new(o.out)
        # Groups of channels, the last one padded.
        groups = -(-o.x.width // R.SCAN_CHANNELS)
        padding = groups * R.SCAN_CHANNELS - o.x.width
        fading = np.pad(o.fading, ((0, padding), (0, 0))).reshape(groups, R.SCAN_CHANNELS, -1).swapaxes(1, 2)
        self.emit(
            "selective_scan-",
            {
                R.SCAN_X: x, R.SCAN_X_STRIDE: x.stride, R.SCAN_TIME: time, R.SCAN_TIME_STRIDE: time.stride,
                R.SCAN_B: b, R.SCAN_B_STRIDE: b.stride, R.SCAN_C: c, R.SCAN_C_STRIDE: c.stride, R.SCAN_OUT: out,
                R.SCAN_OUT_STRIDE: out.stride, R.SCAN_WIDTH: o.x.width, R.SCAN_DIM: o.n_state,
                R.SCAN_FADING: floats(fading), R.SCAN_KEPT: floats(np.pad(o.kept, (0, padding))),
                R.SCAN_STATE: self.layout.state_offsets[o.state],
            },
            [x, time, b, c], [out, f"state {o.state}"], False,
        )  # fmt: skip

    def _lower_wkv(self, o: G.WKV) -> None:
        if o.dim > R.MAX_STATE_DIM or o.dim % R.SCAN_CHANNELS:
            raise self._refused(f"heads of {o.dim} dimensions are not supported here")
        r, kept, k, v = (self.places[value.id] for value in (o.r, o.kept, o.k, o.v))
        a, b = (None if value is None else self.places[value.id] for value in (o.a, o.b))
        out = self.new(o.out)
        self.emit(
            f"wkv-{'plain' if a is None else 'delta'}",
            {
                R.WKV_R: r, R.WKV_R_STRIDE: r.stride, R.WKV_KEPT: kept, R.WKV_KEPT_STRIDE: kept.stride, R.WKV_K: k,
                R.WKV_K_STRIDE: k.stride, R.WKV_V: v, R.WKV_V_STRIDE: v.stride, R.WKV_A: a or 0,
                R.WKV_A_STRIDE: a.stride if a else 0, R.WKV_B: b or 0, R.WKV_B_STRIDE: b.stride if b else 0,
                R.WKV_OUT: out, R.WKV_OUT_STRIDE: out.stride, R.WKV_WIDTH: o.k.width, R.WKV_DIM: o.dim,
                R.WKV_STATE: self.layout.state_offsets[o.state],
            },
            [r, kept, k, v, a, b], [out, f"state {o.state}"], False,
        )  # fmt: skip

    def _lower_activate(self, o: G.Activate) -> None:
        gate, up = self.places[o.gate.id], self.places[o.up.id]
        self._produce(o.kind, o.out, gate, up, o.gate, factor=o.limit, row_weight=limits(o))

    def _lower_activatealone(self, o: G.ActivateAlone) -> None:
        self._produce(ALONE_KERNELS[o.kind], o.out, self.places[o.x.id], over=o.x, row_weight=floats(o.parameters))

    def _lower_gate(self, o: G.Gate) -> None:
        gate, x = self.places[o.gate.id], self.places[o.x.id]
        self._produce(f"gate-{o.kind}", o.out, gate, x, row_groups=o.gate.width)

    def _lower_affine(self, o: G.Affine) -> None:
        self._produce(
            "affine", o.out, self.places[o.x.id], row_weight=floats(o.weight), row_bias=floats(o.bias)
        )

    def _lower_clamp(self, o: G.Clamp) -> None:
        self._produce("clamp", o.out, self.places[o.x.id], factor=o.limit)

    def _lower_add(self, o: G.Add) -> None:
        self._produce("add", o.out, self.places[o.a.id], self.places[o.b.id])

    def _lower_mix(self, o: G.Mix) -> None:
        x, weights = self.places[o.x.id], self.places[o.weights.id]
        added = None if o.add is None else self.places[o.add.id]
        record = self._produce(
            "mix", o.out, x, weights, row_groups=o.n_out, row_x_size=o.weights.width // o.n_out, row_add=added or 0,
            row_add_stride=added.stride if added else 0,
        )  # fmt: skip
        if added is not None:
            record.reads.append(added)

    def _lower_mixbyscore(self, o: G.MixByScore) -> None:
        n = o.x.width // o.z.width
        if n > R.MAX_STREAMS:
            raise self._refused(f"more than {R.MAX_STREAMS} streams: not supported")
        x, z = self.places[o.x.id], self.places[o.z.id]
        self._produce("mix_by_score", o.out, x, z, factor=o.eps, row_groups=n, row_weight=floats(o.weight))

    def _lower_balance(self, o: G.Balance) -> None:
        self._produce("balance", o.out, self.places[o.x.id], factor=o.eps, row_groups=o.n, row_x_size=o.rounds)

    def _lower_dot(self, o: G.Dot) -> None:
        a, b = self.places[o.a.id], self.places[o.b.id]
        self._produce("dot", o.out, a, b, row_x_size=o.a.width // o.out.width)

    def _lower_matchmagnitude(self, o: G.MatchMagnitude) -> None:
        x, like = self.places[o.x.id], self.places[o.like.id]
        self._produce("match_magnitude", o.out, x, like, row_groups=o.x.width // o.like.width)

    def _lower_gaussiantopk(self, o: G.GaussianTopK) -> None:
        self._produce("gaussian_top_k", o.out, self.places[o.x.id], factor=o.deviations)

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


def floats(values: G.Constant | None) -> Any:
    """For a record's field: the values, or 0 for none."""
    return 0 if values is None else np.ascontiguousarray(values, np.float32)


def of_distances(biases: G.Constant | None) -> dict[int, object]:
    """The record's fields for biases by distance: the outermost on either side for a page more."""
    if biases is None:
        return {R.ATT_BIASES: 0, R.ATT_REACH: 0}
    reach, page = biases.shape[1] // 2, R.PAGE_POSITIONS
    return {R.ATT_BIASES: floats(np.pad(biases, ((0, 0), (page, page - 1)), "edge")), R.ATT_REACH: reach}


def attention_key(graph: G.Graph, operation: G.Attention, kind: str, threads: int) -> str:
    """The kernel for attention: with as many together of the query heads that share a key and value head as possible,
    but so that there is work for every thread."""
    layer = graph.cache_layers[operation.layer]
    group = layer.n_heads // layer.n_kv_heads
    most = max(min(R.MAX_HEADS_TOGETHER, layer.n_heads // threads), 1)
    together = max(n for n in range(1, most + 1) if group % n == 0)
    layout = "-rows" if layer.values_in_keys else ""
    return f"attention-{kind}-{together}{layout}{'' if operation.entries is None else '-entries'}"
