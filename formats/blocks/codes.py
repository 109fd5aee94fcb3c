"""The parts of a block by themselves: the scale and the minimum of each group of weights, and the codes of the weights.

Whoever chooses codes in another way than weight by weight takes the scales of a block as they are and puts codes of its
own in: a weight is scale * level(code) - minimum, by the levels of the format's search (see `fitting`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from qrun.formats.blocks import q3_k, q4_k, q5_0
from qrun.formats.blocks.layout import F32Array, TensorType, U8Array, bit_fields, pack_fields, read_f16
from qrun.formats.dataclass import dataclass

Scales = tuple[F32Array, F32Array]  # scale and minimum, each [n, groups]


def _none(scale: F32Array) -> Scales:
    return scale, np.zeros_like(scale)


def _half(blocks: U8Array) -> Scales:
    return _none(read_f16(blocks, 0))


def _half_pair(blocks: U8Array) -> Scales:
    """The minimum is added there."""
    return read_f16(blocks, 0), -read_f16(blocks, 2)


def _q2_k(blocks: U8Array) -> Scales:
    scale, minimum = (part.astype(np.float32) for part in (blocks[:, :16] & 15, blocks[:, :16] >> 4))
    return read_f16(blocks, 80) * scale, read_f16(blocks, 82) * minimum


def _q3_k(blocks: U8Array) -> Scales:
    return _none(read_f16(blocks, 108) * q3_k.unpack_scales(blocks[:, 96:108]).astype(np.float32))


def _q4_k(blocks: U8Array) -> Scales:
    scale, minimum = q4_k.unpack_scales(blocks[:, 4:16])
    return read_f16(blocks, 0) * scale.astype(np.float32), read_f16(blocks, 2) * minimum.astype(np.float32)


def _q6_k(blocks: U8Array) -> Scales:
    return _none(read_f16(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32))


def _iq4_xs(blocks: U8Array) -> Scales:
    high = bit_fields(blocks[:, 2:4], 2).swapaxes(-1, -2).reshape(-1, 8)
    low = bit_fields(blocks[:, 4:8], 4).swapaxes(-1, -2).reshape(-1, 8)
    scale = (low | high << np.uint8(4)).astype(np.int8) - np.int8(32)
    return _none(read_f16(blocks, 0) * scale.astype(np.float32))


def _put(blocks: U8Array, start: int, packed: NDArray[np.uint8]) -> None:
    blocks[:, start : start + packed.reshape(len(blocks), -1).shape[1]] = packed.reshape(len(blocks), -1)


def _put_nibbles(start: int) -> Callable[[U8Array, U8Array], None]:
    return lambda blocks, codes: _put(blocks, start, pack_fields(codes.reshape(-1, 2, 16), 4))


def _put_five_bits(start: int) -> Callable[[U8Array, U8Array], None]:
    def put(blocks: U8Array, codes: U8Array) -> None:
        high, low = q5_0.pack(codes)
        _put(blocks, start, high)
        _put(blocks, start + 4, low)

    return put


def _put_q8_0(blocks: U8Array, codes: U8Array) -> None:
    _put(blocks, 2, (codes.astype(np.int16) - 127).astype(np.int8).view(np.uint8))


def _put_q2_k(blocks: U8Array, codes: U8Array) -> None:
    _put(blocks, 16, pack_fields(codes.reshape(-1, 2, 4, 32), 2))


def _put_q3_k(blocks: U8Array, codes: U8Array) -> None:
    _put(blocks, 0, pack_fields((codes >> 2).reshape(-1, 8, 32), 1))
    _put(blocks, 32, pack_fields((codes & 3).reshape(-1, 2, 4, 32), 2))


def _put_q4_k(blocks: U8Array, codes: U8Array) -> None:
    _put(blocks, 16, pack_fields(codes.reshape(-1, 4, 2, 32), 4))


def _put_q5_k(blocks: U8Array, codes: U8Array) -> None:
    _put(blocks, 16, pack_fields((codes >> 4).reshape(-1, 8, 32), 1))
    _put(blocks, 48, pack_fields((codes & 15).reshape(-1, 4, 2, 32), 4))


def _put_q6_k(blocks: U8Array, codes: U8Array) -> None:
    _put(blocks, 0, pack_fields((codes & 15).reshape(-1, 2, 2, 64), 4))
    _put(blocks, 128, pack_fields((codes >> 4).reshape(-1, 2, 4, 32), 2))


def _put_iq4_xs(blocks: U8Array, codes: U8Array) -> None:
    _put(blocks, 8, pack_fields(codes.reshape(-1, 8, 2, 16), 4))


@dataclass(frozen=True)
class Codes:
    """scales: of blocks [n, block_bytes]. put: codes [n, block_size] into blocks, in place; all else stays."""

    scales: Callable[[U8Array], Scales]
    put: Callable[[U8Array, U8Array], None]


CODES: dict[TensorType, Codes] = {
    TensorType.Q4_0: Codes(_half, _put_nibbles(2)),
    TensorType.IQ4_NL: Codes(_half, _put_nibbles(2)),
    TensorType.Q4_1: Codes(_half_pair, _put_nibbles(4)),
    TensorType.Q5_0: Codes(_half, _put_five_bits(2)),
    TensorType.Q5_1: Codes(_half_pair, _put_five_bits(4)),
    TensorType.Q8_0: Codes(_half, _put_q8_0),
    TensorType.Q2_K: Codes(_q2_k, _put_q2_k),
    TensorType.Q3_K: Codes(_q3_k, _put_q3_k),
    TensorType.Q4_K: Codes(_q4_k, _put_q4_k),
    TensorType.Q5_K: Codes(_q4_k, _put_q5_k),
    TensorType.Q6_K: Codes(_q6_k, _put_q6_k),
    TensorType.IQ4_XS: Codes(_iq4_xs, _put_iq4_xs),
}
