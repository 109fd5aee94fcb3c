"""Kimi K3 (Moonshot AI, 2026): Kimi delta attention whose decays have a bound, and latent attention without positions
with a gate for each value; experts that work on narrow rows, beside one that all tokens share.

Parts of a block do not read the residual stream alone, but a mean of it and of what it was every few layers before, by
how well each fits. The stream begins anew where a copy of it is kept.
"""


from qrun.formats.dataclass import dataclass
from qrun.models import latent_attention
from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import MAX_EXPERTS, MAX_LAYERS, Hyperparameters, Metadata
from qrun.models.kimi_linear import delta_attention, is_absorbed
from qrun.models.latent_attention import Latent
from qrun.models.transformer import Shares, experts, feed_forward, head


@dataclass
class Residual:
    """The stream, and copies of it, [n_embd] each. every: how many layers lie between copies; at 0 there are none."""

    builder: GraphBuilder
    h: Hyperparameters
    every: int
    stream: Value
    copies: Value | None = None

    def read(self, name: str) -> Value:
        """A mean of the copies and the stream."""
        if self.copies is None:
            return self.stream
        return self.builder.mix_by_score(self.copies, self.stream, name, self.h.rms_eps)

    def keep(self) -> None:
        """Keep a copy of the stream."""
        before, now = self.copies, self.stream
        joined = now if before is None else self.builder.join(before, range(before.width), 1, now, range(now.width))
        self.copies = joined

    def attended(self, layer: int, y: Value) -> None:
        """What attention gives goes to the stream, or is its new beginning."""
        begins = self.every and layer % self.every == 0
        self.stream = y if begins else self.builder.add(self.stream, y)


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    every = metadata.integer("attn_res.block_size", low=0, high=MAX_LAYERS)
    residual = Residual(builder, h, every, builder.embed("token_embd", h.n_vocab, h.n_embd))
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = residual.read(f"{block}.attn_res_score")
        if every and layer % every == 0:
            residual.keep()
        y = builder.rms_norm(y, f"{block}.attn_norm", h.rms_eps)
        residual.attended(layer, attend(builder, metadata, h, y, layer))

        y = builder.rms_norm(residual.read(f"{block}.ffn_res_score"), f"{block}.ffn_norm", h.rms_eps)
        residual.stream = builder.add(residual.stream, network(builder, metadata, h, y, layer))
    return head(builder, residual.read("output_res_score"), h)


def attend(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, x: Value, layer: int) -> Value:
    """Attention of one block, of either kind."""
    block = f"blk.{layer}"
    if not h.n_kv_heads[layer]:
        key = "kda.gate_lower_bound"
        lower_bound = metadata.real(key, low=-1e3, high=0.0) if metadata.has(key) else None
        return delta_attention(builder, metadata, h, x, layer, lower_bound, negated=True)
    sizes = Latent.read(metadata, h) if is_absorbed(builder, block) else Latent.plain(metadata, h)
    # Only one layer of four has a cache, and what is mixed by score behind it depends on every digit.
    y = latent_attention.attend(builder, h, x, layer, sizes, None, precise=True)
    if builder.has(f"{block}.attn_gate.weight"):
        y = builder.gate(builder.linear(x, f"{block}.attn_gate", y.width), y, "sigmoid")
    return builder.linear(y, f"{block}.attn_output", h.n_embd)


def network(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, x: Value, layer: int) -> Value:
    """What comes behind the attention of a block."""
    block = f"blk.{layer}"
    limit = metadata.real("activation.situ_beta", low=1e-3, high=1e6)
    up_limit = metadata.real("activation.situ_linear_beta", low=0.0, high=1e6)
    if layer < h.n_dense:
        return feed_forward(builder, x, block, h.n_ff[layer], "situ", limit=limit, up_limit=up_limit)

    narrow = metadata.integer("expert_latent_length", 0, low=0)
    y = builder.linear(x, f"{block}.ffn_routed_down", narrow) if narrow else x
    n_ff = h.n_ff_expert[layer]
    y = experts(
        builder, h, y, block, n_ff, "situ", Shares.read(metadata, "sigmoid"), router_x=x if narrow else None,
        limit=limit, up_limit=up_limit,
    )  # fmt: skip
    if narrow:
        if builder.has(f"{block}.ffn_routed_norm.weight"):
            y = builder.rms_norm(y, f"{block}.ffn_routed_norm", h.rms_eps)
        y = builder.linear(y, f"{block}.ffn_routed_up", h.n_embd)
    if not builder.has(f"{block}.ffn_gate_shexp.weight"):
        return y
    n_shared = max(metadata.integer("expert_shared_count", low=0, high=MAX_EXPERTS), 1)
    shared = feed_forward(builder, x, block, n_ff * n_shared, "situ", "_shexp", limit, up_limit)
    return builder.add(y, shared)
