"""Every key that a config.json may have: read, known to do no harm, or known to make another model of it.

A key that is on none of these lists may be anything. Where its value says "off", nothing comes of it; where it does
not, whoever converts the folder is told. The lists are those of Transformers 4 and 5, of the files that the makers of
these architectures publish, and of what tools for training leave behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qrun.formats.gguf.cursor import quote
from qrun.models.huggingface.config import SYNONYMS, Config
from qrun.models.huggingface.layout import Architecture
from qrun.models.hyperparameters import shorten


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# By this package, whatever the architecture. What one architecture has beside them is known from what was asked for.
READ = _words("""
    architectures text_config vocab_size max_position_embeddings tie_word_embeddings
    hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    hidden_act hidden_activation rms_norm_eps
    rope_theta rope_scaling rope_parameters rope_local_base_freq partial_rotary_factor original_max_position_embeddings
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id
    use_bidirectional_attention quantization_config quantization compression_config
    llm_config lm_config language_config lfm thinker_config
""") | {name for names in SYNONYMS.values() for name in names}
WINDOW_KEYS = _words("sliding_window use_sliding_window max_window_layers layer_types")

# Of no effect on what a model computes from tokens.
HARMLESS = (
    # What it is called, who made it, and how it is run elsewhere.
    _words("""
        model_type transformers_version torch_dtype dtype name_or_path _name_or_path _commit_hash auto_map use_cache
        cache_implementation cache_dtype attn_implementation _attn_implementation _attn_implementation_autoset
        _attn_implementation_internal _experts_implementation _flash_attn_2_enabled use_flash_attn use_flash_attention
        use_flash_attention_2 flash_attn unsloth_version unsloth_fixed unsloth_training_args trl_version peft_version
        is_llama_config transformers.js_config tokenizer_class tokenizer_name model_name custom_pipelines
        language languages license tags pretraining_tp tensor_parallel_degree base_model_tp_plan base_model_pp_plan
        max_seq_length tokenizer_model_max_length
        max_window_layers sliding_window_size interpolate_factor full_attn_mod eod_token_id attention_softmax_in_fp32
        scale_attention_softmax_in_fp32 use_associative_scan mamba_chunk_size chunk_size residual_in_fp32
        topk_method num_nextn_predict_layers mtp_layers_block_type mtp_num_hidden_layers num_ln_in_parallel_attn
        moe_norm_min mamba_rms_norm expand mixer_rms_eps time_step_limit time_step_rank _sliding_window_pattern
        expert_layer_offset expert_layer_period decoder_sparse_step mamba_hidden_act mamba_ssm_cache_dtype
        no_rope_layer_interval moe_layers embedding_fraction init_device learned_pos_emb no_bias
        gating gating_types enable_moe_fp32_combine first_k_dense_replace
        summary_type summary_use_proj summary_proj_to_labels summary_activation moe_shared_expert_overlap
        num_logits_to_keep qk_head_dim auto_adjust_ff_dim
        classifier_activation classifier_bias decoder_bias pooler_fc_size
        pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type directionality
        sparse_pred_ignore_index sparse_prediction deterministic_flash_attn repad_logits_with_grad reference_compile
        qa_dropout seq_classif_dropout
        fused_bias_fc fused_add_norm fused_dropout_add_ln pad_vocab_size_multiple use_xentropy max_trained_positions
        reorder_and_upcast_attn output_past attn_mode fuse_cross_entropy fuse_linear_cross_entropy fuse_norm
    """)
    # Of training.
    | _words("""
        initializer_cutoff_factor embedding_dropout mlp_dropout
        residual_dropout embedding_initializer_range ffn_dropout activation_dropout
        time_step_init_scheme time_step_scale time_step_max time_step_min time_step_floor rescale_prenorm_residual
        initializer_range initializer_factor initializer_std gradient_checkpointing use_gradient_checkpointing
        attention_dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob attn_dropout attn_pdrop
        embd_pdrop resid_pdrop dropout dropout_rate classifier_dropout summary_first_dropout layerdrop
        output_router_logits router_aux_loss_coef router_jitter_noise router_z_loss_coef input_jitter_noise
        aux_loss_coef z_loss_coefficient altup_coef_clip label_smoothing neftune_noise_alpha loss_type
        moe_jitter_eps moe_loss_weight
    """)
    # What the weights say by being there.
    | _words("""
        attention_bias mlp_bias lm_head_bias qkv_bias use_qkv_bias bias use_bias use_qk_norm qk_norm qk_layernorm
        ffn_dim_multiplier multiple_of use_qkv_bias use_expert_bias attention_k_eq_v mamba_conv_bias mamba_proj_bias
        add_swa_attention_sink_bias add_full_attention_sink_bias
        use_conv_bias conv_bias use_mamba_kernels mlp_layer_types
        decay_low_rank_dim a_low_rank_dim v_low_rank_dim gate_low_rank_dim attention_hidden_size value_dim hidden_ratio
    """)
    # Of any model of Transformers, and of how to sample from it, which has a file of its own by now.
    | _words("""
        return_dict output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss pruned_heads
        chunk_size_feed_forward is_encoder_decoder is_decoder decoder_start_token_id prefix problem_type
        is_gated_act dense_act_fn
        finetuning_task id2label label2id num_labels task_specific_params remove_invalid_values
        max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
        temperature top_k top_p min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
        encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
        forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
        chat_template bos_token eos_token pad_token unk_token padding_side padding_idx
    """)
    # Of the parts that see or hear.
    | _words("""
        vision_config audio_config mm_tokens_per_image image_token_index boi_token_index eoi_token_index
        audio_token_index image_token_id boi_token_id eoi_token_id audio_token_id boa_token_id eoa_token_id
        image_seq_length video_token_id vision_start_token_id vision_end_token_id video_token_index image_newline_id
        image_start_token_id image_end_token_id video_start_token_id video_end_token_id
        eoa_token_index spatial_merge_size projector_hidden_act projector_hidden_size vision_feature_layer
        multimodal_projector_bias out_hidden_size
    """)
)

# Of other kinds of models, which have weights by the same names and compute something else with them; and the value
# that would change nothing, besides those that say "off".
CHANGING = dict.fromkeys(
    _words("""
        embedding_multiplier residual_multiplier attention_multiplier logits_scaling logit_scale lm_head_multiplier
        scale_emb scale_depth rotary_percent
    """), 1,
) | dict.fromkeys(
    _words("""
        attn_logit_softcapping final_logit_softcapping alibi use_alibi parallel_attn use_parallel_residual clip_qkv
        dim_model_base attention_chunk_size attn_temperature_tuning attention_sinks use_attention_sinks rope_interleaved
    """), None,
)  # fmt: skip

# Of an object that says how rope is stretched.
ROPE_KEYS = _words("""
    rope_type type rope_theta factor partial_rotary_factor original_max_position_embeddings beta_fast beta_slow truncate
    attention_factor mscale mscale_all_dim low_freq_factor high_freq_factor short_factor long_factor
    llama_4_scaling_beta extrapolation_factor attn_factor
    full_attention sliding_attention mrope_section xdrope_section mrope_interleaved alpha finetuned
""")


def check_keys(config: Config, architecture: Architecture) -> list[str]:
    """A line for whoever converts the folder, or none: the keys of which nothing here knows what they mean. To be
    called when all that is wanted of config.json has been asked for.

    Raises FormatError for a key that is known to make another model of it.
    """
    values = config.given()
    read = READ | config.asked
    if architecture.windows or _sees_everything(values):
        read |= WINDOW_KEYS
    unknown = []
    for key, value in values.items():
        if key in read or key in HARMLESS or _is_off(value):
            continue
        if key not in CHANGING:
            unknown.append(key)
        elif value != CHANGING[key]:
            problem = f"is {shorten(value)}, which models of the architecture {architecture.name} cannot have in GGUF"
            raise config.error(key, problem)
    for section in ("rope_parameters", "rope_scaling"):
        unknown += _unknown_of_rope(section, values.get(section))
    if not unknown:
        return []
    listed = ", ".join(quote(key)[1:-1] for key in unknown[:20])
    return [f"{config.path}: not known here, and left out: {listed}"]


def _sees_everything(values: Mapping[str, Any]) -> bool:
    """Do keys of windows say that there is none?"""
    kinds = values.get("layer_types")
    if isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds):
        return True
    off = values.get("use_sliding_window") is False or _is_off(values.get("sliding_window"))
    return kinds is None and off


def _unknown_of_rope(name: str, section: Any) -> Iterator[str]:
    if isinstance(section, Mapping):
        for key, value in section.items():
            if key in ("full_attention", "sliding_attention"):
                yield from _unknown_of_rope(f"{name}.{key}", value)
            elif key not in ROPE_KEYS and not _is_off(value):
                yield f"{name}.{key}"


def _is_off(value: Any) -> bool:
    """Nothing, no, none, or an empty list or object."""
    return value is None or value is False or value in (0, "", "none") or value in ([], {})
