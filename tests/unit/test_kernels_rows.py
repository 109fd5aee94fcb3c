"""Kernels that work on rows, against plain NumPy. Widths that no vector length divides are among them."""

import numpy as np
import pytest

from qrun.engine.kernels import records as R
from qrun.engine.simd.target import host_target
from tests.kernel_harness import Harness, has_tiles

NAMES = ("add", "scale", "softcap", "silu", "gelu", "rms_norm", "rope", "select_rows")


@pytest.fixture(scope="module", params=["best", "plain"])
def harness(request: pytest.FixtureRequest) -> Harness:
    packing = ["rms_norm-q8", "pack-q8", "pack-f32"] + ["pack-whole"] * (request.param == "best" and has_tiles())
    return Harness(host_target(request.param), [f"{name}-" for name in NAMES] + packing)


@pytest.fixture(params=[1, 15, 64, 97])
def xz(request: pytest.FixtureRequest, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    x, z = (rng.normal(0, 3, (5, request.param)).astype(np.float32) for _ in range(2))
    x.flat[0] = 80.0
    x.flat[-1] = -95.0
    return x, z


def test_sums_products_and_activations(harness: Harness, xz: tuple[np.ndarray, np.ndarray]) -> None:
    x, z = xz
    wide, wide_z = x.astype(np.float64), z.astype(np.float64)
    expected = {
        "add": x + z,
        "scale": x * np.float32(0.3),
        "softcap": 30 * np.tanh(wide / 30),
        "silu": wide / (1 + np.exp(-wide)) * wide_z,
        "gelu": 0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3))) * wide_z,
    }
    factors = {"scale": 0.3, "softcap": 30.0}
    for name, values in expected.items():
        result = harness.rows(f"{name}-", x, z, ROW_FACTOR=factors.get(name, 1.0))
        np.testing.assert_allclose(result, values, rtol=2e-6, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(("width", "groups"), [(64, 1), (97, 1), (96, 3), (60, 4), (1, 1)])
def test_rms_norm(harness: Harness, rng: np.random.Generator, width: int, groups: int) -> None:
    x = rng.normal(size=(3, width)).astype(np.float32)
    weight = rng.normal(size=width // groups).astype(np.float32)
    parts = x.astype(np.float64).reshape(3, groups, -1)
    normed = parts / np.sqrt((parts**2).mean(-1, keepdims=True) + 1e-5)
    plain = harness.rows("rms_norm-", x, ROW_FACTOR=1e-5, ROW_GROUPS=groups)
    weighted = harness.rows("rms_norm-", x, ROW_FACTOR=1e-5, ROW_GROUPS=groups, ROW_WEIGHT=weight.ctypes.data)
    np.testing.assert_allclose(plain, normed.reshape(x.shape), rtol=3e-6)
    np.testing.assert_allclose(weighted, (normed * weight).reshape(x.shape), rtol=3e-6)


def test_a_norm_packs_what_packing_its_result_would_give(harness: Harness, rng: np.random.Generator) -> None:
    x = rng.normal(size=(9, 96)).astype(np.float32)
    normed = harness.rows("rms_norm-", x, ROW_FACTOR=1e-6)
    expected = harness.packed(normed, "q8")
    packed = np.zeros_like(expected)
    harness.rows("rms_norm-q8", x, ROW_FACTOR=1e-6, ROW_PACKED=packed.ctypes.data)
    assert np.array_equal(packed, expected)


def hostile_rows(rng: np.random.Generator) -> np.ndarray:
    """Of all sizes; some are zeros, some are not finite."""
    x = (rng.normal(size=(64, 96)) * np.exp2(rng.integers(-140, 120, (64, 6))).repeat(16, 1)).astype(np.float32)
    for value in (0.0, -0.0, np.inf, -np.inf, np.nan):
        x[rng.integers(0, 64, 40), rng.integers(0, 96, 40)] = value
    x[5], x[6, :16], x[7, 16:32] = 0.0, 0.0, 0.0
    return x


def test_rows_of_a_panel_are_packed_together_as_one_by_one(harness: Harness, rng: np.random.Generator) -> None:
    x = hostile_rows(rng)
    packings = ["q8", "f32"] + ["whole"] * has_tiles()
    for packing in packings if harness.target == host_target("best") else packings[:2]:
        for rows in (25, 33, 64):
            alone = harness.packed(x[:rows], packing, parts=rows)
            for parts in (1, 3):
                assert np.array_equal(harness.packed(x[:rows], packing, parts), alone), (packing, rows, parts)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("n_rot", [20, 32, 70, 96])
def test_rope_turns_pairs(harness: Harness, rng: np.random.Generator, interleaved: bool, n_rot: int) -> None:
    x = rng.normal(size=(4, 288)).astype(np.float32)
    positions = np.array([0, 3, 9, 4], np.int64)
    angles = np.arange(10)[:, None] * rng.uniform(0, 1, n_rot // 2)
    table = np.ascontiguousarray(np.stack([np.cos(angles), np.sin(angles)], -1), np.float32)
    result = harness.rows(
        "rope-", x, step={R.POSITIONS: positions.ctypes.data}, ROW_ROPE_HEAD_DIM=96, ROW_ROPE_DIMS=n_rot,
        ROW_ROPE_INTERLEAVED=int(interleaved), ROW_ROPE_TABLE=table.ctypes.data,
    )  # fmt: skip
    expected = x.reshape(4, 3, 96).copy()
    first = slice(0, n_rot, 2) if interleaved else slice(0, n_rot // 2)
    second = slice(1, n_rot, 2) if interleaved else slice(n_rot // 2, n_rot)
    turned = (expected[..., first] + 1j * expected[..., second]) * np.exp(1j * angles[positions])[:, None]
    expected[..., first], expected[..., second] = turned.real, turned.imag
    np.testing.assert_allclose(result, expected.reshape(4, 288), rtol=1e-5, atol=1e-6)


def test_selected_rows(harness: Harness, rng: np.random.Generator) -> None:
    x = rng.normal(size=(5, 33)).astype(np.float32)
    chosen = np.array([4, 0, 2, 2, 1], np.int64)
    assert np.array_equal(harness.rows("select_rows-", x, step={R.SELECTED: chosen.ctypes.data}), x[chosen])
