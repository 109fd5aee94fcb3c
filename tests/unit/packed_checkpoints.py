"""Packing weights as quantised checkpoints hold them: bit by bit, straight from the formats' definitions.

Slow and plain on purpose, and with nothing of the decoders. Codes are [in, out], as the formats have them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DTYPES = {"float32": "F32", "float16": "F16", "int32": "I32", "int64": "I64", "int8": "I8", "uint8": "U8"}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class As:
    """An array, and the type that a file is to give it, if NumPy has none of that name."""

    array: np.ndarray
    dtype: str


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray | As]) -> Path:
    header: dict[str, object] = {}
    data = b""
    for name, tensor in tensors.items():
        array = tensor.array if isinstance(tensor, As) else tensor
        dtype = tensor.dtype if isinstance(tensor, As) else DTYPES[str(array.dtype)]
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Cut to the upper half of single precision: uint16."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def pack_stream(codes: list[int], bits: int) -> list[int]:
    """Codes as one long number from the lowest bit up, cut into 32-bit words."""
    number = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    assert len(codes) * bits % 32 == 0
    return [number >> (32 * i) & 0xFFFFFFFF for i in range(len(codes) * bits // 32)]


def pack_columns(codes: np.ndarray, bits: int) -> np.ndarray:
    """[n, m] -> int32 [n * bits / 32, m]"""
    columns = [pack_stream(list(column), bits) for column in codes.T]
    return np.array(columns, np.uint32).reshape(codes.shape[1], -1).T.copy().view(np.int32)


def pack_awq(codes: np.ndarray) -> np.ndarray:
    """[n, m] -> int32 [n, m / 8], as AutoAWQ's gemm kernels want it."""
    n, m = codes.shape
    packed = np.zeros((n, m // 8), np.uint32)
    for i in range(n):
        for j in range(m // 8):
            for place, column in enumerate(AWQ_ORDER):
                packed[i, j] |= np.uint32(int(codes[i, 8 * j + column]) << (4 * place))
    return packed.view(np.int32)


def dequantized(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """codes [in, out]; zeros, scales [groups, out]; groups [in] -> float32 [out, in], weight by weight."""
    n_in, out = codes.shape
    weights = np.empty((out, n_in), np.float32)
    for i in range(n_in):
        for o in range(out):
            g = groups[i]
            weights[o, i] = np.float32(scales[g, o]) * np.float32(int(codes[i, o]) - int(zeros[g, o]))
    return weights


@dataclass
class Grouped:
    """Random codes, zero points and scales of a layer, and what they stand for."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    groups: np.ndarray

    @property
    def weights(self) -> np.ndarray:
        return dequantized(self.codes, self.zeros, self.scales, self.groups)


def grouped(
    rng: np.random.Generator, out: int, n_in: int, bits: int, group_size: int = -1, *, act_order: bool = False,
    sym: bool = False,
) -> Grouped:  # fmt: skip
    group_size = n_in if group_size == -1 else group_size
    groups = np.arange(n_in) // group_size
    n_groups = int(groups.max()) + 1
    codes = rng.integers(0, 1 << bits, (n_in, out))
    zeros = rng.integers(0, 1 << bits, (n_groups, out))
    zeros = np.full_like(zeros, 1 << (bits - 1)) if sym else zeros
    scales = (rng.uniform(0.5, 2, (n_groups, out)) * 0.02 / (1 << (bits - 1))).astype(np.float16)
    return Grouped(codes, zeros, scales, rng.permutation(groups) if act_order else groups)


def gptq_parts(layer: Grouped, bits: int, *, offset: int = 1) -> dict[str, np.ndarray]:
    """offset: what stored zero points lack; 0 in gptq_v2."""
    zeros = (layer.zeros - offset) % (1 << bits)
    return {
        "qweight": pack_columns(layer.codes, bits),
        "qzeros": pack_columns(zeros.T, bits).T.copy(),
        "scales": layer.scales,
        "g_idx": layer.groups.astype(np.int32),
    }


def awq_parts(layer: Grouped) -> dict[str, np.ndarray]:
    return {"qweight": pack_awq(layer.codes), "qzeros": pack_awq(layer.zeros), "scales": layer.scales}


def gemv_parts(layer: Grouped, *, padding: int = 0) -> dict[str, np.ndarray]:
    """padding: words at the end of each row of zero points, beyond those that are needed."""
    n_groups, out = layer.zeros.shape
    width = 8 * (-(-n_groups // 8) + padding)
    zeros, scales = np.zeros((width, out), int), np.zeros((out, width), np.float16)
    zeros[:n_groups], scales[:, :n_groups] = layer.zeros, layer.scales.T
    qweight, qzeros = pack_columns(layer.codes, 4).T.copy(), pack_columns(zeros, 4).T.copy()
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales}


def four_bits(
    rng: np.random.Generator, shape: tuple[int, int], block_size: int, nested: bool, kind: str = "nf4"
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Random parts of a weight of bitsandbytes' four bits, and what each of its weights is."""
    n, nested_size = shape[0] * shape[1], 3
    n_blocks = -(-n // block_size)
    n_nested = -(-n_blocks // nested_size)
    codes = rng.integers(0, 16, n + n % 2)
    levels = np.sort(rng.normal(size=16)).astype(np.float32)
    state = {"quant_type": kind, "blocksize": block_size, "dtype": "bfloat16", "shape": shape}
    absmax = rng.uniform(0.1, 1, n_blocks).astype(np.float32)
    parts = {
        "weight": np.array([[16 * codes[i] + codes[i + 1]] for i in range(0, n, 2)], np.uint8),
        "weight.absmax": absmax, "weight.quant_map": levels,
    }  # fmt: skip
    if nested:
        state |= {"nested_blocksize": nested_size, "nested_dtype": "float32", "nested_offset": 0.25}
        nested_codes = rng.integers(0, 256, n_blocks).astype(np.uint8)
        nested_levels = np.sort(rng.normal(size=256)).astype(np.float32)
        nested_absmax = rng.uniform(0.1, 1, n_nested).astype(np.float32)
        parts |= {"weight.absmax": nested_codes, "weight.nested_absmax": nested_absmax}
        parts["weight.nested_quant_map"] = nested_levels
        for i in range(n_blocks):
            absmax[i] = nested_levels[nested_codes[i]] * nested_absmax[i // nested_size] + np.float32(0.25)
    parts[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    weights = [levels[codes[k]] * absmax[k // block_size] for k in range(n)]
    return parts, np.array(weights, np.float32).reshape(shape)


def eight_bits(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Random parts of a weight of LLM.int8(), and what each of its weights is."""
    codes, scb = rng.integers(-127, 128, shape).astype(np.int8), rng.uniform(0.5, 2, shape[0]).astype(np.float32)
    weights = codes.astype(np.float32) * scb[:, None] * np.float32(7.874015718698502e-3)
    return {"weight": codes, "SCB": scb, "weight_format": np.array(0, np.uint8)}, weights


# Zero has no sign, as in the formats of GGUF.
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)


def e4m3(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = (8 + mantissa) / 8 * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
    return -magnitude if code & 128 else magnitude


def four_bit_floats(
    rng: np.random.Generator, shape: tuple[int, ...], group: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random codes, two a byte, scales (E4M3 for groups of 16, exponents for those of 32), and what they stand for."""
    codes = rng.integers(0, 16, shape)
    low, high = (32, 100) if group == 16 else (118, 126)
    scales = rng.integers(low, high, (*shape[:-1], shape[-1] // group)).astype(np.uint8)
    weights = np.empty(shape, np.float32)
    for place in np.ndindex(*shape):
        scale = int(scales[(*place[:-1], place[-1] // group)])
        weights[place] = E2M1[codes[place]] * (e4m3(scale) if group == 16 else 2.0 ** (scale - 127))
    return (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8), scales, weights
