"""What has been computed of earlier texts, for texts that begin alike.

Every request that begins looks for the cache that has the longest beginning of its prompt, and goes on from a fork of
it: pages are shared, and copied when one of the two writes. Caches of requests that have ended stay, until together
with all others they take more memory than they may; those that were not used for longest go first. With a folder for
that, those that nobody has used for a while are written to disk, and found there again: also by the next process.
"""

import threading
import time
import weakref
from typing import TYPE_CHECKING

from qrun.engine.generation.token_cache import TokenCache, common_prefix
from qrun.engine.native.locks import ForkAwareLock

if TYPE_CHECKING:
    from qrun.engine.generation.adapters import Chosen
    from qrun.engine.generation.disk_prefixes import DiskPrefixes
    from qrun.engine.program.runtime import Runtime

MOST = 256  # caches that are kept
IDLE_SECONDS = 10.0  # after which a cache is written to disk
CLOSING_SECONDS = 5.0  # within which a model that is closed begins to write what is left
LEAVING = 0.25  # of the limit: what may wait to be written, and goes then


class Prefixes:
    """The caches of one model. limit: bytes that sequences may hold, those in use included, before kept ones go.

    disk: where they are kept, too; None for nowhere.
    """

    def __init__(self, runtime: "Runtime", limit: int) -> None:
        self.limit = limit
        self.disk: DiskPrefixes | None = None
        self._runtime = runtime
        self._lock = ForkAwareLock()
        self._known: weakref.WeakSet[TokenCache] = weakref.WeakSet()
        self._kept: dict[TokenCache, float] = {}  # since when; those used last are last
        self._unwritten: set[TokenCache] = set()  # of these, what may be worth writing
        self._leaving: list[TokenCache] = []  # which are to be written, and closed
        self._leaving_bytes = 0
        self._writer: _Writer | None = None

    def know(self, cache: TokenCache) -> None:
        """There is one more cache to share beginnings of."""
        with self._lock:
            self._known.add(cache)

    def keep(self, cache: TokenCache, *, written: bool = False) -> None:
        """Nobody uses this cache any more. written: the disk has it."""
        if not cache.tokens and not cache.n_source_read:
            _close(cache)  # its prompt was not read
            return
        with self._lock:
            self._known.add(cache)
            self._kept.pop(cache, None)
            self._kept[cache] = time.monotonic()
            if self.disk is not None and not written and not cache.source:
                self._unwritten.add(cache)
                self._wake_writer()
        self.trim()

    def adopt(self, cache: TokenCache, prompt: list[int]) -> int:
        """Give a cache what another one has of a prompt's beginning, if that is more. Whoever calls holds its lock.

        Returns how much of its beginning any of them has had: there, others may go another way, too."""
        if cache.tap is not None:
            return 0
        wanted = prompt[:-1]
        own = cache.sequence.returns_to(shared_beginning(cache, wanted))
        if cache.source and not cache.n_source_read:
            own = -1  # one that has read the source is worth more, even without a token behind it
        with self._lock:
            known = [
                other for other in self._known
                if other is not cache and other.adapters == cache.adapters and other.source == cache.source
                and other.n_source_read == len(cache.source)
            ]  # fmt: skip
        alike = [(shared_beginning(other, wanted), other) for other in known]
        longest = max((length for length, _ in alike), default=0)
        usable = [(other.sequence.returns_to(length), other) for length, other in alike if length > own]
        for length, other in sorted(usable, key=lambda pair: -pair[0]):
            if length <= own:
                break
            if other.tap is not None or other.lock.abandoned or not other.lock.acquire(blocking=False):
                continue
            try:
                if other.sequence.returns_to(shared_beginning(other, wanted)) != length or other.source != cache.source:
                    continue  # it went on meanwhile
                with self._lock:
                    superseded = other in self._kept and length == len(other.tokens) and not other.lasting
                    if superseded:
                        del self._kept[other]
                        self._unwritten.discard(other)
                    elif other in self._kept:
                        del self._kept[other]
                        self._kept[other] = time.monotonic()
                cache.become(other, move=superseded)
                break
            finally:
                other.lock.release()
        return longest

    def snapshot(self, cache: TokenCache) -> None:
        """A cache is where others may want to go on from, and it will not get back there. Whoever calls holds its
        lock."""
        if cache.tap is None and (cache.sequence.has_windows or (self.disk is not None and cache.sequence.keeps_state)):
            self.keep(cache.snapshot())

    def trim(self, wanted: int = 0) -> bool:
        """Let kept caches go until `wanted` bytes more would fit; whether they do."""
        while self._held + wanted > self.limit or len(self._kept) > MOST:
            with self._lock:
                oldest = next(iter(self._kept), None)
                if oldest is None:
                    return self._held + wanted <= self.limit
                del self._kept[oldest]
                self._known.discard(oldest)
                leaves = self._leaves_by_disk(oldest)
            if not leaves:
                _close(oldest)
        return True

    @property
    def _held(self) -> int:
        return self._runtime.cache_bytes - self._leaving_bytes

    def _leaves_by_disk(self, cache: TokenCache) -> bool:
        """Hand a cache that has to go to the thread that writes, if it is worth it and that thread keeps up."""
        if cache not in self._unwritten:
            return False
        self._unwritten.discard(cache)
        size = self._runtime.bytes_of(len(cache.tokens))
        if self._leaving_bytes + size > self.limit * LEAVING:
            return False
        self._leaving.append(cache)
        self._leaving_bytes += size
        self._wake_writer()
        return True

    def clear(self) -> None:
        """Let all kept caches go; what is worth it is written to disk before, the newest first."""
        deadline = time.monotonic() + CLOSING_SECONDS
        with self._lock:
            leaving, self._leaving, self._leaving_bytes = self._leaving, [], 0
            kept = [*leaving, *self._kept]
            worth = self._unwritten | set(leaving)
            self._kept.clear()
            self._unwritten.clear()
        for cache in reversed(kept):
            if cache in worth and time.monotonic() < deadline:
                self.write(cache)
            _close(cache)
        if self.disk is not None:
            self.disk.finish()

    # With a folder

    def may_fetch(self, cache: TokenCache, prompt: list[int]) -> bool:
        """Might the disk have something of a prompt's beginning that is worth a look?"""
        return self.disk is not None and cache.tap is None and not cache.source and len(prompt) > self.disk.worth

    def fetch(self, cache: TokenCache, prompt: list[int], adapters: "Chosen") -> int:
        """Have in memory what the disk has of a prompt's beginning, if that is much more than what is there. Returns
        how much of it the disk knows, though it may not be possible to go on from there."""
        disk, wanted = self.disk, prompt[:-1]
        if disk is None or not self.may_fetch(cache, prompt):
            return 0
        with disk.reading:
            while True:
                with self._lock:
                    known = [one for one in self._known if one.adapters == adapters]
                here = max((one.sequence.returns_to(shared_beginning(one, wanted)) for one in known), default=0)
                alike, usable, stored = disk.longest(wanted, adapters)
                if stored is None or usable < here + disk.worth:
                    return alike
                if not self.trim(self._runtime.bytes_of(len(stored.tokens))):
                    return alike
                sequence = disk.load(stored, adapters)
                if sequence is not None:
                    sequence.adapters = adapters
                    self.keep(TokenCache(self._runtime, sequence, stored.tokens, lasting=True), written=True)
                    return alike

    def write(self, cache: TokenCache) -> None:
        """Have a cache on disk, if it is worth it."""
        disk = self.disk
        if disk is None or cache.tap is not None or cache.source or cache.lock.abandoned:
            return
        with cache.lock:
            tokens, adapters = list(cache.tokens), cache.adapters
        if not disk.worth_writing(tokens, adapters):  # it may read the folder
            return
        with cache.lock:  # for a moment: what is written is a fork, and so nobody waits
            tokens, adapters, sequence = list(cache.tokens), cache.adapters, cache.sequence.fork()
        try:
            disk.write(sequence, tokens, adapters)
        finally:
            sequence.close()

    def write_next(self) -> float | None:
        """Write a cache that has to go, or has been idle long enough. Returns in how many seconds there is more to
        do; None if nothing is left. For the thread that writes."""
        with self._lock:
            if self._leaving:
                cache, leaves = self._leaving[0], True
            else:
                idle = [(since, one) for one, since in self._kept.items() if one in self._unwritten]
                if not idle:
                    self._writer = None
                    return None
                since, cache = min(idle, key=lambda pair: pair[0])
                rest = since + IDLE_SECONDS - time.monotonic()
                if rest > 0:
                    return rest
                leaves = False
        try:
            self.write(cache)
        finally:
            with self._lock:
                still_leaves = leaves and cache in self._leaving  # else the model was closed
                if still_leaves:
                    self._leaving.remove(cache)
                    self._leaving_bytes -= self._runtime.bytes_of(len(cache.tokens))
                elif not leaves and self._kept.get(cache) == since:  # else it may have more, or has to go by now
                    self._unwritten.discard(cache)
            if still_leaves:
                _close(cache)
        return 0.0

    def _wake_writer(self) -> None:
        if self._writer is None or not self._writer.is_alive():
            self._writer = _Writer(self)
            self._writer.start()
        self._writer.more.set()


class _Writer(threading.Thread):
    """Writes to disk, as long as there is something to write and somebody holds the model."""

    def __init__(self, prefixes: Prefixes) -> None:
        super().__init__(name="qrun prefixes", daemon=True)
        self.more = threading.Event()
        self._prefixes = weakref.ref(prefixes)

    def run(self) -> None:
        from qrun.engine.generation.disk_prefixes import yield_to_others

        yield_to_others()
        while (prefixes := self._prefixes()) is not None:
            self.more.clear()
            rest = prefixes.write_next()
            if rest is None:
                return
            del prefixes  # or it would live as long as the wait
            if rest:
                self.more.wait(rest)


def _close(cache: TokenCache) -> None:
    if not cache.lock.abandoned:  # then its threads are those of another process
        with cache.lock:
            cache.close()


def shared_beginning(cache: TokenCache, prompt: list[int]) -> int:
    """How many tokens a cache and a prompt begin with alike."""
    return common_prefix(cache.tokens[: len(prompt)], prompt)  # a copy: another thread may shorten what it has
