"""Dense models that belong to no other family: Exaone, Ernie, Hunyuan, MiniCPM, Muse."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

from qrun.models.huggingface.changes import computed, part, rows
from qrun.models.huggingface.entries import Facts
from qrun.models.huggingface.families.qwen import draft_layers
from qrun.models.huggingface.layout import (
    DRAFT,
    FEED_FORWARD,
    NORMS,
    VOCAB_SIZE,
    Architecture,
    Made,
    Part,
    Sizes,
    attention,
    either,
    gated,
    linear,
    norm,
    tensor,
)
from qrun.models.hyperparameters import MAX_CONTEXT

# Exaone


def _exaone4_entries(facts: Facts) -> None:
    config, n_layers = facts.config, facts.sizes["layers"]
    if config.get("sliding_window") is None:
        return
    facts.count("attention.sliding_window", config.integer("sliding_window"))
    kinds, pattern = config.layer_kinds(n_layers), config.get("sliding_window_pattern")
    if kinds is not None:
        sliding = [kind == "sliding_attention" for kind in kinds]
    elif isinstance(pattern, str) and pattern:  # LLLG
        sliding = [pattern[layer % len(pattern)] == "L" for layer in range(n_layers)]
    elif isinstance(pattern, int) and pattern > 0:
        sliding = [(layer + 1) % pattern != 0 for layer in range(n_layers)]
    else:
        return
    facts.flags("attention.sliding_window_pattern", sliding)


_EXAONE4 = Architecture(
    "exaone4",
    (
        norm("post_attention_layernorm", "post_attention_norm"),
        norm("post_feedforward_layernorm", "post_ffw_norm"),
        norm("self_attn.q_norm", "attn_q_norm", "head"),
        norm("self_attn.k_norm", "attn_k_norm", "head"),
        *attention(), *FEED_FORWARD,
    ),
    keys=VOCAB_SIZE, entries=_exaone4_entries, defaults={"rms_norm_eps": 1e-5}, rename=draft_layers,
    extra_layers="num_nextn_predict_layers", draft=DRAFT,
)  # fmt: skip

# Ernie: the three matrices of attention and the two of the feed-forward layer are one each in its makers' files.

_ERNIE_LAYER: tuple[Part, ...] = (
    *NORMS,
    either(
        (
            tensor("self_attn.qkv_proj.weight", "attn_q.weight", "qkv embd", rows("0", "q")),
            tensor("self_attn.qkv_proj.weight", "attn_k.weight", "qkv embd", rows("q", "kv")),
            tensor("self_attn.qkv_proj.weight", "attn_v.weight", "qkv embd", rows("q+kv", "kv")),
            *linear("self_attn.o_proj", "attn_output", "embd", "q"),
        ),
        attention(),
    ),
    either(
        (
            tensor("mlp.up_gate_proj.weight", "ffn_gate.weight", "twice_ff embd", part(0, 2)),
            tensor("mlp.up_gate_proj.weight", "ffn_up.weight", "twice_ff embd", part(1, 2)),
            *linear("mlp.down_proj", "ffn_down", "embd", "ff"),
        ),
        FEED_FORWARD,
    ),
)
_ERNIE = Architecture("ernie4_5", _ERNIE_LAYER, defaults={"rms_norm_eps": 1e-5, "rope_theta": 500000.0})



def _without_projector(name: str, sizes: Sizes) -> str:
    """Without what makes rows of images."""
    return "" if name.startswith("mlp_AR.") else name


# Hunyuan: a base of rope that grows with a factor of its own.


def _hunyuan_entries(facts: Facts) -> None:
    config, head = facts.config, facts.sizes["head"]
    rope = config.rope()
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ("dynamic", "xdrope") or rope.get("alpha") is None or head <= 2:
        return
    base = rope.real("rope_theta", config.real("rope_theta", 10000.0))
    facts.real("rope.freq_base", base * rope.real("alpha", high=1e6) ** (head / (head - 2)))
    facts.text("rope.scaling.type", "none")
    facts.real("rope.scaling.factor", 1.0)
    if kind == "dynamic":
        facts.count("rope.scaling.original_context_length", 1 << 18)
        facts.count("context_length", 1 << 18)


_HUNYUAN = Architecture(
    "hunyuan-dense",
    (
        *NORMS, *attention(), *FEED_FORWARD,
        norm("self_attn.query_layernorm", "attn_q_norm", "head"),
        norm("self_attn.key_layernorm", "attn_k_norm", "head"),
    ),
    entries=_hunyuan_entries, defaults={"rms_norm_eps": 1e-5, "head_dim": 128},
)  # fmt: skip



def _hunyuan_vl_entries(facts: Facts) -> None:
    """Here the factor stands in the file, and engines change the base."""
    config = facts.config
    rope = config.rope()
    if rope.text("rope_type", rope.text("type", "default")) not in ("xdrope", "dynamic") or rope.get("alpha") is None:
        return
    facts.real("rope.freq_base", rope.real("rope_theta", config.real("rope_theta", 10000.0)))
    facts.real("rope.scaling.alpha", rope.real("alpha", high=1e6))
    facts.text("rope.scaling.type", "none")
    facts.real("rope.scaling.factor", rope.real("factor", 1.0, high=1e6))
    facts.count("rope.scaling.original_context_length", config.integer("max_position_embeddings", high=MAX_CONTEXT))
    key = "xdrope_section" if rope.get("xdrope_section") is not None else "mrope_section"
    facts.array("rope.dimension_sections", rope.integers(key, low=0))


# MiniCPM


def _minicpm_entries(facts: Facts) -> None:
    config, sizes = facts.config, facts.sizes
    facts.real("embedding_scale", config.real("scale_emb", 1.0))
    facts.real("residual_scale", config.real("scale_depth", 1.0) / sqrt(sizes["layers"]))
    facts.real("logit_scale", sizes["embd"] / config.real("dim_model_base", float(sizes["embd"]), low=1.0))


_MINICPM = Architecture(
    "minicpm", (*NORMS, *attention(permuted=True), *FEED_FORWARD), entries=_minicpm_entries,
    defaults={"rms_norm_eps": 1e-5},
)  # fmt: skip

# Muse: queries and keys are made of one length, and that of queries is multiplied by a factor.


def _muse_entries(facts: Facts) -> None:
    config = facts.config
    facts.real("final_logit_softcapping", config.real("final_logit_softcapping"))
    facts.real("logit_scale", config.real("output_multiplier"))
    facts.count("attention.sliding_window", config.integer("sliding_window"))
    sliding = [kind == "sliding_attention" for kind in config.required_layer_kinds(facts.sizes["layers"])]
    facts.flags("attention.sliding_window_pattern", sliding)
    bases = config.get("layer_rope_theta")  # rope turns in layers with a window, and nowhere else
    if isinstance(bases, list) and [bool(base) for base in bases] != sliding:
        raise config.error("layer_rope_theta", "is not 0 for the layers that see everything, and for those alone")


_MUSE = Architecture(
    "muse-glimmer",
    (
        norm("input_layernorm", "attn_norm"),
        norm("post_attention_layernorm", "post_attention_norm"),
        norm("pre_feedforward_layernorm", "ffn_norm"),
        norm("post_feedforward_layernorm", "post_ffw_norm"),
        *attention(permuted=True), *FEED_FORWARD,
        *linear("self_attn.gate_proj", "attn_gate", "*", "embd"),
        Made("attn_q_norm.weight",
             lambda config, sizes: [config.real("qk_scale_factor")] * sizes["head"]),
        Made("attn_k_norm.weight", lambda config, sizes: [1.0] * sizes["head"]),
    ),
    norm_shift=1.0, outer=(tensor("norm.weight", "output_norm.weight", "embd", computed("embd")),),
    entries=_muse_entries, fixed={"post_norm_eps": 1e-8},
)  # fmt: skip

CLASSES = {
    "ExaoneForCausalLM": Architecture(
        "exaone",
        (
            norm("ln_1", "attn_norm"),
            norm("ln_2", "ffn_norm"),
            *attention("attn.attention", out="out_proj"),
            *gated("mlp", "c_fc_0 c_fc_1 c_proj"),
        ),
        layers="h", embedding="wte", outer=(norm("ln_f", "output_norm"),), rotated="part",
    ),
    "Exaone4ForCausalLM": _EXAONE4,
    "Exaone4_5_ForConditionalGeneration": _EXAONE4,
    "Ernie4_5ForCausalLM": _ERNIE,
    "Ernie4_5_ForCausalLM": _ERNIE,
    "HunYuanDenseV1ForCausalLM": _HUNYUAN,
    "HunYuanVLForConditionalGeneration": replace(_HUNYUAN, name="hunyuan_vl", entries=_hunyuan_vl_entries),
    "PaddleOCRVLForConditionalGeneration": replace(_ERNIE, name="paddleocr", rename=_without_projector),
    "MiniCPMForCausalLM": _MINICPM,
    "MuseGlimmerForConditionalGeneration": _MUSE,
}
