"""`qrun convert` of folders in NVFP4 and MXFP4: taken over to the bit, or decoded where another type is asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import packed_checkpoints as packing
import pytest
from packed_checkpoints import As

from qrun.cli import main
from qrun.engine.quantize import on_load
from qrun.formats import GGUFReader, TensorType, dequantize

FOLDERS = Path(__file__).parent.parent / "data" / "huggingface"
SIZE, HEADS, KV_HEADS, HEAD, VOCAB, EXPERTS = 64, 4, 2, 16, 333, 4

Tensors = dict[str, "np.ndarray | As"]
Pack = Callable[[np.random.Generator, str, tuple[int, ...], Tensors], np.ndarray]


def modelopt(rng: np.random.Generator, name: str, shape: tuple[int, ...], tensors: Tensors) -> np.ndarray:
    codes, scales, weights = packing.four_bit_floats(rng, shape, 16)
    factor = np.float32(rng.uniform(0.01, 0.02))
    tensors |= {name: codes, f"{name}_scale": As(scales, "F8_E4M3"), f"{name}_scale_2": np.array(factor)}
    tensors[name.replace(".weight", ".input_scale")] = np.array(np.float32(0.5))
    return weights * factor


def compressed(rng: np.random.Generator, name: str, shape: tuple[int, ...], tensors: Tensors) -> np.ndarray:
    codes, scales, weights = packing.four_bit_floats(rng, shape, 16)
    divisor = np.float32(rng.uniform(50, 100))
    tensors |= {f"{name}_packed": codes, f"{name}_scale": As(scales, "F8_E4M3")}
    tensors |= {f"{name}_global_scale": np.array([divisor])}
    tensors[name.replace(".weight", ".input_global_scale")] = np.array([np.float32(7)])
    return weights * (np.float32(1) / divisor)


def compressed_mx(rng: np.random.Generator, name: str, shape: tuple[int, ...], tensors: Tensors) -> np.ndarray:
    codes, scales, weights = packing.four_bit_floats(rng, shape, 32)
    tensors |= {f"{name}_packed": codes, f"{name}_scale": scales}
    return weights


def plain(rng: np.random.Generator, name: str, shape: tuple[int, ...], tensors: Tensors) -> np.ndarray:
    weights = rng.normal(size=shape).astype(np.float32)
    tensors[name] = weights
    return weights


COMPRESSED = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
PACKERS: dict[str, tuple[Pack, dict[str, Any], TensorType]] = {
    "modelopt": (modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, TensorType.NVFP4),
    "compressed": (compressed, COMPRESSED, TensorType.NVFP4),
    "compressed-mx": (compressed_mx, COMPRESSED | {"format": "mxfp4-pack-quantized"}, TensorType.MXFP4),
}


def write(folder: Path, source: str, changes: dict[str, Any], tensors: Tensors) -> Path:
    """A folder with the tokenizer of another one."""
    shutil.copytree(FOLDERS / source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": SIZE, "intermediate_size": SIZE, "num_hidden_layers": 1, "vocab_size": VOCAB}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD}
    config |= sizes | heads | {"tie_word_embeddings": False} | changes
    for name in ("layer_types", "rope_scaling"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    packing.write_safetensors(folder / "model.safetensors", tensors)
    return folder


def make(
    folder: Path, rng: np.random.Generator, pack: Pack, settings: dict[str, Any], *, experts: bool = False
) -> Path:
    """One layer, of Llama or of Qwen with experts; beside it a folder "plain" with the same weights in full."""
    tensors: Tensors = {}
    full: Tensors = {}
    for name, shape in {
        "model.embed_tokens.weight": (VOCAB, SIZE), "lm_head.weight": (VOCAB, SIZE), "model.norm.weight": (SIZE,),
        "model.layers.0.input_layernorm.weight": (SIZE,), "model.layers.0.post_attention_layernorm.weight": (SIZE,),
        **({f"model.layers.0.self_attn.{n}_norm.weight": (HEAD,) for n in "qk"} if experts else {}),
        **({"model.layers.0.mlp.gate.weight": (EXPERTS, SIZE)} if experts else {}),
    }.items():  # fmt: skip
        tensors[name] = full[name] = rng.normal(size=shape).astype(np.float32)
    layers = {f"self_attn.{n}_proj": HEAD * heads for n, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))}
    layers["self_attn.o_proj"] = SIZE
    for block in [f"mlp.experts.{i}." for i in range(EXPERTS)] if experts else ["mlp."]:
        layers |= {f"{block}{name}_proj": SIZE for name in ("gate", "up", "down")}
    for layer, out in layers.items():
        name = f"model.layers.0.{layer}.weight"
        full[name] = pack(rng, name, (out, SIZE), tensors)
    source = "qwen3moe" if experts else "smollm2"
    sizes = {"moe_intermediate_size": SIZE, "num_local_experts": EXPERTS, "num_experts": EXPERTS} if experts else {}
    write(folder.parent / "plain", source, sizes, full)
    return write(folder, source, sizes | {"quantization_config": settings} if settings else sizes, tensors)


def run(*arguments: object) -> int:
    return main.main(["convert", *map(str, arguments)])


def weights(path: Path) -> dict[str, np.ndarray]:
    """All tensors decoded, with the scales that lie beside them."""
    with GGUFReader(path) as reader:
        found = {name: np.array(tensor.dequantize()) for name, tensor in reader.tensors.items()}
    for name in [name for name in found if name.endswith(".scale")]:
        matrix = f"{name.removesuffix('.scale')}.weight"
        scale = found.pop(name)
        found[matrix] = found[matrix] * scale.reshape(-1, *[1] * (found[matrix].ndim - 1))
    return found


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("method", list(PACKERS))
def test_weights_are_taken_over_as_they_are(
    method: str, experts: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    pack, settings, type = PACKERS[method]
    folder = make(tmp_path / "packed", rng, pack, settings, experts=experts)
    out, full = tmp_path / "out.gguf", tmp_path / "full.gguf"
    assert run(folder, out) == 0
    assert run(tmp_path / "plain", full, "--type", "f32") == 0
    with GGUFReader(out) as reader:
        types = {name: tensor.type for name, tensor in reader.tensors.items()}
        down = "blk.0.ffn_down_exps" if experts else "blk.0.ffn_down"
        assert types["blk.0.attn_q.weight"] == types[f"{down}.weight"] == type
        assert types["token_embd.weight"] == TensorType.F32
        scaled = type == TensorType.NVFP4
        assert (f"{down}.scale" in types) == scaled and not any("input_scale" in name for name in types)
        if scaled:
            assert reader.tensors[f"{down}.scale"].shape == ((EXPERTS,) if experts else (1,))
        assert reader.metadata["general.file_type"] == (39 if scaled else 38)
    kept, expected = weights(out), weights(full)
    assert kept.keys() == expected.keys()
    for name, values in expected.items():  # rows of queries and keys have changed places in both
        np.testing.assert_array_equal(kept[name], values, err_msg=name)


@pytest.mark.parametrize("method", list(PACKERS))
def test_with_a_type_they_are_decoded_first(method: str, tmp_path: Path, rng: np.random.Generator) -> None:
    pack, settings, _ = PACKERS[method]
    folder = make(tmp_path / "packed", rng, pack, settings)
    for type in ("f32", "q8_0"):
        out, full = tmp_path / f"out-{type}.gguf", tmp_path / f"full-{type}.gguf"
        assert run(folder, out, "--type", type) == run(tmp_path / "plain", full, "--type", type) == 0
        with GGUFReader(out) as one, GGUFReader(full) as other:
            assert list(one.tensors) == list(other.tensors)
            for name, tensor in one.tensors.items():
                np.testing.assert_array_equal(tensor.raw, other.tensors[name].raw, err_msg=name)


def test_rows_that_are_no_whole_blocks_are_decoded(tmp_path: Path, rng: np.random.Generator) -> None:
    """48 weights are three scales of NVFP4, of which a block in a GGUF file has four."""
    from qrun.formats.checkpoints import decode_tensors
    from qrun.formats.safetensors import SafetensorsFile

    tensors: Tensors = {}
    expected = modelopt(rng, "a.weight", (8, 48), tensors)
    path = packing.write_safetensors(tmp_path / "a.safetensors", tensors)
    with SafetensorsFile(path) as file:
        settings = {"quant_method": "modelopt"}
        tensor = decode_tensors(file.tensors, settings, path, keep=True)["a.weight"]
        assert (tensor.type, tensor.shape) == (TensorType.F32, (8, 48))
        np.testing.assert_array_equal(tensor.rows(0, 8), expected)
        np.testing.assert_array_equal(tensor.rows(3, 5), expected[3:5])


def test_scales_of_one_are_not_written(tmp_path: Path, rng: np.random.Generator) -> None:
    def pack(rng: np.random.Generator, name: str, shape: tuple[int, ...], tensors: Tensors) -> np.ndarray:
        codes, scales, weights = packing.four_bit_floats(rng, shape, 16)
        tensors |= {name: codes, f"{name}_scale": As(scales, "F8_E4M3")}
        return weights

    folder = make(tmp_path / "packed", rng, pack, PACKERS["modelopt"][1], experts=True)
    assert run(folder, tmp_path / "out.gguf") == 0
    with GGUFReader(tmp_path / "out.gguf") as reader:
        assert not any(name.endswith(".scale") for name in reader.tensors)


def test_the_settings_may_lie_beside_config_json(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = make(tmp_path / "packed", rng, modelopt, {})
    settings = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (folder / "hf_quant_config.json").write_text(json.dumps(settings))
    assert run(folder, tmp_path / "out.gguf") == 0
    with GGUFReader(tmp_path / "out.gguf") as reader:
        assert reader.tensors["blk.0.attn_v.weight"].type == TensorType.NVFP4


def test_experts_of_gpt_oss(tmp_path: Path, rng: np.random.Generator) -> None:
    """Gates and inputs take turns in one tensor of blocks."""
    tensors: Tensors = {}
    for name, shape in {
        "model.embed_tokens.weight": (VOCAB, SIZE), "lm_head.weight": (VOCAB, SIZE), "model.norm.weight": (SIZE,),
        "model.layers.0.input_layernorm.weight": (SIZE,), "model.layers.0.post_attention_layernorm.weight": (SIZE,),
        "model.layers.0.self_attn.sinks": (HEADS,), "model.layers.0.mlp.router.weight": (EXPERTS, SIZE),
        "model.layers.0.mlp.router.bias": (EXPERTS,), "model.layers.0.mlp.experts.gate_up_proj_bias": (EXPERTS, 192),
        "model.layers.0.mlp.experts.down_proj_bias": (EXPERTS, SIZE),
        **{f"model.layers.0.self_attn.{n}_proj.{part}": (out, SIZE)[: 2 if part == "weight" else 1]
           for n, out in (("q", 64), ("k", 32), ("v", 32), ("o", 64)) for part in ("weight", "bias")},
    }.items():  # fmt: skip
        tensors[name] = rng.normal(size=shape).astype(np.float32)
    expected = {}
    for name, shape in {"gate_up_proj": (EXPERTS, 192, SIZE), "down_proj": (EXPERTS, SIZE, 96)}.items():
        codes, scales, expected[name] = packing.four_bit_floats(rng, shape, 32)
        layer = f"model.layers.0.mlp.experts.{name}"
        tensors |= {f"{layer}_blocks": codes.reshape(*scales.shape, 16), f"{layer}_scales": scales}
    config = {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "intermediate_size": 96, "head_dim": HEAD,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2, "sliding_window": 16, "swiglu_limit": 7.0, "attention_bias": True,
        "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    folder, out = write(tmp_path / "packed", "qwen3", config, tensors), tmp_path / "out.gguf"
    assert run(folder, out) == 0
    both = expected["gate_up_proj"]
    with GGUFReader(out) as reader:
        for name, values in {"gate": both[:, ::2], "up": both[:, 1::2], "down": expected["down_proj"]}.items():
            tensor = reader.tensors[f"blk.0.ffn_{name}_exps.weight"]
            assert tensor.type == TensorType.MXFP4
            np.testing.assert_array_equal(dequantize(tensor.raw, tensor.type, tensor.shape), values)
    assert run(folder, tmp_path / "f32.gguf", "--type", "f32") == 0
    decoded = weights(tmp_path / "f32.gguf")
    np.testing.assert_array_equal(decoded["blk.0.ffn_up_exps.weight"], both[:, 1::2])


def test_what_is_run_keeps_them_too(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_load, "cache_root", lambda: tmp_path / "cache")
    folder = make(tmp_path / "packed", rng, modelopt, PACKERS["modelopt"][1])
    for type, expected in ((None, TensorType.NVFP4), ("q8_0", TensorType.Q8_0), (None, TensorType.NVFP4)):
        with GGUFReader(on_load.converted(folder, type)) as reader:
            assert reader.tensors["blk.0.ffn_up.weight"].type == expected
            assert reader.tensors["token_embd.weight"].type == TensorType.Q8_0


def change(folder: Path, replaced: dict[str, np.ndarray | As | None]) -> None:
    """Tensors of a folder, with some replaced, added or (None) left out."""
    from qrun.formats.safetensors import SafetensorsFile

    with SafetensorsFile(folder / "model.safetensors") as file:
        tensors: dict[str, Any] = {name: As(t.array().copy(), t.dtype) for name, t in file.tensors.items()}
    tensors = {name: tensor for name, tensor in (tensors | replaced).items() if tensor is not None}
    packing.write_safetensors(folder / "model.safetensors", tensors)


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(("replaced", "reason"), [
    ({f"{UP}.weight": np.zeros((64, 30), np.uint8)}, r"up_proj.weight' has the shape \(64, 30\), expected \(64, 32\)"),
    ({f"{UP}.weight_scale_2": np.zeros((), np.float32)}, "weight_scale_2' is 0.0, which cannot be a scale"),
    ({f"{UP}.weight_scale_2": np.ones(3, np.float32)}, "expected a single float"),
    ({f"{UP}.pre_quant_scale": np.ones(64, np.float32)}, "NVFP4 with AWQ, which is not supported"),
    ({f"{UP}.weight_scale": None}, "up_proj.weight' holds numbers of type U8"),
])  # fmt: skip
def test_parts_that_do_not_fit_are_one_line(
    replaced: dict[str, Any], reason: str, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    folder = make(tmp_path / "packed", rng, modelopt, PACKERS["modelopt"][1])
    change(folder, replaced)
    assert run(folder, tmp_path / "out.gguf") == 1
    message = capsys.readouterr().err
    assert re.search(reason, message) and message.count("\n") == 1
    assert not (tmp_path / "out.gguf").exists()


def test_without_packed_weights_a_type_is_needed(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path / "unpacked", rng, plain, {})
    assert run(folder, tmp_path / "out.gguf") == 2
    assert "Missing option '--type'" in capsys.readouterr().err
    packed = make(tmp_path / "other" / "packed", rng, modelopt, PACKERS["modelopt"][1])
    assert run(packed, tmp_path / "out.gguf", "--pure") == 2
    assert "give '--type' too" in capsys.readouterr().err
