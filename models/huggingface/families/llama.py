"""Llama, and what has its tensors by its names: Mistral, Mixtral, SmolLM3, Baichuan, XVERSE, InternLM, Llama 4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from qrun.formats import ValueType
from qrun.formats.tensors import SourceTensor
from qrun.models.huggingface.changes import Order, by_order, rows, side_by_side, then, turned_experts
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
    norm,
    optional,
    plain,
    reals,
    tensor,
)

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
