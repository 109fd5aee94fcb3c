"""Gemma 3n: four residual streams, of which each block runs one and predicts what the others would have become (AltUp:
arXiv:2301.13310); a low-rank path beside attention (LAuReL: arXiv:2411.07501); in the first layers only the largest
values of the feed-forward network's gate count (arXiv:2506.06644); and, as in Gemma 4's small models, an embedding of
the token for each layer, and last layers that attend to the keys and values of earlier ones."""

from dataclasses import replace
from math import inf, sqrt

import numpy as np

from qrun.formats.dataclass import dataclass
from qrun.models.gemma4 import attention, layer_inputs
from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyper_connections import MAX_STREAMS
from qrun.models.hyperparameters import MAX_CONTEXT, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, read_base
from qrun.models.transformer import head, sliding_layers, softcapped

# What files that do not say have: the largest 5 % of the gate, in the first layers; and layers with keys of their own.
DEVIATIONS, SPARSE_LAYERS, OWN_LAYERS = 1.6448533535003662, 10, 20


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    scaling = RopeScaling.read(metadata, h)
    rotation = scaling.rotation(h.n_rot)
    local_base = read_base(metadata, "rope.freq_base_swa", 10000.0)
    local_rotation = replace(scaling, base=local_base, factor=1.0).rotation(h.n_rot)
    window = metadata.integer("attention.sliding_window", high=MAX_CONTEXT)
    sliding = sliding_layers(metadata, h.n_layer, period=5)
    deviations = read_deviations(metadata, h)
    n_shared = metadata.integer("attention.shared_kv_layers", max(h.n_layer - OWN_LAYERS, 0), low=0, high=h.n_layer - 1)
    n_own = h.n_layer - n_shared
    altup = AltUp.read(metadata)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd, scale=sqrt(h.n_embd))
    inputs = layer_inputs(builder, metadata, h, x)
    if inputs is None:
        raise metadata.error("embedding_length_per_layer_input", "is missing")
    width = inputs.width // h.n_layer
    streams = altup.spread(builder, h, x)
    for layer in range(h.n_layer):
        block, local = f"blk.{layer}", sliding[layer]
        predictions = altup.predict(builder, h, streams, block)
        x = altup.active(builder, h, predictions)
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        beside = laurel(builder, h, y, block)
        cache = h.cache_layer(layer, window if local else None)
        shared = None if layer < n_own else n_own - 2 if local else n_own - 1
        y = attention(builder, h, y, block, cache, local_rotation if local else rotation, shared)
        y = builder.add(x, builder.rms_norm(y, f"{block}.post_attention_norm", h.rms_eps))
        x = builder.scale(builder.add(y, beside), sqrt(0.5))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        gate, up = (builder.linear(y, f"{block}.ffn_{name}", h.n_ff[layer]) for name in ("gate", "up"))
        if deviations[layer] > -inf:
            gate = builder.gaussian_top_k(gate, deviations[layer])
        y = builder.linear(builder.activate(gate, up, "gelu"), f"{block}.ffn_down", h.n_embd)
        x = builder.add(x, builder.rms_norm(y, f"{block}.post_ffw_norm", h.rms_eps))

        streams = altup.correct(builder, h, predictions, x, block)
        scale = builder.constant(f"{block}.altup_correct_scale.weight", h.n_embd)
        y = builder.affine(altup.active(builder, h, streams), scale)
        gate = builder.linear(y, f"{block}.inp_gate", width)
        y = builder.activate(gate, builder.slice(inputs, layer * width, width), "gelu")
        y = builder.linear(y, f"{block}.proj", h.n_embd)
        streams = altup.add_to_others(builder, h, streams, builder.rms_norm(y, f"{block}.post_norm", h.rms_eps))
    x = altup.gather(builder, h, streams)
    return softcapped(builder, head(builder, x, h), metadata, default=30.0)


def laurel(builder: GraphBuilder, h: Hyperparameters, x: Value, block: str) -> Value:
    """x, and x through a narrow pair of matrices."""
    rank = builder.n_rows(f"{block}.laurel_l.weight")
    if not rank:
        raise builder.error(f"tensor {block}.laurel_l.weight is missing or no matrix")
    y = builder.linear(builder.linear(x, f"{block}.laurel_l", rank), f"{block}.laurel_r", h.n_embd)
    return builder.add(x, builder.rms_norm(y, f"{block}.laurel_post_norm", h.rms_eps))


def read_deviations(metadata: Metadata, h: Hyperparameters) -> tuple[float, ...]:
    """By how many standard deviations a gate has to exceed the mean, for each layer. -inf: all count."""
    key = "activation_sparsity_scale"
    if metadata.has(key):
        return metadata.reals(key, h.n_blocks, low=-inf, high=1e3)
    return tuple(DEVIATIONS if layer < SPARSE_LAYERS else -inf for layer in range(h.n_layer))


@dataclass(frozen=True)
class AltUp:
    """Streams side by side: how many, and which one blocks run."""

    count: int
    index: int

    @classmethod
    def read(cls, metadata: Metadata) -> "AltUp":
        """From the keys under `altup`."""
        count = metadata.integer("altup.num_inputs", 4, low=2, high=MAX_STREAMS)
        return cls(count, metadata.integer("altup.active_idx", 0, low=0, high=count - 1))

    def active(self, builder: GraphBuilder, h: Hyperparameters, streams: Value) -> Value:
        """The one that the block runs."""
        return builder.slice(streams, self.index * h.n_embd, h.n_embd)

    def spread(self, builder: GraphBuilder, h: Hyperparameters, x: Value) -> Value:
        """The first streams: x, and x through a matrix for each other one, made as long as x."""
        others = self.count - 1
        y = builder.head_linear(builder.repeat(x, others), "altup_proj", others, h.n_embd, h.n_embd)
        y = builder.match_magnitude(y, x)
        return builder.join(x, range(h.n_embd), 1, y, range(y.width))

    def gather(self, builder: GraphBuilder, h: Hyperparameters, streams: Value) -> Value:
        """The mean of the first stream and the others, each through a matrix, and made as long as the active one."""
        others = self.count - 1
        y = builder.slice(streams, h.n_embd, others * h.n_embd)
        y = builder.head_linear(y, "altup_unembd_proj", others, h.n_embd, h.n_embd)
        y = builder.match_magnitude(y, self.active(builder, h, streams))
        x = builder.slice(streams, 0, h.n_embd)
        for stream in range(others):
            x = builder.add(x, builder.slice(y, stream * h.n_embd, h.n_embd))
        return builder.scale(x, 1.0 / self.count)

    def predict(self, builder: GraphBuilder, h: Hyperparameters, streams: Value, block: str) -> Value:
        """What each stream would become: itself, and a mixture of all, by weights from the active one."""
        modalities = self._modalities(builder, h, self.active(builder, h, streams), block)
        weights = builder.linear(modalities, f"{block}.altup_predict_coef", self.count * self.count)
        return builder.mix(streams, weights, self.count, add=streams)

    def correct(self, builder: GraphBuilder, h: Hyperparameters, predictions: Value, x: Value, block: str) -> Value:
        """The predictions, and a part of what the active one, which became x, was off by."""
        modalities = self._modalities(builder, h, x, block)
        weights = builder.linear(modalities, f"{block}.altup_correct_coef", self.count)
        weights = builder.affine(weights, None, np.ones(self.count, np.float32))
        innovation = builder.add(x, builder.scale(self.active(builder, h, predictions), -1.0))
        return builder.mix(innovation, weights, self.count, add=predictions)

    def add_to_others(self, builder: GraphBuilder, h: Hyperparameters, streams: Value, x: Value) -> Value:
        """x added to all streams but the first."""
        others = self.count - 1
        y = builder.add(builder.slice(streams, h.n_embd, others * h.n_embd), builder.repeat(x, others))
        return builder.join(streams, range(h.n_embd), 1, y, range(y.width))

    def _modalities(self, builder: GraphBuilder, h: Hyperparameters, x: Value, block: str) -> Value:
        y = builder.scale(builder.rms_norm(x, f"{block}.altup_router_norm", h.rms_eps), 1.0 / h.n_embd)
        return builder.softcap(builder.linear(y, f"{block}.altup_router", self.count), 1.0)
