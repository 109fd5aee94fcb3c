"""Quantisers: how small their errors are, and that compiled ones give the bytes of those in plain NumPy."""

from collections.abc import Iterator

import numpy as np
import pytest

from qrun.engine.quantize.encoder import Encoder
from qrun.engine.simd.target import host_target
from qrun.formats.blocks import BLOCK_FORMATS, SEARCHES, TensorType, dequantize, quantize
from qrun.formats.blocks.fitting import Groups, Table

# The relative RMSE that llama-quantize reaches on normally distributed weights; with importance (log-normal, sigma 1.5)
# the relative RMSE weighted by it. Measured over half a million weights.
REFERENCE = {
    "Q8_0": (0.00537, 0.00535), "Q4_0": (0.08617, 0.07058), "Q4_1": (0.07830, 0.05475), "Q5_0": (0.04278, 0.03458),
    "Q5_1": (0.03787, 0.02652), "Q2_K": (0.29556, 0.19932), "Q3_K": (0.15108, 0.11958), "Q4_K": (0.07144, 0.05617),
    "Q5_K": (0.03620, 0.02930), "Q6_K": (0.01759, 0.01398), "IQ4_NL": (0.07620, 0.06168), "IQ4_XS": (0.07685, 0.06264),
    "MXFP4": (0.11409, 0.11406), "NVFP4": (0.10308, 0.10316), "IQ1_S": (0.48531, 0.39366), "IQ1_M": (0.45078, 0.33339),
    "IQ2_XXS": (0.34393, 0.25958), "IQ2_XS": (0.30000, 0.22217), "IQ2_S": (0.24857, 0.20097),
    "IQ3_XXS": (0.18150, 0.12708), "IQ3_S": (0.13665, 0.10466), "TQ1_0": (0.80757, 0.80728),
    "TQ2_0": (0.80757, 0.80728), "Q1_0": (0.6016, 0.60010), "Q2_0": (0.71696, 0.71760),
}  # fmt: skip
NAMES = list(REFERENCE)
GROUPED = [name for name in NAMES if isinstance(SEARCHES[TensorType[name]].levels, Groups)]
BYTE_SCALED = ["MXFP4", "NVFP4"]  # whose scales do not have half precision


def relative_rmse(
    weights: np.ndarray, raw: np.ndarray, type: TensorType, importance: np.ndarray | float = 1.0
) -> float:
    miss = dequantize(raw, type, weights.shape).astype(np.float64) - weights
    return float(np.sqrt((importance * miss**2).sum() / (importance * weights.astype(np.float64) ** 2).sum()))


def difficult(rng: np.random.Generator) -> np.ndarray:
    """Rows of 512 weights: ordinary ones, and such as break formulas."""
    x = rng.normal(size=(19, 512)).astype(np.float32) * 0.02
    x[1] = 0
    x[2] = -0.0
    x[3] = 0.5
    x[4] = -0.25
    x[5, :256], x[5, 256:] = 0, 1
    x[6] *= 1e-6
    x[7] *= 1e-12
    x[8] *= 1e5
    x[9] = np.abs(x[9])
    x[10] = -np.abs(x[10])
    x[11, ::7] *= 100
    x[12] = 0
    x[12, 17] = 3
    x[13] = np.round(x[13] * 100) / 100
    x[14, ::37] = -6e4
    x[15, ::37] = 65504
    x[16, ::37] = -65504
    x[17] *= 2e-5  # scales are among the smallest numbers of half precision
    return x


@pytest.fixture(scope="module")
def importance() -> np.ndarray:
    values = np.random.default_rng(3).lognormal(0, 1.5, 512).astype(np.float32)
    return values / values.mean()


@pytest.fixture(scope="module")
def encoder() -> Iterator[Encoder]:
    yield Encoder([TensorType[name] for name in [*NAMES, "F32", "F16", "BF16"]])


# Quality


@pytest.mark.parametrize("name", NAMES)
def test_the_error_is_smaller_than_the_references(name: str, encoder: Encoder) -> None:
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(64, 2048)).astype(np.float32) * 0.02
    importance = rng.lognormal(0, 1.5, 2048).astype(np.float32)
    type = TensorType[name]
    plain, weighted = REFERENCE[name]
    assert relative_rmse(weights, encoder.encode(weights, type).raw, type) < plain
    raw = encoder.encode(weights, type, importance / importance.mean()).raw
    assert relative_rmse(weights, raw, type, importance) < weighted


@pytest.mark.parametrize("name", NAMES)
def test_importance_lowers_the_error_where_it_matters(name: str, encoder: Encoder, importance: np.ndarray) -> None:
    type = TensorType[name]
    weights = np.random.default_rng(2).normal(size=(64, 512)).astype(np.float32)
    without, with_it = encoder.encode(weights, type).raw, encoder.encode(weights, type, importance).raw
    assert relative_rmse(weights, with_it, type, importance) < relative_rmse(weights, without, type, importance)


@pytest.mark.parametrize("name", NAMES)
def test_quantising_again_loses_next_to_nothing(name: str, rng: np.random.Generator) -> None:
    type = TensorType[name]
    weights = rng.normal(size=(64, 512)).astype(np.float32)
    once = dequantize(quantize(weights, type), type, weights.shape)
    again = dequantize(quantize(once, type), type, weights.shape)
    loss = np.sqrt(np.square(once - weights).mean())
    # Q5_K has the most: 0.178, with a standard deviation of 0.007 from one draw of so many weights to the next.
    assert np.sqrt(np.square(again - once).mean()) < 0.22 * loss


@pytest.mark.parametrize("name", [*NAMES, "F32", "F16", "BF16"])
def test_no_weights_are_too_odd(name: str, rng: np.random.Generator) -> None:
    type = TensorType[name]
    weights = difficult(rng)
    decoded = dequantize(quantize(weights, type), type, weights.shape)
    assert np.isfinite(decoded).all()
    assert (decoded[1:3] == 0).all()
    if name not in ("Q2_K", "MXFP4"):
        np.testing.assert_allclose(decoded[3:5], weights[3:5], rtol=0.01)


HALF = [name for name in NAMES if name not in BYTE_SCALED]


@pytest.mark.parametrize("name", [name for name in HALF if name not in (*GROUPED, "Q1_0")])  # which have no zero
@pytest.mark.parametrize("outlier", [-3e4, -4e4, -6e4, -65504.0, 65504.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_one_large_weight_does_not_spoil_the_others(
    name: str, outlier: float, weighted: bool, encoder: Encoder, importance: np.ndarray
) -> None:
    """In a column that hardly matters, as importance has it of inputs that are mostly zero."""
    type = TensorType[name]
    weights = np.random.default_rng(4).normal(size=(32, 512)).astype(np.float32) * 0.1
    weights[:, ::128] = outlier
    matters = importance.copy()
    matters[::128] = 1e-4
    raw = encoder.encode(weights, type, matters if weighted else None).raw
    decoded = dequantize(raw, type, weights.shape)
    assert np.isfinite(decoded).all()
    others = np.delete(decoded, np.s_[::128], axis=1)
    if name.startswith("IQ4"):  # it has no level at zero
        assert np.abs(others).max() < abs(outlier) / 50
    else:
        np.testing.assert_allclose(decoded[:, ::128], outlier, rtol=0.02)
        assert np.square(others).mean() < (100 if name in ("Q4_K", "Q5_K") else 0.05)


@pytest.mark.parametrize("name", HALF)
def test_weights_upside_down_lose_as_much(name: str, encoder: Encoder) -> None:
    """Also where a format has minimums, which make a difference between below and above zero."""
    type = TensorType[name]
    weights = np.random.default_rng(5).normal(size=(64, 512)).astype(np.float32)
    weights[:, ::32] = 1e3
    up, down = (relative_rmse(w, encoder.encode(w, type).raw, type) for w in (weights, -weights))
    assert down == pytest.approx(up, rel=0.02)


@pytest.mark.parametrize("name", [name for name in HALF if name != "Q1_0"])  # it loses more of all weights
def test_weights_next_to_nothing_are_not_lost(name: str, encoder: Encoder) -> None:
    """With a scale that is the smallest number there is, a weight may still be so many times as large."""
    type = TensorType[name]
    weights = np.random.default_rng(6).normal(size=(8, 512)).astype(np.float32) * 1e-6
    assert relative_rmse(weights, encoder.encode(weights, type).raw, type) < 0.5


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0", "Q4_1", "Q5_1"])
def test_weights_near_what_the_format_can_say_at_most(name: str, encoder: Encoder, importance: np.ndarray) -> None:
    type = TensorType[name]
    levels = SEARCHES[type].levels.largest
    weights = np.random.default_rng(7).uniform(-1, 1, (16, 512)).astype(np.float32)
    weights[:, ::32] = 1.0 if SEARCHES[type].has_minimum else -1.0
    if SEARCHES[type].has_minimum:  # which has no more room than 65,504
        weights = np.abs(weights)
        weights[:, 1::32] = 0
    fitting = weights * np.float32(0.9 * 65504 * levels)
    for matters in (None, importance):
        encoded = encoder.encode(fitting, type, matters)
        assert np.isfinite(encoded.error) and relative_rmse(fitting, encoded.raw, type) < 0.2
        # And what is beyond is found out, as an error that is not finite.
        assert not np.isfinite(encoder.encode(weights * np.float32(4e6 * levels), type, matters).error)


def test_floats_are_rounded_to_the_nearest() -> None:
    values = np.array([[1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1e-45, 3.4e38, np.inf, np.nan]], np.float32)
    decoded = dequantize(quantize(values, TensorType.BF16), TensorType.BF16, values.shape)
    expected = np.array([[1.0, 1.0, 1 + 2**-6, -0.0, np.inf, np.inf, np.nan]], np.float32)
    np.testing.assert_array_equal(decoded, expected)
    half = dequantize(quantize(values, TensorType.F16), TensorType.F16, values.shape)
    expected = np.array([[1.0, 1 + 2**-8, 1 + 3 * 2**-8, -0.0, np.inf, np.inf, np.nan]], np.float32)
    np.testing.assert_array_equal(half, expected)


def test_levels_of_a_table_are_their_own_nearest() -> None:
    for search in SEARCHES.values():
        if isinstance(search.levels, Table):
            levels = np.array(search.levels.levels, np.float32)
            np.testing.assert_array_equal(search.levels.nearest(levels), levels)
            np.testing.assert_array_equal(search.levels.codes(levels), np.arange(len(levels)))


def test_what_cannot_be_encoded_is_named() -> None:
    with pytest.raises(ValueError, match="Q8_K cannot be encoded"):
        quantize(np.zeros((1, 256), np.float32), TensorType.Q8_K)
    with pytest.raises(ValueError, match="Q8_1 cannot be encoded"):
        Encoder([TensorType.Q8_1])
    with pytest.raises(ValueError, match="not whole blocks of 256"):
        quantize(np.zeros((1, 128), np.float32), TensorType.Q4_K)


# Compiled code


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("weighted", "large_first"), [(False, False), (True, False), (True, True)])
def test_compiled_code_gives_the_same_bytes(
    name: str, weighted: bool, large_first: bool, encoder: Encoder, importance: np.ndarray, rng: np.random.Generator
) -> None:
    weights, type = difficult(rng), TensorType[name]
    matters = importance if weighted else None
    encoded = encoder.encode(weights, type, matters, large_first=large_first)
    np.testing.assert_array_equal(encoded.raw, quantize(weights, type, matters, large_first=large_first))


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q4_0", "Q5_1", "IQ4_NL", "IQ3_S"])
def test_large_weights_come_out_truer_where_they_count_for_more(name: str, encoder: Encoder) -> None:
    type, weights = TensorType[name], np.random.default_rng(5).normal(size=(64, 512)).astype(np.float32)
    alike = np.ones(512, np.float32)
    shares, large = [], np.abs(weights) > 2
    for large_first in (False, True):
        encoded = encoder.encode(weights, type, alike, large_first=large_first)
        found = dequantize(encoded.raw, type, weights.shape)
        shares.append((np.square(found - weights)[large].sum(), (found * weights).sum() / np.square(weights).sum()))
        # What it reports is by importance alone.
        assert encoded.weighted_error == pytest.approx(encoded.error, rel=1e-4)
    assert shares[1][0] < shares[0][0]
    assert abs(1 - shares[1][1]) < abs(1 - shares[0][1])  # less smaller than they were


def in_two_bytes(weights: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights as F16 and as the bits of BF16, each with what they are in single precision."""
    half = weights.clip(-65504, 65504).astype(np.float16)  # subnormal numbers and zeros are among them
    brain = (weights.view(np.uint32) >> 16).astype(np.uint16)
    return [(half, half.astype(np.float32)), (brain, (brain.astype(np.uint32) << 16).view(np.float32))]


@pytest.mark.parametrize("rows", [1, 3, 19])
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_read_as_they_are_stored(name: str, rows: int, encoder: Encoder, rng: np.random.Generator) -> None:
    type = TensorType[name]
    for stored, decoded in in_two_bytes(difficult(rng)[-rows:]):
        np.testing.assert_array_equal(encoder.encode(stored, type).raw, encoder.encode(decoded, type).raw)


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q6_K", "IQ2_XS"])
def test_any_number_of_blocks_will_do(name: str, rows: int, encoder: Encoder, rng: np.random.Generator) -> None:
    type = TensorType[name]
    weights = rng.normal(size=(rows, BLOCK_FORMATS[type].block_size)).astype(np.float32)
    np.testing.assert_array_equal(encoder.encode(weights, type).raw, quantize(weights, type))


@pytest.mark.parametrize("name", [*NAMES, "F16", "BF16"])
def test_the_errors_that_it_reports_are_the_errors(
    name: str, encoder: Encoder, importance: np.ndarray, rng: np.random.Generator
) -> None:
    type = TensorType[name]
    weights = rng.normal(size=(5, 512)).astype(np.float32)
    encoded = encoder.encode(weights, type, importance)
    expected = relative_rmse(weights, encoded.raw, type)
    assert np.sqrt(encoded.error / encoded.energy) == pytest.approx(expected, rel=1e-3)
    if name in NAMES:
        expected = relative_rmse(weights, encoded.raw, type, importance)
        assert np.sqrt(encoded.weighted_error / encoded.weighted_energy) == pytest.approx(expected, rel=1e-3)


# Quantisers have no products of integers: with AVX-VNNI their machine code is AVX2's, byte for byte.
OTHER_FORMS = sorted(form for form in ("avx512", "avx2", "plain") if host_target(form) != host_target("best"))


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_bytes_do_not_depend_on_the_instruction_set(
    form: str, importance: np.ndarray, rng: np.random.Generator
) -> None:
    # One of each search, and of groups one with each way to have signs and shifts.
    names = ("Q4_K", "Q3_K", "IQ4_NL", "MXFP4", "NVFP4", "IQ1_S", "IQ1_M", "IQ2_S", "IQ3_XXS")
    types = [TensorType[name] for name in names]
    encoder = Encoder(types, host_target(form))
    weights = difficult(rng)
    for type in types:
        for matters in (None, importance):
            expected = quantize(weights, type, matters)
            np.testing.assert_array_equal(encoder.encode(weights, type, matters).raw, expected)
        for stored, decoded in in_two_bytes(weights):
            np.testing.assert_array_equal(encoder.encode(stored, type).raw, quantize(decoded, type))
