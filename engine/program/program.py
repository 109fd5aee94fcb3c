"""The program: a graph's records in memory, with all addresses in place.

A program has a body, up to the rows whose logits are wanted, and a head. They lie one behind the other, so that a
step of one row runs as one piece.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qrun.engine.kernels import in_parts
from qrun.engine.kernels import records as R
from qrun.engine.program.arena import Place, rows_of
from qrun.engine.program.early_selection import hidden_of_all_rows
from qrun.engine.program.lowering import Lowering
from qrun.engine.program.record import InRecord, InStep, Record


class Addresses(Protocol):
    """Kernels by key, as `native.compiler.Kernels` has them."""

    def __getitem__(self, key: str, /) -> int: ...


class Program:
    """The records of `lowering`, linked: kernels, the step's record and the arena have addresses now.

    body, head, whole: int64 [operations, RECORD_BYTES / 8], views of one array. The program holds all that the records
    have addresses of: kernels, weights, the arena.
    logits: float32 [head_rows, n_vocab], where the head leaves its result unless `leave_logits` was called. They lie
    outside of the arena: of a large vocabulary they take more than all the rest, and mostly nothing.
    peaks: float32 [head_rows, n], likewise, where it leaves what `kernels.peaks` finds; n is 0 for small vocabularies.
    hidden: float32 [batch, width], where the body leaves the hidden states for draft layers, or [head_rows, width] of
    the head; inputs: float32 [batch, width], where rows from outside go. Both empty in a graph without.
    beside: another program, which never runs at the same time.
    Where threads have to wait for each other is decided here, since it depends on where values lie.
    """

    def __init__(
        self, lowering: Lowering, kernels: Addresses, step_address: int, beside: Program | None = None
    ) -> None:
        self.records, self.arena, self.rope_tables = lowering.records, lowering.arena, lowering.rope_tables
        place = lowering.logits
        # Not where they are part of something wider.
        self._apart = place.stride == 4 * lowering.graph.logits.width and place.offset == 0
        if self._apart:
            place.buffer.size = 0
        within, what = beside.arena if beside else None, f"a step of {lowering.batch} tokens"
        self.arena.place(within, path=lowering.graph.path, what=what)
        place_barriers(self.records, lowering.n_body)
        self._held: list[object] = [kernels]  # whose addresses the records have
        self.whole = np.zeros((len(self.records), R.RECORD_BYTES // 8), np.int64)
        self._counters = np.zeros(len(self.records), np.int64)
        self.whole[:, R.OP_COUNTER // 8] = self._counters.ctypes.data + 8 * np.arange(len(self.records))
        numbers = {id(record): index for index, record in enumerate(self.records)}
        n = lowering.head_rows
        self.logits = rows_of(n, place.stride // 4) if self._apart else self._view(place, n)
        self.peaks = rows_of(n, lowering.peaks.stride // 4 if lowering.peaks else 0)
        self._to_logits: list[NDArray[np.int64]] = []
        self._to_peaks: list[NDArray[np.int64]] = []
        for row, record in zip(self.whole, self.records, strict=True):
            row[R.OP_KERNEL // 8] = kernels[record.kernel]
            row[R.OP_BARRIER // 8] = record.barrier
            row[R.OP_IN_PARTS // 8] = in_parts(record.kernel)
            for offset, value in record.fields.items():
                if isinstance(value, float):
                    row[offset // 8 : offset // 8 + 1].view(np.float32)[0] = value
                elif isinstance(value, np.ndarray):
                    self._held.append(value)
                    row[offset // 8] = value.ctypes.data
                elif isinstance(value, Place) and value.buffer is place.buffer and self._apart:
                    self._to_logits.append(row[offset // 8 :][:1])
                elif value is lowering.peaks:
                    self._to_peaks.append(row[offset // 8 :][:1])
                elif isinstance(value, Place):
                    row[offset // 8] = self._address(value)
                elif isinstance(value, InStep):
                    row[offset // 8] = step_address + value.offset
                elif isinstance(value, InRecord):
                    number = numbers[id(value.operation)]
                    row[offset // 8] = self.whole.ctypes.data + number * R.RECORD_BYTES + value.offset
                else:
                    row[offset // 8] = value
        self.leave_logits(self.logits, self.peaks)
        self._link_prefetch()
        self.body, self.head = self.whole[: lowering.n_body], self.whole[lowering.n_body :]
        self._ends = [i for i, record in enumerate(self.records, 1) if record.barrier]
        for start, end in itertools.pairwise([0, *self._ends]):
            if all(record.by_rows for record in self.records[start:end]):
                self.whole[start, R.OP_IN_PARTS // 8] = R.IN_PARTS_BY_ROWS
        self.attentions = frozenset(
            i for i, record in enumerate(self.records)
            if record.kernel.partition("-")[0] == "attention" and record.barrier and (not i or i in self._ends)
        )  # fmt: skip
        """The attentions, by their places in `whole`, that no other operation runs beside."""
        self.hidden_of_all_rows = hidden_of_all_rows(lowering.graph)
        hidden_rows = lowering.batch if self.hidden_of_all_rows else lowering.head_rows
        self.hidden = self._view(lowering.hidden, hidden_rows)
        self.inputs = self._view(lowering.inputs, lowering.batch)

    def arrays(self) -> list[NDArray[Any]]:
        """Those whose addresses the records have: weights and constants, and memory of the program's own."""
        values = (value for record in self.records for value in record.fields.values())
        return [value for value in values if isinstance(value, np.ndarray)]

    def piece(self, operations: NDArray[np.int64], start: int, count: int) -> int:
        """Where a piece of `body`, `head` or `whole` ends that starts at an operation and has about `count` of them."""
        first = len(self.body) if operations is self.head else 0
        index = bisect.bisect_left(self._ends, first + min(start + count, len(operations)))
        return self._ends[index] - first

    def leave_logits(self, out: NDArray[np.float32], peaks: NDArray[np.float32]) -> bool:
        """From now on the head leaves the logits of as many rows here as it is run on, and their peaks. False where it
        cannot."""
        assert peaks.flags.c_contiguous and peaks.shape[1:] == self.peaks.shape[1:] and len(peaks) == len(out)
        for field in self._to_peaks:
            field[0] = peaks.ctypes.data
        assert out.flags.c_contiguous and out.dtype == np.float32 and out.shape[1:] == self.logits.shape[1:]
        for field in self._to_logits:
            field[0] = out.ctypes.data
        return self._apart

    def _view(self, place: Place | None, rows: int) -> NDArray[np.float32]:
        if place is None:
            return np.empty((rows, 0), np.float32)
        pointer = ctypes.cast(self._address(place), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (rows, place.stride // 4))

    def _address(self, place: Place) -> int:
        return self.arena.address + place.buffer.offset + place.offset

    def _link_prefetch(self) -> None:
        """Tell each matmul with what the next one begins."""
        records = zip(self.whole, self.records, strict=True)
        matmuls = [row for row, record in records if record.kernel.startswith("matmul")]
        for row, following in zip(matmuls, [*matmuls[1:], matmuls[0]], strict=True):
            row[R.MM_NEXT // 8] = following[R.MM_WEIGHTS // 8]
            row[R.MM_NEXT_BYTES // 8] = following[R.MM_CHUNK // 8] * following[R.MM_ROW_BYTES // 8]


def place_barriers(records: list[Record], n_body: int) -> None:
    """A barrier where an operation would meet what other threads have not finished reading or writing; and before the
    head, which begins with `n_body`: it has rows of its own."""
    pending: list[Record] = []
    run: list[Record] = []  # of these, the newest, all in parts: the same thread does a part of each
    for index, record in enumerate(records):
        if index == n_body or any(_conflict(earlier, record, earlier in run) for earlier in pending):
            records[index - 1].barrier = True
            pending, run = [], []
        pending.append(record)
        run = [*run, record] if in_parts(record.kernel) else []
    records[-1].barrier = True


def _conflict(earlier: Record, later: Record, in_a_run: bool) -> bool:
    def touch(a: object, b: object) -> bool:
        if not isinstance(a, Place) or not isinstance(b, Place):
            return a == b
        if a.buffer is b.buffer:
            # The same rows: each part meets only its own.
            return not (in_a_run and earlier.by_rows and later.by_rows)
        return a.buffer.offset < b.buffer.end and b.buffer.offset < a.buffer.end

    writes = any(touch(a, b) for a in earlier.writes for b in [*later.reads, *later.writes])
    return writes or any(touch(a, b) for a in earlier.reads for b in later.writes)
