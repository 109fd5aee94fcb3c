"""What has been computed of earlier texts, for texts that begin alike.

Every request that begins looks for the cache that has the longest beginning of its prompt, and goes on from a fork of
it: pages are shared, and copied when one of the two writes. Caches of requests that have ended stay, until together
with all others they take more memory than they may; those that were not used for longest go first.
"""

import weakref
from typing import TYPE_CHECKING

from qrun.engine.generation.token_cache import TokenCache, common_prefix
from qrun.engine.native.locks import ForkAwareLock

if TYPE_CHECKING:
    from qrun.engine.program.runtime import Runtime

MOST = 256  # caches that are kept


class Prefixes:
    """The caches of one model. limit: bytes that sequences may hold, those in use included, before kept ones go."""

    def __init__(self, runtime: "Runtime", limit: int) -> None:
        self.limit = limit
        self._runtime = runtime
        self._lock = ForkAwareLock()
        self._known: weakref.WeakSet[TokenCache] = weakref.WeakSet()
        self._kept: dict[TokenCache, None] = {}  # those used last are last

    def know(self, cache: TokenCache) -> None:
        """There is one more cache to share beginnings of."""
        with self._lock:
            self._known.add(cache)

    def keep(self, cache: TokenCache) -> None:
        """Nobody uses this cache any more."""
        with self._lock:
            self._known.add(cache)
            self._kept.pop(cache, None)
            self._kept[cache] = None
        self.trim()

    def adopt(self, cache: TokenCache, prompt: list[int]) -> None:
        """Give a cache what another one has of a prompt's beginning, if that is more. Whoever calls holds its lock."""
        if cache.tap is not None:
            return
        wanted = prompt[:-1]
        own = shared_beginning(cache, wanted)
        with self._lock:
            others = [(shared_beginning(other, wanted), other) for other in self._known if other is not cache]
        for length, other in sorted(others, key=lambda pair: -pair[0]):
            if length <= own:
                return
            if other.tap is not None or other.lock.abandoned or not other.lock.acquire(blocking=False):
                continue
            try:
                if shared_beginning(other, wanted) != length:  # it went on meanwhile
                    continue
                with self._lock:
                    superseded = other in self._kept and length == len(other.tokens)
                    if superseded:
                        del self._kept[other]
                    elif other in self._kept:
                        self._kept[other] = self._kept.pop(other)
                cache.become(other, move=superseded)
                return
            finally:
                other.lock.release()

    def trim(self, wanted: int = 0) -> bool:
        """Let kept caches go until `wanted` bytes more would fit; whether they do."""
        while self._runtime.cache_bytes + wanted > self.limit or len(self._kept) > MOST:
            with self._lock:
                oldest = next(iter(self._kept), None)
                if oldest is None:
                    return self._runtime.cache_bytes + wanted <= self.limit
                del self._kept[oldest]
                self._known.discard(oldest)
            _close(oldest)
        return True

    def clear(self) -> None:
        """Let all kept caches go."""
        with self._lock:
            kept = list(self._kept)
            self._kept.clear()
        for cache in kept:
            _close(cache)


def _close(cache: TokenCache) -> None:
    if not cache.lock.abandoned:  # then its threads are those of another process
        with cache.lock:
            cache.close()


def shared_beginning(cache: TokenCache, prompt: list[int]) -> int:
    """How many tokens a cache and a prompt begin with alike."""
    return common_prefix(cache.tokens[: len(prompt)], prompt)  # a copy: another thread may shorten what it has
