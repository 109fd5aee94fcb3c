"""Weights of 8 bits with scales beside them, and perhaps zero points: w = (q - zero) * scale.

The weight is of type F8_E4M3, F8_E5M2 or I8; the scale is a tensor NAME_scale or NAME_scale_inv (DeepSeek's name: the
inverse of what the floats were multiplied by, so it too is multiplied with), or X.scale beside X.weight, which may be a
bare exponent of a byte. A matrix that several devices had a part of each has blocks that begin anew with each part.
One scale serves the whole matrix, a row, a group of inputs in a row, or a block of 128 x 128 weights: its shape says
which. Matrices of experts may lie in one tensor, and so may their scales. Asymmetric weights have a tensor
NAME_zero_point too, in the shape of the scale. Such files come from the methods that Hugging Face calls fp8, fbgemm_fp8
and compressed-tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from qrun.formats.blocks import TensorType
from qrun.formats.blocks.layout import F32Array
from qrun.formats.checkpoints.plain import FLOATS
from qrun.formats.checkpoints.plain import decode as decode_floats
from qrun.formats.errors import FormatError
from qrun.formats.gguf.cursor import quote
from qrun.formats.safetensors import StoredTensor
from qrun.formats.tensors import SourceTensor

BYTE_TYPES = frozenset({"F8_E4M3", "F8_E5M2", "I8"})
SUFFIXES = ("_scale_inv", "_scale")
ZERO_POINT = "_zero_point"
ZERO_TYPES = frozenset({*FLOATS, "I8", "I16", "I32", "I64"})
DEFAULT_BLOCK = (128, 128)
DEVICES = (8, 4)
EXPONENTS = "F8_E8M0"
POWERS = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.nan).astype(np.float32)


@dataclass(frozen=True, eq=False)
class ScaledTensor(SourceTensor):
    """scale, zero: float32 [row blocks, column blocks], each for a block of `block` weights; zero may be None.

    parts: of how many equal parts of the rows each has blocks of its own.
    """

    stored: StoredTensor
    scale: F32Array
    zero: F32Array | None
    block: tuple[int, int]
    parts: int = 1

    def rows(self, start: int, end: int) -> F32Array:
        weights = decode_floats(self.stored, self.stored.raw[start * self.row : end * self.row])
        weights = weights.reshape(end - start, self.row)
        if self.zero is not None:
            weights = weights - self._spread(self.zero, start, end)
        return weights * self._spread(self.scale, start, end)

    def _spread(self, values: F32Array, start: int, end: int) -> F32Array:
        """The values that belong to rows start to end, as broadcasting wants them."""
        part, row = np.divmod(np.arange(start, end), max(self.n_rows // self.parts, 1))
        per_row = values[part * (len(values) // self.parts) + row // self.block[0]]
        return np.repeat(per_row, self.block[1], axis=1)[:, : self.row] if per_row.shape[1] > 1 else per_row

    def forget(self) -> None:
        self.stored.forget()

    def error(self, reason: str) -> FormatError:
        return self.stored.error(reason)


def decode(
    tensors: dict[str, StoredTensor], quantization: Mapping[str, Any], path: Path
) -> dict[str, SourceTensor]:
    """See `formats.checkpoints.Decoder`."""
    for suffix, state in (("_packed", "packed"), ("bitmask", "sparse"), ("_g_idx", "in groups of its own order")):
        name = next((name for name in tensors if name.endswith(suffix)), None)
        if name is not None:
            format, tensor = quote(str(quantization.get("format"))), quote(name)
            raise FormatError(path, f"the quantisation format {format} is not supported: tensor {tensor} is {state}")
    block = _block(quantization, path)
    weights: dict[str, SourceTensor] = {}
    for name in [name for name, tensor in tensors.items() if tensor.dtype in BYTE_TYPES]:
        if name not in tensors:  # it was the scale of another one
            continue
        names = [*(name + suffix for suffix in SUFFIXES), scale_beside(name)]
        scale = next((found for name in names if (found := tensors.pop(name, None)) is not None), None)
        if scale is not None:
            weights[name] = _scaled(tensors.pop(name), scale, tensors.pop(name + ZERO_POINT, None), block)
    return weights


def scale_beside(name: str) -> str:
    """The name of the scale of X.weight that is called X.scale; "" where a tensor is called otherwise."""
    return f"{name.removesuffix('weight')}scale" if name.endswith(".weight") else ""


def _block(quantization: Mapping[str, Any], path: Path) -> tuple[int, int]:
    size = quantization.get("weight_block_size")
    if size is None:
        return DEFAULT_BLOCK
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and 0 < n < 1 << 31 for n in size):
        raise FormatError(path, f"weight_block_size is {quote(str(size))}, expected two positive numbers")
    return size[0], size[1]


def _scaled(
    stored: StoredTensor, scale: StoredTensor, zero: StoredTensor | None, block: tuple[int, int]
) -> ScaledTensor:
    if len(stored.shape) not in (2, 3):
        raise stored.error(f"has scales and the shape {stored.shape}, expected a matrix, or several")
    if scale.dtype not in (*FLOATS, EXPONENTS):
        raise scale.error(f"is of type {scale.dtype}, expected floats")
    rows, columns = prod(stored.shape[:-1]), stored.shape[-1]
    parts = 0
    values = POWERS[scale.raw] if scale.dtype == EXPONENTS else decode_floats(scale, scale.raw)
    if values.size == 1:
        block, shape = (max(rows, 1), max(columns, 1)), (1, 1)
    elif len(stored.shape) == 3:
        parts, height = stored.shape[0], stored.shape[1]
        block, per_part = _of_each(scale, (height, columns), parts, block)
        shape = (parts * per_part[0], per_part[1])
    elif scale.shape in ((rows,), (rows, 1)):
        block, shape = (1, max(columns, 1)), (rows, 1)
    elif parts := _parts((rows, columns), scale.shape, block):
        shape = (scale.shape[0], scale.shape[1])
    elif len(scale.shape) == 2 and scale.shape[0] == rows and scale.shape[1] and columns % scale.shape[1] == 0:
        block, shape = (1, columns // scale.shape[1]), (rows, scale.shape[1])
    else:
        raise scale.error(f"has the shape {scale.shape}, which does not fit a weight of {stored.shape}")
    zeros = None if zero is None else _zeros(zero, values.size).reshape(shape)
    return ScaledTensor(
        stored.name, TensorType.BF16, stored.shape, stored, values.reshape(shape), zeros, block, parts or 1
    )


def _of_each(
    scale: StoredTensor, shape: tuple[int, int], count: int, block: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of matrices of one shape: the block that shares a scale, and the scales of each matrix."""
    height, columns = shape
    blocks = (-(height // -block[0]), -(columns // -block[1]))
    if scale.shape in ((count,), (count, 1, 1)):
        return (max(height, 1), max(columns, 1)), (1, 1)
    if scale.shape in ((count, height), (count, height, 1)):
        return (1, max(columns, 1)), (height, 1)
    if scale.shape == (count, *blocks):
        return block, blocks
    raise scale.error(f"has the shape {scale.shape}, which does not fit {count} weights of {shape}")


def _parts(shape: tuple[int, int], scales: tuple[int, ...], block: tuple[int, int]) -> int:
    """How many parts of the rows have blocks of their own: of a matrix that several devices had parts of more than one.
    0: scales are not those of blocks."""
    if len(scales) != 2 or scales[1] != -(shape[1] // -block[1]):
        return 0
    return parts_of(shape[0], scales[0], block[0], (1, *DEVICES))


def parts_of(n_rows: int, n_blocks: int, height: int, numbers: Sequence[int]) -> int:
    """The first of these numbers of equal parts of the rows that has so many blocks of a height, if each part has its
    own; 0 if there is none."""
    return next((n for n in numbers if n_rows % n == 0 and n_blocks == n * -(n_rows // n // -height)), 0)


def _zeros(zero: StoredTensor, count: int) -> F32Array:
    if zero.dtype not in ZERO_TYPES:
        raise zero.error(f"is of type {zero.dtype}, expected one of {', '.join(sorted(ZERO_TYPES))}")
    values = decode_floats(zero, zero.raw)
    if values.size != count:
        raise zero.error(f"has the shape {zero.shape}, and there are {count} scales")
    return values
