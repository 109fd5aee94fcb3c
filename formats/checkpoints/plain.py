"""Tensors that are stored as floats: of 32, 16 or 64 bits, brain floats, and floats of 8 bits.

    F8_E4M3    seeeemmm    bias 7, no infinities: 0x7F and 0xFF are NaN, the largest is 448
    F8_E5M2    seeeeemm    the upper half of an F16

(Micikevicius et al., arXiv:2209.05433.)
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qrun.formats.blocks import TensorType, dequantize
from qrun.formats.blocks.floats import Floats, as_stored
from qrun.formats.blocks.layout import F32Array, U8Array
from qrun.formats.errors import FormatError
from qrun.formats.safetensors import DTYPES, StoredTensor
from qrun.formats.tensors import SourceTensor

# What each becomes where it is copied: nothing is lost, but for doubles.
FLOATS = {
    "F32": TensorType.F32, "F16": TensorType.F16, "BF16": TensorType.BF16, "F64": TensorType.F32,
    "F8_E4M3": TensorType.BF16, "F8_E5M2": TensorType.BF16,
}  # fmt: skip


def _e4m3_values() -> NDArray[np.float32]:
    bits = np.arange(256)
    exponent, fraction = (bits >> 3 & 15).astype(np.int32), (bits & 7) / 8.0
    magnitude = np.where(exponent == 0, np.ldexp(fraction, -6), np.ldexp(1 + fraction, exponent - 7))
    magnitude[[0x7F, 0xFF]] = np.nan
    return np.where(bits & 0x80, -magnitude, magnitude).astype(np.float32)


_E4M3 = _e4m3_values()
_E5M2 = (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)


def decode(stored: StoredTensor, raw: U8Array) -> F32Array:
    """Some bytes of a tensor of floats, or of small integers, as float32 [n]."""
    match stored.dtype:
        case "F32" | "F16" | "BF16":
            type = TensorType[stored.dtype]
            return dequantize(raw, type, (len(raw) // DTYPES[stored.dtype].itemsize,))
        case "F8_E4M3":
            return _E4M3[raw]
        case "F8_E5M2":
            return _E5M2[raw]
    with np.errstate(over="ignore"):  # a double that is too large becomes infinite, which is found later
        return raw.view(DTYPES[stored.dtype]).astype(np.float32)


@dataclass(frozen=True, eq=False)
class PlainTensor(SourceTensor):
    """A tensor as it is stored."""

    stored: StoredTensor

    @classmethod
    def of(cls, stored: StoredTensor) -> "PlainTensor":
        return cls(stored.name, FLOATS[stored.dtype], stored.shape, stored)

    def rows(self, start: int, end: int) -> F32Array:
        return decode(self.stored, self._bytes(start, end)).reshape(end - start, self.row)

    def floats(self, start: int, end: int) -> Floats:
        if self.stored.dtype == self.type.name:
            return as_stored(self._bytes(start, end), self.type, self.row)
        return self.rows(start, end)

    def raw(self, start: int, end: int) -> U8Array:
        if self.stored.dtype == self.type.name:
            return self._bytes(start, end)
        return super().raw(start, end)

    def _bytes(self, start: int, end: int) -> U8Array:
        row_bytes = self.row * DTYPES[self.stored.dtype].itemsize
        return self.stored.raw[start * row_bytes : end * row_bytes]

    def forget(self) -> None:
        self.stored.forget()

    def error(self, reason: str) -> FormatError:
        return self.stored.error(reason)
