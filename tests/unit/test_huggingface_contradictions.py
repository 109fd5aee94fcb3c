"""Folders of Hugging Face whose files contradict each other, or hold more than is read: what is done, and said."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_folders import DATA, Edit, copy, edit, stored
from safetensors_builder import Tensor, tensor

from qrun.cli import main
from qrun.engine import Model
from qrun.formats import FormatError, GGUFReader
from qrun.models.huggingface import CheckpointSource
from qrun.models.huggingface.config_keys import CHANGING, HARMLESS, READ, WINDOW_KEYS

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def moved(**changes: Any) -> Edit:
    return lambda config: config.update(changes)


def notices(folder: Path) -> list[str]:
    with closing(CheckpointSource(folder)) as source:
        return [notice.removeprefix(f"{folder}/") for notice in source.notices]


def refusal(folder: Path) -> str:
    with pytest.raises(FormatError) as caught:
        CheckpointSource(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_none_of_the_checkpoints_gives_reason_for_a_notice() -> None:
    for folder in DATA.iterdir():
        expected = folder.name.endswith("-vision")  # one, about what sees
        assert ["see or hear" in notice for notice in notices(folder)] == [True] * expected, folder.name


# One matrix for the embedding and the head


def shaken(tensors: dict[str, Any]) -> None:
    """A head like the embedding, but for one bit."""
    dtype, shape, data = tensors[EMBEDDING]
    tensors[HEAD] = dtype, shape, data[:-2] + bytes([data[-2] ^ 1, data[-1]])


def test_a_head_that_is_not_the_embedding_is_kept(tmp_path: Path) -> None:
    folder = copy("qwen3", tmp_path, tensors=shaken)  # tie_word_embeddings is true
    with closing(CheckpointSource(folder)) as source:
        head = source.tensors["output.weight"]
        np.testing.assert_array_equal(head.rows(0, head.n_rows), stored(folder, HEAD))
    (said,) = notices(folder)
    assert "tensor 'lm_head.weight' differs from the embedding, though tie_word_embeddings says" in said


def test_a_head_alone_is_the_embedding_too(tmp_path: Path) -> None:
    def rename(tensors: dict[str, Any]) -> None:
        tensors[HEAD] = tensors.pop(EMBEDDING)

    folder = copy("qwen3", tmp_path, tensors=rename)
    with closing(CheckpointSource(folder)) as source, closing(CheckpointSource(DATA / "qwen3")) as plain:
        assert source.tensors.keys() == plain.tensors.keys()
        embedding = source.tensors["token_embd.weight"]
        np.testing.assert_array_equal(embedding.rows(0, embedding.n_rows), stored(DATA / "qwen3", EMBEDDING))
        assert source.notices == []
    # Where the configuration says that there are two, one is missing.
    assert "'model.embed_tokens.weight' is missing" in refusal(copy("llama", tmp_path, tensors=rename))


def test_the_same_head_stored_as_another_type_is_left_out(tmp_path: Path) -> None:
    def widen(tensors: dict[str, Any]) -> None:
        tensors[HEAD] = tensor(stored(DATA / "qwen3", EMBEDDING))

    folder = copy("qwen3", tmp_path, tensors=widen)
    with closing(CheckpointSource(folder)) as source:
        assert "output.weight" not in source.tensors and source.notices == []


# Tensors that nobody takes

UP = "model.layers.0.mlp.up_proj.weight"
INTEGERS = tensor(np.zeros(3, "<i4"), "I32")


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.bitmask", "model.layers.0.mlp.up_proj.g_idx", "odd"])
def test_integers_of_which_nothing_is_known_are_refused(name: str, tmp_path: Path) -> None:
    folder = copy("qwen3", tmp_path, tensors=lambda t: t.update({name: INTEGERS}))
    assert f"tensor {name!r} holds numbers of type I32, as quantised weights have them" in refusal(folder)


def test_a_weight_of_integers_is_named_rather_than_called_missing(tmp_path: Path) -> None:
    def pack(tensors: dict[str, Any]) -> None:
        tensors[UP] = tensor(np.zeros((48, 4), "<u4"), "U32")
        del tensors["model.layers.1.mlp.up_proj.weight"]

    assert f"tensor {UP!r} holds numbers of type U32" in refusal(copy("qwen3", tmp_path, tensors=pack))


def asymmetric(tensors: dict[str, Any], kind: str) -> np.ndarray:
    """A matrix as int8 with zero points. Returns its weights."""
    rng = np.random.default_rng(1)
    codes = rng.integers(-128, 128, (48, 32)).astype(np.int8)
    shape = {"row": (48, 1), "one": (1,), "group": (48, 4)}[kind]
    scale = rng.uniform(0.001, 0.01, shape).astype(np.float32)
    zero = rng.integers(-128, 128, shape).astype(np.int8)
    tensors[UP], tensors[f"{UP}_scale"] = tensor(codes, "I8"), tensor(scale)
    tensors[f"{UP}_zero_point"] = tensor(zero, "I8")
    wide = [np.repeat(a.astype(np.float32), 8, axis=1) if kind == "group" else a.astype(np.float32)
            for a in (zero, scale)]  # fmt: skip
    return (codes.astype(np.float32) - wide[0]) * wide[1]


INT8 = {"quantization_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}}


@pytest.mark.parametrize("kind", ["row", "one", "group"])
def test_weights_with_zero_points(kind: str, tmp_path: Path) -> None:
    expected: list[np.ndarray] = []
    folder = copy("qwen3", tmp_path, moved(**INT8), lambda t: expected.append(asymmetric(t, kind)))
    with closing(CheckpointSource(folder)) as source:
        found = source.tensors["blk.0.ffn_up.weight"]
        np.testing.assert_array_equal(found.rows(0, 48), expected[0])
        np.testing.assert_array_equal(found.rows(5, 7), expected[0][5:7])


def test_zero_points_that_do_not_fit(tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        asymmetric(tensors, "row")
        tensors[f"{UP}_zero_point"] = tensor(np.zeros((47, 1), np.int8), "I8")

    assert "_zero_point' has the shape (47, 1), and there are 48 scales" in refusal(
        copy("qwen3", tmp_path, moved(**INT8), change)
    )


@pytest.mark.parametrize(("suffix", "state"), [("bitmask", "sparse"), ("weight_packed", "packed"),
                                               ("weight_g_idx", "in groups of its own order")])  # fmt: skip
def test_formats_of_compressed_tensors_that_are_not_read(suffix: str, state: str, tmp_path: Path) -> None:
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    folder = copy("qwen3", tmp_path, moved(**INT8), lambda t: t.update({name: INTEGERS}))
    assert f"'int-quantized' is not supported: tensor {name!r} is {state}" in refusal(folder)


def test_weights_of_mlx(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    expected: list[np.ndarray] = []

    def pack(tensors: dict[str, Tensor]) -> None:
        codes = rng.integers(0, 16, (48, 32)).astype(np.uint32)
        words = sum(codes[:, i::8] << np.uint32(4 * i) for i in range(8))
        scales, biases = (rng.normal(size=(48, 2)).astype(np.float16) for _ in range(2))
        layer = UP.removesuffix(".weight")
        tensors[UP] = tensor(np.asarray(words, "<u4"), "U32")
        tensors[f"{layer}.scales"], tensors[f"{layer}.biases"] = tensor(scales, "F16"), tensor(biases, "F16")
        wide = [np.repeat(a.astype(np.float32), 16, axis=1) for a in (scales, biases)]
        expected.append(codes.astype(np.float32) * wide[0] + wide[1])

    folder = copy("qwen3", tmp_path, moved(quantization={"group_size": 16, "bits": 4}), pack)
    with closing(CheckpointSource(folder)) as source:
        found = source.tensors["blk.0.ffn_up.weight"]
        np.testing.assert_array_equal(found.rows(0, 48), expected[0])
        np.testing.assert_array_equal(found.rows(7, 9), expected[0][7:9])
    edit(folder / "config.json", lambda config: config["quantization"].update(mode="mxfp4"))
    assert f"tensor {UP!r}: MLX in the mode 'mxfp4' is not supported: affine is" in refusal(folder)
    edit(folder / "config.json", lambda config: config["quantization"].update(mode="affine", bits=3))
    assert "4 words in a row are not whole groups of 16 x 3 bits" in refusal(folder)


def test_what_follows_from_the_configuration_is_left_out(tmp_path: Path) -> None:
    def add(tensors: dict[str, Any]) -> None:
        for name in ("model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq",
                     "model.rotary_emb_local.inv_freq", "model.layers.0.self_attn.q_proj.input_scale"):  # fmt: skip
            tensors[name] = tensor(np.ones(8, "<f4"))
        tensors["model.position_ids"] = tensor(np.arange(8, dtype="<i8"), "I64")

    assert notices(copy("qwen3", tmp_path, tensors=add)) == []


@pytest.mark.parametrize("suffix", ["self_attn.k_scale", "self_attn.attn.v_scale", "self_attn.kv_scale",
                                    "self_attn.k_proj.k_scale"])  # fmt: skip
def test_scales_of_a_quantised_cache_are_left_out_with_a_notice(suffix: str, tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.{suffix}" for layer in range(2)]
    scale = tensor(np.ones((), "<f4"))
    (said,) = notices(copy("qwen3", tmp_path, tensors=lambda t: t.update(dict.fromkeys(names, scale))))
    assert f"tensor {names[0]!r} and its like are scales of a quantised cache, which are not used" in said


# Settings of a quantisation that is not there


STALE: list[dict[str, Any]] = [
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    *({"quant_method": name, "bits": 4, "group_size": 32} for name in ("bitsandbytes", "gptq", "awq", "fp8", "hqq")),
    {"bits": 4, "group_size": 64},
]


@pytest.mark.parametrize("settings", STALE, ids=lambda settings: str(settings.get("quant_method")))
def test_plain_weights_that_are_said_to_be_quantised_are_taken(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = copy("qwen3", tmp_path, moved(quantization_config=settings))
    with closing(CheckpointSource(folder)) as source, closing(CheckpointSource(DATA / "qwen3")) as plain:
        for name, found in source.tensors.items():
            np.testing.assert_array_equal(found.rows(0, found.n_rows), plain.tensors[name].rows(0, found.n_rows))
    (said,) = notices(folder)
    assert said.startswith("config.json: the weights, said to be quantised (") and "are not" in said


def test_methods_that_are_not_known_are_refused_where_weights_are_packed(tmp_path: Path) -> None:
    for number, packed in enumerate((INTEGERS, tensor(np.zeros((4, 4), np.uint8), "F8_E4M3"))):
        change = moved(quantization_config={"quant_method": "eetq"})
        folder = copy("qwen3", tmp_path / str(number), change, lambda t, packed=packed: t.update(odd=packed))
        assert "the quantisation method 'eetq' is not supported (supported: fp8, " in refusal(folder)


# Files


def test_an_index_beside_the_single_file_counts_for_nothing(tmp_path: Path) -> None:
    folder = copy("qwen3", tmp_path)
    index = {"weight_map": {UP: "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert notices(folder) == []


def test_a_single_file_of_another_name_is_read(tmp_path: Path) -> None:
    folder = copy("qwen3", tmp_path)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    (folder / "adapter_model.safetensors").write_bytes(b"no model")
    (folder / "training_args.bin").write_bytes(b"x")
    assert notices(folder) == []
    (folder / "other.safetensors").write_bytes(b"x")
    assert "of several files it is not said which are meant: model.fp16.safetensors, other.s" in refusal(folder)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["adapter_model.safetensors"], "there is no model.safetensors, only an adapter (adapter_model.safetensors)"),
        (["weights.npz"], "there is no model.safetensors, only weights.npz, as early versions of MLX have it"),
        (["consolidated.safetensors"], "only a file with Mistral's own names of tensors, which are not known"),
        (["training_args.bin", "optimizer.pt"], "there is no model.safetensors"),
        (["pytorch_model.bin", "training_args.bin"], "only files of PyTorch, which can hold programs"),
        (["model-00001-of-00002.safetensors", "pytorch_model.bin"], "but no model.safetensors.index.json"),
    ],
)
def test_a_folder_without_the_model(names: list[str], message: str, tmp_path: Path) -> None:
    folder = copy("qwen3", tmp_path)
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(b"x")
    said = refusal(folder)
    assert message in said
    assert ("PyTorch" in said) == ("PyTorch" in message)


# Keys of config.json


def test_no_key_is_on_two_lists() -> None:
    lists = [READ, HARMLESS, frozenset(CHANGING)]
    assert sum(map(len, lists)) == len(frozenset().union(*lists))
    assert not (READ | frozenset(CHANGING)) & WINDOW_KEYS


def test_keys_that_are_not_known_are_named_in_one_notice(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "odd_rope": 2.0}
    changes = moved(odd_key=3, other_key=[1], off=False, nothing=None, zero=0.0, empty=[], rope_parameters=rope,
                    torch_dtype="float16", unsloth_version="1", embedding_multiplier=1.0)  # fmt: skip
    (said,) = notices(copy("qwen3", tmp_path, changes))
    assert said == "config.json: not known here, and left out: odd_key, other_key, rope_parameters.odd_rope"


def test_a_window_of_a_class_that_has_none_is_named(tmp_path: Path) -> None:
    """Transformers does not look at it either."""
    (said,) = notices(copy("llama", tmp_path / "used", moved(sliding_window=8)))
    assert said == "config.json: not known here, and left out: sliding_window"
    unused = moved(sliding_window=8, use_sliding_window=False, max_window_layers=28)
    assert notices(copy("llama", tmp_path / "unused", unused)) == []


def windows(folder: Path) -> list[int | None]:
    """Of the layers of the graph."""
    out = folder.with_suffix(".gguf")
    assert main.main(["convert", str(folder), str(out), "--type", "f32"]) == 0
    with Model.load(out, threads=1) as model:
        return [layer.window for layer in model.graph.cache_layers]


USED = {"use_sliding_window": True, "sliding_window": 8, "layer_types": None}


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("mistral", {"sliding_window": 8}, [8, 8]),
        ("mistral", {"sliding_window": None}, [None, None]),
        ("mistral", {"sliding_window": 128}, [None, None]),  # as long as the context
        ("qwen2", USED, [None, None]),  # the first 28 layers see everything
        ("qwen2", USED | {"max_window_layers": 1}, [None, 8]),
        ("qwen2", USED | {"layer_types": ["sliding_attention", "full_attention"]}, [8, None]),
        ("qwen2", {"sliding_window": 8, "max_window_layers": 0, "layer_types": None}, [None, None]),
        ("smollm3", USED, [None, None, None, 8]),
    ],
)  # fmt: skip
def test_which_layers_see_a_window(name: str, changes: Any, expected: list[int | None], tmp_path: Path) -> None:
    assert windows(copy(name, tmp_path, moved(**changes))) == expected


def test_a_window_that_is_not_mentioned_is_the_default_of_the_class(tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        del config["sliding_window"]
        config["max_position_embeddings"] = 8192

    assert windows(copy("mistral", tmp_path, change)) == [4096, 4096]


def test_a_window_without_a_flag_for_each_layer_is_ignored(tmp_path: Path) -> None:
    """As the reference engine does: there are files that say a window of models that never had one."""
    out = tmp_path / "model.gguf"
    window = "qwen2.attention.sliding_window=int:8"
    assert main.main(["convert", str(DATA / "qwen2"), str(out), "--type", "f32", "--override", window]) == 0
    with Model.load(out, threads=1) as model:
        assert [layer.window for layer in model.graph.cache_layers] == [None, None]


# The commands


def test_notices_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QRUN_CACHE", str(tmp_path / "cache"))
    folder = copy("qwen3", tmp_path, moved(odd_key=1))
    said = f"qrun: {folder / 'config.json'}: not known here, and left out: odd_key\n"
    assert main.main(["convert", str(folder), str(tmp_path / "model.gguf"), "--type", "f16"]) == 0
    assert capsys.readouterr().err.startswith(said)
    assert main.main(["info", str(folder)]) == 0
    assert said in capsys.readouterr().err
    assert main.main(["info", str(folder)]) == 0  # converted before
    assert said not in capsys.readouterr().err


def test_a_converted_model_reads_text_within_and_beyond_its_window(tmp_path: Path) -> None:
    """What is computed a token at a time is what is computed at once."""
    folder = copy("mistral", tmp_path, moved(sliding_window=8))
    out = folder.with_suffix(".gguf")
    assert main.main(["convert", str(folder), str(out), "--type", "f32"]) == 0
    with GGUFReader(out) as reader:
        assert list(reader.metadata["llama.attention.sliding_window_pattern"]) == [True, True]
    tokens = np.random.default_rng(1).integers(0, 400, 40).tolist()
    with Model.load(out, threads=1) as model, Model.load(out, threads=1, batch=1) as slow:
        np.testing.assert_array_equal(model.logits(tokens), slow.logits(tokens))
