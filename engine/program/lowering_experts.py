"""Lowering a mixture of experts: router, routing, the experts' matmuls over slots, and the weighted sum.

See `kernels.experts` for what slots are. A matrix that an adapter changes is three matmuls instead of one: itself, the
change's A, and its B, which adds what the first one gave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np

from qrun.engine.kernels import records as R
from qrun.engine.program.arena import Place
from qrun.engine.program.record import InRecord, Routing
from qrun.engine.program.record_writer import ALONE_KERNELS, RecordWriter, limits
from qrun.models import graph as G


def lower_experts(lowering: RecordWriter, operation: G.MoE) -> None:
    """Append the records of a mixture of experts."""
    _ExpertsLowering(lowering, operation).run()


# Rows for matmuls: where they lie, packed in this way.
Packed = Callable[[str], Place]


class _ExpertsLowering:
    """What is placed here lives within the one operation only."""

    def __init__(self, lowering: RecordWriter, operation: G.MoE) -> None:
        self.lowering, self.moe = lowering, operation
        self.here = lowering.index
        self.rows = lowering.rows
        n_experts, self.width, self.ffn = operation.down.shape
        self.slots = self.rows * operation.n_used + n_experts * (lowering.target.columns - 1)
        self.n_experts = n_experts

    def run(self) -> None:
        """All records, in order."""
        moe = self.moe
        bias = None if moe.router_bias is None else np.ascontiguousarray(moe.router_bias, np.float32)
        self.ranges: Place | None = None
        self.n_slots: InRecord | None = None
        self.lowering.taken(moe.router, moe.router_x or moe.x)
        logits = self._product(moe.router, self._rows_packed, self.rows, bias)
        self._route(logits)
        assert self.ranges is not None
        routing = Routing(self.chosen, self.ranges, moe.n_used, by_slot=False)
        weights = [weight for weight in moe.matrices if weight is not moe.down]
        self.lowering.taken_by_experts(weights, self.lowering.places[moe.x.id], routing)
        to_slots = cache(self._to_slots)
        products = [self._product(weight, to_slots, self.slots) for weight in weights]
        if moe.weigh_inputs:  # what a matrix makes of a multiple is the multiple of what it makes
            for weight, product in zip(weights, products, strict=True):
                self._weigh(product, weight.shape[1])
        gate = products[0]
        if moe.up is moe.gate:  # the rows of both, side by side
            products.append(Place(gate.buffer, gate.offset + 4 * self.ffn, gate.stride))
        inner = self._activated(gate, products[-1])
        self.lowering.taken_by_experts([moe.down], gate, replace(routing, by_slot=True))
        down = self._product(moe.down, inner, self.slots)
        self._sum(down)

    def _memory(self, size: int) -> Place:
        return Place(self.lowering.arena.buffer(size, self.here, self.here), 0, 0)

    def _floats(self, count: int, width: int) -> Place:
        return Place(self.lowering.arena.buffer(count * width * 4, self.here, self.here), 0, width * 4)

    def _rows_packed(self, packing: str) -> Place:
        return self.lowering.packed_input(self.moe.router_x or self.moe.x, packing)

    def _product(self, weight: G.Weight, x: Packed, count: int, bias: object = None) -> Place:
        """Rows through a matrix and its changes: float32 [count, rows of the matrix]."""
        lowering, height = self.lowering, weight.shape[-2]
        out = self._floats(count, height)
        lowering.matmul(weight, out, x(lowering.packing(weight)), ranges=self.ranges, bias=bias)
        for adjustment in self.moe.adjustments:
            if adjustment.weight is weight:
                self._adjust(out, height, adjustment)
        for change in self.moe.changes:
            if change.weight is not weight:
                continue
            inner, total = self._floats(count, change.a.shape[-2]), self._floats(count, height)
            lowering.matmul(change.a, inner, x(lowering.packing(change.a)), ranges=self.ranges)
            packed = self._pack(inner, change.a.shape[-2], lowering.packing(change.b), count)
            lowering.matmul(change.b, total, packed, ranges=self.ranges, residual=out, scale=change.scale)
            out = total
        return out

    def _adjust(self, x: Place, width: int, adjustment: G.Adjustment) -> None:
        """Scales and biases of the experts, in place."""
        scales, biases = (
            0 if values is None else np.ascontiguousarray(values, np.float32)
            for values in (adjustment.scale, adjustment.bias)
        )
        self.lowering.emit(
            "adjust_experts-",
            {
                R.MOE_X: x, R.MOE_X_STRIDE: x.stride, R.MOE_WIDTH: width, R.MOE_RANGES: self.ranges,
                R.MOE_SCALES: scales, R.MOE_BIASES: biases,
            },
            [x, self.ranges], [x], False,
        )  # fmt: skip

    def _pack(self, x: Place, width: int, packing: str, count: int) -> Place:
        place = self.lowering.packed_place(G.Value(-1, width), packing, count, self.here)
        record = self.lowering.row_operation("pack", x, width, x, packed=(packing, place), count=self.n_slots)
        record.writes = [place]
        record.by_rows = self.n_slots is None  # else its rows are slots
        return place

    def _route(self, logits: Place) -> None:
        """Which rows go to which expert; from here on, matmuls go over slots."""
        moe, rows, memory = self.moe, self.rows, self._memory
        self.chosen, self.weights = memory(rows * moe.n_used * 8), memory(rows * moe.n_used * 4)
        n_choices = moe.router.shape[0]
        counts, chances = memory(n_choices * 8), memory(n_choices * 8)
        selection = 0 if moe.selection_bias is None else np.ascontiguousarray(moe.selection_bias, np.float32)
        self.ranges = memory(8 + 24 * max(self.n_experts, moe.n_used))
        route = self.lowering.emit(
            "route-",
            {
                R.MOE_LOGITS: logits, R.MOE_LOGITS_STRIDE: logits.stride, R.MOE_EXPERTS: n_choices,
                R.MOE_USED: moe.n_used, R.MOE_NORMALIZE: int(moe.normalize),
                R.MOE_GATING: R.GATINGS.index(moe.gating), R.MOE_SCALE: float(moe.scale), R.MOE_SLOTS: self.chosen,
                R.MOE_WEIGHTS: self.weights, R.MOE_CHANCES: chances, R.MOE_COUNTS: counts, R.MOE_RANGES: self.ranges,
                R.MOE_SELECTION: selection, R.MOE_GROUPS: moe.n_groups, R.MOE_GROUPS_USED: moe.n_groups_used,
                R.MOE_TOGETHER: moe.together, R.MOE_BY_TOKEN: 0 if moe.by_token is None else moe.by_token,
            },
            [logits], [self.chosen, self.weights, chances, counts, self.ranges], False,
        )  # fmt: skip
        self.n_slots = InRecord(route, R.MOE_N_SLOTS)

    def _to_slots(self, packing: str) -> Place:
        """The rows of x, each in the slots of its experts."""
        x = self.lowering.places[self.moe.x.id]
        place = self.lowering.packed_place(self.moe.x, packing, self.slots, self.here)
        self.lowering.emit(
            f"to_experts-{packing}",
            {
                R.MOE_X: x, R.MOE_X_STRIDE: x.stride, R.MOE_Y: place, R.MOE_WIDTH: self.width,
                R.MOE_SLOTS: self.chosen, R.MOE_USED: self.moe.n_used,
            },
            [x, self.chosen], [place], False,
        )  # fmt: skip
        return place

    def _activated(self, gate: Place, up: Place) -> Packed:
        """act(gate) * up, in the place of gate, packed at once for the matrix that takes it first. Without a gate, both
        are up."""
        first = self.lowering.packing(self.moe.down)
        place = self.lowering.packed_place(G.Value(-1, self.ffn), first, self.slots, self.here)
        kernel = ALONE_KERNELS[self.moe.kind] if self.moe.gate is None else self.moe.kind
        record = self.lowering.row_operation(
            kernel, gate, self.ffn, gate, up, packed=(first, place), count=self.n_slots, factor=self.moe.limit,
            row_weight=limits(self.moe),
        )  # fmt: skip
        record.by_rows = False  # its rows are slots
        others = cache(lambda packing: self._pack(gate, self.ffn, packing, self.slots))
        return lambda packing: place if packing == first else others(packing)

    def _weigh(self, x: Place, width: int) -> None:
        """Slots times their weights, in place."""
        self.lowering.emit(
            "weigh_experts-",
            {
                R.MOE_X: x, R.MOE_X_STRIDE: x.stride, R.MOE_WIDTH: width, R.MOE_SLOTS: self.chosen,
                R.MOE_WEIGHTS: self.weights, R.MOE_USED: self.moe.n_used,
            },
            [x, self.chosen, self.weights], [x], False,
        )  # fmt: skip

    def _sum(self, down: Place) -> None:
        out = self.lowering.new(self.moe.out)
        self.lowering.emit(
            "from_experts-",
            {
                R.MOE_X: down, R.MOE_X_STRIDE: down.stride, R.MOE_Y: out, R.MOE_Y_STRIDE: out.stride,
                R.MOE_WIDTH: self.width, R.MOE_SLOTS: self.chosen,
                R.MOE_WEIGHTS: 0 if self.moe.weigh_inputs else self.weights, R.MOE_USED: self.moe.n_used,
            },
            [down, self.chosen, self.weights], [out], False,
        )  # fmt: skip
