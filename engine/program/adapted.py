"""Adapters that differ from sequence to sequence: the program for steps in which some have one.

It is the usual program with two operations more for each matrix that any adapter changes: what the matrix has computed
is changed in place, of the rows that have an adapter. So others have the bits that they have without. Steps in which
nobody has one run the usual program, and cost nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrun.engine.kernels import records as R
from qrun.engine.program.arena import Place
from qrun.engine.program.lowering import Lowering
from qrun.formats import TensorInfo
from qrun.models import graph as G
from qrun.models.adapter import Adapter, target_of

DOWN, UP = ADAPTER_KERNELS = ("lora_down-", "lora_up-")


class SwitchedAdapters:
    """The matrices of adapters in float32, and which rows of a step of up to `batch` have which."""

    def __init__(self, adapters: Sequence[Adapter[TensorInfo]], batch: int) -> None:
        self._tables: dict[str, tuple[NDArray[np.int64], int]] = {}
        self.arrays: list[NDArray[np.float32]] = []
        """Whose addresses the tables have."""
        self._n_adapters = len(adapters)
        self._make_room(batch)
        for name in dict.fromkeys(name for adapter in adapters for name in adapter.changes):
            table = np.zeros((len(adapters), R.LORA_ADAPTER_BYTES // 8), np.int64)
            ranks = 0
            for row, adapter in zip(table, adapters, strict=True):
                if (change := adapter.changes.get(name)) is None:
                    continue
                a = np.ascontiguousarray(change.a.dequantize(), np.float32)
                b = np.ascontiguousarray(change.b.dequantize().T, np.float32)
                self.arrays += [a, b]
                row[R.LORA_A // 8], row[R.LORA_B // 8] = a.ctypes.data, b.ctypes.data
                row[R.LORA_RANK // 8], row[R.LORA_OFFSET // 8] = len(a), ranks
                row[R.LORA_FACTOR // 8 :][:1].view(np.float32)[0] = change.factor
                ranks += len(a)
            self._tables[name] = table, ranks

    def _make_room(self, batch: int) -> None:
        self.starts = np.zeros(batch + 1, np.int64)
        self.entries = np.zeros((batch * self._n_adapters, 2), np.int64)

    def beside(self, batch: int) -> SwitchedAdapters:
        """The same matrices for a program beside this one, whose steps have rows of their own."""
        other = copy.copy(self)
        other._make_room(batch)
        return other

    def table(self, name: str, scale: float) -> tuple[NDArray[np.int64], int] | None:
        """What adapters have for a matrix whose result is multiplied by `scale`, and the sum of their ranks."""
        if name not in self._tables:
            return None
        table, ranks = self._tables[name]
        if scale != 1.0:
            table = table.copy()
            table[:, R.LORA_FACTOR // 8 :][:, :1].view(np.float32)[:, 0] *= np.float32(scale)
        return table, ranks

    def fill(self, parts: Iterable[tuple[Sequence[tuple[int, float]], int]]) -> None:
        """The adapters, with their scales, of the sequences of a step, each with as many rows."""
        row = entry = 0
        scales = self.entries.view(np.float32)
        for adapters, count in parts:
            for _ in range(count):
                for number, scale in adapters:
                    self.entries[entry, 0] = number
                    scales[entry, 2] = scale
                    entry += 1
                row += 1
                self.starts[row] = entry


class AdaptedLowering(Lowering):
    """A lowering with what adapters add behind matmuls."""

    def __init__(self, *args: Any, adapters: SwitchedAdapters, **settings: Any) -> None:
        self._adapters = adapters
        self._waiting: list[tuple[G.Value, dict[int, Any], Place, Place]] = []
        """What is to be added to results of the same value, that of all of them at once: so threads wait once."""
        super().__init__(*args, **settings)

    def _end(self) -> None:
        self._add_changes()
        super()._end()

    def _lower(self, operation: G.Operation) -> None:
        alone = not isinstance(operation, G.Linear) or operation.out.id in self._residual
        if self._waiting and (alone or operation.x.id != self._waiting[0][0].id):  # type: ignore[union-attr]
            self._add_changes()
        super()._lower(operation)

    def _lower_linear(self, o: G.Linear) -> None:
        super()._lower_linear(o)
        found = self._adapters.table(target_of(o), o.scale)
        if found is None:
            return
        table, ranks = found
        x = self.places[o.x.id]
        out = self.places[self._residual[o.out.id][1].id if o.out.id in self._residual else o.out.id]
        inner = Place(self.arena.buffer(self.rows * ranks * 4, self.index, self.index), 0, ranks * 4)
        fields: dict[int, Any] = {
            R.LORA_X: x, R.LORA_X_STRIDE: x.stride, R.LORA_WIDTH: o.x.width, R.LORA_INNER: inner,
            R.LORA_INNER_STRIDE: inner.stride, R.LORA_RANKS: ranks, R.LORA_OUT: out, R.LORA_OUT_STRIDE: out.stride,
            R.LORA_OUT_WIDTH: o.out.width, R.LORA_ADAPTERS: table, R.LORA_STARTS: self._adapters.starts,
            R.LORA_ENTRIES: self._adapters.entries, R.LORA_IN_HEAD: int(self._in_head),
        }  # fmt: skip
        self.emit(DOWN, fields, [x], [inner], False)
        self._waiting.append((o.x, fields, inner, out))

    def _add_changes(self) -> None:
        """Before anything reads what they change."""
        for _, fields, inner, out in self._waiting:
            inner.buffer.last = self.index
            self.emit(UP, dict(fields), [inner, out], [out], False)
        self._waiting.clear()
