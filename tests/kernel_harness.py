"""Running single kernels from tests, on random tensors: records filled by hand, on one thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from qrun.engine.kernels import records as R
from qrun.engine.kernels.unpack import TYPES, Quantised
from qrun.engine.native.compiler import load_kernels
from qrun.engine.program.record_writer import FLOAT_TYPES, blocks_and_tail
from qrun.engine.simd.target import Target, host_target
from qrun.formats import TensorType, dequantize
from qrun.formats.blocks import BLOCK_FORMATS

# Where a block's float16 scales and minimums lie: random bytes there would give infinities.
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "IQ4_NL": [0], "IQ4_XS": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ1_S": [0], "IQ2_XXS": [0],
    "IQ2_XS": [0], "IQ2_S": [0], "IQ3_XXS": [0], "IQ3_S": [0], "TQ1_0": [52], "TQ2_0": [64], "Q1_0": [0], "Q2_0": [0],
}  # fmt: skip
# Added to an offset: the address of that field of the step's record.
IN_STEP = -(1 << 40)


def record(size: int, fields: dict[int, int | float]) -> np.ndarray:
    """A record with its fields set: integers as int64, floats as float32 in the low half."""
    words = np.zeros(size // 8, np.int64)
    for offset, value in fields.items():
        if isinstance(value, float):
            words.view(np.float32)[offset // 4] = value
        else:
            words[offset // 8] = value
    return words


def has_tiles() -> bool:
    """Whether this machine has AMX, and its system lets this process use it."""
    try:
        return host_target("amx").tiles
    except ValueError:
        return False


class Functions(Protocol):
    """Kernels that can be called: those of `engine.native.compiler`, or emulated ones."""

    def function(self, key: str) -> Callable[[int, int, int], None]: ...


class Harness:
    """Kernels for one target, and a step of `rows` rows."""

    def __init__(
        self, target: Target, keys: list[str], load: Callable[[Sequence[str], Target], Functions] = load_kernels
    ) -> None:
        self.target = target
        self.kernels = load(keys, target)

    def run(
        self, key: str, fields: dict[int, int | float], rows: int, step: dict[int, int | float] | None = None,
        part: int = 0,
    ) -> None:  # fmt: skip
        words = record(R.STEP_BYTES, {R.STEP_PARTS: 1, R.N_ROWS: rows, **(step or {})})
        words[R.ROW_RANGES // 8 : R.ROW_RANGES // 8 + 4] = (1, 0, 0, rows)
        base = words.ctypes.data
        places = {IN_STEP + offset: base + offset for offset in (R.N_ROWS, R.ROW_RANGES)}
        op = record(R.RECORD_BYTES, {offset: places.get(value, value) for offset, value in fields.items()})  # type: ignore[call-overload]
        counter = np.zeros(1, np.int64)
        op[R.OP_COUNTER // 8] = counter.ctypes.data
        self.kernels.function(key)(op.ctypes.data, base, part)

    def packed(self, x: np.ndarray, packing: str, parts: int = 1) -> np.ndarray:
        """The rows of x as the matmul kernels take them, packed in so many parts."""
        rows, width = x.shape
        columns = R.TILE_COLUMNS if packing == "whole" else self.target.columns
        columns = 1 if rows == 1 else columns
        panels = -(-rows // columns) * columns
        size = panels * width * 4
        room = np.zeros(size + 64, np.uint8)
        packed = room[-room.ctypes.data % 64 :][:size]  # in whole cache lines, as in an arena
        fields = {
            R.ROW_COUNT: IN_STEP + R.N_ROWS, R.ROW_X: x.ctypes.data, R.ROW_X_STRIDE: width * 4, R.ROW_Y: x.ctypes.data,
            R.ROW_Y_STRIDE: width * 4, R.ROW_Z: x.ctypes.data, R.ROW_WIDTH: width, R.ROW_PACKED: packed.ctypes.data,
        }  # fmt: skip
        for part in range(parts):
            self.run(f"pack-{packing}", fields, rows, {R.STEP_PARTS: parts}, part)
        return packed

    def matmul(
        self,
        type_name: str,
        weights: np.ndarray,
        n_rows: int,
        x: np.ndarray,
        extra: dict[int, int | float] | None = None,
        whole: bool = False,
    ) -> np.ndarray:
        """x @ weights.T by the kernel; weights: the file's bytes. whole: by tiles of whole numbers."""
        type_ = TensorType[type_name]
        rows, width = x.shape
        blocks, tail = blocks_and_tail(type_, width)
        block_bytes = R.ROUNDED_BYTES if self.target.folded else R.PACKED_BYTES
        tiled = self.target.tiles and type_name in ("F16", "BF16") and width % 32 == 0
        packing, column_bytes = ("f32", width * 4) if type_ in FLOAT_TYPES else ("q8", width // 32 * block_bytes)
        packing = type_name.lower() if tiled else packing
        if whole:
            tiled, packing, column_bytes = True, "whole", width // 32 * R.TILE_PACKED_BYTES
        row_bytes = len(weights) // n_rows
        packed = self.packed(np.ascontiguousarray(x, np.float32), packing)
        out = np.full((rows, n_rows), np.nan, np.float32)
        fields = {
            R.MM_WEIGHTS: weights.ctypes.data, R.MM_ROW_BYTES: row_bytes, R.MM_ROWS: n_rows, R.MM_BLOCKS: blocks,
            R.MM_TAIL: tail, R.MM_INPUT: packed.ctypes.data, R.MM_COLUMN_BYTES: column_bytes,
            R.MM_OUT: out.ctypes.data, R.MM_OUT_STRIDE: n_rows * 4, R.MM_SCALE: 1.0, R.MM_CHUNK: 32,
            R.MM_RANGES: IN_STEP + R.ROW_RANGES, **(extra or {}),
        }  # fmt: skip
        self.run(f"matmul-{type_name}{'-tiles' if tiled else ''}", fields, rows)
        return out

    def embed(
        self, type_name: str, weights: np.ndarray, n_rows: int, width: int, tokens: np.ndarray, scale: float = 1.0
    ) -> np.ndarray:
        """The rows `tokens` (int64) of a matrix, times `scale`; weights: the file's bytes."""
        blocks, tail = blocks_and_tail(TensorType[type_name], width)
        out = np.full((len(tokens), width), np.nan, np.float32)
        fields = {
            R.EMBED_WEIGHTS: weights.ctypes.data, R.EMBED_ROW_BYTES: weights.nbytes // n_rows, R.EMBED_BLOCKS: blocks,
            R.EMBED_TAIL: tail, R.EMBED_OUT: out.ctypes.data, R.EMBED_OUT_STRIDE: width * 4, R.EMBED_SCALE: scale,
        }  # fmt: skip
        self.run(f"embed-{type_name}", fields, len(tokens), {R.TOKENS: tokens.ctypes.data})
        return out

    def rows(
        self,
        key: str,
        x: np.ndarray,
        z: np.ndarray | None = None,
        step: dict[int, int | float] | None = None,
        **fields: int | float,
    ) -> np.ndarray:
        """A kernel that makes rows of rows; fields: those of its record, by their names in `records`."""
        rows, width = x.shape
        z = x if z is None else z
        y = np.full_like(x, np.nan)
        row_fields = {
            R.ROW_COUNT: IN_STEP + R.N_ROWS, R.ROW_X: x.ctypes.data, R.ROW_X_STRIDE: width * 4, R.ROW_Y: y.ctypes.data,
            R.ROW_Y_STRIDE: width * 4, R.ROW_Z: z.ctypes.data, R.ROW_Z_STRIDE: width * 4, R.ROW_WIDTH: width,
            R.ROW_FACTOR: 1.0, R.ROW_GROUPS: 1,
        }  # fmt: skip
        self.run(key, row_fields | {getattr(R, name): value for name, value in fields.items()}, rows, step)
        return y


def random_tensor(
    rng: np.random.Generator, name: str, rows: int, width: int, byte: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A tensor's bytes, and its values as float32 [rows, width]. `byte`: what all bytes of quantised weights are."""
    layout = BLOCK_FORMATS[TensorType[name]]
    if not isinstance(TYPES[name], Quantised):
        values = rng.normal(size=(rows, width)).astype(np.float32)
        raw = {
            "F32": values,
            "F16": values.astype(np.float16),
            "BF16": (values.view(np.uint32) >> 16).astype(np.uint16),
        }[name].view(np.uint8)
    else:
        low, high = (0, 256) if byte is None else (byte, byte + 1)
        raw = rng.integers(low, high, (rows * width // layout.block_size, layout.block_bytes), np.uint8)
        for offset in HALVES.get(name, []):
            raw[:, offset : offset + 2] = (rng.uniform(-0.01, 0.01, (len(raw), 1)).astype(np.float16)).view(np.uint8)
        if name == "MXFP4":
            raw[:, 0] = rng.integers(118, 124, len(raw))
            raw[0, 0] = rng.integers(0, 3)
        if name == "IQ1_M":  # its scale is spread over four places: this one has the sign and most of the exponent
            raw[:, 55] = raw[:, 55] & 0x0F | rng.choice(np.array([0x20, 0xA0], np.uint8), len(raw))
        if name == "Q8_K":
            raw[:, :4] = rng.uniform(-1, 1, (len(raw), 1)).astype(np.float32).view(np.uint8)
    raw = np.ascontiguousarray(raw.reshape(-1))
    return raw, dequantize(raw, TensorType[name], (rows, width))


ALL_FORMS = "QRUN_TEST_FORMS" in os.environ
"""Whether this is `make test-forms`: all types, caches and kernels for all kinds of machines."""

# Compiling takes most of the time of these tests. All types are tested in the host's own form; in others some, one for
# each way in which weights are read, unless `make test-forms` asks for all.
FEW = ("F32", "F16", "BF16", "Q4_0", "Q5_1", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ4_XS", "IQ3_S", "TQ1_0")
# Where vectors are as long as in another form, the same code reads weights, and only products of integers differ: some
# types with each way in which those are added will do, signed weights, one or two scales in a block of 32, minimums,
# zeros, and groups that are looked up in memory. Floats and embeddings have no such products: with AVX-VNNI they are
# AVX2's machine code, byte for byte; in the forms with vectors of 16, all but those left here are the host's.
PRODUCTS = ("Q4_0", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ3_S")
OWN_MATMULS = {
    "plain": ("F32", "F16", "BF16", *PRODUCTS),  # vectors of four: as on Arm, which is emulated
    "avx-vnni": PRODUCTS,
    "avx512": ("F16", "BF16", *PRODUCTS),
    "amx-folded": ("F32", "F16", "BF16", *PRODUCTS),
    "neon-dotprod": ("F32", "F16", *PRODUCTS),  # emulated
}
OWN_EMBEDDINGS = {"avx-vnni": (), "avx512": ("F16", "IQ3_S"), "amx-folded": ()}


def types_of(form: str, kernel: str = "matmul") -> list[str]:
    """The types with which a form ("best", or another) of a kernel ("matmul" or "embed") is tested."""
    if form == "best" or ALL_FORMS:
        return list(TYPES)
    own = OWN_MATMULS if kernel == "matmul" else OWN_EMBEDDINGS
    return list(own.get(form, FEW))
