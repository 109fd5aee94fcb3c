"""Every block format decodes to the very bits of the reference."""

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from qrun.formats.blocks import BLOCK_FORMATS, BLOCK_SIZES, TensorType, dequantize
from qrun.formats.blocks.grids import grid
from qrun.formats.blocks.layout import BlockFormat

# Blocks and their weights as GGML decodes them, of types that the gguf package lacks (0.18 has no NVFP4).
GOLDEN = np.load(Path(__file__).parents[1] / "data" / "blocks.npz")
GRIDS = ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"]
# Where the half-precision scales of a block lie; Q8_K has a single-precision one, MXFP4 a bare exponent, NVFP4 bytes,
# and in IQ1_M a scale is spread over four places.
F16_AT = {
    TensorType.F16: [0],
    TensorType.Q4_0: [0],
    TensorType.Q4_1: [0, 2],
    TensorType.Q5_0: [0],
    TensorType.Q5_1: [0, 2],
    TensorType.Q8_0: [0],
    TensorType.Q2_K: [80, 82],
    TensorType.Q3_K: [108],
    TensorType.Q4_K: [0, 2],
    TensorType.Q5_K: [0, 2],
    TensorType.Q6_K: [208],
    TensorType.IQ1_S: [0],
    TensorType.IQ2_XXS: [0],
    TensorType.IQ2_XS: [0],
    TensorType.IQ2_S: [0],
    TensorType.IQ3_XXS: [0],
    TensorType.IQ3_S: [0],
    TensorType.IQ4_NL: [0],
    TensorType.IQ4_XS: [0],
    TensorType.TQ1_0: [52],
    TensorType.TQ2_0: [64],
    TensorType.Q1_0: [0],
    TensorType.Q2_0: [0],
}

# The largest magnitude of a half-precision number by kind of scale: any finite one, and subnormal ones only.
SCALES = {"finite": 0x7BFF, "denormal": 0x03FF}


def random_blocks(block_format: BlockFormat, n_blocks: int, scales: str, seed: int = 0) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (n_blocks, block_format.block_bytes), dtype=np.uint8)
    for at in F16_AT.get(block_format.type, []):
        bits = rng.integers(0, SCALES[scales] + 1, n_blocks, dtype=np.uint16)
        bits |= rng.integers(0, 2, n_blocks, dtype=np.uint16) << np.uint16(15)
        blocks[:, at : at + 2] = bits.view(np.uint8).reshape(-1, 2)
    if block_format.type == TensorType.IQ1_M:
        # The exponent's top bits: all five set would be infinity or NaN, none of them a denormal number.
        blocks[:, 55] = blocks[:, 55] & 0x8F if scales == "denormal" else np.minimum(blocks[:, 55] & 0x7F, 0x6F)
        blocks[:, 53] &= 0x3F if scales == "denormal" else 0xFF
    if block_format.type in (TensorType.F32, TensorType.Q8_K):
        numbers = rng.standard_normal(n_blocks, dtype=np.float32)
        if scales == "denormal":
            numbers *= np.float32(1e-39)
        blocks[:, :4] = numbers.view(np.uint8).reshape(-1, 4)
    return blocks


def reference(blocks: NDArray[np.uint8], type: TensorType) -> NDArray[np.float32]:
    if type == TensorType.Q8_K:  # gguf has no Q8_K
        scales = blocks[:, :4].copy().view(np.float32)
        return np.array(
            [[np.float32(d) * np.float32(np.int8(q)) for q in block[4:260].view(np.int8)]
             for (d,), block in zip(scales, blocks, strict=True)],
            dtype=np.float32,
        )
    with np.errstate(over="ignore"):  # the largest exponents of MXFP4
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(type))


IN_GGUF = [type for type in BLOCK_FORMATS if type.name not in GOLDEN.files or type.name in dir(gguf.quants)]


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("type", IN_GGUF, ids=lambda type: type.name)
def test_equals_the_reference_to_the_bit(type: TensorType, scales: str) -> None:
    block_format = BLOCK_FORMATS[type]
    blocks = random_blocks(block_format, 300, scales)
    weights = dequantize(blocks.reshape(-1), type, (300, block_format.block_size))
    np.testing.assert_array_equal(weights.view(np.uint32), reference(blocks, type).view(np.uint32))


@pytest.mark.parametrize("name", [name for name in GOLDEN.files if name in TensorType.__members__])
def test_equals_what_ggml_decoded(name: str) -> None:
    expected = GOLDEN[f"{name}_weights"]
    weights = dequantize(GOLDEN[name].reshape(-1), TensorType[name], expected.shape)
    np.testing.assert_array_equal(weights.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_is_small_and_of_distinct_groups(name: str) -> None:
    groups = grid(name)
    assert len(np.unique(groups, axis=0)) == len(groups)
    assert groups.size <= 1 << 14 and not groups.flags.writeable


@pytest.mark.parametrize("lacking", ["gguf", "IQ3_S", "the right table"])
def test_a_grid_that_cannot_be_had_says_what_is_needed(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    if lacking == "gguf":
        monkeypatch.setitem(sys.modules, "gguf", None)
        words = "and cannot be imported"
    elif lacking == "IQ3_S":
        monkeypatch.delattr(gguf.quants, "IQ3_S")
        words = "has none of their tables"
    else:
        monkeypatch.setattr(gguf.quants.IQ3_S, "grid", np.ones((1, 1, 512, 4), np.float32))
        words = "has another table than GGML"
    grid.cache_clear()
    needed = r"gguf 0\.18 or newer is needed for weights of type IQ3_S \(pip install --upgrade gguf\)"
    with pytest.raises(ImportError, match=needed) as caught:
        dequantize(np.zeros(110, np.uint8), TensorType.IQ3_S, (1, 256))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_every_exponent_of_mxfp4() -> None:
    blocks = random_blocks(BLOCK_FORMATS[TensorType.MXFP4], 256, "finite")
    blocks[:, 0] = np.arange(256)
    weights = dequantize(blocks.reshape(-1), TensorType.MXFP4, (256, 32))
    np.testing.assert_array_equal(weights.view(np.uint32), reference(blocks, TensorType.MXFP4).view(np.uint32))


def test_a_tensor_of_many_chunks_equals_its_blocks() -> None:
    q4_k = BLOCK_FORMATS[TensorType.Q4_K]
    blocks = random_blocks(q4_k, 1000, "finite")
    weights = dequantize(blocks.reshape(-1), TensorType.Q4_K, (10, 100, 256))
    np.testing.assert_array_equal(weights.reshape(1000, 256), q4_k.dequantize(blocks))


def test_infinite_scales_warn_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    for block_format in BLOCK_FORMATS.values():
        raw = np.full(10 * block_format.block_bytes, 0xFF, dtype=np.uint8)
        dequantize(raw, block_format.type, (10, block_format.block_size))
    assert not recwarn.list


def test_sizes_are_those_of_the_reference() -> None:
    ours = {type.name: BLOCK_SIZES[type] for type in TensorType}
    theirs = {type.name: sizes for type, sizes in gguf.GGML_QUANT_SIZES.items()}
    del theirs["Q8_1"]  # gguf still counts its two scales as single precision; in GGML they are half
    assert ours.items() >= theirs.items()


def test_a_type_that_cannot_be_decoded_says_so() -> None:
    with pytest.raises(ValueError, match="Q4_0_4_4 cannot be decoded"):
        dequantize(np.zeros(18, dtype=np.uint8), TensorType.Q4_0_4_4, (1, 32))


def test_bytes_that_do_not_fit_the_shape_say_so() -> None:
    with pytest.raises(ValueError, match="36 bytes of Q4_0 do not hold the 32 weights of"):
        dequantize(np.zeros(36, dtype=np.uint8), TensorType.Q4_0, (1, 32))
