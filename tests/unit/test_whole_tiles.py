"""Quantised matrices in tiles of whole numbers: plain NumPy, and the same bits with any number of columns."""

import numpy as np
import pytest

from qrun.engine.kernels.unpack import TYPES, Quantised
from qrun.engine.simd.target import host_target
from tests.kernel_harness import Harness, has_tiles, random_tensor, types_of

NAMES = [name for name in types_of("amx") if isinstance(TYPES[name], Quantised)]


@pytest.fixture(scope="module")
def harness() -> Harness:
    if not has_tiles():
        pytest.skip("needs AMX")
    return Harness(host_target("amx"), [*(f"matmul-{name}-tiles" for name in NAMES), "pack-whole"])


def as_int8(x: np.ndarray) -> np.ndarray:
    """x after its rounding to int8. Of 32 values each half has a scale, and one's is the other's over a power of two.

    The larger half's scale is max |x| / 127, or more, if that gives the smaller one, whose scale is so much less, a
    smaller one and the sum of their squares falls. In float32, as the kernel does it: a tie that rounds the other way
    would be a whole step off.
    """
    blocks = x.reshape(len(x), -1, 2, 16).astype(np.float32)
    tops = np.abs(blocks).max(-1)
    large, small = tops.max(-1), tops.min(-1)
    times = np.minimum((large.view(np.int32) - small.view(np.int32)) >> 23, 5)
    raised = small * np.exp2(times + 1).astype(np.float32)
    share = np.exp2(-2 * times).astype(np.float32)
    more = (times < 5) & (raised * raised * (1 + share * np.float32(0.25)) < large * large * (1 + share))
    large, times = np.where(more, raised, large), times + more
    halved = np.where(np.arange(2) == np.argmin(tops, -1)[..., None], times[..., None], 0)
    unit = np.maximum(large, np.float32(1e-30))
    factors = (np.float32(127) / unit)[..., None] * np.exp2(halved).astype(np.float32)
    scales = (unit * np.float32(1 / 127))[..., None] * np.exp2(-halved).astype(np.float32)
    return (np.rint(blocks * factors[..., None]) * scales[..., None]).reshape(x.shape)


def activations(rng: np.random.Generator, columns: int, width: int) -> np.ndarray:
    """Halves whose scales are far apart, up to more than can be said."""
    sizes = np.exp2(rng.integers(-9, 9, (columns, width // 16))).repeat(16, 1)
    return (rng.normal(size=(columns, width)) * sizes).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(37, 1, 1), (64, 3, 9), (5, 2, 27), (100, 2, 49), (33, 1, 530)])
def test_a_product_is_that_of_what_is_packed(
    rng: np.random.Generator, harness: Harness, name: str, shape: tuple[int, int, int]
) -> None:
    rows, width, columns = shape[0], shape[1] * 256, shape[2]
    size = max(TYPES[name].block_size, 32)  # type: ignore[union-attr]
    width -= size * int(rng.integers(0, 256 // size))
    raw, weights = random_tensor(rng, name, rows, width)
    x = activations(rng, columns, width)
    seen = as_int8(x).astype(np.float64)
    sizes = np.abs(seen) @ np.abs(weights).T.astype(np.float64)
    result = harness.matmul(name, raw, rows, x, whole=True)
    assert np.all(np.abs(result - seen @ weights.T.astype(np.float64)) <= 3e-6 * sizes + 1e-30)


@pytest.mark.parametrize("name", NAMES)
def test_a_column_has_the_same_bits_alone_and_among_others(
    rng: np.random.Generator, harness: Harness, name: str
) -> None:
    size = max(TYPES[name].block_size, 32)  # type: ignore[union-attr]
    for rows, width in ((37, 512), (70, 512 + size), (6, 2 * size)):
        raw, _ = random_tensor(rng, name, rows, width)
        x = activations(rng, 35, width)
        together = harness.matmul(name, raw, rows, x, whole=True)
        for count in (1, 2, 3, 6, 8, 9, 17, 24, 25):  # through vpdpbusd up to 24
            parts = [harness.matmul(name, raw, rows, x[i : i + count], whole=True) for i in range(0, 35, count)]
            assert np.array_equal(together.view(np.int32), np.concatenate(parts).view(np.int32))


def test_long_rows_are_multiplied_part_by_part(rng: np.random.Generator, harness: Harness) -> None:
    """Where columns are long, many rows are multiplied by a part of each, and then by the next."""
    for name, rows, width in (("Q4_0", 300, 4096 + 32 * 9), ("Q6_K", 145, 2048 + 256 * 9), ("Q4_0", 7, 6144)):
        raw, weights = random_tensor(rng, name, rows, width)
        x = activations(rng, 270, width)
        seen = as_int8(x).astype(np.float64)
        sizes = np.abs(seen) @ np.abs(weights).T.astype(np.float64)
        together = harness.matmul(name, raw, rows, x, whole=True)
        assert np.all(np.abs(together - seen @ weights.T.astype(np.float64)) <= 3e-6 * sizes + 1e-30)
        assert np.array_equal(together[:20], harness.matmul(name, raw, rows, x[:20], whole=True))


def test_all_passes_over_many_columns_go_through_tiles(rng: np.random.Generator, harness: Harness) -> None:
    """Of more columns than one pass takes, few are left for the last one."""
    raw, _ = random_tensor(rng, "Q4_0", 40, 64)
    x = activations(rng, 517, 64)
    together = harness.matmul("Q4_0", raw, 40, x, whole=True)
    assert np.array_equal(together[510:], harness.matmul("Q4_0", raw, 40, x[510:], whole=True))

