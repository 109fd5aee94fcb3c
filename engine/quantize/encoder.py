"""Quantising rows of weights with the compiled kernels: the bytes of `qrun.formats.blocks.quantize`, much sooner."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from qrun.engine.kernels import records as R
from qrun.engine.native.compiler import Progress, default_target, load_kernels
from qrun.engine.simd.target import Target
from qrun.formats.blocks import BLOCK_FORMATS, BLOCK_SIZES, LARGE_FIRST, SEARCHES, TensorType, dequantize
from qrun.formats.blocks.fitting import Groups
from qrun.formats.blocks.floats import DTYPES, Floats
from qrun.formats.blocks.grid_fitting import tables

F32Array = NDArray[np.float32]
U8Array = NDArray[np.uint8]
SOURCE_TYPES = {dtype: type for type, dtype in DTYPES.items()}


@dataclass
class Encoded:
    """raw: the bytes. error, energy: the sums of (x - y)^2 and of x^2; weighted_*: each times its importance."""

    raw: U8Array
    error: float = 0.0
    energy: float = 0.0
    weighted_error: float = 0.0
    weighted_energy: float = 0.0


class Encoder:
    """Quantises to some types. `encode` may be called from several threads at once, and leaves the GIL to others."""

    def __init__(
        self, types: Iterable[TensorType], target: Target | None = None, progress: Progress | None = None
    ) -> None:
        """progress(done, total): called while kernels are compiled. ValueError if a type cannot be encoded."""
        target = target or default_target()
        wanted = set(types)
        for type in wanted:
            block_format = BLOCK_FORMATS.get(type)
            if block_format is None or block_format.quantize is None:
                raise ValueError(f"tensors of type {type.name} cannot be encoded")
        searched = sorted(type for type in wanted if type in SEARCHES)
        self._functions: dict[TensorType, Callable[[int, int, int], None]] = {}
        if searched:
            kernels = load_kernels([f"quantize-{type.name}" for type in searched], target, progress)
            self._functions = {type: kernels.function(f"quantize-{type.name}") for type in searched}
        self._lanes = target.lanes

    def encode(
        self, weights: Floats, type: TensorType, importance: F32Array | None = None, *, large_first: bool | None = None
    ) -> Encoded:
        """weights: [rows, row], rows of whole blocks. importance: float32 [row], positive. large_first: see
        `qrun.formats.blocks.quantize`; by default as the type has it."""
        weights = np.require(weights, requirements="C")
        source_type = SOURCE_TYPES[weights.dtype]
        if type not in self._functions:
            return _encode_floats(dequantize(weights.reshape(-1).view(np.uint8), source_type, weights.shape), type)
        effort = SEARCHES[type].effort(importance is not None)
        size, n_bytes = BLOCK_SIZES[type]
        row = weights.shape[-1]
        if row % size:
            raise ValueError(f"rows of {row} weights are not whole blocks of {size}, as {type.name} has them")
        if importance is not None:
            importance = np.ascontiguousarray(importance, np.float32)
            if importance.shape != (row,):
                raise ValueError(f"importance of shape {importance.shape} for rows of {row} weights")
        n_blocks = weights.size // size
        raw = np.empty(n_blocks * n_bytes, np.uint8)
        sums = np.empty((4, self._lanes), np.float32)
        trials = effort.trials
        record = np.zeros(R.RECORD_BYTES // 8, np.int64)
        fields = {
            R.Q_SOURCE: weights.ctypes.data, R.Q_SOURCE_TYPE: source_type, R.Q_BLOCKS: n_blocks,
            R.Q_IMPORTANCE: 0 if importance is None else importance.ctypes.data, R.Q_ROW_BLOCKS: row // size,
            R.Q_OUT: raw.ctypes.data, R.Q_SUMS: sums.ctypes.data, R.Q_TRIALS: trials.ctypes.data,
            R.Q_N_TRIALS: len(trials), R.Q_REFINEMENTS: effort.refinements, R.Q_ROUNDS: SEARCHES[type].rounds,
            R.Q_BY_SIZE: int(type in LARGE_FIRST if large_first is None else large_first),
        }  # fmt: skip
        levels = SEARCHES[type].levels
        if isinstance(levels, Groups):
            words = tables(levels)
            fields |= {R.Q_LEVELS: words.level_words.ctypes.data, R.Q_CANDIDATES: words.candidate_words.ctypes.data}
        for offset, value in fields.items():
            record[offset // 8] = value
        self._functions[type](record.ctypes.data, 0, 0)
        return Encoded(raw, *sums.sum(axis=1, dtype=np.float64).tolist())


def _encode_floats(weights: F32Array, type: TensorType) -> Encoded:
    block_format = BLOCK_FORMATS[type]
    assert block_format.quantize is not None and prod(weights.shape) == weights.size
    blocks = weights.reshape(-1, 1)
    raw = block_format.quantize(blocks, None)
    miss = block_format.dequantize(raw) - blocks
    error = float(np.square(miss).sum(dtype=np.float64))
    energy = float(np.square(blocks).sum(dtype=np.float64))
    return Encoded(raw.reshape(-1), error, energy, error, energy)
