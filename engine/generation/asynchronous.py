"""Generations in asyncio: pieces come from the scheduler's thread, all of a step with one call into the event loop."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING

from qrun.engine.generation.scheduler import LEAVE_SECONDS

if TYPE_CHECKING:
    from qrun.engine.generation.piece import Piece
    from qrun.engine.generation.scheduler import Sharing

Batch = tuple["list[Piece]", "BaseException | None", bool]
"""More pieces, an error, and whether that was all."""
_LEFT: Batch = ([], None, True)  # who was cancelled waits no longer


class LoopSink:
    """Hands pieces to the queues of an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)  # or none of the loops that were would ever go: see _sinks
        self._queues: dict[int, asyncio.Queue[Batch]] = {}
        self._waiting: list[tuple[int, Batch]] = []

    def queue(self, generation: Sharing) -> asyncio.Queue[Batch]:
        """Where what comes of a generation will lie."""
        queue: asyncio.Queue[Batch] = asyncio.Queue()
        self._queues[id(generation)] = queue
        return queue

    def forget(self, generation: Sharing) -> None:
        """Nobody reads its queue any more."""
        self._queues.pop(id(generation), None)

    def put(self, generation: Sharing, pieces: list[Piece], error: BaseException | None) -> None:
        self._waiting.append((id(generation), (pieces, error, generation.stop_reason is not None)))

    def flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        loop = self._loop()
        try:
            if loop is None:
                raise RuntimeError("the loop is gone")
            loop.call_soon_threadsafe(self._hand_out, waiting)
        except RuntimeError:  # or it has been closed
            self._queues.clear()

    def hurry(self, generation: Sharing) -> None:
        number, loop = id(generation), self._loop()
        with suppress(RuntimeError):  # the loop has been closed
            if loop is not None and number in self._queues:
                loop.call_soon_threadsafe(loop.call_later, LEAVE_SECONDS, self._hand_out, [(number, _LEFT)])

    def _hand_out(self, waiting: list[tuple[int, Batch]]) -> None:
        for number, batch in waiting:
            if queue := self._queues.get(number):
                queue.put_nowait(batch)


_sinks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopSink] = weakref.WeakKeyDictionary()


def loop_sink() -> LoopSink:
    """That of the running event loop."""
    loop = asyncio.get_running_loop()
    if loop not in _sinks:
        _sinks[loop] = LoopSink(loop)
    return _sinks[loop]


async def batches(generation: Sharing) -> AsyncIterator[list[Piece]]:
    """The pieces of a generation, those of one step together.

    One that the scheduler cannot compute (with `on_full`, or a draft) is read by a thread, a piece at a time.
    """
    if not generation._can_share:
        async for piece in _from_thread(generation):
            yield [piece]
        return
    sink = loop_sink()
    queue = sink.queue(generation)
    try:
        generation.start(sink)
        if generation.cancelled:  # before it had begun: nobody was told then
            sink.hurry(generation)
        while True:
            batch = pieces, error, over = await queue.get()
            if batch is _LEFT:
                if not generation.cancelled or generation._task is None:
                    continue  # meant for one that has gone, and that lay at the same address
                generation._task.leave(generation)
            if pieces:
                yield pieces
            if error is not None:
                raise error
            if over:
                return
    finally:
        if generation.stop_reason is None:
            generation.cancel()
        sink.forget(generation)


async def _from_thread(generation: Sharing) -> AsyncIterator[Piece]:
    loop = asyncio.get_running_loop()
    try:
        while (piece := await loop.run_in_executor(None, next, generation, None)) is not None:
            yield piece
    finally:
        if generation.stop_reason is None:
            generation.cancel()


async def pieces(generation: Sharing) -> AsyncIterator[Piece]:
    """The same one by one."""
    async for some in batches(generation):
        for piece in some:
            yield piece
