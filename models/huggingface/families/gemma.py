"""Gemma of all generations."""

from __future__ import annotations

import re
from math import inf
from statistics import NormalDist

import numpy as np

from qrun.formats import ValueType
from qrun.models.huggingface.changes import padded_rows
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import Facts
from qrun.models.huggingface.layout import (
    FEED_FORWARD,
    FOUR_NORMS,
    GELU,
    NORMS,
    QK_NORMS,
    Architecture,
    Experts,
    Made,
    Sizes,
    attention,
    gated,
    linear,
    maybe,
    norm,
    optional,
    tensor,
)
from qrun.models.hyper_connections import MAX_STREAMS
from qrun.models.hyperparameters import MAX_HEAD_DIM

_GEMMA = {"head_dim": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "max_position_embeddings": 8192,
          "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip
_GEMMA3 = _GEMMA | {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208, "sliding_window": 4096,
                    "max_position_embeddings": 131072, "query_pre_attn_scalar": 256, "rope_theta": 1_000_000.0,
                    "rope_local_base_freq": 10000.0}  # fmt: skip
GEMMA3_TEXT = Architecture(
    "gemma3", (*FOUR_NORMS, *QK_NORMS, *attention(), *FEED_FORWARD), GELU, 1.0, _GEMMA3, "gemma"
)  # fmt: skip

# Of layers that take something of each token for themselves.
_PER_LAYER = (
    tensor("per_layer_input_gate.weight", "inp_gate.weight", "per_layer embd"),
    tensor("per_layer_projection.weight", "proj.weight", "embd per_layer"),
    norm("post_per_layer_input_norm", "post_norm"),
)

# Gemma 3n: four streams side by side (AltUp), a narrow path beside attention (LAuReL), gates of which only the largest
# values count, and something of each token for each layer.


def _common_entries(facts: Facts) -> list[bool]:
    """What files of Gemma 3n and 4 both say. Returns which layers see a window."""
    config, n_layers = facts.config, facts.sizes["layers"]
    if cap := config.real("final_logit_softcapping", 0.0):
        facts.real("final_logit_softcapping", cap)
    facts.count("attention.sliding_window", config.integer("sliding_window"))
    facts.count("attention.shared_kv_layers", config.integer("num_kv_shared_layers", 0, low=0, high=n_layers))
    facts.count("embedding_length_per_layer_input", facts.sizes["per_layer"])
    sliding = _kinds(config, n_layers)
    facts.flags("attention.sliding_window_pattern", sliding)
    return sliding


def _gemma3n_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    per_layer = config.integer("hidden_size_per_layer_input", 256)
    streams = config.integer("altup_num_inputs", 4, low=2, high=MAX_STREAMS)
    return {
        "per_layer": per_layer, "all_per_layer": per_layer * sizes["layers"],
        "laurel": config.integer("laurel_rank", 64),
        "per_layer_vocab": config.integer("vocab_size_per_layer_input", sizes["vocab"], high=sizes["vocab"]),
        "streams": streams, "other_streams": streams - 1, "streams_squared": streams * streams,
    }  # fmt: skip


def _deviations(share: float) -> float:
    """By how many standard deviations the largest values exceed the mean, where such a share of all is smaller."""
    return float(np.float32(NormalDist().inv_cdf(share))) if share > 0 else -inf


def _gemma3n_entries(facts: Facts) -> None:
    config, sizes = facts.config, facts.sizes
    _common_entries(facts)
    facts.count("altup.active_idx", config.integer("altup_active_idx", 0, low=0, high=sizes["other_streams"]))
    facts.count("altup.num_inputs", sizes["streams"])
    shares = config.reals("activation_sparsity_pattern", sizes["layers"])
    if not all(0 <= share < 1 for share in shares):
        raise config.error("activation_sparsity_pattern", "has a share that is not from 0 to 1")
    facts.array("activation_sparsity_scale", [_deviations(share) for share in shares], ValueType.FLOAT32)
    widths = config.integers("intermediate_size")
    if len(widths) not in (1, sizes["layers"]):
        raise config.error("intermediate_size", f"is not a list of {sizes['layers']} widths")
    if isinstance(config.get("intermediate_size"), list):
        facts.array("feed_forward_length", widths)


_GEMMA3N = Architecture(
    "gemma3n",
    (
        *FOUR_NORMS, *gated(width="*"), QK_NORMS[0],
        *linear("self_attn.q_proj", "attn_q", "q", "embd"), *linear("self_attn.o_proj", "attn_output", "embd", "q"),
        *optional(  # layers that use another one's keys and values may have none
            QK_NORMS[1],
            tensor("self_attn.k_proj.weight", "attn_k.weight", "kv embd"),
            tensor("self_attn.v_proj.weight", "attn_v.weight", "kv embd"),
        ),
        *(tensor(f"laurel.linear_{side}.weight", f"laurel_{side[0]}.weight", shape)
          for side, shape in (("left", "laurel embd"), ("right", "embd laurel"))),
        norm("laurel.post_laurel_norm", "laurel_post_norm"),
        tensor("altup.correct_output_scale", "altup_correct_scale.weight", "embd"),
        tensor("altup.correction_coefs.weight", "altup_correct_coef.weight", "streams streams"),
        tensor("altup.prediction_coefs.weight", "altup_predict_coef.weight", "streams_squared streams"),
        tensor("altup.modality_router.weight", "altup_router.weight", "streams embd"),
        norm("altup.router_norm", "altup_router_norm"),
        *_PER_LAYER,
    ),
    GELU, 0.0, {"tie_word_embeddings": True, "head_dim": 256, "max_position_embeddings": 32768},
    outer=(
        norm("norm", "output_norm"),
        tensor("embed_tokens_per_layer.weight", "per_layer_token_embd.weight", "per_layer_vocab all_per_layer",
               padded_rows("vocab")),
        tensor("per_layer_model_projection.weight", "per_layer_model_proj.weight", "all_per_layer embd"),
        norm("per_layer_projection_norm", "per_layer_proj_norm", "per_layer"),
        Experts("altup_projections.{}.weight", "altup_proj.weight", ("embd", "embd"), count="other_streams"),
        Experts("altup_unembed_projections.{}.weight", "altup_unembd_proj.weight", ("embd", "embd"),
                count="other_streams"),
    ),
    sizes=_gemma3n_sizes, entries=_gemma3n_entries, fixed={"altup_correct_scale": True},
)  # fmt: skip

# Gemma 4: layers that see everything have wider heads, and may have fewer of them for keys; some models have a mixture
# of experts beside each feed-forward layer, and small ones something of each token for each layer.


def _kinds(config: Config, n_layers: int) -> list[bool]:
    return [kind == "sliding_attention" for kind in config.required_layer_kinds(n_layers)]


def _full_value(config: Config, key: str, inner: str) -> int | None:
    """Of layers that see everything: from a key of its own, or from what is said of single layers."""
    if config.get(key) is not None:
        return config.integer(key)
    single = config.get("per_layer_config")
    kinds = config.get("layer_types")
    both = isinstance(single, dict) and isinstance(kinds, list)
    for layer, values in single.items() if both else ():
        number = int(layer) if re.fullmatch(r"\d{1,9}", layer) else len(kinds)
        if number < len(kinds) and kinds[number] == "full_attention" and isinstance(values, dict) and inner in values:
            return Config(config.path, values, prefix=f"per_layer_config.{layer}.").integer(inner)
    return None


def _gemma4_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    per_layer = config.integer("hidden_size_per_layer_input", 0, low=0)
    full_head = _full_value(config, "global_head_dim", "head_dim") or sizes["head"]
    if full_head % 2 or not 0 < full_head <= MAX_HEAD_DIM:
        raise config.error("global_head_dim", f"is {full_head}, expected an even number up to {MAX_HEAD_DIM}")
    n_experts = config.integer("num_experts", 0, low=0) if config.flag("enable_moe_block") else 0
    return {
        "per_layer": per_layer, "all_per_layer": per_layer * sizes["layers"], "experts": n_experts,
        "per_layer_vocab": config.integer("vocab_size_per_layer_input", sizes["vocab"]),
        "expert_ff": config.integer("moe_intermediate_size", sizes["ff"]),
        "full_head": full_head,
    }  # fmt: skip


def _unrotated(config: Config, sizes: Sizes) -> list[float]:
    """Pairs of wide heads that rope does not turn: their frequencies are divided by so much that nothing is left."""
    full = config.section("rope_parameters").section("full_attention")
    pairs = sizes["full_head"] // 2
    turned = int(sizes["full_head"] * full.real("partial_rotary_factor", 1.0, high=1.0) / 2)
    return [1.0] * turned + [1e30] * (pairs - turned)


def _gemma4_entries(facts: Facts) -> None:
    config, sizes = facts.config, facts.sizes
    sliding = _common_entries(facts)
    for kind in ("key", "value"):
        facts.count(f"attention.{kind}_length", sizes["full_head"])
        facts.count(f"attention.{kind}_length_swa", sizes["head"])
    if config.get("moe_intermediate_size") is not None:
        facts.count("expert_feed_forward_length", config.integer("moe_intermediate_size"))
    if config.flag("use_double_wide_mlp"):
        first = sizes["layers"] - config.integer("num_kv_shared_layers", 0, low=0, high=sizes["layers"])
        facts.array("feed_forward_length", [sizes["ff"] * (1 + (il >= first)) for il in range(sizes["layers"])])
    full = _full_value(config, "num_global_key_value_heads", "num_key_value_heads")
    if full is not None:
        heads = [sizes["kv_heads"] if local else full for local in sliding]
        facts.array("attention.head_count_kv", heads)
    facts.count("rope.dimension_count", sizes["full_head"])
    facts.count("rope.dimension_count_swa", sizes["head"])


_GEMMA4 = Architecture(
    "gemma4",
    (
        *FOUR_NORMS,
        norm("self_attn.q_norm", "attn_q_norm", "*"),
        *linear("self_attn.q_proj", "attn_q", "*", "embd"),
        *linear("self_attn.o_proj", "attn_output", "embd", "*"),
        *optional(  # layers that use another one's keys and values have none, and some take their keys as values
            norm("self_attn.k_norm", "attn_k_norm", "*"),
            tensor("self_attn.k_proj.weight", "attn_k.weight", "* embd"),
            tensor("self_attn.v_proj.weight", "attn_v.weight", "* embd"),
            tensor("layer_scalar", "layer_output_scale.weight", "1"),
        ),
        *gated(width="*"),
        maybe(
            tensor("router.proj.weight", "ffn_gate_inp.weight", "experts embd"),
            tensor("router.scale", "ffn_gate_inp.scale", "embd"),
            tensor("router.per_expert_scale", "ffn_down_exps.scale", "experts"),
            tensor("experts.gate_up_proj", "ffn_gate_up_exps.weight", "experts * embd"),
            tensor("experts.down_proj", "ffn_down_exps.weight", "experts embd expert_ff"),
            norm("pre_feedforward_layernorm_2", "pre_ffw_norm_2"),
            norm("post_feedforward_layernorm_1", "post_ffw_norm_1"),
            norm("post_feedforward_layernorm_2", "post_ffw_norm_2"),
        ),
        maybe(*_PER_LAYER),
    ),
    GELU, 0.0, {"tie_word_embeddings": True, "head_dim": 256, "max_position_embeddings": 131072},
    outer=(
        norm("norm", "output_norm"),
        maybe(
            tensor("embed_tokens_per_layer.weight", "per_layer_token_embd.weight", "per_layer_vocab all_per_layer"),
            tensor("per_layer_model_projection.weight", "per_layer_model_proj.weight", "all_per_layer embd"),
            norm("per_layer_projection_norm", "per_layer_proj_norm", "per_layer"),
        ),
        Made("rope_freqs.weight", _unrotated),
    ),
    sizes=_gemma4_sizes, entries=_gemma4_entries,
)  # fmt: skip

CLASSES = {
    "GemmaForCausalLM": Architecture("gemma", (*NORMS, *attention(), *FEED_FORWARD), GELU, 1.0, _GEMMA),
    "Gemma2ForCausalLM": Architecture(
        "gemma2", (*FOUR_NORMS, *attention(), *FEED_FORWARD), GELU, 1.0,
        _GEMMA | {"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
                  "query_pre_attn_scalar": 256},
        "gemma",
    ),
    "Gemma3ForCausalLM": GEMMA3_TEXT,
    "Gemma3ForConditionalGeneration": GEMMA3_TEXT,
    "Gemma3nForCausalLM": _GEMMA3N,
    "Gemma3nForConditionalGeneration": _GEMMA3N,
    "Gemma4ForCausalLM": _GEMMA4,
    "Gemma4ForConditionalGeneration": _GEMMA4,
    "Gemma4UnifiedForConditionalGeneration": _GEMMA4,
}  # fmt: skip
