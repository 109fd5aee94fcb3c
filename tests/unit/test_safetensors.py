"""safetensors files and folders: what they hold, and every way in which they can be wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors_builder import Tensor, brain_floats, build, header_of, tensor, write

from qrun.formats import FormatError, TensorType
from qrun.formats.checkpoints import PlainTensor, decode_tensors
from qrun.formats.safetensors import DTYPES, MAX_HEADER_BYTES, SafetensorsFile, SafetensorsFolder


@pytest.fixture
def tensors(rng: np.random.Generator) -> dict[str, Tensor]:
    return {
        "a.weight": tensor(rng.normal(size=(5, 3)).astype("<f4")),
        "b.weight": tensor(rng.normal(size=(7, 2)).astype("<f2"), "F16"),
        "c.weight": brain_floats(rng.normal(size=(3, 5))),
        "d": tensor(np.float32(4.5)),
        "empty": tensor(np.zeros((0, 4), "<f4")),
    }


# What is right


def test_every_type_is_read(rng: np.random.Generator, tmp_path: Path) -> None:
    arrays = {name: rng.integers(0, 2, (3, 5)).astype(dtype) for name, dtype in DTYPES.items()}
    path = write(tmp_path / "m.safetensors", {name: tensor(array, name) for name, array in arrays.items()})
    with SafetensorsFile(path) as file:
        assert list(file.tensors) == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.tensors[name].array(), array)
            assert not file.tensors[name].raw.flags.writeable


def test_metadata_and_padding(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(build(tensors, {"__metadata__": {"format": "pt"}} | header_of(tensors), padding=13))
    with SafetensorsFile(path) as file:
        assert file.metadata == {"format": "pt"}
        assert list(file.tensors) == list(tensors)


def test_rows_are_decoded_where_they_lie(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", tensors)
    with SafetensorsFile(path) as file:
        for name, code in (("a.weight", "<f4"), ("b.weight", "<f2")):
            plain = PlainTensor.of(file.tensors[name])
            expected = np.frombuffer(tensors[name][2], code).reshape(tensors[name][1])
            np.testing.assert_array_equal(plain.rows(1, 3), expected[1:3].astype(np.float32))
            assert plain.rows(1, 3).dtype == np.float32
            assert plain.raw(1, 3).tobytes() == expected[1:3].tobytes()
        plain = PlainTensor.of(file.tensors["c.weight"])
        assert plain.type == TensorType.BF16
        expected = (np.frombuffer(tensors["c.weight"][2], "<u2").astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_array_equal(plain.rows(0, 3), expected.reshape(3, 5))
        assert PlainTensor.of(file.tensors["d"]).rows(0, 1) == 4.5
        plain.forget()  # what is forgotten can still be read
        np.testing.assert_array_equal(plain.rows(0, 3), expected.reshape(3, 5))


def e4m3(byte: int) -> float:
    """By the definition: a sign, four bits of exponent with a bias of 7, three of fraction, no infinities."""
    sign, exponent, fraction = -1 if byte & 128 else 1, byte >> 3 & 15, byte & 7
    if exponent == 15 and fraction == 7:
        return float("nan")
    return sign * (fraction / 8 * 2**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


def e5m2(byte: int) -> float:
    sign, exponent, fraction = -1 if byte & 128 else 1, byte >> 2 & 31, byte & 3
    if exponent == 31:
        return float("nan") if fraction else sign * float("inf")
    return sign * (fraction / 4 * 2**-14 if exponent == 0 else (1 + fraction / 4) * 2.0 ** (exponent - 15))


@pytest.mark.parametrize(("dtype", "value"), [("F8_E4M3", e4m3), ("F8_E5M2", e5m2)])
def test_floats_of_a_byte(dtype: str, value: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", {"w": tensor(np.arange(256, dtype=np.uint8).reshape(16, 16), dtype)})
    with SafetensorsFile(path) as file:
        rows = PlainTensor.of(file.tensors["w"]).rows(0, 16)
    np.testing.assert_array_equal(rows.reshape(-1), np.array([value(byte) for byte in range(256)], np.float32))


# Weights of 8 bits with scales


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8"])
@pytest.mark.parametrize("kind", ["one", "scalar", "row", "row matrix", "block"])
@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv"])
def test_scales(dtype: str, kind: str, suffix: str, rng: np.random.Generator, tmp_path: Path) -> None:
    rows, columns, block = 21, 19, [8, 5]
    codes = rng.integers(0, 126, (rows, columns)).astype(np.uint8)
    shape: tuple[int, ...] = {"one": (1,), "scalar": (), "row": (rows,), "row matrix": (rows, 1), "block": (3, 4)}[kind]
    scale = rng.normal(size=shape).astype(np.float32)
    found = {"x.weight": tensor(codes, dtype), f"x.weight{suffix}": tensor(scale), "x.input_scale": tensor(scale)}
    path = write(tmp_path / "m.safetensors", found)
    values = codes.astype(np.float32) if dtype == "I8" else np.array([e4m3(byte) for byte in range(126)])[codes]
    expected = np.empty((rows, columns), np.float32)
    for i in range(rows):
        for j in range(columns):
            by = {"row": scale.reshape(-1)[i % scale.size], "block": scale.reshape(3, 4)[i // 8, j // 5]
                  if kind == "block" else 0, "one": scale.reshape(-1)[0]}  # fmt: skip
            factor = by["block" if kind == "block" else "row" if kind.startswith("row") else "one"]
            expected[i, j] = np.float32(values[i, j]) * factor
    with SafetensorsFile(path) as file:
        settings = {"quant_method": "fp8", "weight_block_size": block}
        weights = decode_tensors(file.tensors, settings, tmp_path / "config.json")
        assert list(weights) == ["x.weight"]
        for start, end in ((0, rows), (7, 9), (20, 21)):
            np.testing.assert_array_equal(weights["x.weight"].rows(start, end), expected[start:end])


@pytest.mark.parametrize(
    ("settings", "scale", "message"),
    [
        ({"quant_method": "hqq"}, np.ones(1), "quantisation method 'hqq' is not supported"),
        ({"quant_method": "fp8", "weight_block_size": [0, 4]}, np.ones(1), "weight_block_size is '[0, 4]'"),
        ({"quant_method": "fp8"}, np.ones((3, 3)), "has the shape (3, 3), which does not fit a weight of (4, 4)"),
    ],
)
def test_scales_that_do_not_fit(settings: dict[str, Any], scale: np.ndarray, message: str, tmp_path: Path) -> None:
    weight = tensor(np.zeros((4, 4), np.uint8), "F8_E4M3")
    path = write(tmp_path / "m.safetensors", {"x": weight, "x_scale": tensor(scale.astype("<f4"))})
    with SafetensorsFile(path) as file, pytest.raises(FormatError) as caught:
        decode_tensors(file.tensors, settings, tmp_path / "config.json")
    assert message in str(caught.value)


# What is wrong with a file

ONE = {"w": ("F32", (2, 2), b"\0" * 16)}


def described(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"GGUF\3\0\0\0........", "it is a GGUF file"),
        (b"PK\3\4............", "a zip archive"),
        (b"\x80\2}q............", "a pickle"),
        (b"\x10\0\0\0\0\0\0", "not a safetensors file"),
        ((1 << 40).to_bytes(8, "little") + b"{}", f"longer than {MAX_HEADER_BYTES}"),
        ((50).to_bytes(8, "little") + b"{}", "does not fit the file of 10: its download was cut short"),
        (build(ONE, "{"), "this is not JSON"),
        (build(ONE, '{"w": 1' + "}" * 3), "this is not JSON"),
        (build(ONE, '{"\xff": 1}').replace(b"\xc3\xbf", b"\xff\xff"), "it is not UTF-8"),
        (build(ONE, '{"a":' * 100_000), "nested too deeply"),
        (build(ONE, '{"w": 1, "w": 2}'), "'w' is there twice"),
        (build(ONE, {"w": 3}), "not described by dtype, shape and data_offsets"),
        (build(ONE, {"__metadata__": {"a": 1}}), "not an object of strings"),
        (build(ONE, described(more=1)), "not described by dtype, shape and data_offsets"),
        (build(ONE, described(dtype="F4")), "unknown type 'F4'"),
        (build(ONE, described(dtype=["F32"])), "unknown type"),
        (build(ONE, described(shape=[2, -2])), "impossible shape"),
        (build(ONE, described(shape=[2, True])), "impossible shape"),
        (build(ONE, described(shape=[2.0, 2])), "impossible shape"),
        (build(ONE, described(shape=[1] * 9)), "impossible shape"),
        (build(ONE, described(shape=[0, 1 << 61])), "impossible shape"),
        (build(ONE, described(data_offsets=[0])), "impossible offsets"),
        (build(ONE, described(data_offsets=[-4, 12])), "impossible offsets"),
        (build(ONE, described(data_offsets=[0, 20])), "would end at byte 20 of the data, but the file has only 16"),
        (build(ONE, described(data_offsets=[16, 0])), "cannot have -16 bytes"),
        (build(ONE, described(shape=[2, 3])), "cannot have 16 bytes"),
        (build(ONE, described(shape=[3], data_offsets=[4, 16])), "a gap between the header and tensor 'w'"),
        (build(ONE, described(shape=[3], data_offsets=[0, 12])), "4 bytes follow the last tensor"),
        (
            build(ONE, described() | {"v": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}}),
            "tensor 'w' and tensor 'v' overlap",
        ),
    ],
)
def test_what_is_wrong_takes_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        SafetensorsFile(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


def test_damaged_files(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    whole = build(tensors, {"__metadata__": {"format": "pt"}} | header_of(tensors))
    n_header = int.from_bytes(whole[:8], "little") + 8
    path = tmp_path / "m.safetensors"
    found_right = 0
    for seed in range(1000):
        rng = random.Random(seed)
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3])):
            at = rng.randrange(min(n_header, len(data)))
            match rng.randrange(4):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at : at + 1] = rng.choice([b"9", b"-", b'"', b"[", b"}", b",", b"99999999999999999999"])
                case 2:
                    del data[at : at + rng.randrange(1, 9)]
                case 3 if rng.random() < 0.3:
                    del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            with SafetensorsFile(path) as file:
                for found in file.tensors.values():
                    assert found.array().shape == found.shape
            found_right += 1
        except FormatError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert 20 < found_right < 700  # a name may be damaged and nothing be wrong with the file


# Folders


def test_a_checkpoint_of_several_files(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    names = list(tensors)
    shards = {"x-00001-of-00002.safetensors": names[:2], "x-00002-of-00002.safetensors": names[2:]}
    for shard, held in shards.items():
        write(tmp_path / shard, {name: tensors[name] for name in held})
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    folder = SafetensorsFolder(tmp_path)
    assert set(folder.tensors) == set(names)
    assert [path.name for path in folder.files] == ["model.safetensors.index.json", *shards]
    folder.close()


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, '"weight_map" is missing'),
        ({"w": "../m.safetensors"}, "is said to be in '../m.safetensors', no file name"),
        ({"w": "/etc/passwd"}, "no file name"),
        ({"w": "a\\b"}, "no file name"),
        ({"w": ".."}, "no file name"),
        ({"w": ""}, "no file name"),
        ({"w": 3}, "no file name"),
        ({"w": "none.safetensors", "v": "none.safetensors"}, "'none.safetensors', which holds 2 tensors, is missing"),
        ({"w": "m.safetensors", "v": "m.safetensors"}, "tensor 'v' is missing"),
        ({"w": "m.safetensors", "x": "n.safetensors"}, "tensor 'w' is in another file of the checkpoint too"),
    ],
)
def test_an_index_that_is_wrong(weight_map: object, message: str, tmp_path: Path) -> None:
    for name in ("m.safetensors", "n.safetensors"):
        (tmp_path / name).write_bytes(build(ONE))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FormatError) as caught:
        SafetensorsFolder(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "there is no model.safetensors"),
        (["pytorch_model.bin"], "files of PyTorch, which can hold programs and are not opened"),
        (["model-00001-of-00002.safetensors"], "but no model.safetensors.index.json"),
    ],
)
def test_a_folder_without_weights(names: list[str], message: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FormatError, match=message):
        SafetensorsFolder(tmp_path)
