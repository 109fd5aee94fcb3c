"""A mixture of experts: which rows go to which expert, and the way there and back.

Routing gives every (row, chosen expert) a slot, so that an expert's rows stand in consecutive slots, beginning on a
panel's first column: then the experts' matrices are one matmul with a range for each expert that has rows. A row's
results are added in the order in which its experts were chosen, the best first.
"""

from __future__ import annotations

from collections.abc import Callable

from qrun.engine.kernels import records as R
from qrun.engine.kernels.columns import first_row, packer_of
from qrun.engine.kernels.rows import GATES
from qrun.engine.simd import operations as v

Kernel = Callable[[int, int, int], None]

# Scores of experts that are out, as their groups are, and of those that have been chosen already.
OUT, CHOSEN = -1e30, -2e30
# What weights are divided by at least: the least that float16 holds in full precision.
LEAST_TOTAL = 6.103515625e-5
# Of what a root is taken at least, so that it has one.
LEAST_SOFTPLUS = 1e-30


def route(_: str) -> Kernel:
    """Choose experts from the router's logits: slots, weights and ranges. It is done in one part, in microseconds."""
    panel_columns = v.target().columns
    softplus = GATES["softplus"]

    @v.helper
    def sigmoid(value):  # type: ignore[no-untyped-def]
        one = v.float32(1.0)
        return one / (one + v.first_lane(v.exp(v.splat(-value))))

    @v.helper
    def softmax(values, chances, n):  # type: ignore[no-untyped-def]
        """Shares of a whole from logits, maybe in their place."""
        largest = v.load_f32(values)
        for i in range(1, n):
            largest = max(largest, v.load_f32(values + 4 * i))
        total = v.float32(0.0)
        for i in range(n):
            chance = v.first_lane(v.exp(v.splat(v.load_f32(values + 4 * i) - largest)))
            v.store_f32(chances + 4 * i, chance)
            total += chance
        for i in range(n):
            v.store_f32(chances + 4 * i, v.load_f32(chances + 4 * i) / total)

    @v.helper
    def gate(logits, chances, n_experts, gating):  # type: ignore[no-untyped-def]
        """Probabilities from logits; where only those of the chosen count, the logits as they are."""
        if gating == R.SOFTMAX:
            softmax(logits, chances, n_experts)
            return
        for i in range(n_experts):
            value = v.load_f32(logits + 4 * i)
            if gating == R.SIGMOID:
                v.store_f32(chances + 4 * i, sigmoid(value))
            elif gating == R.SQRT_SOFTPLUS:
                chance = max(v.first_lane(softplus(v.splat(value))), v.float32(LEAST_SOFTPLUS))
                v.store_f32(chances + 4 * i, chance * v.inverse_sqrt(chance))
            else:
                v.store_f32(chances + 4 * i, value)

    @v.helper
    def gate_chosen(weights, n_used, gating):  # type: ignore[no-untyped-def]
        """Probabilities of the chosen from their logits, in place."""
        if gating == R.SOFTMAX_OF_CHOSEN:
            softmax(weights, weights, n_used)
        elif gating == R.SIGMOID_OF_CHOSEN:
            for i in range(n_used):
                v.store_f32(weights + 4 * i, sigmoid(v.load_f32(weights + 4 * i)))

    @v.helper
    def score(chances, scores, n_experts, selection):  # type: ignore[no-untyped-def]
        """What experts are chosen by: their probabilities, with a bias for each if there are some."""
        for i in range(n_experts):
            value = v.load_f32(chances + 4 * i)
            if selection != 0:
                value += v.load_f32(selection + 4 * i)
            v.store_f32(scores + 4 * i, value)

    @v.helper
    def leave_groups(scores, n_experts, n_groups, n_used):  # type: ignore[no-untyped-def]
        """Of neighbouring experts that make a group, only the best groups stay: by the sum of their two best scores."""
        size = n_experts // n_groups
        for _ in range(n_groups - n_used):
            worst = -1
            least = v.float32(0.0)
            for group in range(n_groups):
                first = v.float32(OUT)
                second = v.float32(OUT)
                for i in range(group * size, (group + 1) * size):
                    value = v.load_f32(scores + 4 * i)
                    if value > first:
                        second = first
                        first = value
                    elif value > second:
                        second = value
                total = first + (second if size > 1 else v.float32(0.0))
                if first > v.float32(OUT) and (worst < 0 or total <= least):
                    worst = group
                    least = total
            for i in range(worst * size, (worst + 1) * size):
                if worst >= 0:
                    v.store_f32(scores + 4 * i, v.float32(OUT))

    def kernel(op, step, part):  # type: ignore[no-untyped-def]
        if part != 0:
            return
        n_rows = v.load_i64(step + R.N_ROWS)
        n_experts = v.load_i64(op + R.MOE_EXPERTS)
        n_used = v.load_i64(op + R.MOE_USED)
        slots = v.load_i64(op + R.MOE_SLOTS)  # first the chosen experts, then their slots
        weights = v.load_i64(op + R.MOE_WEIGHTS)
        chances = v.load_i64(op + R.MOE_CHANCES)
        scores = chances + 4 * n_experts
        by_token = v.load_i64(op + R.MOE_BY_TOKEN)
        counts = v.load_i64(op + R.MOE_COUNTS)
        ranges = v.load_i64(op + R.MOE_RANGES)
        for expert in range(n_experts):
            v.store_i64(counts + 8 * expert, 0)
        for row in range(n_rows):
            logits = v.load_i64(op + R.MOE_LOGITS) + row * v.load_i64(op + R.MOE_LOGITS_STRIDE)
            gate(logits, chances, n_experts, v.load_i64(op + R.MOE_GATING))
            score(chances, scores, n_experts, v.load_i64(op + R.MOE_SELECTION))
            if v.load_i64(op + R.MOE_GROUPS) > 1:
                leave_groups(scores, n_experts, v.load_i64(op + R.MOE_GROUPS), v.load_i64(op + R.MOE_GROUPS_USED))
            token = v.load_i64(v.load_i64(step + R.TOKENS) + 8 * row)
            for i in range(row * n_used, (row + 1) * n_used):
                best = 0
                if by_token != 0:
                    best = v.load_i32(by_token + 4 * (token * n_used + i - row * n_used))
                else:
                    for expert in range(1, n_experts):
                        if v.load_f32(scores + 4 * expert) > v.load_f32(scores + 4 * best):
                            best = expert
                    v.store_f32(scores + 4 * best, v.float32(CHOSEN))
                best = best // v.load_i64(op + R.MOE_TOGETHER)
                v.store_f32(weights + 4 * i, v.load_f32(chances + 4 * best))
                v.store_i64(slots + 8 * i, best)
                v.store_i64(counts + 8 * best, v.load_i64(counts + 8 * best) + 1)
            gate_chosen(weights + 4 * row * n_used, n_used, v.load_i64(op + R.MOE_GATING))
            total = v.float32(0.0)
            for i in range(row * n_used, (row + 1) * n_used):
                total += v.load_f32(weights + 4 * i)
            factor = v.load_f32(op + R.MOE_SCALE)
            if v.load_i64(op + R.MOE_NORMALIZE) != 0:
                factor = factor / max(total, v.float32(LEAST_TOTAL))
            for i in range(row * n_used, (row + 1) * n_used):
                v.store_f32(weights + 4 * i, v.load_f32(weights + 4 * i) * factor)
        n_ranges = 0
        first = 0
        columns = 1 if n_rows == 1 else panel_columns
        for expert in range(n_experts):
            count = v.load_i64(counts + 8 * expert)
            v.store_i64(counts + 8 * expert, first)
            # A single row that chose an expert twice goes there in two columns, each packed for itself.
            together = 1 if n_rows == 1 else count
            for _ in range(0, count, max(together, 1)):
                entry = ranges + 8 + 24 * n_ranges
                v.store_i64(entry, expert)
                v.store_i64(entry + 8, first)
                v.store_i64(entry + 16, together)
                n_ranges += 1
                first += (together + columns - 1) // columns * columns
        v.store_i64(ranges, n_ranges)
        v.store_i64(op + R.MOE_N_SLOTS, first)
        for i in range(n_rows * n_used):
            expert = v.load_i64(slots + 8 * i)
            slot = v.load_i64(counts + 8 * expert)
            v.store_i64(slots + 8 * i, slot)
            v.store_i64(counts + 8 * expert, slot + 1)

    return kernel


def to_experts(packing: str) -> Kernel:
    """Pack each row of x into the slots of its experts."""
    packer = packer_of(packing)
    panel_columns = v.target().columns

    def kernel(op, step, part):  # type: ignore[no-untyped-def]
        n_rows = v.load_i64(step + R.N_ROWS)
        parts = v.load_i64(step + R.STEP_PARTS)
        n_used = v.load_i64(op + R.MOE_USED)
        columns = 1 if n_rows == 1 else panel_columns
        for row in range(first_row(n_rows, part, parts), first_row(n_rows, part + 1, parts)):
            x = v.load_i64(op + R.MOE_X) + row * v.load_i64(op + R.MOE_X_STRIDE)
            for i in range(row * n_used, (row + 1) * n_used):
                slot = v.load_i64(v.load_i64(op + R.MOE_SLOTS) + 8 * i)
                packer(x, v.load_i64(op + R.MOE_WIDTH), v.load_i64(op + R.MOE_Y), slot, columns)

    return kernel


def from_experts(_: str) -> Kernel:
    """y = the weighted sum of the row's slots in x; the plain sum where there are no weights."""

    def kernel(op, step, part):  # type: ignore[no-untyped-def]
        n_rows = v.load_i64(step + R.N_ROWS)
        parts = v.load_i64(step + R.STEP_PARTS)
        n_used = v.load_i64(op + R.MOE_USED)
        weights = v.load_i64(op + R.MOE_WEIGHTS)
        for row in range(first_row(n_rows, part, parts), first_row(n_rows, part + 1, parts)):
            y = v.load_i64(op + R.MOE_Y) + row * v.load_i64(op + R.MOE_Y_STRIDE)
            for i in range(n_used):
                which = row * n_used + i
                weight = v.load_f32(weights + 4 * which) if weights != 0 else v.float32(1.0)
                slot = v.load_i64(v.load_i64(op + R.MOE_SLOTS) + 8 * which)
                x = v.load_i64(op + R.MOE_X) + slot * v.load_i64(op + R.MOE_X_STRIDE)
                for j in range(v.load_i64(op + R.MOE_WIDTH)):
                    before = v.load_f32(y + 4 * j) if i > 0 else v.float32(0.0)
                    v.store_f32(y + 4 * j, before + weight * v.load_f32(x + 4 * j))

    return kernel


def adjust_experts(_: str) -> Kernel:
    """Each expert's slots in x: times a scale, plus a bias row, of that expert. In place."""

    def kernel(op, step, part):  # type: ignore[no-untyped-def]
        parts = v.load_i64(step + R.STEP_PARTS)
        ranges = v.load_i64(op + R.MOE_RANGES)
        width = v.load_i64(op + R.MOE_WIDTH)
        scales = v.load_i64(op + R.MOE_SCALES)
        biases = v.load_i64(op + R.MOE_BIASES)
        for index in range(v.load_i64(ranges)):
            entry = ranges + 8 + 24 * index
            expert = v.load_i64(entry)
            first = v.load_i64(entry + 8)
            count = v.load_i64(entry + 16)
            scale = v.load_f32(scales + 4 * expert) if scales != 0 else v.float32(1.0)
            for slot in range(first + count * part // parts, first + count * (part + 1) // parts):
                x = v.load_i64(op + R.MOE_X) + slot * v.load_i64(op + R.MOE_X_STRIDE)
                for i in range(width):
                    value = v.load_f32(x + 4 * i) * scale
                    if biases != 0:
                        value += v.load_f32(biases + 4 * (expert * width + i))
                    v.store_f32(x + 4 * i, value)

    return kernel


def weigh_experts(_: str) -> Kernel:
    """Each slot of x times its weight. In place."""

    def kernel(op, step, part):  # type: ignore[no-untyped-def]
        n_rows = v.load_i64(step + R.N_ROWS)
        parts = v.load_i64(step + R.STEP_PARTS)
        n_used = v.load_i64(op + R.MOE_USED)
        for i in range(first_row(n_rows, part, parts) * n_used, first_row(n_rows, part + 1, parts) * n_used):
            weight = v.load_f32(v.load_i64(op + R.MOE_WEIGHTS) + 4 * i)
            slot = v.load_i64(v.load_i64(op + R.MOE_SLOTS) + 8 * i)
            x = v.load_i64(op + R.MOE_X) + slot * v.load_i64(op + R.MOE_X_STRIDE)
            for j in range(v.load_i64(op + R.MOE_WIDTH)):
                v.store_f32(x + 4 * j, v.load_f32(x + 4 * j) * weight)

    return kernel
