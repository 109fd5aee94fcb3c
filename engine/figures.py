"""What a model tells of itself and of texts: memory, what is under way, how likely tokens are."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token of a text, and the natural logarithm of its probability there. top: the likeliest ones. rank: 1 for the
    likeliest of all."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    rank: int


@dataclasses.dataclass(frozen=True)
class Activity:
    """running: generations that share steps and have read their prompts; waiting: those that have not. cache_bytes:
    what all that is cached of texts takes, of at most cache_limit."""

    running: int
    waiting: int
    cache_bytes: int
    cache_limit: int


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """What a model takes of memory, in bytes; with the draft that it was loaded with, if there is one."""

    file: int
    """The model's file, or all files of a split one."""
    weights: int
    """What is read of it: mapped, not copied, shared with other processes, and given back when memory is short."""
    arena: int
    """Where a step puts what it computes."""
    cache: int
    """What the cache of texts has taken from the system: it keeps for later what is freed."""
    cache_used: int
    """What texts hold of that, those included that are kept to be gone on from."""
    cache_limit: int
    """What texts may hold before the oldest are forgotten: `cache_bytes` of `Model.load`."""

    @property
    def total(self) -> int:
        """Weights, arena and cache."""
        return self.weights + self.arena + self.cache
