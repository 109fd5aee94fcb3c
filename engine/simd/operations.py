"""Vectors, memory, atomics and calls for kernels: what Numba-compiled code in `engine/kernels` is written with.

A kernel is a Python function of integers (addresses, counts) that Numba types and compiles. The functions below are
its vocabulary: Numba knows their types, and `qrun.engine.simd.vector` emits their instructions. They cannot be called
from ordinary Python.

Numba types: `VectorType(element, count)` is an LLVM vector, `TileType(element, lanes, columns)` several of them.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import float32 as float32  # for kernels: their literals would be float64 without it
from numba.core import types
from numba.core.datamodel import models, register_default
from numba.core.typing.templates import AbstractTemplate, signature

from qrun.engine.simd import vector as emit
from qrun.engine.simd.frontend import functions, lowerings
from qrun.engine.simd.frontend import helper as helper
from qrun.engine.simd.target import target
from qrun.engine.simd.vector import F16, F32, I8, I32, I64, Emitter, Vector

_IR_ELEMENT = {"f32": F32, "i32": I32, "bit": ir.IntType(1)}


class VectorType(types.Type):
    """One vector register's worth of `element` ("f32", "i32" or "bit")."""

    def __init__(self, element: str, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        super().__init__(name=f"vector({element} x {lanes})")


class TileType(types.Type):
    """`columns` vectors of float32: the accumulators of a matrix tile."""

    def __init__(self, lanes: int, columns: int) -> None:
        self.lanes, self.columns = lanes, columns
        super().__init__(name=f"tile(f32 x {lanes} x {columns})")


@register_default(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: VectorType) -> None:
        super().__init__(manager, fe_type, ir.VectorType(_IR_ELEMENT[fe_type.element], fe_type.lanes))


@register_default(TileType)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: TileType) -> None:
        super().__init__(manager, fe_type, ir.ArrayType(ir.VectorType(F32, fe_type.lanes), fe_type.columns))


def operation(result: Callable[..., types.Type | None], key: Any = None) -> Callable[[Callable[..., Any]], Any]:
    """Make an emission function an operation that kernels can call.

    result: from the arguments' Numba types to the result's, or None where the types do not fit.
    The emission gets an Emitter, then the arguments: Vector for vectors, list[Vector] for tiles, int for literals,
    else the IR value. It returns a Vector, a list of them, an IR value, or None for void.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        stub = key if key is not None else function

        class Template(AbstractTemplate):
            key = stub
            prefer_literal = True

            def generic(self, args: tuple[types.Type, ...], kws: dict[str, types.Type]) -> Any:
                answer = result(*args)
                return None if answer is None else signature(answer, *args)

            def get_impl_key(self, _: Any) -> Any:
                return function

        Template.metadata = {"target": "cpu"}  # comes before Numba's own, which are for any target
        if key is None:
            functions.register_global(stub, types.Function(Template))
        else:
            functions.register_global(stub)(Template)

        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: tuple[ir.Value, ...]) -> ir.Value:
            e = Emitter(builder, target())
            values = [_unwrap(builder, type_, value) for type_, value in zip(sig.args, args, strict=True)]
            answer = function(e, *values)
            if isinstance(answer, Vector):
                return answer.value
            if isinstance(answer, list):
                return _pack(builder, answer)
            return context.get_dummy_value() if answer is None else answer

        lowerings.lower(function, types.VarArg(types.Any))(lower)
        return stub

    return decorate


def _unwrap(builder: ir.IRBuilder, type_: types.Type, value: ir.Value) -> Any:
    if isinstance(type_, types.IntegerLiteral):
        return type_.literal_value
    if isinstance(type_, VectorType):
        return Vector(builder, value)
    if isinstance(type_, TileType):
        return [Vector(builder, builder.extract_value(value, i)) for i in range(type_.columns)]
    if isinstance(type_, types.Float):
        return builder.fptrunc(value, F32) if type_.bitwidth == 64 else value
    if isinstance(value.type, ir.IntType) and 1 < value.type.width < 64:
        return builder.sext(value, I64)
    return value


def _pack(builder: ir.IRBuilder, vectors: list[Vector]) -> ir.Value:
    tile: ir.Value = ir.Constant(ir.ArrayType(vectors[0].value.type, len(vectors)), ir.Undefined)
    for i, vector in enumerate(vectors):
        tile = builder.insert_value(tile, vector.value, i)
    return tile


def _f32(*_: Any) -> VectorType:
    return VectorType("f32", target().lanes)


def _i32(*_: Any) -> VectorType:
    return VectorType("i32", target().lanes)


def _void(*_: Any) -> types.Type:
    return types.void


# --- arithmetic -------------------------------------------------------------------------------------------------------


def _binary(key: Any, method: str) -> None:
    def result(a: types.Type, b: types.Type) -> types.Type | None:
        if not isinstance(a, VectorType) or a != b:
            return None
        return VectorType("bit", a.lanes) if method == "less" else a

    operation(result, key)(lambda e, a, b: getattr(a, method)(b))


for _key, _method in (
    (operator.add, "__add__"),
    (operator.sub, "__sub__"),
    (operator.mul, "__mul__"),
    (operator.truediv, "__truediv__"),
    (operator.and_, "__and__"),
    (operator.lt, "less"),
):
    _binary(_key, _method)
    with contextlib.suppress(KeyError):
        _binary({operator.add: operator.iadd, operator.sub: operator.isub, operator.mul: operator.imul}[_key], _method)


def _number(a: types.Type, b: types.Type) -> types.Type | None:
    if isinstance(a, types.Integer) and isinstance(b, types.Integer):
        return types.intp
    return a if a == b == types.float32 else None


def _compare(e: Emitter, sign: str, a: Any, b: Any) -> ir.Value:
    if isinstance(a, ir.Value) and a.type == F32:
        return e.builder.fcmp_ordered(sign, a, b)
    return e.builder.icmp_signed(sign, e.index(a), e.index(b))


# As Python has them, and Numba: a NaN is neither less nor more. Numba would compile functions of their own for them.
@operation(_number, min)
def _(e: Emitter, a: Any, b: Any) -> ir.Value:
    return e.builder.select(_compare(e, "<", b, a), e.index(b), e.index(a))


@operation(_number, max)
def _(e: Emitter, a: Any, b: Any) -> ir.Value:
    return e.builder.select(_compare(e, ">", b, a), e.index(b), e.index(a))


@operation(lambda a: a if a == types.float32 else None, abs)
def _(e: Emitter, a: ir.Value) -> ir.Value:
    return e.splat(a, 1).intrinsic("llvm.fabs").lane(0)


@operation(lambda a, b, c: a)
def fma(e: Emitter, a: Vector, b: Vector, c: Vector) -> Vector:
    """a * b + c, rounded once."""
    return a.fma(b, c)


@operation(lambda a, b: a)
def maximum(e: Emitter, a: Vector, b: Vector) -> Vector:
    return a.maximum(b)


@operation(lambda a: a)
def magnitude(e: Emitter, a: Vector) -> Vector:
    return a.intrinsic("llvm.fabs")


@operation(lambda bits, yes, no: yes)
def choose(e: Emitter, bits: Vector, yes: Vector, no: Vector) -> Vector:
    return bits.choose(yes, no)


@operation(lambda a, low, high: a)
def clamp(e: Emitter, a: Vector, low: int, high: int) -> Vector:
    """Between two literals. A NaN stays one."""
    a = a.less(low).choose(a.constant(low), a)
    return a.constant(high).less(a).choose(a.constant(high), a)


@operation(lambda a: a)
def round_to_whole(e: Emitter, a: Vector) -> Vector:
    """To the nearest whole number, ties to even, still as float."""
    return a.intrinsic("llvm.rint")


@operation(lambda a: a)
def round_to_half(e: Emitter, a: Vector) -> Vector:
    """To half precision and back."""
    return a.to_half().to_float()


@operation(lambda a, b, tiny: a)
def divide(e: Emitter, a: Vector, b: Vector, tiny: ir.Value) -> Vector:
    """a / b, and 0 where b is no larger than `tiny`."""
    usable = e.splat(tiny).less(b.intrinsic("llvm.fabs"))
    return usable.choose(a / usable.choose(b, b.constant(1.0)), a.constant(0.0))


@operation(lambda a: _i32())
def to_int(e: Emitter, a: Vector) -> Vector:
    """From float32 to int32, towards zero."""
    return a.to_int()


@operation(_f32)
def splat(e: Emitter, value: ir.Value) -> Vector:
    """A float in every lane."""
    return e.splat(value)


@operation(_i32)
def splat_int(e: Emitter, value: Any) -> Vector:
    return e.splat(e.builder.trunc(e.index(value), I32))


@operation(_i32)
def lane_numbers(e: Emitter) -> Vector:
    """0, 1, 2, ... as int32."""
    return e.vector(ir.Constant(ir.VectorType(I32, e.lanes), list(range(e.lanes))))


@operation(lambda v: types.float32)
def sum_lanes(e: Emitter, v: Vector) -> ir.Value:
    """All lanes added, halves on halves: one fixed order."""
    return v.reduce("add")


@operation(lambda v: types.float32)
def max_lanes(e: Emitter, v: Vector) -> ir.Value:
    return v.reduce("maximum")


def _exp(x: Vector) -> Vector:
    """e^x to 1 ulp or so: 2^n from the exponent bits, the rest by a polynomial. 0 below -87, inf-free up to 88."""
    x = x.maximum(-87.5).minimum(88.0)
    n = (x * 1.4426950408889634).round()
    # ln 2 in two parts, so that n * ln2 is exact in the first (Cody and Waite).
    rest = n.fma(-0.693359375, x)
    rest = n.fma(2.12194440e-4, rest)
    p = rest.constant(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p.fma(rest, coefficient)
    p = (rest * rest).fma(p, rest) + 1.0
    power = ((n.to_int() + 127) << 23).bits_as(F32)
    return p * power


@operation(lambda x: x)
def exp(e: Emitter, x: Vector) -> Vector:
    return _exp(x)


def exp_of_difference(x: Vector) -> Vector:
    """e^x for x of 0 and below: to 1e-7 or so of itself near 0, and 3e-7 elsewhere. Exactly 1 of 0, and 0 below -86 and
    of a NaN.

    The last bits of x / ln 2 + 1.5 * 2^23 are its whole number, whose part is added to the polynomial's exponent.
    """
    shifted = x.fma(1.4426950408889634, 1.5 * 2.0**23)
    rest = (shifted - 1.5 * 2.0**23).fma(-0.6931471805599453, x)
    p = rest.constant(1.3814467e-3)
    for coefficient in (8.368781e-3, 4.1668393e-2, 1.666652e-1, 4.9999994e-1, 1.0, 1.0):
        p = p.fma(rest, coefficient)
    power = (p.bits_as(I32) + (shifted.bits_as(I32) << 23)).bits_as(F32)
    return x.constant(-86.0).less(x).choose(power, x.constant(0.0))


@operation(lambda x: x)
def falling_exp(e: Emitter, x: Vector) -> Vector:
    return exp_of_difference(x)


@operation(lambda x: x)
def tanh(e: Emitter, x: Vector) -> Vector:
    """1 - 2 / (e^2x + 1), and near zero, where that would cancel, the Taylor series up to x^7."""
    far = x.constant(1.0) - x.constant(2.0) / (_exp(x * 2.0) + 1.0)
    square = x * x
    series = x.constant(-17 / 315).fma(square, 2 / 15).fma(square, -1 / 3).fma(square, 1.0) * x
    return x.intrinsic("llvm.fabs").less(0.2).choose(series, far)


@operation(lambda x: types.float32)
def inverse_sqrt(e: Emitter, x: ir.Value) -> ir.Value:
    """1 / sqrt(x), both rounded properly."""
    function = emit.declare(e.builder.module, "llvm.sqrt.f32", ir.FunctionType(F32, [F32]))
    return e.builder.fdiv(ir.Constant(F32, 1.0), e.builder.call(function, [x]))


@operation(lambda x: types.float32)
def as_float(e: Emitter, x: Any) -> ir.Value:
    return e.builder.sitofp(e.index(x), F32)


# --- memory -----------------------------------------------------------------------------------------------------------


@operation(_f32)
def load(e: Emitter, address: ir.Value) -> Vector:
    """float32 values from memory, `lanes` of them."""
    return e.load(address, 0, F32, e.lanes)


@operation(_i32)
def load_ints(e: Emitter, address: ir.Value) -> Vector:
    """int32 values from memory, `lanes` of them."""
    return e.load(address, 0, I32, e.lanes)


@operation(_f32)
def load_halves(e: Emitter, address: ir.Value) -> Vector:
    """float16 values from memory, `lanes` of them, as float32."""
    return e.load(address, 0, F16, e.lanes).to_float()


@operation(_void)
def store(e: Emitter, address: ir.Value, v: Vector) -> None:
    e.store(v.value, address)


@operation(_void)
def clear(e: Emitter, address: ir.Value) -> None:
    """Zeros to memory, a vector of them. In loops, too, where LLVM would call memset otherwise."""
    e.fence()
    e.store(e.constant(0.0).value, address)


@operation(_f32)
def load_apart(e: Emitter, address: ir.Value, stride: ir.Value) -> Vector:
    """float32 values `stride` bytes apart, `lanes` of them."""
    vector = ir.Constant(ir.VectorType(F32, e.lanes), ir.Undefined)
    for lane in range(e.lanes):
        one = e.load_scalar(_nth(e, address, stride, lane), 0, F32)
        vector = e.builder.insert_element(vector, one, ir.Constant(I32, lane))
    return e.vector(vector)


@operation(_void)
def store_apart(e: Emitter, address: ir.Value, v: Vector, stride: ir.Value) -> None:
    for lane in range(e.lanes):
        e.store(v.lane(lane), _nth(e, address, stride, lane))


@operation(lambda a: types.float32)
def load_f32(e: Emitter, address: ir.Value) -> ir.Value:
    return e.load_scalar(address, 0, F32)


@operation(lambda a: types.intp)
def load_i32(e: Emitter, address: ir.Value) -> ir.Value:
    return e.builder.sext(e.load_scalar(address, 0, I32), I64)


@operation(lambda a: types.intp)
def load_u8(e: Emitter, address: ir.Value) -> ir.Value:
    return e.builder.zext(e.load_scalar(address, 0, I8), I64)


@operation(lambda a: types.intp)
def load_i64(e: Emitter, address: ir.Value) -> ir.Value:
    return e.load_scalar(address, 0, I64)


@operation(lambda a: types.float32)
def load_bits_f32(e: Emitter, address: ir.Value) -> ir.Value:
    """A float32 that an int64 field of a record holds in its low half."""
    return e.load_scalar(address, 0, F32)


@operation(_void)
def store_f32(e: Emitter, address: ir.Value, value: ir.Value) -> None:
    e.store(value, address)


@operation(_void)
def store_f16(e: Emitter, address: ir.Value, value: ir.Value) -> None:
    e.store(e.splat(value, 1).to_half().value, address)


@operation(_void)
def store_i32(e: Emitter, address: ir.Value, value: Any) -> None:
    e.store(e.builder.trunc(e.index(value), I32), address)


@operation(_void)
def store_i64(e: Emitter, address: ir.Value, value: Any) -> None:
    e.store(e.index(value), address)


@operation(_void)
def store_u8(e: Emitter, address: ir.Value, value: Any) -> None:
    e.store(e.builder.trunc(e.index(value), I8), address)


@operation(lambda value: types.intp)
def round_to_int(e: Emitter, value: ir.Value) -> ir.Value:
    """To the nearest integer, ties to even. Of size 2^22 at most."""
    return e.builder.fptosi(e.splat(value, 1).round().lane(0), I64)


@operation(lambda size: types.intp)
def scratch(e: Emitter, size: int) -> ir.Value:
    """The address of `size` bytes (a literal) on this thread's stack, aligned to 64."""
    return e.scratch(size)


# --- tiles ------------------------------------------------------------------------------------------------------------


@operation(lambda columns: TileType(target().lanes, columns.literal_value))
def zero_tile(e: Emitter, columns: int) -> list[Vector]:
    return [e.constant(0.0)] * columns


@operation(lambda columns, address, stride: TileType(target().lanes, columns.literal_value))
def load_tile(e: Emitter, columns: int, address: ir.Value, stride: Any) -> list[Vector]:
    """One vector from each of `columns` places, `stride` bytes apart."""
    return [e.load(_nth(e, address, stride, i), 0, F32, e.lanes) for i in range(columns)]


@operation(lambda vector: types.float32)
def first_lane(e: Emitter, vector: Vector) -> ir.Value:
    return vector.lane(0)


@operation(_void)
def store_tile(e: Emitter, tile: list[Vector], address: ir.Value, stride: Any) -> None:
    for i, column in enumerate(tile):
        e.store(column.value, _nth(e, address, stride, i))


@operation(lambda vectors, parts, address, stride: TileType(target().lanes, vectors.literal_value))
def load_rows(e: Emitter, vectors: int, parts: int, address: ir.Value, stride: Any) -> list[Vector]:
    """`parts` neighbouring vectors from each of `vectors` / `parts` rows, `stride` bytes apart."""
    size = 4 * e.lanes
    return [e.load(_nth(e, address, stride, i // parts), size * (i % parts), F32, e.lanes) for i in range(vectors)]


@operation(_void)
def store_rows(e: Emitter, tile: list[Vector], parts: int, address: ir.Value, stride: Any) -> None:
    for i, vector in enumerate(tile):
        e.store(vector.value, _nth(e, address, stride, i // parts), 4 * e.lanes * (i % parts))


# --- tiles of AMX -----------------------------------------------------------------------------------------------------


@operation(_void)
def configure_tiles(e: Emitter, rows: int, row_bytes: int, depth: int = 16) -> None:
    """All that follow take literals for the numbers of tiles: see `Emitter.configure_tiles`."""
    e.configure_tiles(rows, row_bytes, depth)


@operation(_void)
def release_tiles(e: Emitter) -> None:
    e.release_tiles()


@operation(_void)
def zero_matrix(e: Emitter, tile: int) -> None:
    e.zero_matrix(tile)


@operation(_void)
def load_matrix(e: Emitter, tile: int, address: ir.Value, stride: Any) -> None:
    e.load_matrix(tile, address, stride)


@operation(_void)
def store_matrix(e: Emitter, tile: int, address: ir.Value, stride: Any) -> None:
    e.store_matrix(tile, address, stride)


@operation(_void)
def multiply_matrices(e: Emitter, sums: int, left: int, right: int) -> None:
    e.multiply_matrices(sums, left, right)


# --- places -----------------------------------------------------------------------------------------------------------


def _nth(e: Emitter, address: ir.Value, stride: Any, index: int) -> ir.Value:
    if isinstance(stride, int):
        return e.offset(address, stride * index)
    return e.builder.add(address, e.builder.mul(stride, ir.Constant(I64, index))) if index else address


# --- threads ----------------------------------------------------------------------------------------------------------


@operation(lambda a, v: types.intp)
def atomic_add(e: Emitter, address: ir.Value, value: Any) -> ir.Value:
    """Add to the int64 at `address`; gives what was there before. Sequentially consistent."""
    return e.builder.atomic_rmw("add", e.pointer(address, 0, I64), e.index(value), "seq_cst")


@operation(lambda a, v: types.intp)
def atomic_exchange(e: Emitter, address: ir.Value, value: Any) -> ir.Value:
    return e.builder.atomic_rmw("xchg", e.pointer(address, 0, I64), e.index(value), "seq_cst")


@operation(lambda a, old, new: types.boolean)
def atomic_replace(e: Emitter, address: ir.Value, old: Any, new: Any) -> ir.Value:
    """Put `new` in the place of `old` at `address`; whether `old` was there. Sequentially consistent."""
    pointer = e.pointer(address, 0, I64)
    pair = e.builder.cmpxchg(pointer, e.index(old), e.index(new), "seq_cst")
    return e.builder.extract_value(pair, 1)


@operation(lambda a: types.intp)
def atomic_load(e: Emitter, address: ir.Value) -> ir.Value:
    return e.builder.load_atomic(e.pointer(address, 0, I64), "seq_cst", 8)


@operation(_void)
def pause(e: Emitter) -> None:
    e.pause()


@operation(_void)
def prefetch(e: Emitter, address: ir.Value, size: int) -> None:
    """Ask for the cache lines of `size` bytes (a literal) from `address`."""
    for offset in range(0, size, 64):
        e.prefetch(address, offset)


@operation(_void)
def call_kernel(e: Emitter, address: ir.Value, op: ir.Value, step: ir.Value, thread: ir.Value) -> None:
    """Call a compiled kernel by its address."""
    type_ = ir.FunctionType(ir.VoidType(), [I64, I64, I64])
    call = e.builder.call(e.builder.inttoptr(address, type_.as_pointer()), [op, step, thread])
    call.attributes.add("nounwind")  # then a kernel needs no tables that say how to unwind it


@operation(_void)
def call_plain(e: Emitter, address: ir.Value) -> None:
    """Call a C function that takes nothing, such as sched_yield."""
    type_ = ir.FunctionType(I32, [])
    e.builder.call(e.builder.inttoptr(address, type_.as_pointer()), [])
