"""From requests to pieces: who has a turn, several choices side by side, and what is counted."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

from qrun.engine.generation.asynchronous import batches
from qrun.server.errors import unavailable
from qrun.server.metrics import Metrics

if TYPE_CHECKING:
    from qrun.engine import Generation, Piece


class Turns:
    """Lets so many requests run at a time, in the order in which they came."""

    def __init__(self, parallel: int, max_queue: int) -> None:
        self._parallel, self._max_queue = parallel, max_queue
        self.running = 0
        self._queue: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[Place]:
        """A place in the queue, or a turn at once. APIError (503) where the queue is full."""
        place = Place(self)
        if self.running < self._parallel:
            self.running += 1
            place.has_turn = True
        elif len(self._queue) >= self._max_queue:
            raise unavailable(f"the server is busy: {len(self._queue)} requests wait already")
        else:
            place.future = asyncio.get_running_loop().create_future()
            self._queue.append(place.future)
        try:
            yield place
        finally:
            self._leave(place)

    def _leave(self, place: Place) -> None:
        future = place.future
        if future is not None and future in self._queue:
            self._queue.remove(future)
        elif place.has_turn or (future is not None and future.done()):
            self.running -= 1
            while self._queue and self.running < self._parallel:
                self.running += 1
                self._queue.popleft().set_result(None)


class Place:
    """One of those who wait or run."""

    def __init__(self, turns: Turns) -> None:
        self.has_turn = False
        self.future: asyncio.Future[None] | None = None

    async def turn(self) -> None:
        """Wait for it."""
        if self.future is not None:
            await asyncio.shield(self.future)
            self.has_turn = True


Steps = AsyncIterator[tuple[int, "list[Piece]"]]


async def steps(generations: Sequence[Generation]) -> Steps:
    """The pieces of several generations, those of one step together, each with the generation's number."""
    if len(generations) == 1:
        async with aclosing(batches(generations[0])) as found:  # type: ignore[type-var]
            async for pieces in found:
                yield 0, pieces
        return
    queue: asyncio.Queue[tuple[int, list[Piece] | None, BaseException | None]] = asyncio.Queue()

    async def forward(number: int, generation: Generation) -> None:
        try:
            async with aclosing(batches(generation)) as found:  # type: ignore[type-var]
                async for pieces in found:
                    queue.put_nowait((number, pieces, None))
            queue.put_nowait((number, None, None))
        except Exception as error:
            queue.put_nowait((number, None, error))

    tasks = [asyncio.create_task(forward(number, one)) for number, one in enumerate(generations)]
    left = len(tasks)
    try:
        while left:
            number, some, error = await queue.get()
            if error is not None:
                raise error
            if some is None:
                left -= 1
            else:
                yield number, some
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def counted(generations: Sequence[Generation], place: Place, metrics: Metrics, arrived: float) -> Steps:
    """The same when its turn has come, with figures for the metrics. APIError where something else has ended one."""
    await place.turn()
    begun = time.perf_counter()
    metrics.observe("request_queue_time_seconds", begun - arrived)
    first = last = 0.0
    over = False
    try:
        async with aclosing(steps(generations)) as found:  # type: ignore[type-var]
            async for number, pieces in found:
                now = time.perf_counter()
                if not first:
                    first = now
                    metrics.observe("time_to_first_token_seconds", now - arrived)
                else:
                    metrics.observe("inter_token_latency_seconds", (now - last) / len(pieces), len(pieces))
                last = now
                yield number, pieces
        if any(generation.stop_reason == "cancelled" for generation in generations):
            raise unavailable("the answer was interrupted: the model is being unloaded")
        over = True
    finally:
        now = time.perf_counter()
        metrics.observe("e2e_request_latency_seconds", now - arrived)
        if first:
            metrics.observe("request_prefill_time_seconds", first - begun)
            metrics.observe("request_decode_time_seconds", now - first)
        for generation in generations:
            stats = generation.stats
            reason = finish_reason(generation) if over else "abort"
            metrics.finished[reason] += 1
            metrics.generation_tokens += len(generation.tokens)
            if first:
                metrics.prompt_tokens += stats.prompt_tokens
                metrics.prefix_queries += stats.prompt_tokens
                metrics.prefix_hits += stats.cached_tokens
                metrics.observe("request_prompt_tokens", stats.prompt_tokens)
            metrics.observe("request_generation_tokens", len(generation.tokens))


def finish_reason(generation: Generation) -> str:
    """Why an answer has ended, as OpenAI's interface says it."""
    if generation.stop_reason in ("length", "context"):
        return "length"
    return "tool_calls" if generation.tool_calls else "stop"
