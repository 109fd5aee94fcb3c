"""DeepSeek, and models with its latent attention: Kimi, GLM 4.7 Flash, Mistral 4, Youtu, MiniCPM 3."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qrun.formats.tensors import SourceTensor
from qrun.models.huggingface.changes import ordered, then, transposed
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import Facts
from qrun.models.huggingface.layout import (
    DRAFT,
    FEED_FORWARD,
    NORMS,
    VOCAB_SIZE,
    Architecture,
    Change,
    Mapped,
    Part,
    Sizes,
    attention,
    counts,
    either,
    experts,
    gated,
    layer_norm,
    linear,
    maybe,
    norm,
    optional,
    tensor,
)


def latent_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    heads, rank = sizes["heads"], config.integer("kv_lora_rank", 512)
    plain, turned = config.integer("qk_nope_head_dim", 128), config.integer("qk_rope_head_dim", 64, low=0)
    value = config.integer("v_head_dim", 128)
    return {
        "kv_rank": rank, "q_rank": config.integer("q_lora_rank", 1536), "plain_dim": plain, "turned_dim": turned,
        "value_dim": value, "latent_q": heads * (plain + turned), "latent_kv": rank + turned,
        "kv_b": heads * (plain + value), "values": heads * value, "kv_heads": 1, "head": rank + turned,
        "value_head": rank, "heads_for_keys": heads,
    }  # fmt: skip


def _half(which: str) -> Change:
    """kv_b_proj holds for each head first what makes keys, then what makes values, of what is kept of a token. Files
    have both apart, and the first turned about, as queries are multiplied by it."""

    def change(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
        heads, plain, value = sizes["heads_for_keys"], sizes["plain_dim"], sizes["value_dim"]
        rows = np.arange(heads * (plain + value)).reshape(heads, plain + value)
        chosen = rows[:, :plain] if which == "k" else rows[:, plain:]
        return ordered(tensor, chosen.reshape(-1), (heads, chosen.shape[1], tensor.shape[-1]))

    return then(change, transposed) if which == "k" else change


def latent_attention(block: str = "self_attn", out: str = "o_proj") -> tuple[Part, ...]:
    """What other kinds of attention do not have comes first."""
    return (
        *linear(f"{block}.kv_a_proj_with_mqa", "attn_kv_a_mqa", "latent_kv", "embd"),
        norm(f"{block}.kv_a_layernorm", "attn_kv_a_norm", "kv_rank"),
        tensor(f"{block}.kv_b_proj.weight", "attn_k_b.weight", "kv_b kv_rank", _half("k")),
        tensor(f"{block}.kv_b_proj.weight", "attn_v_b.weight", "kv_b kv_rank", _half("v")),
        either(
            (
                *linear(f"{block}.q_a_proj", "attn_q_a", "q_rank", "embd"),
                norm(f"{block}.q_a_layernorm", "attn_q_a_norm", "q_rank"),
                tensor(f"{block}.q_b_proj.weight", "attn_q_b.weight", "latent_q q_rank"),
            ),
            linear(f"{block}.q_proj", "attn_q", "latent_q", "embd"),
        ),
        *linear(f"{block}.{out}", "attn_output", "embd", "values"),
    )


LATENT_ATTENTION = latent_attention()
MIXTURE: tuple[Part, ...] = (
    *experts(),
    *optional(tensor("mlp.gate.e_score_correction_bias", "exp_probs_b.bias", "experts")),
    *gated("mlp.shared_experts", end="_shexp", width="*"),
)


def latent_entries(facts: Facts) -> None:
    config, sizes = facts.config, facts.sizes
    rope = config.rope()
    has_experts = config.get("n_routed_experts") is not None
    if not has_experts:
        for key in ("expert_count", "expert_used_count"):
            facts.entries.remove(f"{facts.name}.{key}")
    facts.count("leading_dense_block_count",
                config.integer("first_k_dense_replace", 0 if has_experts else sizes["layers"], low=0))  # fmt: skip
    if config.get("q_lora_rank") is not None:
        facts.count("attention.q_lora_rank", sizes["q_rank"])
    facts.count("attention.kv_lora_rank", sizes["kv_rank"])
    facts.count("attention.value_length", sizes["kv_rank"])
    facts.count("attention.key_length_mla", sizes["plain_dim"] + sizes["turned_dim"])
    facts.count("attention.value_length_mla", sizes["value_dim"])
    facts.count("expert_feed_forward_length", config.integer("moe_intermediate_size", sizes["ff"]))
    facts.count("expert_shared_count", config.integer("n_shared_experts", 0, low=0))
    if config.get("routed_scaling_factor") is not None:
        facts.real("expert_weights_scale", config.real("routed_scaling_factor"))
    if config.flag("norm_topk_prob"):
        facts.flag("expert_weights_norm", True)
    facts.count("rope.dimension_count", sizes["turned_dim"])
    if rope.get("mscale_all_dim") is not None:
        facts.real("rope.scaling.yarn_log_multiplier", 0.1 * rope.real("mscale_all_dim"))


_LATENT = Architecture(
    "deepseek2", (*NORMS, *LATENT_ATTENTION, either(MIXTURE, FEED_FORWARD)), sizes=latent_sizes,
    entries=latent_entries, keys=VOCAB_SIZE, dropped_layers=True,
    defaults={"num_experts_per_tok": 1, "num_experts": 1}, fixed={"rope_interleave": True, "moe_layer_freq": 1},
)  # fmt: skip
_GLM_LITE = replace(
    _LATENT, defaults=dict(_LATENT.defaults) | {"scoring_func": "sigmoid"}, dropped_layers=False,
    extra_layers="num_nextn_predict_layers", draft=DRAFT,
)  # fmt: skip
MISTRAL4 = replace(_LATENT, name="mistral4")


def _deepseek_entries(facts: Facts) -> None:
    facts.real("expert_weights_scale", 1.0)
    facts.text("rope.scaling.type", "none")


# With an indexer, which chooses what attention looks at.

INDEXER: tuple[Part, ...] = (
    tensor("self_attn.indexer.wq_b.weight", "indexer.attn_q_b.weight", "* q_rank"),
    tensor("self_attn.indexer.wk.weight", "indexer.attn_k.weight", "index_dim embd"),
    tensor("self_attn.indexer.weights_proj.weight", "indexer.proj.weight", "* embd"),
    *layer_norm("self_attn.indexer.k_norm", "indexer.k_norm", "index_dim"),
)


INDEX_KEYS = counts(
    attention__indexer__head_count="index_n_heads", attention__indexer__key_length="index_head_dim",
    attention__indexer__top_k="index_topk",
)  # fmt: skip


def indexed_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    return latent_sizes(config, sizes) | {"index_dim": config.integer("index_head_dim", 128)}


def _indexed_entries(facts: Facts) -> None:
    config = facts.config
    latent_entries(facts)
    facts.count("attention.indexer.head_count", config.integer("index_n_heads"))
    facts.count("attention.indexer.key_length", facts.sizes["index_dim"])
    facts.count("attention.indexer.top_k", config.integer("index_topk"))
    layers = config.get("layer_types")
    if isinstance(layers, list) and any(kind != "indexed_attention" for kind in layers):
        raise config.error("layer_types", "has others than 'indexed_attention', which is not supported")
    kinds = config.get("indexer_types")
    if isinstance(kinds, list):
        facts.flags("attention.indexer.types", [kind == "full" for kind in kinds])


_INDEXED = replace(
    _LATENT, name="deepseek32", layer=(*NORMS, *LATENT_ATTENTION, maybe(*INDEXER), either(MIXTURE, FEED_FORWARD)),
    sizes=indexed_sizes, entries=_indexed_entries, dropped_layers=False, extra_layers="num_nextn_predict_layers",
    draft=DRAFT,
)  # fmt: skip

# MiniCPM 3: keys and values stay together.


def _minicpm3_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    found = latent_sizes(config, sizes)
    head = found["plain_dim"] + found["turned_dim"]
    return found | {"kv_heads": sizes["kv_heads"], "head": head, "rope_head": found["turned_dim"]}


def _minicpm3_entries(facts: Facts) -> None:
    facts.count("attention.q_lora_rank", facts.sizes["q_rank"])
    facts.count("attention.kv_lora_rank", facts.sizes["kv_rank"])
    facts.count("attention.value_length", facts.sizes["value_dim"])
    facts.count("rope.dimension_count", facts.sizes["turned_dim"])


_MINICPM3 = Architecture(
    "minicpm3",
    (
        *NORMS,
        *(part for part in LATENT_ATTENTION if not (isinstance(part, Mapped) and "kv_b_proj" in part.hf)),
        tensor("self_attn.kv_b_proj.weight", "attn_kv_b.weight", "kv_b kv_rank"),
        *FEED_FORWARD,
    ),
    sizes=_minicpm3_sizes, entries=_minicpm3_entries, keys=VOCAB_SIZE,
    fixed={"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256},
)  # fmt: skip

_DEEPSEEK = Architecture(
    "deepseek",
    (*NORMS, *attention(permuted=True), either(MIXTURE, FEED_FORWARD)),
    rotated="all", entries=_deepseek_entries, fixed={"routed_scaling_factor": 1.0},
    keys=(
        *VOCAB_SIZE,
        *counts(
            leading_dense_block_count="first_k_dense_replace", expert_feed_forward_length="moe_intermediate_size",
            expert_shared_count="n_shared_experts",
        ),
    ),
)  # fmt: skip

# DeepSeek-OCR's language model: plain attention.


def _ocr_entries(facts: Facts) -> None:
    config = facts.config
    facts.count("rope.dimension_count", config.integer("qk_rope_head_dim", 0, low=0))  # which engines pass over
    if config.get("routed_scaling_factor") is not None:
        facts.real("expert_weights_scale", config.real("routed_scaling_factor"))
    if config.flag("norm_topk_prob"):
        facts.flag("expert_weights_norm", True)
    window = next((key for key in ("sliding_window_size", "sliding_window") if config.get(key)), None)
    if window is not None:
        facts.count("attention.sliding_window", config.integer(window))


def _ocr_name(name: str, sizes: Sizes) -> str:
    """Without what looks at images."""
    return "" if name.startswith(("sam_model.", "qwen2_model.")) else name


_OCR = replace(
    _DEEPSEEK, name="deepseek2-ocr", layer=(*NORMS, *attention(), either(MIXTURE, FEED_FORWARD)), rotated="",
    entries=_ocr_entries, rename=_ocr_name, fixed={"use_mla": False, "lm_head": True},
)  # fmt: skip

CLASSES = {
    "DeepseekForCausalLM": _DEEPSEEK,
    "DeepseekOCRForCausalLM": _OCR,
    "UnlimitedOCRForCausalLM": _OCR,
    "DeepseekV2ForCausalLM": _LATENT,
    "DeepseekV3ForCausalLM": _LATENT,
    "KimiVLForConditionalGeneration": _LATENT,
    "KimiK25ForConditionalGeneration": _LATENT,
    "DeepseekV32ForCausalLM": _INDEXED,
    "GlmMoeDsaForCausalLM": replace(_INDEXED, name="glm-dsa"),
    "MiniCPM3ForCausalLM": _MINICPM3,
    "YoutuForCausalLM": _LATENT,
    "YoutuVLForConditionalGeneration": _LATENT,
    "Glm4MoeLiteForCausalLM": _GLM_LITE,
}
