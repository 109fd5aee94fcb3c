"""Sums of products of int8, as each kind of CPU adds them. They are exact, and so the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from qrun.engine.simd.vector import I8, I16, I32, Emitter, Vector


class Dot:
    """Sums in int32 lanes, to which four products a lane are added at a time.

    start: what they begin at. limit: weights are bytes of 0..limit, which is at most 127, or 255 with VNNI; None: they
    are -128..127, with VNNI with 128 added (`Emitter.bias_signed`). Activations are int8, of at most 127 in size.
    """

    def __init__(self, e: Emitter, start: Vector, limit: int | None) -> None:
        self._e, self._sums, self._signed = e, start, limit is None
        # Of AVX2's and of Neon's sums in int16, each of two products, so many surely fit there together. (|w| and an
        # activation with w's sign make w * a, and 2 * 128 * 127 = 32,512 fits.)
        self._room = 32767 // (2 * (128 if limit is None else limit) * 127)
        self._waiting: list[tuple[Vector, Vector]] = []
        self._pairs: Vector | None = None
        self._n_pairs = 0

    def add(self, weights: Vector, activations: Vector) -> None:
        e, kind = self._e, self._e.target.dot
        if kind == "vnni":
            self._sums = _dpbusd(e, self._sums, weights, activations)
        elif kind == "avx2":
            if self._signed:
                weights, activations = e.without_signs(weights), e.with_signs(activations, weights)
            pairs = _maddubs(e, weights, activations)
            self._pairs = pairs if self._pairs is None else self._pairs + pairs
            self._n_pairs += 1
            if self._n_pairs == self._room:
                self._widen()
        elif kind == "neon":
            self._waiting.append((weights, activations))
            if len(self._waiting) == self._room:
                self._widen()
        elif kind == "dotprod":
            weights, activations = weights.bits_as(I8), activations.bits_as(I8)
            name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
            self._sums = e.target_call(name, self._sums.value.type, self._sums, weights, activations)
        else:
            for byte in range(4):
                left = (weights << (24 - 8 * byte)).shift_right_signed(24)
                right = (activations << (24 - 8 * byte)).shift_right_signed(24)
                self._sums = self._sums + left * right

    def value(self) -> Vector:
        self._widen()
        return self._sums

    def _widen(self) -> None:
        """Take what is in int16 into the sums."""
        if self._pairs is not None:
            self._sums = self._sums + _widen_pairs(self._e, self._pairs)
            self._pairs, self._n_pairs = None, 0
        if self._waiting:
            self._sums = _add_neon_products(self._e, self._sums, self._waiting)
            self._waiting = []

    @staticmethod
    def in_registers(dots: Sequence[Dot]) -> None:
        """See `Emitter.in_registers`: what has been added so far, to dots that have been added to as often, on x86."""
        e = dots[0]._e
        if all(dot._pairs is not None for dot in dots):
            for dot, pairs in zip(dots, e.in_registers([dot._pairs for dot in dots if dot._pairs]), strict=True):
                dot._pairs = pairs
        else:
            for dot, sums in zip(dots, e.in_registers([dot._sums for dot in dots]), strict=True):
                dot._sums = sums


def _dpbusd(e: Emitter, sums: Vector, weights: Vector, activations: Vector) -> Vector:
    name = f"llvm.x86.avx512.vpdpbusd.{32 * sums.lanes}"
    return e.target_call(name, sums.value.type, sums, weights.bits_as(I8), activations.bits_as(I8))


def _maddubs(e: Emitter, weights: Vector, activations: Vector) -> Vector:
    weights, activations = weights.bits_as(I8), activations.bits_as(I8)
    result = ir.VectorType(I16, weights.lanes // 2)
    name = {16: "llvm.x86.avx2.pmadd.ub.sw", 32: "llvm.x86.avx512.pmaddubs.w.512"}[result.count]
    return e.target_call(name, result, weights, activations)


def _widen_pairs(e: Emitter, pairs: Vector) -> Vector:
    result = ir.VectorType(I32, pairs.lanes // 2)
    name = {8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}[result.count]
    return e.target_call(name, result, pairs, pairs.constant(1))


def _add_neon_products(e: Emitter, sums: Vector, pairs: Sequence[tuple[Vector, Vector]]) -> Vector:
    """smull and smlal for both halves of 16 bytes; addp and saddlp add the four neighbours of a lane, to int32."""
    halves = []
    for lanes in (range(8), range(8, 16)):
        products = [
            w.bits_as(I8).permute(lanes).widen_signed(I16) * a.bits_as(I8).permute(lanes).widen_signed(I16)
            for w, a in pairs
        ]
        total = products[0]
        for product in products[1:]:
            total = total + product
        halves.append(total)
    words = ir.VectorType(I16, 8)
    neighbours = e.target_call("llvm.aarch64.neon.addp.v8i16", words, *halves)
    return sums + e.target_call("llvm.aarch64.neon.saddlp.v4i32.v8i16", sums.value.type, neighbours)
