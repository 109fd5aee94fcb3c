"""Granite: Llama with factors of its own, mixtures of experts, and hybrids with Mamba 2."""

from __future__ import annotations

from dataclasses import replace

from qrun.models.huggingface.changes import part
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import Facts
from qrun.models.huggingface.families.recurrent import MAMBA2_MIXER, mamba2_entries, mamba2_sizes
from qrun.models.huggingface.layout import (
    FEED_FORWARD,
    NORMS,
    VOCAB_SIZE,
    Architecture,
    Part,
    Sizes,
    attention,
    counts,
    either,
    maybe,
    norm,
    optional,
    reals,
    tensor,
)

_FACTORS = reals(
    attention__scale="attention_multiplier", embedding_scale="embedding_multiplier",
    residual_scale="residual_multiplier", logit_scale="logits_scaling",
)  # fmt: skip
_SHARED_LENGTH = counts(expert_shared_feed_forward_length="shared_intermediate_size")


def _experts(fused: bool = False) -> tuple[Part, ...]:
    both = "block_sparse_moe.input_linear.weight"
    halves = (
        (tensor(both, "ffn_gate_up_exps.weight", "experts * embd"),) if fused else
        (tensor(both, "ffn_gate_exps.weight", "experts * embd", part(0, 2)),
         tensor(both, "ffn_up_exps.weight", "experts * embd", part(1, 2)))
    )  # fmt: skip
    return (
        tensor("block_sparse_moe.router.layer.weight", "ffn_gate_inp.weight", "experts embd"),
        *halves,
        tensor("block_sparse_moe.output_linear.weight", "ffn_down_exps.weight", "experts embd expert_ff"),
    )


def _shared(end: str) -> tuple[Part, ...]:
    return (
        tensor("shared_mlp.input_linear.weight", f"ffn_gate{end}.weight", "* embd", part(0, 2)),
        tensor("shared_mlp.input_linear.weight", f"ffn_up{end}.weight", "* embd", part(1, 2)),
        tensor("shared_mlp.output_linear.weight", f"ffn_down{end}.weight", "embd *"),
    )


def _sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    return {"experts": config.integer("num_local_experts", 0, low=0), "expert_ff": sizes["ff"]}


_FEED_FORWARD = either((*_experts(), maybe(*_shared("_shexp"))), _shared(""), FEED_FORWARD)
_GRANITE = Architecture(
    "granite", (*NORMS, *attention(permuted=True), *FEED_FORWARD), keys=(*VOCAB_SIZE, *_FACTORS), rotated="all",
    defaults={"tie_word_embeddings": False},
)  # fmt: skip
_GRANITE_MOE = replace(
    _GRANITE, name="granitemoe", layer=(*NORMS, *attention(permuted=True), _FEED_FORWARD), sizes=_sizes,
    keys=(*VOCAB_SIZE, *_FACTORS, *_SHARED_LENGTH),
)  # fmt: skip


# Hybrids


ATTENTION = ("attention", "full_attention")


def _is_attention(config: Config, n_layers: int) -> list[bool]:
    if (kinds := config.layer_kinds(n_layers)) is not None:
        return [kind in ATTENTION for kind in kinds]
    indices = config.get("attn_layer_indices")
    if isinstance(indices, list) and indices:
        return [layer in indices for layer in range(n_layers)]
    if config.get("attn_layer_period") is None:
        raise config.error("layer_types", f"is not a list of {n_layers} kinds")
    period, offset = config.integer("attn_layer_period"), config.integer("attn_layer_offset", low=0)
    return [layer % period == offset for layer in range(n_layers)]


def _hybrid_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    return _sizes(config, sizes) | mamba2_sizes(config, sizes)


def _hybrid_entries(facts: Facts) -> None:
    config, sizes = facts.config, facts.sizes
    mamba2_entries(facts)
    attends = _is_attention(config, sizes["layers"])
    if config.get("attn_rotary_emb") is not None:
        facts.count("rope.dimension_count", config.integer("attn_rotary_emb"))
    facts.array("attention.head_count_kv", [sizes["kv_heads"] * there for there in attends])
    positions = all(attends) or (config.get("architectures") or [""])[0] == "BambaForCausalLM"
    facts.flag("rope.scaling.finetuned", positions)
    if not positions:
        facts.count("context_length", 1 << 20)


_NORMS = (norm("input_layernorm", "attn_norm"), either(
    (norm("post_attention_layernorm", "ffn_norm"),), (norm("pre_ff_layernorm", "ffn_norm"),)
))  # fmt: skip
_FORWARD = either((*_experts(), maybe(*_shared("_shexp"))), _shared(""), tuple(
    replace(one, hf=one.hf.replace("mlp.", "feed_forward.")) for one in FEED_FORWARD
))  # fmt: skip


def _all_attention(config: Config) -> Architecture | None:
    """Those without a layer with a state are models of the other kinds, whatever their class."""
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or any(kind not in ATTENTION for kind in kinds):
        return None
    name = "granitemoe" if config.get("num_experts_per_tok") is not None else "granite"
    return replace(_HYBRID, name=name)


_HYBRID = replace(
    _GRANITE_MOE, name="granitehybrid",
    layer=(*_NORMS, either(attention(permuted=True), MAMBA2_MIXER), _FORWARD), sizes=_hybrid_sizes,
    entries=_hybrid_entries, variant=_all_attention,
    outer=(either((norm("norm", "output_norm"),), (norm("final_layernorm", "output_norm"),)),),
)  # fmt: skip


# With windows


def _window_entries(facts: Facts) -> None:
    config, n_layers = facts.config, facts.sizes["layers"]
    facts.count("attention.sliding_window", config.integer("sliding_window", 128))
    kinds = config.layer_kinds(n_layers)
    usual = [layer % 4 != 0 for layer in range(n_layers)]
    sliding = usual if kinds is None else [kind == "sliding_attention" for kind in kinds]
    facts.flags("attention.sliding_window_pattern", sliding)
    turned = config.get("no_rope_layers") or config.get("layer_rope_theta")
    if isinstance(turned, list) and (config.get("no_rope_layers") or not all(turned)):
        facts.flags("attention.rope_pattern", [bool(layer) for layer in turned])


_SWA = replace(
    _GRANITE, name="granite_swa", entries=_window_entries, sizes=_sizes,
    layer=(
        *NORMS, *attention(permuted=True), *optional(tensor("self_attn.sinks", "attn_sinks.weight", "heads")),
        either(_experts(fused=True), FEED_FORWARD),
    ),
)  # fmt: skip

_MOE_SWA = replace(
    _SWA, keys=(*VOCAB_SIZE, *_FACTORS, *_SHARED_LENGTH),
    layer=(
        *NORMS, *attention(permuted=True), *optional(tensor("self_attn.sinks", "attn_sinks.weight", "heads")),
        either(
            (
                either(
                    _experts(fused=True),
                    (
                        tensor("block_sparse_moe.router.weight", "ffn_gate_inp.weight", "experts embd"),
                        tensor("block_sparse_moe.experts.gate_up_proj", "ffn_gate_up_exps.weight", "experts * embd"),
                        tensor("block_sparse_moe.experts.down_proj", "ffn_down_exps.weight", "experts embd expert_ff"),
                    ),
                ),
                maybe(
                    tensor("shared_mlp.input_linear.weight", "ffn_up_shexp.weight", "* embd"),
                    tensor("shared_mlp.output_linear.weight", "ffn_down_shexp.weight", "embd *"),
                ),
            ),
            FEED_FORWARD,
        ),
    ),
)  # fmt: skip



def _speech_entries(facts: Facts) -> None:
    for key in ("encoder_config", "projector_config", "downsample_rate", "window_size", "has_lora_adapter"):
        facts.config.get(key)


_SPEECH = replace(_GRANITE, within="language_model.", entries=_speech_entries)

CLASSES = {
    "GraniteForCausalLM": _GRANITE,
    "GraniteSpeechForConditionalGeneration": _SPEECH,
    "GraniteSpeechPlusForConditionalGeneration": _SPEECH,
    "GraniteMoeForCausalLM": _GRANITE_MOE,
    "GraniteMoeSharedForCausalLM": _GRANITE_MOE,
    "GraniteMoeHybridForCausalLM": _HYBRID,
    "BambaForCausalLM": _HYBRID,
    "GraniteSWAForCausalLM": _SWA,
    "GraniteMoeSWAForCausalLM": _MOE_SWA,
}
