"""Llama, and what has its tensors by its names: Mistral, Mixtral, SmolLM3, Baichuan, XVERSE, InternLM, Llama 4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from qrun.formats import ValueType
from qrun.formats.tensors import SourceTensor
from qrun.models.huggingface.changes import Order, by_order, ordered, rows, side_by_side, then, turned_experts
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import Facts
from qrun.models.huggingface.families.deepseek import MISTRAL4
from qrun.models.huggingface.layout import (
    FEED_FORWARD,
    LAYER_NORMS,
    NORMS,
    OUTPUT_LAYER_NORM,
    RELU2,
    VOCAB_SIZE,
    Architecture,
    Change,
    Sizes,
    attention,
    either,
    experts,
    gated,
    linear,
    maybe,
    norm,
    optional,
    plain,
    reals,
    tensor,
)
from qrun.models.huggingface.tensors import layer_of
from qrun.models.hyperparameters import MAX_HEADS

PERMUTED = attention(permuted=True)
_LLAMA = Architecture("llama", (*NORMS, *PERMUTED, *FEED_FORWARD), keys=VOCAB_SIZE, rotated="all")


def _mistral3_entries(facts: Facts) -> None:
    rope = facts.config.rope()
    if facts.config.get("model_type") == "ministral3":
        facts.real("rope.scaling.yarn_log_multiplier", rope.real("mscale_all_dim", 1.0))
        facts.real("attention.temperature_scale", rope.real("llama_4_scaling_beta", 0.0))


def _mistral4(config: Config) -> Architecture | None:
    return MISTRAL4 if config.get("model_type") == "mistral4" else None


_MISTRAL3 = replace(_LLAMA, name="mistral3", entries=_mistral3_entries, defaults={"sliding_window": 0},
                    variant=_mistral4)  # fmt: skip

# Llama 4


def _llama4_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    expert_ff = config.integer("intermediate_size")
    return {"ff": config.integer("intermediate_size_mlp", expert_ff), "expert_ff": expert_ff,
            "experts": config.integer("num_local_experts")}


def _llama4_entries(facts: Facts) -> None:
    turned = facts.config.get("no_rope_layers")  # 1 for a layer with positions
    if turned and turned != [int((layer + 1) % 4 != 0) for layer in range(facts.sizes["layers"])]:
        raise facts.config.error("no_rope_layers", "is not every layer but each 4th, as engines take it")
    facts.count("interleave_moe_layer_step", facts.config.integer("interleave_moe_layer_step", 1))
    facts.count("expert_feed_forward_length", facts.sizes["expert_ff"])
    kinds = facts.config.get("layer_types")
    if isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds):
        facts.count("attention.sliding_window", 0)


_LLAMA4 = Architecture(
    "llama4",
    (
        *NORMS,
        *attention(),
        either(
            (
                *turned_experts("feed_forward", "router"),
                *gated("feed_forward.shared_expert", end="_shexp", width="expert_ff"),
            ),
            gated("feed_forward"),
        ),
    ),
    sizes=_llama4_sizes, entries=_llama4_entries, keys=VOCAB_SIZE, rotated="all",
    defaults={"num_local_experts": 16, "num_experts_per_tok": 1},
    fixed={"attention_chunk_size": 8192, "use_qk_norm": True, "attn_temperature_tuning": True, "attn_scale": 0.1,
           "floor_scale": 8192},
)  # fmt: skip

# InternLM 2: queries, keys and values of a group of heads lie together.


def _grouped(part_of: str) -> Change:
    def order(sizes: Sizes) -> Order:
        groups, head = sizes["kv_heads"], sizes["head"]
        each = sizes["heads"] // groups
        heads = np.arange(groups * (each + 2) * head).reshape(groups, each + 2, head)
        taken = {"q": heads[:, :each], "k": heads[:, each], "v": heads[:, each + 1]}[part_of].reshape(-1)
        count = {"q": sizes["heads"], "k": groups, "v": 0}[part_of]
        return taken[side_by_side(len(taken), count)] if count else taken

    return by_order(order)


_INTERNLM2 = Architecture(
    "internlm2",
    (
        norm("attention_norm", "attn_norm"),
        norm("ffn_norm", "ffn_norm"),
        *(
            tensor("attention.wqkv.weight", f"attn_{letter}.weight", "qkv embd", _grouped(letter)) for letter in "qkv"
        ),
        *linear("attention.wo", "attn_output", "embd", "q"),
        *gated("feed_forward", "w1 w3 w2"),
    ),
    embedding="tok_embeddings", head="output", defaults={"rms_norm_eps": 1e-5},
)  # fmt: skip

# Baichuan: the three matrices lie one after another.


def _permuted_rows(start: str, count: str, heads: str) -> Change:
    return then(rows(start, count), by_order(lambda sizes: side_by_side(sizes[count], sizes[heads])))


_BAICHUAN = Architecture(
    "baichuan",
    (
        *NORMS,
        tensor("self_attn.W_pack.weight", "attn_q.weight", "qkv embd", _permuted_rows("0", "q", "heads")),
        tensor("self_attn.W_pack.weight", "attn_k.weight", "qkv embd", _permuted_rows("q", "kv", "kv_heads")),
        tensor("self_attn.W_pack.weight", "attn_v.weight", "qkv embd", rows("q+kv", "kv")),
        *linear("self_attn.o_proj", "attn_output", "embd", "q"),
        *FEED_FORWARD,
    ),
    rotated="all", entries=lambda facts: facts.text("tensor_data_layout", "Meta AI original pth"),
)  # fmt: skip

# Deci: layers differ in how many heads they have, and some have no attention, or a matrix in its place.


def _deci_lists(config: Config, sizes: Mapping[str, int]) -> tuple[list[int], list[int], list[int]] | None:
    """Heads, heads of keys, and widths of feed-forward layers; None where config.json has no list of blocks."""
    blocks, n_layers = config.get("block_configs"), sizes["layers"]
    if blocks is None:
        return None
    if not isinstance(blocks, list) or len(blocks) != n_layers or not all(isinstance(one, dict) for one in blocks):
        raise config.error("block_configs", f"is not a list of {n_layers} objects")
    heads, kv_heads, widths = [], [], []
    for values in blocks:
        block = Config(config.path, values, prefix="block_configs.")
        attention, ffn = block.section("attention"), block.section("ffn")
        if attention.get("n_heads_in_group") is not None:
            heads.append(sizes["heads"])
            kv_heads.append(sizes["heads"] // attention.integer("n_heads_in_group", high=MAX_HEADS))
        else:
            heads.append(sizes["heads"] if attention.flag("replace_with_linear") else 0)
            kv_heads.append(0)
        width = int(2 * ffn.real("ffn_mult", 0.0, high=1e3) * sizes["embd"] / 3)
        widths.append(-(width // -DECI_MULTIPLE) * DECI_MULTIPLE)
    return heads, kv_heads, widths


def _deci_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    lists = _deci_lists(config, sizes)
    return {"ff": max(lists[2])} if lists else {}


def _deci_keys(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
    """Rows of keys, whose heads each layer has another number of."""
    lists, given = _deci_lists(sizes.config, sizes), sizes.config.get("num_key_value_heads_per_layer")
    layer = layer_of(tensor, sizes)
    if lists:
        heads = lists[1][layer]
    elif isinstance(given, list) and layer < len(given) and type(given[layer]) is int:
        heads = given[layer]
    else:
        heads = sizes["kv_heads"]
    if heads < 1 or tensor.n_rows % (2 * heads):
        raise tensor.error(f"has {tensor.n_rows} rows, which are not those of {heads} heads")
    return ordered(tensor, side_by_side(tensor.n_rows, heads))


def _deci_entries(facts: Facts) -> None:
    config, n_layers = facts.config, facts.sizes["layers"]
    if lists := _deci_lists(config, facts.sizes):
        for key, values in zip(("attention.head_count", "attention.head_count_kv", "feed_forward_length"), lists,
                               strict=True):  # fmt: skip
            facts.array(key, values)
    elif config.get("num_key_value_heads_per_layer") is not None:
        each = config.integers("num_key_value_heads_per_layer", high=MAX_HEADS)
        if len(each) != n_layers:
            raise config.error("num_key_value_heads_per_layer", f"is not a list of {n_layers} numbers")
        facts.array("attention.head_count_kv", each)


DECI_MULTIPLE = 256
_DECI = Architecture(
    "deci",
    (
        *optional(norm("input_layernorm", "attn_norm")),
        maybe(
            *linear("self_attn.q_proj", "attn_q", "q", "embd", "heads"),
            *linear("self_attn.k_proj", "attn_k", "*", "embd", change=_deci_keys),
            *linear("self_attn.v_proj", "attn_v", "*", "embd"),
            *linear("self_attn.o_proj", "attn_output", "embd", "q"),
        ),
        *optional(tensor("self_attn.linear_attn.weight", "attn_output.weight", "embd embd")),
        maybe(norm("post_attention_layernorm", "ffn_norm"), *gated(width="*")),
    ),
    sizes=_deci_sizes, entries=_deci_entries, keys=VOCAB_SIZE, rotated="all", ffn=False,
)  # fmt: skip

# Apertus: the parameters of its activation are metadata.

_XIELU = ("alpha_n", "alpha_p", "beta", "eps")


def _xielu(facts: Facts, weights: Mapping[str, SourceTensor]) -> None:
    for key in _XIELU:
        found = [weights.get(f"model.layers.{layer}.mlp.act_fn.{key}") for layer in range(facts.sizes["layers"])]
        values = [float(tensor.rows(0, 1).reshape(-1)[0]) for tensor in found if tensor is not None]
        if len(values) == len(found):
            facts.entries.array(f"xielu.{key}", values, ValueType.FLOAT32)


def _without_activations(name: str, sizes: Sizes) -> str:
    return "" if ".mlp.act_fn." in name else name


_APERTUS = Architecture(
    "apertus",
    (
        norm("attention_layernorm", "attn_norm"),
        norm("feedforward_layernorm", "ffn_norm"),
        *attention(),
        *optional(norm("self_attn.q_norm", "attn_q_norm", "head"), norm("self_attn.k_norm", "attn_k_norm", "head")),
        *linear("mlp.up_proj", "ffn_up", "ff", "embd"),
        *linear("mlp.down_proj", "ffn_down", "embd", "ff"),
    ),
    activations=frozenset({"xielu"}), keys=VOCAB_SIZE, rotated="all", rename=_without_activations, of_weights=_xielu,
    defaults={"rms_norm_eps": 1e-5},
)  # fmt: skip


CLASSES = {
    "LlamaForCausalLM": _LLAMA,
    "LLaMAForCausalLM": _LLAMA,
    "LlamaModel": replace(_LLAMA, embeds=True),
    "Sarashina2VisionForCausalLM": replace(_LLAMA, within="llm."),
    "LlamaBidirectionalModel": replace(_LLAMA, name="llama-embed", embeds=True),
    "IQuestCoderForCausalLM": _LLAMA,
    "VLlama3ForCausalLM": _LLAMA,
    "LlavaForConditionalGeneration": _LLAMA,
    "VoxtralForConditionalGeneration": _LLAMA,
    "InternLM3ForCausalLM": _LLAMA,
    "MistralForCausalLM": replace(_LLAMA, defaults={"sliding_window": 4096}, windows="all"),
    "MixtralForCausalLM": replace(
        _LLAMA, layer=(*NORMS, *PERMUTED, *experts("block_sparse_moe", "w1 w3 w2")),
        defaults={"num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0},
        windows="all",
    ),
    "SmolLM3ForCausalLM": replace(
        _LLAMA, name="smollm3",
        defaults={"tie_word_embeddings": True, "rope_theta": 2_000_000.0, "num_key_value_heads": 4},
        windows="layers without positions",
    ),
    "DeciLMForCausalLM": _DECI,
    "Mistral3ForConditionalGeneration": _MISTRAL3,
    "Ministral3ForCausalLM": _MISTRAL3,
    "ArceeForCausalLM": replace(
        _LLAMA, name="arcee", layer=(*NORMS, *PERMUTED, *plain(names="up_proj down_proj")), activations=RELU2,
        defaults={"rms_norm_eps": 1e-5},
    ),
    "ApertusForCausalLM": _APERTUS,
    "Llama4ForCausalLM": _LLAMA4,
    "Llama4ForConditionalGeneration": _LLAMA4,
    "InternLM2ForCausalLM": _INTERNLM2,
    "BaichuanForCausalLM": _BAICHUAN,
    "BaiChuanForCausalLM": _BAICHUAN,
    "XverseForCausalLM": replace(
        _LLAMA, name="xverse", keys=(), entries=lambda facts: facts.text("tensor_data_layout", "Meta AI original pth")
    ),
    "OrionForCausalLM": Architecture(
        "orion", (*LAYER_NORMS, *attention(), *FEED_FORWARD), outer=OUTPUT_LAYER_NORM,
        keys=reals(attention__layer_norm_epsilon="rms_norm_eps"),
        entries=lambda facts: facts.text("tensor_data_layout", "Meta AI original pth"),
    ),
    "SeedOssForCausalLM": Architecture(
        "seed_oss",
        (norm("input_layernorm", "attn_norm"), norm("post_attention_layernorm", "post_attention_norm"), *attention(),
         *FEED_FORWARD),
    ),
}  # fmt: skip
