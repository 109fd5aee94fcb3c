"""Vectors at the level of instructions: a `Vector` is an LLVM value, and its operators emit LLVM instructions.

Code written with it runs while a kernel is compiled: a Python loop around it is an unrolled loop in the kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from llvmlite import ir

from qrun.engine.simd.target import Target, target

I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F16, F32 = ir.HalfType(), ir.FloatType()


class Vector:
    """`lanes` elements of one type. Integers have no sign: what depends on it is a method of its own."""

    __slots__ = ("builder", "value")

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value = builder, value

    @property
    def element(self) -> ir.Type:
        return self.value.type.element

    @property
    def lanes(self) -> int:
        return self.value.type.count

    @property
    def is_float(self) -> bool:
        return isinstance(self.element, (ir.FloatType, ir.HalfType))

    def _new(self, value: ir.Value) -> Vector:
        return Vector(self.builder, value)

    def constant(self, value: float) -> Vector:
        """A vector of this one's type that holds `value` in every lane."""
        return self._new(ir.Constant(self.value.type, [value] * self.lanes))

    def _operand(self, other: Vector | float) -> ir.Value:
        return other.value if isinstance(other, Vector) else self.constant(other).value

    def __add__(self, other: Vector | float) -> Vector:
        add = self.builder.fadd if self.is_float else self.builder.add
        return self._new(add(self.value, self._operand(other)))

    def __sub__(self, other: Vector | float) -> Vector:
        sub = self.builder.fsub if self.is_float else self.builder.sub
        return self._new(sub(self.value, self._operand(other)))

    def __mul__(self, other: Vector | float) -> Vector:
        mul = self.builder.fmul if self.is_float else self.builder.mul
        return self._new(mul(self.value, self._operand(other)))

    def __truediv__(self, other: Vector | float) -> Vector:
        return self._new(self.builder.fdiv(self.value, self._operand(other)))

    def __and__(self, other: Vector | int) -> Vector:
        return self._new(self.builder.and_(self.value, self._operand(other)))

    def __or__(self, other: Vector | int) -> Vector:
        return self._new(self.builder.or_(self.value, self._operand(other)))

    def __xor__(self, other: Vector | int) -> Vector:
        return self._new(self.builder.xor(self.value, self._operand(other)))

    def __lshift__(self, other: Vector | int) -> Vector:
        return self._new(self.builder.shl(self.value, self._operand(other)))

    def __rshift__(self, other: Vector | int) -> Vector:
        """Shift right, zeros coming in."""
        return self._new(self.builder.lshr(self.value, self._operand(other)))

    def shift_right_signed(self, count: int) -> Vector:
        return self._new(self.builder.ashr(self.value, self._operand(count)))

    def __neg__(self) -> Vector:
        return self._new(self.builder.fneg(self.value) if self.is_float else self.builder.neg(self.value))

    def intrinsic(self, name: str, *others: Vector | float) -> Vector:
        """An LLVM intrinsic that takes and gives vectors of this type, such as llvm.fma or llvm.maxnum."""
        arguments = [self.value, *(self._operand(other) for other in others)]
        type_ = ir.FunctionType(self.value.type, [self.value.type] * len(arguments))
        function = declare(self.builder.module, self._overload(name), type_)
        return self._new(self.builder.call(function, arguments))

    def _overload(self, name: str) -> str:
        """LLVM's name for an intrinsic on this type of vector."""
        return f"{name}.v{self.lanes}{'f' if self.is_float else 'i'}{_width(self.element)}"

    def fma(self, factor: Vector | float, addend: Vector | float) -> Vector:
        """self * factor + addend, rounded once where the target can."""
        return self.intrinsic("llvm.fma", factor, addend) if target().fuses else self * factor + addend

    def round(self) -> Vector:
        """To whole numbers, ties to even; for floats of size 2^22 at most."""
        if target().rounds:
            return self.intrinsic("llvm.rint")
        return (self + 1.5 * 2.0**23) - 1.5 * 2.0**23  # there, neighbouring floats are 1 apart

    def maximum(self, other: Vector | float) -> Vector:
        return self.intrinsic("llvm.maxnum" if self.is_float else "llvm.smax", other)

    def larger(self, other: Vector) -> Vector:
        """The maximum of floats, of which none is a NaN: one instruction on x86, where `maximum` takes three."""
        return self.less(other).choose(other, self) if target().is_x86 else self.maximum(other)

    def minimum(self, other: Vector | float) -> Vector:
        return self.intrinsic("llvm.minnum" if self.is_float else "llvm.smin", other)

    def less(self, other: Vector | float) -> Vector:
        """A vector of single bits (signed comparison for integers)."""
        compare = self.builder.fcmp_ordered if self.is_float else self.builder.icmp_signed
        return self._new(compare("<", self.value, self._operand(other)))

    def is_zero(self) -> Vector:
        """A vector of single bits, for integers."""
        return self._new(self.builder.icmp_signed("==", self.value, self._operand(0)))

    def choose(self, yes: Vector, no: Vector) -> Vector:
        """self holds single bits: lane by lane `yes` where set, else `no`."""
        return self._new(self.builder.select(self.value, yes.value, no.value))

    def _cast(self, operation: str, element: ir.Type) -> Vector:
        return self._new(getattr(self.builder, operation)(self.value, ir.VectorType(element, self.lanes)))

    def to_float(self) -> Vector:
        """From int32 (signed) or float16 to float32."""
        if self.is_float and not target().converts_half:
            return _float_from_half(self.bits_as(I16).widen_unsigned(I32))
        return self._cast("fpext" if self.is_float else "sitofp", F32)

    def to_int(self) -> Vector:
        """From float32 to int32, towards zero."""
        return self._cast("fptosi", I32)

    def to_half(self) -> Vector:
        if not target().converts_half:
            return _half_from_float(self).narrow(I16).bits_as(F16)
        return self._cast("fptrunc", F16)

    def widen_signed(self, element: ir.Type = I32) -> Vector:
        return self._cast("sext", element)

    def widen_unsigned(self, element: ir.Type = I32) -> Vector:
        return self._cast("zext", element)

    def narrow(self, element: ir.Type) -> Vector:
        return self._cast("trunc", element)

    def bits_as(self, element: ir.Type) -> Vector:
        """The same bits seen as elements of another type."""
        total = self.lanes * _width(self.element)
        return self._new(self.builder.bitcast(self.value, ir.VectorType(element, total // _width(element))))

    def shuffle(self, other: Vector, lanes: Sequence[int]) -> Vector:
        """Lanes of self (0..n-1) and other (n..2n-1), in the order given."""
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        return self._new(self.builder.shuffle_vector(self.value, other.value, mask))

    def permute(self, lanes: Sequence[int]) -> Vector:
        return self.shuffle(self, lanes)

    def lane(self, index: int) -> ir.Value:
        return self.builder.extract_element(self.value, ir.Constant(I32, index))

    def reduce(self, operation: str) -> ir.Value:
        """All lanes combined in one fixed order ("add", "maximum"): halves are folded on halves."""
        vector = self
        while vector.lanes > 1:
            half = vector.lanes // 2
            low, high = vector.permute(range(half)), vector.permute(range(half, 2 * half))
            vector = low + high if operation == "add" else low.maximum(high)
        return vector.lane(0)


def _width(element: ir.Type) -> int:
    if isinstance(element, ir.IntType):
        return int(element.width)
    return 16 if isinstance(element, ir.HalfType) else 32


class Emitter:
    """Memory, constants and the few instructions that differ from one kind of CPU to the next."""

    def __init__(self, builder: ir.IRBuilder, target: Target) -> None:
        self.builder, self.target = builder, target
        self.lanes = target.lanes
        # How large bytes of weights can be in `dot4_unsigned`, where their products are not added in int16.
        self.unsigned_limit = 255 if target.dot == "vnni" and not target.folded else 127

    def vector(self, value: ir.Value) -> Vector:
        return Vector(self.builder, value)

    def index(self, value: ir.Value | int) -> ir.Value:
        """An int64, which may be a literal."""
        return ir.Constant(I64, value) if isinstance(value, int) else value

    def offset(self, address: ir.Value, bytes_: int) -> ir.Value:
        return self.builder.add(address, ir.Constant(I64, bytes_)) if bytes_ else address

    def pointer(self, address: ir.Value, offset: int, type_: ir.Type) -> ir.Value:
        pointer = self.builder.inttoptr(address, ir.IntType(8).as_pointer())
        pointer = self.builder.gep(pointer, [ir.Constant(I64, offset)], source_etype=I8) if offset else pointer
        return self.builder.bitcast(pointer, type_.as_pointer())

    def load(self, address: ir.Value, offset: int, element: ir.Type, lanes: int) -> Vector:
        type_ = ir.VectorType(element, lanes)
        return self.vector(self.builder.load(self.pointer(address, offset, type_), align=1))

    def gather(self, address: ir.Value, indices: Vector) -> Vector:
        """The int32 numbers of these indices from an array at an address."""
        lanes = indices.lanes
        wide = ir.VectorType(I64, lanes)
        offsets = self.builder.shl(self.builder.sext(indices.value, wide), ir.Constant(wide, [2] * lanes))
        places = self.builder.add(self.splat(address, lanes).value, offsets)
        pointers = self.builder.inttoptr(places, ir.VectorType(I32.as_pointer(), lanes))
        bits = ir.VectorType(ir.IntType(1), lanes)
        type_ = ir.FunctionType(indices.value.type, [pointers.type, I32, bits, indices.value.type])
        function = declare(self.builder.module, f"llvm.masked.gather.v{lanes}i32.v{lanes}p0", type_)
        every, none = ir.Constant(bits, [1] * lanes), ir.Constant(indices.value.type, ir.Undefined)
        return self.vector(self.builder.call(function, [pointers, ir.Constant(I32, 4), every, none]))

    def load_scalar(self, address: ir.Value, offset: int, element: ir.Type) -> ir.Value:
        return self.builder.load(self.pointer(address, offset, element), align=1)

    def store(self, value: ir.Value, address: ir.Value, offset: int = 0) -> None:
        self.builder.store(value, self.pointer(address, offset, value.type), align=1)

    def prefetch(self, address: ir.Value, offset: int = 0) -> None:
        """Bring the cache line at an address, mapped or not, into the second level."""
        type_ = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        function = declare(self.builder.module, "llvm.prefetch.p0", type_)
        read, second_level, data = ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1)
        self.builder.call(function, [self.pointer(address, offset, I8), read, second_level, data])

    def fence(self) -> None:
        """LLVM moves no access to memory from one side to the other. It is no instruction."""
        assembly = ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", side_effect=True)
        self.builder.call(assembly, [])

    def in_registers(self, vectors: Sequence[Vector]) -> list[Vector]:
        """The same vectors, all of them in registers at this point, on x86: what they are made of has been computed
        there, and what is made of them has not. It is no instruction."""
        type_, n = vectors[0].value.type, len(vectors)
        function = ir.FunctionType(ir.LiteralStructType([type_] * n), [type_] * n)
        constraints = ",".join(["=x"] * n + [str(i) for i in range(n)])
        assembly = ir.InlineAsm(function, "", constraints, side_effect=True)
        all_ = self.builder.call(assembly, [vector.value for vector in vectors])
        return [self.vector(self.builder.extract_value(all_, i)) for i in range(n)]

    def splat(self, scalar: ir.Value, lanes: int | None = None) -> Vector:
        type_ = ir.VectorType(scalar.type, lanes or self.lanes)
        one = self.builder.insert_element(ir.Constant(type_, ir.Undefined), scalar, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, type_.count), None)
        return self.vector(self.builder.shuffle_vector(one, ir.Constant(type_, ir.Undefined), zeros))

    def broadcast(self, address: ir.Value, offset: int, element: ir.Type) -> Vector:
        return self.splat(self.load_scalar(address, offset, element))

    def broadcast_word(self, address: ir.Value, index: int, count: int, element: ir.Type) -> Vector:
        """Element `index` of the `count` elements of four bytes at an address.

        On Arm, where a product can take one lane of a vector for all lanes, four of them are loaded at once.
        """
        first = index // 4 * 4
        if self.target.is_arm and first + 4 <= count:
            return self.load(address, 4 * first, element, 4).permute([index - first] * self.lanes)
        return self.broadcast(address, 4 * index, element)

    def constant(self, value: float, element: ir.Type = F32) -> Vector:
        return self.vector(ir.Constant(ir.VectorType(element, self.lanes), [value] * self.lanes))

    @property
    def multiplies_signs(self) -> bool:
        """Whether one instruction gives numbers the signs of others (`with_signs`), and makes products cheaper."""
        return self.target.dot == "avx2" and self.lanes == 8

    def with_signs(self, numbers: Vector, signs: Vector) -> Vector:
        """The bytes of int32 vectors, negated where those of `signs` are negative; of no matter where these are 0."""
        values, others = numbers.bits_as(I8), signs.bits_as(I8)
        if values.lanes == 32:  # AVX-512 has no such instruction, but masks
            return self.target_call("llvm.x86.avx2.psign.b", values.value.type, values, others).bits_as(I32)
        return others.less(0).choose(-values, values).bits_as(I32)

    def without_signs(self, numbers: Vector) -> Vector:
        """The sizes of the bytes of int32 vectors."""
        flat = numbers.bits_as(I8)
        type_ = ir.FunctionType(flat.value.type, [flat.value.type, ir.IntType(1)])
        function = declare(self.builder.module, flat._overload("llvm.abs"), type_)
        return flat._new(self.builder.call(function, [flat.value, ir.Constant(ir.IntType(1), 0)])).bits_as(I32)

    @property
    def signed_bias(self) -> int:
        """What is added to signed weights when they are unpacked: the one VNNI instruction wants an unsigned side."""
        return 128 if self.target.dot == "vnni" else 0

    def bias_signed(self, weights: Vector) -> Vector:
        """int8 in each byte of an int32 vector, with `signed_bias` added."""
        return weights ^ -0x7F7F7F80 if self.signed_bias else weights

    def lookup16(self, table: Sequence[int], indices: Vector) -> Vector:
        """table[i] for each byte i (0..15) of an int32 vector."""
        flat = indices.bits_as(I8)
        lanes = flat.lanes
        if self.target.is_x86 and self.target.dot != "plain":
            entries = [value - 256 if value > 127 else value for value in table]
            repeated = ir.Constant(flat.value.type, [v & 0xFF for v in entries] * (lanes // 16))
            name = {16: "llvm.x86.ssse3.pshuf.b.128", 32: "llvm.x86.avx2.pshuf.b", 64: "llvm.x86.avx512.pshuf.b.512"}[
                lanes
            ]
            return self.target_call(name, flat.value.type, self.vector(repeated), flat).bits_as(I32)
        if self.target.is_arm and self.target.dot != "plain":
            repeated = ir.Constant(flat.value.type, [v & 0xFF for v in table])
            return self.target_call(
                "llvm.aarch64.neon.tbl1.v16i8", flat.value.type, self.vector(repeated), flat
            ).bits_as(I32)
        result = flat.constant(table[0] & 0xFF)
        for index, value in enumerate(table[1:], 1):
            same = flat._new(self.builder.icmp_unsigned("==", flat.value, flat.constant(index).value))
            result = same.choose(flat.constant(value & 0xFF), result)
        return result.bits_as(I32)

    def lookup32(self, table: Sequence[int], indices: Vector) -> Vector:
        """table[i % 32] for each int16 i, of AVX-512's longest vectors."""
        entries = self.vector(ir.Constant(indices.value.type, list(table)))
        return self.target_call("llvm.x86.avx512.permvar.hi.512", indices.value.type, entries, indices)

    @property
    def permutes_bytes(self) -> bool:
        """Whether there are `permute_one`, `permute_two` and `shift_bytes`."""
        return self.lanes == 16 and self.target.has("avx512vbmi")

    def permute_one(self, table: Sequence[int], indices: Vector) -> Vector:
        """table[i % 64] for each byte i."""
        entries = ir.Constant(indices.value.type, list(table))
        name = "llvm.x86.avx512.permvar.qi.512"
        return self.target_call(name, indices.value.type, self.vector(entries), indices)

    def permute_two(self, tables: Sequence[Vector], indices: Vector) -> Vector:
        """For each byte i: byte i % 128 of two vectors of 64 bytes."""
        name = "llvm.x86.avx512.vpermi2var.qi.512"
        return self.target_call(name, indices.value.type, tables[0], indices, tables[1])

    def shift_bytes(self, words: Vector, shifts: Sequence[int]) -> Vector:
        """For each byte the eight bits that begin at bit `shifts` of its 64 bits, which are a ring."""
        flat = words.bits_as(I8)
        places = self.vector(ir.Constant(flat.value.type, list(shifts)))
        return self.target_call("llvm.x86.avx512.pmultishift.qb.512", flat.value.type, places, flat)

    @contextlib.contextmanager
    def loop(self, count: int) -> Iterator[ir.Value]:
        """A loop in the machine code, of what is emitted in it. Gives the turn's number, an int64."""
        before = self.builder.block
        body = self.builder.append_basic_block("loop")
        self.builder.branch(body)
        self.builder.position_at_end(body)
        number = self.builder.phi(I64)
        yield number
        following = self.builder.add(number, ir.Constant(I64, 1))
        after = self.builder.append_basic_block("after_loop")
        self.builder.cbranch(self.builder.icmp_signed("<", following, ir.Constant(I64, count)), body, after)
        number.add_incoming(ir.Constant(I64, 0), before)
        number.add_incoming(following, self.builder.block)
        self.builder.position_at_end(after)

    def scratch(self, size: int) -> ir.Value:
        """The address of `size` bytes on this thread's stack, aligned to 64."""
        with self.builder.goto_entry_block():
            space = self.builder.alloca(ir.ArrayType(I8, size))
            space.align = 64
        return self.builder.ptrtoint(space, I64)

    def table(self, name: str, content: bytes) -> ir.Value:
        """The address of constant bytes."""
        type_ = ir.ArrayType(I8, len(content))
        module = self.builder.module
        if name not in module.globals:
            constant = ir.GlobalVariable(module, type_, name)
            constant.linkage, constant.global_constant, constant.unnamed_addr = "internal", True, True
            constant.align = 64
            constant.initializer = ir.Constant(type_, bytearray(content))
        return self.builder.ptrtoint(module.globals[name], I64)

    def pause(self) -> None:
        """Tell the core that this is a waiting loop."""
        if self.target.is_x86:
            function = ir.FunctionType(ir.VoidType(), [])
            self.builder.call(declare(self.builder.module, "llvm.x86.sse2.pause", function), [])
        elif self.target.is_arm:
            # isb: `yield` does nothing on cores with one thread, and ends at once.
            function = ir.FunctionType(ir.VoidType(), [I32])
            isb = declare(self.builder.module, "llvm.aarch64.isb", function)
            self.builder.call(isb, [ir.Constant(I32, 15)])

    def multiply_high(self, factors: Vector, factor: int) -> Vector:
        """For each int16: the product, divided by 2^15 and rounded, halves up."""
        constant = factors.constant(factor)
        return self.target_call("llvm.x86.avx512.pmul.hr.sw.512", factors.value.type, factors, constant)

    def configure_tiles(self, rows: int, row_bytes: int, depth: int = 16) -> None:
        """Give this thread AMX's tiles: 0 to 3 hold float32 sums of so many rows, 4 and 5 left factors, rows of `depth`
        pairs of bfloat16, 6 and 7 right factors, `depth` rows of pairs. Sums and right factors have rows of
        `row_bytes`. It costs 75 nanoseconds."""
        sizes = [(rows, row_bytes)] * 4 + [(rows, 4 * depth)] * 2 + [(depth, row_bytes)] * 2 + [(0, 0)] * 8
        widths = b"".join(size.to_bytes(2, "little") for _, size in sizes)
        content = bytes([1, 0]) + bytes(14) + widths + bytes(count for count, _ in sizes)
        address = self.table(f"tiles_{rows}_{row_bytes}_{depth}", content)
        self._tile_call("ldtilecfg", self.pointer(address, 0, I8))

    def release_tiles(self) -> None:
        """Take the tiles away again, so that the system need not save them for this thread."""
        self._tile_call("tilerelease")

    def zero_matrix(self, tile: int) -> None:
        self._tile_call("tilezero", ir.Constant(I8, tile))

    def load_matrix(self, tile: int, address: ir.Value, stride: ir.Value | int) -> None:
        """Rows that are `stride` bytes apart."""
        self._tile_call("tileloadd64", ir.Constant(I8, tile), self.pointer(address, 0, I8), self.index(stride))

    def store_matrix(self, tile: int, address: ir.Value, stride: ir.Value | int) -> None:
        self._tile_call("tilestored64", ir.Constant(I8, tile), self.pointer(address, 0, I8), self.index(stride))

    def multiply_matrices(self, sums: int, left: int, right: int) -> None:
        """Tile `sums` += left x right."""
        self._tile_call("tdpbf16ps", *(ir.Constant(I8, tile) for tile in (sums, left, right)))

    def _tile_call(self, name: str, *arguments: ir.Value) -> None:
        type_ = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        self.builder.call(declare(self.builder.module, f"llvm.x86.{name}", type_), arguments)

    def target_call(self, name: str, result: ir.Type, *arguments: Vector) -> Vector:
        values = [argument.value for argument in arguments]
        function = ir.FunctionType(result, [value.type for value in values])
        return self.vector(self.builder.call(declare(self.builder.module, name, function), values))


def declare(module: ir.Module, name: str, type_: ir.FunctionType) -> ir.Function:
    return module.globals[name] if name in module.globals else ir.Function(module, type_, name)


def _float_from_half(half: Vector) -> Vector:
    """float32 from the bits of float16 in int32 lanes: a product with 2^112 moves the exponent, of denormals too."""
    size = (half & 0x7FFF) << 13
    moved = (size.bits_as(F32) * 2.0**112).bits_as(I32)
    not_finite = size.less(0x0F800000).choose(size.constant(0), size.constant(0x7F800000))
    return (moved | not_finite | ((half & 0x8000) << 16)).bits_as(F32)


def _half_from_float(x: Vector) -> Vector:
    """The bits of float16, ties to even, in int32 lanes (F. Giesen, "Float->half variants", 2016)."""
    bits = x.bits_as(I32)
    size = bits & 0x7FFFFFFF
    normal = (size + (((size >> 13) & 1) + (0xFFF - (112 << 23)))) >> 13
    denormal = (size.bits_as(F32) + 0.5).bits_as(I32) - 0x3F000000  # the sum's last bit is float16's last one
    infinite = size.less(0x7F800001).choose(size.constant(0x7C00), size.constant(0x7E00))
    result = size.less(113 << 23).choose(denormal, size.less(143 << 23).choose(normal, infinite))
    return result | ((bits >> 16) & 0x8000)
