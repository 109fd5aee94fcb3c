"""`qrun convert` of folders whose weights are quantised: the result is that of the same weights stored as floats."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import packed_checkpoints as packing
import pytest
from packed_checkpoints import As

from qrun.cli import main
from qrun.formats import GGUFReader, TensorType
from qrun.formats.safetensors import SafetensorsFile

FOLDERS = Path(__file__).parent.parent / "data" / "huggingface"
# The linear layers of these models; the second layer's values are left as they are, as modules_to_not_convert may say.
LINEAR = re.compile(r"(_proj|\.w[123]|lm_head)\.weight$")
KEPT = "layers.1.self_attn.v_proj"

Parts = Mapping[str, np.ndarray | As]
Pack = Callable[[np.random.Generator, tuple[int, ...]], tuple[Parts, np.ndarray]]


def pack_gptq(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Parts, np.ndarray]:
    layer = packing.grouped(rng, *shape, 4, 16, act_order=True)
    return packing.gptq_parts(layer, 4), layer.weights


def pack_awq(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Parts, np.ndarray]:
    layer = packing.grouped(rng, *shape, 4, 16)
    return packing.awq_parts(layer), layer.weights


PACKERS: dict[str, tuple[Pack, dict[str, Any]]] = {
    "gptq": (pack_gptq, {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": False}),
    "awq": (pack_awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}),
    "nf4": (
        lambda rng, shape: packing.four_bits(rng, shape, 64, True),
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
    "fp4": (lambda rng, shape: packing.four_bits(rng, shape, 64, False, "fp4"), {"load_in_4bit": True}),
    "int8": (packing.eight_bits, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}


def twins(source: Path, folder: Path, pack: Pack, rng: np.random.Generator) -> tuple[Path, Path]:
    """Two copies of a checkpoint with new weights in its linear layers: packed, and plain in single precision."""
    packed: dict[str, np.ndarray | As] = {}
    plain: dict[str, np.ndarray | As] = {}
    with SafetensorsFile(source / "model.safetensors") as file:
        for name, tensor in file.tensors.items():
            layer = name.removesuffix(".weight")
            # The zero points of GPTQ and AWQ fill whole words, for which not every vocabulary has the size.
            possible = pack not in (pack_gptq, pack_awq) or tensor.shape[0] % 8 == 0
            if LINEAR.search(name) and KEPT not in name and possible:
                parts, plain[name] = pack(rng, tensor.shape)
                packed |= {f"{layer}.{part}": array for part, array in parts.items()}
            else:
                packed[name] = plain[name] = As(tensor.array().copy(), tensor.dtype)
    folders = folder / "packed", folder / "plain"
    for path, tensors in zip(folders, (packed, plain), strict=True):
        shutil.copytree(source, path)
        packing.write_safetensors(path / "model.safetensors", tensors)
    return folders


def configure(folder: Path, settings: Mapping[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))


def run(*arguments: object) -> int:
    return main.main(["convert", *map(str, arguments)])


def assert_same_tensors(one: Path, other: Path) -> None:
    with GGUFReader(one) as first, GGUFReader(other) as second:
        assert list(first.tensors) == list(second.tensors)
        for name, tensor in first.tensors.items():
            assert tensor.type == second.tensors[name].type
            np.testing.assert_array_equal(tensor.raw, second.tensors[name].raw, err_msg=name)


@pytest.mark.parametrize("method", list(PACKERS))
@pytest.mark.parametrize("model", ["mistral", "mixtral", "qwen2"])
def test_the_result_is_that_of_plain_weights(
    model: str, method: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    pack, settings = PACKERS[method]
    packed, plain = twins(FOLDERS / model, tmp_path, pack, rng)
    configure(packed, settings)
    for type in ("f32", "q8_0"):
        results = [tmp_path / f"{folder.name}-{type}.gguf" for folder in (packed, plain)]
        for folder, out in zip((packed, plain), results, strict=True):
            assert run(folder, out, "--type", type) == 0
        assert_same_tensors(*results)
    with GGUFReader(results[0]) as reader:
        assert reader.tensors["blk.0.attn_q.weight"].type == TensorType.Q8_0


@pytest.mark.parametrize(("method", "name"), [("gptq", "quantize_config.json"), ("awq", "quant_config.json")])
def test_the_settings_may_have_a_file_of_their_own(
    method: str, name: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    pack, settings = PACKERS[method]
    packed, plain = twins(FOLDERS / "mistral", tmp_path, pack, rng)
    (packed / name).write_text(json.dumps({key: settings[key] for key in settings if key != "quant_method"}))
    for folder in (packed, plain):
        assert run(folder, folder.with_suffix(".gguf"), "--type", "f32") == 0
    assert_same_tensors(packed.with_suffix(".gguf"), plain.with_suffix(".gguf"))


def test_experts_that_differ_in_being_packed_are_joined(tmp_path: Path, rng: np.random.Generator) -> None:
    pack, settings = PACKERS["gptq"]
    packed, plain = twins(FOLDERS / "mixtral", tmp_path, pack, rng)
    # One expert's matrix goes back to plain floats.
    with SafetensorsFile(packed / "model.safetensors") as file, SafetensorsFile(plain / "model.safetensors") as other:
        layer = next(name for name in file.tensors if "experts" in name and name.endswith("qweight"))[: -len("qweight")]
        tensors: dict[str, np.ndarray | As] = {
            name: As(tensor.array().copy(), tensor.dtype) for name, tensor in file.tensors.items()
            if not name.startswith(layer)
        }  # fmt: skip
        tensors[f"{layer}weight"] = other.tensors[f"{layer}weight"].array().copy()
    packing.write_safetensors(packed / "model.safetensors", tensors)
    configure(packed, settings)
    for folder in (packed, plain):
        assert run(folder, folder.with_suffix(".gguf"), "--type", "f32") == 0
    assert_same_tensors(packed.with_suffix(".gguf"), plain.with_suffix(".gguf"))


@pytest.mark.parametrize(("change", "reason"), [
    ({"bits": 4, "checkpoint_format": "marlin"}, "GPTQ in the format 'marlin' is not supported"),
    ({"quant_method": "awq"}, "down_proj.weight': 6 inputs are not whole groups of 16"),
    ({"quant_method": "bitsandbytes"}, "said to be quantised by bitsandbytes, but none is called"),
    ({"quant_method": "hqq"}, "the quantisation method 'hqq' is not supported"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_one_line(
    change: dict[str, Any], reason: str, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    pack, settings = PACKERS["gptq"]
    packed, _ = twins(FOLDERS / "qwen2", tmp_path, pack, rng)
    configure(packed, settings | change)
    out = tmp_path / "out.gguf"
    assert run(packed, out, "--type", "f32") == 1
    message = capsys.readouterr().err
    assert re.search(reason, message) and message.count("\n") == 1
    assert not out.exists()
