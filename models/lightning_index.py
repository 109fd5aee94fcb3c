"""The lightning indexer (DeepSeek V3.2: arXiv:2512.02556): small heads that say to which positions of a long context a
token attends. Its keys are kept beside those of attention; some models have one for several layers, or a key for
several positions."""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

from qrun.models.graph import Chosen, GraphBuilder, Index, Rotation, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.sparse_index import read_index


@dataclass
class LightningIndex:
    """The indexers of a model, whose heads turn from dimension `turned_from` on, if there is a rotation.

    with_own: which layers have one; the others attend to what the last layer before them chose. eps: of the keys' norm.
    """

    index: Index
    rotation: Rotation | None
    turned_from: int
    eps: float
    with_own: tuple[bool, ...]
    last: Chosen | None = None

    @classmethod
    def read(
        cls, metadata: Metadata, h: Hyperparameters, context: int, rotation: Rotation | None, *,
        turned_last: bool = False, eps: float = 1e-6, with_own: tuple[bool, ...] | None = None, every: int = 1,
        of_entries: bool = False,
    ) -> "LightningIndex | None":  # fmt: skip
        """From a file, or None for a context in which all positions are seen.

        turned_last: do the last dimensions turn, and not the first? with_own: by default all layers. every, of_entries:
        as in `Index`."""
        n_rot = 0 if rotation is None else 2 * len(rotation.frequencies)
        index = read_index(metadata, context, n_rot, every=every, of_entries=of_entries)
        if index is None:
            return None
        turned_from = index.dim - n_rot if turned_last else 0
        return cls(index, rotation, turned_from, eps, with_own or (True,) * h.n_layer)

    def of_layer(self, builder: GraphBuilder, x: Value, layer: int) -> Callable[[Value], Chosen]:
        """For `latent_attention.attend`. x: what goes into the attention of a layer."""
        return lambda q: self.choose(builder, x, q, layer)

    def choose(self, builder: GraphBuilder, x: Value, q: Value, layer: int) -> Chosen:
        """What rows of a layer attend to. x: what goes into its attention; q: the short row of its queries."""
        if self.with_own[layer]:
            self.last = self.choose_by(builder, x, q, self.keys(builder, x, layer), layer)
        if self.last is None:
            raise builder.error(f"layer {layer} has no indexer (attention.indexer.types), and none before it has one")
        return self.last

    def keys(self, builder: GraphBuilder, x: Value, layer: int) -> Value:
        """The index's keys."""
        k = builder.linear(x, f"blk.{layer}.indexer.attn_k", self.index.dim, bias=False)
        k = builder.layer_norm(k, f"blk.{layer}.indexer.k_norm", self.eps)
        if self.index.every > 1:
            name = f"blk.{layer}.indexer_compressor"
            scores = builder.linear(x, f"{name}_gate", self.index.dim, bias=False)
            k = builder.pool(k, scores, f"{name}_ape", self.index.every, overlap=False)
        return self.turn(builder, k)

    def choose_by(self, builder: GraphBuilder, x: Value, q: Value, keys: Value, layer: int) -> Chosen:
        """As `choose`, by these keys."""
        name, index = f"blk.{layer}.indexer", self.index
        asked = self.turn(builder, builder.linear(q, f"{name}.attn_q_b", index.n_heads * index.dim, bias=False))
        weights = builder.linear(x, f"{name}.proj", index.n_heads, bias=False)
        weights = builder.scale(weights, 1.0 / sqrt(index.dim * index.n_heads))
        return builder.choose(asked, keys, weights, index)

    def turn(self, builder: GraphBuilder, x: Value, behind: int = 0) -> Value:
        """Heads, turned as where they are, or so many positions before."""
        if self.rotation is None:
            return x
        return builder.rope(x, self.index.dim, self.rotation, start=self.turned_from, behind=behind)


def layers_with_own(metadata: Metadata, h: Hyperparameters, default: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which layers have an indexer of their own, as the file says, or by default."""
    key = "attention.indexer.types"
    if not metadata.has(key):
        return default
    return metadata.flags(key, h.n_layer) or (bool(metadata.integer(key, low=0, high=1)),) * h.n_layer
