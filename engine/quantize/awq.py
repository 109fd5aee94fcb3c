"""AWQ: inputs that matter most get finer steps, by a scale for each of them that the graph takes back before.

Lin et al., arXiv:2306.00978. The columns of a matrix are multiplied by a scale s before they are rounded, and its
inputs divided by it: what a column with a large scale loses by rounding counts for less. The division costs nothing
where something before the matrix can take it over:

    a norm            its weight (and bias) / s; all that takes its rows gets the scale
    up, of a gate     act(gate) * up: the rows (and the bias) of up / s
    values            attention's rows are sums of values: the rows (and the bias) of v / s. Heads that share values
                      share the scale.

The graph says where that is so (`foldings`): nothing else takes these rows, each tensor has one use, and what lies
between is linear in what is divided. A norm without a weight, or one that several layers share, experts, and matrices
that hold several (`attn_qkv`, gate and up in one) have no scale.

The scale is the root mean square of each input to a power, divided so that the largest and the smallest are as far from
1. The power is found by search: the one with the least error of the matrices' own outputs, e^T H e over some of
their rows, with H the sum of x x^T over the inputs. A power of 0 leaves all as it is, and is kept where nothing is
better.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrun.engine.quantize.encoder import Encoder
from qrun.engine.quantize.imatrix import FLOOR, Imatrix
from qrun.engine.quantize.mixes import layer_of
from qrun.engine.quantize.source import Source, SourceTensor
from qrun.formats import FormatError, GGUFWriter, TensorType, ValueType
from qrun.formats.blocks import dequantize
from qrun.models import graph as G
from qrun.models.adapter import RESCALED

F32Array = NDArray[np.float32]

# Powers of the inputs' size that are tried.
POWERS = np.linspace(0, 1, 21)
# Rows of a matrix by which they are judged, at most; evenly spread, in groups of neighbours.
JUDGED, NEIGHBOURS = 512, 8
# Scales are no further from 1: types keep the scales of blocks as half floats.
FURTHEST = 64.0

# A kind with a limit has one for up, too.
LINEAR_IN_UP = ("silu", "gelu", "relu")


@dataclass(frozen=True, eq=False)
class Folding:
    """A place for scales. columns: matrices whose columns are multiplied. rows: tensors whose rows (or if they are
    vectors, elements) are divided. channels: int [width of the matrices], which of those rows each column comes from.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    channels: NDArray[np.intp]

    @property
    def n_channels(self) -> int:
        """How many scales there are."""
        return int(self.channels.max()) + 1


def foldings(graph: G.Graph, tensors: Mapping[str, SourceTensor]) -> list[Folding]:
    """All places of a model. tensors: of its file."""
    made: dict[int, G.Operation] = {}
    takers: dict[int, list[G.Operation]] = {}
    layers: dict[int, int] = {}
    for each in graph.operations:
        made[each.out.id] = each
        for field in fields(each):
            value = getattr(each, field.name)
            if isinstance(value, G.Value) and field.name != "out":
                takers.setdefault(value.id, []).append(each)
        if isinstance(each, G.Attention):
            layers[each.layer] = layers.get(each.layer, 0) + 1
    outside = {value.id for value in (graph.logits, graph.hidden) if value is not None}

    def sole(name: str) -> bool:
        return name in tensors and graph.uses.get(name) == 1

    def vectors(name: str, bias: G.Constant | None) -> list[str] | None:
        """Of a norm or a matrix: its tensors whose rows are to be divided; None if that cannot be."""
        names = [f"{name}.weight", *([f"{name}.bias"] if bias is not None else [])]
        return names if all(map(sole, names)) else None

    def producer(value: G.Value, taker: G.Operation) -> list[str] | None:
        """Of rows that a matrix makes for this operation alone."""
        operation = made.get(value.id)
        if not isinstance(operation, G.Linear) or takers[value.id] != [taker] or value.id in outside:
            return None
        name = operation.weight.name
        return vectors(name.removesuffix(".weight"), operation.bias) if len(operation.weight.shape) == 2 else None

    result: list[Folding] = []
    for id, operations in takers.items():
        if id in outside or not all(isinstance(operation, G.Linear) for operation in operations):
            continue
        names = tuple(operation.weight.name for operation in operations if isinstance(operation, G.Linear))
        if not all(sole(name) and layer_of(name) >= 0 and len(tensors[name].shape) == 2 for name in names):
            continue
        operation: G.Operation | None = made.get(id)
        while isinstance(operation, G.Gate):  # linear in what it lets through
            if takers[operation.x.id] != [operation]:
                break
            operation = made.get(operation.x.id)
        if operation is None or operation.out.id in outside:
            continue
        rows: list[str] | None = None
        channels = np.arange(operation.out.width)
        if isinstance(operation, G.RMSNorm | G.LayerNorm):
            if operation.name is not None and operation.weight is not None and operation.groups == 1:
                rows = vectors(operation.name, operation.bias)
        elif isinstance(operation, G.Activate) and operation.kind in LINEAR_IN_UP:
            if operation.up.id != operation.gate.id:
                rows = producer(operation.up, operation)
        elif isinstance(operation, G.Attention) and operation.v is not None and operation.entries is None:
            cache = graph.cache_layers[operation.layer]
            if layers[operation.layer] == 1 and not cache.values_in_keys:
                rows = producer(operation.v, operation)
                head = channels // cache.head_dim_v // (cache.n_heads // cache.n_kv_heads)
                channels = head * cache.head_dim_v + channels % cache.head_dim_v
        if rows is not None and len(channels) == tensors[names[0]].row:
            result.append(Folding(names, tuple(rows), channels))
    return result


class Search:
    """Finds the scales of one folding after the other."""

    def __init__(self, types: Mapping[str, TensorType], encoder: Encoder, source: Source) -> None:
        """types: what each matrix is going to be."""
        self._types, self._encoder, self._source = types, encoder, source

    def scales(self, folding: Folding, moments: F32Array) -> F32Array | None:
        """float32 [channels], or None if no scale is better than all of them. moments: the sum of x x^T."""
        squares = np.diag(moments).astype(np.float64)
        n = folding.n_channels
        size = np.sqrt(np.bincount(folding.channels, squares, n) / np.bincount(folding.channels, minlength=n))
        if not size.max() > 0:
            return None
        size = np.maximum(size, size[size > 0].min())
        matrices = [(self._types[name], _sample(self._source.tensors[name])) for name in folding.columns
                    if name in self._types]  # fmt: skip
        best: F32Array | None = None
        least = np.inf
        for power in POWERS:
            powers = size**power
            powers /= np.sqrt(powers.max() * powers.min())
            scales = np.clip(powers, 1 / FURTHEST, FURTHEST).astype(np.float32)
            error = sum(self._error(type, rows, scales[folding.channels], moments) for type, rows in matrices)
            if error < least:
                best, least = (scales if power else None), error
        return best

    def _error(self, type: TensorType, rows: F32Array, scales: F32Array, moments: F32Array) -> float:
        importance = np.diag(moments) / np.square(scales)
        importance = np.maximum(importance / importance.mean(dtype=np.float64), FLOOR).astype(np.float32)
        encoded = self._encoder.encode(rows * scales, type, importance)
        miss = dequantize(encoded.raw, type, rows.shape) / scales - rows
        return float(np.einsum("ij,ij->", miss @ moments, miss, dtype=np.float64))


def _sample(tensor: SourceTensor) -> F32Array:
    """Some rows, evenly spread."""
    blocks = max(1, min(tensor.n_rows, JUDGED) // NEIGHBOURS)
    starts = np.unique(np.linspace(0, max(0, tensor.n_rows - NEIGHBOURS), blocks).astype(int))
    return np.concatenate([tensor.rows(start, min(start + NEIGHBOURS, tensor.n_rows)) for start in map(int, starts)])


class ScaledSource:
    """A model with scales folded into it, which computes the same: a source like the one that it is made of, which it
    does not close. Its vectors are float32, so that they lose nothing."""

    def __init__(self, base: Source, scales: Sequence[tuple[Folding, F32Array]]) -> None:
        self.base = base
        self.path, self.files, self.notices = base.path, base.files, base.notices
        self.metadata: Mapping[str, Any] = base.metadata
        self.metadata_types: Mapping[str, tuple[ValueType, ValueType | None]] = base.metadata_types
        self.columns: dict[str, F32Array] = {}
        divisors: dict[str, F32Array] = {}
        for folding, found in scales:
            self.columns |= dict.fromkeys(folding.columns, found[folding.channels])
            divisors |= dict.fromkeys(folding.rows, found)
        tensors = dict(base.tensors)
        for name in self.columns.keys() | divisors.keys():
            tensor = tensors[name]
            is_vector = tensor.n_rows == 1
            columns, rows = self.columns.get(name), divisors.get(name)
            if is_vector and rows is not None:
                columns, rows = np.float32(1) / rows, None
            type = TensorType.F32 if is_vector else tensor.type
            tensors[name] = _ScaledTensor(name, type, tensor.shape, tensor, columns, rows)
        self.tensors: Mapping[str, SourceTensor] = tensors

    def importance(self, imatrix: Imatrix) -> Imatrix:
        """That of the inputs as they are now."""
        values: dict[str, F32Array] = dict(imatrix.values)
        for name in values.keys() & self.columns.keys():
            values[name] = (values[name] / np.square(self.columns[name])).astype(np.float32)
        return replace(imatrix, values=values)

    def writer(self, path: str | os.PathLike[str]) -> GGUFWriter:
        """Has the metadata of the model, and says if it has scales."""
        writer = self.base.writer(path)
        if self.columns:
            writer.set_metadata(RESCALED, True, ValueType.BOOL)
        return writer

    def close(self) -> None:
        """Let the tensors go."""
        self.tensors = {}


@dataclass(frozen=True, eq=False)
class _ScaledTensor(SourceTensor):
    """Another tensor, its columns multiplied and its rows divided."""

    base: SourceTensor
    columns: F32Array | None
    divisors: F32Array | None

    @property
    def copyable(self) -> bool:
        return False

    def rows(self, start: int, end: int) -> F32Array:
        rows = self.base.rows(start, end)
        if self.columns is not None:
            rows = rows * self.columns
        if self.divisors is not None:
            rows = rows / self.divisors[start:end, None]
        return rows

    def forget(self) -> None:
        self.base.forget()

    def error(self, reason: str) -> FormatError:
        return self.base.error(reason)
