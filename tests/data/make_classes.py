"""Makes tests/data/classes.json: a tiny checkpoint of every class that can be converted, and what llama.cpp's converter
makes of it.

    python tests/data/make_classes.py LLAMA_CPP [CLASS ...]

It needs torch and transformers, and the folder LLAMA_CPP with llama.cpp's sources (of build 11434). A checkpoint is its
config.json with the names and shapes of its tensors, as Transformers saves a model of that class, or as its makers
publish it where Transformers has no such class; the weights follow from the names (tests/unit/checkpoint_weights.py).
The result is the metadata, and each tensor's name, type, shape and a digest of its bytes. With classes named, the
others stay as they are.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "unit"))
from checkpoint_weights import digest, write_checkpoint  # noqa: E402

OUT = HERE / "classes.json"
N_VOCAB = 333  # of the tokenizer that the checkpoints have

DENSE = {"vocab_size": N_VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
HEAD = {"head_dim": 16}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1,
          "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5}  # fmt: skip
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
         "num_hidden_layers": 4}  # fmt: skip
VISION = {"hidden_size": 8, "intermediate_size": 8, "depth": 1, "num_hidden_layers": 1, "num_heads": 1,
          "num_attention_heads": 1, "out_hidden_size": 32, "patch_size": 4, "image_size": 8}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
T5 = {"vocab_size": N_VOCAB, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 4,
      "relative_attention_num_buckets": 16, "decoder_start_token_id": 3, "pad_token_id": 0,
      "eos_token_id": 1}  # fmt: skip
RWKV_RANKS = {"w": 8, "a": 12, "g": 20}
GATED_T5 = T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
OLD = {"vocab_size": N_VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
KINDS = ["sliding_attention", "full_attention"]

GEMMA3N = DENSE | HEAD | {
    "num_hidden_layers": 4, "layer_types": KINDS * 2, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8,
    "intermediate_size": [48, 64, 48, 64], "vocab_size_per_layer_input": N_VOCAB - 5, "laurel_rank": 4,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    "sliding_window": 16, "altup_active_idx": 1}  # fmt: skip


def draft(prefix: str, layer: dict[str, list[int]], embd: int = 32) -> dict[str, list[int]]:
    return {f"{prefix}{name}": shape for name, shape in layer.items()}


def normed(name: str, width: int = 32) -> dict[str, list[int]]:
    return {f"{name}.weight": [width], f"{name}.bias": [width]}


def qwen_draft(mixture: bool) -> dict[str, list[int]]:
    """Of Qwen 3.5 and Next: Transformers leaves it out."""
    layer = {
        "input_layernorm.weight": [32], "post_attention_layernorm.weight": [32],
        "self_attn.q_proj.weight": [128, 32], "self_attn.k_proj.weight": [32, 32], "self_attn.v_proj.weight": [32, 32],
        "self_attn.o_proj.weight": [32, 64], "self_attn.q_norm.weight": [16], "self_attn.k_norm.weight": [16],
    }  # fmt: skip
    if mixture:
        layer |= {f"mlp.experts.{e}.{n}_proj.weight": [24, 32] for e in range(4) for n in ("gate", "up")}
        layer |= {f"mlp.experts.{e}.down_proj.weight": [32, 24] for e in range(4)}
        layer |= {"mlp.gate.weight": [4, 32], "mlp.shared_expert_gate.weight": [1, 32],
                  "mlp.shared_expert.gate_proj.weight": [40, 32], "mlp.shared_expert.up_proj.weight": [40, 32],
                  "mlp.shared_expert.down_proj.weight": [32, 40]}  # fmt: skip
    else:
        layer |= {"mlp.gate_proj.weight": [48, 32], "mlp.up_proj.weight": [48, 32], "mlp.down_proj.weight": [32, 48]}
    return {"mtp.fc.weight": [32, 64], "mtp.norm.weight": [32], "mtp.pre_fc_norm_embedding.weight": [32],
            "mtp.pre_fc_norm_hidden.weight": [32], **draft("mtp.layers.0.", layer)}  # fmt: skip


GLM_DRAFT = draft("model.layers.2.", {
    "input_layernorm.weight": [32], "post_attention_layernorm.weight": [32], "self_attn.q_proj.weight": [64, 32],
    "self_attn.k_proj.weight": [32, 32], "self_attn.v_proj.weight": [32, 32], "self_attn.o_proj.weight": [32, 64],
    "self_attn.q_norm.weight": [16], "self_attn.k_norm.weight": [16], "eh_proj.weight": [32, 64],
    "enorm.weight": [32], "hnorm.weight": [32], "shared_head.norm.weight": [32],
    "shared_head.head.weight": [N_VOCAB, 32], "embed_tokens.weight": [N_VOCAB, 32],
    "mlp.gate.weight": [4, 32], "mlp.gate.e_score_correction_bias": [4],
} | {f"mlp.experts.{e}.{n}_proj.weight": [24, 32] for e in range(4) for n in ("gate", "up")}
  | {f"mlp.experts.{e}.down_proj.weight": [32, 24] for e in range(4)} | {
    "mlp.shared_experts.gate_proj.weight": [24, 32], "mlp.shared_experts.up_proj.weight": [24, 32],
    "mlp.shared_experts.down_proj.weight": [32, 24],
})  # fmt: skip


def text(settings: dict[str, Any], **others: Any) -> dict[str, Any]:
    """Of a model that sees: the language model's settings within it."""
    return {"text_config": settings, "vision_config": VISION, **others}


Case = tuple[str, dict[str, Any], dict[str, list[int]]]
# Class -> (class of its configuration, settings, tensors beside those that Transformers saves).
TRANSFORMERS: dict[str, Case] = {
    "LlamaForCausalLM": ("LlamaConfig", DENSE | HEAD | {"rope_parameters": LLAMA3, "attention_bias": True}, {}),
    "MistralForCausalLM": ("MistralConfig", DENSE | {"sliding_window": None}, {}),
    "MixtralForCausalLM": ("MixtralConfig", DENSE | {"num_local_experts": 4, "sliding_window": None}, {}),
    "SmolLM3ForCausalLM": ("SmolLM3Config", DENSE | {"num_hidden_layers": 4, "pad_token_id": 0}, {}),
    "Ministral3ForCausalLM": ("Ministral3Config", DENSE | HEAD | {"rope_parameters": YARN | {
        "llama_4_scaling_beta": 0.1}}, {}),
    "Mistral3ForConditionalGeneration": ("Mistral3Config", text(
        DENSE | HEAD | {"model_type": "mistral", "sliding_window": None}) | {"vision_config": VISION | {
            "model_type": "pixtral"}, "spatial_merge_size": 1}, {}),
    "ArceeForCausalLM": ("ArceeConfig", DENSE, {}),
    "ApertusForCausalLM": ("ApertusConfig", DENSE | {"rope_parameters": LLAMA3}, {}),
    "Llama4ForCausalLM": ("Llama4TextConfig", DENSE | HEAD | {
        "intermediate_size": 24, "intermediate_size_mlp": 48, "num_local_experts": 4, "interleave_moe_layer_step": 2,
        "attention_bias": False}, {}),
    "SeedOssForCausalLM": ("SeedOssConfig", DENSE | HEAD, {}),
    "Qwen2ForCausalLM": ("Qwen2Config", DENSE, {}),
    "Qwen3ForCausalLM": ("Qwen3Config", DENSE | HEAD, {}),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", DENSE | MIXTURE | {"shared_expert_intermediate_size": 40}, {}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", DENSE | HEAD | MIXTURE | {"norm_topk_prob": True}, {}),
    "Qwen3NextForCausalLM": ("Qwen3NextConfig", DENSE | HEAD | MIXTURE | DELTA | {
        "shared_expert_intermediate_size": 40}, qwen_draft(True)),
    "Qwen3_5ForCausalLM": ("Qwen3_5TextConfig", DENSE | HEAD | DELTA | {"mtp_num_hidden_layers": 1},
                           qwen_draft(False)),
    "Qwen3_5ForConditionalGeneration": ("Qwen3_5Config", text(DENSE | HEAD | DELTA | {"mtp_num_hidden_layers": 1}),
                                        qwen_draft(False)),
    "Qwen3_5MoeForCausalLM": ("Qwen3_5MoeTextConfig", DENSE | HEAD | MIXTURE | DELTA | {
        "shared_expert_intermediate_size": 40, "mtp_num_hidden_layers": 1}, qwen_draft(True)),
    "Qwen2VLForConditionalGeneration": ("Qwen2VLConfig", text(DENSE | {"rope_parameters": MROPE}) | {
        "vision_config": VISION | {"embed_dim": 8}}, {}),
    "Qwen2_5_VLForConditionalGeneration": ("Qwen2_5_VLConfig", text(DENSE | {"rope_parameters": MROPE}), {}),
    "Qwen3VLForConditionalGeneration": ("Qwen3VLConfig", text(DENSE | HEAD | {"rope_parameters": MROPE}) | {
        "vision_config": VISION | {"deepstack_visual_indexes": [0]}}, {}),
    "Qwen3VLMoeForConditionalGeneration": ("Qwen3VLMoeConfig", text(
        DENSE | HEAD | MIXTURE | {"rope_parameters": MROPE}) | {
        "vision_config": VISION | {"deepstack_visual_indexes": [0]}}, {}),
    "Dots1ForCausalLM": ("Dots1Config", DENSE | HEAD | ROUTED, {}),
    "GemmaForCausalLM": ("GemmaConfig", DENSE | HEAD, {}),
    "Gemma2ForCausalLM": ("Gemma2Config", DENSE | HEAD | {"query_pre_attn_scalar": 16}, {}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", DENSE | HEAD | {"query_pre_attn_scalar": 16}, {}),
    "Gemma3nForCausalLM": ("Gemma3nTextConfig", GEMMA3N, {}),
    "Gemma4ForCausalLM": ("Gemma4TextConfig", DENSE | HEAD | {
        "num_hidden_layers": 6, "global_head_dim": 32, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "vocab_size_per_layer_input": N_VOCAB, "use_double_wide_mlp": True, "sliding_window": 16}, {}),
    "Gemma4ForConditionalGeneration": ("Gemma4Config", {"text_config": DENSE | HEAD | MIXTURE | {
        "num_hidden_layers": 6, "global_head_dim": 32, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
        "num_global_key_value_heads": 1, "attention_k_eq_v": True, "enable_moe_block": True, "top_k_experts": 2,
        "sliding_window": 16}}, {}),
    "GraniteForCausalLM": ("GraniteConfig", DENSE | {"embedding_multiplier": 12.0, "logits_scaling": 8.0,
                           "residual_multiplier": 0.22, "attention_multiplier": 0.0625}, {}),
    "GraniteMoeForCausalLM": ("GraniteMoeConfig", DENSE | {"num_local_experts": 4, "num_experts_per_tok": 2}, {}),
    "GraniteMoeSharedForCausalLM": ("GraniteMoeSharedConfig", DENSE | {
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 40}, {}),
    "GraniteMoeHybridForCausalLM": ("GraniteMoeHybridConfig", DENSE | {
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 40, "mamba_n_heads": 8,
        "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_expand": 2,
        "layer_types": ["mamba", "attention"]}, {}),
    "BambaForCausalLM": ("BambaConfig", DENSE | {
        "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_expand": 2,
        "attn_layer_indices": [1], "attn_rotary_emb": 8}, {}),
    "GraniteSWAForCausalLM": ("GraniteSWAConfig", DENSE, {}),
    "OlmoForCausalLM": ("OlmoConfig", DENSE | {"clip_qkv": 8.0}, {}),
    "Olmo2ForCausalLM": ("Olmo2Config", DENSE, {}),
    "Olmo3ForCausalLM": ("Olmo3Config", DENSE | {"num_hidden_layers": 4}, {}),
    "OlmoeForCausalLM": ("OlmoeConfig", DENSE | {"num_experts": 4, "num_experts_per_tok": 2}, {}),
    "GlmForCausalLM": ("GlmConfig", DENSE | {"head_dim": 8, "pad_token_id": 0}, {}),
    "Glm4ForCausalLM": ("Glm4Config", DENSE | HEAD | {"pad_token_id": 0}, {}),
    "Glm4vForConditionalGeneration": ("Glm4vConfig", text(DENSE | {"rope_parameters": MROPE | {
        "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}}), {}),
    "Glm4MoeForCausalLM": ("Glm4MoeConfig", DENSE | HEAD | ROUTED | {
        "use_qk_norm": True, "num_nextn_predict_layers": 1}, GLM_DRAFT),
    "Glm4MoeLiteForCausalLM": ("Glm4MoeLiteConfig", DENSE | ROUTED | LATENT | {
        "num_key_value_heads": 4, "num_nextn_predict_layers": 0}, {}),
    "SolarOpenForCausalLM": ("SolarOpenConfig", DENSE | HEAD | ROUTED | {"first_k_dense_replace": 0}, {}),
    "DeepseekV2ForCausalLM": ("DeepseekV2Config", DENSE | ROUTED | LATENT | {"num_key_value_heads": 4,
                              "rope_parameters": YARN, "topk_method": "greedy", "scoring_func": "softmax"}, {}),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", DENSE | ROUTED | LATENT | {"num_key_value_heads": 4,
                              "rope_parameters": YARN, "scoring_func": "sigmoid"}, {}),
    "YoutuForCausalLM": ("YoutuConfig", DENSE | LATENT | {"num_key_value_heads": 4}, {}),
    "GptOssForCausalLM": ("GptOssConfig", DENSE | HEAD | {"num_local_experts": 4, "num_experts_per_tok": 2}, {}),
    "MambaForCausalLM": ("MambaConfig", {"vocab_size": N_VOCAB, "hidden_size": 32, "num_hidden_layers": 2,
                                         "state_size": 8}, {}),
    "FalconMambaForCausalLM": ("FalconMambaConfig", {"vocab_size": N_VOCAB, "hidden_size": 32, "num_hidden_layers": 2,
                                                     "state_size": 8}, {}),
    "Mamba2ForCausalLM": ("Mamba2Config", {"vocab_size": N_VOCAB, "hidden_size": 32, "num_hidden_layers": 2,
                          "state_size": 16, "num_heads": 8, "head_dim": 8, "n_groups": 2, "expand": 2}, {}),
    "FalconH1ForCausalLM": ("FalconH1Config", DENSE | HEAD | {
        "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 2,
        "mamba_rms_norm": True, "mamba_norm_before_gate": False, "attention_in_multiplier": 0.5,
        "attention_out_multiplier": 0.75,
        "key_multiplier": 0.3, "ssm_in_multiplier": 1.1, "ssm_out_multiplier": 0.9, "embedding_multiplier": 5.6,
        "lm_head_multiplier": 0.02, "mlp_multipliers": [0.88, 0.2],
        "ssm_multipliers": [0.3, 0.25, 0.17, 0.5, 0.35]}, {}),
    "JambaForCausalLM": ("JambaConfig", DENSE | {"num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2,
                         "attn_layer_period": 4, "attn_layer_offset": 2, "mamba_d_state": 8, "mamba_dt_rank": 4}, {}),
    "NemotronHForCausalLM": ("NemotronHConfig", DENSE | HEAD | {
        "layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 8, "mamba_head_dim": 8,
        "ssm_state_size": 16, "n_groups": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 40}, {}),
    "Lfm2ForCausalLM": ("Lfm2Config", DENSE | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}, {}),
    "Lfm2MoeForCausalLM": ("Lfm2MoeConfig", DENSE | MIXTURE | {"layer_types": ["conv", "full_attention"],
                                                               "num_dense_layers": 1}, {}),
    "MuseGlimmerForConditionalGeneration": ("MuseGlimmerConfig", {"text_config": DENSE | HEAD}, {}),
    "CohereForCausalLM": ("CohereConfig", DENSE | {"use_qk_norm": True}, {}),
    "Cohere2ForCausalLM": ("Cohere2Config", DENSE, {}),
    "PhiForCausalLM": ("PhiConfig", DENSE | {"num_key_value_heads": 4, "intermediate_size": 128}, {}),
    "Phi3ForCausalLM": ("Phi3Config", DENSE | {"pad_token_id": 0}, {}),
    "PhiMoEForCausalLM": ("PhimoeConfig", DENSE | {"num_local_experts": 4, "num_experts_per_tok": 2}, {}),
    "FalconForCausalLM": ("FalconConfig", {"vocab_size": N_VOCAB, "hidden_size": 32, "num_hidden_layers": 2,
                          "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True}, {}),
    "GPT2LMHeadModel": ("GPT2Config", OLD, {}),
    "GPTBigCodeForCausalLM": ("GPTBigCodeConfig", OLD, {}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", DENSE, {}),
    "BloomForCausalLM": ("BloomConfig", {"vocab_size": N_VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}, {}),
    "MPTForCausalLM": ("MptConfig", {"vocab_size": N_VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4,
                                     "max_seq_len": 64}, {}),
    "Starcoder2ForCausalLM": ("Starcoder2Config", DENSE, {}),
    "StableLmForCausalLM": ("StableLmConfig", DENSE | {"use_qkv_bias": True}, {}),
    "NemotronForCausalLM": ("NemotronConfig", DENSE, {}),
    "Exaone4ForCausalLM": ("Exaone4Config", DENSE | {"num_hidden_layers": 4, "sliding_window": 16}, {}),
    "Ernie4_5ForCausalLM": ("Ernie4_5Config", DENSE | HEAD, {}),
    "Ernie4_5_MoeForCausalLM": ("Ernie4_5_MoeConfig", DENSE | {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 12, "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1}, {}),
    "HunYuanDenseV1ForCausalLM": ("HunYuanDenseV1Config", DENSE | HEAD, {}),
    "MiniMaxM2ForCausalLM": ("MiniMaxM2Config", DENSE | HEAD | {
        "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8}, {}),
    "AfmoeForCausalLM": ("AfmoeConfig", DENSE | HEAD | MIXTURE | {"num_dense_layers": 1, "num_shared_experts": 1,
                                                        "mup_enabled": True}, {}),
    "MellumForCausalLM": ("MellumConfig", DENSE | HEAD | MIXTURE, {}),
    "ExaoneMoeForCausalLM": ("ExaoneMoeConfig", DENSE | HEAD | MIXTURE | {
        "num_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": 2.5, "sliding_window": 16, "num_hidden_layers": 4, "num_nextn_predict_layers": 0}, {}),
    "HYV3ForCausalLM": ("HYV3Config", DENSE | HEAD | MIXTURE | {"num_shared_experts": 1, "first_k_dense_replace": 1},
                        {}),
    "Jais2ForCausalLM": ("Jais2Config", DENSE | HEAD, {}),
    "GraniteMoeSWAForCausalLM": ("GraniteMoeSWAConfig", DENSE | {
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 40}, {}),
    "DeepseekV32ForCausalLM": ("DeepseekV32Config", DENSE | ROUTED | LATENT | {
        "num_key_value_heads": 4, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 16}, {}),
    "GlmMoeDsaForCausalLM": ("GlmMoeDsaConfig", DENSE | ROUTED | LATENT | {
        "num_key_value_heads": 4, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 16}, {}),
    "LagunaForCausalLM": ("LagunaConfig", DENSE | HEAD | MIXTURE | {
        "shared_expert_intermediate_size": 40, "layer_types": KINDS[::-1]}, {}),
    "BertModel": ("BertConfig", DENSE | {"num_key_value_heads": 4}, {}),
    "ModernBertModel": ("ModernBertConfig", DENSE | {"num_key_value_heads": 4, "num_hidden_layers": 4,
                                                     "local_attention": 16, "pad_token_id": 0,
                                                     "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1,
                                                     "eos_token_id": 2}, {}),
    "Gemma3TextModel": ("Gemma3TextConfig", DENSE | HEAD | {
        "num_hidden_layers": 6, "query_pre_attn_scalar": 16, "sliding_window": 16,
        "use_bidirectional_attention": True}, {}),
    "T5ForConditionalGeneration": ("T5Config", T5, {}),
    "MT5ForConditionalGeneration": ("MT5Config", GATED_T5 | {"num_decoder_layers": 1}, {}),
    "UMT5ForConditionalGeneration": ("UMT5Config", GATED_T5, {}),
    "T5EncoderModel": ("T5Config", GATED_T5, {}),
    "DistilBertModel": ("DistilBertConfig", {
        "vocab_size": N_VOCAB, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
        "max_position_embeddings": 128}, {}),
    "MiniCPM3ForCausalLM": ("MiniCPM3Config", DENSE | LATENT | {"num_key_value_heads": 4}, {}),
}  # fmt: skip

# What Transformers saves in another way than the makers publish it.
PUBLISHED_CONFIG: dict[str, dict[str, Any]] = {
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention"]},
    "NemotronHForCausalLM": {"layers_block_type": None, "hybrid_override_pattern": "M*E", "num_hidden_layers": 3},
    "Cohere2ForCausalLM": {"rotary_pct": 1.0},
    "GPTNeoXForCausalLM": {"rotary_pct": 0.25, "num_key_value_heads": None},
    "GPT2LMHeadModel": {"n_ctx": 64},
    "PhiMoEForCausalLM": {"original_max_position_embeddings": 64},
}
# The converter does not know what Transformers makes of their config.json.
READ_PLAINLY = (
    "GPTNeoXForCausalLM", "HrmTextForCausalLM", "Cohere2MoeForCausalLM", "PaddleOCRVLForConditionalGeneration",
    "HunYuanVLForConditionalGeneration", "DeepseekV4ForCausalLM", "MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM",
    "Step3p5ForCausalLM", "Step3p7ForConditionalGeneration", "Dots3NoteForCausalLM", "HYV4ForCausalLM",
    "Qwen4ExpForCausalLM", "Qwen4ExpForConditionalGeneration", "SarvamMoEForCausalLM", "DbrxForCausalLM",
    "JAISLMHeadModel", "EuroBertModel", "NeoBERT", "JinaBertModel", "JinaBertForMaskedLM", "BitnetForCausalLM",
    "MiniMaxText01ForCausalLM", "TalkieForCausalLM", "Grok1ForCausalLM", "DeciLMForCausalLM",
    "RWKV6Qwen2ForCausalLM", "RwkvHybridForCausalLM", "NemotronHPuzzleForCausalLM", "QWenLMHeadModel",
    "GraniteSpeechForConditionalGeneration", "Sarashina2VisionForCausalLM",
)
COLUMNS_FIRST = ("Qwen3VLMoeForConditionalGeneration",)  # experts

# Published by their makers


def named(prefix: str, layers: int, each: dict[str, list[int]], others: dict[str, list[int]]) -> dict[str, list[int]]:
    return {f"{prefix}.{n}.{name}": shape for n in range(layers) for name, shape in each.items()} | others


OUTER = {"model.embed_tokens.weight": [N_VOCAB, 32], "model.norm.weight": [32], "lm_head.weight": [N_VOCAB, 32]}
NORMS = {"input_layernorm.weight": [32], "post_attention_layernorm.weight": [32]}
FORWARD = {"mlp.gate_proj.weight": [48, 32], "mlp.up_proj.weight": [48, 32], "mlp.down_proj.weight": [32, 48]}
QKVO = {"self_attn.q_proj.weight": [32, 32], "self_attn.k_proj.weight": [16, 32], "self_attn.v_proj.weight": [16, 32],
        "self_attn.o_proj.weight": [32, 32]}  # fmt: skip
EXPERTS = {f"mlp.experts.{e}.{n}_proj.weight": [24, 32] for e in range(4) for n in ("gate", "up")} | {
    f"mlp.experts.{e}.down_proj.weight": [32, 24] for e in range(4)} | {"mlp.gate.weight": [4, 32]}  # fmt: skip
SHARED = {"mlp.shared_experts.gate_proj.weight": [24, 32], "mlp.shared_experts.up_proj.weight": [24, 32],
          "mlp.shared_experts.down_proj.weight": [32, 24]}  # fmt: skip
USUAL = DENSE | {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False}
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, list[int]]]] = {
    "RND1": (USUAL | MIXTURE | {"norm_topk_prob": True, "mask_token_id": 3, "head_dim": 8, "model_type": "rnd1"}, named(
        "model.layers", 2, {**NORMS, **EXPERTS, **QKVO, "self_attn.q_norm.weight": [8],
                            "self_attn.k_norm.weight": [8]}, OUTER)),
    "DreamModel": (USUAL | {"mask_token_id": 3}, named("model.layers", 2, {
        **NORMS, **FORWARD, **QKVO, "self_attn.q_proj.bias": [32], "self_attn.k_proj.bias": [16],
        "self_attn.v_proj.bias": [16]}, OUTER)),
    "InternLM3ForCausalLM": (USUAL, named("model.layers", 2, {**NORMS, **FORWARD, **QKVO}, OUTER)),
    "InternLM2ForCausalLM": (USUAL, named("model.layers", 2, {
        "attention_norm.weight": [32], "ffn_norm.weight": [32], "attention.wqkv.weight": [64, 32],
        "attention.wo.weight": [32, 32], "feed_forward.w1.weight": [48, 32], "feed_forward.w3.weight": [48, 32],
        "feed_forward.w2.weight": [32, 48],
    }, {"model.tok_embeddings.weight": [N_VOCAB, 32], "model.norm.weight": [32], "output.weight": [N_VOCAB, 32]})),
    "BaichuanForCausalLM": (USUAL | {"num_key_value_heads": 4, "model_max_length": 128}, named("model.layers", 2, {
        **NORMS, **FORWARD, "self_attn.W_pack.weight": [96, 32], "self_attn.o_proj.weight": [32, 32]}, OUTER)),
    "XverseForCausalLM": (USUAL | {"num_key_value_heads": 4}, named("model.layers", 2, {
        **NORMS, **FORWARD, **QKVO, "self_attn.k_proj.weight": [32, 32], "self_attn.v_proj.weight": [32, 32]}, OUTER)),
    "OrionForCausalLM": (USUAL, named("model.layers", 2, {
        **NORMS, **FORWARD, **QKVO, "input_layernorm.bias": [32], "post_attention_layernorm.bias": [32],
    }, OUTER | {"model.norm.bias": [32]})),
    "KORMoForCausalLM": (USUAL, named("model.layers", 2, {
        **FORWARD, **QKVO, "pre_attention_layernorm.weight": [32], "pre_mlp_layernorm.weight": [32]}, OUTER)),
    "MiniCPMForCausalLM": (USUAL | {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}, named(
        "model.layers", 2, {**NORMS, **FORWARD, **QKVO}, OUTER)),
    "ExaoneForCausalLM": (USUAL | {"activation_function": "silu", "rope_scaling": LLAMA3}, named("transformer.h", 2, {
        "ln_1.weight": [32], "ln_2.weight": [32], "attn.attention.q_proj.weight": [32, 32],
        "attn.attention.k_proj.weight": [16, 32], "attn.attention.v_proj.weight": [16, 32],
        "attn.attention.out_proj.weight": [32, 32], "mlp.c_fc_0.weight": [48, 32], "mlp.c_fc_1.weight": [48, 32],
        "mlp.c_proj.weight": [32, 48],
    }, {"transformer.wte.weight": [N_VOCAB, 32], "transformer.ln_f.weight": [32], "lm_head.weight": [N_VOCAB, 32]})),
    "DeepseekForCausalLM": (USUAL | ROUTED | {"routed_scaling_factor": 1.0}, {
        **named("model.layers", 2, {**NORMS, **QKVO}, OUTER),
        **{f"model.layers.0.{n}": s for n, s in FORWARD.items()},
        **{f"model.layers.1.{n}": s for n, s in (EXPERTS | SHARED).items()}}),
    "BailingMoeForCausalLM": (USUAL | MIXTURE | {"num_shared_experts": 1, "first_k_dense_replace": 0,
        "norm_topk_prob": True}, named("model.layers", 2, {
        **NORMS, **EXPERTS, **SHARED, "attention.query_key_value.weight": [64, 32], "attention.dense.weight": [32, 32],
    }, {"model.word_embeddings.weight": [N_VOCAB, 32], "model.norm.weight": [32], "lm_head.weight": [N_VOCAB, 32]})),
    "BailingMoeV2ForCausalLM": (USUAL | MIXTURE | {"num_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2,
        "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "score_function": "sigmoid",
        "partial_rotary_factor": 0.5}, {**named("model.layers", 2, {
            **NORMS, "attention.query_key_value.weight": [64, 32], "attention.dense.weight": [32, 32],
            "attention.query_layernorm.weight": [8], "attention.key_layernorm.weight": [8]},
            {"model.word_embeddings.weight": [N_VOCAB, 32], "model.norm.weight": [32],
             "lm_head.weight": [N_VOCAB, 32]}),
        **{f"model.layers.0.{n}": s for n, s in FORWARD.items()},
        **{f"model.layers.1.{n}": s for n, s in (EXPERTS | SHARED | {"mlp.gate.expert_bias": [4]}).items()}}),
    "NomicBertModel": ({
        "vocab_size": N_VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 8192,
        "max_trained_positions": 2048, "activation_function": "swiglu", "causal": False, "qkv_proj_bias": False,
        "mlp_fc1_bias": False, "mlp_fc2_bias": False, "prenorm": False, "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False, "rotary_emb_scale_base": None, "rotary_emb_base": 1000,
        "layer_norm_epsilon": 1e-12, "type_vocab_size": 2}, named("encoder.layers", 2, {
            "attn.Wqkv.weight": [96, 32], "attn.out_proj.weight": [32, 32], "norm1.weight": [32], "norm1.bias": [32],
            "mlp.fc11.weight": [48, 32], "mlp.fc12.weight": [48, 32], "mlp.fc2.weight": [32, 48],
            "norm2.weight": [32], "norm2.bias": [32]}, {
            "embeddings.word_embeddings.weight": [N_VOCAB, 32], "embeddings.token_type_embeddings.weight": [2, 32],
            "emb_ln.weight": [32], "emb_ln.bias": [32]})),
    "RWKV7ForCausalLM": ({
        "vocab_size": N_VOCAB, "hidden_size": 32, "head_dim": 16, "num_heads": None, "num_hidden_layers": 2,
        "intermediate_size": 96, "decay_low_rank_dim": 8, "a_low_rank_dim": 12, "v_low_rank_dim": 4,
        "gate_low_rank_dim": 20, "norm_eps": 1e-5, "norm_first": True, "norm_bias": True, "hidden_act": "sqrelu",
        "tie_word_embeddings": False, "model_type": "rwkv7"}, {**named("model.layers", 2, {
            **normed("attn_norm"), **normed("ffn_norm"), **normed("attn.g_norm"),
            **{f"attn.x_{part}": [1, 1, 32] for part in "rwkvag"},
            **{f"attn.{part}_proj.weight": [32, 32] for part in "rkvo"},
            **{f"attn.{part}_lora.lora.0.weight": [rank, 32] for part, rank in RWKV_RANKS.items()},
            **{f"attn.{part}_lora.lora.2.weight": [32, rank] for part, rank in RWKV_RANKS.items()},
            "attn.w_lora.lora.2.bias": [32], "attn.a_lora.lora.2.bias": [32], "attn.k_k": [32], "attn.k_a": [32],
            "attn.r_k": [2, 16], "ffn.x_k": [32], "ffn.key.weight": [96, 32], "ffn.value.weight": [32, 96]},
            {"model.embeddings.weight": [N_VOCAB, 32], "lm_head.weight": [N_VOCAB, 32],
             **normed("model.norm"), **normed("model.layers.0.pre_norm")}),
        "model.layers.1.attn.v_lora.lora.0.weight": [4, 32], "model.layers.1.attn.v_lora.lora.2.weight": [32, 4],
        "model.layers.1.attn.v_lora.lora.2.bias": [32]}),
    "Rwkv6ForCausalLM": ({
        "vocab_size": N_VOCAB, "hidden_size": 64, "attention_hidden_size": 64, "head_size": 16, "num_hidden_layers": 3,
        "intermediate_size": None, "layer_norm_epsilon": 1e-5, "rescale_every": 2, "tie_word_embeddings": False,
        "model_type": "rwkv6"}, named("rwkv.blocks", 3, {
            **normed("ln1", 64), **normed("ln2", 64), **normed("attention.ln_x", 64),
            **{f"attention.time_maa_{part}": [1, 1, 64] for part in "xwkvrg"},
            "attention.time_maa_w1": [64, 160], "attention.time_maa_w2": [5, 32, 64],
            "attention.time_decay": [1, 1, 64], "attention.time_decay_w1": [64, 64],
            "attention.time_decay_w2": [64, 64], "attention.time_faaaa": [4, 16],
            **{f"attention.{name}.weight": [64, 64] for name in ("receptance", "key", "value", "gate", "output")},
            "feed_forward.time_maa_k": [1, 1, 64], "feed_forward.time_maa_r": [1, 1, 64],
            "feed_forward.key.weight": [224, 64], "feed_forward.receptance.weight": [64, 64],
            "feed_forward.value.weight": [64, 224]},
            {"rwkv.embeddings.weight": [N_VOCAB, 64], "head.weight": [N_VOCAB, 64],
             **normed("rwkv.ln_out", 64), **normed("rwkv.blocks.0.pre_ln", 64)})),
    "ChatGLMModel": ({"padded_vocab_size": N_VOCAB, "vocab_size": N_VOCAB, "hidden_size": 32, "ffn_hidden_size": 48,
        "num_layers": 2, "num_attention_heads": 4, "multi_query_attention": True, "multi_query_group_num": 2,
        "seq_length": 128, "layernorm_epsilon": 1.5e-7, "rope_ratio": 500, "tie_word_embeddings": False}, named(
        "transformer.encoder.layers", 2, {
            **NORMS, "self_attention.query_key_value.weight": [64, 32], "self_attention.query_key_value.bias": [64],
            "self_attention.dense.weight": [32, 32], "mlp.dense_h_to_4h.weight": [96, 32],
            "mlp.dense_4h_to_h.weight": [32, 48]}, {
            "transformer.embedding.word_embeddings.weight": [N_VOCAB, 32],
            "transformer.encoder.final_layernorm.weight": [32], "transformer.output_layer.weight": [N_VOCAB, 32]})),
    "HunYuanMoEV1ForCausalLM": (USUAL | {"num_experts": 4, "moe_topk": [2, 2], "num_shared_expert": [1, 1],
        "moe_intermediate_size": [48, 48], "attention_head_dim": 8}, named("model.layers", 2, {
            **NORMS, **QKVO, **{n.replace("mlp.gate.w", "mlp.gate.wg.w"): [48 if size == 24 else size for size in s]
                                for n, s in EXPERTS.items()},
            "self_attn.query_layernorm.weight": [8], "self_attn.key_layernorm.weight": [8],
            "mlp.shared_mlp.gate_proj.weight": [48, 32], "mlp.shared_mlp.up_proj.weight": [48, 32],
            "mlp.shared_mlp.down_proj.weight": [32, 48]}, OUTER)),
}  # fmt: skip


# Kimi delta attention in one layer, latent attention in the other.

DELTA_NAMES = {
    **{f"{n}_proj.weight": [32, 32] for n in "qkv"}, **{f"{n}_conv1d.weight": [32, 1, 4] for n in "qkv"},
    "b_proj.weight": [4, 32], "o_norm.weight": [8], "o_proj.weight": [32, 32], "dt_bias": [32], "A_log": [1, 1, 4, 1],
}
GATES = {"f_a_proj.weight": [8, 32], "f_b_proj.weight": [32, 8], "g_a_proj.weight": [8, 32], "g_b_proj.weight": [32, 8]}
LATENT_NAMES = {
    "q_a_proj.weight": [24, 32], "q_a_layernorm.weight": [24], "q_b_proj.weight": [48, 24],
    "kv_a_proj_with_mqa.weight": [20, 32], "kv_a_layernorm.weight": [16], "kv_b_proj.weight": [80, 16],
    "o_proj.weight": [32, 48],
}  # fmt: skip
SPARSE_MOE = {f"block_sparse_moe.experts.{e}.{n}.weight": [24, 32] for e in range(4) for n in ("w1", "w3")} | {
    f"block_sparse_moe.experts.{e}.w2.weight": [32, 24] for e in range(4)} | {
    "block_sparse_moe.gate.weight": [4, 32], "block_sparse_moe.gate.e_score_correction_bias": [4],
    "block_sparse_moe.shared_experts.gate_proj.weight": [24, 32],
    "block_sparse_moe.shared_experts.up_proj.weight": [24, 32],
    "block_sparse_moe.shared_experts.down_proj.weight": [32, 24]}  # fmt: skip


def within(block: str, names: dict[str, list[int]]) -> dict[str, list[int]]:
    return {f"{block}.{name}": shape for name, shape in names.items()}


def in_layers(prefix: str, *layers: dict[str, list[int]]) -> dict[str, list[int]]:
    return {f"{prefix}.{n}.{name}": shape for n, layer in enumerate(layers) for name, shape in layer.items()}


KIMI = USUAL | {
    "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_token": 2, "moe_intermediate_size": 24,
    "num_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.446, "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid", "num_expert_group": 1, "topk_group": 1, "kv_lora_rank": 16,
    "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12, "mla_use_nope": True,
    "linear_attn_config": {"full_attn_layers": [2], "kda_layers": [1], "head_dim": 8, "num_heads": 4,
                           "short_conv_kernel_size": 4}, "model_max_length": 128, "model_type": "kimi_linear",
}  # fmt: skip
RESIDUALS = {f"{n}_res_{k}.weight": [32] if k == "norm" else [1, 32]
             for n in ("self_attention", "mlp") for k in ("norm", "proj")}  # fmt: skip
NARROW_MOE = {name: [16 if size == 32 and "experts." in name and "shared" not in name else size for size in shape]
              for name, shape in SPARSE_MOE.items()} | {
    "block_sparse_moe.routed_expert_down_proj.weight": [16, 32],
    "block_sparse_moe.routed_expert_up_proj.weight": [32, 16], "block_sparse_moe.routed_expert_norm.weight": [16]}
STREAMS = {f"hc_{n}_{k}": shape for n in ("attn", "ffn")
           for k, shape in (("fn", [8, 64]), ("base", [8]), ("scale", [3]))}  # fmt: skip
POOLED_INDEXER = {
    "indexer.wq_b.weight": [16, 24], "indexer.wk.weight": [8, 32], "indexer.weights_proj.weight": [2, 32],
    "indexer.k_norm.weight": [8], "indexer.k_norm.bias": [8], "indexer.index_kpool_compress_ape": [4, 8],
    "indexer.index_kpool_compress_gate": [8, 32],
}  # fmt: skip
STREAM_LATENT = {name: [16 if size == 20 else 32 if size == 48 and "q_b" in name else size for size in shape]
                 for name, shape in LATENT_NAMES.items()}  # fmt: skip
BAILING = {"model.word_embeddings.weight": [N_VOCAB, 32], "model.norm.weight": [32], "lm_head.weight": [N_VOCAB, 32]}
PUBLISHED |= {
    "KimiLinearForCausalLM": (KIMI, OUTER | in_layers(
        "model.layers", {**NORMS, **within("self_attn", DELTA_NAMES | GATES), **FORWARD},
        {**NORMS, **within("self_attn", {"q_proj.weight": [48, 32]} | {
            n: s for n, s in LATENT_NAMES.items() if not n.startswith("q_")}), **SPARSE_MOE})),
    "KimiK3ForConditionalGeneration": ({"text_config": KIMI | {
        "q_lora_rank": 24, "hidden_act": "situ", "activation_situ_beta": 4.0, "activation_situ_linear_beta": 25.0,
        "attn_res_block_size": 12, "routed_expert_hidden_size": 16, "linear_attn_config": KIMI[
            "linear_attn_config"] | {"gate_lower_bound": -5.0}}, "model_type": "kimi_k3"},
        {f"language_model.{n}": s for n, s in (OUTER | {
            "model.output_attn_res_norm.weight": [32], "model.output_attn_res_proj.weight": [1, 32]} | in_layers(
            "model.layers", {**NORMS, **RESIDUALS, **within("self_attn", DELTA_NAMES | {
                "A_log": [4], "f_a_proj.weight": [8, 32], "f_b_proj.weight": [32, 8], "g_proj.weight": [32, 32]}),
                             **FORWARD},
            {**NORMS, **RESIDUALS, **within("self_attn", LATENT_NAMES | {"g_proj.weight": [48, 32]}),
             **NARROW_MOE})).items()} | {"vision_tower.patch_embed.weight": [2], "mm_projector.weight": [2]}),
    "Glm5NextForConditionalGeneration": ({"text_config": USUAL | ROUTED | {
        "num_key_value_heads": 4, "layer_types": ["linear_attention", "indexed_attention"], "mla_use_nope": True,
        "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 0, "v_head_dim": 12,
        "linear_attn_config": {"head_dim": 8, "num_heads": 4, "short_conv_kernel_size": 4, "gate_lower_bound": -5.0},
        "index_n_heads": 2, "index_head_dim": 8, "index_topk": 16, "index_kpool": 4, "mhc": True, "hc_mult": 2,
        "index_kpool_always_select_tail": True, "indexer_types": ["full", "full"], "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6, "norm_topk_prob": True, "swiglu_limit": 10.0, "scoring_func": "sigmoid",
        "num_nextn_predict_layers": 1, "model_type": "glm5_next_text"}, "model_type": "glm5_next"},
        {n.replace("model.", "model.language_model."): s for n, s in (OUTER | in_layers(
            "model.layers", {**NORMS, **STREAMS, **within("self_attn", DELTA_NAMES | GATES | {"A_log": [4]}),
                             **FORWARD},
            {**NORMS, **STREAMS, **within("self_attn", STREAM_LATENT | POOLED_INDEXER), **EXPERTS, **SHARED,
             "mlp.gate.e_score_correction_bias": [4]},
            {**NORMS, **STREAMS, **within("self_attn", STREAM_LATENT | POOLED_INDEXER), **EXPERTS, **SHARED,
             "mlp.gate.e_score_correction_bias": [4], "eh_proj.weight": [32, 64], "enorm.weight": [32],
             "hnorm.weight": [32], "shared_head.norm.weight": [32]})).items()} | {
            "model.visual.patch_embed.proj.weight": [2]}),
    "BailingMoeV3ForCausalLM": (USUAL | MIXTURE | {
        "num_key_value_heads": 4, "head_dim": 8, "layer_group_size": 2, "no_kda_lora": True, "kda_safe_gate": True,
        "kda_lower_bound": -5.0, "gated_attention_proj_granularity_type": "head_wise", "short_conv_kernel_size": 4,
        "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12,
        "moe_shared_expert_intermediate_size": 24, "num_shared_experts": 1, "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5, "norm_topk_prob": True, "n_group": 2, "topk_group": 1,
        "score_function": "sigmoid", "expert_swiglu_limit_list": [None, 7.0], "share_expert_swiglu_limit_list": [
            None, 5.0], "num_nextn_predict_layers": 0, "model_type": "bailing_moe_v3"}, BAILING | in_layers(
            "model.layers", {**NORMS, **within("attention", {
                n.replace("o_proj", "dense"): s for n, s in DELTA_NAMES.items()} | {
                    "f_proj.weight": [32, 32], "g_proj.weight": [32, 32], "A_log": [4]}), **FORWARD},
            {**NORMS, **within("attention", {n.replace("o_proj", "dense"): s for n, s in LATENT_NAMES.items()} | {
                "g_proj.weight": [4, 32]}), **EXPERTS, **SHARED, "mlp.gate.expert_bias": [4]})),
}  # fmt: skip

PLAMO_HEADS = {"vocab_size": N_VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
               "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
               "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False}  # fmt: skip
PLAMO_NORMS = {"pre_mixer_norm.weight": [32], "post_mixer_norm.weight": [32], "pre_mlp_norm.weight": [32],
               "post_mlp_norm.weight": [32], "mlp.gate_up_proj.weight": [96, 32],
               "mlp.down_proj.weight": [32, 48]}  # fmt: skip
INNER_MOE = {f"block_sparse_moe.experts.{e}.{n}.weight": [24, 32] for e in range(4) for n in ("up", "gate")} | {
    f"block_sparse_moe.experts.{e}.down.weight": [32, 24] for e in range(4)}  # fmt: skip
PUBLISHED |= {
    "MaincoderForCausalLM": (USUAL | {"head_dim": 8}, named("model.layers", 2, {
        **NORMS, **FORWARD, **QKVO, "self_attn.q_norm.weight": [8], "self_attn.k_norm.weight": [8]}, OUTER)),
    "NanbeigeForCausalLM": (USUAL | {"num_loops": 2, "skip_loop_final_norm": True}, named(
        "model.layers", 2, {**NORMS, **FORWARD, **QKVO}, OUTER)),
    "PanguEmbeddedForCausalLM": (USUAL, named("model.layers", 2, {
        **NORMS, **FORWARD, **QKVO, "self_attn.q_proj.bias": [32], "self_attn.k_proj.bias": [16],
        "self_attn.v_proj.bias": [16], "self_attn.o_proj.bias": [32]}, OUTER)),
    "PLMForCausalLM": (USUAL | {
        "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 12, "hidden_act": "relu2", "model_type": "plm"}, named("model.layers", 2, {
            **NORMS, "self_attn.q_proj.weight": [48, 32], "self_attn.kv_a_proj_with_mqa.weight": [20, 32],
            "self_attn.kv_a_layernorm.weight": [16], "self_attn.kv_b_proj.weight": [80, 16],
            "self_attn.o_proj.weight": [32, 48], "mlp.up_proj.weight": [48, 32], "mlp.down_proj.weight": [32, 48],
        }, OUTER)),
    "SmallThinkerForCausalLM": ({
        "vocab_size": N_VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
        "rope_theta": 1500000, "moe_num_primary_experts": 4, "moe_num_active_primary_experts": 2,
        "moe_ffn_hidden_size": 24, "moe_primary_router_apply_softmax": False, "sliding_window_layout": [0, 1],
        "sliding_window_size": 16, "rope_layout": [0, 1], "tie_word_embeddings": False,
        "model_type": "smallthinker"}, named("model.layers", 2, {
            **NORMS, **QKVO, **INNER_MOE, "block_sparse_moe.primary_router.weight": [4, 32]}, OUTER)),
    "Spark2_5ForCausalLM": (USUAL | {
        "head_dim": 8, "hidden_act": "gelu", "layer_types": KINDS, "sliding_window": 16,
        "gate_attn_act_mode": "sigmoid", "headwise_attn_output_gate": True, "rope_theta": None, "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}},
        named("model.layers", 2, {
            **NORMS, **FORWARD, "self_attn.q_k_v_proj.weight": [64, 32], "self_attn.o_proj.weight": [32, 32],
            "self_attn.g_proj.weight": [4, 32]}, OUTER)),
    "MapleForCausalLM": (USUAL | MIXTURE | {
        "head_dim": 8, "num_shared_experts": 0, "norm_topk_prob": True, "nope_on_global_attention": True,
        "sliding_window": 16, "layer_types": KINDS, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, named("model.layers", 2, {
                **NORMS, **QKVO, **EXPERTS, "self_attn.q_norm.weight": [8], "self_attn.k_norm.weight": [8]}, OUTER)),
    "CodeShellForCausalLM": ({
        "vocab_size": N_VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "num_query_groups": 2, "n_positions": 128,
        "n_inner": None, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_pytorch_tanh",
        "position_embedding_type": "rope", "group_query_attention": True, "tie_word_embeddings": False,
        "model_type": "codeshell"}, named("transformer.h", 2, {
            **normed("ln_1"), **normed("ln_2"), "attn.c_attn.weight": [64, 32], "attn.c_attn.bias": [64],
            "attn.c_proj.weight": [32, 32], "attn.c_proj.bias": [32], "mlp.c_fc.weight": [128, 32],
            "mlp.c_fc.bias": [128], "mlp.c_proj.weight": [32, 128], "mlp.c_proj.bias": [32]}, {
            "transformer.wte.weight": [N_VOCAB, 32], "lm_head.weight": [N_VOCAB, 32], **normed("transformer.ln_f")})),
    "CogVLMForCausalLM": (USUAL | {"num_key_value_heads": None, "num_multi_query_heads": 4}, named("model.layers", 2, {
        **NORMS, **{f"self_attn.{n}_expert_query_key_value.weight": [96, 32] for n in ("language", "vision")},
        **{f"self_attn.{n}_expert_dense.weight": [32, 32] for n in ("language", "vision")},
        **{f"mlp.{n}_mlp.{m}_proj.weight": s for n in ("language", "vision") for m, s in (
            ("gate", [48, 32]), ("up", [48, 32]), ("down", [32, 48]))}}, OUTER | {
        "model.vision.boi": [2], "model.vision.patch_embedding.cls_embedding": [2]})),
    "OpenELMForCausalLM": ({
        "vocab_size": N_VOCAB, "model_dim": 32, "num_transformer_layers": 2, "head_dim": 8, "num_kv_heads": [1, 2],
        "num_query_heads": [2, 4], "ffn_multipliers": [0.5, 1.5], "ffn_dim_divisor": 16, "max_context_length": 128,
        "rope_freq_constant": 10000, "share_input_output_layers": True, "ffn_with_glu": True,
        "normalize_qk_projections": True, "model_type": "openelm"}, {
            "transformer.token_embeddings.weight": [N_VOCAB, 32], "transformer.norm.weight": [32],
            **{f"transformer.layers.{n}.{name}": shape for n, (heads, kv, ff) in enumerate(((2, 1, 16), (4, 2, 48)))
               for name, shape in {
                   "attn_norm.weight": [32], "ffn_norm.weight": [32], "attn.q_norm.weight": [8],
                   "attn.k_norm.weight": [8], "attn.qkv_proj.weight": [8 * (heads + 2 * kv), 32],
                   "attn.out_proj.weight": [32, 8 * heads], "ffn.proj_1.weight": [2 * ff, 32],
                   "ffn.proj_2.weight": [32, ff]}.items()}}),
    "HrmTextForCausalLM": (USUAL | {
        "num_key_value_heads": 4, "head_dim": 8, "num_hidden_layers": 1, "num_layers_per_stack": 1, "H_cycles": 2,
        "L_cycles": 3, "embedding_scale": 5.6, "prefix_lm": False, "model_type": "hrm_text"}, {
            "model.embed_tokens.weight": [N_VOCAB, 32], "lm_head.weight": [N_VOCAB, 32], "model.z_L_init": [32],
            **{f"model.{stack}_module.layers.0.{name}": shape for stack in "LH" for name, shape in {
                "attn.gqkv_proj.weight": [128, 32], "attn.o_proj.weight": [32, 32], "mlp.gate_up_proj.weight": [96, 32],
                "mlp.down_proj.weight": [32, 48]}.items()}}),
    "GroveMoeForCausalLM": (USUAL | MIXTURE | {"head_dim": 16, "num_experts": 4, "norm_topk_prob": True}, named(
        "model.layers", 2, {
            **NORMS, **EXPERTS, "self_attn.q_proj.weight": [64, 32], "self_attn.k_proj.weight": [32, 32],
            "self_attn.v_proj.weight": [32, 32], "self_attn.o_proj.weight": [32, 64], "self_attn.q_norm.weight": [16],
            "self_attn.k_norm.weight": [16], "mlp.expert_bias": [4],
            **{f"mlp.chunk_experts.{e}.{n}_proj.weight": [16, 32] for e in range(2) for n in ("gate", "up")},
            **{f"mlp.chunk_experts.{e}.down_proj.weight": [32, 16] for e in range(2)}}, OUTER)),
    "Plamo2ForCausalLM": (PLAMO_HEADS | {
        "hidden_size_per_head": 8, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_num_heads": 4, "mamba_step": 2,
        "mamba_enabled": True, "model_type": "plamo2"}, OUTER | in_layers("model.layers.layers", {
            **PLAMO_NORMS, "mixer.in_proj.weight": [64, 32], "mixer.conv1d.weight": [32, 1, 4],
            "mixer.bcdt_proj.weight": [80, 32], "mixer.dt_proj.weight": [4, 64], "mixer.dt_bias": [4],
            "mixer.A_log": [4], "mixer.D": [4], "mixer.dt_norm_weight": [64], "mixer.B_norm_weight": [8],
            "mixer.C_norm_weight": [8], "mixer.out_proj.weight": [32, 32]}, {
            **PLAMO_NORMS, "mixer.qkv_proj.weight": [64, 32], "mixer.o_proj.weight": [32, 32],
            "mixer.q_weight": [4, 8], "mixer.k_weight": [2, 8]})),
    "Plamo3ForCausalLM": (PLAMO_HEADS | {
        "head_dim": 8, "window_size": 16, "sliding_window_pattern": 2, "model_type": "plamo3"}, OUTER | named(
            "model.layers.layers", 2, {
                **PLAMO_NORMS, "mixer.qkv_proj.weight": [64, 32], "mixer.o_proj.weight": [32, 32],
                "mixer.q_norm.weight": [8], "mixer.k_norm.weight": [8]}, {})),
    "QWenLMHeadModel": ({
        "vocab_size": N_VOCAB, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "kv_channels": 8, "max_position_embeddings": 128, "seq_length": 64,
        "layer_norm_epsilon": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 1.0, "no_bias": True,
        "scale_attn_weights": True, "use_dynamic_ntk": True, "use_logn_attn": True, "use_flash_attn": "auto",
        "emb_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "initializer_range": 0.02, "onnx_safe": None,
        "bf16": False, "fp16": False, "fp32": False, "softmax_in_fp32": False, "use_cache_kernel": False,
        "use_cache_quantization": False, "tie_word_embeddings": False, "tokenizer_class": "QWenTokenizer",
        "model_type": "qwen"}, named("transformer.h", 2, {
            "ln_1.weight": [32], "ln_2.weight": [32], "attn.c_attn.weight": [96, 32], "attn.c_attn.bias": [96],
            "attn.c_proj.weight": [32, 32], "mlp.w1.weight": [48, 32], "mlp.w2.weight": [48, 32],
            "mlp.c_proj.weight": [32, 48]}, {
            "transformer.wte.weight": [N_VOCAB, 32], "transformer.ln_f.weight": [32],
            "lm_head.weight": [N_VOCAB, 32]})),
    "GPTRefactForCausalLM": ({
        "vocab_size": N_VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": None,
        "layer_norm_epsilon": 1e-5, "activation_function": "gelu_pytorch_tanh", "multi_query": True,
        "tie_word_embeddings": False, "model_type": "gpt_refact"}, named("transformer.h", 2, {
            "ln_1.weight": [32], "ln_2.weight": [32], "attn.q.weight": [32, 32], "attn.kv.weight": [16, 32],
            "attn.c_proj.weight": [32, 32], "mlp.gate_up_proj.weight": [512, 32], "mlp.c_proj.weight": [32, 256]}, {
            "transformer.wte.weight": [N_VOCAB, 32], "transformer.ln_f.weight": [32],
            "lm_head.weight": [N_VOCAB, 32]})),
    "ArcticForCausalLM": (USUAL | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48,
                                   "moe_layer_frequency": 1, "parallel_attn_mlp_res": True}, named("model.layers", 2, {
        **NORMS, **QKVO, "residual_layernorm.weight": [32], "residual_mlp.w1.weight": [32, 32],
        "residual_mlp.w3.weight": [32, 32], "residual_mlp.w2.weight": [32, 32],
        **{n: [48 if size == 24 else size for size in shape] for n, shape in SPARSE_MOE.items()
           if "shared" not in n and "bias" not in n}}, OUTER)),
    "LLaDAModelLM": ({
        "vocab_size": N_VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 48,
        "max_sequence_length": 128, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "mask_token_id": 3,
        "weight_tying": False, "activation_type": "silu", "block_type": "llama", "model_type": "llada"}, {
            "model.transformer.wte.weight": [N_VOCAB, 32], "model.transformer.ln_f.weight": [32],
            "model.transformer.ff_out.weight": [N_VOCAB, 32], **{
                f"model.transformer.blocks.{n}.{name}": shape for n in range(2) for name, shape in {
                    "attn_norm.weight": [32], "ff_norm.weight": [32], "q_proj.weight": [32, 32],
                    "k_proj.weight": [16, 32], "v_proj.weight": [16, 32], "attn_out.weight": [32, 32],
                    "ff_proj.weight": [48, 32], "up_proj.weight": [48, 32], "ff_out.weight": [32, 48]}.items()}}),
    "LLaDAMoEModelLM": (USUAL | {
        "num_experts": 4, "num_experts_per_tok": 2, "expert_intermediate_size": 24, "norm_topk_prob": None,
        "qk_layernorm": True, "model_type": "llada_moe"}, named("model.layers", 2, {
            **NORMS, **QKVO, **EXPERTS, "self_attn.q_norm.weight": [8], "self_attn.k_norm.weight": [8]}, OUTER)),
    "Cohere2MoeForCausalLM": (USUAL | {
        "head_dim": 8, "layer_norm_eps": 1e-5, "rms_norm_eps": None, "layer_types": KINDS, "sliding_window": 16,
        "logit_scale": 0.25, "intermediate_size": 24, "prefix_dense_intermediate_size": 48, "num_experts": 4,
        "num_experts_per_tok": 2, "num_shared_experts": 1, "first_k_dense_replace": 0, "norm_topk_prob": True,
        "shared_expert_combination_strategy": "average", "expert_selection_fn": "sigmoid",
        "num_nextn_predict_layers": 0, "model_type": "cohere2_moe"}, named("model.layers", 2, {
            "input_layernorm.weight": [32], **QKVO, **EXPERTS, **SHARED}, OUTER)),
    "MiniMaxM3SparseForCausalLM": (USUAL | {
        "head_dim": 16, "rotary_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24,
        "dense_intermediate_size": 48, "n_shared_experts": 1, "routed_scaling_factor": 2.0, "scoring_func": "sigmoid",
        "moe_layer_freq": [0, 1], "sparse_attention_config": {
            "sparse_num_index_heads": 2, "sparse_index_dim": 8, "sparse_topk_blocks": 4, "sparse_block_size": 8,
            "sparse_local_block": 1}, "hidden_act": "swigluoai", "model_type": "minimax_m3"}, OUTER | in_layers(
            "model.layers", *({
                **NORMS, "self_attn.q_proj.weight": [64, 32], "self_attn.k_proj.weight": [32, 32],
                "self_attn.v_proj.weight": [32, 32], "self_attn.o_proj.weight": [32, 64],
                "self_attn.q_norm.weight": [16], "self_attn.k_norm.weight": [16], **more} for more in (FORWARD, {
                    "self_attn.index_q_proj.weight": [16, 32], "self_attn.index_k_proj.weight": [8, 32],
                    "self_attn.index_q_norm.weight": [8], "self_attn.index_k_norm.weight": [8],
                    **{n.replace("gate.e_score", "e_score"): s for n, s in SPARSE_MOE.items()}})))),
    "JanusForConditionalGeneration": ({"text_config": USUAL, "model_type": "janus"}, {
        n.replace("model.", "model.language_model."): s for n, s in named(
            "model.layers", 2, {**NORMS, **FORWARD, **QKVO}, OUTER).items()} | {
        "model.vision_model.embeddings.patch_embedding.weight": [2], "model.aligner.fc1.weight": [2],
        "model.vqmodel.encoder.conv_in.weight": [2], "model.generation_embeddings.weight": [2],
        "model.generation_aligner.fc1.weight": [2], "model.generation_head.proj_out.weight": [2]}),
    "PaddleOCRVLForConditionalGeneration": (USUAL | {
        "head_dim": 16, "rope_theta": 500000.0, "rope_scaling": {
            "type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]}, "use_bias": False,
        "vision_config": VISION, "model_type": "paddleocr_vl"}, named("model.layers", 2, {
            **NORMS, **FORWARD, "self_attn.q_proj.weight": [64, 32], "self_attn.k_proj.weight": [32, 32],
            "self_attn.v_proj.weight": [32, 32], "self_attn.o_proj.weight": [32, 64]}, OUTER | {
            "visual.vision_model.embeddings.patch_embedding.weight": [2], "mlp_AR.linear_1.weight": [2]})),
    "HunYuanVLForConditionalGeneration": (USUAL | {
        "head_dim": 16, "use_qk_norm": True, "attention_bias": False, "rope_scaling": {
            "type": "xdrope", "rope_type": "xdrope", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0,
            "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0, "xdrope_section": [2, 2, 2, 2]},
        "vision_config": VISION, "model_type": "hunyuan_vl"}, named("model.layers", 2, {
            **NORMS, **FORWARD, "self_attn.q_proj.weight": [64, 32], "self_attn.k_proj.weight": [32, 32],
            "self_attn.v_proj.weight": [32, 32], "self_attn.o_proj.weight": [32, 64],
            "self_attn.query_layernorm.weight": [16], "self_attn.key_layernorm.weight": [16]}, OUTER | {
            "vit.embeddings.patch_embedding.weight": [2], "vit.perceive.proj.0.weight": [2]})),
    "DeepseekOCRForCausalLM": ({"language_config": DENSE | ROUTED | {
        "num_key_value_heads": 4, "kv_lora_rank": None, "q_lora_rank": None, "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 0, "v_head_dim": 0, "use_mla": False, "topk_method": "greedy", "lm_head": True,
        "routed_scaling_factor": None, "n_shared_experts": 2}, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "model_type": "deepseek_vl_v2"}, {
        **named("model.layers", 2, {**NORMS, **QKVO, "self_attn.k_proj.weight": [32, 32],
                                    "self_attn.v_proj.weight": [32, 32]}, OUTER),
        **{f"model.layers.0.{n}": s for n, s in FORWARD.items()},
        **{f"model.layers.1.{n}": [48 if size == 24 and "shared" in n else size for size in s]
           for n, s in (EXPERTS | SHARED).items()},
        "model.sam_model.patch_embed.proj.weight": [2], "model.vision_model.embeddings.class_embedding": [2],
        "model.projector.layers.weight": [2], "model.image_newline": [2], "model.view_seperator": [2]}),
}  # fmt: skip


# DeepSeek V4: matrices of 8-bit floats, experts of 4-bit ones.

V4_COMPRESSOR = {"wkv.weight": [32, 64], "wgate.weight": [32, 64], "ape": [4, 32], "norm.weight": [16]}
V4_LAYER = {
    "attn_norm.weight": [64], "ffn_norm.weight": [64], "attn.attn_sink": [4], "attn.wq_a.weight": [32, 64],
    "attn.wq_b.weight": [64, 32], "attn.q_norm.weight": [32], "attn.wkv.weight": [16, 64], "attn.kv_norm.weight": [16],
    "attn.wo_a.weight": [64, 32], "attn.wo_b.weight": [64, 64], "ffn.gate.weight": [4, 64], "ffn.gate.bias": [4],
    **{f"hc_{half}_{kind}": shape for half in ("attn", "ffn") for kind, shape in (
        ("fn", [24, 256]), ("base", [24]), ("scale", [3]))},
    **{f"ffn.experts.{e}.{n}.weight": [32, 32] for e in range(4) for n in ("w1", "w3")},
    **{f"ffn.experts.{e}.w2.weight": [64, 16] for e in range(4)},
    **{f"ffn.experts.{e}.{n}.scale": [32, 2] for e in range(4) for n in ("w1", "w3")},
    **{f"ffn.experts.{e}.w2.scale": [64, 1] for e in range(4)},
    **{f"ffn.shared_experts.{n}.weight": [32, 64] for n in ("w1", "w3")}, "ffn.shared_experts.w2.weight": [64, 32],
    **{f"{n}.scale": [1, 1] for n in (
        "attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b", "ffn.shared_experts.w1",
        "ffn.shared_experts.w2", "ffn.shared_experts.w3")},
}  # fmt: skip
PUBLISHED |= {
    "DeepseekV4ForCausalLM": ({
        "vocab_size": N_VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 16, "qk_rope_head_dim": 8, "q_lora_rank": 32, "o_groups": 2,
        "o_lora_rank": 32, "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "norm_topk_prob": True, "routed_scaling_factor": 1.5, "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc", "swiglu_limit": 10.0, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128, "rope_theta": 10000, "compress_rope_theta": 160000, "rope_scaling": {
            "type": "yarn", "factor": 16, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1},
        "sliding_window": 32, "compress_ratios": [0, 4, 128, 0], "index_n_heads": 2, "index_head_dim": 16,
        "index_topk": 8, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "num_hash_layers": 1,
        "num_nextn_predict_layers": 1, "expert_dtype": "fp4", "tie_word_embeddings": False, "attention_bias": False,
        "model_type": "deepseek_v4", "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128]}}, {
        "embed.weight": [N_VOCAB, 64], "norm.weight": [64], "head.weight": [N_VOCAB, 64], "hc_head_fn": [4, 256],
        "hc_head_base": [4], "hc_head_scale": [1], "mtp.0.enorm.weight": [64], "mtp.0.e_proj.weight": [64, 64],
        "mtp.0.e_proj.scale": [1, 1], **in_layers("layers", V4_LAYER | {"ffn.gate.tid2eid": [N_VOCAB, 2]}, V4_LAYER | {
            **{f"attn.compressor.{n}": s for n, s in V4_COMPRESSOR.items()},
            **{f"attn.indexer.compressor.{n}": s for n, s in V4_COMPRESSOR.items()},
            "attn.indexer.wq_b.weight": [32, 32], "attn.indexer.wq_b.scale": [1, 1],
            "attn.indexer.weights_proj.weight": [2, 64]}, V4_LAYER | {
            "attn.compressor.wkv.weight": [16, 64], "attn.compressor.wgate.weight": [16, 64],
            "attn.compressor.ape": [128, 16], "attn.compressor.norm.weight": [16], "ffn.gate.bias_vl": [4]})}),
}  # fmt: skip
# MiMo V2 and Step: layers with a window have other heads.


def gqa(heads: int, kv_heads: int, head: int = 8, value: int = 8, embd: int = 32) -> dict[str, list[int]]:
    return {"self_attn.q_proj.weight": [heads * head, embd], "self_attn.k_proj.weight": [kv_heads * head, embd],
            "self_attn.v_proj.weight": [kv_heads * value, embd], "self_attn.o_proj.weight": [embd, heads * value]}


MIMO = USUAL | {
    "head_dim": 12, "v_head_dim": 8, "swa_head_dim": 12, "swa_v_head_dim": 8, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4, "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "sliding_window": 16,
    "layernorm_epsilon": 1e-5, "rms_norm_eps": None, "swa_rope_theta": 5000.0, "partial_rotary_factor": 0.334,
    "attention_value_scale": 0.707, "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": None,
    "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "routed_scaling_factor": None, "model_type": "mimo_v2_flash"}  # fmt: skip
MIMO_DRAFT = {
    "eh_proj.weight": [32, 64], "enorm.weight": [32], "hnorm.weight": [32], "input_layernorm.weight": [32],
    "pre_mlp_layernorm.weight": [32], "final_layernorm.weight": [32], "self_attn.attention_sink_bias": [4], **FORWARD}
# Eight devices: each has an eighth of queries, keys and values, and blocks of scales of its own.
PRO = MIMO | {
    "hidden_size": 128, "num_attention_heads": 16, "swa_num_attention_heads": 16, "num_key_value_heads": 8,
    "swa_num_key_value_heads": 16, "head_dim": 16, "swa_head_dim": 16, "v_head_dim": 16, "swa_v_head_dim": 16,
    "moe_intermediate_size": 32, "partial_rotary_factor": 0.375, "model_type": "mimo_v2",
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
                            "activation_scheme": "dynamic", "store_dtype": "mxfp4", "mxfp4_block_size": 32},
}  # fmt: skip
WIDE_NORMS = {"input_layernorm.weight": [128], "post_attention_layernorm.weight": [128]}
WIDE_FORWARD = {"mlp.gate_proj.weight": [48, 128], "mlp.up_proj.weight": [48, 128], "mlp.down_proj.weight": [128, 48]}
STEP = {
    "vocab_size": N_VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 16,
    "num_attention_heads": 2, "num_attention_groups": 1, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "rope_theta": [5000000.0, 10000.0, 10000.0, 10000.0], "partial_rotary_factors": [0.5, 1.0, 1.0, 1.0],
    "layer_types": ["full_attention", *["sliding_attention"] * 3], "sliding_window": 16,
    "attention_other_setting": {"attention_type": "sliding_attention", "num_attention_heads": 3,
                                "num_attention_groups": 1, "head_dim": 16},
    "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"},
    "yarn_only_types": ["full_attention"],
    "moe_layers_enum": "1,2", "moe_num_experts": 4, "moe_top_k": 2, "moe_intermediate_size": 24, "moe_every_n_layer": 1,
    "share_expert_dim": 24, "norm_expert_weight": True, "moe_router_scaling_factor": 3.0,
    "moe_router_activation": "sigmoid", "use_moe_router_bias": True, "need_fp32_gate": True,
    "use_head_wise_attn_gate": True, "use_qk_norm": True, "sink": False, "zero_centered": True, "use_moe": False,
    "swiglu_limits": [0, 0, 7.0, None], "swiglu_limits_shared": [0, 0, 16, None], "num_nextn_predict_layers": 1,
    "att_impl_type": "GQA", "tie_word_embeddings": False, "model_type": "step3p5"}  # fmt: skip


def step_attention(heads: int) -> dict[str, list[int]]:
    return NORMS | gqa(heads, 1, 16, 16) | {
        "self_attn.q_norm.weight": [16], "self_attn.k_norm.weight": [16], "self_attn.g_proj.weight": [heads, 32]}


STEP_MIXTURE = {
    "moe.gate.weight": [4, 32], "moe.router_bias": [4], "moe.gate_proj.weight": [4, 24, 32],
    "moe.up_proj.weight": [4, 24, 32], "moe.down_proj.weight": [4, 32, 24], "share_expert.gate_proj.weight": [24, 32],
    "share_expert.up_proj.weight": [24, 32], "share_expert.down_proj.weight": [32, 24]}  # fmt: skip
STEP_DRAFT = {
    "eh_proj.weight": [32, 64], "enorm.weight": [32], "hnorm.weight": [32],
    "transformer.shared_head.norm.weight": [32], "transformer.shared_head.output.weight": [N_VOCAB, 32]}  # fmt: skip
STEP_SHAPES = OUTER | in_layers("model.layers", step_attention(2) | FORWARD, step_attention(3) | STEP_MIXTURE,
                                step_attention(3) | STEP_MIXTURE, step_attention(3) | FORWARD | STEP_DRAFT)

# dots3-note and Hy4: latent attention.

DOTS3 = USUAL | {
    "num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"], "num_key_value_heads": 4,
    "head_dim": 20, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 12, "swa_num_attention_heads": 2, "swa_q_lora_rank": 24, "swa_kv_lora_rank": 12,
    "swa_qk_nope_head_dim": 12, "swa_qk_rope_head_dim": 4, "swa_head_dim": 16, "swa_v_head_dim": 8,
    "swa_rope_theta": 5000.0, "sliding_window_size": 16, "apply_mla_qkv_lora_rescale": True, "use_dsa": True,
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 16, "k_rope_only_layernorm": True,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "attention_gate_type": "headwise",
    "swa_attention_gate_type": "headwise", "model_type": "dots3_note"}  # fmt: skip


def dots_attention(heads: int, rank: int, plain: int, value: int) -> dict[str, list[int]]:
    return NORMS | within("self_attn", {
        "q_a_proj.weight": [24, 32], "q_a_layernorm.weight": [24], "q_b_proj.weight": [heads * (plain + 4), 24],
        "kv_a_proj_with_mqa.weight": [rank + 4, 32], "kv_a_layernorm.weight": [rank],
        "kv_b_proj.weight": [heads * (plain + value), rank], "o_proj.weight": [32, heads * value],
        "k_rope_only_layernorm.weight": [4], "g_proj.weight": [heads, 32]})


INDEXER_NAMES = {
    "indexer.wq_b.weight": [16, 24], "indexer.wk.weight": [8, 32], "indexer.k_norm.weight": [8],
    "indexer.k_norm.bias": [8], "indexer.weights_proj.weight": [2, 32]}  # fmt: skip
ROUTED_MIXTURE = EXPERTS | SHARED | {"mlp.gate.e_score_correction_bias": [4]}
DOTS3_SHAPES = OUTER | in_layers(
    "model.layers", dots_attention(4, 16, 8, 12) | within("self_attn", INDEXER_NAMES) | FORWARD,
    dots_attention(2, 12, 12, 8) | ROUTED_MIXTURE, dots_attention(2, 12, 12, 8) | FORWARD | {
        "eh_proj.weight": [32, 64], "enorm.weight": [32], "hnorm.weight": [32], "shared_head.norm.weight": [32],
    }) | {"model.mtp.embed_tokens.weight": [N_VOCAB, 32], "vision_encoder.patch_embed.proj.weight": [2]}  # fmt: skip
HY4 = USUAL | LATENT | {
    "num_hidden_layers": 2, "num_key_value_heads": 2, "rope_scaling": None, "indexer_types": ["full", "shared"],
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "n_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"], "n_group": 1,
    "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "swiglu_limit": 10.0, "hc_mult": 4,
    "hc_eps": 1e-6, "hc_magnitude": 2.0, "enable_lm_head_fp32": True, "num_nextn_predict_layers": 1,
    "model_type": "hy_v4"}  # fmt: skip
HY4_LAYER = NORMS | within("self_attn", LATENT_NAMES) | {
    "self_attn.learnable_sink_param": [4], "self_attn.linear_gate.weight": [48, 32],
    **{f"hc_{half}_layer.hc_pre.hc_{kind}": shape for half in ("attn", "mlp") for kind, shape in (
        ("fn", [8, 128]), ("base", [8]), ("scale", [2]))}}  # fmt: skip
HY4_MIXTURE = SHARED | {
    "mlp.experts.gate_up_proj": [4, 48, 32], "mlp.experts.down_proj": [4, 32, 24], "mlp.gate.weight": [4, 32],
    "mlp.gate.e_score_correction_bias": [4]}  # fmt: skip
HY4_SHAPES = OUTER | {
    "model.hc_head.hc_head_fn": [4, 128], "model.hc_head.hc_head_base": [4], "model.hc_head.hc_head_scale": [1],
    "model.mtp_layers.0.enorm.weight": [2],
} | in_layers("model.layers", HY4_LAYER | FORWARD | within("self_attn", INDEXER_NAMES), HY4_LAYER | HY4_MIXTURE)

# Qwen 4


def mixer(prefix: str, inject: bool = True) -> dict[str, list[int]]:
    return {f"{prefix}.hc_norm.weight": [64], f"{prefix}.input_mix_weight_down.weight": [6, 64],
            f"{prefix}.input_mix_weight_up.weight": [64, 6],
            **({f"{prefix}.block_inject_weight.weight": [2, 64]} if inject else {})}  # fmt: skip


QWEN4_BLOCK = mixer("attn_hyper_connection") | mixer("mlp_hyper_connection") | {
    "mlp.experts.gate_up_proj": [4, 48, 32], "mlp.experts.down_proj": [4, 32, 24], "mlp.gate.weight": [4, 32],
    "mlp.shared_expert_gate.weight": [1, 32], "mlp.shared_expert.gate_proj.weight": [40, 32],
    "mlp.shared_expert.up_proj.weight": [40, 32], "mlp.shared_expert.down_proj.weight": [32, 40]}  # fmt: skip
QWEN4_ATTENTION = QWEN4_BLOCK | {
    "self_attn.q_proj.weight": [128, 32], "self_attn.k_proj.weight": [32, 32], "self_attn.v_proj.weight": [32, 32],
    "self_attn.o_proj.weight": [32, 64], "self_attn.q_norm.weight": [16], "self_attn.k_norm.weight": [16],
    "self_attn.indexer.index_qk_proj.weight": [24, 32], "self_attn.indexer.q_layernorm.weight": [8],
    "self_attn.indexer.k_layernorm.weight": [8]}  # fmt: skip
QWEN4_NET = QWEN4_BLOCK | {
    "linear_attn.in_proj_qkv.weight": [64, 32], "linear_attn.in_proj_z.weight": [32, 32],
    "linear_attn.in_proj_b.weight": [4, 32], "linear_attn.in_proj_a.weight": [4, 32], "linear_attn.A_log": [4],
    "linear_attn.dt_bias": [4], "linear_attn.conv1d.weight": [64, 1, 4], "linear_attn.norm.weight": [8],
    "linear_attn.out_proj.weight": [32, 32]}  # fmt: skip
QWEN4_TABLE = {
    "ple.key_proj.weight": [64, 32], "ple.value_proj.weight": [32, 32], "ple.norm_key.weight": [64],
    "ple.norm_query.weight": [64], "ple.norm_conv.weight": [64], "ple.conv1d.weight": [64, 1, 4],
    "ple.ple_embedding.layer_multipliers": [3], "ple.ple_embedding.ngram_heads_offsets": [4],
    "ple.ple_embedding.ngram_heads_vocab_sizes": [4],
    **{f"ple.ple_embedding.ngram_embedding.shard_{n}.weight": [12, 8] for n in (1, 0, 2)}}  # fmt: skip
QWEN4 = USUAL | DELTA | MIXTURE | {
    "num_hidden_layers": 2, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 4, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 40, "hc_count": 2, "hc_lowrank": 6, "indexer_n_heads": 2, "indexer_kv_heads": 1,
    "indexer_head_dim": 8, "indexer_budget": 64, "indexer_compress_ratio": 4, "ple_layer_ids": [1],
    "ple_embed_dim": 32, "ple_conv_kernel_size": 4, "ngram_size": 3, "heads_per_ngram": 2, "split_ngram_parts": 3,
    "ngram_vocab_size_base": 9, "seed": 1234, "make_ngram_vocab_size_divisible_by": 4, "output_gate_type": "sigmoid",
    "mtp_num_hidden_layers": 1, "eos_token_id": [1, 0], "rope_theta": None, "intermediate_size": None,
    "rope_parameters": MROPE | {"partial_rotary_factor": 0.25}, "model_type": "qwen4_exp_text"}  # fmt: skip
QWEN4_SHAPES = {
    "model.language_model.embed_tokens.weight": [N_VOCAB, 32], "lm_head.weight": [N_VOCAB, 32],
    **mixer("model.language_model.hyper_connection_mixer", False),
    **in_layers("model.language_model.layers", QWEN4_NET | QWEN4_TABLE, QWEN4_ATTENTION),
    **draft("mtp.layers.0.", QWEN4_ATTENTION), "mtp.fc_embedding.weight": [32, 32], "mtp.fc_hidden.weight": [32, 32],
    "mtp.pre_fc_norm_embedding.weight": [32], "mtp.pre_fc_norm_hidden.weight": [64],
    **mixer("mtp.hyper_connection_mixer", False), "model.visual.patch_embed.proj.weight": [2]}  # fmt: skip
PUBLISHED |= {
    "MiMoV2FlashForCausalLM": (MIMO, OUTER | in_layers(
        "model.layers", NORMS | gqa(4, 2, 12) | FORWARD,
        NORMS | gqa(4, 4, 12) | EXPERTS | {"self_attn.attention_sink_bias": [4],
                                           "mlp.gate.e_score_correction_bias": [4]}) | in_layers(
            "model.mtp.layers", *[MIMO_DRAFT | gqa(4, 4, 12)] * 3)),
    "MiMoV2ForCausalLM": (PRO | {"tie_word_embeddings": False}, {
        "model.embed_tokens.weight": [N_VOCAB, 128], "model.norm.weight": [128], "lm_head.weight": [N_VOCAB, 128],
        **in_layers("model.layers", WIDE_NORMS | WIDE_FORWARD | {
            "self_attn.qkv_proj.weight": [512, 128], "self_attn.qkv_proj.weight_scale_inv": [8, 1],
            "self_attn.o_proj.weight": [128, 256]}, WIDE_NORMS | {
            "self_attn.qkv_proj.weight": [768, 128], "self_attn.qkv_proj.weight_scale_inv": [8, 1],
            "self_attn.o_proj.weight": [128, 256], "self_attn.attention_sink_bias": [16], "mlp.gate.weight": [4, 128],
            "mlp.gate.e_score_correction_bias": [4],
            **{f"mlp.experts.{e}.{n}_proj.weight": [32, 64] for e in range(4) for n in ("gate", "up")},
            **{f"mlp.experts.{e}.down_proj.weight": [128, 16] for e in range(4)},
            **{f"mlp.experts.{e}.{n}_proj.weight_scale": [32, 4] for e in range(4) for n in ("gate", "up")},
            **{f"mlp.experts.{e}.down_proj.weight_scale": [128, 1] for e in range(4)}}),
        **in_layers("model.mtp.layers", *[{
            "eh_proj.weight": [128, 256], "enorm.weight": [128], "hnorm.weight": [128],
            "input_layernorm.weight": [128], "pre_mlp_layernorm.weight": [128], "final_layernorm.weight": [128],
            "self_attn.qkv_proj.weight": [768, 128], "self_attn.o_proj.weight": [128, 256],
            "self_attn.attention_sink_bias": [16], **WIDE_FORWARD}] * 3)}),
    "Step3p5ForCausalLM": (STEP, STEP_SHAPES),
    "Step3p7ForConditionalGeneration": (
        {"text_config": STEP | {"num_nextn_predict_layers": 0}, "vision_config": VISION, "model_type": "step3p7",
         "num_nextn_predict_layers": 0, "tie_word_embeddings": False, "quantization_config": {
             "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}},
        {n: s for n, s in STEP_SHAPES.items() if "layers.3." not in n} | {"vision_model.conv1.weight": [2]} | {
            f"model.layers.{n}.moe.{part}_proj.weight_scale_inv": [4, 2, 2] for n in (1, 2)
            for part in ("gate", "up", "down")}),
    "Dots3NoteForCausalLM": (DOTS3, DOTS3_SHAPES),
    "HYV4ForCausalLM": (HY4, HY4_SHAPES),
    "Qwen4ExpForCausalLM": (QWEN4, {n.replace("language_model.", ""): s for n, s in QWEN4_SHAPES.items()
                                    if "visual" not in n}),
    "Qwen4ExpForConditionalGeneration": (
        {"text_config": QWEN4, "vision_config": VISION, "image_token_id": 5, "tie_word_embeddings": False,
         "model_type": "qwen4_exp"}, QWEN4_SHAPES),
}  # fmt: skip
# Encoders, and others of a kind.

DBRX = {
    "vocab_size": N_VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, "model_type": "dbrx",
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 500000, "attn_pdrop": 0.0},
    "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.01,
                   "moe_loss_weight": 0.05, "ffn_act_fn": {"name": "silu"}, "moe_normalize_expert_weights": 1},
    "tie_word_embeddings": False, "emb_pdrop": 0.0}  # fmt: skip
JAIS = {
    "vocab_size": N_VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64,
    "activation_function": "swiglu", "position_embedding_type": "alibi", "layer_norm_epsilon": 1e-5,
    "mup_embeddings_scale": 14.6, "mup_output_alpha": 2.22, "mup_width_scale": 0.125, "scale_attn_weights": True,
    "mup_scale_qk_dot_by_d": True, "tie_word_embeddings": True, "model_type": "jais"}  # fmt: skip
JAIS_SHAPES = named("transformer.h", 2, {
    **normed("ln_1"), **normed("ln_2"), "attn.c_attn.weight": [32, 96], "attn.c_attn.bias": [96],
    "attn.c_proj.weight": [32, 32], "attn.c_proj.bias": [32], "mlp.c_fc.weight": [32, 48], "mlp.c_fc.bias": [48],
    "mlp.c_fc2.weight": [32, 48], "mlp.c_fc2.bias": [48], "mlp.c_proj.weight": [48, 32], "mlp.c_proj.bias": [32],
}, {"transformer.wte.weight": [N_VOCAB, 32], "transformer.relative_pe.slopes": [4], "lm_head.weight": [N_VOCAB, 32],
    **normed("transformer.ln_f")})  # fmt: skip
JINA_ATTENTION = {
    **{f"attention.self.{n}.{k}": s for n in ("query", "key", "value") for k, s in (
        ("weight", [32, 32]), ("bias", [32]))},
    "attention.output.dense.weight": [32, 32], "attention.output.dense.bias": [32],
    **normed("attention.output.LayerNorm")}  # fmt: skip
JINA_OUTER = {"embeddings.word_embeddings.weight": [N_VOCAB, 32], "embeddings.token_type_embeddings.weight": [2, 32],
              **normed("embeddings.LayerNorm")}  # fmt: skip
JINA = {"vocab_size": N_VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "hidden_act": "gelu", "intermediate_size": 48, "max_position_embeddings": 128, "layer_norm_eps": 1e-12,
        "type_vocab_size": 2,
        "position_embedding_type": "alibi", "feed_forward_type": "geglu", "emb_pooler": "mean",
        "model_type": "bert"}  # fmt: skip
GROK = USUAL | {
    "hidden_act": "gelu", "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "head_dim": 8, "attn_logit_softcapping": 30.0, "router_logit_softcapping": 30.0, "final_logit_softcapping": 50,
    "rope_type": "original", "scaling_factor": 16.0, "original_max_position_embeddings": 64,
    "extrapolation_factor": 1.0, "attn_factor": 1.0, "beta_fast": 8, "beta_slow": 1, "attn_temperature_len": 1024,
    "embedding_multiplier_scale": 90.5, "output_multiplier_scale": 0.5, "residual_moe": True,
    "model_type": "grok-1"}  # fmt: skip
GROK_LAYER = QKVO | FORWARD | {
    **{f"{n}_norm.weight": [32] for n in ("pre_attn", "post_attn", "pre_moe", "post_moe")},
    **{n: s for n, s in SPARSE_MOE.items() if "shared" not in n and "bias" not in n}}  # fmt: skip
DECI = {k: v for k, v in USUAL.items() if k not in ("num_key_value_heads", "intermediate_size")} | {
    "num_hidden_layers": 4, "num_key_value_heads": None, "intermediate_size": None, "rope_scaling": {
        k: v for k, v in LLAMA3.items() if k != "rope_theta"}, "model_type": "nemotron-nas", "block_configs": [
        {"attention": {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False},
         "ffn": {"ffn_mult": 10.0, "no_op": False, "replace_with_linear": False}},
        {"attention": {"n_heads_in_group": 4, "no_op": False, "replace_with_linear": False},
         "ffn": {"ffn_mult": 20.0, "no_op": False, "replace_with_linear": False}},
        {"attention": {"n_heads_in_group": None, "no_op": False, "replace_with_linear": True},
         "ffn": {"ffn_mult": 10.0, "no_op": False, "replace_with_linear": False}},
        {"attention": {"n_heads_in_group": None, "no_op": True, "replace_with_linear": False},
         "ffn": {"ffn_mult": 10.0, "no_op": False, "replace_with_linear": False}}]}  # fmt: skip


def deci_forward(width: int) -> dict[str, list[int]]:
    return {"post_attention_layernorm.weight": [32], "mlp.gate_proj.weight": [width, 32],
            "mlp.up_proj.weight": [width, 32], "mlp.down_proj.weight": [32, width]}  # fmt: skip


TALKIE_LAYER = {
    **{f"attn.attn_{n}.weight": [32, 32] for n in ("query", "key", "value", "resid")}, "attn.head_gain.head_g": [4],
    "attn_gain.a_g": [1], "mlp.mlp_gate.weight": [48, 32], "mlp.mlp_linear.weight": [48, 32],
    "mlp.mlp_resid.weight": [32, 48], "mlp_gain.a_g": [1], "embed_skip.a_g": [1]}  # fmt: skip
BASE = {n: s for n, s in OUTER.items() if "lm_head" not in n}  # of models without a head


def bare(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    return {name.removeprefix("model."): shape for name, shape in shapes.items()}


SARVAM = USUAL | MIXTURE | {
    "num_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "score_function": "sigmoid", "head_dim": 8, "model_type": "sarvam_moe"}  # fmt: skip
PUBLISHED |= {
    "SarvamMoEForCausalLM": (SARVAM, {**named("model.layers", 2, {
        **NORMS, "attention.query_key_value.weight": [64, 32], "attention.dense.weight": [32, 32],
        "attention.query_layernorm.weight": [8], "attention.key_layernorm.weight": [8]},
        {"model.word_embeddings.weight": [N_VOCAB, 32], "model.norm.weight": [32], "lm_head.weight": [N_VOCAB, 32]}),
        **{f"model.layers.0.{n}": s for n, s in FORWARD.items()},
        **{f"model.layers.1.{n}": s for n, s in (EXPERTS | SHARED | {"mlp.gate.expert_bias": [4]}).items()}}),
    "DbrxForCausalLM": (DBRX, named("transformer.blocks", 2, {
        "norm_attn_norm.norm_1.weight": [32], "norm_attn_norm.norm_2.weight": [32],
        "norm_attn_norm.attn.Wqkv.weight": [64, 32], "norm_attn_norm.attn.out_proj.weight": [32, 32],
        "ffn.router.layer.weight": [4, 32], "ffn.experts.mlp.w1": [192, 32], "ffn.experts.mlp.v1": [192, 32],
        "ffn.experts.mlp.w2": [192, 32],
    }, {"transformer.wte.weight": [N_VOCAB, 32], "transformer.norm_f.weight": [32], "lm_head.weight": [N_VOCAB, 32]})),
    "JAISLMHeadModel": (JAIS, JAIS_SHAPES),
    "EuroBertModel": (USUAL | {"model_type": "eurobert", "is_causal": False, "num_key_value_heads": 2}, bare(
        named("model.layers", 2, {**NORMS, **FORWARD, **QKVO}, BASE))),
    "NeoBERT": ({
        "vocab_size": N_VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 72, "max_length": 128, "norm_eps": 1e-5, "hidden_act": "SwiGLU", "rms_norm": True,
        "rope": True, "model_type": "neobert"}, named("model.transformer_encoder", 2, {
            "qkv.weight": [96, 32], "wo.weight": [32, 32], "ffn.w12.weight": [96, 32], "ffn.w3.weight": [32, 48],
            "attention_norm.weight": [32], "ffn_norm.weight": [32]}, {
            "model.encoder.weight": [N_VOCAB, 32], "model.layer_norm.weight": [32], "decoder.weight": [2],
            "decoder.bias": [2]})),
    "JinaBertModel": (JINA, JINA_OUTER | named("encoder.layer", 2, {
        **JINA_ATTENTION, "mlp.gated_layers.weight": [96, 32], "mlp.wo.weight": [32, 48], "mlp.wo.bias": [32],
        **normed("mlp.layernorm")}, {"pooler.dense.weight": [2]})),
    "JinaBertForMaskedLM": (JINA, JINA_OUTER | named("encoder.layer", 2, {
        **JINA_ATTENTION, **normed("attention.self.layer_norm_q"), **normed("attention.self.layer_norm_k"),
        **normed("layer_norm_1"), **normed("layer_norm_2"), "mlp.up_gated_layer.weight": [96, 32],
        "mlp.down_layer.weight": [32, 48], "mlp.down_layer.bias": [32]}, {"cls.predictions.bias": [2]})),
    "BitnetForCausalLM": (USUAL | {"tie_word_embeddings": True, "weight_bits": 1, "input_bits": 8,
                                   "model_type": "llama"}, named("model.layers", 2, {
        **NORMS, **FORWARD, **QKVO, "self_attn.inner_attn_ln.weight": [32], "mlp.ffn_layernorm.weight": [48]}, BASE)),
    "MiniMaxText01ForCausalLM": (USUAL | {
        "head_dim": 8, "rotary_dim": 4, "num_hidden_layers": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
        "intermediate_size": 24, "attn_type_list": [0] * 7 + [1], "postnorm": True, "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid", **{f"layernorm_{n}_{k}": v for n in ("full_attention", "linear_attention", "mlp")
                                         for k, v in (("alpha", 3.5565588200778455), ("beta", 1.0))},
        "model_type": "minimax_text_01"}, OUTER | in_layers("model.layers", *[
            NORMS | {n: s for n, s in SPARSE_MOE.items() if "shared" not in n and "bias" not in n} | within(
                "self_attn", {"qkv_proj.weight": [96, 32], "output_gate.weight": [32, 32], "norm.weight": [32],
                              "out_proj.weight": [32, 32]} if layer < 7 else {
                    "q_proj.weight": [32, 32], "k_proj.weight": [16, 32], "v_proj.weight": [16, 32],
                    "o_proj.weight": [32, 32]}) for layer in range(8)])),
    "TalkieForCausalLM": ({
        "vocab_size": N_VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "head_dim": 8, "max_position_embeddings": 128, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "model_type": "talkie"}, named("model.blocks", 2, TALKIE_LAYER, {
            "model.embed.weight": [N_VOCAB, 32], "lm_head.weight": [N_VOCAB, 32], "lm_head_gain.w_g": [1]})),
    "Grok1ForCausalLM": (GROK, named("model.layers", 2, GROK_LAYER, OUTER)),
    "DeciLMForCausalLM": (DECI, OUTER | in_layers(
        "model.layers", NORMS | gqa(4, 2) | deci_forward(256), NORMS | gqa(4, 1) | deci_forward(512),
        NORMS | {"self_attn.linear_attn.weight": [32, 32]} | deci_forward(256), deci_forward(256))),
    "LlamaModel": (USUAL, bare(named("model.layers", 2, {**NORMS, **FORWARD, **QKVO}, BASE))),
    "LlamaBidirectionalModel": (USUAL, bare(named("model.layers", 2, {**NORMS, **FORWARD, **QKVO}, BASE))),
    "Qwen2Model": (USUAL, bare(named("model.layers", 2, {**NORMS, **FORWARD, **QKVO}, BASE))),
    "Qwen3Model": (USUAL | {"head_dim": 8}, bare(named("model.layers", 2, {
        **NORMS, **FORWARD, **QKVO, "self_attn.q_norm.weight": [8], "self_attn.k_norm.weight": [8]}, BASE))),
    "MambaLMHeadModel": ({"vocab_size": N_VOCAB, "d_model": 32, "n_layer": 2, "ssm_cfg": {}, "rms_norm": True,
                          "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 1}, named(
        "backbone.layers", 2, {
            "norm.weight": [32], "mixer.in_proj.weight": [128, 32], "mixer.conv1d.weight": [64, 1, 4],
            "mixer.conv1d.bias": [64], "mixer.x_proj.weight": [34, 64], "mixer.dt_proj.weight": [64, 2],
            "mixer.dt_proj.bias": [64], "mixer.A_log": [64, 16], "mixer.D": [64], "mixer.out_proj.weight": [32, 64]},
        {"backbone.embedding.weight": [N_VOCAB, 32], "backbone.norm_f.weight": [32],
         "lm_head.weight": [N_VOCAB, 32]})),
}  # fmt: skip
# Qwen 2 with mixers of RWKV, and a mixture whose blocks differ.

SWIFT = {
    **NORMS, **FORWARD, **{f"self_attn.time_maa_{n}": [1, 1, 32] for n in "xrkvwg"},
    "self_attn.time_maa_w1": [32, 40], "self_attn.time_maa_w2": [5, 8, 32], "self_attn.time_decay": [1, 1, 32],
    "self_attn.time_decay_w1": [32, 12], "self_attn.time_decay_w2": [12, 32],
    **{n: s for n, s in QKVO.items()}, "self_attn.q_proj.bias": [32], "self_attn.k_proj.bias": [16],
    "self_attn.v_proj.bias": [16], "self_attn.gate.weight": [32, 32]}  # fmt: skip
HYBRID_RANKS = {"w": 64, "a": 64, "g": 128}
HYBRID = NORMS | FORWARD | within("self_attn.time_mixer", {
    **{f"x_{n}": [1, 1, 32] for n in "rwkvag"}, **{f"{n}0": [1, 1, 32] for n in "wa"},
    **{f"{n}1": [32, rank] for n, rank in HYBRID_RANKS.items()},
    **{f"{n}2": [rank, 32] for n, rank in HYBRID_RANKS.items()},
    "k_k": [1, 1, 32], "k_a": [1, 1, 32], "r_k": [2, 16], **{f"{n}.weight": [32, 32] for n in (
        "receptance", "key", "value", "output")}, **normed("ln_x")})  # fmt: skip
HYBRID_VALUES = within("self_attn.time_mixer", {"v0": [1, 1, 32], "v1": [32, 32], "v2": [32, 32]})
PUZZLE_MAMBA = {
    "norm.weight": [32], "mixer.in_proj.weight": [200, 32], "mixer.conv1d.weight": [128, 1, 4],
    "mixer.conv1d.bias": [128], "mixer.dt_bias": [8], "mixer.A_log": [8], "mixer.D": [8], "mixer.norm.weight": [64],
    "mixer.out_proj.weight": [32, 64]}  # fmt: skip
PUZZLE_ATTENTION = {"norm.weight": [32], "mixer.q_proj.weight": [64, 32], "mixer.k_proj.weight": [32, 32],
                    "mixer.v_proj.weight": [32, 32], "mixer.o_proj.weight": [32, 64]}  # fmt: skip


def puzzle_experts(width: int) -> dict[str, list[int]]:
    return {
        "norm.weight": [32], "mixer.gate.weight": [4, 32], "mixer.gate.e_score_correction_bias": [4],
        **{f"mixer.experts.{e}.up_proj.weight": [width, 16] for e in range(4)},
        **{f"mixer.experts.{e}.down_proj.weight": [16, width] for e in range(4)},
        "mixer.shared_experts.up_proj.weight": [40, 32], "mixer.shared_experts.down_proj.weight": [32, 40],
        "mixer.fc1_latent_proj.weight": [16, 32], "mixer.fc2_latent_proj.weight": [32, 16]}  # fmt: skip


PUBLISHED |= {
    "GraniteSpeechForConditionalGeneration": ({
        "text_config": USUAL | {"architectures": ["GraniteForCausalLM"], "embedding_multiplier": 12.0,
                                "logits_scaling": 8.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0625,
                                "model_type": "granite"},
        "encoder_config": {"hidden_dim": 8}, "projector_config": {"hidden_size": 8}, "has_lora_adapter": False,
        "downsample_rate": 5, "window_size": 15, "audio_token_index": 5, "tie_word_embeddings": False,
        "model_type": "granite_speech"}, {
        **{f"language_model.{n}": s for n, s in named("model.layers", 2, {**NORMS, **FORWARD, **QKVO}, OUTER).items()},
        "encoder.input_linear.weight": [2], "projector.qformer.layernorm.weight": [2]}),
    "Sarashina2VisionForCausalLM": ({
        "text_config": USUAL | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        "vision_config": VISION, "image_token_index": 5, "tie_word_embeddings": False,
        "model_type": "sarashina2_vision"}, {
        **{f"llm.{n}": s for n, s in named("model.layers", 2, {**NORMS, **FORWARD, **QKVO}, OUTER).items()},
        "norm.weight": [2], "norm.bias": [2], "visual.patch_embed.proj.weight": [2]}),
    "RWKV6Qwen2ForCausalLM": (USUAL | {
        "rms_norm_eps": 1e-6, "num_attention_heads": 2, "num_key_value_heads": 1, "attention_hidden_size": 32,
        "lora_rank_tokenshift": 8, "lora_rank_decay": 12,
        "model_type": "rwkv6qwen2"}, named("model.layers", 2, SWIFT, OUTER)),
    "RwkvHybridForCausalLM": (USUAL | {
        "head_size": 16, "wkv_version": 7, "wkv_has_gate": True, "model_type": "rwkv_hybrid"}, OUTER | in_layers(
            "model.layers", HYBRID, HYBRID | HYBRID_VALUES)),
    "NemotronHPuzzleForCausalLM": ({
        "vocab_size": N_VOCAB, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "conv_kernel": 4, "expand": 2, "mamba_head_dim": 8, "mamba_num_heads": 8, "n_groups": 2, "ssm_state_size": 16,
        "layer_norm_epsilon": 1e-5, "mlp_hidden_act": "relu2", "max_position_embeddings": 128, "n_routed_experts": 4,
        "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "moe_shared_expert_intermediate_size": 40, "moe_latent_size": 16, "intermediate_size": 48,
        "num_hidden_layers": 4, "num_nextn_predict_layers": 1, "tie_word_embeddings": False, "block_configs": [
            {"block_type": "mamba"}, {"block_type": "attention"},
            {"block_type": "moe", "moe_intermediate_size": 24, "num_experts_per_tok": 2},
            {"block_type": "moe", "moe_intermediate_size": 16, "num_experts_per_tok": 1}],
        "model_type": "nemotron_h_puzzle"}, {
        "model.embeddings.weight": [N_VOCAB, 32], "model.norm_f.weight": [32], "lm_head.weight": [N_VOCAB, 32],
        "mtp.layers.0.norm.weight": [2], **in_layers("model.layers", PUZZLE_MAMBA, PUZZLE_ATTENTION, puzzle_experts(24),
                                                     puzzle_experts(16))}),
}  # fmt: skip
# Tensors that are not BF16, by patterns of which the last counts.
DTYPES: dict[str, dict[str, str]] = {
    "DeepseekV4ForCausalLM": {
        r".*\.attn\.(indexer\.)?w[qko]\w+\.weight|.*shared_experts.*|mtp.*e_proj.*": "F8_E4M3",
        r".*\.experts\..*": "I8", r".*\.scale": "F8_E8M0", r".*(hc_|ape|sink|gate\.bias).*": "F32",
        r".*tid2eid": "I64"},
    "MiMoV2ForCausalLM": {
        r".*\.layers\.[01]\.self_attn\.qkv_proj\.weight": "F8_E4M3", r".*mtp.*qkv.*": "BF16",
        r".*scale_inv": "F32", r".*experts.*": "U8"},
    "JAISLMHeadModel": {r".*slopes": "F32"},
    "TalkieForCausalLM": {r".*w_g": "F32"},
    "Step3p7ForConditionalGeneration": {r".*moe\.(gate|up|down)_proj\.weight": "F8_E4M3", r".*scale_inv": "F32"},
    "HYV4ForCausalLM": {r".*\.hc_.*|.*sink.*|.*e_score.*": "F32"},
    "Qwen4ExpForCausalLM": {r".*(multipliers|offsets|vocab_sizes)": "I64"},
    "Qwen4ExpForConditionalGeneration": {r".*(multipliers|offsets|vocab_sizes)": "I64"},
}  # fmt: skip


def checkpoint(name: str) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """config.json and the shapes of the tensors."""
    if name in PUBLISHED:
        config, shapes = PUBLISHED[name]
        return {"architectures": [name], **config}, shapes
    if name == "Gemma3nForConditionalGeneration":  # Transformers' own needs torchvision
        config, shapes = checkpoint("Gemma3nForCausalLM")
        config = {"architectures": [name], "model_type": "gemma3n", "text_config": config | {"architectures": None}}
        shapes = {key.replace("model.", "model.language_model.", 1): shape for key, shape in shapes.items()}
        return config, shapes | {"model.vision_tower.timm_model.conv_stem.conv.weight": [2],
                                 "model.embed_audio.embedding.weight": [2]}  # fmt: skip
    import torch
    import transformers
    from safetensors import safe_open

    config_name, settings, others = TRANSFORMERS[name]
    config = getattr(transformers, config_name)(**settings)
    class_name = {"PhiMoEForCausalLM": "PhimoeForCausalLM", "MPTForCausalLM": "MptForCausalLM"}.get(name, name)
    torch.set_default_dtype(torch.bfloat16)
    model = getattr(transformers, class_name)(config)
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        saved = json.loads((Path(temporary) / "config.json").read_text())
        shapes = {}
        for path in sorted(Path(temporary).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                shapes |= {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    torch.set_default_dtype(torch.float32)
    saved["architectures"] = [name]
    saved |= PUBLISHED_CONFIG.get(name, {})
    tower = [key for key in shapes if re.search(r"vision|visual|image|audio", key)]
    shapes = {key: shape for key, shape in shapes.items() if key not in tower} | others
    shapes |= {key: [2] for key in tower[:2]}  # they are left out
    for key, shape in shapes.items():
        if name in COLUMNS_FIRST and re.search(r"experts\.(gate_up|down)_proj$", key):
            shape[1:] = shape[:0:-1]
    return saved, shapes


def converted(
    config: dict[str, Any], shapes: dict[str, list[int]], dtypes: dict[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors, as llama.cpp's converter makes them."""
    import gguf
    import transformers
    from conversion import ModelType, TextModel, base, get_model_architecture, get_model_class
    from conversion.base import ModelBase

    def without_vocabulary(cls: type) -> None:
        if "set_vocab" in cls.__dict__:
            cls.set_vocab = lambda self: None  # type: ignore[attr-defined]
        for inner in cls.__subclasses__():
            without_vocabulary(inner)

    with tempfile.TemporaryDirectory() as temporary:
        folder = write_checkpoint(Path(temporary) / "model", config, shapes, dtypes)
        if config["architectures"][0] in READ_PLAINLY:
            base.AutoConfig = None  # the converter then reads config.json itself
        hparams = ModelBase.load_hparams(folder, False)
        kind = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
        without_vocabulary(TextModel)
        if kind.__name__ == "NomicBertModel":
            kind._is_tokenizer_xlmroberta = lambda self: False  # it looks for a tokenizer of its own
        if kind.__name__ == "BaichuanModel":  # calls itself without end for all tensors but one
            unpack = kind.modify_tensors
            kind.modify_tensors = lambda *given: (unpack if "W_pack" in given[2] else TextModel.modify_tensors)(*given)
        if kind.__name__ == "MiniMaxText01Model":
            kind._get_suppress_tokens = lambda self: None  # it wants an index of files
        out = Path(temporary) / "out.gguf"
        eager = kind.__name__ == "JaisModel"  # which looks at a number
        kind(folder, gguf.LlamaFileType.GUESSED, out, eager=eager).write()
        base.AutoConfig = transformers.AutoConfig
        reader = gguf.GGUFReader(out)
        tensors = {
            tensor.name: [
                tensor.tensor_type.name, [int(size) for size in reversed(tensor.shape)],
                digest(tensor.name, tensor.data),
            ]
            for tensor in reader.tensors
        }  # fmt: skip
        metadata = {
            key: field.contents() for key, field in reader.fields.items()
            if not key.startswith(("GGUF.", "tokenizer.", "general."))
        } | {
            key: reader.fields[key].contents() for key in ("general.architecture", "general.file_type")
            if key in reader.fields
        }  # fmt: skip
    return metadata, tensors


def main() -> None:
    source = Path(sys.argv[1])
    sys.path[1:1] = [str(source), str(source / "gguf-py")]
    logging.disable(logging.WARNING)
    made = json.loads(OUT.read_text()) if OUT.is_file() else {}
    for name in sys.argv[2:] or [*TRANSFORMERS, *PUBLISHED, "Gemma3nForConditionalGeneration"]:
        try:
            config, shapes = checkpoint(name)
            dtypes = {key: dtype for key in shapes for pattern, dtype in DTYPES.get(name, {}).items()
                      if re.fullmatch(pattern, key)}  # fmt: skip
            metadata, tensors = converted(config, shapes, dtypes)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            continue
        made[name] = {"config": config, "shapes": shapes, "metadata": metadata, "tensors": tensors}
        if dtypes:
            made[name]["dtypes"] = dtypes
    lines = [f"{json.dumps(name)}: {json.dumps(made[name], separators=(',', ':'))}" for name in sorted(made)]
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
