"""State beside the KV cache: what convolutions, delta nets and other recurrent operations keep of a sequence.

Such a state is of one size, however long the sequence, and every position changes it: there is no going back, but to
where a copy was kept. Positions are taken in chunks of STATE_ROWS, which begin at multiples of it. A block holds for
every operation its state as it was where the chunk begins, and what it needs of each position of the chunk since then.
A position's result follows from the two, so that
- it has the same bits however the positions came in steps,
- a step that is cancelled half-way has spoilt nothing: positions that were not counted are written again,
- going back within a chunk costs nothing, and a chunk that has ended is left as it is: the next one has a block of its
  own. The block before stays until the next step, so that guesses can be taken back.

Blocks of older chunks are kept as checkpoints: up to MAX_CHECKPOINTS, those used last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from qrun.engine.kernels.records import SCAN_CHANNELS, STATE_ROWS
from qrun.engine.program.pages import Page, PagePool
from qrun.models import graph as G

MAX_CHECKPOINTS = 8

Recurrent = G.EmbedHashes | G.Convolution | G.LinearAttention | G.SelectiveScan | G.WKV


def state_sizes(graph: G.Graph) -> list[int]:
    """How many float32 numbers each operation with a state keeps in a block, by the number of the state."""
    sizes = [0] * graph.n_states
    for operation in stateful(graph):
        sizes[operation.state] = state_size(operation)
    return sizes


def stateful(graph: G.Graph) -> Iterator[Recurrent]:
    """The operations with a state."""
    for operation in graph.operations:
        if isinstance(operation, Recurrent):
            yield operation


def state_size(operation: Recurrent) -> int:
    """As the kernels have it: see there."""
    match operation:
        case G.EmbedHashes(hashes=hashes):
            return 2 * (len(hashes.multipliers) - 1 + STATE_ROWS)
        case G.Convolution(weight=weight, x=x):
            return (len(weight) - 1 + STATE_ROWS) * x.width
        case G.LinearAttention(n_heads=n_heads):
            return n_heads * head_size(operation)
        case G.WKV():
            return wkv_size(operation)
        case G.SelectiveScan(x=x, n_state=n_state):
            channels = -(-x.width // SCAN_CHANNELS) * SCAN_CHANNELS
            return channels * (2 * n_state + 1 + 2 * STATE_ROWS) + STATE_ROWS * n_state


def wkv_size(o: G.WKV) -> int:
    """Of all heads."""
    return o.k.width * (2 * o.dim + 1 + STATE_ROWS + (2 if o.a is None else 4) * STATE_ROWS)


def head_size(o: G.LinearAttention) -> int:
    """Of one head of linear attention."""
    padded = -(-o.dim_v // STATE_ROWS) * STATE_ROWS
    decays = (o.dim_k if o.fades_by_dimension else 1) * STATE_ROWS
    return o.dim_k * padded + o.dim_k * STATE_ROWS + decays + STATE_ROWS * padded


class StateBlocks:
    """The blocks of one sequence. Whoever changes them holds the lock of what sequences share.

    blocks: by the number of the chunk; each has all positions of its chunk, the last one those up to where the sequence
    has come. pending: what the step under way writes, if it leaves the last block's chunk.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.blocks: dict[int, Page] = {}
        self.pending: dict[int, Page] = {}
        self._used: dict[int, int] = {}  # checkpoints, and when they were made or gone back to
        self._clock = 0

    @property
    def exist(self) -> bool:
        """Does the model have such operations at all?"""
        return self.pool.page_bytes > 0

    def reserve(self, n_past: int, count: int) -> None:
        """Make room for the state after the next `count` positions."""
        if not self.exist:
            return
        self._drop_pending()
        if not self.blocks:
            assert n_past == 0, "a sequence with a past and no state"
            self.blocks[0] = self.pool.take()
            self.blocks[0].memory[:] = 0
        last = max(self.blocks)
        page = self.blocks[last]
        if page.references > 1 and n_past < (last + 1) * STATE_ROWS:  # rows will be added to it
            self.blocks[last] = self._copy(page)
        end = (n_past + count - 1) // STATE_ROWS
        if end > last:
            self.pending[end] = self.pool.take()

    def segment(self, n_past: int) -> tuple[int, int, int]:
        """For a step that `reserve` made room for: how many positions of its chunk the last block has, and the
        addresses of that block and of the one in which the step ends."""
        if not self.exist:
            return 0, 0, 0
        last = max(self.blocks)
        begin = self.blocks[last].address
        end = next((page.address for page in self.pending.values()), begin)
        return n_past - last * STATE_ROWS, begin, end

    def advance(self) -> None:
        """The step is done."""
        if not self.pending:
            return
        before = max(self.blocks)
        self.blocks |= self.pending
        self.pending.clear()
        for number in [i for i in self.blocks if i < before and i not in self._used]:
            self._drop(number)

    def mark(self) -> None:
        """Keep the last block as a checkpoint; the one that was not used for longest may go."""
        if self.blocks:
            self._touch(max(self.blocks))
            if len(self._used) > MAX_CHECKPOINTS:
                oldest = min(self._used, key=self._used.__getitem__)
                del self._used[oldest]
                if oldest < max(self.blocks):
                    self._drop(oldest)

    def reachable(self, n: int) -> int:
        """The last position not behind n, and before the sequence's end, that `truncate` can go back to."""
        if not self.exist:
            return n
        return max((min(n, (i + 1) * STATE_ROWS) for i in self.blocks if i * STATE_ROWS <= n), default=0)

    def truncate(self, n: int) -> None:
        """Go back to a position that is reachable."""
        for number in [i for i in self.blocks if n == 0 or i * STATE_ROWS > n]:
            self._drop(number)
        self._drop_pending()
        if self.blocks and max(self.blocks) in self._used:
            self._touch(max(self.blocks))

    def fork(self) -> StateBlocks:
        """The same blocks for a second sequence."""
        twin = StateBlocks(self.pool)
        twin.blocks.update(self.blocks)
        twin._used.update(self._used)
        twin._clock = self._clock
        for page in self.blocks.values():
            page.references += 1
        return twin

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """What `restore` needs: the last block, and the checkpoint used last."""
        numbers = sorted({*sorted(self._used, key=self._used.__getitem__)[-1:], *sorted(self.blocks)[-1:]})
        data = [self.blocks[i].memory for i in numbers]
        return {
            "blocks": np.array(numbers, np.int64),
            "states": np.stack(data) if data else np.empty((0, self.pool.page_bytes), np.uint8),
        }

    def check(self, state: Mapping[str, NDArray[np.generic]], n_past: int) -> None:
        """ValueError if `arrays` of this model cannot have given this."""
        numbers, data = state.get("blocks"), state.get("states")
        if numbers is None or data is None:
            raise ValueError("the saved state is of another model")
        if data.dtype != np.uint8 or data.shape != (len(numbers), self.pool.page_bytes):
            raise ValueError("the saved state is of another model")
        if not self.exist or n_past == 0:
            return
        last = int(max(numbers, default=-1))
        if min(numbers, default=-1) < 0 or not last * STATE_ROWS <= n_past <= (last + 1) * STATE_ROWS:
            raise ValueError("the saved state does not end where its tokens do")
        if not np.isfinite(data.view(np.float32)).all():
            raise ValueError("the saved state has values that are not finite")

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Take the place of what `check` has found to be right."""
        self.clear()
        for number, memory in zip(state["blocks"].tolist(), state["states"], strict=True):
            self.blocks[number] = self.pool.take()
            self.blocks[number].memory[:] = memory
            self._touch(number)

    def clear(self) -> None:
        """Give all blocks back."""
        self._drop_pending()
        for number in list(self.blocks):
            self._drop(number)

    def _touch(self, number: int) -> None:
        self._clock += 1
        self._used[number] = self._clock

    def _copy(self, page: Page) -> Page:
        fresh = self.pool.take()
        fresh.memory[:] = page.memory
        self.pool.give_back(page)
        return fresh

    def _drop_pending(self) -> None:
        for number in list(self.pending):
            self.pool.give_back(self.pending.pop(number))

    def _drop(self, number: int) -> None:
        self.pool.give_back(self.blocks.pop(number))
        self._used.pop(number, None)
