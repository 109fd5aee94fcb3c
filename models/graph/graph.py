"""A model as a list of operations, in the order in which they run."""

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path

from qrun.formats.dataclass import dataclass
from qrun.models.graph.experts import MoE
from qrun.models.graph.row_operations import (
    Activate,
    ActivateAlone,
    Add,
    Affine,
    Balance,
    Clamp,
    Dot,
    Embed,
    Gate,
    GaussianTopK,
    HeadLinear,
    Input,
    Join,
    LayerNorm,
    Linear,
    MatchMagnitude,
    Mix,
    MixByScore,
    RMSNorm,
    Rope,
    Scale,
    SelectRows,
    Slice,
    Softcap,
)
from qrun.models.graph.sequence_operations import (
    WKV,
    Attention,
    CacheLayer,
    Choose,
    Convolution,
    EmbedHashes,
    Keep,
    LinearAttention,
    Pool,
    SelectiveScan,
)
from qrun.models.graph.values import Value

Operation = (
    Embed | EmbedHashes | Input | RMSNorm | LayerNorm | Linear | HeadLinear | Join | Slice | Rope | Attention | Keep
    | Choose | Pool | Convolution | LinearAttention | SelectiveScan | WKV | Activate | ActivateAlone | Gate | Clamp
    | Add | Mix | MixByScore | Balance | Dot | MatchMagnitude | GaussianTopK | Scale | Affine | Softcap | MoE
    | SelectRows
)  # fmt: skip
STATEFUL = (Attention, Keep, Choose, Pool, EmbedHashes, Convolution, LinearAttention, SelectiveScan, WKV)
"""Operations whose rows depend on the rows before them."""


@dataclass
class Graph:
    """A model, ready to be compiled. `context_length` is the trained one, in tokens; `context` the one to run it with,
    for which it was built."""

    architecture: str
    operations: list[Operation]
    logits: Value
    cache_layers: list[CacheLayer]
    n_vocab: int
    n_embd: int
    context_length: int
    context: int = 0
    n_states: int = 0
    """How many operations keep a state of their own for each sequence."""
    embeds: bool = False
    """Of `logits`, which are none then but rows of n_embd numbers, embeddings are made."""
    hidden: Value | None = None
    """What draft layers go on from (see `models.drafts`), if somebody wants it: of every row, or of those selected."""
    uses: Mapping[str, int] = field(default_factory=dict)
    """How many times the builder asked for each tensor: what was asked for once has one use."""
    encoder: "Graph | None" = None
    """What reads the source that a text answers, of models with two halves: it leaves keys and values of the source in
    some of the cache's layers, which both share."""
    start: int = 0
    """The token with which an answer to a source begins."""
    path: Path = Path()
    """The file that it was read from."""
    rescaled: bool = False
    """Whether its matrices are not those that it was trained with, and the inputs of some are divided before."""

    @property
    def causal(self) -> bool:
        """Does a token see those before it only? Else a text is computed as a whole, in one step."""
        return all(layer.causal for layer in self.cache_layers if layer.side == "text")
