"""Hyper-parameters out of a file's metadata.

A model file comes from a stranger, and these numbers size every buffer and index that comes later: each has bounds,
and one outside them raises `FormatError` with the file and the key.
"""

from collections.abc import Sequence
from math import isfinite
from typing import Any

import numpy as np

from qrun.formats import FormatError
from qrun.formats.dataclass import dataclass
from qrun.formats.tensors import Described, TensorFile, text_of
from qrun.models.graph import CacheLayer
from qrun.models.support import DIFFUSION, EMBEDDERS

# Far above any published model; low enough that products of a few of them stay far from overflow.
MAX_LAYERS = 512
MAX_EXPERTS = 1024
MAX_HEADS = 4096
MAX_HEAD_DIM = 4096
MAX_STATE = 256
MAX_TAPS = 16
MAX_WIDTH = 1 << 20
MAX_CONTEXT = 1 << 30


class Metadata:
    """Typed, bounded access to the keys of one architecture, without its name: `attention.head_count`."""

    def __init__(self, reader: TensorFile[Described]) -> None:
        self.reader = reader
        architecture = text_of(reader, "general.architecture")
        if architecture is None:
            raise FormatError(reader.path, "general.architecture is missing or not a string")
        self.architecture = architecture

    def error(self, key: str, problem: str) -> FormatError:
        """The error to raise: `<file>: <key> <problem>`."""
        return FormatError(self.reader.path, f"{self.architecture}.{key} {problem}")

    def has(self, key: str) -> bool:
        """Does the file have this key?"""
        return f"{self.architecture}.{key}" in self.reader.metadata

    def is_array(self, key: str) -> bool:
        """Does the file have an array under this key?"""
        return isinstance(self.reader.metadata.get(f"{self.architecture}.{key}"), np.ndarray)

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = MAX_WIDTH) -> int:
        """A whole number in low..high; without a default, the key is required."""
        return self._check_integer(key, self._get(key, default), low, high)

    def per_layer(
        self, key: str, n_layer: int, default: int | tuple[int, ...] | None = None, low: int = 1, high: int = MAX_WIDTH
    ) -> tuple[int, ...]:
        """A whole number in low..high for each layer: the file gives one for all, or an array."""
        value = self._get(key, default)
        if not isinstance(value, (np.ndarray, list, tuple)):
            return (self._check_integer(key, value, low, high),) * n_layer
        if len(value) != n_layer:
            raise self.error(key, f"has {len(value)} values, expected one for each of {n_layer} layers")
        return tuple(self._check_integer(key, one, low, high) for one in value)

    def real(self, key: str, default: float | None = None, low: float = 0.0, high: float = 1e30) -> float:
        """A finite number in low..high; without a default, the key is required."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, f"is not a number: {shorten(value)}")
        if not isfinite(value) or not low <= value <= high:
            raise self.error(key, f"is {value}, expected {low:g} to {high:g}")
        return float(value)

    def reals(
        self, key: str, n_layer: int, *, low: float = 0.0, high: float = 1e30, of_architecture: bool = True
    ) -> tuple[float, ...]:
        """A finite number in low..high for each layer: the file gives one for all, or an array.

        of_architecture: False for a key whose name is whole.
        """
        name = f"{self.architecture}.{key}" if of_architecture else key
        value: Any = self.reader.metadata.get(name)
        if value is None:
            raise FormatError(self.reader.path, f"{name} is missing")
        is_array = isinstance(value, (np.ndarray, list, tuple))
        values: Sequence[Any] | np.ndarray = value if is_array else [value] * n_layer
        if len(values) != n_layer:
            problem = f"has {len(values)} values, expected one for each of {n_layer} layers"
            raise FormatError(self.reader.path, f"{name} {problem}")
        for one in values:
            is_number = isinstance(one, (int, float, np.integer, np.floating)) and not isinstance(one, bool)
            if not is_number or not low <= one <= high:
                raise FormatError(self.reader.path, f"{name} is {shorten(one)}, expected {low:g} to {high:g}")
        return tuple(float(one) for one in values)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, (bool, np.bool_)):
            raise self.error(key, f"is not true or false: {shorten(value)}")
        return bool(value)

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"is not a string: {shorten(value)}")
        return value

    def flags(self, key: str, n_layer: int) -> tuple[bool, ...] | None:
        """A flag for each layer, or None if the file has no array under this key."""
        value = self.reader.metadata.get(f"{self.architecture}.{key}")
        if not isinstance(value, np.ndarray):
            return None
        if value.dtype.kind not in "biu" or len(value) < n_layer:
            raise self.error(key, f"is not a flag for each of {n_layer} layers")
        return tuple(bool(flag) for flag in value[:n_layer])

    def integers(self, key: str, least: int, low: int = 0, high: int = MAX_WIDTH) -> tuple[int, ...]:
        """An array of whole numbers in low..high, of at least so many."""
        value = self.reader.metadata.get(f"{self.architecture}.{key}")
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or len(value) < least:
            raise self.error(key, f"is not an array of {least} whole numbers")
        return tuple(self._check_integer(key, one, low, high) for one in value)

    def _get(self, key: str, default: object) -> object:
        value = self.reader.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise self.error(key, "is missing")
        return value

    def _check_integer(self, key: str, value: object, low: int, high: int) -> int:
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            raise self.error(key, f"is not a whole number: {shorten(value)}")
        if not low <= value <= high:
            raise self.error(key, f"is {value}, expected {low} to {high}")
        return int(value)


def shorten(value: object) -> str:
    """The value for an error message of one line."""
    if isinstance(value, str):
        return repr(value[:40])
    return str(value) if isinstance(value, (bool, int, float, np.generic)) else "an array"


LACKING = (
    "deci", "mamba", "mamba2", "jamba", "falcon-h1", "granitehybrid", "nemotron_h", "nemotron_h_moe", "plamo2", "lfm2",
    "lfm2moe", "kimi-linear", "bailingmoe3", "kimi-k3", "glm5-next", "rwkv6", "rwkv7", "rwkv6qwen2", "arwkv7",
)  # fmt: skip
"""Architectures whose layers may lack attention or a feed-forward network, and say so with a 0."""
WITHOUT_ATTENTION = ("rwkv6", "rwkv7", "rwkv6qwen2", "arwkv7")
"""Architectures whose heads are not those of attention."""
ALWAYS_BOTH_WAYS = (*DIFFUSION, "gemma-embedding")
"""Architectures whose tokens see those behind them, whatever the file says."""
SYMMETRIC_WINDOWS = ("gemma-embedding", "modern-bert")
"""Architectures whose windows reach to either side."""
WHOLE_HEADS = ("deepseek2-ocr",)
"""Architectures whose heads turn as a whole, whatever the file says, which may be 0."""
TURNED_AS_FIRST = {
    "afmoe": 4, "cohere2": 4, "deepseek4": 0, "exaone-moe": 4, "gemma-embedding": 6, "gemma2": 2, "gemma3": 6,
    "gemma3n": 5, "gpt-oss": 2, "lfm2": 0, "llama4": 4, "mellum": 4, "olmo2": 4, "plamo3": 8,
}  # fmt: skip
"""Architectures whose heads turn on all layers as the reference engine has it for the first; and after how many layers
of which the last sees everything, where the file does not say it (0: never)."""
WITHOUT_POSITIONS = ("glm5-next",)
"""Architectures of which nothing turns, and which say so with a 0."""


@dataclass(frozen=True)
class Hyperparameters:
    """What these transformers have. Lengths in floats, contexts in tokens; tuples have a value per layer.

    n_layer: without the blocks at the end that only predict further tokens (`nextn_predict_layers`), which are not run.
    n_ff_expert: of one expert, 0 where the file does not say. n_dense: how many layers at the beginning have no
    experts. n_groups, n_groups_used: experts are chosen among those of the best groups only, where there are groups.
    """

    metadata: Metadata
    n_vocab: int
    n_embd: int
    n_layer: int
    n_blocks: int
    n_heads: tuple[int, ...]
    n_kv_heads: tuple[int, ...]
    n_ff: tuple[int, ...]
    head_dim_k: int
    head_dim_v: int
    n_rot: int
    context_length: int
    n_expert: int
    n_used: int
    n_groups: int
    n_groups_used: int
    n_ff_expert: tuple[int, ...]
    n_dense: int
    causal: bool
    """Does a token see those before it only?"""

    @classmethod
    def read(cls, metadata: Metadata, *, drafts: bool = False) -> "Hyperparameters":
        """The defaults are the reference engine's: head size n_embd / n_head, all heads with keys of their own.

        drafts: with values for the blocks at the end, too.
        """
        n_embd = metadata.integer("embedding_length")
        n_blocks = metadata.integer("block_count", high=MAX_LAYERS)
        n_layer = n_blocks - metadata.integer("nextn_predict_layers", 0, low=0, high=n_blocks - 1)
        described = n_blocks if drafts else n_layer
        least = 0 if metadata.architecture in LACKING else 1
        none = 0 if metadata.architecture in WITHOUT_ATTENTION else None
        n_heads = metadata.per_layer("attention.head_count", n_blocks, none, low=least, high=MAX_HEADS)
        n_kv_heads = metadata.per_layer("attention.head_count_kv", n_blocks, n_heads, low=least, high=MAX_HEADS)
        for heads, kv_heads in zip(n_heads, n_kv_heads, strict=True):
            if metadata.architecture in WITHOUT_ATTENTION:
                continue
            if kv_heads and (heads % kv_heads or not heads):
                raise metadata.error("attention.head_count_kv", f"is {kv_heads}, which does not divide {heads} heads")
        head_dim_k, head_dim_v, n_rot = read_head_dims(metadata, n_embd, n_heads)
        causal = metadata.flag("attention.causal", metadata.architecture not in EMBEDDERS)
        n_expert = metadata.integer("expert_count", 0, low=0, high=MAX_EXPERTS)
        n_groups, n_groups_used = read_groups(metadata, n_expert)
        # A model of experts alone need not say how wide a dense network would be.
        n_ff = metadata.per_layer(
            "feed_forward_length", n_blocks, 0 if n_expert else None, low=0 if n_expert else least
        )
        return cls(
            metadata=metadata,
            n_vocab=count_vocabulary(metadata.reader),
            n_embd=n_embd,
            n_layer=n_layer,
            n_blocks=n_blocks,
            n_heads=n_heads[:described],
            n_kv_heads=n_kv_heads[:described],
            n_ff=n_ff[:described],
            head_dim_k=head_dim_k,
            head_dim_v=head_dim_v,
            n_rot=n_rot,
            context_length=metadata.integer("context_length", high=MAX_CONTEXT),
            n_expert=n_expert,
            n_used=read_used(metadata, n_expert, n_blocks)[0] if n_expert else 0,
            n_groups=n_groups,
            n_groups_used=n_groups_used,
            n_ff_expert=metadata.per_layer("expert_feed_forward_length", n_blocks, 0, low=0)[:described],
            n_dense=metadata.integer("leading_dense_block_count", 0, low=0, high=MAX_LAYERS),
            causal=causal and metadata.architecture not in ALWAYS_BOTH_WAYS,
        )

    @property
    def embeds(self) -> bool:
        """Are embeddings all that the model makes?"""
        return self.metadata.architecture in EMBEDDERS

    @property
    def rms_eps(self) -> float:
        """What root mean square norms add to the mean. Files of Nemotron-H may give it under the other name."""
        key = "attention.layer_norm_rms_epsilon"
        if not self.metadata.has(key) and self.metadata.has("attention.layer_norm_epsilon"):
            return self.norm_eps
        return self.metadata.real(key, high=1.0)

    @property
    def norm_eps(self) -> float:
        """What layer norms add to the variance."""
        return self.metadata.real("attention.layer_norm_epsilon", high=1.0)

    def cache_layer(self, layer: int, window: int | None = None) -> CacheLayer:
        """What the cache of this layer holds."""
        if not self.n_kv_heads[layer]:
            raise self.metadata.error("attention.head_count_kv", f"is 0 for layer {layer}, which has attention")
        if window is not None and not self.causal and self.metadata.architecture not in SYMMETRIC_WINDOWS:
            raise self.metadata.error("attention.causal", "is False, with windows: that is not supported")
        return CacheLayer(
            self.n_heads[layer], self.n_kv_heads[layer], self.head_dim_k, self.head_dim_v, window,
            precise=not self.causal, causal=self.causal,
        )  # fmt: skip


def read_head_dims(metadata: Metadata, n_embd: int, n_heads: tuple[int, ...]) -> tuple[int, int, int]:
    """Dimensions of keys and of values, and how many of a key's turn: all 0 where no layer has heads."""
    most = next((heads for heads in n_heads if heads), 0)
    if not most:
        return 0, 0, 0
    head_dim = n_embd // most or None
    head_dim_k = metadata.integer("attention.key_length", head_dim, high=MAX_HEAD_DIM)
    head_dim_v = metadata.integer("attention.value_length", head_dim, high=MAX_HEAD_DIM)
    if metadata.architecture in WITHOUT_POSITIONS:
        return head_dim_k, head_dim_v, metadata.integer("rope.dimension_count", 0, low=0, high=0)
    whole = metadata.architecture in WHOLE_HEADS
    n_rot = head_dim_k if whole else metadata.integer("rope.dimension_count", head_dim_k, low=2, high=head_dim_k)
    key = "rope.dimension_count"
    if not whole and turns_as_windows(metadata):
        key = "rope.dimension_count_swa"
        n_rot = metadata.integer(key, n_rot, low=2, high=head_dim_k)
    if n_rot % 2:
        raise metadata.error(key, f"is {n_rot}, expected an even number")
    return head_dim_k, head_dim_v, n_rot


def turns_as_windows(metadata: Metadata) -> bool:
    """Do heads of all layers turn as those of layers with a window: does the first see one, and is that what counts?"""
    period = TURNED_AS_FIRST.get(metadata.architecture)
    if period is None or not metadata.integer("attention.sliding_window", 1, low=0, high=MAX_CONTEXT):
        return False
    key = "attention.head_count_kv"
    if metadata.is_array(key) and not metadata.integers(key, 1)[0]:  # the first layer has no attention
        return False
    key = "attention.sliding_window_pattern"
    flags = metadata.flags(key, 1)
    return flags[0] if flags is not None else metadata.integer(key, period, low=0, high=MAX_LAYERS) != 1


def read_used(metadata: Metadata, n_expert: int, n_blocks: int) -> tuple[int, ...]:
    """How many experts a row uses, layer by layer. Only layers that have no experts may use none; they get the most."""
    key = "expert_used_count"
    if not metadata.is_array(key):
        return (metadata.integer(key, high=n_expert),) * n_blocks
    used = metadata.per_layer(key, n_blocks, low=0, high=n_expert)
    if not any(used):
        raise metadata.error(key, "is 0 for every layer")
    return tuple(one or max(used) for one in used)


def read_groups(metadata: Metadata, n_expert: int) -> tuple[int, int]:
    """Into how many groups the experts fall, and of how many experts are chosen. One group is none."""
    n_groups = metadata.integer("expert_group_count", 0, low=0, high=n_expert)
    if n_groups <= 1:
        return 1, 1
    if n_expert % n_groups:
        raise metadata.error("expert_group_count", f"is {n_groups}, which does not divide {n_expert} experts")
    n_groups_used = metadata.integer("expert_group_used_count", high=n_groups)
    if metadata.integer("expert_used_count", high=n_expert) > n_expert // n_groups * n_groups_used:
        raise metadata.error("expert_group_used_count", f"is {n_groups_used}: they have too few experts to be chosen")
    return n_groups, n_groups_used


def count_vocabulary(reader: TensorFile[Described]) -> int:
    """The rows of the token embedding: a file need not bring its tokens, and may have padded them."""
    embedding = reader.tensors.get("token_embd.weight")
    if embedding is None:
        raise FormatError(reader.path, "tensor token_embd.weight is missing")
    if len(embedding.shape) != 2 or not embedding.shape[0]:
        raise FormatError(reader.path, f"tensor token_embd.weight has shape {embedding.shape}, expected a matrix")
    return embedding.shape[0]
