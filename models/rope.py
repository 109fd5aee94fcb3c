"""Rotary frequencies, with every published way of stretching them folded in.

Plain: pair j of n_rot / 2 turns by position * base^(-2j / n_rot) radians (Su et al., arXiv:2104.09864). A model that
was trained on a short context and stretched to a longer one by `factor`:

- linear divides every frequency by `factor` (Chen et al., arXiv:2306.15595);
- YaRN (Peng et al., arXiv:2309.00071) does so only for the slow pairs, leaves the fast ones alone, mixes in between,
  and multiplies queries and keys by a magnitude that grows with log(factor);
- rope factors are divisors, one a pair, that the model brings along: Llama 3's, and LongRoPE's two sets, of which the
  context in use chooses one (Ding et al., arXiv:2402.13753).
"""

from dataclasses import replace
from math import ceil, floor, log, pi

import numpy as np

from qrun.formats.dataclass import dataclass
from qrun.models.graph import Constant, GraphBuilder, Rotation, Temperature
from qrun.models.hyperparameters import MAX_CONTEXT, MAX_HEAD_DIM, Hyperparameters, Metadata, shorten

SCALING_TYPES = ("none", "linear", "yarn", "longrope")

# A pair that turns more than BETA_FAST times over the original context keeps its frequency, one that turns less than
# BETA_SLOW times is stretched in full. Few architectures take other values from the file (`with_yarn_betas`).
BETA_FAST = 32.0
BETA_SLOW = 1.0

MIN_DIVISOR = 1e-6  # of a frequency; what is smaller would only make angles without meaning

# Architectures of which sections of a head turn by positions of their own in images (M-RoPE: arXiv:2409.12191): one
# behind the other, or pair by pair. Those of the last turn by none in a text.
SECTIONED = ("qwen2vl", "paddleocr", "glm4", "glm4moe", "bailingmoe3", "hunyuan_vl")
MIXED_SECTIONS = ("qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "qwen4exp")


@dataclass(frozen=True)
class RopeScaling:
    """What a file says of rope. `base` is the plain one's, `attention_factor` multiplies the magnitude.

    Of YaRN alone: `beta_fast` and `beta_slow` (see above); `keep`, how far the fast pairs keep their frequency (0 as
    the rest, 1 in full; None is 1 where the type is yarn); and `damping`, of the growth of the magnitude.
    """

    type: str
    base: float
    factor: float
    attention_factor: float
    original_context: int
    beta_fast: float = BETA_FAST
    beta_slow: float = BETA_SLOW
    keep: float | None = None
    damping: float = 0.0
    given_factor: float = 1.0
    """The file's, even where its type says that there is none."""
    sections: tuple[int, ...] = ()
    """How many pairs turn by each position that an image has, if those of a last section by none in a text."""
    mixed: bool = False
    """Do the sections take turns?"""

    @classmethod
    def read(cls, metadata: Metadata, hyperparameters: Hyperparameters) -> "RopeScaling":
        """The keys under `rope.`, with the reference engine's defaults. A 0 means that there is none."""
        kind = metadata.text("rope.scaling.type", "linear")
        if kind not in SCALING_TYPES:
            raise metadata.error("rope.scaling.type", f"is {shorten(kind)}, expected one of {', '.join(SCALING_TYPES)}")
        # The key had another name once.
        key = "rope.scaling.factor" if metadata.has("rope.scaling.factor") else "rope.scale_linear"
        factor = metadata.real(key, 0.0, high=1e6) or 1.0
        if factor < MIN_DIVISOR:
            raise metadata.error(key, f"is {factor}, expected at least {MIN_DIVISOR}")
        return cls(
            type=kind,
            base=read_base(metadata, "rope.freq_base", 10000.0),
            factor=1.0 if kind == "none" else factor,
            given_factor=factor,
            attention_factor=metadata.real("rope.scaling.attn_factor", 1.0, high=1e6),
            original_context=metadata.integer("rope.scaling.original_context_length", 0, low=0, high=MAX_CONTEXT)
            or hyperparameters.context_length,
            sections=read_sections(metadata),
            mixed=metadata.architecture in MIXED_SECTIONS,
        )

    def with_yarn_betas(self, metadata: Metadata, beta_fast: float = BETA_FAST) -> "RopeScaling":
        """With `beta_fast` and `beta_slow` from the file: the reference engine reads them for few architectures."""
        return replace(
            self,
            beta_fast=metadata.real("rope.scaling.yarn_beta_fast", beta_fast, low=MIN_DIVISOR, high=1e6),
            beta_slow=metadata.real("rope.scaling.yarn_beta_slow", BETA_SLOW, low=MIN_DIVISOR, high=1e6),
        )

    def of_windows(self, base: float) -> "RopeScaling":
        """For layers that only see a window, and stretch as the others do: for them a type of none counts nothing."""
        return replace(self, base=base, factor=self.given_factor)

    def plain(self) -> "RopeScaling":
        """Without any stretching: for layers that only see a window."""
        return replace(self, factor=1.0, attention_factor=1.0)

    def rotation(self, n_rot: int, divisors: Constant | None = None, *, interleaved: bool = False) -> Rotation:
        """What queries and keys go through. `divisors` [n_rot / 2] are the model's rope factors."""
        magnitude = self.attention_factor
        if self.stretches_by_pair and self.factor > 1.0:
            magnitude *= (1.0 + 0.1 * log(self.factor)) / (1.0 + 0.1 * self.damping * log(self.factor))
        return Rotation(self.frequencies(n_rot, divisors), magnitude, interleaved)

    def frequencies(self, n_rot: int, divisors: Constant | None = None) -> Constant:
        """Radians per position, float32 [n_rot / 2]."""
        kept = self.base ** (-2.0 * np.arange(n_rot // 2) / n_rot)
        if divisors is not None:
            kept = kept / divisors
        stretched = kept / self.factor
        if self.stretches_by_pair:
            keep = self._kept * self._yarn_keep(n_rot)
            stretched = keep * kept + (1.0 - keep) * stretched
        if self.sections:
            stretched = np.where(self._turning(n_rot // 2), stretched, 0.0)
        return stretched.astype(np.float32)

    def _turning(self, n_pairs: int) -> np.ndarray:
        """Which pairs turn by one of the positions that a text has."""
        pairs = np.arange(n_pairs) % sum(self.sections)
        first, second, third, _ = self.sections
        if not self.mixed:
            return pairs < first + second + third
        return pairs < 3 * np.array([first, second, third])[pairs % 3]

    @property
    def stretches_by_pair(self) -> bool:
        """Is this YaRN?"""
        return self._kept > 0.0

    @property
    def _kept(self) -> float:
        return float(self.type == "yarn") if self.keep is None else self.keep

    def _yarn_keep(self, n_rot: int) -> np.ndarray:
        """How far each pair keeps its own frequency: 1 for the fast, 0 for the slow, a ramp between."""

        def pair_that_turns(times: float) -> float:
            return n_rot * log(self.original_context / (times * 2.0 * pi)) / (2.0 * log(self.base))

        low = max(0, floor(pair_that_turns(self.beta_fast)))
        high = min(n_rot - 1, ceil(pair_that_turns(self.beta_slow)))
        return 1.0 - np.clip((np.arange(n_rot // 2) - low) / max(0.001, high - low), 0.0, 1.0)


PLAIN = RopeScaling("none", base=10000.0, factor=1.0, attention_factor=1.0, original_context=1)
"""What rope was before any model changed it."""


def has_sections(metadata: Metadata) -> bool:
    """Do sections of a head turn by positions of their own in images?"""
    sections = _sections(metadata)
    return sections[0] > 0 and sections[1] > 0


def read_sections(metadata: Metadata) -> tuple[int, ...]:
    """The sections of a head, where there is a last one."""
    if metadata.architecture not in (*SECTIONED, *MIXED_SECTIONS) or not has_sections(metadata):
        return ()
    sections = _sections(metadata)
    return sections if sections[3] else ()


def _sections(metadata: Metadata) -> tuple[int, ...]:
    return metadata.per_layer("rope.dimension_sections", 4, 0, low=0, high=MAX_HEAD_DIM)


def read_temperature(metadata: Metadata, h: Hyperparameters, length: int) -> Temperature | None:
    """How queries grow with their position, or None where they do not."""
    scale = metadata.real("attention.temperature_scale", 0.0, high=1e3)
    if not scale:
        return None
    if h.n_rot != h.head_dim_k:
        raise metadata.error("attention.temperature_scale", "is not supported where only a part of each head turns")
    return Temperature(scale, length)


def read_n_rot(metadata: Metadata, key: str, h: Hyperparameters) -> int:
    """How many dimensions of a head turn on layers that the file gives a number of their own."""
    n_rot = metadata.integer(key, h.n_rot, low=2, high=h.head_dim_k)
    if n_rot % 2:
        raise metadata.error(key, f"is {n_rot}, expected an even number")
    return n_rot


def read_base(metadata: Metadata, key: str, default: float) -> float:
    """A base of rotary frequencies. One of 1 or less would not make a scale of frequencies."""
    base = metadata.real(key, default, low=1.0, high=1e15)
    if base == 1.0:
        raise metadata.error(key, "is 1, expected more")
    return base


def rope_factors(builder: GraphBuilder, n_rot: int, context: int, original_context: int) -> Constant | None:
    """The model's own divisors of the frequencies, if it has any: one set, or a long and a short one.

    The long set serves whenever the context in use (in tokens) exceeds the original one, for every position: a cache
    cannot hold keys of both.
    """
    length = "long" if context > original_context else "short"
    for name in ("rope_freqs.weight", f"rope_factors_{length}.weight"):
        divisors = builder.optional_constant(name, n_rot // 2)
        if divisors is not None:
            if np.abs(divisors).min() < MIN_DIVISOR:
                raise builder.error(f"tensor {name} divides by numbers smaller than {MIN_DIVISOR}")
            return divisors
    return None
