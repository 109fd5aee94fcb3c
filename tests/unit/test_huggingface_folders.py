"""Folders of Hugging Face as sources: tensors, hyper-parameters, and what is refused."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from huggingface_folders import DATA, Edit, copy, edit, places, stored
from safetensors_builder import tensor

from qrun.cli import main
from qrun.formats import FormatError, GGUFReader, TensorType
from qrun.models.huggingface import CheckpointSource
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import Entries, Facts
from qrun.models.huggingface.general import model_name, size_entry
from qrun.models.huggingface.pooling import modules
from qrun.models.huggingface.rope import rope_entries, rope_factors
from qrun.models.huggingface.sentencepiece import read_sentencepiece
from qrun.models.huggingface.tensors import MappedTensor

# Tensors


def test_rows_of_queries_and_keys_change_places(rng: np.random.Generator) -> None:
    source = CheckpointSource(DATA / "llama")
    for letter, heads in (("q", 4), ("k", 2)):
        matrix = stored(DATA / "llama", f"model.layers.1.self_attn.{letter}_proj.weight")
        bias = stored(DATA / "llama", f"model.layers.1.self_attn.{letter}_proj.bias")
        found = source.tensors[f"blk.1.attn_{letter}.weight"]
        size = len(matrix) // heads
        # Row i and row i + size / 2 of a head, which turn together, come to lie side by side.
        order = [h * size + i + s * size // 2 for h in range(heads) for i in range(size // 2) for s in (0, 1)]
        np.testing.assert_array_equal(found.rows(0, len(matrix)), matrix[order])
        for start, end in rng.integers(0, len(matrix) + 1, (40, 2)):
            if start < end:
                np.testing.assert_array_equal(found.rows(start, end), matrix[order][start:end])
        np.testing.assert_array_equal(source.tensors[f"blk.1.attn_{letter}.bias"].rows(0, 1)[0], bias[order])
    source.close()


def test_what_is_copied_is_what_is_decoded(rng: np.random.Generator) -> None:
    source = CheckpointSource(DATA / "mixtral")
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.1.ffn_down_exps.weight", "blk.0.attn_norm.weight"):
        found = source.tensors[name]
        row_bytes = found.n_bytes // found.n_rows
        whole = found.raw(0, found.n_rows)
        codes = whole.view("<u2").astype(np.uint32) << 16 if found.type == TensorType.BF16 else whole.view("<u4")
        np.testing.assert_array_equal(codes.astype("<u4").view("<f4").reshape(found.n_rows, -1),
                                      found.rows(0, found.n_rows))  # fmt: skip
        start, end = sorted(rng.integers(0, found.n_rows + 1, 2))
        if start < end:
            np.testing.assert_array_equal(found.raw(start, end), whole[start * row_bytes : end * row_bytes])
    source.close()


@pytest.mark.parametrize("name", sorted(path.name for path in DATA.iterdir() if (path / "config.json").exists()))
def test_floats_as_they_are_stored_are_what_is_decoded(name: str, rng: np.random.Generator) -> None:
    """Also where rows change places or are put together, and nothing is stored as it has to be."""
    with closing(CheckpointSource(DATA / name)) as source:
        for found in source.tensors.values():
            start = int(rng.integers(found.n_rows))
            end = int(rng.integers(start, found.n_rows)) + 1
            floats = found.floats(start, end)
            if floats.dtype == np.uint16:
                floats = (floats.astype(np.uint32) << 16).view(np.float32)
            np.testing.assert_array_equal(floats.astype(np.float32), found.rows(start, end), found.name)


def test_experts_are_stacked_from_one_tensor_or_from_many(rng: np.random.Generator, tmp_path: Path) -> None:
    parts = CheckpointSource(DATA / "qwen3moe")

    def join(tensors: dict[str, Any]) -> None:
        for layer in range(2):
            prefix = f"model.layers.{layer}.mlp.experts."
            if f"{prefix}gate_up_proj" in tensors:
                return

            def take(which: str, expert: int, prefix: str = prefix) -> np.ndarray:
                _, shape, data = tensors.pop(f"{prefix}{expert}.{which}_proj.weight")
                return np.frombuffer(data, "<u2").reshape(shape)

            both = np.stack([np.concatenate([take("gate", e), take("up", e)]) for e in range(4)])
            tensors[f"{prefix}gate_up_proj"] = tensor(both, "BF16")
            tensors[f"{prefix}down_proj"] = tensor(np.stack([take("down", e) for e in range(4)]), "BF16")

    joined = CheckpointSource(copy("qwen3moe", tmp_path, tensors=join))
    assert joined.tensors["blk.1.ffn_up_exps.weight"].shape == (4, 24, 32)
    for name, found in joined.tensors.items():
        np.testing.assert_array_equal(found.rows(0, found.n_rows), parts.tensors[name].rows(0, found.n_rows))
        if found.n_rows > 30:
            np.testing.assert_array_equal(found.rows(20, 30), parts.tensors[name].rows(20, 30))
    parts.close()
    joined.close()


def test_a_head_that_is_the_embedding_is_left_out(tmp_path: Path) -> None:
    def add_head(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    source = CheckpointSource(copy("qwen3", tmp_path, tensors=add_head))
    assert "output.weight" not in source.tensors
    source.close()


def test_weights_of_eight_bits(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    scale = np.linspace(0.5, 2.0, 48, dtype=np.float32).reshape(48, 1)

    def pack(tensors: dict[str, Any]) -> None:
        codes = np.arange(48 * 32, dtype=np.uint16).reshape(48, 32) % 0x78
        tensors[name] = tensor(codes.astype(np.uint8), "F8_E4M3")
        tensors[f"{name}_scale"] = tensor(scale)

    settings = {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}}
    folder = copy("qwen3", tmp_path, lambda config: config.update(settings), pack)
    source = CheckpointSource(folder)
    rows = source.tensors["blk.0.ffn_up.weight"].rows(0, 48)
    assert rows[0, 8] == scale[0, 0] * 2.0**-6  # 0x08: the smallest normal number
    assert rows[47, 31] == scale[47, 0] * np.float32((1 + 7 / 8) * 2.0 ** ((1535 % 0x78 >> 3) - 7))
    source.close()


# Hyper-parameters


def rope_of(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    config = Config(Path("config.json"), {"max_position_embeddings": 4096} | values, {"rope_theta": 10000.0})
    entries = Entries()
    rope_entries(Facts(entries, "x", config, {}), plain=True)
    return entries.values, rope_factors(config, {"head": 16})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}},
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024,
                                 "rope_theta": 1e4, "beta_fast": 32, "beta_slow": 1.0}},
        ),
        (
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                                 "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                                 "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "rope_theta": 5e5,
                                 "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
        ),
    ],
)  # fmt: skip
def test_old_and_new_spellings_of_rope_mean_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    (before, factors_before), (after, factors_after) = rope_of(old), rope_of(new)
    assert before == after
    assert before["x.rope.freq_base"] == old.get("rope_theta", 10000.0)
    assert {name: list(values) for name, values in factors_before.items()} == {
        name: list(values) for name, values in factors_after.items()
    }


def test_the_factors_of_llama3() -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    _, factors = rope_of({"rope_parameters": rope})
    expected = []
    for pair in range(8):
        wavelength = 2 * np.pi * 10000.0 ** (2 * pair / 16)
        if wavelength < 64 / 4:
            expected.append(1.0)
        elif wavelength > 64:
            expected.append(8.0)
        else:
            smooth = (64 / wavelength - 1) / 3
            expected.append(1 / ((1 - smooth) / 8 + smooth))
    assert {1.0, 8.0} < set(expected)  # all three cases
    np.testing.assert_allclose(factors["rope_freqs.weight"], expected, rtol=1e-5)


def spelt_as_before_5(config: dict[str, Any]) -> None:
    """A configuration as Transformers 4 wrote it, which is how most checkpoints have it."""
    config["torch_dtype"] = config.pop("dtype", None)
    text = config.get("text_config", config)
    rope = text.pop("rope_parameters")
    if "full_attention" in rope:
        text["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            text[key] = rope.pop(key)
    text["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    kinds = text.pop("layer_types", [])
    if "sliding_attention" in kinds:
        text["sliding_window_pattern"] = kinds.index("full_attention") + 1
    if text["model_type"] == "qwen3_moe":
        text["num_experts"] = text.pop("num_local_experts")
    elif text["model_type"] == "smollm3":
        del text["no_rope_layers"]
    elif text["model_type"] == "phi3" and text["rope_scaling"]:
        del rope["original_max_position_embeddings"]


def describe_tokens_as_before_5(folder: Path) -> None:
    """Added tokens in tokenizer_config.json too, and special ones in a file of their own."""
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]

    def describe(config: dict[str, Any]) -> None:
        config["added_tokens_decoder"] = {str(token.pop("id")): token for token in added}
        special = {key: config.pop(key) for key in ("bos_token", "eos_token") if config.get(key)}
        (folder / "special_tokens_map.json").write_text(json.dumps(special))

    edit(folder / "tokenizer_config.json", describe)


@pytest.mark.parametrize("name", sorted(path.name for path in DATA.iterdir()))
def test_checkpoints_of_transformers_4_mean_the_same(name: str, tmp_path: Path) -> None:
    folder = copy(name, tmp_path, spelt_as_before_5)
    describe_tokens_as_before_5(folder)
    before, now = CheckpointSource(folder), CheckpointSource(DATA / name)
    assert dict(before.metadata) == dict(now.metadata)
    assert before.metadata_types == now.metadata_types
    assert before.tensors.keys() == now.tensors.keys()
    for factors in before.tensors.keys() & {"rope_freqs.weight", "rope_factors_long.weight"}:
        np.testing.assert_array_equal(before.tensors[factors].rows(0, 1), now.tensors[factors].rows(0, 1))
    before.close()
    now.close()


def test_windows_are_said_only_where_they_are_unusual(tmp_path: Path) -> None:
    key = "gemma3.attention.sliding_window_pattern"
    usual = CheckpointSource(DATA / "gemma3")
    assert key not in usual.metadata
    unusual = CheckpointSource(DATA / "gemma3-vision")
    assert list(unusual.metadata[key]) == [True, False]
    by_period = copy("gemma3", tmp_path, lambda c: (c.pop("layer_types"), c.update(sliding_window_pattern=2)))
    assert list(CheckpointSource(by_period).metadata[key]) == [True, False] * 3


def test_defaults_of_transformers_hold_where_a_file_says_nothing(tmp_path: Path) -> None:
    left_out = ("rms_norm_eps", "tie_word_embeddings", "query_pre_attn_scalar", "sliding_window")

    def change(config: dict[str, Any]) -> None:
        for key in left_out:
            config.pop(key, None)
        config["query_pre_attn_scalar"] = 16

    source = CheckpointSource(copy("gemma2", tmp_path, change))
    assert source.metadata["gemma2.attention.layer_norm_rms_epsilon"] == 1e-6
    assert source.metadata["gemma2.attention.sliding_window"] == 4096
    assert "output.weight" not in source.tensors
    source.close()


def test_names_and_sizes(tmp_path: Path) -> None:
    assert model_name(tmp_path / "models--org--Phi-3-mini" / "snapshots" / "0123abcd") == "Phi-3-mini"
    assert model_name(tmp_path / "TinyLlama") == "TinyLlama"
    shapes = {"a": (1000, 1000), "b": (500,)}
    tensors = [MappedTensor(name, TensorType.F32, shape, ()) for name, shape in shapes.items()]
    experts = MappedTensor("c", TensorType.F32, (8, 1000, 700), ())
    for held, n_experts, label in ((tensors, 0, "1.0M"), (tensors[1:], 0, "0.50K"), ([*tensors, experts], 8, "8x1.7M")):
        entries = Entries()
        size_entry(entries, held, n_experts)
        assert entries.values["general.size_label"] == label


def test_general_metadata(tmp_path: Path) -> None:
    folder = copy("qwen3", tmp_path)
    (folder / "README.md").write_text("---\nlibrary_name: transformers\nlicense: apache-2.0\n---\n# A model\n")
    metadata = CheckpointSource(folder).metadata
    assert metadata["general.license"] == "apache-2.0"
    assert metadata["general.sampling.temp"] == pytest.approx(0.7)
    assert metadata["general.sampling.top_k"] == 20
    assert metadata["general.file_type"] == 32


# What is refused


def moved(key: str, value: Any) -> Edit:
    return lambda config: config.update({key: value})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", lambda c: c.pop("architectures"), '"architectures" is missing'),
        ("llama", moved("architectures", ["XLNetLMHeadModel"]), "architecture 'XLNetLMHeadModel' is not supported"),
        ("llama", lambda c: c.pop("hidden_size"), "hidden_size is missing"),
        ("llama", moved("hidden_size", "32"), "hidden_size is not a whole number: '32'"),
        ("llama", moved("num_hidden_layers", 10**9), "num_hidden_layers is 1000000000, expected 1 to"),
        ("llama", moved("num_key_value_heads", 3), "num_key_value_heads is 3, which does not divide 4"),
        ("llama", moved("rms_norm_eps", -1), "rms_norm_eps is -1"),
        ("llama", moved("rms_norm_eps", float("nan")), "rms_norm_eps is nan"),
        ("llama", moved("hidden_act", "relu2"), "hidden_act is 'relu2'"),
        ("llama", moved("head_dim", 15), "head_dim is 15, expected an even number"),
        ("llama", moved("quantization_config", {"quant_method": "bitnet"}), "'bitnet' is not supported"),
        ("llama", moved("quantization_config", 4), "quantization_config is not an object"),
        ("llama", moved("rope_parameters", {"rope_type": "odd", "rope_theta": 1e4}), "rope_type is 'odd'"),
        ("llama", moved("rope_parameters", {"rope_type": "longrope"}), "rope_type is 'longrope'"),
        ("llama", moved("rope_parameters", {"rope_type": "llama3", "rope_theta": 1}), "rope_theta is 1, expected more"),
        ("gemma3", moved("rope_parameters", {"full_attention": {}, "sliding_attention": {"rope_theta": "x"}}),
         "sliding_attention.rope_theta is not a number: 'x'"),
        ("llama", moved("rope_parameters", []), None),
        ("llama", moved("rope_parameters", [1]), "rope_parameters is not an object"),
        ("qwen2", moved("rope_parameters", {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}), "only 32 is"),
        ("qwen2", moved("rope_parameters", {"rope_type": "yarn", "factor": 4.0, "mscale": 1}), "mscale is given"),
        ("qwen2", moved("rope_parameters", {"rope_type": "yarn", "factor": 4.0, "attention_factor": np.nan}), "nan"),
        ("qwen3moe", moved("norm_topk_prob", False), "norm_topk_prob is not true"),
        ("qwen3moe", moved("mlp_only_layers", [0]), "mlp_only_layers names layers without experts"),
        ("qwen3moe", moved("num_experts_per_tok", 5), "num_experts_per_tok is 5, expected 1 to 4"),
        ("gemma2", moved("query_pre_attn_scalar", 24), "query_pre_attn_scalar is 24"),
        ("gemma3", moved("layer_types", ["sliding_attention"]), "layer_types is not a list of 6 kinds"),
        ("gemma3", moved("rope_parameters", {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {
            "rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}), "sliding_attention.rope_type is 'linear'"),
        ("qwen2", moved("layer_types", ["sliding_attention", "full_attention"]), "is not what sliding_window and use_"),
        ("qwen2", moved("layer_types", ["linear_attention", "full_attention"]), "has 'linear_attention', which is not"),
        ("qwen2", moved("partial_rotary_factor", 0.5), "partial_rotary_factor is not 1, which is not supported"),
        ("mistral", moved("sliding_window", -1), "sliding_window is -1, expected 0 to"),
        ("llama", moved("embedding_multiplier", 12.0), "embedding_multiplier is 12.0, which models of the arch"),
        ("qwen3", moved("final_logit_softcapping", 30.0), "final_logit_softcapping is 30.0, which models of the arch"),
        ("gemma3", moved("use_bidirectional_attention", True), "use_bidirectional_attention is true"),
        ("phi-longrope", lambda c: c["rope_parameters"].pop("long_factor"), "long_factor is not a list of 6 numbers"),
        ("smollm3", moved("no_rope_layers", [0, 1, 1, 1]), "no_rope_layers is not every layer but each 4th"),
    ],
)
def test_a_configuration_that_is_wrong(name: str, change: Edit, message: str | None, tmp_path: Path) -> None:
    folder = copy(name, tmp_path, change)
    if message is None:
        CheckpointSource(folder).close()
        return
    with pytest.raises(FormatError) as caught:
        CheckpointSource(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{folder / 'config.json'}: ")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "'model.layers.1.mlp.up_proj.weight' is miss"),
        ("llama", lambda t: t.pop("lm_head.weight"), "tensor 'lm_head.weight' is missing"),
        ("llama", lambda t: t.update(odd=tensor(np.zeros(3, "<f4"))), "tensor 'odd' is not known in models of the"),
        ("llama", lambda t: t.update({"model.norm.weight": tensor(np.zeros(3, "<f4"))}), "shape (3,), expected (32,)"),
        ("llama", lambda t: t.update({"norm.weight": t["model.norm.weight"]}), "are the same tensor"),
        ("mixtral", lambda t: t.pop("model.layers.0.block_sparse_moe.experts.2.w3.weight"), "experts.2.w3.weight' is "),
    ],
)  # fmt: skip
def test_tensors_that_are_wrong(name: str, change: Edit, message: str, tmp_path: Path) -> None:
    folder = copy(name, tmp_path, tensors=change)
    with pytest.raises(FormatError) as caught:
        CheckpointSource(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(folder))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
@pytest.mark.parametrize(
    ("folder", "name"),
    [("qwen3", "config.json"), ("qwen3", "model.safetensors"), ("mistral", "tokenizer.model"),
     ("qwen3", "chat_template.jinja")],
)  # fmt: skip
def test_a_pipe_is_not_waited_for(folder: str, name: str, tmp_path: Path) -> None:
    path = copy(folder, tmp_path) / name
    path.unlink()
    os.mkfifo(path)
    if name == "chat_template.jinja":  # as good as none
        CheckpointSource(path.parent).close()
        return
    with pytest.raises(FormatError, match=r"not a regular file|there is no"):
        if name == "tokenizer.model":
            read_sentencepiece(path)
        CheckpointSource(path.parent)


def test_a_file_of_a_checkpoint_is_not_the_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    path = DATA / "qwen3" / "model.safetensors"
    assert main.main(["info", str(path)]) == 1
    assert "it is a safetensors file: name the folder in which it lies" in capsys.readouterr().err


STRANGE = (None, True, -1, 0, 1.5, 1 << 70, float("nan"), "", "x", "\ud800", [], [1], {}, {"a": []}, [[]], "Infinity")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["gemma3-vision", "llama", "mixtral", "phi-longrope", "qwen3moe"])
def test_strange_values_anywhere_are_refused_or_do_no_harm(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    folder = copy(name, tmp_path)
    random = Random(int(rng.integers(1 << 31)))
    refused = 0
    for file in ("config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"):
        path = folder / file
        if not path.is_file():
            continue
        text = path.read_text()
        for _ in range(40):
            values = json.loads(text)
            holder, key = random.choice([place for place in places(values) if not str(place[1]).isdecimal()])
            holder[key] = random.choice(STRANGE)
            path.write_text(json.dumps(values))
            try:
                with closing(CheckpointSource(folder)) as source:
                    source.writer(tmp_path / "model.gguf")  # has encoded what it would write
            except FormatError as error:
                assert str(error).startswith(str(folder)) and "\n" not in str(error)
                refused += 1
        path.write_text(text)
    assert refused > 10


def test_a_missing_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["convert", str(tmp_path), "--type", "q8_0"]) == 1
    assert capsys.readouterr().err == f"qrun: {tmp_path}: is a folder, and no checkpoint: it has no config.json\n"


# The command


def test_a_folder_is_converted_into_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy("qwen3", tmp_path)
    assert main.main(["convert", str(folder), "--type", "q8_0"]) == 0
    out = folder / "qwen3-Q8_0.gguf"
    assert str(out) in capsys.readouterr().out
    with GGUFReader(out) as reader:
        assert reader.metadata["general.name"] == "qwen3"
        assert reader.metadata["general.file_type"] == 7
        assert reader.tensors["blk.0.attn_q.weight"].type == TensorType.Q8_0
        assert reader.tensors["blk.0.attn_q_norm.weight"].type == TensorType.F32


def test_no_file_of_the_folder_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy("qwen3", tmp_path)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert main.main(["convert", str(folder), str(folder / name), "--type", "q8_0"]) == 1
        assert "the source itself" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_weights_that_are_no_numbers_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.1.mlp.down_proj.weight"

    def poison(tensors: dict[str, Any]) -> None:
        dtype, shape, data = tensors[name]
        tensors[name] = dtype, shape, data[:10] + b"\xc0\x7f" + data[12:]

    folder = copy("qwen3", tmp_path, tensors=poison)
    assert main.main(["convert", str(folder), "--type", "q4_0"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"tensor '{name}' has weights that are not finite" in error and "model.safetensors" in error
    assert not list(folder.glob("*.gguf*"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deeply"), ("[" * 70 + "]" * 70, "nested too deeply"), ("[", "not JSON"),
        ("{}", "not a list of modules"), (b"\xff", "not UTF-8"),
        *((f'[{{"type": "Dense", "path": "{path}"}}]', "no path within the folder")
          for path in ("", "/tmp", "../x", "a\\nb", "a\\u0000")),
    ],
)  # fmt: skip
def test_wrong_lists_of_modules_are_told(text: str | bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FormatError, match=f"modules.json: .*{said}"):
        list(modules(tmp_path, "Dense"))
