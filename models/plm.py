"""PLM (arXiv:2503.12167): latent attention as in DeepSeek V2, and a feed-forward network of squared ReLU without a
gate."""

from qrun.models import latent_attention
from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.latent_attention import Latent
from qrun.models.rope import RopeScaling
from qrun.models.transformer import ungated_feed_forward


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot, interleaved=True)
    sizes = Latent.plain(metadata, h)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        y = latent_attention.attend(builder, h, y, layer, sizes, rotation)
        x = builder.add(x, builder.linear(y, f"{block}.attn_output", h.n_embd))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        x = builder.add(x, ungated_feed_forward(builder, y, block, h.n_ff[layer], "relu_squared"))
    x = builder.rms_norm(builder.select_rows(x), "output_norm", h.rms_eps)
    return builder.linear(x, "token_embd", h.n_vocab)
