"""Models that are unlike all others: weights of three values, lightning attention, gains beside matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qrun.formats import FormatError
from qrun.formats.blocks.layout import F32Array
from qrun.formats.tensors import SourceTensor
from qrun.models.huggingface.changes import ChangedTensor, computed, decoded, floats_of, scaled
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import Facts
from qrun.models.huggingface.layout import (
    NORMS,
    SILU,
    Architecture,
    Mapped,
    Sizes,
    either,
    experts,
    linear,
    norm,
    tensor,
)

# BitNet: matrices are -1, 0 and 1 times their mean.

STEP = 1 << 20  # weights that are read at a time


@dataclass(frozen=True, eq=False)
class TernaryTensor(ChangedTensor):
    """A matrix, rounded to three values."""

    @cached_property
    def scale(self) -> np.float32:
        """The mean of all weights, whatever their sign."""
        step = max(1, STEP // max(self.row, 1))
        total = sum(
            float(np.abs(decoded(self.base, start, min(start + step, self.n_rows))).sum(dtype=np.float64))
            for start in range(0, self.n_rows, step)
        )
        return np.maximum(np.float32(total / max(self.n_rows * self.row, 1)), np.float32(1e-5))

    def rows(self, start: int, end: int) -> F32Array:
        inverse = np.float32(1) / self.scale
        return np.clip(np.rint(decoded(self.base, start, end) * inverse), -1, 1) / inverse


def _ternary(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
    return TernaryTensor(tensor.name, floats_of(tensor), tensor.shape, tensor)


def _of_three(hf: str, gguf: str, shape: str) -> Mapped:
    return tensor(f"{hf}.weight", f"{gguf}.weight", shape, _ternary)


def _bitnet_entries(facts: Facts) -> None:
    facts.text("rope.scaling.type", "linear")
    facts.real("rope.scaling.factor", 1.0)


_BITNET = Architecture(
    "bitnet",
    (
        *NORMS,
        norm("self_attn.inner_attn_ln", "attn_sub_norm", "q"), norm("mlp.ffn_layernorm", "ffn_sub_norm", "ff"),
        _of_three("self_attn.q_proj", "attn_q", "q embd"), _of_three("self_attn.k_proj", "attn_k", "kv embd"),
        _of_three("self_attn.v_proj", "attn_v", "kv embd"), _of_three("self_attn.o_proj", "attn_output", "embd q"),
        _of_three("mlp.gate_proj", "ffn_gate", "ff embd"), _of_three("mlp.up_proj", "ffn_up", "ff embd"),
        _of_three("mlp.down_proj", "ffn_down", "embd ff"),
    ),
    entries=_bitnet_entries, defaults={"tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    fixed={"weight_bits": 1, "input_bits": 8, "tie_word_embeddings": True},
)  # fmt: skip

# MiniMax-Text-01 and M1


def _minimax_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    return {"thrice_q": 3 * sizes["q"], "expert_ff": sizes["ff"]}


def _minimax_entries(facts: Facts) -> None:
    config = facts.config
    alphas = [config.real(f"layernorm_{part}_alpha", 1.0) for part in ("full_attention", "linear_attention", "mlp")]
    betas = [config.real(f"layernorm_{part}_beta", 1.0) for part in ("full_attention", "linear_attention", "mlp")]
    if len(set(alphas)) > 1 or set(betas) != {1.0}:
        raise config.error("layernorm_mlp_alpha", "and its like are not one number for all parts, and betas not 1")
    facts.real("residual_scale", alphas[0])
    config.get("shared_moe_mode")  # of no expert
    facts.count("rope.dimension_count", config.integer("rotary_dim"))
    kinds = config.get("attn_type_list")
    if kinds is not None and kinds != [int((layer + 1) % 8 == 0) for layer in range(facts.sizes["layers"])]:
        raise config.error("attn_type_list", "is not seven layers of lightning attention and then one of the usual")


_MINIMAX01 = Architecture(
    "minimax-01",
    (
        *NORMS,
        either(
            (
                tensor("self_attn.qkv_proj.weight", "attn_qkv.weight", "thrice_q embd"),
                tensor("self_attn.output_gate.weight", "attn_gate.weight", "q embd"),
                norm("self_attn.norm", "attn_norm_2", "q"),
                tensor("self_attn.out_proj.weight", "attn_output.weight", "embd q"),
            ),
            (
                tensor("self_attn.q_proj.weight", "attn_q.weight", "q embd"),
                tensor("self_attn.k_proj.weight", "attn_k.weight", "kv embd"),
                tensor("self_attn.v_proj.weight", "attn_v.weight", "kv embd"),
                tensor("self_attn.o_proj.weight", "attn_output.weight", "embd q"),
            ),
        ),
        *experts("block_sparse_moe", "w1 w3 w2"),
    ),
    sizes=_minimax_sizes, entries=_minimax_entries, fixed={"postnorm": True, "shared_intermediate_size": 0},
)  # fmt: skip

# Talkie: no weights of norms, but gains; rope turns the other way round.


def _turned_back(sizes: Sizes, n_rows: int) -> F32Array:
    """The second half of each head has the other sign."""
    half = sizes["head"] // 2
    return np.tile(np.repeat(np.array([1, -1], np.float32), half), n_rows // max(2 * half, 1)).reshape(1, -1)


def _talkie_entries(facts: Facts) -> None:
    facts.real("attention.layer_norm_rms_epsilon", float(np.finfo(np.float32).eps))


def _talkie_gain(facts: Facts, weights: Mapping[str, SourceTensor]) -> None:
    gain = next((tensor for name, tensor in weights.items() if name.endswith("lm_head_gain.w_g")), None)
    if gain is None or gain.shape not in ((), (1,)):
        raise FormatError(facts.config.path.parent, "tensor 'lm_head_gain.w_g', one number, is missing")
    facts.real("logit_scale", float(gain.rows(0, 1).reshape(-1)[0]))


def _talkie_name(name: str, sizes: Sizes) -> str:
    return "" if name.endswith("lm_head_gain.w_g") else name


_TALKIE = Architecture(
    "talkie",
    (
        tensor("attn.attn_query.weight", "attn_q.weight", "q embd", scaled(_turned_back)),
        tensor("attn.attn_key.weight", "attn_k.weight", "kv embd", scaled(_turned_back)),
        tensor("attn.attn_value.weight", "attn_v.weight", "kv embd"),
        tensor("attn.attn_resid.weight", "attn_output.weight", "embd q"),
        tensor("attn.head_gain.head_g", "attn_q_norm.weight", "heads", computed("heads 1")),
        tensor("attn_gain.a_g", "attn_output.scale", "*"),
        tensor("mlp.mlp_gate.weight", "ffn_gate.weight", "ff embd"),
        tensor("mlp.mlp_linear.weight", "ffn_up.weight", "ff embd"),
        tensor("mlp.mlp_resid.weight", "ffn_down.weight", "embd ff"),
        tensor("mlp_gain.a_g", "ffn_down.scale", "*"),
        tensor("embed_skip.a_g", "layer_output_scale.weight", "*"),
    ),
    layers="blocks", embedding="embed", outer=(), entries=_talkie_entries, of_weights=_talkie_gain,
    rename=_talkie_name,
)  # fmt: skip

# Grok 2: norms behind each part too, and a dense network beside the experts.

YARN = {"yarn_ext_factor": "extrapolation_factor", "yarn_attn_factor": "attn_factor",
        "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}  # fmt: skip


def _grok_entries(facts: Facts) -> None:
    config = facts.config
    for key in ("attn_logit_softcapping", "router_logit_softcapping"):
        facts.real(key, config.real(key, 30.0))
    if config.get("final_logit_softcapping"):
        facts.real("final_logit_softcapping", config.real("final_logit_softcapping"))
    if config.get("moe_intermediate_size") is not None:
        facts.count("expert_feed_forward_length", facts.sizes["expert_ff"])
    if config.text("rope_type") in ("yarn", "original"):
        facts.text("rope.scaling.type", "yarn")
        facts.real("rope.scaling.factor", config.real("scaling_factor", high=1e6))
        facts.count("rope.scaling.original_context_length", config.integer("original_max_position_embeddings"))
        for key, hf in YARN.items():
            facts.real(f"rope.scaling.{key}", config.real(hf, high=1e6))
    if config.get("attn_temperature_len"):
        facts.count("attention.temperature_length", config.integer("attn_temperature_len"))
    facts.real("attention.output_scale", config.real("attn_output_multiplier", facts.sizes["head"] ** -0.5))
    facts.real("embedding_scale", config.real("embedding_multiplier_scale"))
    facts.real("logit_scale", config.real("output_multiplier_scale"))


_GROK = Architecture(
    "grok",
    (
        norm("pre_attn_norm", "attn_norm"), norm("post_attn_norm", "attn_output_norm"),
        norm("pre_moe_norm", "ffn_norm"), norm("post_moe_norm", "post_ffw_norm"),
        *linear("self_attn.q_proj", "attn_q", "q", "embd"), *linear("self_attn.k_proj", "attn_k", "kv", "embd"),
        *linear("self_attn.v_proj", "attn_v", "kv", "embd"), *linear("self_attn.o_proj", "attn_output", "embd", "q"),
        *experts("block_sparse_moe", "w1 w3 w2"),
        *linear("mlp.gate_proj", "ffn_gate", "ff", "embd"), *linear("mlp.up_proj", "ffn_up", "ff", "embd"),
        *linear("mlp.down_proj", "ffn_down", "embd", "ff"),
    ),
    activations=SILU | {"gelu"}, entries=_grok_entries, fixed={"residual_moe": True},
)  # fmt: skip

CLASSES = {
    "BitnetForCausalLM": _BITNET,
    "BitNetForCausalLM": _BITNET,
    "MiniMaxText01ForCausalLM": _MINIMAX01,
    "MiniMaxM1ForCausalLM": _MINIMAX01,
    "TalkieForCausalLM": _TALKIE,
    "Grok1ForCausalLM": _GROK,
    "GrokForCausalLM": _GROK,
}
