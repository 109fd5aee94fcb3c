"""Every class of checkpoints that can be converted: tensors and metadata are those of llama.cpp's converter.

The checkpoints are tiny, and made of what tests/data/classes.json says of them (tests/data/make_classes.py made it).
"""

from __future__ import annotations

import json
import re
import shutil
import tracemalloc
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from checkpoint_weights import CLASSES, DATA, bfloat16, digest, write_checkpoint
from huggingface_folders import places

from qrun.engine.text.tokenizer import Tokenizer
from qrun.formats import FormatError, GGUFReader, ValueType
from qrun.models import ARCHITECTURES as RUNNABLE
from qrun.models import build_graph
from qrun.models.huggingface import CheckpointSource
from qrun.models.huggingface.architectures import ARCHITECTURES
from qrun.models.huggingface.changes import upright
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.layout import Sizes
from qrun.models.huggingface.other_classes import OTHER_CLASSES
from qrun.models.huggingface.tensors import ConstantTensor

N_STRANGE = 6  # configurations of each class
# Where the converter takes no notice of what config.json says, and this one does.
OTHERWISE = {
    ("GlmForCausalLM", "chatglm.context_length"): 128,
    ("GlmForCausalLM", "chatglm.attention.layer_norm_rms_epsilon"): 1.5625e-07,
    ("SolarOpenForCausalLM", "glm4moe.rope.dimension_count"): 16,  # its class in Transformers turns all, if not told
}
# What is said here beside what the converter says: what engines take where a file says nothing, or would take anyway.
BESIDE = (
    "attention.key_length", "attention.value_length", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "rope.freq_base", "expert_gating_func", "expert_weights_norm", "attention.layer_norm_epsilon",
    "attention.sliding_window_pattern",
)  # fmt: skip


def equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        return found is not None and list(found) == expected
    if isinstance(expected, float):
        return found is not None and np.float32(found) == np.float32(expected)
    return bool(found == expected)


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_becomes_what_the_converter_makes_of_it(name: str, tmp_path: Path) -> None:
    case = CLASSES[name]
    folder = write_checkpoint(tmp_path / "model", case["config"], case["shapes"], case.get("dtypes"))
    with closing(CheckpointSource(folder, keep=True)) as source:
        tensors = {
            key: [tensor.type.name, list(tensor.shape), digest(key, tensor.raw(0, tensor.n_rows))]
            for key, tensor in source.tensors.items()
        }
        assert tensors == case["tensors"]
        for tensor in source.tensors.values():  # also where only some of the rows are wanted
            middle = tensor.n_rows // 2
            whole = tensor.rows(0, tensor.n_rows)
            np.testing.assert_array_equal(tensor.rows(middle, tensor.n_rows), whole[middle:])
        for key, expected in case["metadata"].items():
            found = source.metadata.get(key)
            if (name, key) in OTHERWISE:
                assert not equal(found, expected)
                expected = OTHERWISE[name, key]
            assert equal(found, expected), f"{key} is {found}, expected {expected}"
        prefix = f"{case['metadata']['general.architecture']}."
        beside = {key.removeprefix(prefix) for key in source.metadata if key.startswith(prefix)}
        also = {"logit_scale"} if prefix == "t5." else set()  # without which engines give logits of another size
        assert beside - {key.removeprefix(prefix) for key in case["metadata"]} <= set(BESIDE) | also
        unknown = [notice for notice in source.notices if "not known here" in notice]
        assert not unknown


@pytest.mark.parametrize("name", [name for name in CLASSES if ARCHITECTURES[name].name in RUNNABLE])
def test_what_a_class_becomes_can_be_loaded(name: str, tmp_path: Path) -> None:
    """Shapes are those that the engine looks for, and no hyper-parameter that it needs is missing."""
    case = CLASSES[name]
    path = tmp_path / "model.gguf"
    folder = write_checkpoint(tmp_path / "model", case["config"], case["shapes"], case.get("dtypes"))
    with closing(CheckpointSource(folder, keep=True)) as source:
        if source.metadata["general.architecture"] not in RUNNABLE:  # a variant
            return
        with source.writer(path) as writer:
            for key, tensor in source.tensors.items():
                writer.add_tensor(key, tensor.type, tensor.shape)
            for key, tensor in source.tensors.items():
                writer.write_tensor(key, tensor.raw(0, tensor.n_rows))
    with GGUFReader(path) as reader:
        assert build_graph(reader).n_vocab == len(source.metadata["tokenizer.ggml.tokens"])


STRANGE = (None, True, -1, 0, 1, 3, 1.5, 1 << 70, float("nan"), "", "x", [], [1], [-1, "x"], {}, {"a": []}, [[]])


def read_all(folder: Path) -> None:
    """What a conversion does, or the one line with which it ends."""
    try:
        with closing(CheckpointSource(folder)) as source:
            for tensor in source.tensors.values():
                tensor.raw(0, tensor.n_rows)
    except FormatError as error:
        assert str(error).startswith(str(folder)) and "\n" not in str(error)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", CLASSES)
def test_strange_configurations_are_refused_or_do_no_harm(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    case = CLASSES[name]
    folder = write_checkpoint(tmp_path / "model", case["config"], case["shapes"], case.get("dtypes"))
    random = Random(int(rng.integers(1 << 31)))
    for _ in range(N_STRANGE):
        config = json.loads(json.dumps(case["config"]))
        holder, key = random.choice([place for place in places(config) if place[1] != "architectures"])
        holder[key] = random.choice(STRANGE)
        (folder / "config.json").write_text(json.dumps(config))
        read_all(folder)


@pytest.mark.parametrize("name", CLASSES)
def test_a_tensor_that_is_missing_or_has_another_shape_is_refused(
    name: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    case = CLASSES[name]
    random = Random(int(rng.integers(1 << 31)))
    for _ in range(3):
        shapes = dict(case["shapes"])
        key = random.choice([key for key in shapes if shapes[key] != [2]])
        if random.random() < 0.5:
            del shapes[key]
        else:
            shapes[key] = random.choice([[1], [7, 3], [*shapes[key], 1], [size + 1 for size in shapes[key]]])
        read_all(write_checkpoint(tmp_path / "model", case["config"], shapes, case.get("dtypes")))


_RELATIVE = "SelfAttention.relative_attention_bias.weight"


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("T5ForConditionalGeneration", f"encoder.block.0.layer.0.{_RELATIVE}"),
        ("T5ForConditionalGeneration", f"decoder.block.0.layer.0.{_RELATIVE}"),
        ("T5EncoderModel", f"encoder.block.0.layer.0.{_RELATIVE}"),
        ("UMT5ForConditionalGeneration", f"encoder.block.1.layer.0.{_RELATIVE}"),
        ("UMT5ForConditionalGeneration", f"decoder.block.1.layer.0.{_RELATIVE}"),
        ("RWKV7ForCausalLM", "model.layers.0.attn_norm.bias"),
        ("RWKV7ForCausalLM", "model.layers.1.ffn_norm.bias"),
        ("RWKV7ForCausalLM", "model.layers.1.attn.g_norm.bias"),
        ("RWKV7ForCausalLM", "model.layers.0.pre_norm.bias"),
        ("RWKV7ForCausalLM", "model.norm.bias"),
        ("Rwkv6ForCausalLM", "rwkv.blocks.2.ln1.bias"),
        ("Rwkv6ForCausalLM", "rwkv.blocks.0.attention.ln_x.bias"),
        ("Rwkv6ForCausalLM", "rwkv.ln_out.bias"),
    ],
)
def test_what_engines_look_for_must_be_there(name: str, tensor: str, tmp_path: Path) -> None:
    shapes = {key: shape for key, shape in CLASSES[name]["shapes"].items() if key != tensor}
    assert len(shapes) == len(CLASSES[name]["shapes"]) - 1
    folder = write_checkpoint(tmp_path / "model", CLASSES[name]["config"], shapes)
    with pytest.raises(FormatError, match=f"{re.escape(tensor.removeprefix('rwkv.'))}' is missing"):
        CheckpointSource(folder)


@pytest.mark.parametrize(
    ("name", "tensor", "shape", "reason"),
    [
        ("RWKV7ForCausalLM", "model.layers.0.attn.w_lora.lora.2.weight", [32, 9], "expected (32, 8)"),
        ("RWKV7ForCausalLM", "model.layers.1.attn.v_lora.lora.2.weight", [32, 5], "expected (32, 4)"),
        ("RWKV7ForCausalLM", "model.layers.1.attn.g_lora.lora.0.weight", [21, 32], "expected (20, 32)"),
        ("RWKV7ForCausalLM", "model.layers.0.attn.a_lora.lora.0.weight", [12], "expected (12, 32)"),
        ("RWKV7ForCausalLM", "model.layers.1.attn.r_k", [4, 8], "expected (2, 16)"),
        ("Rwkv6ForCausalLM", "rwkv.blocks.2.attention.time_maa_w1", [64, 161], "expected (64, 160)"),
        ("Rwkv6ForCausalLM", "rwkv.blocks.1.attention.time_maa_w2", [5, 31, 64], "expected (5, 32, 64)"),
        ("Rwkv6ForCausalLM", "rwkv.blocks.1.attention.time_decay_w1", [64, 32], "expected (64, 64)"),
        ("Rwkv6ForCausalLM", "rwkv.blocks.0.attention.time_faaaa", [8, 8], "expected (4, 16)"),
    ],
)
def test_tensors_that_go_together_have_shapes_that_do(
    name: str, tensor: str, shape: list[int], reason: str, tmp_path: Path
) -> None:
    case = CLASSES[name]
    assert tensor in case["shapes"]
    folder = write_checkpoint(tmp_path / "model", case["config"], case["shapes"] | {tensor: shape})
    with pytest.raises(FormatError, match=re.escape(reason)) as caught:
        CheckpointSource(folder)
    assert tensor in str(caught.value)


def test_constants_of_hashes_are_wide(tmp_path: Path) -> None:
    """Engines take no other type, and multipliers have 45 bits."""
    case, key = CLASSES["Qwen4ExpForCausalLM"], "qwen4exp.ple.layer_multipliers"
    folder = write_checkpoint(tmp_path / "model", case["config"], case["shapes"], case["dtypes"])
    with closing(CheckpointSource(folder)) as source:
        assert source.metadata_types[key] == (ValueType.ARRAY, ValueType.UINT64)
        source.writer(tmp_path / "model.gguf").close()
    with GGUFReader(tmp_path / "model.gguf") as reader:
        assert reader.metadata[key].dtype == np.uint64 and list(reader.metadata[key]) == case["metadata"][key]


@pytest.mark.parametrize("name", ["NemotronHForCausalLM", "NemotronHPuzzleForCausalLM"])
def test_experts_are_of_one_shape(name: str, tmp_path: Path) -> None:
    case = CLASSES[name]
    tensor = next(key for key in case["shapes"] if ".2.mixer.experts.3.up_proj" in key)
    shapes = case["shapes"] | {tensor: [case["shapes"][tensor][0], 8]}
    folder = write_checkpoint(tmp_path / "model", case["config"], shapes)
    with pytest.raises(FormatError, match=r"experts\.3\.up_proj\.weight' has shape .*experts\.0\.up_proj"):
        CheckpointSource(folder)


@pytest.mark.parametrize(
    ("name", "embedding", "head"),
    [
        ("RWKV7ForCausalLM", "model.embeddings.weight", "lm_head.weight"),
        ("Rwkv6ForCausalLM", "rwkv.embeddings.weight", "head.weight"),
    ],
)
def test_a_head_that_is_the_embedding_is_written_where_engines_want_one(
    name: str, embedding: str, head: str, tmp_path: Path
) -> None:
    case = CLASSES[name]
    for number, missing in enumerate((head, embedding)):  # the one matrix may go by either name
        shapes = {key: shape for key, shape in case["shapes"].items() if key != missing}
        config = case["config"] | {"tie_word_embeddings": True}
        with closing(CheckpointSource(write_checkpoint(tmp_path / str(number), config, shapes))) as source:
            both = [source.tensors[key] for key in ("token_embd.weight", "output.weight")]
            assert both[0].shape == both[1].shape == tuple(case["shapes"][head])
            np.testing.assert_array_equal(both[0].rows(0, 333), both[1].rows(0, 333))


@pytest.mark.parametrize(("name", "key"), [("RWKV7ForCausalLM", "head_dim"), ("Rwkv6ForCausalLM", "head_size")])
def test_heads_that_do_not_make_a_row_are_refused(name: str, key: str, tmp_path: Path) -> None:
    case = CLASSES[name]
    folder = write_checkpoint(tmp_path / "model", case["config"] | {key: 12}, case["shapes"])
    with pytest.raises(FormatError, match=f"{key} is 12, which does not divide the hidden_size"):
        CheckpointSource(folder)


DIGITS = "9" * 5000  # more than Python makes a number of


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("DeepseekV3ForCausalLM", f"model.layers.{DIGITS}.x", "is not known"),
        ("Glm4MoeForCausalLM", f"model.layers.{DIGITS}.x", "is not known"),
        ("Qwen3_5ForCausalLM", f"mtp.layers.{DIGITS}.x", "is not known"),
        ("Qwen3_5ForCausalLM", "mtp.", "is not known"),
    ],
)
def test_a_tensor_of_any_name_is_refused(name: str, tensor: str, reason: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", CLASSES[name]["config"], CLASSES[name]["shapes"] | {tensor: [2]})
    with pytest.raises(FormatError) as caught:
        CheckpointSource(folder)
    assert reason in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("layer", [DIGITS, "\u0664", "5"])
@pytest.mark.parametrize("value", [1 << 70, -1, "x"])
def test_what_is_said_of_single_layers_is_checked(layer: str, value: Any, tmp_path: Path) -> None:
    case = CLASSES["Gemma4ForConditionalGeneration"]
    single = {layer: {"head_dim": value, "num_key_value_heads": value}}
    config = case["config"]["text_config"] | {"per_layer_config": single, "global_head_dim": None}
    write_checkpoint(tmp_path / "model", case["config"] | {"text_config": config}, case["shapes"])
    read_all(tmp_path / "model")


def test_a_vocabulary_larger_than_its_embedding_takes_no_memory(tmp_path: Path) -> None:
    case = CLASSES["Qwen3ForCausalLM"]
    folder = write_checkpoint(tmp_path / "model", case["config"] | {"vocab_size": 1 << 24}, case["shapes"])
    tracemalloc.start()
    with pytest.raises(FormatError, match=r"embed_tokens\.weight' has shape"):
        CheckpointSource(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 24


def test_square_matrices_stand_upright(tmp_path: Path) -> None:
    """Plain experts of gpt-oss have columns first, and packed ones do not: of square ones only that tells."""
    case = CLASSES["GptOssForCausalLM"]
    sizes = Sizes(Config(tmp_path, {}), {"embd": 3, "expert_ff": 3})
    values = np.arange(18, dtype=np.float32).reshape(2, 3, 3)
    packed = ConstantTensor.of("model.layers.0.mlp.experts.down_proj", values, sizes.config)
    np.testing.assert_array_equal(upright("embd", "expert_ff")(packed, sizes).rows(0, 6), values.reshape(6, 3))
    shapes = {key: [32 if size in (48, 96) and "bias" not in key else size for size in shape]
              for key, shape in case["shapes"].items()}  # fmt: skip
    shapes = {key: [4, 32, 64] if key.endswith("gate_up_proj") else shape for key, shape in shapes.items()}
    shapes |= {key: [4, 64] for key in shapes if key.endswith("gate_up_proj_bias")}
    folder = write_checkpoint(tmp_path / "model", case["config"] | {"intermediate_size": 32}, shapes)
    with closing(CheckpointSource(folder)) as source:
        name = "model.layers.1.mlp.experts.down_proj"
        stored = (bfloat16(name, [4, 32, 32]).astype(np.uint32) << 16).view(np.float32)
        found = source.tensors["blk.1.ffn_down_exps.weight"].rows(0, 128)
        np.testing.assert_array_equal(found.reshape(4, 32, 32), stored.swapaxes(1, 2))


def test_all_classes_are_tested() -> None:
    """Themselves, or another one with the same entry."""
    tested = [ARCHITECTURES[name] for name in CLASSES]
    assert [name for name, architecture in ARCHITECTURES.items() if architecture not in tested] == []


def test_the_tokens_of_gemma_4(tmp_path: Path) -> None:
    """They merge in the order of a list, and those that stand around parts of an answer are text."""
    case, gemma = CLASSES["Gemma4ForConditionalGeneration"], DATA / "huggingface" / "gemma3-vision"
    folder = write_checkpoint(tmp_path / "model", case["config"], case["shapes"])
    tokenizer = json.loads((gemma / "tokenizer.json").read_text())
    n_vocab = 440
    for id, content in ((431, "<|channel>"), (432, "<|turn>")):
        tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": id, "content": content, "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(gemma / "tokenizer_config.json", folder)
    config = case["config"] | {"text_config": case["config"]["text_config"] | {"vocab_size": n_vocab}}
    shapes = {key: [n_vocab, *shape[1:]] if "embed_tokens.w" in key else shape for key, shape in case["shapes"].items()}
    write_checkpoint(folder, config, shapes, tokenizer=False)
    with closing(CheckpointSource(folder)) as source:
        assert source.metadata["tokenizer.ggml.model"] == "gemma4"
        assert source.metadata["tokenizer.ggml.merges"]
        assert "tokenizer.ggml.pre" not in source.metadata
        types = source.metadata["tokenizer.ggml.token_type"]
        assert (types[431], types[432], types[2]) == (4, 3, 3)
        source.writer(tmp_path / "vocabulary.gguf").close()
    with GGUFReader(tmp_path / "vocabulary.gguf") as reader:
        engine = Tokenizer.load(reader)
        for expected in json.loads((gemma / "texts.json").read_text()):
            assert engine.encode(expected["text"], parse_special=True) == expected["ids"], expected["text"]


def test_the_page_names_all_classes() -> None:
    page = (DATA.parent.parent / "docs" / "checkpoints.md").read_text()
    assert [name for name in ARCHITECTURES if f"`{name}`" not in page] == []
    assert f"the {len(ARCHITECTURES)} classes below" in " ".join(page.split())


def test_an_unknown_class_is_named(tmp_path: Path) -> None:
    case = CLASSES["Qwen3ForCausalLM"]
    folder = write_checkpoint(tmp_path / "model", case["config"] | {"architectures": ["OddForCausalLM"]}, {})
    with pytest.raises(FormatError, match="architecture 'OddForCausalLM' is not supported") as caught:
        CheckpointSource(folder)
    assert str(caught.value).endswith(f"({len(ARCHITECTURES)} others are)") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("Qwen3NextForCasualLM", "(much like it: Qwen3NextForCausalLM)"),
        ("Eagle3LlamaForCausalLM", "it is a drafter, which goes beside a model"),
        ("Gemma4AssistantForCausalLM", "it is a drafter, which goes beside a model"),
        ("DeepseekV4DSparkModel", "it is a drafter, which goes beside a model"),
        ("OpenJevModel", "it is a model that chooses among options, and writes no text"),
        ("ModernBertDecisionModel", "it is a model that chooses among options, and writes no text"),
        ("ChameleonForConditionalGeneration", "it is a model that writes images as well as text"),
        ("GraniteSwitchForCausalLM", "it is a model that changes its adapters from token to token"),
        ("UltravoxModel", "the text is written by a model that lies in a folder of its own"),
        ("Qwen3TTSForConditionalGeneration", "it is a model of audio"),
        ("WhisperForConditionalGeneration", "it is a model of audio"),
        ("SiglipVisionModel", "it is a model of images"),
        ("BertForTokenClassification", "it is a model that labels tokens or finds answers in a text, and writes none"),
    ],
)
def test_what_is_no_language_model_is_said_to_be_something_else(name: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [name]}))
    with pytest.raises(FormatError) as caught:
        CheckpointSource(tmp_path)
    start = f"{tmp_path / 'config.json'}: architecture {name!r} is not supported"
    assert str(caught.value).startswith(start) and str(caught.value).endswith(problem)


def test_what_can_be_converted_is_not_said_to_be_something_else() -> None:
    said = [name for name in ARCHITECTURES for parts in OTHER_CLASSES.values() if any(part in name for part in parts)]
    assert said == []
