"""T5 and its descendants: an encoder and a decoder, or the encoder alone."""

from __future__ import annotations

from dataclasses import replace

from qrun.models.huggingface.entries import Facts
from qrun.models.huggingface.layout import Architecture, Mapped, Part, Stack, either, norm, optional, tensor
from qrun.models.t5 import FARTHEST


def _positions(place: int, block: str, name: str) -> Mapped:
    """What the attention of that part knows of positions."""
    return tensor(f"layer.{place}.{block}.relative_attention_bias.weight", f"{name}_rel_b.weight", "buckets heads")


def _attention(place: int, block: str, name: str) -> tuple[Part, ...]:
    """The `place`-th part of a layer, by the name that its attention has there and here."""
    prefix = f"layer.{place}.{block}"
    return (
        norm(f"layer.{place}.layer_norm", f"{name}_norm"),
        *(tensor(f"{prefix}.{part}.weight", f"{name}_{part}.weight", "q embd") for part in "qkv"),
        tensor(f"{prefix}.o.weight", f"{name}_o.weight", "embd q"),
        *optional(_positions(place, block, name)),
    )


def _feed_forward(place: int) -> tuple[Part, ...]:
    prefix = f"layer.{place}.DenseReluDense"
    up, gate = "ff embd", tensor(f"{prefix}.wi_0.weight", "ffn_gate.weight", "ff embd")
    return (
        norm(f"layer.{place}.layer_norm", "ffn_norm"),
        either((gate, tensor(f"{prefix}.wi_1.weight", "ffn_up.weight", up)),
               (tensor(f"{prefix}.wi.weight", "ffn_up.weight", up),)),
        tensor(f"{prefix}.wo.weight", "ffn_down.weight", "embd ff"),
    )  # fmt: skip


# Layers without positions of their own have those of the first one.
_POSITIONS = (_positions(0, "SelfAttention", "attn"),)
_ENCODER = Stack(
    "encoder.block", "enc.blk", (*_attention(0, "SelfAttention", "attn"), *_feed_forward(1)), "layers", _POSITIONS
)
_DECODER = Stack(
    "decoder.block", "dec.blk",
    (*_attention(0, "SelfAttention", "attn"), *_attention(1, "EncDecAttention", "cross_attn"), *_feed_forward(2)),
    "decoder_layers", _POSITIONS,
)  # fmt: skip
_ENCODER_NORM = norm("encoder.final_layer_norm", "enc.output_norm")


def _encoder_entries(facts: Facts) -> None:
    """Engines know one activation for layers with a gate, and one for those without."""
    config = facts.config
    facts.count("attention.relative_buckets_count", facts.sizes["buckets"])
    facts.real("attention.layer_norm_rms_epsilon", config.real("layer_norm_eps", high=1.0))
    facts.entries.remove(f"{facts.name}.rope.freq_base")  # nothing turns
    kind = config.text("feed_forward_proj", "relu")
    if kind not in ("relu", "gated-gelu"):
        raise config.error("feed_forward_proj", f"is {kind!r}, which is not supported")


def _entries(facts: Facts) -> None:
    config, n_vocab = facts.config, facts.sizes["vocab"]
    _encoder_entries(facts)
    facts.count("decoder_block_count", facts.sizes["decoder_layers"])
    start = config.integer("decoder_start_token_id", config.integer("pad_token_id", 0, low=0), low=0, high=n_vocab - 1)
    facts.count("decoder_start_token_id", start)
    # Models whose output matrix is their embedding have rows scaled before it.
    scaled = config.get("scale_decoder_outputs")
    if scaled is None:
        scaled = config.get("tie_word_embeddings") is not False
    if scaled is True and config.get("model_type") != "mt5":
        facts.real("logit_scale", facts.sizes["embd"] ** -0.5)


_T5 = Architecture(
    "t5", (), stacks=(_ENCODER, _DECODER), embedding="shared",
    embedding_aliases=("encoder.embed_tokens", "decoder.embed_tokens"),
    outer=(_ENCODER_NORM, norm("decoder.final_layer_norm", "dec.output_norm")), entries=_entries,
    sizes=lambda config, sizes: {
        "buckets": config.integer("relative_attention_num_buckets", 32, low=4, high=FARTHEST),
        "decoder_layers": config.integer("num_decoder_layers", sizes["layers"]),
    },
    activations=frozenset({"relu", "gelu_new"}), fixed={"relative_attention_max_distance": FARTHEST},
    defaults={"layer_norm_eps": 1e-6, "rms_norm_eps": None, "max_position_embeddings": 512},
)  # fmt: skip
_ENCODER_ALONE = replace(
    _T5, name="t5encoder", stacks=(_ENCODER,), outer=(_ENCODER_NORM,), entries=_encoder_entries, embeds=True,
    rename=lambda name, sizes: "" if name.startswith(("decoder.", "lm_head.")) else name,
)  # fmt: skip
_UMT5 = replace(_T5, stacks=tuple(replace(stack, layer=(*stack.layer, *_POSITIONS)) for stack in _T5.stacks))

CLASSES = {
    "T5ForConditionalGeneration": _T5,
    "T5WithLMHeadModel": _T5,
    "MT5ForConditionalGeneration": _T5,
    "UMT5ForConditionalGeneration": _UMT5,
    "UMT5Model": _UMT5,
    "T5EncoderModel": _ENCODER_ALONE,
}
