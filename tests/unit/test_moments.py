"""Second moments of inputs: by NumPy and by tiles, however rows come and whoever adds them up."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest

from qrun.engine.native.compiler import default_target
from qrun.engine.quantize.moments import GATHERED, FloatMoments, Moments, MomentsMaker
from tests.kernel_harness import has_tiles
from tests.unit.test_tiles import rounded


def filled(moments: Moments, rows: np.ndarray) -> np.ndarray:
    """What a few uneven parts of the rows add up to."""
    for part in np.split(rows, [5, 900, 4000]):
        moments.add(part)
    return moments.matrix()


@pytest.mark.parametrize("width", [32, 700])
def test_they_are_those_of_all_rows_however_they_come(width: int, rng: np.random.Generator) -> None:
    rows = rng.normal(size=(2 * GATHERED + 77, width)).astype(np.float32)
    expected = rows.T.astype(np.float64) @ rows
    np.testing.assert_allclose(filled(FloatMoments(width), rows), expected, rtol=1e-5, atol=1e-2)


@pytest.mark.skipif(not has_tiles(), reason="needs AMX")
@pytest.mark.parametrize("width", [32, 96, 544])
def test_tiles_add_what_is_rounded_to_bfloat16(width: int, rng: np.random.Generator) -> None:
    rows = rng.normal(size=(GATHERED + 77, width)).astype(np.float32)
    rows[:, 3] *= 500  # an input far larger than all others
    rows[40, :] *= 100  # and a token
    of_tiles = rounded(rows).astype(np.float64)
    expected = of_tiles.T @ of_tiles
    size = np.sqrt(np.diag(expected))
    found = []
    for threads in (1, 3):
        with closing(MomentsMaker(threads)) as maker:
            found.append(filled(maker.sums(width), rows))
    np.testing.assert_array_equal(*found)
    np.testing.assert_array_equal(found[0], found[0].T)
    assert np.abs((found[0] - expected) / np.outer(size, size)).max() < 2e-6
    exact = rows.T.astype(np.float64) @ rows
    assert np.abs((found[0] - exact) / np.outer(size, size)).max() < 2**-7  # each input is off by 2^-8 at most


@pytest.mark.skipif(not has_tiles(), reason="needs AMX")
def test_what_is_no_number_is_none_in_the_sums(rng: np.random.Generator) -> None:
    rows = rng.normal(size=(64, 64)).astype(np.float32)
    rows[10, 20] = np.nan
    with closing(MomentsMaker(1)) as maker:
        found = filled(maker.sums(64), rows)
    assert np.isnan(found[20]).all() and np.isnan(found[:, 20]).all()
    assert np.isfinite(np.delete(np.delete(found, 20, 0), 20, 1)).all()


def test_widths_that_are_no_whole_blocks_are_added_by_numpy() -> None:
    with closing(MomentsMaker(1)) as maker:
        assert isinstance(maker.sums(40), FloatMoments)
        assert isinstance(maker.sums(64), FloatMoments) != default_target().tiles
