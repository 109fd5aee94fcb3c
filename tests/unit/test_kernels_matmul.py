"""Matmul and embedding kernels of every tensor type and every instruction set, against plain NumPy."""

import numpy as np
import pytest

from qrun.engine.kernels import records as R
from qrun.engine.kernels.unpack import TYPES, Quantised
from qrun.engine.simd.target import host_target
from tests.kernel_harness import Harness, has_tiles, random_tensor, types_of

# One name for each target that forms lead to here: "avx-vnni" is "avx2" where there is no such CPU.
EXACT_FORMS = sorted({host_target(form): form for form in ("plain", "avx-vnni", "avx2", "avx512", "best")}.values())
# Folded tiles have roundings of their own.
FORMS = [*EXACT_FORMS, *(["amx-folded"] if has_tiles() else [])]


@pytest.fixture(scope="module")
def harness(request: pytest.FixtureRequest) -> Harness:
    keys = [f"{kernel}-{name}" for kernel in ("matmul", "embed") for name in types_of(request.param, kernel)]
    target = host_target(request.param)
    tiled = [key for name in ("F16", "BF16") for key in (f"matmul-{name}-tiles", f"pack-{name.lower()}")]
    return Harness(target, [*keys, "pack-q8", "pack-f32", *(tiled if target.tiles else [])])


def each(kernel: str, *names: str) -> pytest.MarkDecorator:
    """All forms, each with the types with which a kernel is tested there; names: no others."""
    chosen = [(form, name) for form in FORMS for name in types_of(form, kernel) if not names or name in names]
    return pytest.mark.parametrize(("harness", "name"), chosen, indirect=["harness"])


def as_quantised(x: np.ndarray) -> np.ndarray:
    """x after it has been rounded to int8 in blocks of 16."""
    blocks = x.reshape(len(x), -1, 16)
    largest = np.maximum(np.abs(blocks).max(-1, keepdims=True), np.float32(1e-30))
    # In float32, as the kernel does it: a tie that rounds the other way would be a whole step off.
    return (np.rint(blocks * (np.float32(127) / largest)) * (largest * np.float32(1 / 127))).reshape(x.shape)


@each("matmul")
@pytest.mark.parametrize(
    "shape", [(64, 2, 1), (40, 3, 1), (83, 1, 1), (33, 1, 9), (5, 2, 3), (1, 1, 1), (48, 2, 16), (19, 6, 515)]
)
def test_matmul_is_the_product(
    rng: np.random.Generator, harness: Harness, name: str, shape: tuple[int, int, int]
) -> None:
    rows, width, columns = shape[0], shape[1] * 256, shape[2]
    if not isinstance(TYPES[name], Quantised):
        width -= int(rng.integers(0, 9))
    else:
        size = TYPES[name].block_size
        width -= size * int(rng.integers(0, 256 // size))
    raw, weights = random_tensor(rng, name, rows, width)
    x = rng.normal(size=(columns, width)).astype(np.float32)
    folded = harness.target.folded and isinstance(TYPES[name], Quantised)
    seen = as_quantised(x) if isinstance(TYPES[name], Quantised) and not folded else x
    expected = seen.astype(np.float64) @ weights.T.astype(np.float64)
    # Every product's rounding counts, also where a sum is small because its terms cancel.
    size = np.abs(seen).astype(np.float64) @ np.abs(weights).T.astype(np.float64)
    result = harness.matmul(name, raw, rows, x)
    # In folded tiles activations and weights have 8 bits each: neither is off by more than a 256th.
    assert np.all(np.abs(result - expected) <= (2.1 / 256 if folded else 3e-6) * size + 1e-30)


@each("matmul", "F16", "BF16")
@pytest.mark.parametrize("shape", [(64, 32, 1), (37, 544, 1), (5, 96, 3), (1, 32, 9), (79, 1056, 45), (40, 64, 530)])
def test_floats_in_whole_tiles(
    rng: np.random.Generator, harness: Harness, name: str, shape: tuple[int, int, int]
) -> None:
    rows, width, columns = shape
    raw, weights = random_tensor(rng, name, rows, width)
    x = rng.normal(size=(columns, width)).astype(np.float32)
    expected = x.astype(np.float64) @ weights.T.astype(np.float64)
    size = np.abs(x).astype(np.float64) @ np.abs(weights).T.astype(np.float64)
    # In tiles an activation has 16 bits.
    assert np.all(np.abs(harness.matmul(name, raw, rows, x) - expected) <= 1e-5 * size)


@each("matmul")
def test_a_column_has_the_same_bits_alone_and_among_others(
    rng: np.random.Generator, harness: Harness, name: str
) -> None:
    raw, _ = random_tensor(rng, name, 37, 512)
    x = rng.normal(size=(35, 512)).astype(np.float32)
    together = harness.matmul(name, raw, 37, x)
    for count in (1, 2, 3, 6, 12, 14, 19):  # through registers: one, two, half a panel, a panel; then halves at the end
        parts = [harness.matmul(name, raw, 37, x[i : i + count]) for i in range(0, len(x), count)]
        assert np.array_equal(together.view(np.int32), np.concatenate(parts).view(np.int32))


def test_all_instruction_sets_give_the_same_bits(rng: np.random.Generator) -> None:
    raw, _ = random_tensor(rng, "Q4_K", 32, 512)
    x = rng.normal(size=(3, 512)).astype(np.float32)
    harnesses = [Harness(host_target(form), ["matmul-Q4_K", "pack-q8"]) for form in EXACT_FORMS]
    results = [harness.matmul("Q4_K", raw, 32, x) for harness in harnesses]
    assert all(np.array_equal(results[0].view(np.int32), result.view(np.int32)) for result in results)


@each("matmul", "F32")
def test_bias_residual_and_factor(rng: np.random.Generator, harness: Harness, name: str) -> None:
    for rows, columns in ((40, 5), (3, 5), (40, 1), (3, 1)):
        raw, weights = random_tensor(rng, name, rows, 64)
        x = rng.normal(size=(columns, 64)).astype(np.float32)
        bias, residual = rng.normal(size=rows).astype(np.float32), rng.normal(size=(columns, rows)).astype(np.float32)
        fields = {R.MM_BIAS: bias.ctypes.data, R.MM_RESIDUAL: residual.ctypes.data, R.MM_RESIDUAL_STRIDE: rows * 4}
        result = harness.matmul(name, raw, rows, x, extra={**fields, R.MM_SCALE: 0.5})
        np.testing.assert_allclose(result, 0.5 * (x @ weights.T) + bias + residual, rtol=1e-4, atol=1e-5)


@each("embed")
def test_embedding_is_the_dequantised_row(rng: np.random.Generator, harness: Harness, name: str) -> None:
    width = 512 if isinstance(TYPES[name], Quantised) else 509
    raw, weights = random_tensor(rng, name, 7, width)
    tokens = np.array([3, 0, 6, 3], np.int64)
    out = harness.embed(name, raw, 7, width, tokens, 2.0)
    np.testing.assert_allclose(out, 2 * weights[tokens], rtol=2e-7, atol=1e-7 * np.abs(weights).max())
