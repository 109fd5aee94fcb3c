"""GPTQ: rounding columns one by one, against the algorithm written out in NumPy, and against plain rounding."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from qrun.engine.quantize.calibrated import balanced
from qrun.engine.quantize.encoder import Encoder
from qrun.engine.quantize.gptq import GPTQ_TYPES, Gptq, factor
from qrun.formats.blocks import BLOCK_SIZES, SEARCHES, TensorType, dequantize, quantize
from qrun.formats.blocks.codes import CODES
from qrun.formats.blocks.fitting import Groups

TESTED = (TensorType.Q4_0, TensorType.IQ4_NL, TensorType.Q4_K, TensorType.Q3_K)


@pytest.mark.parametrize("type", sorted(GPTQ_TYPES))
def test_a_block_is_its_scales_and_its_codes(type: TensorType, rng: np.random.Generator) -> None:
    size, n_bytes = BLOCK_SIZES[type]
    weights = rng.normal(size=(5, size)).astype(np.float32) + np.float32(0.2)
    raw = quantize(weights, type).reshape(5, n_bytes)
    search = SEARCHES[type]
    assert not isinstance(search.levels, Groups)
    scales, minimums = CODES[type].scales(raw)
    assert scales.shape == minimums.shape == (5, search.groups)
    scale, minimum = (np.repeat(part, search.size, axis=1) for part in (scales, minimums))
    decoded = dequantize(raw.reshape(-1), type, (5, size))
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    levels = search.levels.nearest((decoded + minimum) * inverse)
    np.testing.assert_allclose(scale * levels - minimum, decoded, rtol=1e-5, atol=1e-6)
    blank = raw.copy()
    CODES[type].put(blank, np.zeros((5, size), np.uint8))
    assert (blank != raw).any()
    CODES[type].put(blank, search.levels.codes(levels))
    np.testing.assert_array_equal(blank, raw)


def inputs(rng: np.random.Generator, n: int, width: int) -> np.ndarray:
    """Rows that have much in common, some columns larger than others."""
    mixing = rng.normal(size=(width, width)) * np.exp(-np.arange(width) / 40)[:, None] + 0.1 * np.eye(width)
    return (rng.normal(size=(n, width)) @ mixing).astype(np.float32)


@pytest.mark.parametrize("width", [64, 700])
def test_the_factor_is_upper_triangular_and_its_square_with_weights_the_damped_moments(
    width: int, rng: np.random.Generator
) -> None:
    x = inputs(rng, 1000, width).astype(np.float64)
    found = factor(x.T @ x)
    assert found is not None
    np.testing.assert_array_equal(found, np.triu(found))
    np.testing.assert_allclose(np.diag(found), 1)
    expected = damped(x.T @ x)
    inverse = np.linalg.inv(found.astype(np.float64))
    squares = np.diag(inverse @ expected @ inverse.T)  # of the diagonal that was divided away
    np.testing.assert_allclose((found * squares) @ found.T, expected, atol=1e-5 * np.diag(expected).max())


def damped(moments: np.ndarray) -> np.ndarray:
    """As inputs are not trusted wholly."""
    return moments + 0.01 * np.diag(moments).mean() * np.eye(len(moments))


def test_inputs_that_never_move_leave_a_factor_and_no_inputs_none(rng: np.random.Generator) -> None:
    x = inputs(rng, 3, 64)
    assert factor(x.T @ x) is not None  # of rank 3
    assert factor(np.zeros((64, 64))) is None


def test_the_factor_of_a_wide_matrix_takes_its_memory_less_than_three_times() -> None:
    width = 1536
    moments = np.eye(width, dtype=np.float32)
    tracemalloc.start()
    try:
        assert factor(moments) is not None
        assert tracemalloc.get_traced_memory()[1] < 2.5 * 8 * width**2
    finally:
        tracemalloc.stop()


def by_hand(weights: np.ndarray, type: TensorType, moments: np.ndarray) -> np.ndarray:
    """The algorithm column by column, as the paper has it: by the factor of the inverse."""
    w, out = weights.astype(np.float64), np.empty_like(weights)
    upper = np.linalg.cholesky(np.linalg.inv(damped(moments.astype(np.float64)))).T
    upper /= np.diag(upper)[:, None]
    importance = np.diag(moments).astype(np.float64)
    importance = np.maximum(importance / importance.mean(), 1e-4).astype(np.float32)
    size, n_bytes = BLOCK_SIZES[type]
    search = SEARCHES[type]
    for start in range(0, w.shape[1], size):
        block = np.ascontiguousarray(w[:, start : start + size], np.float32)
        raw = quantize(block, type, importance[start : start + size]).reshape(-1, n_bytes)
        scales, minimums = CODES[type].scales(raw)
        for j in range(size):
            scale, minimum = scales[:, j // search.size], minimums[:, j // search.size]
            value = w[:, start + j].astype(np.float32)
            inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
            rounded = scale * search.levels.nearest((value + minimum) * inverse) - minimum
            out[:, start + j] = rounded
            w[:, start + j + 1 :] -= np.outer(value - rounded, upper[start + j, start + j + 1 :])
    return out


@pytest.mark.parametrize("type", TESTED)
def test_columns_are_rounded_as_the_paper_says_and_outputs_are_nearer(
    type: TensorType, rng: np.random.Generator
) -> None:
    width = 512
    x = inputs(rng, 2000, width)
    weights = rng.normal(size=(300, width)).astype(np.float32)
    moments = x.T @ x
    found_factor = factor(moments)
    assert found_factor is not None
    gptq = Gptq([type])
    raws = []
    for threads in (1, 3):
        with ThreadPoolExecutor(threads) as pool:
            raws.append(gptq.round(lambda a, b: weights[a:b], 300, type, moments, found_factor, pool))
    np.testing.assert_array_equal(*raws)
    found = dequantize(raws[0], type, weights.shape)
    expected = by_hand(weights, type, moments)
    # Sums in another order turn a few roundings, and all that follows in that row.
    assert np.mean(np.isclose(found, expected, atol=1e-5)) > 0.9
    importance = np.diag(moments) / np.diag(moments).mean()
    plain = dequantize(Encoder([type]).encode(weights, type, importance).raw, type, weights.shape)

    fresh = x[:500]
    losses = [float(np.square(fresh @ (rounded - weights).T).mean()) for rounded in (found, plain)]
    assert losses[0] < 0.8 * losses[1]


def test_balanced_rows_weigh_by_their_squares_and_alike(rng: np.random.Generator) -> None:
    rows = (rng.normal(size=(50, 24)) * rng.uniform(0.1, 100, (50, 1))).astype(np.float32)
    rows[7] = 0
    squares = (rows.astype(np.float64) ** 2).sum(1)
    found = (balanced(rows, squares.mean()).astype(np.float64) ** 2).sum(1)
    expected = squares / squares.mean() + 1
    expected[7] = 0
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    alike = (balanced(rows, 0.0).astype(np.float64) ** 2).sum(1)
    np.testing.assert_allclose(alike, np.arange(50) != 7, rtol=1e-5)


def test_balanced_rows_that_are_not_finite_stay_so() -> None:
    rows = np.ones((3, 4), np.float32)
    rows[0, 1], rows[2, 3] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        assert (~np.isfinite(balanced(rows, 2.0)).all(1)).tolist() == [True, False, True]
