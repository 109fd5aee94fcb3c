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


# Of each four neighbouring weights, the first and the third are a pair, and so are the others.
OF_FOUR = [(first + i, first + i + 2) for first in range(0, 32, 4) for i in range(2)]


def tile_product(x: np.ndarray, weights: np.ndarray, pairs: list[tuple[int, int]] = OF_FOUR) -> np.ndarray:
    """x [m, k] times weights [n, k], both bfloat16, as tiles of 32 do it. First weights of pairs are added apart from
    second ones, then both to the sum."""
    total = np.zeros((len(x), len(weights)), np.float32)
    for start in range(0, x.shape[1], 32):
        total = add_tile(total, x[:, start : start + 32], weights[:, start : start + 32], pairs)
    return total


def add_tile(total: np.ndarray, x: np.ndarray, weights: np.ndarray, pairs: list[tuple[int, int]]) -> np.ndarray:
    sums = np.zeros((2, *total.shape), np.float32)
    for pair in pairs:
        for half, k in enumerate(pair):
            product = x[:, k, None].astype(np.float64) * weights[None, :, k]  # exact, also as float32
            sums[half] = (sums[half] + product).astype(np.float32)
    return total + (sums[0] + sums[1])


def float_product(x: np.ndarray, weights: np.ndarray, parts: int, pairs: list[tuple[int, int]]) -> np.ndarray:
    """x [m, k] times weights [n, k], both float32, as tiles do it: x is the sum of two bfloat16, and each weight of one
    or two, of which the first has the first eight bits."""
    tops = rounded(x)
    of_x = [tops, rounded(x - tops)]
    first = (weights.view(np.uint32) & 0xFFFF0000).view(np.float32)
    of_weights = [first, weights - first][:parts]
    totals = np.zeros((2, len(x), len(weights)), np.float32)
    for start in range(0, x.shape[1], 32):
        here = slice(start, start + 32)
        for part in of_weights:
            for i in range(2):
                totals[i] = add_tile(totals[i], of_x[i][:, here], part[:, here], pairs)
    return totals[0] + totals[1]


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
    return Harness(host_target("amx-folded"), [*(f"matmul-{name}" for name in ("Q4_0", "Q4_1", "Q8_0")), "pack-q8"])


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


@pytest.fixture(scope="module")
def floats() -> Harness:
    if not has_tiles():
        pytest.skip("needs AMX")
    return Harness(host_target("amx"), ["matmul-F16-tiles", "matmul-BF16-tiles", "pack-f16", "pack-bf16"])


@pytest.mark.parametrize("name", ["F16", "BF16"])
@pytest.mark.parametrize("shape", [(37, 96, 1), (5, 352, 3), (16, 64, 16), (79, 608, 45), (130, 32, 270)])
def test_float_kernels_do_what_tiles_do(
    rng: np.random.Generator, floats: Harness, name: str, shape: tuple[int, int, int]
) -> None:
    rows, width, columns = shape
    raw, weights = random_tensor(rng, name, rows, width)
    x = (rng.normal(size=(columns, width)) * np.exp2(rng.integers(-6, 6, (columns, width)))).astype(np.float32)
    apart, neighbours = [(i, i + 16) for i in range(16)], [(2 * i, 2 * i + 1) for i in range(16)]
    expected = float_product(x, weights, *((2, apart) if name == "F16" else (1, neighbours)))
    for count in (columns, 1, 2, 7, 11):
        parts = [floats.matmul(name, raw, rows, x[i : i + count]) for i in range(0, columns, count)]
        assert np.array_equal(np.concatenate(parts).view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_the_smallest_and_the_largest_floats_are_multiplied(
    rng: np.random.Generator, floats: Harness, name: str
) -> None:
    """float16 without a leading bit, and bfloat16 near both ends."""
    raw = np.arange(1 << 16, dtype=np.uint16).view(np.float16 if name == "F16" else np.uint16)
    values = raw.astype(np.float32) if name == "F16" else (raw.astype(np.uint32) << 16).view(np.float32)
    usable = np.isfinite(values) & (np.abs(values) > 1e-30) & (np.abs(values) < 1e30)
    raw, values = (np.resize(array[usable], (len(raw) // 64 - 8, 64)) for array in (raw, values))
    x = np.zeros((64, 64), np.float32)
    np.fill_diagonal(x, 1.5)  # each column takes one weight of each row
    result = floats.matmul(name, np.ascontiguousarray(raw).view(np.uint8).reshape(-1), len(raw), x)
    np.testing.assert_array_equal(result, 1.5 * values.T)


def test_activations_that_are_no_numbers_stay_so(rng: np.random.Generator, harness: Harness) -> None:
    raw, _ = random_tensor(rng, "Q8_0", 16, 64)
    x = np.ones((3, 64), np.float32)
    x[0, 5], x[1, 40] = np.nan, np.array(0x7FFFFFFF, np.uint32).view(np.float32)
    result = harness.matmul("Q8_0", raw, 16, x)
    assert np.isnan(result[:2]).all() and np.isfinite(result[2]).all()
