"""ModernBERT (arXiv:2412.13663): layer norms before each part, a gate, rope, and two layers of three that see a window
to either side. NeoBERT (arXiv:2502.19587): root mean square norms, and every layer sees everything."""

from dataclasses import replace

from qrun.models.graph import Activation, GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, read_base
from qrun.models.transformer import attention, joined_feed_forward, read_window, sliding_layers


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to rows."""
    if metadata.integer("decision.block_count", 0, low=0):
        raise metadata.error("decision.block_count", "is not 0: models that decide are not supported")
    scaling = RopeScaling.read(metadata, h)
    rotation = scaling.rotation(h.n_rot)
    local = replace(scaling, base=read_base(metadata, "rope.freq_base_swa", 10000.0), factor=1.0)
    local_rotation = local.rotation(h.n_rot)
    window = read_window(metadata)
    sliding = sliding_layers(metadata, h.n_layer, 3, full_first=True) if window else (False,) * h.n_layer
    kind = read_gate(metadata)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    x = builder.layer_norm(x, "token_embd_norm", h.norm_eps)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = x
        if layer or builder.has(f"{block}.attn_norm.weight"):
            y = builder.layer_norm(x, f"{block}.attn_norm", h.norm_eps)
        cache = h.cache_layer(layer, window if sliding[layer] else None)
        y = attention(builder, h, y, block, cache, local_rotation if sliding[layer] else rotation)
        x = builder.add(y, x)
        y = builder.layer_norm(x, f"{block}.ffn_norm", h.norm_eps)
        x = builder.add(joined_feed_forward(builder, y, block, h.n_ff[layer], kind), x)
    return builder.layer_norm(builder.select_rows(x), "output_norm", h.norm_eps)


def read_gate(metadata: Metadata) -> Activation:
    """What the gate lets through; of names that are not known, the reference engine makes GELU too."""
    name = metadata.text("hidden_activation", "gelu")
    if name in ("relu", "reglu"):
        raise metadata.error("hidden_activation", f"is {name}, which is not supported")
    return "silu" if name in ("silu", "swish", "swiglu") else "gelu"


def build_neo(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to rows of NeoBERT."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot, interleaved=True)
    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        x = builder.add(attention(builder, h, y, block, h.cache_layer(layer), rotation), x)
        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        x = builder.add(joined_feed_forward(builder, y, block, h.n_ff[layer], "silu"), x)
    return builder.rms_norm(builder.select_rows(x), "enc.output_norm", h.rms_eps)
