"""Quantised weights of checkpoints: decoded to the very bits, and refused in one line where parts do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import packed_checkpoints as packing
import pytest
from packed_checkpoints import As

from qrun.formats import FormatError
from qrun.formats.checkpoints import decode_tensors
from qrun.formats.checkpoints.bits import unpack, unpack_range
from qrun.formats.safetensors import SafetensorsFile
from qrun.formats.tensors import SourceTensor

BITSANDBYTES = Path(__file__).parent.parent / "data" / "bitsandbytes.npz"


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., SourceTensor]:
    def open_weight(parts: Mapping[str, np.ndarray | As], config: Mapping[str, Any]) -> SourceTensor:
        """The one weight of a checkpoint of one layer. parts: by the suffixes of their names."""
        path = packing.write_safetensors(
            tmp_path / "model.safetensors", {f"mlp.{name}": part for name, part in parts.items()}
        )
        weights = decode_tensors(SafetensorsFile(path).tensors, config, tmp_path / "config.json")
        assert list(weights) == ["mlp.weight"]
        return weights["mlp.weight"]

    return open_weight


Open = Callable[[Mapping[str, np.ndarray | As], Mapping[str, Any]], SourceTensor]


def assert_decodes(weight: SourceTensor, expected: np.ndarray, rng: np.random.Generator) -> None:
    """As a whole, and in any range of rows."""
    assert weight.shape == expected.shape
    np.testing.assert_array_equal(weight.rows(0, len(expected)), expected)
    ranges = np.sort(rng.integers(0, len(expected) + 1, (5, 2)), axis=1).tolist()
    for start, end in [*ranges, (0, 0), (0, 1)]:
        rows = weight.rows(start, end)
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, expected[start:end])


# Bits


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_come_out_as_they_went_in(bits: int, rng: np.random.Generator) -> None:
    codes = rng.integers(0, 1 << bits, (96, 5))
    words = packing.pack_columns(codes, bits).view(np.uint32)
    np.testing.assert_array_equal(unpack(words, bits), codes)
    for start, end in ((0, 96), (1, 2), (31, 33), (50, 50), (95, 96), (10, 70)):
        np.testing.assert_array_equal(unpack_range(words, bits, start, end), codes[start:end])


# GPTQ


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [-1, 32, 40])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq(
    bits: int, act_order: bool, group_size: int, version: str, opened: Open, rng: np.random.Generator
) -> None:
    layer = packing.grouped(rng, 64, 96, bits, group_size, act_order=act_order)
    parts = packing.gptq_parts(layer, bits, offset=1 if version == "gptq" else 0)
    config = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "checkpoint_format": version}
    assert_decodes(opened(parts, config), layer.weights, rng)


@pytest.mark.parametrize("how", ["absent", "empty", "zeros"])
def test_gptq_without_g_idx_takes_inputs_in_turn(how: str, opened: Open, rng: np.random.Generator) -> None:
    layer = packing.grouped(rng, 32, 96, 4, 40)
    parts = packing.gptq_parts(layer, 4)
    parts["g_idx"] = np.zeros(0 if how == "empty" else 96, np.int32)
    if how == "absent":
        del parts["g_idx"]
    config = {"quant_method": "gptq", "bits": 4, "group_size": 40}
    assert_decodes(opened(parts, config), layer.weights, rng)


def test_gptq_layers_may_have_bits_of_their_own(opened: Open, rng: np.random.Generator) -> None:
    layer = packing.grouped(rng, 32, 64, 8, 32)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"+:mlp": {"bits": 8}}}
    assert_decodes(opened(packing.gptq_parts(layer, 8), config), layer.weights, rng)


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("offset", [0, 1])
def test_symmetric_gptq_tells_by_its_zero_points_how_they_are_stored(
    name: str | None, offset: int, opened: Open, rng: np.random.Generator
) -> None:
    layer = packing.grouped(rng, 32, 64, 4, 32, sym=True)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": name}
    assert_decodes(opened(packing.gptq_parts(layer, 4, offset=offset), config), layer.weights, rng)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_scales_may_have_any_type_of_float(dtype: str, opened: Open, rng: np.random.Generator) -> None:
    layer = packing.grouped(rng, 32, 64, 4, 32)
    parts: dict[str, Any] = packing.gptq_parts(layer, 4)
    if dtype == "F32":
        layer.scales = rng.uniform(0.1, 1, layer.scales.shape).astype(np.float32)
        parts["scales"] = layer.scales
    else:
        half = packing.bfloat16(layer.scales)
        layer.scales = (half.astype(np.uint32) << 16).view(np.float32)
        parts["scales"] = As(half, "BF16")
    assert_decodes(opened(parts, {"quant_method": "gptq", "bits": 4, "group_size": 32}), layer.weights, rng)


# AWQ


@pytest.mark.parametrize("group_size", [-1, 16, 48])
@pytest.mark.parametrize("names", [("bits", "group_size"), ("w_bit", "q_group_size")])
def test_awq_gemm(group_size: int, names: tuple[str, str], opened: Open, rng: np.random.Generator) -> None:
    layer = packing.grouped(rng, 40, 96, 4, group_size)
    config = {"quant_method": "awq", names[0]: 4, names[1]: group_size, "version": "GEMM", "zero_point": True}
    assert_decodes(opened(packing.awq_parts(layer), config), layer.weights, rng)


@pytest.mark.parametrize(("group_size", "padding"), [(-1, 0), (8, 0), (32, 3)])
def test_awq_gemv(group_size: int, padding: int, opened: Open, rng: np.random.Generator) -> None:
    layer = packing.grouped(rng, 19, 96, 4, group_size)
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemv"}
    assert_decodes(opened(packing.gemv_parts(layer, padding=padding), config), layer.weights, rng)


# bitsandbytes


@pytest.mark.parametrize("case", ["nf4", "nf4-nested", "nf4-odd", "fp4", "fp4-nested", "int8"])
def test_bitsandbytes_decodes_as_the_package_does(case: str, opened: Open, rng: np.random.Generator) -> None:
    parts, expected = bitsandbytes_case(case)
    assert_decodes(opened(parts, {"quant_method": "bitsandbytes"}), expected, rng)


def bitsandbytes_case(case: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    with np.load(BITSANDBYTES) as arrays:
        parts = {name.partition("/")[2]: array for name, array in arrays.items() if name.startswith(f"{case}/")}
    expected = parts.pop("decoded")
    return parts, expected


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block_size", [64, 96])
def test_four_bits_by_their_definition(nested: bool, block_size: int, opened: Open, rng: np.random.Generator) -> None:
    parts, expected = packing.four_bits(rng, (23, 45), block_size, nested)
    assert_decodes(opened(parts, {"quant_method": "bitsandbytes"}), expected, rng)


def test_the_bytes_of_four_bits_may_go_by_any_type(opened: Open, rng: np.random.Generator) -> None:
    parts, expected = packing.four_bits(rng, (8, 32), 64, False)
    renamed = parts | {"weight": As(parts["weight"].reshape(-1, 2).view(np.uint16), "BF16")}
    assert_decodes(opened(renamed, {"quant_method": "bitsandbytes"}), expected, rng)


def test_layers_that_are_not_quantised_are_left_alone(tmp_path: Path, rng: np.random.Generator) -> None:
    parts, _ = bitsandbytes_case("int8")
    tensors = {f"a.{name}": part for name, part in parts.items()}
    plain = rng.normal(size=(4, 4)).astype(np.float32)
    path = packing.write_safetensors(tmp_path / "model.safetensors", tensors | {"lm_head.weight": plain})
    weights = decode_tensors(SafetensorsFile(path).tensors, {"quant_method": "bitsandbytes"}, path)
    assert list(weights) == ["a.weight", "lm_head.weight"]
    np.testing.assert_array_equal(weights["lm_head.weight"].rows(0, 4), plain)


def test_a_bias_of_zeros_is_dropped_and_no_other(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors: dict[str, np.ndarray | As] = {}
    for layer, bias in (("a", np.zeros(32, np.float16)), ("b", np.eye(32, dtype=np.float16)[5])):
        parts = packing.gptq_parts(packing.grouped(rng, 32, 64, 4, 32), 4)
        tensors |= {f"{layer}.{name}": part for name, part in parts.items()} | {f"{layer}.bias": bias}
    path = packing.write_safetensors(tmp_path / "model.safetensors", tensors)
    assert set(decode_tensors(SafetensorsFile(path).tensors, GPTQ, path)) == {"a.weight", "b.weight", "b.bias"}


def test_a_scale_may_be_of_the_same_type_as_a_weight_and_have_one_itself(tmp_path: Path) -> None:
    bytes_of_floats = As(np.full((1, 1), 0x38, np.uint8), "F8_E4M3")  # 1.0
    names = ("a.weight", "a.weight_scale", "a.weight_scale_scale")
    path = packing.write_safetensors(tmp_path / "model.safetensors", dict.fromkeys(names, bytes_of_floats))
    weights = decode_tensors(SafetensorsFile(path).tensors, {"quant_method": "fp8"}, path)
    assert set(weights) == {"a.weight", "a.weight_scale_scale"}
    assert weights["a.weight"].rows(0, 1) == 1


@pytest.mark.parametrize("shape", [(), (3,), (3, 1, 1), (3, 20), (3, 20, 1), (3, 3, 2)])
def test_experts_in_one_tensor(shape: tuple[int, ...], tmp_path: Path, rng: np.random.Generator) -> None:
    """Blocks of 8 x 16 begin anew with each of three matrices of 20 x 24."""
    codes = As(rng.integers(0x30, 0x40, size=(3, 20, 24)).astype(np.uint8), "F8_E4M3")
    scales = rng.uniform(1, 2, size=shape).astype(np.float32)
    path = packing.write_safetensors(tmp_path / "model.safetensors", {"a": codes, "a_scale_inv": np.array(scales)})
    settings = {"quant_method": "fp8", "weight_block_size": [8, 16]}
    found = decode_tensors(SafetensorsFile(path).tensors, settings, path)["a"]
    plain = decode_tensors(SafetensorsFile(
        packing.write_safetensors(tmp_path / "plain.safetensors", {"a": codes})).tensors, None, path)["a"]  # fmt: skip
    weights = plain.rows(0, 60).reshape(3, 20, 24)
    for expert in range(3):
        for row in range(20):
            for column in range(24):
                place = {0: (), 1: (expert,), 2: (expert, row), 3: (
                    expert, 0 if shape[1:] == (1, 1) else row if shape[1:] == (20, 1) else row // 8,
                    column // 16 if shape[1:] == (3, 2) else 0)}[len(shape)]  # fmt: skip
                weights[expert, row, column] *= scales[place]
    assert found.shape == (3, 20, 24)
    np.testing.assert_array_equal(found.rows(0, 60), weights.reshape(60, 24))
    np.testing.assert_array_equal(found.rows(17, 43), weights.reshape(60, 24)[17:43])


def test_scales_of_experts_that_do_not_fit(tmp_path: Path) -> None:
    codes = As(np.full((3, 20, 24), 0x38, np.uint8), "F8_E4M3")
    for shape in ((2,), (3, 3), (3, 1, 2), (20, 3), (60,), (60, 1)):
        path = packing.write_safetensors(
            tmp_path / "model.safetensors", {"a": codes, "a_scale_inv": np.ones(shape, np.float32)}
        )
        with pytest.raises(FormatError, match=r"which does not fit 3 weights of \(20, 24\)"):
            decode_tensors(SafetensorsFile(path).tensors, {"quant_method": "fp8", "weight_block_size": [8, 16]}, path)


# What is refused


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}


def swap(**changes: Any) -> Any:
    """Parts with some of them replaced (None: left out) by what a function makes of them."""

    def change(parts: dict[str, Any]) -> None:
        for name, make in changes.items():
            if make is None:
                del parts[name]
            else:
                parts[name] = make(parts[name])

    return change


@pytest.mark.parametrize(("change", "config", "reason"), [
    (swap(scales=None), {}, "its part 'mlp.scales' is missing"),
    (swap(qweight=lambda x: x.reshape(-1)), {}, r"qweight have the shape \[256\], which is no matrix"),
    (swap(qweight=lambda x: x.astype(np.int64)), {}, "qweight are I64, not I32"),
    (swap(qweight=lambda x: x[:-1]), {}, "qweight have 7 rows, which is not possible for 64 inputs"),
    (swap(qzeros=lambda x: x[:, :-1]), {}, r"qzeros have the shape \[2, 3\], not \[2, 4\]"),
    (swap(scales=lambda x: x[:1]), {}, r"qzeros have the shape \[2, 4\], not \[1, 4\]"),
    (swap(scales=lambda x: x[:, :-1]), {}, r"scales have the shape \[2, 31\], not \[2, 32\]"),
    (swap(scales=lambda x: x.astype(np.int32)), {}, "scales are I32, not F32 or F16 or BF16"),
    (swap(g_idx=lambda x: x + 1), {}, "g_idx go from 1 to 2, and there are 2 groups"),
    (swap(g_idx=lambda x: x - 1), {}, "g_idx go from -1 to 0, and there are 2 groups"),
    (swap(g_idx=lambda x: x[:-1]), {}, "qweight have 8 rows, which is not possible for 63 inputs"),
    (swap(g_idx=lambda x: x.reshape(2, -1)), {}, r"g_idx have the shape \[2, 32\], not \[64\]"),
    (swap(g_idx=lambda x: x.astype(np.float32)), {}, "g_idx are F32, not I32 or I64"),
    (swap(g_idx=None), {"bits": 5}, "the configuration says bits = '5'"),
    (swap(g_idx=None), {"bits": "4"}, "the configuration says bits = '4'"),
    (swap(g_idx=None), {"group_size": 0}, "groups have 0 inputs"),
    (swap(g_idx=None), {"group_size": 16}, "64 inputs in groups of 16 do not make the 2 groups"),
    (swap(), {"checkpoint_format": "marlin"}, "GPTQ in the format 'marlin' is not supported"),
    (swap(), {"checkpoint_format": [1]}, r"GPTQ in the format '\[1\]' is not supported"),
])  # fmt: skip
def test_gptq_that_does_not_fit_together(
    change: Any, config: dict[str, Any], reason: str, opened: Open, rng: np.random.Generator
) -> None:
    parts = packing.gptq_parts(packing.grouped(rng, 32, 64, 4, 32), 4)
    change(parts)
    with pytest.raises(FormatError, match=f"model.safetensors: at byte [0-9]+: tensor 'mlp.weight': .*{reason}"):
        opened(parts, GPTQ | config)


@pytest.mark.parametrize(("change", "config", "reason"), [
    (swap(qzeros=None), {}, "its part 'mlp.qzeros' is missing"),
    (swap(qzeros=lambda x: x[:-1]), {}, r"qzeros have the shape \[1, 4\], not \[2, 4\]"),
    (swap(scales=lambda x: x[:, 1:]), {}, r"scales have the shape \[2, 31\], not \[2, 32\]"),
    (swap(qweight=lambda x: x[:-1]), {}, "63 inputs are not whole groups of 32"),
    (swap(), {"group_size": 24}, "64 inputs are not whole groups of 24"),
    (swap(), {"bits": 8}, "the configuration says bits = '8'"),
    (swap(), {"version": "gemv_fast"}, "AWQ in the version 'gemv_fast' is not supported"),
])  # fmt: skip
def test_awq_that_does_not_fit_together(
    change: Any, config: dict[str, Any], reason: str, opened: Open, rng: np.random.Generator
) -> None:
    parts = packing.awq_parts(packing.grouped(rng, 32, 64, 4, 32))
    change(parts)
    with pytest.raises(FormatError, match=f"model.safetensors: at byte [0-9]+: tensor 'mlp.weight': .*{reason}"):
        opened(parts, AWQ | config)


@pytest.mark.parametrize(("change", "reason"), [
    (swap(qzeros=lambda x: x[:, :0]), "qzeros have 0 words in a row, too few for 2 groups"),
    (swap(qzeros=lambda x: x[1:]), r"qzeros have the shape \[31, 1\], not \[32, 1\]"),
    (swap(scales=lambda x: x[:, 1:]), r"scales have the shape \[32, 7\], not \[32, 8\]"),
    (swap(qweight=lambda x: x[:, 1:]), "56 inputs are not whole groups of 32"),
])  # fmt: skip
def test_gemv_that_does_not_fit_together(change: Any, reason: str, opened: Open, rng: np.random.Generator) -> None:
    parts = packing.gemv_parts(packing.grouped(rng, 32, 64, 4, 32))
    change(parts)
    with pytest.raises(FormatError, match=f"model.safetensors: at byte [0-9]+: tensor 'mlp.weight': .*{reason}"):
        opened(parts, AWQ | {"version": "GEMV"})


STATE = "weight.quant_state.bitsandbytes__nf4"


def state(**changes: Any) -> Any:
    def change(parts: dict[str, Any]) -> None:
        values = json.loads(parts[STATE].tobytes()) | changes
        parts[STATE] = np.frombuffer(json.dumps(values).encode(), np.uint8)

    return change


def text(raw: bytes) -> Any:
    return swap(**{STATE: lambda _: np.frombuffer(raw, np.uint8)})


@pytest.mark.parametrize(("change", "reason"), [
    (swap(**{"weight.absmax": None}), "its part 'mlp.weight.absmax' is missing"),
    (swap(weight=lambda x: x[1:]), "it has 127 bytes for 256 weights of 4 bits"),
    (swap(**{"weight.absmax": lambda x: x[1:]}), r"absmax have the shape \[3\], not \[4\]"),
    (swap(**{"weight.absmax": lambda x: x.astype(np.float32)}), "absmax are F32, not U8"),
    (swap(**{"weight.quant_map": lambda x: x[1:]}), r"quant_map have the shape \[15\], not \[16\]"),
    (swap(**{"weight.nested_quant_map": lambda x: x[1:]}), r"nested_quant_map have the shape \[255\], not \[256\]"),
    (swap(**{"weight.nested_quant_map": None}), "its part 'mlp.weight.nested_quant_map' is missing"),
    (swap(**{"weight.nested_absmax": lambda x: x[1:]}), r"nested_absmax have the shape \[1\], not \[2\]"),
    (state(shape=[8, 33]), "it has 128 bytes for 264 weights of 4 bits"),
    (state(shape=[256]), r"shape = '\[256\]', which is that of no matrix"),
    (state(shape=[-8, -32]), "which is that of no matrix"),
    (state(shape=None), "which is that of no matrix"),
    (state(blocksize=0), "blocksize = '0', which is not possible"),
    (state(blocksize=True), "blocksize = 'True', which is not possible"),
    (state(nested_blocksize="3"), "nested_blocksize = '3', which is not possible"),
    (state(nested_offset="x"), "nested_offset = 'x', which is no number"),
    (state(nested_offset=float("inf")), "nested_offset = 'inf', which is no number"),
    (state(nested_offset=10**400), "nested_offset = '1000*', which is no number"),
    (text(b"{"), "its quant_state is no JSON"),
    (text(b"\xff"), "its quant_state is no JSON"),
    (text(b"[1]"), "its quant_state is no JSON object"),
    (text(b"[" * 60000), "its quant_state is no JSON"),
    (text(b" " * 70000), "its quant_state is 70000 bytes of U8, not a short text"),
])  # fmt: skip
def test_four_bits_that_do_not_fit_together(change: Any, reason: str, opened: Open, rng: np.random.Generator) -> None:
    parts, _ = packing.four_bits(rng, (8, 32), 64, True)
    change(parts)
    with pytest.raises(FormatError, match=f"model.safetensors: at byte [0-9]+: tensor 'mlp.weight': .*{reason}"):
        opened(parts, {"quant_method": "bitsandbytes"})


@pytest.mark.parametrize(("change", "reason"), [
    (swap(SCB=lambda x: x[1:]), r"SCB have the shape \[10\], not \[11\]"),
    (swap(weight=None), "its part 'mlp.weight' is missing"),
    (swap(weight=lambda x: x.reshape(-1)), r"it has the shape \[407\], which is no matrix"),
    (swap(weight=lambda x: x.astype(np.float32)), "values are F32, not I8"),
    (swap(weight_format=lambda x: x + np.uint8(2)), "weight_format is 2, and only 0 is supported"),
])  # fmt: skip
def test_eight_bits_that_do_not_fit_together(change: Any, reason: str, opened: Open) -> None:
    parts, _ = bitsandbytes_case("int8")
    change(parts)
    with pytest.raises(FormatError, match=f"model.safetensors: at byte [0-9]+: tensor 'mlp.weight': .*{reason}"):
        opened(parts, {"quant_method": "bitsandbytes"})
