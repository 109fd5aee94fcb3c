"""Matrices as tiles of bfloat16: what AMX is said to do, in NumPy, and the kernels against that, to the bit."""

import numpy as np
import pytest

from qrun.engine.simd.target import host_target
from tests.kernel_harness import Harness, has_tiles, random_tensor


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 to the nearest bfloat16, ties to even, as float32."""
    bits = x.view(np.uint32)
    return ((bits + ((bits >> 16) & 1) + 0x7FFF) & 0xFFFF0000).view(np.float32)


def folded(quants: np.ndarray, scales: np.ndarray, minimums: np.ndarray, bits: int, zero: int) -> np.ndarray:
    """scale * (q - zero) - minimum of groups [n, 32], as bfloat16 in float32: one product in float16, rounded twice.

    A weight is so many times 2^-24 and moved up to ten bits; scale and minimum are in units of a power of two, by which
    the largest weight that there could be is between 1/4 and 2. Halves are rounded away from zero.
    """
    left, largest = 10 - bits, max((1 << bits) - 1 - zero, zero)
    up = left - 11 + int(largest).bit_length()
    top = np.abs(scales) * np.float32(largest) + np.abs(minimums)
    exponent = (top.view(np.int32) & 0x7F800000) >> 23
    inverse = ((254 - exponent) << 23).astype(np.int32).view(np.float32)
    factors = (scales * inverse * np.float32(2.0 ** (24 - left + up))).astype(np.float16)
    offsets = ((scales * np.float32(zero) + minimums) * inverse * np.float32(-(2.0**up))).astype(np.float16)
    steps = (quants.astype(np.int64) << left) * 2.0**-24
    half = (steps * factors.astype(np.float64) + offsets.astype(np.float64)).astype(np.float16)
    pattern = half.view(np.uint16).astype(np.int64)
    size = ((pattern & 0x7FFF) + 4) >> 3
    moved = np.maximum((exponent.astype(np.int64) << 7) - ((15 + up) << 7), 0)
    return ((pattern & 0x8000 | size + moved) << 16).astype(np.uint32).view(np.float32)


def tile_product(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """x [m, k] times weights [n, k], both bfloat16, as tiles of 32 do it: of each four, the first and the third are a
    pair, and so are the others. First weights of pairs are added apart from second ones, then both to the sum."""
    total = np.zeros((len(x), len(weights)), np.float32)
    for start in range(0, x.shape[1], 32):
        sums = np.zeros((2, *total.shape), np.float32)
        for first in range(start, start + 32, 4):
            for pair in (0, 1):
                for half in (0, 1):
                    k = first + pair + 2 * half
                    product = x[:, k, None].astype(np.float64) * weights[None, :, k]  # exact, also as float32
                    sums[half] = (sums[half] + product).astype(np.float32)
        total = total + (sums[0] + sums[1])
    return total


def unpacked(name: str, raw: np.ndarray, rows: int) -> np.ndarray:
    """The folded weights [rows, width] of a type whose blocks are 32 weights."""
    blocks = raw.reshape(-1, {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[name])
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    minimums = np.zeros_like(scales)
    if name == "Q8_0":
        quants, bits, zero = blocks[:, 2:].astype(np.int64) ^ 128, 8, 128
    else:
        bits, zero = 4, 8 if name == "Q4_0" else 0
        if name == "Q4_1":
            minimums = -blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
        nibbles = blocks[:, 2 if name == "Q4_0" else 4 :]
        quants = np.concatenate([nibbles & 15, nibbles >> 4], 1)
    return folded(quants, scales, minimums, bits, zero).reshape(rows, -1)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
def test_folded_weights_are_weights(rng: np.random.Generator, name: str) -> None:
    raw, weights = random_tensor(rng, name, 24, 96)
    blocks = weights.reshape(-1, 32)
    largest = np.abs(blocks).max(1, keepdims=True)
    error = np.abs(unpacked(name, raw, 24).reshape(-1, 32) - blocks)
    # Half a unit of bfloat16; where scale and minimum cancel out, what float16 has left of them.
    assert np.all(error <= 2.0**-8 * np.abs(blocks) + 2.0**-10 * largest)


def test_a_tile_product_is_a_product(rng: np.random.Generator) -> None:
    x, weights = (rounded(rng.normal(size=(n, 160)).astype(np.float32)) for n in (5, 7))
    expected = x.astype(np.float64) @ weights.T.astype(np.float64)
    np.testing.assert_allclose(tile_product(x, weights), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def harness() -> Harness:
    if not has_tiles():
        pytest.skip("needs AMX")
    return Harness(host_target("amx"), [*(f"matmul-{name}" for name in ("Q4_0", "Q4_1", "Q8_0")), "pack-q8"])


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("shape", [(37, 3, 1), (5, 11, 3), (16, 2, 16), (79, 19, 45), (130, 1, 270)])
def test_kernels_do_what_tiles_do(
    rng: np.random.Generator, harness: Harness, name: str, shape: tuple[int, int, int]
) -> None:
    rows, width, columns = shape[0], shape[1] * 32, shape[2]
    raw, _ = random_tensor(rng, name, rows, width)
    x = (rng.normal(size=(columns, width)) * np.exp2(rng.integers(-6, 6, (columns, width)))).astype(np.float32)
    x.flat[0] = 1.00390625  # halfway between two bfloat16
    result = harness.matmul(name, raw, rows, x)
    expected = tile_product(rounded(x), unpacked(name, raw, rows))
    assert np.array_equal(result.view(np.int32), expected.view(np.int32))


def test_activations_that_are_no_numbers_stay_so(rng: np.random.Generator, harness: Harness) -> None:
    raw, _ = random_tensor(rng, "Q8_0", 16, 64)
    x = np.ones((3, 64), np.float32)
    x[0, 5], x[1, 40] = np.nan, np.array(0x7FFFFFFF, np.uint32).view(np.float32)
    result = harness.matmul("Q8_0", raw, 16, x)
    assert np.isnan(result[:2]).all() and np.isfinite(result[2]).all()
