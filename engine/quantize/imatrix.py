"""Importance matrices, read and written: how much the inputs of each matrix of a model weigh, from a calibration run.

For each matrix it holds the mean square of every input (of every input of every expert), which is how much an error of
the weights in that column matters: E[(sum of e[j] * a[j])^2] is about the sum of e[j]^2 * E[a[j]^2].

Two formats are about. GGUF: tensors NAME.in_sum2 (sums of squares, [experts, inputs]) and NAME.counts ([experts], how
many were summed). The older one, `.dat`, all little-endian:

    int32 entries
    each:   int32 length, name | int32 calls | int32 values, float32[values]: sums divided by their count, times calls
    then, perhaps:   int32 chunks | int32 length, name of the text

What is written is GGUF, with the names and keys of llama.cpp's `tools/imatrix`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qrun.formats import FormatError, GGUFReader, GGUFWriter, TensorType, ValueType
from qrun.formats.gguf.cursor import decode_text, quote

F32Array = NDArray[np.float32]

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"

# Inputs that the calibration text hardly ever moved still count for this part of the mean.
FLOOR = np.float32(1e-4)


@dataclass
class Imatrix:
    """values: name of a tensor -> mean squares, float32 [experts * inputs]."""

    path: Path
    values: dict[str, F32Array]
    datasets: list[str] = field(default_factory=list)
    chunks: int = 0

    def importance(self, name: str, shape: tuple[int, ...]) -> F32Array | None:
        """Of the weights of a tensor, float32 [experts, row] with a mean of 1 for each expert; None if it has none.

        Raises FormatError if what there is has another size: then it is of another model.
        """
        found = self.values.get(name)
        if found is None:
            return None
        row = shape[-1]
        experts = shape[-3] if len(shape) > 2 else 1
        if found.size != experts * row:
            if name == "token_embd.weight":  # collected by mistake: a lookup has no inputs
                return None
            reason = f"{quote(name)} has {found.size} values, but in the model {experts * row} inputs"
            raise FormatError(self.path, f"{reason}: it is of another model")
        matrix = found.reshape(experts, row)
        mean = matrix.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
        # An expert that was never used: all inputs alike.
        scaled = np.where(mean > 0, matrix / np.where(mean > 0, mean, 1), 1).astype(np.float32)
        return np.maximum(scaled, FLOOR)


@dataclass(frozen=True)
class InputSums:
    """What the rows of a text were, at one matrix: sums of squares [experts, inputs], and counts [experts] of rows."""

    sums: NDArray[np.floating]
    counts: NDArray[np.integer]


def write_imatrix(
    path: str | os.PathLike[str], sums: Mapping[str, InputSums], *, dataset: str, chunks: int, chunk_size: int
) -> None:
    """Write a GGUF file; it appears when it is complete.

    sums: by the tensor's name. dataset: what the text is called. chunks: how many were read, of `chunk_size` tokens.
    """
    with GGUFWriter(path) as writer:
        writer.set_metadata("general.type", "imatrix", ValueType.STRING)
        writer.set_metadata(DATASETS, [dataset], ValueType.ARRAY, ValueType.STRING)
        writer.set_metadata(CHUNK_COUNT, chunks, ValueType.UINT32)
        writer.set_metadata(CHUNK_SIZE, chunk_size, ValueType.UINT32)
        arrays: dict[str, F32Array] = {}
        for name in sorted(sums):
            entry = sums[name]
            dense = len(entry.counts) == 1  # GGUF files spell no dimensions of one
            arrays[name + SUMS] = entry.sums.astype(np.float32).reshape(-1 if dense else entry.sums.shape)
            arrays[name + COUNTS] = entry.counts.astype(np.float32).reshape((-1,) if dense else (-1, 1))
        for name, array in arrays.items():
            writer.add_tensor(name, TensorType.F32, array.shape)
        for name, array in arrays.items():
            writer.write_tensor(name, array)


def unused_experts(sums: Mapping[str, InputSums]) -> int:
    """How many experts' matrices no row of the text went through."""
    return sum(int((entry.counts == 0).sum()) for entry in sums.values())


def read_imatrix(path: str | os.PathLike[str]) -> Imatrix:
    """Read either format. Raises FormatError, naming the file and the matter, if it is damaged or holds nothing."""
    path = Path(path)
    with open(path, "rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    found = _read_gguf(path) if is_gguf else _read_dat(path)
    if not found.values:
        raise FormatError(path, "this importance matrix is empty")
    for name, values in found.values.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise FormatError(path, f"the importance of {quote(name)} is not a finite positive number throughout")
    return found


def _read_gguf(path: Path) -> Imatrix:
    values: dict[str, F32Array] = {}
    with GGUFReader(path) as reader:
        for name, tensor in reader.tensors.items():
            if not name.endswith(SUMS):
                continue
            name = name.removesuffix(SUMS)
            counts_tensor = reader.tensors.get(name + COUNTS)
            if counts_tensor is None:
                raise FormatError(path, f"{quote(name)} has sums but no counts")
            sums, counts = tensor.dequantize().reshape(-1), counts_tensor.dequantize().reshape(-1, 1)
            if counts.size == 0 or sums.size % counts.size:
                raise FormatError(path, f"the sums and counts of {quote(name)} do not fit together")
            if not np.isfinite(counts).all() or (counts < 0).any():
                raise FormatError(path, f"the counts of {quote(name)} are not finite positive numbers throughout")
            matrix = sums.reshape(counts.size, -1)
            values[name] = np.where(counts > 0, matrix / np.maximum(counts, 1), np.float32(1)).reshape(-1)
        datasets = reader.metadata.get(DATASETS, [])
        chunks = reader.metadata.get(CHUNK_COUNT, 0)
    if not values:
        raise FormatError(path, "this is a GGUF file, but not of an importance matrix")
    return Imatrix(
        path, values, datasets if isinstance(datasets, list) else [], chunks if isinstance(chunks, int) else 0
    )


def _read_dat(path: Path) -> Imatrix:
    data = path.read_bytes()
    position = 0

    def integer(what: str) -> int:
        nonlocal position
        if position + 4 > len(data):
            raise FormatError(path, f"the file ends within {what}: it is no importance matrix, or cut short", position)
        value: int = struct.unpack_from("<i", data, position)[0]
        position += 4
        return value

    def take(size: int, what: str) -> bytes:
        nonlocal position
        if size < 0 or position + size > len(data):
            reason = f"{what} takes {size} bytes, but {len(data) - position} remain"
            raise FormatError(path, f"{reason}: it is no importance matrix, or cut short", position)
        position += size
        return data[position - size : position]

    values: dict[str, F32Array] = {}
    for number in range(integer("the number of entries")):
        what = f"entry {number + 1}"
        name = decode_text(take(integer(what), f"the name of {what}"))
        calls = integer(what)
        raw = take(4 * integer(what), f"the values of {what}")
        values[name] = np.frombuffer(raw, "<f4").astype(np.float32) / np.float32(max(calls, 1))
    found = Imatrix(path, values)
    if position < len(data):
        found.chunks = integer("the number of chunks")
        found.datasets = [decode_text(take(integer("a name"), "the name of the text"))]
    return found
