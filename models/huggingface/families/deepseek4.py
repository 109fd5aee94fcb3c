"""DeepSeek V4, under the names of its makers: matrices of 8-bit floats, experts of 4-bit ones, and tables that choose
experts by the token."""

from __future__ import annotations

from qrun.formats import ValueType
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import Facts
from qrun.models.huggingface.families.deepseek import INDEX_KEYS
from qrun.models.huggingface.layout import (
    Architecture,
    Experts,
    Indices,
    Part,
    Sizes,
    counts,
    either,
    flags,
    hyper_connection,
    maybe,
    norm,
    optional,
    reals,
    tensor,
)
from qrun.models.hyperparameters import MAX_CONTEXT, MAX_HEADS, MAX_LAYERS


def _compressor(of: str, gguf: str) -> tuple[Part, ...]:
    """What makes one entry of several positions."""
    return (
        tensor(f"{of}.wkv.weight", f"{gguf}_kv.weight", "* embd"),
        tensor(f"{of}.wgate.weight", f"{gguf}_gate.weight", "* embd"),
        tensor(f"{of}.ape", f"{gguf}_ape.weight", "* *"),
        norm(f"{of}.norm", f"{gguf}_norm", "*"),
    )


def _experts(inner: str, gguf: str, shape: str) -> Experts:
    return Experts(f"ffn.experts.{{}}.{inner}.weight", f"{gguf}_exps.weight", tuple(shape.split()))


_LAYER: tuple[Part, ...] = (
    norm("attn_norm", "attn_norm"), norm("ffn_norm", "ffn_norm"),
    *hyper_connection("hc_attn", "hc_attn"), *hyper_connection("hc_ffn", "hc_ffn"),
    tensor("attn.attn_sink", "attn_sinks.weight", "heads"),
    tensor("attn.wq_a.weight", "attn_q_a.weight", "q_rank embd"),
    norm("attn.q_norm", "attn_q_a_norm", "q_rank"),
    tensor("attn.wq_b.weight", "attn_q_b.weight", "q q_rank"),
    tensor("attn.wkv.weight", "attn_kv.weight", "head embd"),
    norm("attn.kv_norm", "attn_kv_a_norm", "head"),
    tensor("attn.wo_a.weight", "attn_output_a.weight", "groups_out group_in"),
    tensor("attn.wo_b.weight", "attn_output_b.weight", "embd groups_out"),
    maybe(*_compressor("attn.compressor", "attn_compressor")),
    maybe(
        tensor("attn.indexer.wq_b.weight", "indexer.attn_q_b.weight", "* q_rank"),
        tensor("attn.indexer.weights_proj.weight", "indexer.proj.weight", "* embd"),
        *_compressor("attn.indexer.compressor", "indexer_compressor"),
    ),
    tensor("ffn.gate.weight", "ffn_gate_inp.weight", "experts embd"),
    either(
        (Indices("ffn.gate.tid2eid", "ffn_gate_tid2eid.weight", ("vocab", "used")),),
        (tensor("ffn.gate.bias", "exp_probs_b.bias", "experts"),),
    ),
    *optional(tensor("ffn.gate.bias_vl", "exp_probs_b_vl.bias", "experts")),
    _experts("w1", "ffn_gate", "expert_ff embd"), _experts("w3", "ffn_up", "expert_ff embd"),
    _experts("w2", "ffn_down", "embd expert_ff"),
    tensor("ffn.shared_experts.w1.weight", "ffn_gate_shexp.weight", "* embd"),
    tensor("ffn.shared_experts.w3.weight", "ffn_up_shexp.weight", "* embd"),
    tensor("ffn.shared_experts.w2.weight", "ffn_down_shexp.weight", "embd *"),
)  # fmt: skip


def _sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    groups = config.integer("o_groups", high=MAX_HEADS)
    if sizes["q"] % groups:
        raise config.error("o_groups", f"is {groups}, which does not divide {sizes['q']}")
    return {
        "q_rank": config.integer("q_lora_rank"), "groups_out": groups * config.integer("o_lora_rank"),
        "group_in": sizes["q"] // groups, "used": config.integer("num_experts_per_tok"),
    }  # fmt: skip


def _name(name: str, sizes: Sizes) -> str:
    """Without the layers that predict tokens further ahead, what sees, and biases where the token chooses experts."""
    if name.startswith(("mtp.", "aligner.", "image_")):
        return ""
    layers, _, rest = name.partition(".")
    layer, _, inner = rest.partition(".")
    if layers == "layers" and inner == "ffn.gate.bias" and layer.isdecimal() and len(layer) <= 4:
        return "" if int(layer) < sizes.config.integer("num_hash_layers", 0, low=0, high=MAX_LAYERS) else name
    return name


def _entries(facts: Facts) -> None:
    config, n_layers = facts.config, facts.sizes["layers"]
    config.get("expert_dtype")  # weights say it themselves
    for key in ("swiglu_clamp_exp", "swiglu_clamp_shexp"):
        facts.array(key, [config.real("swiglu_limit", 0.0)] * n_layers, ValueType.FLOAT32)
    facts.array("attention.compress_ratios", config.integers("compress_ratios", low=0, high=MAX_CONTEXT))
    facts.count("embedding_length_out", facts.sizes["embd"] * config.integer("hc_mult", high=64))


DEEPSEEK4 = Architecture(
    "deepseek4", _LAYER, embedding="embed", head="head", ffn=False, sizes=_sizes, entries=_entries, rename=_name,
    outer=(norm("norm", "output_norm"), *hyper_connection("hc_head", "output_hc")),
    keys=(
        *counts(
            rope__dimension_count="qk_rope_head_dim", attention__q_lora_rank="q_lora_rank",
            attention__sliding_window="sliding_window", expert_feed_forward_length="moe_intermediate_size",
            expert_shared_count="n_shared_experts",
        ),
        *INDEX_KEYS,
        *counts(
            attention__output_group_count="o_groups", attention__output_lora_rank="o_lora_rank",
            hyper_connection__count="hc_mult", hyper_connection__sinkhorn_iterations="hc_sinkhorn_iters",
            hash_layer_count="num_hash_layers",
        ),
        *reals(
            expert_weights_scale="routed_scaling_factor", attention__compress_rope_freq_base="compress_rope_theta",
            hyper_connection__epsilon="hc_eps",
        ),
        *flags(expert_weights_norm="norm_topk_prob"),
    ),
    routers_in_full=False, eight_bits_kept=True,
)  # fmt: skip
CLASSES = {"DeepseekV4ForCausalLM": DEEPSEEK4}
