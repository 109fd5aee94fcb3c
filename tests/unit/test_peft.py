"""PEFT adapters as GGUF files: what becomes of names, rows and scales, against plain NumPy; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import read_pairs
from checkpoint_weights import CLASSES, stored, write_checkpoint
from safetensors_builder import tensor, write

from qrun.cli import main
from qrun.formats import FormatError, GGUFReader, GGUFWriter, TensorType, ValueType
from qrun.models.adapter import Lora, open_adapters
from qrun.models.huggingface import CheckpointSource
from qrun.models.huggingface.architectures import ARCHITECTURES
from qrun.models.huggingface.peft import Base, PeftSource
from qrun.models.huggingface.tensors import short_name

N_LAYERS, EMBD, HEADS, KV_HEADS, HEAD, FF, N_VOCAB, EXPERTS = 2, 48, 6, 2, 8, 40, 90, 3
Array = np.ndarray

ATTENTION = {
    "self_attn.q_proj": ("attn_q", (HEADS * HEAD, EMBD)),
    "self_attn.k_proj": ("attn_k", (KV_HEADS * HEAD, EMBD)),
    "self_attn.v_proj": ("attn_v", (KV_HEADS * HEAD, EMBD)),
    "self_attn.o_proj": ("attn_output", (EMBD, HEADS * HEAD)),
}
FEED_FORWARD = {
    "mlp.gate_proj": ("ffn_gate", (FF, EMBD)),
    "mlp.up_proj": ("ffn_up", (FF, EMBD)),
    "mlp.down_proj": ("ffn_down", (EMBD, FF)),
}
JOINED = {
    "self_attn.qkv_proj": ("attn_qkv", ((HEADS + 2 * KV_HEADS) * HEAD, EMBD)),
    "self_attn.o_proj": ("attn_output", (EMBD, HEADS * HEAD)),
    "mlp.gate_up_proj": ("ffn_up", (2 * FF, EMBD)),
    "mlp.down_proj": ("ffn_down", (EMBD, FF)),
}
DTYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16"}  # brain floats are given by their bits
# Files of these have the pairs that rope turns side by side.
PERMUTED = {"llama", "smollm3"}


def modules_of(class_name: str) -> dict[str, tuple[str, tuple[int, int]]]:
    """The dense matrices of a layer: module -> (name in GGUF, shape)."""
    if class_name.startswith("Phi3"):
        return JOINED
    return ATTENTION if class_name in ("MixtralForCausalLM", "Qwen3MoeForCausalLM") else ATTENTION | FEED_FORWARD


def write_config(folder: Path, class_name: str = "LlamaForCausalLM") -> Path:
    folder.mkdir(exist_ok=True)
    config = {
        "architectures": [class_name], "hidden_size": EMBD, "num_attention_heads": HEADS, "head_dim": HEAD,
        "num_key_value_heads": KV_HEADS, "num_hidden_layers": N_LAYERS, "intermediate_size": FF,
        "vocab_size": N_VOCAB, "num_local_experts": EXPERTS, "num_experts": EXPERTS, "moe_intermediate_size": FF,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_peft(
    folder: Path, pairs: Mapping[str, tuple[Array, Array]], extra: Mapping[str, Array] | None = None, **config: Any
) -> Path:
    """The folder as PEFT saves it. pairs: module (below "model.", or lm_head) -> A and B."""
    folder.mkdir(exist_ok=True)
    tensors = dict(extra or {})
    for module, (a, b) in pairs.items():
        prefix = "base_model.model." + ("" if module == "lm_head" else "model.") + module
        end = "lora_embedding_{}" if module == "embed_tokens" else "lora_{}.weight"
        tensors |= {f"{prefix}.{end.format('A')}": a, f"{prefix}.{end.format('B')}": b}
    stored = {name: tensor(values, DTYPES[values.dtype.name]) for name, values in tensors.items()}
    write(folder / "adapter_model.safetensors", stored)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16} | config))
    return folder


def pair_of(rng: np.random.Generator, shape: tuple[int, int], rank: int) -> tuple[Array, Array]:
    rows, columns = shape
    return rng.normal(size=(rank, columns)).astype(np.float32), rng.normal(size=(rows, rank)).astype(np.float32)


def side_by_side(matrix: Array, heads: int) -> Array:
    """Rows i and i + n/2 of each head of n rows, put next to each other: as GGUF files of llama have them."""
    rows, columns = matrix.shape
    return matrix.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def converted(source: Path, out: Path, *options: str) -> dict[str, Array]:
    """What each matrix is changed by, as an engine computes it: alpha / rank * B A."""
    assert main.main(["convert", "--lora", str(source), str(out), *options]) == 0
    pairs, alpha = read_pairs(out)
    assert alpha
    changes = {}
    for name, (a, b) in pairs.items():
        rank = b.shape[-1]
        changes[name] = alpha / rank * (a @ b.T if name == "token_embd.weight" else b.astype(np.float64) @ a)
    return changes


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_config(tmp_path / "base")


@pytest.mark.parametrize(
    "class_name",
    ["LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
     "Qwen3MoeForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
     "Gemma3ForConditionalGeneration", "Phi3ForCausalLM", "SmolLM3ForCausalLM"],
)  # fmt: skip
def test_every_matrix_is_changed_as_peft_changes_it(rng: np.random.Generator, class_name: str, tmp_path: Path) -> None:
    base, modules = write_config(tmp_path / "base", class_name), modules_of(class_name)
    pairs, expected = {}, {}
    for layer in range(N_LAYERS):
        for module, (name, shape) in modules.items():
            rank = int(rng.integers(1, 20))
            a, b = pairs[f"layers.{layer}.{module}"] = pair_of(rng, shape, rank)
            change = 16 / rank * b.astype(np.float64) @ a
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name, 0)
            if heads and ARCHITECTURES[class_name].name in PERMUTED:
                change = side_by_side(change, heads)
            expected[f"blk.{layer}.{name}.weight"] = change
    out = tmp_path / "adapter.gguf"
    changes = converted(write_peft(tmp_path / "peft", pairs), out, "--base", str(base), "--type", "f32")
    assert changes.keys() == expected.keys()
    for name, change in expected.items():
        np.testing.assert_allclose(changes[name], change, rtol=1e-5, atol=1e-4, err_msg=name)
    with GGUFReader(out) as reader:
        assert reader.metadata["general.architecture"] == ARCHITECTURES[class_name].name
        assert reader.metadata["adapter.lora.alpha"] == 16
        assert {tensor.type for tensor in reader.tensors.values()} == {TensorType.F32}


UNCHANGED = ("GPT2LMHeadModel", "JAISLMHeadModel", "BitnetForCausalLM")


@pytest.mark.parametrize("class_name", CLASSES)
def test_a_change_goes_where_the_matrix_goes(rng: np.random.Generator, class_name: str, tmp_path: Path) -> None:
    """A checkpoint that holds the changes as its weights becomes what the adapter does."""
    case = CLASSES[class_name]
    dtypes: dict[str, str] = case.get("dtypes", {})
    base = write_checkpoint(tmp_path / "base", case["config"], case["shapes"], dtypes)
    targets = Base.of_folder(base).targets()
    pairs, changed, names = {}, {}, {}
    for name, shape in case["shapes"].items():
        target = targets.get(short_name(name.removesuffix(".weight")))
        if name in dtypes:  # a matrix with scales, or what is none
            continue
        if len(shape) == 2 and name.endswith(".weight") and target is not None and target.expert is None:
            pairs[name.removesuffix(".weight")] = pair_of(rng, (shape[0], shape[1]), 3)
            if "embd" in target.name or "embed" in name or "wte" in name:
                del pairs[name.removesuffix(".weight")]
                continue
            a, b = pairs[name.removesuffix(".weight")]
            changed[name], names[name] = (16 / 3 * b @ a).astype(np.float32), target.name
    held_by_adapter = {
        f"base_model.model.{module}.lora_{letter}.weight": tensor(values, "F32")
        for module, pair in pairs.items() for letter, values in zip("AB", pair, strict=True)
    }  # fmt: skip
    folder = write_peft(tmp_path / "peft", {})
    write(folder / "adapter_model.safetensors", held_by_adapter)
    held = {name: tensor(changed.get(name, np.zeros(shape, np.float32)), "F32")
            for name, shape in case["shapes"].items()}  # fmt: skip
    held |= {name: (dtype, tuple(case["shapes"][name]), stored(name, case["shapes"][name], dtype))
             for name, dtype in dtypes.items()}  # fmt: skip
    write(base / "model.safetensors", held)
    # All matrices are turned about or rounded, or lie in others; or there are two halves, which no adapter changes.
    if not names:
        assert class_name in UNCHANGED or ARCHITECTURES[class_name].stacks
        return
    found = converted(folder, tmp_path / "adapter.gguf", "--base", str(base), "--type", "f32")
    assert found.keys() == set(names.values())
    with closing(CheckpointSource(base)) as source:
        for name in names.values():
            whole = source.tensors[name].rows(0, source.tensors[name].n_rows)
            np.testing.assert_allclose(found[name], whole, rtol=1e-4, atol=1e-4, err_msg=name)


def test_the_embedding_and_the_head(rng: np.random.Generator, base: Path, tmp_path: Path) -> None:
    a, b = pair_of(rng, (EMBD, N_VOCAB), 4)
    head = pair_of(rng, (N_VOCAB, EMBD), 8)
    peft = write_peft(tmp_path / "peft", {"embed_tokens": (a, b), "lm_head": head})
    changes = converted(peft, tmp_path / "out.gguf", "--base", str(base), "--type", "f32")
    np.testing.assert_allclose(changes["token_embd.weight"], 16 / 4 * (b @ a).T, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(changes["output.weight"], 16 / 8 * head[1] @ head[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("class_name", "block", "names"),
    [
        ("MixtralForCausalLM", "block_sparse_moe", ("w1", "w3", "w2")),
        ("Qwen3MoeForCausalLM", "mlp", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_experts_are_stacked(
    rng: np.random.Generator, class_name: str, block: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    base = write_config(tmp_path / "base", class_name)
    pairs, expected = {}, {}
    kinds = zip(names, ("gate", "up", "down"), ((FF, EMBD), (FF, EMBD), (EMBD, FF)), strict=True)
    for name, kind, shape in kinds:
        stack = [pair_of(rng, shape, 4) for _ in range(EXPERTS)]
        for expert in rng.permutation(EXPERTS):
            pairs[f"layers.1.{block}.experts.{expert}.{name}"] = stack[expert]
        expected[f"blk.1.ffn_{kind}_exps.weight"] = np.stack([16 / 4 * b @ a for a, b in stack])
    pairs[f"layers.0.{block}.gate"] = router = pair_of(rng, (EXPERTS, EMBD), 2)
    expected["blk.0.ffn_gate_inp.weight"] = 16 / 2 * router[1] @ router[0]
    peft = write_peft(tmp_path / "peft", pairs)
    changes = converted(peft, tmp_path / "out.gguf", "--base", str(base), "--type", "f32")
    assert changes.keys() == expected.keys()
    for name, change in expected.items():
        np.testing.assert_allclose(changes[name], change, rtol=1e-5, atol=1e-4)

    del pairs[f"layers.1.{block}.experts.1.{names[0]}"]
    with pytest.raises(FormatError, match=r"2 of 3 experts have pairs of 'blk.1.ffn_gate_exps.weight'"):
        PeftSource(write_peft(tmp_path / "peft", pairs), Base.of_folder(base))


def test_scales_of_their_own(rng: np.random.Generator, base: Path, tmp_path: Path) -> None:
    def changed(**config: Any) -> dict[str, float]:
        pairs = {f"layers.{i}.mlp.up_proj": pair_of(rng, (FF, EMBD), rank) for i, rank in enumerate((4, 9))}
        peft = write_peft(tmp_path / "peft", pairs, **config)
        changes = converted(peft, tmp_path / "out.gguf", "--base", str(base), "--type", "f32")
        factors = {}
        for i, (a, b) in enumerate(pairs.values()):
            product = b.astype(np.float64) @ a
            factors[f"{i}"] = float((changes[f"blk.{i}.ffn_up.weight"] * product).sum() / (product * product).sum())
            np.testing.assert_allclose(changes[f"blk.{i}.ffn_up.weight"], factors[f"{i}"] * product, atol=1e-3)
        return factors

    assert changed(lora_alpha=8) == pytest.approx({"0": 8 / 4, "1": 8 / 9}, rel=1e-5)
    assert changed(lora_alpha=8, use_rslora=True) == pytest.approx({"0": 8 / 2, "1": 8 / 3}, rel=1e-5)
    assert changed(alpha_pattern={"layers.1.mlp.up_proj": 5}) == pytest.approx({"0": 16 / 4, "1": 5 / 9}, rel=1e-5)
    assert changed(alpha_pattern={"up_proj": 7}) == pytest.approx({"0": 7 / 4, "1": 7 / 9}, rel=1e-5)
    assert changed(alpha_pattern={r"^model\.layers\.\d+\.mlp.(up|down)_proj$": 7}) == pytest.approx(
        {"0": 7 / 4, "1": 7 / 9}, rel=1e-5
    )
    both = {"p_proj": 3, "0.mlp.up_proj": 2, ".*up_proj": 1}  # the first that matches whole names; a part does not
    assert changed(alpha_pattern=both, use_rslora=True) == pytest.approx({"0": 2 / 2, "1": 1 / 3}, rel=1e-5)
    # For a matrix of torch.nn.Linear, PEFT takes no account of it.
    assert changed(fan_in_fan_out=True, lora_alpha=8) == pytest.approx({"0": 8 / 4, "1": 8 / 9}, rel=1e-5)


@pytest.mark.parametrize("type", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_types(rng: np.random.Generator, type: str, stored: str, base: Path, tmp_path: Path) -> None:
    a, b = pair_of(rng, (EMBD, FF), 4)
    if stored == "float16":
        kept = [matrix.astype(np.float16) for matrix in (a, b)]
    elif stored == "bfloat16":
        kept = [(matrix.view(np.uint32) >> 16).astype(np.uint16) for matrix in (a, b)]
    else:
        kept = [a, b]
    peft = write_peft(tmp_path / "peft", {"layers.0.mlp.down_proj": (kept[0], kept[1])})
    changes = converted(peft, tmp_path / "out.gguf", "--base", str(base), "--type", type)
    rough = 1e-6 if type == stored[:1] + "32" == "f32" and stored == "float32" else 2e-2
    (change,) = changes.values()
    np.testing.assert_allclose(change, 16 / 4 * b @ a, rtol=0, atol=rough * np.abs(change).max())


def test_what_the_command_does_by_default(
    rng: np.random.Generator, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = {"layers.0.self_attn.q_proj": pair_of(rng, (HEADS * HEAD, EMBD), 4)}
    peft = write_peft(tmp_path / "peft", pairs, base_model_name_or_path=str(base))
    assert main.main(["convert", str(peft)]) == 0
    with open_adapters([Lora(peft / "peft-lora-F16.gguf")]) as (adapter,):
        assert adapter.ranks == [4] and adapter.alpha == 16
        assert adapter.changes["blk.0.attn_q.weight"].a.type == TensorType.F16
        assert adapter.file.metadata["general.base_model.0.name"] == str(base)
    assert main.main(["convert", str(peft), str(tmp_path / "none.gguf"), "--dry-run"]) == 0
    assert "blk.0.attn_q.weight.lora_b" in capsys.readouterr().out
    assert not (tmp_path / "none.gguf").exists()


def test_the_base_may_be_a_gguf_file(rng: np.random.Generator, base: Path, tmp_path: Path) -> None:
    with GGUFWriter(tmp_path / "base.gguf") as writer:
        writer.set_metadata("general.architecture", "llama", ValueType.STRING)
        for key, value in (("block_count", N_LAYERS), ("attention.head_count", HEADS)):
            writer.set_metadata(f"llama.{key}", value, ValueType.UINT32)
        writer.set_metadata("llama.attention.head_count_kv", np.array([KV_HEADS] * 2, np.uint32), ValueType.ARRAY,
                            ValueType.UINT32)  # fmt: skip
    pairs = {f"layers.0.{module}": pair_of(rng, shape, 4) for module, (_, shape) in ATTENTION.items()}
    peft = write_peft(tmp_path / "peft", pairs)
    expected = converted(peft, tmp_path / "a.gguf", "--base", str(base))
    changes = converted(peft, tmp_path / "b.gguf", "--base", str(tmp_path / "base.gguf"))
    assert all(np.array_equal(changes[name], expected[name]) for name in expected)


# What is refused


def refusal(peft: Path, base: Path) -> str:
    with pytest.raises(FormatError) as error:
        PeftSource(peft, Base.of_folder(base)).close()
    assert str(error.value).startswith(str(peft)) and "\n" not in str(error.value)
    return error.value.reason


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "LOHA"}, "adapters of type 'LOHA' are not supported, only 'LORA'"),
        ({"use_dora": True}, "DoRA adapters are not supported: they change more than B A"),
        ({"modules_to_save": ["input_layernorm", "lm_head"]}, "it holds whole modules beside its LoRA pairs"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is not a list of names"),
        ({"use_bdlora": {"nblocks": 2}}, "adapters of block-diagonal matrices (BD-LoRA) are not supported"),
        ({"bias": "all"}, "it changes biases too (bias), which is not supported"),
        ({"lora_bias": True}, "its pairs have biases (lora_bias), which are not supported"),
        ({"trainable_token_indices": [1]}, "it holds rows of the embedding beside its LoRA pairs"),
        ({"target_parameters": ["experts.w"]}, "it changes parameters that are no modules (target_parameters)"),
        ({"layer_replication": [[0, 1]]}, "it repeats layers of its model"),
        ({"alora_invocation_tokens": [1]}, "an adapter that acts from certain tokens on (aLoRA) is not supported"),
        ({"use_qalora": True}, "QA-LoRA adapters are not supported"),
        ({"lora_alpha": None}, "lora_alpha is missing"),
        ({"lora_alpha": 0}, "lora_alpha is 0 for 'model.layers.0.self_attn.q_proj'"),
        ({"lora_alpha": "x"}, "lora_alpha is not a number: 'x'"),
        ({"alpha_pattern": [1]}, "alpha_pattern is not an object"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern.q_proj is not a number: 'x'"),
        ({"alpha_pattern": {"(a+)+": 1}}, "alpha_pattern has '(a+)+', which is no pattern that is supported"),
        ({"alpha_pattern": {"(q|q)" * 9: 1}}, "which is no pattern that is supported"),
    ],
)
def test_what_a_file_cannot_say_is_refused(
    rng: np.random.Generator, config: dict[str, Any], reason: str, base: Path, tmp_path: Path
) -> None:
    pairs = {"layers.0.self_attn.q_proj": pair_of(rng, (HEADS * HEAD, EMBD), 4)}
    assert reason in refusal(write_peft(tmp_path / "peft", pairs, **config), base)


def test_tensors_that_are_no_pairs_are_refused(rng: np.random.Generator, base: Path, tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = pair_of(rng, (HEADS * HEAD, EMBD), 4)

    def reason(**tensors: Array) -> str:
        extra = {key.replace("__", "."): values for key, values in tensors.items()}
        return refusal(write_peft(tmp_path / "peft", {}, extra), base)

    q = name.replace(".", "__")
    assert "lora_A.weight' is there without the other one of its pair" in reason(**{f"{q}__lora_A__weight": a})
    both = {f"{q}__lora_A__weight": a, f"{q}__lora_B__weight": b}
    assert "is of a DoRA adapter" in reason(**both, **{f"{q}__lora_magnitude_vector": np.ones(48, np.float32)})
    whole = {"base_model__model__lm_head__weight": np.ones((N_VOCAB, EMBD), np.float32)}
    assert "is no part of a LoRA pair: adapters that hold whole weights" in reason(**both, **whole)
    assert "is there twice" in reason(**both, **{f"{q}__lora_A__default__weight": a})
    assert "does not go with (4, 48)" in reason(**both | {f"{q}__lora_B__weight": b[:, :3]})
    assert "it is no matrix of floats" in reason(**both | {f"{q}__lora_A__weight": a.reshape(-1)})
    assert "which are not those of 6 heads" in reason(**both | {f"{q}__lora_B__weight": b[:-1]})
    strange = {key.replace("q_proj", "z_proj"): values for key, values in both.items()}
    assert "is of a module that is no matrix of models of architecture 'llama'" in reason(**strange)
    beyond = {key.replace("layers__0", "layers__7"): values for key, values in both.items()}
    assert "is of a module that is no matrix" in reason(**beyond)
    again = {key.replace("model__model__layers", "model__layers"): values for key, values in both.items()}
    assert "changes the same matrix as" in reason(**both, **again)
    long = {f"base_model__model__{'norm' * 20_000}": np.ones(EMBD, np.float32)}  # a search must not take minutes
    assert "is no part of a LoRA pair" in reason(**both, **long)
    assert reason() == "the adapter changes nothing: it has no pairs of lora_A and lora_B"


def test_the_embedding_as_it_was_is_left_out(rng: np.random.Generator, base: Path, tmp_path: Path) -> None:
    copy = {"base_model.model.model.embed_tokens.base_layer.weight": np.ones((N_VOCAB, EMBD), np.float32)}
    peft = write_peft(tmp_path / "peft", {"embed_tokens": pair_of(rng, (EMBD, N_VOCAB), 4)}, copy)
    assert list(converted(peft, tmp_path / "out.gguf", "--base", str(base))) == ["token_embd.weight"]


def test_missing_and_damaged_files(
    rng: np.random.Generator, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = {"layers.0.self_attn.q_proj": pair_of(rng, (HEADS * HEAD, EMBD), 4)}
    peft = write_peft(tmp_path / "peft", pairs, base_model_name_or_path="someone/something")
    out = tmp_path / "out.gguf"

    def error(*options: object) -> str:
        assert main.main(["convert", "--lora", *map(str, options)]) == 1
        assert not out.exists()
        return capsys.readouterr().err

    assert "has to be named with --base: its config says 'someone/something'" in error(peft, out)
    assert "there is no such file" in error(tmp_path / "nothing", out, "--base", base)
    assert "there is no such file" in error(peft, out, "--base", tmp_path)
    assert "is written as F32, F16, BF16, not Q4_K_M" in error(peft, out, "--base", base, "--type", "q4_k_m")
    assert "is no folder: --lora takes an adapter as PEFT saves it" in error(base / "config.json", out)
    a, b = pairs["layers.0.self_attn.q_proj"]
    big = write_peft(tmp_path / "big", {"layers.0.self_attn.q_proj": (a, b * np.float32(1e6))})
    assert "has weights that are not finite, or too large for F16" in error(big, out, "--base", base)
    (peft / "adapter_config.json").write_text("[")
    assert "this is not JSON" in error(peft, out, "--base", base)
    write_peft(peft, pairs)
    (peft / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    assert "this is not a safetensors file" in error(peft, out, "--base", base)
    (peft / "adapter_model.safetensors").rename(peft / "adapter_model.bin")
    assert "only files of PyTorch, which can hold programs and are not opened" in error(peft, out, "--base", base)


def test_both_halves_of_a_model_with_an_encoder(rng: np.random.Generator, tmp_path: Path) -> None:
    case = CLASSES["MT5ForConditionalGeneration"]  # which has two layers on one side, and one on the other
    folder = write_checkpoint(tmp_path / "base", case["config"], case["shapes"])
    wanted = {
        "encoder.block.1.layer.0.SelfAttention.q": ("enc.blk.1.attn_q", (48, 32)),
        "decoder.block.0.layer.1.EncDecAttention.v": ("dec.blk.0.cross_attn_v", (48, 32)),
        "decoder.block.0.layer.2.DenseReluDense.wi_1": ("dec.blk.0.ffn_up", (48, 32)),
        "decoder.block.0.layer.0.SelfAttention.o": ("dec.blk.0.attn_o", (32, 48)),
    }
    pairs = {module: pair_of(rng, shape, 4) for module, (_, shape) in wanted.items()}
    adapter = write_peft(tmp_path / "adapter", pairs)
    with closing(CheckpointSource(folder)) as base:
        bases = [Base.of_folder(folder), Base.of_file(base)]
    for one in bases:
        with closing(PeftSource(adapter, one, TensorType.F32)) as source:
            assert {name.rpartition(".weight.lora_")[0] for name in source.tensors} == {n for n, _ in wanted.values()}
    beyond = write_peft(tmp_path / "more", {"decoder.block.1.layer.0.SelfAttention.q": pair_of(rng, (48, 32), 4)})
    with pytest.raises(FormatError, match="no matrix of models of architecture 't5'"):
        PeftSource(beyond, bases[0])


def test_options_that_do_not_go_together(rng: np.random.Generator, base: Path, tmp_path: Path) -> None:
    peft = write_peft(tmp_path / "peft", {"lm_head": pair_of(rng, (N_VOCAB, EMBD), 4)})
    assert main.main(["convert", str(peft), "--base", str(base), "--output-type", "f16"]) == 2
    assert main.main(["convert", "model.gguf", "--type", "f16", "--base", str(base)]) == 2
    assert main.main(["convert", str(base)]) == 1  # a folder without weights


CHANGING = ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "not_yet_known"]


@pytest.mark.parametrize("start", CHANGING)
def test_an_adapter_of_a_changed_base_comes_with_a_notice(
    start: str, rng: np.random.Generator, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = {"lm_head": pair_of(rng, (N_VOCAB, EMBD), 4)}
    peft = write_peft(tmp_path / "peft", pairs, init_lora_weights=start)
    converted(peft, tmp_path / "out.gguf", "--base", str(base))
    assert f"the adapter began as {start!r}: it fits the model only as that changed it" in capsys.readouterr().err


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_an_adapter_that_left_the_model_as_it_was_comes_without(
    start: Any, rng: np.random.Generator, base: Path, tmp_path: Path
) -> None:
    peft = write_peft(tmp_path / "peft", {"lm_head": pair_of(rng, (N_VOCAB, EMBD), 4)}, init_lora_weights=start)
    assert notices(peft, base) == []


def notices(peft: Path, base: Path) -> list[str]:
    with closing(PeftSource(peft, Base.of_folder(base))) as source:
        return [notice.removeprefix(f"{peft}: ") for notice in source.notices]


def test_an_adapter_of_mlx_is_called_one(base: Path, tmp_path: Path) -> None:
    peft = write_peft(tmp_path / "peft", {})
    (peft / "adapter_model.safetensors").rename(peft / "adapters.safetensors")
    assert refusal(peft, base) == "this is an adapter of MLX (adapters.safetensors), which is not supported"


def test_what_it_changes_of_a_vision_tower_is_left_out(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_config(tmp_path / "base", "Gemma3ForConditionalGeneration")
    tower = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    pairs = {
        "language_model.layers.0.self_attn.q_proj": pair_of(rng, (HEADS * HEAD, EMBD), 4),
        tower: pair_of(rng, (32, 32), 4),
    }
    projector = {"base_model.model.model.multi_modal_projector.mm_input_projection_weight": np.ones((3, 3), np.float32)}
    peft = write_peft(tmp_path / "peft", pairs, projector, modules_to_save=["model.multi_modal_projector"])
    assert set(converted(peft, tmp_path / "out.gguf", "--base", str(base))) == {"blk.0.attn_q.weight"}
    said = f"qrun: {peft}: the adapter's changes of what sees or hears (3 tensors) are left out\n"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("modules", [None, ["input_layernorm", "q_norm", "model.norm"]])
def test_norms_are_left_out_as_of_other_adapters(
    modules: Any, rng: np.random.Generator, base: Path, tmp_path: Path
) -> None:
    pairs = {"layers.0.self_attn.q_proj": pair_of(rng, (HEADS * HEAD, EMBD), 4)}
    names = ("layers.0.input_layernorm", "layers.1.self_attn.q_norm", "norm.modules_to_save")
    norms = {f"base_model.model.model.{name}.weight": np.ones(EMBD, np.float32) for name in names}
    peft = write_peft(tmp_path / "peft", pairs, norms, modules_to_save=modules)
    assert notices(peft, base) == ["the norms in the adapter (3) are left out"]
    assert set(converted(peft, tmp_path / "out.gguf", "--base", str(base))) == {"blk.0.attn_q.weight"}


def test_a_name_that_is_no_text_is_written_as_one(rng: np.random.Generator, base: Path, tmp_path: Path) -> None:
    pairs = {"layers.0.self_attn.q_proj": pair_of(rng, (HEADS * HEAD, EMBD), 4)}
    peft = write_peft(tmp_path / "peft", pairs, base_model_name_or_path="half \ud800")
    converted(peft, tmp_path / "out.gguf", "--base", str(base))
    with GGUFReader(tmp_path / "out.gguf") as reader:
        assert reader.metadata["general.base_model.0.name"] == "half ?"


def test_a_folder_of_peft_is_merged(rng: np.random.Generator, tmp_path: Path) -> None:
    model = Path(__file__).parents[1] / "data" / "arch" / "llama-dense.gguf"
    names = {"layers.1.self_attn.q_proj": "blk.1.attn_q.weight", "layers.0.mlp.up_proj": "blk.0.ffn_up.weight"}
    with GGUFReader(model) as reader:
        before = {name: tensor.dequantize() for name, tensor in reader.tensors.items()}
        heads = reader.metadata["llama.attention.head_count"]
    pairs = {module: pair_of(rng, before[name].shape, 5) for module, name in names.items()}
    peft = write_peft(tmp_path / "peft", pairs, lora_alpha=2, use_rslora=True)
    out = tmp_path / "out.gguf"
    assert main.main(["convert", str(model), str(out), "--type", "f32", "--merge-lora", f"{peft}=0.5"]) == 0
    expected = dict(before)
    for module, name in names.items():
        change = 0.5 * 2 / np.sqrt(5) * pairs[module][1] @ pairs[module][0]
        expected[name] = before[name] + (side_by_side(change, heads) if "attn_q" in name else change)
    with GGUFReader(out) as reader:
        for name, values in expected.items():
            np.testing.assert_allclose(reader.tensors[name].dequantize(), values, rtol=1e-5, atol=1e-5)
