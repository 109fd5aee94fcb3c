"""The KV cache: pages of 64 positions, shared by sequences and copied when one of them writes.

Layers with the same attention window form a group; a page of a group holds the keys and values of all its layers for
64 positions (laid out in `kernels.attention`), or 64 entries of layers of which one stands for several positions.
Groups with a sliding window give pages back as the window passes. Of models with an encoder there are groups whose
positions are those of the source that a sequence answers.
Beside the pages lie the blocks of what is no cache: see `state_blocks`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from qrun.engine.kernels.records import CACHE_BITS, KIND_BITS, PAGE_POSITIONS, STATE_ROWS
from qrun.engine.native.locks import ForkAwareLock
from qrun.engine.program.pages import Page, PagePool
from qrun.engine.program.state_blocks import MAX_CHECKPOINTS, StateBlocks, state_sizes
from qrun.formats.dataclass import dataclass
from qrun.models.graph import CacheLayer, Graph, Side

P = ParamSpec("P")
T = TypeVar("T")


def head_bytes(dim: int, kind: str) -> int:
    """Bytes of one head's keys (or values) in a page: dimensions padded to 32, and a float16 scale for each 32."""
    blocks = -(-dim // 32)
    values = blocks * 32 * PAGE_POSITIONS * KIND_BITS[kind] // 8
    return values + (2 * blocks * PAGE_POSITIONS if KIND_BITS[kind] < 16 else 0)


@dataclass(frozen=True)
class LayerPlace:
    """Where a layer's keys and values lie in its group's pages, in bytes, and as what they are kept."""

    kind: str
    group: int
    k_offset: int
    v_offset: int
    k_head_bytes: int
    v_head_bytes: int


class CacheLayout:
    """Groups of layers, and where each layer lies in a page of its group; and where in a block each operation with a
    state has it, in bytes.

    states: how many float32 numbers each of these operations keeps.
    """

    def __init__(self, layers: Sequence[CacheLayer], cache_type: str, states: Sequence[int] = ()) -> None:
        if not isinstance(cache_type, str) or cache_type not in CACHE_BITS:
            raise ValueError(f"cache_type {cache_type!r} is not one of {', '.join(CACHE_BITS)}")
        self.cache_type = cache_type
        self.groups: list[tuple[int | None, int]] = []  # window, positions of an entry
        self.sides: list[Side] = []  # whose keys and values each group has
        self.page_bytes: list[int] = []
        self.places: list[LayerPlace] = []
        for layer in layers:
            described = (layer.window, layer.every), layer.side
            known = list(zip(self.groups, self.sides, strict=True))
            if described not in known:
                self.groups.append(described[0])
                self.sides.append(layer.side)
                self.page_bytes.append(0)
            group = known.index(described) if described in known else len(known)
            kind = "f32" if layer.exact or (layer.precise and cache_type == "f16") else cache_type
            kind = "f16" if layer.half and not layer.exact else kind
            k = head_bytes(layer.head_dim_k, kind)
            v = 0 if layer.values_in_keys else head_bytes(layer.head_dim_v, kind)
            start = self.page_bytes[group]
            self.places.append(LayerPlace(kind, group, start, start + layer.n_kv_heads * k, k, v))
            self.page_bytes[group] = start + layer.n_kv_heads * (k + v)
        self.state_offsets: list[int] = []
        self.block_bytes = 0
        for size in states:
            self.state_offsets.append(self.block_bytes)
            self.block_bytes += -(-4 * size // 64) * 64

    @property
    def has_windows(self) -> bool:
        """Are there layers whose pages are given back when a window has passed?"""
        return any(window is not None for window, _ in self.groups)

    def groups_of(self, *sides: Side) -> list[int]:
        """The groups of the text, or of a source that it answers."""
        return [group for group, side in enumerate(self.sides) if side in sides]

    def needed(self, group: int, n: int) -> range:
        """The pages of a group without which n positions cannot be gone on from."""
        window, size = self.groups[group][0], self.positions_of_page(group)
        lowest = 0 if window is None else max(n - window + 1, 0) // size
        return range(lowest, -(-n // size))

    def positions_of_page(self, group: int) -> int:
        """Of how many positions a page has the entries."""
        return PAGE_POSITIONS * self.groups[group][1]

    def bytes_at(self, context: int, source: int | None = None) -> int:
        """Bytes that one sequence of `context` tokens takes. source: tokens of a source, if there is one: by default as
        many."""
        source = context if source is None else source
        total = 0
        for (window, every), side, size in zip(self.groups, self.sides, self.page_bytes, strict=True):
            n = context if side == "text" else source
            # A window may begin and end inside a page, and a batch of new tokens comes on top.
            seen = n if window is None else min(n, window + 2 * PAGE_POSITIONS)
            total += -(-seen // (every * PAGE_POSITIONS)) * size
        return total


def context_bytes(graph: Graph, cache_type: str, context: int) -> int:
    """What a sequence holds at the end of a context, with all checkpoints of states that it can have."""
    layout = CacheLayout(graph.cache_layers, cache_type, state_sizes(graph))
    return layout.bytes_at(context) + (2 + MAX_CHECKPOINTS) * layout.block_bytes


def _drop_all(pools: list[PagePool], held: list[dict[int, Page]]) -> None:
    """What is left to do when a sequence is collected."""
    for pool, pages in zip(pools, held, strict=True):
        pool.dropped.extend(pages.values())


def _locked(method: Callable[Concatenate[KVSequence, P], T]) -> Callable[Concatenate[KVSequence, P], T]:
    """The method, holding the sequence's lock."""

    @functools.wraps(method)
    def run(self: KVSequence, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._lock:
            return method(self, *args, **kwargs)

    return run


class KVSequence:
    """The cache of one sequence of tokens. Not for use by two threads at a time.

    n_past: how many positions have been computed. `lock` guards what sequences share: the pools, and counts of
    references. A sequence that goes without `close` gives its pages back, too.
    """

    def __init__(
        self,
        layout: CacheLayout,
        pools: list[PagePool],
        context: int,
        lock: ForkAwareLock,
        states: StateBlocks | None = None,
    ) -> None:
        self.layout, self.pools, self.context, self._lock = layout, pools, context, lock
        n_pages = -(-context // PAGE_POSITIONS)
        self.n_past = 0
        self.changes = 0
        """How often positions were appended or forgotten, or got other memory."""
        self.adapters: tuple[tuple[int, float], ...] = ()
        """What changes the model for this sequence: numbers of adapters, rising, and their scales."""
        self.source: tuple[int, ...] = ()
        """The tokens that it answers, of models with an encoder: see `answer`."""
        self.source_read = False
        """Do keys and values of the source lie in the cache?"""
        self.states = states or StateBlocks(PagePool(0))
        self._of_text, self._of_source = layout.groups_of("text"), layout.groups_of("source", "encoder")
        self._pages: list[dict[int, Page]] = [{} for _ in pools]
        # Page addresses as kernels read them: one table a group.
        self.tables = np.zeros((len(pools), max(n_pages, 1)), np.int64)
        self._closed = False
        held = [*self._pages, self.states.blocks, self.states.pending]
        of = self.states.pool
        weakref.finalize(self, _drop_all, [*pools, of, of], held).atexit = False

    @_locked
    def reserve(self, count: int) -> None:
        """Make the next `count` positions writable: pages that are missing are taken, shared ones copied."""
        if self._closed:
            raise ValueError("this sequence is closed")
        if not count:
            return
        for group in self._of_text:
            size = self.layout.positions_of_page(group)
            self._own(group, range(self.n_past // size, (self.n_past + count - 1) // size + 1))
        self.states.reserve(self.n_past, count)

    def _own(self, group: int, numbers: range) -> None:
        """Have pages of its own under these numbers."""
        pool, pages = self.pools[group], self._pages[group]
        for index in numbers:
            page = pages.get(index)
            if page is not None and page.references == 1:
                continue
            fresh = pool.take()
            if page is not None:
                fresh.memory[:] = page.memory
                pool.give_back(page)
            self._put(group, index, fresh)

    @_locked
    def answer(self, source: tuple[int, ...]) -> None:
        """Answer this source from now on. What was computed of another one is forgotten."""
        if source != self.source:
            self._clear()
            self.n_past, self.source = 0, source

    @_locked
    def reserve_source(self) -> None:
        """Make room for the source."""
        if self._closed:
            raise ValueError("this sequence is closed")
        for group in self._of_source:
            self._own(group, range(-(-len(self.source) // PAGE_POSITIONS)))

    @_locked
    def keep_source(self) -> None:
        """The source has been read: what only its encoder needs goes."""
        self._drop_all_of(self.layout.groups_of("encoder"))
        self.source_read = True

    @_locked
    def drop_source(self) -> None:
        """The source could not be read: the room for it is given back."""
        self._drop_all_of(self._of_source)

    @property
    def n_source_read(self) -> int:
        """How many tokens of the source need not be read any more."""
        return len(self.source) if self.source_read else 0

    @_locked
    def advance(self, count: int) -> None:
        """`count` positions have been written. Windows move on, and pages that they have left are given back."""
        self.n_past += count
        self.changes += 1
        self.states.advance()
        for group in self._of_text:
            if lowest := self.layout.needed(group, self.n_past).start:
                for index in [i for i in self._pages[group] if i < lowest]:
                    self._drop(group, index)

    @_locked
    def returnable(self, after: int | None = None) -> int:
        """How many positions can follow the first `after` (those there are and the next one, by default) so that
        `truncate` still gets back to these: no window gives back a page on the way."""
        after = self.n_past + 1 if after is None else after
        room = self.context - after
        for window, _ in self.layout.groups:
            if window is not None:
                lowest = max((after - window + 1) // PAGE_POSITIONS, 0)
                room = min(room, (lowest + 1) * PAGE_POSITIONS + window - 2 - after)
        if self.states.exist:  # the step must not leave a whole chunk behind it
            room = min(room, STATE_ROWS - 1)
        return max(room, 0)

    @property
    def keeps_state(self) -> bool:
        """Has the model a state of which only some positions are kept?"""
        return self.states.exist

    @property
    def has_windows(self) -> bool:
        """Are there layers whose pages are given back when a window has passed?"""
        return self.layout.has_windows

    @_locked
    def mark(self) -> None:
        """Someone may want to come back here: a state that `truncate` gets back to is kept, for a while."""
        self.states.mark()

    @_locked
    def returns_to(self, n: int) -> int:
        """What `truncate(n)` would keep."""
        if n >= self.n_past:
            return self.n_past
        n = self.states.reachable(max(n, 0))
        whole = all(index in self._pages[group] for group in self._of_text for index in self.layout.needed(group, n))
        return n if whole else 0

    @_locked
    def truncate(self, n: int) -> int:
        """Forget positions from n on. Returns how many are kept: fewer than n if there is no state to go on from, and 0
        if a window gave back what these would need."""
        if n >= self.n_past:
            return self.n_past
        n = self.returns_to(n)
        for group in self._of_text:
            for index in [i for i in self._pages[group] if i * self.layout.positions_of_page(group) >= n]:
                self._drop(group, index)
        self.states.truncate(n)
        self.n_past = n
        self.changes += 1
        return n

    @_locked
    def fork(self) -> KVSequence:
        """A second sequence with the same past. Pages are shared until one of the two writes."""
        twin = KVSequence(self.layout, self.pools, self.context, self._lock, self.states.fork())
        twin.n_past, twin.adapters = self.n_past, self.adapters
        twin.source, twin.source_read = self.source, self.source_read
        twin.tables[:] = self.tables
        for mine, its in zip(self._pages, twin._pages, strict=True):
            its.update(mine)
            for page in mine.values():
                page.references += 1
        return twin

    @_locked
    def parts(self) -> dict[str, NDArray[np.generic] | list[NDArray[np.uint8]]]:
        """What `state` has, but of pages the memory itself, in lists: nothing is copied. As long as nobody writes to
        the sequence, it stays as it is."""
        arrays: dict[str, NDArray[np.generic] | list[NDArray[np.uint8]]] = {"n_past": np.array(self.n_past, np.int64)}
        for group, pages in enumerate(self._pages):
            numbers = sorted(pages)
            arrays[f"pages{group}"] = np.array(numbers, np.int64)
            arrays[f"data{group}"] = [pages[i].memory for i in numbers]
        if self.states.exist:
            arrays.update(self.states.arrays())
        if self.source:
            arrays["source"] = np.array(self.source if self.source_read else (), np.int64)
        return arrays

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Everything that `restore` needs: n_past, and for each group the numbers and the bytes of its pages."""
        arrays: dict[str, NDArray[np.generic]] = {}
        for name, values in self.parts().items():
            if isinstance(values, list):
                empty = np.empty((0, self.pools[int(name.removeprefix("data"))].page_bytes), np.uint8)
                values = np.stack(values) if values else empty
            arrays[name] = values
        return arrays

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Become what `state` describes. ValueError if it does not fit this model, cache type or context.

        What sequences share is locked for a page at a time: those that are being computed need not wait."""
        if any(f"{name}{group}" not in state for name in ("pages", "data") for group in range(len(self.pools))):
            raise ValueError("the saved state is of another model")
        n_past = int(state["n_past"])
        if not 0 <= n_past <= self.context:
            raise ValueError(f"the saved state has {n_past} tokens, the context {self.context}")
        source = np.asarray(state.get("source", np.empty(0, np.int64)))
        if source.ndim != 1 or source.dtype != np.int64 or len(source) > self.context:
            raise ValueError("the saved state has a source that is none")
        if len(source) and not self._of_source:
            raise ValueError("the saved state has a source, and the model no encoder")
        if n_past and self._of_source and not len(source):
            raise ValueError("the saved state has an answer, and no source that it answers")
        for group, pool in enumerate(self.pools):
            numbers, data = state[f"pages{group}"], state[f"data{group}"]
            n_held = {"text": n_past, "source": len(source), "encoder": 0}[self.layout.sides[group]]
            needed = set(self.layout.needed(group, n_held))
            shaped = data.dtype == np.uint8 and data.shape == (len(numbers), pool.page_bytes)
            if not shaped or not needed <= {int(index) for index in numbers}:
                raise ValueError("the saved state is of another model or cache type")
        if self.states.exist:
            self.states.check(state, n_past)
        with self._lock:
            self.truncate(0)
            self._clear()
        for group, pool in enumerate(self.pools):
            for index, memory in zip(state[f"pages{group}"].tolist(), state[f"data{group}"], strict=True):
                if 0 <= index < self.tables.shape[1]:
                    with self._lock:
                        page = pool.take()
                        self._put(group, index, page)
                    page.memory[:] = memory
        if self.states.exist:
            with self._lock:
                self.states.restore(state)
        self.n_past = n_past
        self.source, self.source_read = tuple(source.tolist()), len(source) > 0

    @_locked
    def close(self) -> None:
        """Give all pages back."""
        self._clear()
        self.n_past = 0
        self._closed = True

    def _clear(self) -> None:
        self._drop_all_of(range(len(self.pools)))
        self.source_read = False
        self.states.clear()

    def _drop_all_of(self, groups: Iterable[int]) -> None:
        for group in groups:
            for index in list(self._pages[group]):
                self._drop(group, index)

    def _put(self, group: int, index: int, page: Page) -> None:
        self.changes += 1
        self._pages[group][index] = page
        self.tables[group, index] = page.address

    def _drop(self, group: int, index: int) -> None:
        self.changes += 1
        self.pools[group].give_back(self._pages[group].pop(index))
        self.tables[group, index] = 0
