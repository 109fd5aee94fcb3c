"""Builds safetensors files byte by byte, right or wrong, with nothing of the code under test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# A tensor: its type, its shape, its bytes.
Tensor = tuple[str, tuple[int, ...], bytes]


def tensor(values: np.ndarray, dtype: str = "F32") -> Tensor:
    """values: of the NumPy type in which the bytes are to be written."""
    return dtype, values.shape, np.ascontiguousarray(values).tobytes()


def brain_floats(values: np.ndarray) -> Tensor:
    """The upper half of each float32, rounded towards zero."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16
    return tensor(bits.astype("<u2").reshape(values.shape), "BF16")


def header_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Descriptions, one tensor after another."""
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    return header


def build(tensors: Mapping[str, Tensor], header: Any = None, padding: int = 0) -> bytes:
    """A whole file. header: instead of the right one; a str is taken as it is."""
    header = header_of(tensors) if header is None else header
    text = (header if isinstance(header, str) else json.dumps(header)).encode() + b" " * padding
    return len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values())


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    header = header_of(tensors)
    if metadata is not None:
        header = {"__metadata__": dict(metadata)} | header
    path.write_bytes(build(tensors, header))
    return path
