"""Models that make embeddings: BERT and its descendants, ModernBERT, EmbeddingGemma."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from qrun.formats import FormatError
from qrun.formats.tensors import SourceTensor
from qrun.models.huggingface.changes import ordered
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import Facts
from qrun.models.huggingface.families.gemma import GEMMA3_TEXT
from qrun.models.huggingface.layout import (
    ANY_GELU,
    FEED_FORWARD,
    NORMS,
    VOCAB_SIZE,
    Architecture,
    Sizes,
    attention,
    either,
    layer_norm,
    linear,
    maybe,
    norm,
    optional,
    tensor,
)
from qrun.models.hyperparameters import MAX_CONTEXT
from qrun.models.support import PoolingType

CLASSIFIER_POOLINGS = {"mean": PoolingType.MEAN, "cls": PoolingType.CLS}
# Whose first rows of positions are for padding: they count from behind the token that stands for it.
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")

# BERT


def _offset(config: Config) -> int:
    return config.integer("pad_token_id", 1, low=0) + 1 if config.get("model_type") in OFFSET_POSITIONS else 0


def _bert_sizes(config: Config, sizes: Sizes) -> Mapping[str, int]:
    n = config.integer("max_position_embeddings", high=MAX_CONTEXT)
    if n <= _offset(config):
        raise config.error("max_position_embeddings", f"is {n}: that is no more than what padding has")
    return {"positions": n - _offset(config), "stored_positions": n, "kinds": config.integer("type_vocab_size", 2)}


def _positions(source: SourceTensor, sizes: Sizes) -> SourceTensor:
    first = _offset(sizes.config)
    if not first:
        return source
    return ordered(source, np.arange(first, first + sizes["positions"]))


def _bert_entries(facts: Facts) -> None:
    facts.count("context_length", facts.sizes["positions"])
    _encoder_entries(facts)


def _encoder_entries(facts: Facts) -> None:
    facts.flag("attention.causal", False)
    facts.entries.count("tokenizer.ggml.token_type_count", facts.config.integer("type_vocab_size", 1))


def _classifier_entries(facts: Facts, weights: Mapping[str, SourceTensor]) -> None:
    """Of a model that compares texts: what its numbers are called."""
    if any(name.startswith("classifier.") for name in weights):
        facts.count("pooling_type", PoolingType.RANK)


def _bert_name(name: str, sizes: Sizes) -> str:
    """Names of old files, and what only the training wants."""
    for prefix in ("bert.", "roberta."):
        name = name.removeprefix(prefix)
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            name = name.removesuffix(old) + new
    if name.startswith(("cls.predictions", "cls.seq_relationship", "lm_head.")):
        return ""
    return "" if name.startswith("pooler.") and not _compares(sizes.config) else name


def _compares(config: Config) -> bool:
    """Was the model trained to compare texts, or to sort them into classes?"""
    return any("SequenceClassification" in str(kind) for kind in config.get("architectures", []))


_BERT = Architecture(
    "bert",
    (
        *linear("attention.self.query", "attn_q", "q", "embd"),
        *linear("attention.self.key", "attn_k", "kv", "embd"),
        *linear("attention.self.value", "attn_v", "kv", "embd"),
        *linear("attention.output.dense", "attn_output", "embd", "q"),
        *layer_norm("attention.output.LayerNorm", "attn_output_norm"),
        *linear("intermediate.dense", "ffn_up", "ff", "embd"),
        *linear("output.dense", "ffn_down", "embd", "ff"),
        *layer_norm("output.LayerNorm", "layer_output_norm"),
    ),
    activations=ANY_GELU, layers="encoder.layer", embedding="embeddings.word_embeddings", embeds=True,
    outer=(
        *layer_norm("embeddings.LayerNorm", "token_embd_norm"),
        tensor("embeddings.position_embeddings.weight", "position_embd.weight", "stored_positions embd", _positions),
        *optional(tensor("embeddings.token_type_embeddings.weight", "token_types.weight", "kinds embd")),
        # What compares texts: a layer and one behind it, which have other names in RoBERTa.
        maybe(*linear("pooler.dense", "cls", "embd", "embd"), *linear("classifier", "cls.output", "*", "embd")),
        maybe(*linear("classifier.dense", "cls", "embd", "embd"),
              *linear("classifier.out_proj", "cls.output", "*", "embd")),
    ),
    sizes=_bert_sizes, entries=_bert_entries, rename=_bert_name, of_weights=_classifier_entries,
    fixed={"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False},
    defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-12, "rms_norm_eps": None, "vocab_size": 30522,
              "max_position_embeddings": 512, "type_vocab_size": 2, "hidden_size": 768, "num_hidden_layers": 12,
              "num_attention_heads": 12, "intermediate_size": 3072},
)  # fmt: skip

# DistilBERT: half of BERT's layers, under other names, and one kind of tokens.


def _distil_name(name: str, sizes: Sizes) -> str:
    name = name.removeprefix("distilbert.").removeprefix("transformer.")
    return "" if name.startswith(("vocab_transform.", "vocab_layer_norm.", "vocab_projector.")) else name


_DISTIL = replace(
    _BERT,
    layer=(
        *linear("attention.q_lin", "attn_q", "q", "embd"), *linear("attention.k_lin", "attn_k", "kv", "embd"),
        *linear("attention.v_lin", "attn_v", "kv", "embd"), *linear("attention.out_lin", "attn_output", "embd", "q"),
        *layer_norm("sa_layer_norm", "attn_output_norm"),
        *linear("ffn.lin1", "ffn_up", "ff", "embd"), *linear("ffn.lin2", "ffn_down", "embd", "ff"),
        *layer_norm("output_layer_norm", "layer_output_norm"),
    ),
    layers="layer", rename=_distil_name, fixed={"sinusoidal_pos_embds": False},
    defaults=dict(_BERT.defaults) | {"type_vocab_size": 1, "num_hidden_layers": 6},
    outer=(
        *layer_norm("embeddings.LayerNorm", "token_embd_norm"),
        tensor("embeddings.position_embeddings.weight", "position_embd.weight", "stored_positions embd"),
    ),
)  # fmt: skip

# Nomic: BERT with a gate and rope.


def _nomic_entries(facts: Facts) -> None:
    """What the makers trained the model for is less than what it can be stretched to."""
    config = facts.config
    n, trained = config.integer("n_positions", 8192), config.integer("max_trained_positions", 2048)
    facts.count("context_length", trained if n > trained else n)
    _encoder_entries(facts)


_NOMIC = Architecture(
    "nomic-bert",
    (
        tensor("attn.Wqkv.weight", "attn_qkv.weight", "qkv embd"),
        tensor("attn.out_proj.weight", "attn_output.weight", "embd q"),
        *layer_norm("norm1", "attn_output_norm"),
        tensor("mlp.fc11.weight", "ffn_up.weight", "ff embd"),
        tensor("mlp.fc12.weight", "ffn_gate.weight", "ff embd"),
        tensor("mlp.fc2.weight", "ffn_down.weight", "embd ff"),
        *layer_norm("norm2", "layer_output_norm"),
    ),
    activations=frozenset({"swiglu"}), layers="encoder.layers", embedding="embeddings.word_embeddings", embeds=True,
    outer=(
        *layer_norm("emb_ln", "token_embd_norm"),
        *optional(tensor("embeddings.token_type_embeddings.weight", "token_types.weight", "* embd")),
    ),
    entries=_nomic_entries, rename=_bert_name,
    fixed={"prenorm": False, "causal": False, "qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False,
           "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False, "use_rms_norm": False, "parallel_block": False},
    defaults={"layer_norm_eps": 1e-12, "rms_norm_eps": None, "rope_theta": 1000.0},
)  # fmt: skip

# ModernBERT: layer 0 has no norm before attention.


def _modern_entries(facts: Facts) -> None:
    config = facts.config
    _encoder_entries(facts)
    facts.count("attention.sliding_window", config.integer("local_attention", 128, high=MAX_CONTEXT))
    period = config.integer("global_attn_every_n_layers", 3)
    facts.count("attention.sliding_window_pattern", period)
    kinds = config.get("layer_types")
    n_layers = facts.sizes["layers"]
    expected = ["sliding_attention" if layer % period else "full_attention" for layer in range(n_layers)]
    if kinds is not None and kinds != expected:
        raise config.error("layer_types", f"is not every {period}th layer from the first on, as engines take it")
    facts.text("rope.scaling.type", "none")
    facts.text("hidden_activation", config.text("hidden_activation", "gelu"))
    pooling = config.text("classifier_pooling", "cls")
    if pooling not in CLASSIFIER_POOLINGS:
        raise config.error("classifier_pooling", f"is {pooling!r}, which is not supported")
    facts.count("classifier.pooling_type", CLASSIFIER_POOLINGS[pooling])


def _modern_name(name: str, sizes: Sizes) -> str:
    others = ("decoder.",) if _compares(sizes.config) else ("decoder.", "head.", "classifier.")
    return "" if name.startswith(others) else name


_MODERN_BERT = Architecture(
    "modern-bert",
    (
        *optional(norm("attn_norm", "attn_norm")),
        tensor("attn.Wqkv.weight", "attn_qkv.weight", "qkv embd"),
        tensor("attn.Wo.weight", "attn_output.weight", "embd q"),
        norm("mlp_norm", "ffn_norm"),
        tensor("mlp.Wi.weight", "ffn_up.weight", "twice_ff embd"),
        tensor("mlp.Wo.weight", "ffn_down.weight", "embd ff"),
    ),
    activations=ANY_GELU | {"silu", "swish"}, embedding="embeddings.tok_embeddings", embeds=True,
    outer=(
        norm("embeddings.norm", "token_embd_norm"), norm("final_norm", "output_norm"),
        maybe(*linear("head.dense", "cls", "embd", "embd"), norm("head.norm", "cls.norm"),
              *linear("classifier", "cls.output", "*", "embd")),
    ),
    entries=_modern_entries, keys=VOCAB_SIZE, rename=_modern_name, of_weights=_classifier_entries,
    fixed={"attention_bias": False, "mlp_bias": False, "norm_bias": False},
    defaults={"hidden_activation": "gelu", "layer_norm_eps": 1e-5, "rms_norm_eps": None, "rope_theta": 160000.0,
              "rope_local_base_freq": 10000.0, "max_position_embeddings": 8192},
)  # fmt: skip

# EuroBERT: Llama, of which tokens see those behind them, too.


def _euro_entries(facts: Facts) -> None:
    facts.flag("attention.causal", False)
    facts.text("rope.scaling.type", "none")


_EURO_BERT = Architecture(
    "eurobert", (*NORMS, *attention(), *FEED_FORWARD), embeds=True, entries=_euro_entries,
    rename=lambda name, sizes: "" if name.startswith(("lm_head.", "classifier.")) else name,
    defaults={"rms_norm_eps": 1e-5},
)  # fmt: skip

# NeoBERT: a gate, and root mean square norms.


def _neo_settings(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the width that it says a gated layer has two thirds; and the context has another name."""
    width = values.get("intermediate_size")
    if type(width) is int and 0 < width < 1 << 30:
        values = {**values, "intermediate_size": int(2 * width / 3)}
    return {"max_position_embeddings": values.get("max_length"), **values}


def _neo_entries(facts: Facts) -> None:
    _encoder_entries(facts)
    facts.text("rope.scaling.type", "none")
    facts.count("pooling_type", PoolingType.CLS)


def _neo_name(name: str, sizes: Sizes) -> str:
    others = ("decoder.",) if _compares(sizes.config) else ("decoder.", "dense.", "classifier.")
    return "" if name.startswith(others) or name == "freqs_cis" else name


_NEO_BERT = Architecture(
    "neo-bert",
    (
        norm("attention_norm", "attn_norm"), norm("ffn_norm", "ffn_norm"),
        tensor("qkv.weight", "attn_qkv.weight", "qkv embd"), tensor("wo.weight", "attn_output.weight", "embd q"),
        tensor("ffn.w12.weight", "ffn_up.weight", "twice_ff embd"),
        tensor("ffn.w3.weight", "ffn_down.weight", "embd ff"),
    ),
    activations=frozenset({"SwiGLU", "swiglu"}), layers="transformer_encoder", embedding="encoder", embeds=True,
    outer=(
        norm("layer_norm", "enc.output_norm"),
        maybe(*linear("dense", "cls", "embd", "embd"), *linear("classifier", "cls.output", "*", "embd")),
    ),
    settings=_neo_settings, entries=_neo_entries, rename=_neo_name, of_weights=_classifier_entries,
    fixed={"rope": True, "rms_norm": True}, defaults={"hidden_act": "SwiGLU"},
)  # fmt: skip

# Jina's second: BERT with ALiBi and a gate, and perhaps norms of queries and keys.

_JINA2 = replace(
    _BERT, name="jina-bert-v2", activations=ANY_GELU | {"geglu"},
    layer=(
        *_BERT.layer[:8],
        maybe(*layer_norm("attention.self.layer_norm_q", "attn_q_norm", "q")),
        maybe(*layer_norm("attention.self.layer_norm_k", "attn_k_norm", "kv")),
        *layer_norm("attention.output.LayerNorm", "attn_output_norm"),
        maybe(*layer_norm("layer_norm_1", "attn_norm_2")),
        either(
            linear("mlp.gated_layers", "ffn_up", "twice_ff", "embd"),
            linear("mlp.up_gated_layer", "ffn_up", "twice_ff", "embd"),
        ),
        either(linear("mlp.wo", "ffn_down", "embd", "ff"), linear("mlp.down_layer", "ffn_down", "embd", "ff")),
        either(layer_norm("mlp.layernorm", "layer_output_norm"), layer_norm("layer_norm_2", "layer_output_norm")),
    ),
    outer=(
        *layer_norm("embeddings.LayerNorm", "token_embd_norm"),
        *optional(tensor("embeddings.token_type_embeddings.weight", "token_types.weight", "kinds embd")),
    ),
    sizes=lambda config, sizes: {"kinds": config.integer("type_vocab_size", 2)}, entries=_encoder_entries,
    fixed={"position_embedding_type": "alibi", "is_decoder": False, "add_cross_attention": False,
           "feed_forward_type": "geglu", "emb_pooler": "mean"},
)  # fmt: skip

# EmbeddingGemma


_EMBEDDING_GEMMA = replace(
    GEMMA3_TEXT, name="gemma-embedding", windows="", embeds=True,
    defaults={**GEMMA3_TEXT.defaults, "use_bidirectional_attention": True},
)  # fmt: skip


def _gemma_variant(config: Config) -> Architecture | None:
    """A model of this class that writes has no head, and cannot be told from others but by this key."""
    if config.get("use_bidirectional_attention") is False:
        raise FormatError(config.path, "a Gemma3TextModel whose tokens see those before them alone is not supported")
    return None


CLASSES = {
    "DistilBertModel": _DISTIL,
    "DistilBertForMaskedLM": _DISTIL,
    "BertModel": _BERT,
    "BertForMaskedLM": _BERT,
    "BertForSequenceClassification": _BERT,
    "RobertaModel": _BERT,
    "RobertaForSequenceClassification": _BERT,
    "XLMRobertaModel": _BERT,
    "XLMRobertaForSequenceClassification": _BERT,
    "CamembertModel": _BERT,
    "ModernBertModel": _MODERN_BERT,
    "ModernBertForMaskedLM": _MODERN_BERT,
    "ModernBertForSequenceClassification": _MODERN_BERT,
    "NomicBertModel": _NOMIC,
    "EuroBertModel": _EURO_BERT,
    "JinaEmbeddingsV5Model": _EURO_BERT,
    "NeoBERT": _NEO_BERT,
    "NeoBERTLMHead": _NEO_BERT,
    "NeoBERTForSequenceClassification": _NEO_BERT,
    "JinaBertModel": _JINA2,
    "JinaBertForMaskedLM": _JINA2,
    "Gemma3TextModel": replace(_EMBEDDING_GEMMA, variant=_gemma_variant),
}
