"""Models with Kimi delta attention in most layers, and latent attention in the others: Kimi, GLM 5 Next, Ling 3."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qrun.formats import ValueType
from qrun.formats.blocks.layout import F32Array
from qrun.formats.tensors import SourceTensor
from qrun.models.huggingface.changes import computed, in_full, negative_exp, ordered
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import Facts
from qrun.models.huggingface.families.deepseek import INDEX_KEYS, latent_attention, latent_sizes
from qrun.models.huggingface.families.mixtures import SELECTION_BIAS, SHARED
from qrun.models.huggingface.layout import (
    DRAFT,
    FEED_FORWARD,
    NORMS,
    VOCAB_SIZE,
    Architecture,
    Experts,
    Part,
    Product,
    Sizes,
    counts,
    either,
    experts,
    flags,
    gated,
    hyper_connection,
    layer_norm,
    linear,
    maybe,
    norm,
    optional,
    reals,
    tensor,
)

_CONV = computed("1 delta 1 conv_kernel")


def _delta_attention(block: str, fading: Part, *more: Part, out: str = "o_proj") -> tuple[Part, ...]:
    """more: what makes decays and gates, which models have in several forms. fading: what becomes of A_log."""
    return (
        *(part for name in "qkv" for part in linear(f"{block}.{name}_proj", f"attn_{name}", "delta", "embd")),
        *(tensor(f"{block}.{n}_conv1d.weight", f"ssm_conv1d_{n}.weight", "delta 1 conv_kernel", _CONV) for n in "qkv"),
        tensor(f"{block}.b_proj.weight", "ssm_beta.weight", "heads embd"),
        tensor(f"{block}.dt_bias", "ssm_dt.bias", "delta"),
        fading,
        norm(f"{block}.o_norm", "ssm_norm", "delta_head"),
        *linear(f"{block}.{out}", "attn_output", "embd", "delta"),
        *more,
    )


def _narrowed(block: str, name: str) -> tuple[Part, ...]:
    """A matrix as the product of two."""
    return (
        tensor(f"{block}.{name}_a_proj.weight", f"ssm_{name}_a.weight", "* embd"),
        tensor(f"{block}.{name}_b_proj.weight", f"ssm_{name}_b.weight", "delta *"),
    )


def _mixture(width: str = "embd") -> tuple[Part, ...]:
    """width: of what the experts take."""
    block = "block_sparse_moe"
    return (
        *(replace(part, shape=tuple(width if size == "embd" else size for size in part.shape))
          if isinstance(part, Experts) else part for part in experts(block, "w1 w3 w2")),
        *optional(tensor(f"{block}.gate.e_score_correction_bias", "exp_probs_b.bias", "experts")),
        *gated(f"{block}.shared_experts", end="_shexp", width="*"),
    )


def _sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    linear_config = config.section("linear_attn_config")
    found = latent_sizes(config, sizes)
    head = linear_config.integer("head_dim", 128)
    return found | {
        "delta": sizes["heads"] * head, "delta_head": head,
        "conv_kernel": linear_config.integer("short_conv_kernel_size", 4),
    }  # fmt: skip


def _entries(facts: Facts, attends: list[bool]) -> None:
    """attends: which layers have latent attention."""
    config, sizes = facts.config, facts.sizes
    facts.array("attention.head_count_kv", [int(one) for one in attends])
    facts.count("ssm.conv_kernel", sizes["conv_kernel"])
    facts.count("kda.head_dim", sizes["delta_head"])
    if config.get("q_lora_rank") is not None:
        facts.count("attention.q_lora_rank", sizes["q_rank"])
    facts.count("attention.kv_lora_rank", sizes["kv_rank"])
    facts.count("attention.key_length_mla", sizes["plain_dim"] + sizes["turned_dim"])
    facts.count("attention.value_length_mla", sizes["value_dim"])
    facts.count("rope.dimension_count", sizes["turned_dim"])


_COUNTS = counts(
    expert_feed_forward_length="moe_intermediate_size", expert_shared_count="num_shared_experts n_shared_experts",
    leading_dense_block_count="first_k_dense_replace",
)  # fmt: skip
_SCALE = reals(expert_weights_scale="routed_scaling_factor")

# Kimi


def _kimi_linear_entries(facts: Facts) -> None:
    _kimi_entries(facts)
    facts.count("attention.value_length", facts.sizes["turned_dim"])


def _kimi_entries(facts: Facts) -> None:
    config = facts.config.section("linear_attn_config")
    attending = config.integers("full_attn_layers")  # counted from 1
    _entries(facts, [layer + 1 in attending for layer in range(facts.sizes["layers"])])
    if config.get("gate_lower_bound") is not None:
        facts.real("kda.gate_lower_bound", config.real("gate_lower_bound", low=-1e3, high=0.0))


_KIMI_DELTA = _delta_attention(
    "self_attn", tensor("self_attn.A_log", "ssm_a", "1 1 heads 1", computed("1 1 heads 1", negative_exp)),
    *_narrowed("self_attn", "f"), *_narrowed("self_attn", "g"),
)  # fmt: skip
_KIMI_LINEAR = Architecture(
    "kimi-linear",
    (*NORMS, either(latent_attention(), _KIMI_DELTA), either(_mixture(), FEED_FORWARD)),
    sizes=_sizes, entries=_kimi_linear_entries, keys=(*VOCAB_SIZE, *_COUNTS, *_SCALE),
    fixed={"mla_use_nope": True, "moe_renormalize": True, "num_expert_group": 1},
)  # fmt: skip


def _k3_entries(facts: Facts) -> None:
    _kimi_entries(facts)
    facts.count("attention.value_length", facts.sizes["kv_rank"])
    if facts.config.get("routed_expert_hidden_size") is not None:
        facts.count("expert_latent_length", facts.sizes["narrow"])


def _k3_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    return _sizes(config, sizes) | {"narrow": config.integer("routed_expert_hidden_size", sizes["embd"])}


def _scores(of: str, name: str) -> Product:
    return Product((f"{of}_norm.weight", f"{of}_proj.weight"), f"{name}.weight", "embd")


def _of_heads(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
    """There may be more numbers than heads."""
    if tensor.n_rows != 1 or tensor.row < sizes["heads"]:
        raise tensor.error(f"has shape {tensor.shape}, expected ({sizes['heads']},)")
    return ordered(computed(str(tensor.row), negative_exp)(tensor, sizes), np.arange(sizes["heads"]))


_NARROW = "block_sparse_moe.routed_expert"
_K3_DELTA = _delta_attention(
    "self_attn", tensor("self_attn.A_log", "ssm_a", "*", _of_heads), *_narrowed("self_attn", "f"),
    tensor("self_attn.g_proj.weight", "ssm_g.weight", "delta embd"),
)  # fmt: skip
_K3_LATENT = (*latent_attention(), maybe(tensor("self_attn.g_proj.weight", "attn_gate.weight", "* embd")))
_KIMI_K3 = Architecture(
    "kimi-k3",
    (
        *NORMS,
        _scores("self_attention_res", "attn_res_score"), _scores("mlp_res", "ffn_res_score"),
        either(_K3_LATENT, _K3_DELTA),
        either(
            (
                *_mixture("narrow"),
                maybe(
                    tensor(f"{_NARROW}_down_proj.weight", "ffn_routed_down.weight", "narrow embd"),
                    tensor(f"{_NARROW}_up_proj.weight", "ffn_routed_up.weight", "embd narrow"),
                ),
                maybe(norm(f"{_NARROW}_norm", "ffn_routed_norm", "narrow")),
            ),
            FEED_FORWARD,
        ),
    ),
    activations=frozenset({"situ"}), sizes=_k3_sizes, entries=_k3_entries,
    outer=(norm("norm", "output_norm"), _scores("output_attn_res", "output_res_score")),
    keys=(
        *VOCAB_SIZE, *_COUNTS, *_SCALE, *flags(expert_weights_norm="moe_renormalize"),
        *reals(
            activation__situ_beta="activation_situ_beta", activation__situ_linear_beta="activation_situ_linear_beta"
        ),
        *counts(attn_res__block_size="attn_res_block_size"),
    ),
    fixed={"mla_use_nope": True, "moe_router_activation_func": "sigmoid", "num_expert_group": 1},
)  # fmt: skip

# GLM 5 Next: hyper-connections, and an indexer of pools of tokens beside latent attention.


def _glm_entries(facts: Facts) -> None:
    config, sizes = facts.config, facts.sizes
    kinds = config.required_layer_kinds(sizes["layers"])
    _entries(facts, [kind != "linear_attention" for kind in kinds] + [True] * sizes["drafts"])
    facts.count("attention.value_length", sizes["kv_rank"])
    facts.real("attention.layer_norm_epsilon", 1e-6)
    linear_config = config.section("linear_attn_config")
    if linear_config.get("gate_lower_bound") is not None:
        facts.real("kda.gate_lower_bound", linear_config.real("gate_lower_bound", low=-1e3, high=0.0))
    facts.flag("attention.indexer.kpool_select_tail", config.flag("index_kpool_always_select_tail", True))
    if isinstance(config.get("indexer_types"), list):
        facts.flags("attention.indexer.types", [kind == "full" for kind in config.get("indexer_types")])
    if config.get("swiglu_limit") is not None:
        limits = [config.real("swiglu_limit")] * (sizes["layers"] + sizes["drafts"])
        for key in ("swiglu_clamp_exp", "swiglu_clamp_shexp"):
            facts.array(key, limits, ValueType.FLOAT32)


def _glm_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    return _sizes(config, sizes) | {"index_dim": config.integer("index_head_dim", 128)}


_INDEXER: tuple[Part, ...] = (
    tensor("self_attn.indexer.wq_b.weight", "indexer.attn_q_b.weight", "* q_rank"),
    tensor("self_attn.indexer.wk.weight", "indexer.attn_k.weight", "index_dim embd"),
    tensor("self_attn.indexer.weights_proj.weight", "indexer.proj.weight", "* embd"),
    *layer_norm("self_attn.indexer.k_norm", "indexer.k_norm", "index_dim"),
    tensor("self_attn.indexer.index_kpool_compress_ape", "indexer_compressor_ape.weight", "* index_dim", in_full),
    tensor("self_attn.indexer.index_kpool_compress_gate", "indexer_compressor_gate.weight", "index_dim embd", in_full),
)
_GLM5_NEXT = Architecture(
    "glm5-next",
    (
        *NORMS,
        *hyper_connection("hc_attn", "hc_attn", in_full), *hyper_connection("hc_ffn", "hc_ffn", in_full),
        either(
            (*latent_attention(), maybe(*_INDEXER)),
            _delta_attention(
                "self_attn", tensor("self_attn.A_log", "ssm_a", "*", _of_heads),
                *_narrowed("self_attn", "f"), *_narrowed("self_attn", "g"),
            ),
        ),
        either((*experts(), *SELECTION_BIAS, *SHARED), FEED_FORWARD),
    ),
    sizes=_glm_sizes, entries=_glm_entries, extra_layers="num_nextn_predict_layers", draft=DRAFT,
    keys=(
        *VOCAB_SIZE, *_COUNTS, *_SCALE, *flags(expert_weights_norm="norm_topk_prob"),
        *INDEX_KEYS,
        *counts(
            attention__indexer__kpool="index_kpool",
            hyper_connection__count="hc_mult", hyper_connection__sinkhorn_iterations="hc_sinkhorn_iters",
        ),
        *reals(hyper_connection__epsilon="hc_eps"),
    ),
    fixed={"mla_use_nope": True, "qk_rope_head_dim": 0, "mhc": True},
)  # fmt: skip

# Ling 3


def _ling_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    head = config.integer("head_dim", 128)
    return latent_sizes(config, sizes) | {
        "delta": sizes["heads"] * head, "delta_head": head, "conv_kernel": config.integer("short_conv_kernel_size", 4),
        "value_head": head,
    }  # fmt: skip


def _ling_entries(facts: Facts) -> None:
    config, sizes = facts.config, facts.sizes
    layers, group = sizes["layers"], config.integer("layer_group_size")
    attends = [(layer + 1) % group == 0 or layer >= layers // group * group for layer in range(layers)]
    _entries(facts, attends + [True] * sizes["drafts"])
    facts.count("attention.value_length", sizes["delta_head"])
    facts.real("kda.gate_lower_bound", config.real("kda_lower_bound", low=-1e3, high=0.0))
    facts.count("expert_shared_count", config.integer("num_shared_experts", 1))
    n_blocks = layers + sizes["drafts"]
    for key, hf in (("exp", "expert_swiglu_limit_list"), ("shexp", "share_expert_swiglu_limit_list")):
        limits = config.get(hf)
        if limits is None:
            continue
        if not isinstance(limits, list) or not all(value is None or type(value) in (int, float) for value in limits):
            raise config.error(hf, "is not a list of numbers")
        given = [0.0 if value is None else float(value) for value in limits[:n_blocks]]
        facts.array(f"swiglu_clamp_{key}", given + [0.0] * (n_blocks - len(given)), ValueType.FLOAT32)


def _exp(values: F32Array) -> F32Array:
    return -negative_exp(values)


_BAILING3 = Architecture(
    "bailingmoe3",
    (
        *NORMS,
        either(
            (
                *latent_attention("attention", "dense"),
                tensor("attention.g_proj.weight", "attn_gate.weight", "heads embd"),
            ),
            _delta_attention(
                "attention", tensor("attention.A_log", "ssm_a", "heads", computed("heads 1", _exp)),
                tensor("attention.f_proj.weight", "ssm_f_a.weight", "delta embd"),
                tensor("attention.g_proj.weight", "ssm_g_a.weight", "delta embd"),
                out="dense",
            ),
        ),
        either((*experts(), *SELECTION_BIAS, *SHARED), FEED_FORWARD),
    ),
    embedding="word_embeddings", sizes=_ling_sizes, entries=_ling_entries, extra_layers="num_nextn_predict_layers",
    draft=(*DRAFT, *optional(norm("final_layernorm", "layer_output_norm"))),
    keys=(
        *VOCAB_SIZE, *_COUNTS, *_SCALE, *flags(expert_weights_norm="norm_topk_prob", kda__safe_gate="kda_safe_gate"),
        *counts(expert_shared_feed_forward_length="moe_shared_expert_intermediate_size"),
    ),
    fixed={"no_kda_lora": True, "kda_safe_gate": True, "gated_attention_proj_granularity_type": "head_wise"},
)  # fmt: skip

CLASSES = {
    "KimiLinearForCausalLM": _KIMI_LINEAR,
    "KimiLinearModel": _KIMI_LINEAR,
    "KimiK3ForConditionalGeneration": _KIMI_K3,
    "Glm5NextForConditionalGeneration": _GLM5_NEXT,
    "BailingMoeV3ForCausalLM": _BAILING3,
    "BailingMoeV3VLForConditionalGeneration": _BAILING3,
}
