"""SmallThinker (arXiv:2507.20984): the router takes what enters the layer, experts have ReLU, and of the layers that
see a window every fourth sees everything, without positions."""


from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, read_base
from qrun.models.transformer import Shares, attention, experts, head, read_gating, read_window, sliding_layers

NOPE_PERIOD = 4
# The reference engine takes this for the window, whatever a file says.
WINDOW = 4096


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    scaling = RopeScaling.read(metadata, h)
    rotation = scaling.rotation(h.n_rot)
    local_base = read_base(metadata, "rope.freq_base_swa", scaling.base)
    local_rotation = scaling.of_windows(local_base).rotation(h.n_rot)
    has_windows = read_window(metadata) > 0
    sliding = sliding_layers(metadata, h.n_layer, period=4, full_first=True) if has_windows else (False,) * h.n_layer
    # The reference engine lets a model of as many layers as there are from one to the next turn everywhere.
    everywhere = not has_windows or h.n_layer == NOPE_PERIOD
    shares = Shares(gating=read_gating(metadata, "softmax"))

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        cache = h.cache_layer(layer, WINDOW if sliding[layer] else None)
        turn = local_rotation if sliding[layer] else rotation
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        y = attention(builder, h, y, block, cache, turn if everywhere or layer % NOPE_PERIOD else None)
        attended = builder.add(x, y)

        y = builder.rms_norm(attended, f"{block}.ffn_norm", h.rms_eps)
        y = experts(builder, h, y, block, h.n_ff_expert[layer], "relu", shares, router_x=x)
        x = builder.add(attended, y)
    return head(builder, x, h)
