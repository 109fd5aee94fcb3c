"""Operations on rows of float32, and packing rows for a matmul (`kernels.columns`).

The rows come in parts, always the same within a step, and one thread does a part of all operations that follow one
another: they need no barrier between them. Every row is computed in one fixed order, whatever its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from qrun.engine.kernels import records as R
from qrun.engine.kernels.columns import first_row, packer_of, panel_packer_of, panel_width
from qrun.engine.simd import operations as v
from qrun.engine.simd.operations import operation
from qrun.engine.simd.vector import F32, Emitter, Vector

Kernel = Callable[[int, int, int], None]


def _row_kernel(compute: Any, packing: str, panels: bool = True) -> Kernel:
    """A kernel that computes y's row from x's (and z's), and packs it if `packing` is not empty. panels: packs the rows
    of a panel together, which takes a third of a second more to compile."""
    packer, panel_packer, packs = packer_of(packing or "f32"), panel_packer_of(packing or "f32"), packing != ""
    width_of = panel_width(packing)

    def kernel(op, step, part):  # type: ignore[no-untyped-def]
        count = v.load_i64(v.load_i64(op + R.ROW_COUNT))
        parts = v.load_i64(step + R.STEP_PARTS)
        width = v.load_i64(op + R.ROW_WIDTH)
        columns = width_of(v.load_i64(step + R.N_ROWS))
        first, end = first_row(count, part, parts), first_row(count, part + 1, parts)
        for row in range(first, end):
            x = v.load_i64(op + R.ROW_X) + row * v.load_i64(op + R.ROW_X_STRIDE)
            y = v.load_i64(op + R.ROW_Y) + row * v.load_i64(op + R.ROW_Y_STRIDE)
            z = v.load_i64(op + R.ROW_Z) + row * v.load_i64(op + R.ROW_Z_STRIDE)
            compute(op, step, row, x, z, y, width)
            if packs:
                packed = v.load_i64(op + R.ROW_PACKED)
                panel = row // columns * columns
                if not panels or panel < first or panel + columns > end:
                    packer(y, width, packed, row, columns)
                elif row + 1 == panel + columns:
                    stride = v.load_i64(op + R.ROW_Y_STRIDE)
                    panel_packer(y - (columns - 1) * stride, stride, width, packed, panel, columns)

    return kernel


def _elementwise(function: Any) -> Any:
    """compute(x, z) -> y over whole rows: vectors, then what is left through a vector on the stack."""
    lanes = v.target().lanes
    ends_bytes = 12 * lanes

    @v.helper
    def compute(op, step, row, x, z, y, width):  # type: ignore[no-untyped-def]
        factor = v.splat(v.load_f32(op + R.ROW_FACTOR))
        whole = width // lanes * lanes
        for i in range(0, whole, lanes):
            v.store(y + 4 * i, function(v.load(x + 4 * i), v.load(z + 4 * i), factor))
        if whole < width:
            ends = v.scratch(ends_bytes)
            for i in range(whole, width):
                v.store_f32(ends + 4 * (i - whole), v.load_f32(x + 4 * i))
                v.store_f32(ends + 4 * (lanes + i - whole), v.load_f32(z + 4 * i))
            for i in range(width - whole, lanes):
                v.store_f32(ends + 4 * i, 0.0)
                v.store_f32(ends + 4 * (lanes + i), 0.0)
            v.store(ends + 8 * lanes, function(v.load(ends), v.load(ends + 4 * lanes), factor))
            for i in range(whole, width):
                v.store_f32(y + 4 * i, v.load_f32(ends + 4 * (2 * lanes + i - whole)))

    return compute


def pack(packing: str) -> Kernel:
    """Pack x's rows; y is x."""

    @v.helper
    def nothing(op, step, row, x, z, y, width):  # type: ignore[no-untyped-def]
        pass

    return _row_kernel(nothing, packing)


def add(packing: str) -> Kernel:
    @v.helper
    def function(x, z, factor):  # type: ignore[no-untyped-def]
        return x + z

    return _row_kernel(_elementwise(function), packing)


def scale(packing: str) -> Kernel:
    @v.helper
    def function(x, z, factor):  # type: ignore[no-untyped-def]
        return x * factor

    return _row_kernel(_elementwise(function), packing)


def affine(packing: str) -> Kernel:
    """x * weight + bias, by rows that may be missing."""
    lanes = v.target().lanes

    @v.helper
    def compute(op, step, row, x, z, y, width):  # type: ignore[no-untyped-def]
        weight = v.load_i64(op + R.ROW_WEIGHT)
        bias = v.load_i64(op + R.ROW_BIAS)
        weighted, biased = weight != 0, bias != 0
        whole = width // lanes * lanes
        for i in range(0, whole, lanes):
            value = v.load(x + 4 * i)
            if weighted:
                value = value * v.load(weight + 4 * i)
            if biased:
                value = value + v.load(bias + 4 * i)
            v.store(y + 4 * i, value)
        for i in range(whole, width):
            one = v.load_f32(x + 4 * i)
            if weighted:
                one = one * v.load_f32(weight + 4 * i)
            if biased:
                one = one + v.load_f32(bias + 4 * i)
            v.store_f32(y + 4 * i, one)

    return _row_kernel(compute, packing)


def softcap(packing: str) -> Kernel:
    """factor * tanh(x / factor)."""

    @v.helper
    def function(x, z, factor):  # type: ignore[no-untyped-def]
        return factor * v.tanh(x / factor)

    return _row_kernel(_elementwise(function), packing)


def silu(packing: str) -> Kernel:
    """x * sigmoid(x) * z (Shazeer, "GLU Variants Improve Transformer", 2020: SwiGLU)."""

    @v.helper
    def function(x, z, factor):  # type: ignore[no-untyped-def]
        one = v.splat(1.0)
        return x / (one + v.exp(v.splat(0.0) - x)) * z

    return _row_kernel(_elementwise(function), packing)


def gelu(packing: str) -> Kernel:
    """gelu(x) * z in the tanh form: x / 2 * (1 + tanh(u)) = x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)."""

    @v.helper
    def function(x, z, factor):  # type: ignore[no-untyped-def]
        one = v.splat(1.0)
        u = x * v.splat(0.7978845608028654) * (one + v.splat(0.044715) * x * x)
        return x / (one + v.exp(v.splat(-2.0) * u)) * z

    return _row_kernel(_elementwise(function), packing)


def gelu_alone(packing: str) -> Kernel:
    """gelu(x), which multiplies nothing."""

    @v.helper
    def function(x, z, factor):  # type: ignore[no-untyped-def]
        one = v.splat(1.0)
        u = x * v.splat(0.7978845608028654) * (one + v.splat(0.044715) * x * x)
        return x / (one + v.exp(v.splat(-2.0) * u))

    return _row_kernel(_elementwise(function), packing)


def relu(packing: str) -> Kernel:
    """max(x, 0) * z."""

    @v.helper
    def function(x, z, factor):  # type: ignore[no-untyped-def]
        return v.maximum(x, v.splat(0.0)) * z

    return _row_kernel(_elementwise(function), packing)


def relu_alone(packing: str) -> Kernel:
    """max(x, 0)."""

    @v.helper
    def function(x, z, factor):  # type: ignore[no-untyped-def]
        return v.maximum(x, v.splat(0.0))

    return _row_kernel(_elementwise(function), packing)


def xielu(packing: str) -> Kernel:
    """p x^2 + b x above 0, n (exp(min(x, e)) - 1 - x) + b x below (arXiv:2411.13010). ROW_WEIGHT has n, p, b and e."""
    lanes = v.target().lanes
    ends_bytes = 4 * lanes

    @v.helper
    def function(x, parameters):  # type: ignore[no-untyped-def]
        n, p = v.splat(v.load_f32(parameters)), v.splat(v.load_f32(parameters + 4))
        b, e = v.splat(v.load_f32(parameters + 8)), v.splat(v.load_f32(parameters + 12))
        below = v.exp(v.choose(x < e, x, e)) - v.splat(1.0) - x
        return v.choose(v.splat(0.0) < x, p * x * x, n * below) + b * x

    @v.helper
    def compute(op, step, row, x, z, y, width):  # type: ignore[no-untyped-def]
        parameters = v.load_i64(op + R.ROW_WEIGHT)
        whole = width // lanes * lanes
        for i in range(0, whole, lanes):
            v.store(y + 4 * i, function(v.load(x + 4 * i), parameters))
        ends = v.scratch(ends_bytes)
        for i in range(whole, width):
            v.store(ends, function(v.splat(v.load_f32(x + 4 * i)), parameters))
            v.store_f32(y + 4 * i, v.load_f32(ends))

    return _row_kernel(compute, packing)


def clamp(packing: str) -> Kernel:
    """x, but not beyond -factor and factor."""

    @v.helper
    def function(x, z, factor):  # type: ignore[no-untyped-def]
        return v.maximum(v.choose(x < factor, x, factor), v.splat(0.0) - factor)

    return _row_kernel(_elementwise(function), packing)


def clamped_silu(packing: str) -> Kernel:
    """SwiGLU whose gate is at most `factor`, and whose other side stays between -factor and factor."""

    @v.helper
    def function(x, z, factor):  # type: ignore[no-untyped-def]
        x = v.choose(x < factor, x, factor)
        z = v.maximum(v.choose(z < factor, z, factor), v.splat(0.0) - factor)
        return x / (v.splat(1.0) + v.exp(v.splat(0.0) - x)) * z

    return _row_kernel(_elementwise(function), packing)


def limited_silu(packing: str) -> Kernel:
    """silu(x), at most `factor`, times z, which stays between -factor and factor."""

    @v.helper
    def function(x, z, factor):  # type: ignore[no-untyped-def]
        x = x / (v.splat(1.0) + v.exp(v.splat(0.0) - x))
        z = v.maximum(v.choose(z < factor, z, factor), v.splat(0.0) - factor)
        return v.choose(x < factor, x, factor) * z

    return _row_kernel(_elementwise(function), packing)


def swiglu_oai(packing: str) -> Kernel:
    """gpt-oss's SwiGLU: x * sigmoid(1.702 x) * (z + 1), with x up to 7 and z between -7 and 7."""

    @v.helper
    def function(x, z, factor):  # type: ignore[no-untyped-def]
        limit = v.splat(7.0)
        x = v.choose(x < limit, x, limit)
        z = v.maximum(v.choose(z < limit, z, limit), v.splat(-7.0))
        return x / (v.splat(1.0) + v.exp(v.splat(-1.702) * x)) * (z + v.splat(1.0))

    return _row_kernel(_elementwise(function), packing)


def situ(packing: str) -> Kernel:
    """sigmoid(x) * b tanh(x / b) * l tanh(z / l), or with an l of 0 times z. ROW_WEIGHT has b and l."""
    lanes = v.target().lanes
    ends_bytes = 8 * lanes

    @v.helper
    def function(x, z, parameters):  # type: ignore[no-untyped-def]
        limit = v.splat(v.load_f32(parameters))
        up_limit = v.load_f32(parameters + 4)
        if up_limit > v.float32(0.0):
            z = v.splat(up_limit) * v.tanh(z / v.splat(up_limit))
        return limit * v.tanh(x / limit) / (v.splat(1.0) + v.exp(v.splat(0.0) - x)) * z

    @v.helper
    def compute(op, step, row, x, z, y, width):  # type: ignore[no-untyped-def]
        parameters = v.load_i64(op + R.ROW_WEIGHT)
        whole = width // lanes * lanes
        for i in range(0, whole, lanes):
            v.store(y + 4 * i, function(v.load(x + 4 * i), v.load(z + 4 * i), parameters))
        ends = v.scratch(ends_bytes)
        for i in range(whole, width):
            value = function(v.splat(v.load_f32(x + 4 * i)), v.splat(v.load_f32(z + 4 * i)), parameters)
            v.store(ends, value)
            v.store_f32(y + 4 * i, v.load_f32(ends))

    return _row_kernel(compute, packing)


@v.helper
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return v.splat(1.0) / (v.splat(1.0) + v.exp(v.splat(0.0) - x))


@v.helper
def _softplus(x):  # type: ignore[no-untyped-def]
    """log(1 + exp(x)) = max(x, 0) + log(1 + t), t = exp(-|x|): the logarithm is 2 artanh(s), s = t / (2 + t) <= 1/3,
    whose series is below 1e-9 after eight terms."""
    t = v.exp(v.splat(0.0) - v.magnitude(x))
    s = t / (v.splat(2.0) + t)
    square = s * s
    series = v.splat(1.0 / 15.0)
    series = series * square + v.splat(1.0 / 13.0)
    series = series * square + v.splat(1.0 / 11.0)
    series = series * square + v.splat(1.0 / 9.0)
    series = series * square + v.splat(1.0 / 7.0)
    series = series * square + v.splat(1.0 / 5.0)
    series = series * square + v.splat(1.0 / 3.0)
    series = series * square + v.splat(1.0)
    return v.maximum(x, v.splat(0.0)) + v.splat(2.0) * s * series


@v.helper
def _silu(x):  # type: ignore[no-untyped-def]
    return x / (v.splat(1.0) + v.exp(v.splat(0.0) - x))


@v.helper
def _identity(x):  # type: ignore[no-untyped-def]
    return x


GATES = {"sigmoid": _sigmoid, "softplus": _softplus, "silu": _silu, "identity": _identity}


def _alone(act: Any, packing: str) -> Kernel:
    """act(x)."""

    @v.helper
    def function(x, z, factor):  # type: ignore[no-untyped-def]
        return act(x)

    return _row_kernel(_elementwise(function), packing)


def sigmoid(packing: str) -> Kernel:
    return _alone(_sigmoid, packing)


def softplus(packing: str) -> Kernel:
    return _alone(_softplus, packing)


def silu_alone(packing: str) -> Kernel:
    """silu(x), which multiplies nothing."""
    return _alone(_silu, packing)


def exp(packing: str) -> Kernel:
    return _alone(v.exp, packing)


def signed_root(packing: str) -> Kernel:
    """sign(x) * sqrt(max(|x|, 1e-6))."""

    @v.helper
    def compute(op, step, row, x, z, y, width):  # type: ignore[no-untyped-def]
        for i in range(width):
            one = v.load_f32(x + 4 * i)
            size = max(one if one > v.float32(0.0) else -one, v.float32(1e-6))
            root = size * v.inverse_sqrt(size)
            sign = v.float32(1.0) if one > v.float32(0.0) else v.float32(-1.0)
            v.store_f32(y + 4 * i, root * sign if one != v.float32(0.0) else v.float32(0.0))

    return _row_kernel(compute, packing)


def gate(variant: str) -> Kernel:
    """act(x) * z, where each value of x counts for a group of neighbouring values of z. The variant: act, packing."""
    kind, _, packing = variant.partition("-")
    act = GATES[kind]
    lanes = v.target().lanes

    @v.helper
    def compute(op, step, row, x, z, y, width):  # type: ignore[no-untyped-def]
        groups = v.load_i64(op + R.ROW_GROUPS)
        size = width // groups
        whole = size // lanes * lanes
        done = width // lanes * lanes if size == 1 else 0
        for i in range(0, done, lanes):
            v.store(y + 4 * i, v.load(z + 4 * i) * act(v.load(x + 4 * i)))
        z += 4 * done
        y += 4 * done
        for group in range(done, groups):
            factor = act(v.splat(v.load_f32(x + 4 * group)))
            for i in range(0, whole, lanes):
                v.store(y + 4 * i, v.load(z + 4 * i) * factor)
            for i in range(whole, size):
                v.store_f32(y + 4 * i, v.load_f32(z + 4 * i) * v.first_lane(factor))
            z += 4 * size
            y += 4 * size

    return _row_kernel(compute, packing)


def rms_norm(packing: str) -> Kernel:
    """x / sqrt(mean(x^2) + eps) * weight + bias over each group of the row (Zhang and Sennrich, 2019). eps is
    ROW_FACTOR; weight and bias may be missing."""
    return _norm(packing, centred=False)


def layer_norm(packing: str) -> Kernel:
    """The same of x - mean(x) (Ba et al., "Layer Normalization", 2016)."""
    return _norm(packing, centred=True)


def _norm(packing: str, centred: bool) -> Kernel:
    lanes = v.target().lanes

    @v.helper
    def compute(op, step, row, x, z, y, width):  # type: ignore[no-untyped-def]
        groups = v.load_i64(op + R.ROW_GROUPS)
        weight = v.load_i64(op + R.ROW_WEIGHT)
        bias = v.load_i64(op + R.ROW_BIAS)
        weighted, biased = weight != 0, bias != 0
        stride = v.load_i64(op + R.ROW_WEIGHT_STRIDE)
        size = width // groups
        whole = size // lanes * lanes
        for _ in range(groups):
            mean = v.float32(0.0)
            if centred:
                sums = v.splat(0.0)
                for i in range(0, whole, lanes):
                    sums = sums + v.load(x + 4 * i)
                mean = v.sum_lanes(sums)
                for i in range(whole, size):
                    mean += v.load_f32(x + 4 * i)
                mean = mean / v.as_float(size)
            means = v.splat(mean)
            squares = v.splat(0.0)
            for i in range(0, whole, lanes):
                value = v.load(x + 4 * i)
                if centred:
                    value = value - means
                squares = v.fma(value, value, squares)
            total = v.sum_lanes(squares)
            for i in range(whole, size):
                one = v.load_f32(x + 4 * i) - mean
                total += one * one
            inverse = v.inverse_sqrt(total / v.as_float(size) + v.load_f32(op + R.ROW_FACTOR))
            factor = v.splat(inverse)
            for i in range(0, whole, lanes):
                value = v.load(x + 4 * i)
                if centred:
                    value = value - means
                value = value * factor
                if weighted:
                    value = value * v.load(weight + 4 * i)
                if biased:
                    value = value + v.load(bias + 4 * i)
                v.store(y + 4 * i, value)
            for i in range(whole, size):
                one = (v.load_f32(x + 4 * i) - mean) * inverse
                if weighted:
                    one = one * v.load_f32(weight + 4 * i)
                if biased:
                    one = one + v.load_f32(bias + 4 * i)
                v.store_f32(y + 4 * i, one)
            x += 4 * size
            y += 4 * size
            weight += stride
            bias += stride

    return _row_kernel(compute, packing)


def select_rows(packing: str) -> Kernel:
    """y's row i is x's row SELECTED[i]: the rows whose logits are wanted."""

    @v.helper
    def compute(op, step, row, x, z, y, width):  # type: ignore[no-untyped-def]
        source = v.load_i64(op + R.ROW_X) + v.load_i64(v.load_i64(step + R.SELECTED) + 8 * row) * v.load_i64(
            op + R.ROW_X_STRIDE
        )
        for i in range(width):
            v.store_f32(y + 4 * i, v.load_f32(source + 4 * i))

    return _row_kernel(compute, packing, panels=False)


def join(packing: str) -> Kernel:
    """Each of ROW_GROUPS heads of y: a part of the head of x, and then one of the head of z. ROW_X_HEAD and ROW_Z_HEAD
    are how many floats lie between heads: 0 where all heads share one."""

    @v.helper
    def compute(op, step, row, x, z, y, width):  # type: ignore[no-untyped-def]
        x_size = v.load_i64(op + R.ROW_X_SIZE)
        z_size = v.load_i64(op + R.ROW_Z_SIZE)
        for head in range(v.load_i64(op + R.ROW_GROUPS)):
            from_x = x + 4 * (head * v.load_i64(op + R.ROW_X_HEAD) + v.load_i64(op + R.ROW_X_START))
            from_z = z + 4 * (head * v.load_i64(op + R.ROW_Z_HEAD) + v.load_i64(op + R.ROW_Z_START))
            for i in range(x_size):
                v.store_f32(y + 4 * i, v.load_f32(from_x + 4 * i))
            y += 4 * x_size
            for i in range(z_size):
                v.store_f32(y + 4 * i, v.load_f32(from_z + 4 * i))
            y += 4 * z_size

    return _row_kernel(compute, packing)


def mix(packing: str) -> Kernel:
    """Each of ROW_GROUPS streams of y: the sum of all ROW_X_SIZE streams of x by weights in z, plus its own of ROW_ADD,
    if that is not 0."""
    lanes = v.target().lanes

    @v.helper
    def compute(op, step, row, x, z, y, width):  # type: ignore[no-untyped-def]
        n_out = v.load_i64(op + R.ROW_GROUPS)
        n_in = v.load_i64(op + R.ROW_X_SIZE)
        size = width // n_out
        whole = size // lanes * lanes
        add = v.load_i64(op + R.ROW_ADD)
        adds = add != 0
        add += row * v.load_i64(op + R.ROW_ADD_STRIDE)
        for _ in range(n_out):
            for i in range(0, whole, lanes):
                total = v.splat(v.load_f32(z)) * v.load(x + 4 * i)
                for j in range(1, n_in):
                    total = v.fma(v.splat(v.load_f32(z + 4 * j)), v.load(x + 4 * (j * size + i)), total)
                if adds:
                    total = total + v.load(add + 4 * i)
                v.store(y + 4 * i, total)
            for i in range(whole, size):
                one = v.load_f32(z) * v.load_f32(x + 4 * i)
                for j in range(1, n_in):
                    one += v.load_f32(z + 4 * j) * v.load_f32(x + 4 * (j * size + i))
                if adds:
                    one += v.load_f32(add + 4 * i)
                v.store_f32(y + 4 * i, one)
            z += 4 * n_in
            y += 4 * size
            add += 4 * size

    return _row_kernel(compute, packing)


def _mean_of() -> Any:
    """mean(x, size): of some floats."""
    lanes = v.target().lanes

    @v.helper
    def mean(x, size):  # type: ignore[no-untyped-def]
        whole = size // lanes * lanes
        sums = v.splat(0.0)
        for i in range(0, whole, lanes):
            sums = sums + v.load(x + 4 * i)
        total = v.sum_lanes(sums)
        for i in range(whole, size):
            total += v.load_f32(x + 4 * i)
        return total / v.as_float(size)

    return mean


def _squares_of() -> Any:
    """squares(x, size, mean): the sum of squares of what some floats are above the mean."""
    lanes = v.target().lanes

    @v.helper
    def squares(x, size, mean):  # type: ignore[no-untyped-def]
        whole = size // lanes * lanes
        sums = v.splat(0.0)
        for i in range(0, whole, lanes):
            value = v.load(x + 4 * i) - v.splat(mean)
            sums = v.fma(value, value, sums)
        total = v.sum_lanes(sums)
        for i in range(whole, size):
            one = v.load_f32(x + 4 * i) - mean
            total += one * one
        return total

    return squares


def dot(packing: str) -> Kernel:
    """The sums of x * z of as many groups as y is wide. ROW_X_SIZE is how many values a group has."""
    lanes = v.target().lanes

    @v.helper
    def compute(op, step, row, x, z, y, width):  # type: ignore[no-untyped-def]
        size = v.load_i64(op + R.ROW_X_SIZE)
        whole = size // lanes * lanes
        for group in range(width):
            sums = v.splat(0.0)
            for i in range(0, whole, lanes):
                sums = v.fma(v.load(x + 4 * i), v.load(z + 4 * i), sums)
            total = v.sum_lanes(sums)
            for i in range(whole, size):
                total += v.load_f32(x + 4 * i) * v.load_f32(z + 4 * i)
            v.store_f32(y + 4 * group, total)
            x += 4 * size
            z += 4 * size

    return _row_kernel(compute, packing)


def mix_by_score(packing: str) -> Kernel:
    """The ROW_GROUPS streams of x, and z, each by its share: the softmax of ROW_WEIGHT . stream / sqrt(mean(stream^2) +
    eps). eps is ROW_FACTOR."""
    lanes = v.target().lanes
    shares_bytes = 4 * (R.MAX_STREAMS + lanes)

    @v.helper
    def score(x, weight, size, eps):  # type: ignore[no-untyped-def]
        whole = size // lanes * lanes
        squares, products = v.splat(0.0), v.splat(0.0)
        for i in range(0, whole, lanes):
            value = v.load(x + 4 * i)
            squares = v.fma(value, value, squares)
            products = v.fma(value, v.load(weight + 4 * i), products)
        square, product = v.sum_lanes(squares), v.sum_lanes(products)
        for i in range(whole, size):
            one = v.load_f32(x + 4 * i)
            square += one * one
            product += one * v.load_f32(weight + 4 * i)
        return product * v.inverse_sqrt(square / v.as_float(size) + eps)

    @v.helper
    def compute(op, step, row, x, z, y, width):  # type: ignore[no-untyped-def]
        n = v.load_i64(op + R.ROW_GROUPS)
        weight = v.load_i64(op + R.ROW_WEIGHT)
        eps = v.load_f32(op + R.ROW_FACTOR)
        shares = v.scratch(shares_bytes)
        largest = score(z, weight, width, eps)
        v.store_f32(shares + 4 * n, largest)
        for j in range(n):
            one = score(x + 4 * j * width, weight, width, eps)
            v.store_f32(shares + 4 * j, one)
            largest = max(largest, one)
        total = v.float32(0.0)
        for j in range(n + 1):
            one = v.first_lane(v.exp(v.splat(v.load_f32(shares + 4 * j) - largest)))
            v.store_f32(shares + 4 * j, one)
            total += one
        for j in range(n + 1):
            v.store_f32(shares + 4 * j, v.load_f32(shares + 4 * j) / total)
        whole = width // lanes * lanes
        for i in range(0, whole, lanes):
            mean = v.splat(v.load_f32(shares + 4 * n)) * v.load(z + 4 * i)
            for j in range(n):
                mean = v.fma(v.splat(v.load_f32(shares + 4 * j)), v.load(x + 4 * (j * width + i)), mean)
            v.store(y + 4 * i, mean)
        for i in range(whole, width):
            single = v.load_f32(shares + 4 * n) * v.load_f32(z + 4 * i)
            for j in range(n):
                single += v.load_f32(shares + 4 * j) * v.load_f32(x + 4 * (j * width + i))
            v.store_f32(y + 4 * i, single)

    return _row_kernel(compute, packing)


def balance(packing: str) -> Kernel:
    """A matrix of ROW_GROUPS rows whose rows and columns get about the sum 1, in ROW_X_SIZE rounds, turned over. y has
    its columns, one behind the other. eps is ROW_FACTOR."""

    @v.helper
    def divide(y, n, apart, between, eps):  # type: ignore[no-untyped-def]
        """By the sums of rows or columns, whose numbers lie `apart` and which lie `between`."""
        for i in range(n):
            total = eps
            for j in range(n):
                total += v.load_f32(y + 4 * (i * between + j * apart))
            for j in range(n):
                at = y + 4 * (i * between + j * apart)
                v.store_f32(at, v.load_f32(at) / total)

    @v.helper
    def compute(op, step, row, x, z, y, width):  # type: ignore[no-untyped-def]
        n = v.load_i64(op + R.ROW_GROUPS)
        eps = v.load_f32(op + R.ROW_FACTOR)
        for i in range(n):
            largest = v.load_f32(x + 4 * i * n)
            for j in range(1, n):
                largest = max(largest, v.load_f32(x + 4 * (i * n + j)))
            total = v.float32(0.0)
            for j in range(n):
                one = v.first_lane(v.exp(v.splat(v.load_f32(x + 4 * (i * n + j)) - largest)))
                v.store_f32(y + 4 * (j * n + i), one)
                total += one
            for j in range(n):
                v.store_f32(y + 4 * (j * n + i), v.load_f32(y + 4 * (j * n + i)) / total + eps)
        for number in range(v.load_i64(op + R.ROW_X_SIZE)):
            if number > 0:
                divide(y, n, n, 1, eps)
            divide(y, n, 1, n, eps)

    return _row_kernel(compute, packing)


def match_magnitude(packing: str) -> Kernel:
    """Each of ROW_GROUPS groups of x, made as long as z."""
    squares_of = _squares_of()

    @v.helper
    def compute(op, step, row, x, z, y, width):  # type: ignore[no-untyped-def]
        groups = v.load_i64(op + R.ROW_GROUPS)
        size = width // groups
        wanted = squares_of(z, size, v.float32(0.0))
        for _ in range(groups):
            squares = squares_of(x, size, v.float32(0.0))
            factor = v.float32(0.0)
            if squares > v.float32(0.0) and wanted > v.float32(0.0):
                factor = v.inverse_sqrt(squares / wanted)
            for i in range(size):
                v.store_f32(y + 4 * i, v.load_f32(x + 4 * i) * factor)
            x += 4 * size
            y += 4 * size

    return _row_kernel(compute, packing)


def gaussian_top_k(packing: str) -> Kernel:
    """max(x - mean - factor * deviation, 0): what exceeds the mean by so many standard deviations of a sample."""
    mean_of, squares_of = _mean_of(), _squares_of()

    @v.helper
    def compute(op, step, row, x, z, y, width):  # type: ignore[no-untyped-def]
        mean = mean_of(x, width)
        squares = squares_of(x, width, mean)
        if squares > v.float32(0.0):
            mean += v.load_f32(op + R.ROW_FACTOR) / v.inverse_sqrt(squares / v.as_float(width - 1))
        for i in range(width):
            v.store_f32(y + 4 * i, max(v.load_f32(x + 4 * i) - mean, v.float32(0.0)))

    return _row_kernel(compute, packing)


ROTATED = 16
"""Pairs that are rotated together."""


def _rotation(neighbours: bool) -> Any:
    """rotate(x, apart, table, out): ROTATED pairs, of neighbours, or of two vectors `apart` bytes apart."""
    evens, odds = range(0, 2 * ROTATED, 2), range(1, 2 * ROTATED, 2)
    zipped = [i // 2 + ROTATED * (i % 2) for i in range(2 * ROTATED)]

    @operation(lambda *_: v.types.void)
    def rotate(e: Emitter, x: ir.Value, apart: ir.Value, table: ir.Value, out: ir.Value) -> None:
        def two(place: ir.Value, other: ir.Value) -> tuple[Vector, Vector]:
            return e.load(place, 0, F32, ROTATED), e.load(other, 0, F32, ROTATED)

        def of_pairs(place: ir.Value) -> tuple[Vector, Vector]:
            low, high = two(place, e.offset(place, 4 * ROTATED))
            return low.shuffle(high, evens), low.shuffle(high, odds)

        cosines, sines = of_pairs(table)
        first, second = of_pairs(x) if neighbours else two(x, e.builder.add(x, apart))
        first, second = first * cosines - second * sines, first * sines + second * cosines
        other = e.builder.add(out, apart)
        if neighbours:
            first, second = first.shuffle(second, zipped[:ROTATED]), first.shuffle(second, zipped[ROTATED:])
            other = e.offset(out, 4 * ROTATED)
        e.store(first.value, out)
        e.store(second.value, other)

    return rotate


def rope(_: str) -> Kernel:
    """Rotate pairs of each head by position times frequency (Su et al., "RoFormer", 2021).

    ROW_ROPE_TABLE: cosines and sines [position][pair][2]. Pairs are neighbours, or half the rotated dimensions apart
    (NeoX). Those of a head begin at ROW_ROPE_START. Heads may be rotated in place.
    """

    rotate_neighbours, rotate_halves = _rotation(neighbours=True), _rotation(neighbours=False)

    @v.helper
    def compute(op, step, row, x, z, y, width):  # type: ignore[no-untyped-def]
        dims = v.load_i64(op + R.ROW_ROPE_DIMS)
        head_dim = v.load_i64(op + R.ROW_ROPE_HEAD_DIM)
        interleaved = v.load_i64(op + R.ROW_ROPE_INTERLEAVED)
        position = v.load_i64(v.load_i64(step + R.POSITIONS) + 8 * row)
        position = max(position - v.load_i64(op + R.ROW_ROPE_BEHIND), 0)
        table = v.load_i64(op + R.ROW_ROPE_TABLE) + position * dims * 4
        start = v.load_i64(op + R.ROW_ROPE_START)
        apart = 1 if interleaved != 0 else dims // 2
        between = 2 if interleaved != 0 else 1
        for head in range(width // head_dim):
            for i in range(start):
                v.store_f32(y + 4 * (head * head_dim + i), v.load_f32(x + 4 * (head * head_dim + i)))
            source = x + 4 * (head * head_dim + start)
            out = y + 4 * (head * head_dim + start)
            whole = dims // 2 // ROTATED * ROTATED
            for i in range(0, whole, ROTATED):
                place = 4 * i * between
                if interleaved != 0:
                    rotate_neighbours(source + place, 4 * apart, table + 8 * i, out + place)
                else:
                    rotate_halves(source + place, 4 * apart, table + 8 * i, out + place)
            for i in range(whole, dims // 2):
                cosine = v.load_f32(table + 8 * i)
                sine = v.load_f32(table + 8 * i + 4)
                first = v.load_f32(source + 4 * (i * between))
                second = v.load_f32(source + 4 * (i * between + apart))
                v.store_f32(out + 4 * (i * between), first * cosine - second * sine)
                v.store_f32(out + 4 * (i * between + apart), first * sine + second * cosine)
            for i in range(dims, head_dim - start):
                v.store_f32(out + 4 * i, v.load_f32(source + 4 * i))

    return _row_kernel(compute, "")
