"""What all endpoints share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from qrun.engine import __version__
from qrun.server.exchange import Exchange, in_parts
from qrun.server.hub import Entry, Hub
from qrun.server.metrics import Metrics
from qrun.server.running import Place, Steps, Turns, counted
from qrun.server.settings import Settings
from qrun.server.stored import StoredResponses

if TYPE_CHECKING:
    from qrun.engine import Generation

T = TypeVar("T")

FINGERPRINT = f"qrun-{__version__}"


class State:
    """texts: threads that tokenise and render templates, so that the event loop need not."""

    def __init__(self, hub: Hub, settings: Settings, texts: ThreadPoolExecutor) -> None:
        self.hub = hub
        self.settings = settings
        self.texts = texts
        self.metrics = Metrics()
        self.turns = Turns(settings.parallel, settings.max_queue)
        self.responses = StoredResponses(settings.stored_bytes)

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """What a function returns that takes a while."""
        return await asyncio.get_running_loop().run_in_executor(self.texts, function, *arguments)

    async def answer(self, exchange: Exchange, make: Callable[[], Any]) -> None:
        """Answer with the JSON of what a function returns that has many items, both made in another thread."""
        body = await self.in_thread(lambda: in_parts(make()).encode())
        await exchange.raw(body, "application/json")

    @asynccontextmanager
    async def begin(
        self, model: Any, make: Callable[[Any, dict[str, Any]], list[Generation]], *, lenient: bool = False
    ) -> AsyncIterator[tuple[Entry, list[Generation], Place]]:
        """The model of this name, generations made with it in another thread, and a place in the queue: all that can
        go wrong before an answer begins does so here. Where the name is an adapter's, `make` gets the option for it."""
        async with self.hub.use(model, lenient=lenient) as entry:
            adapter = entry.adapter_of(model)
            generations = await self.in_thread(make, entry.loaded, {} if adapter is None else {"lora": adapter.name})
            try:
                async with self.turns.place() as place:
                    yield entry, generations, place
            finally:
                for generation in generations:
                    if generation.stop_reason is None:
                        generation.cancel()

    def steps(self, generations: Sequence[Generation], place: Place, arrived: float) -> Steps:
        """The pieces, step by step: see `counted`."""
        return counted(generations, place, self.metrics, arrived)


def prompt_progress(generation: Generation, arrived: float) -> dict[str, Any]:
    """How far a prompt has been read, as llama.cpp's server says it. arrived: by the clock of `time.perf_counter`."""
    done, total = generation.prompt_progress
    return {
        "total": total,
        "cache": generation.stats.cached_tokens,
        "processed": done,
        "time_ms": round((time.perf_counter() - arrived) * 1e3),
    }


def timings(generation: Generation) -> dict[str, Any]:
    """What llama-server says of how long an answer took."""
    stats = generation.stats
    evaluated = stats.prompt_tokens - stats.cached_tokens
    generated = len(generation.tokens)
    return {
        "cache_n": stats.cached_tokens,
        "prompt_n": evaluated,
        "prompt_ms": round(stats.prompt_seconds * 1e3, 3),
        "prompt_per_token_ms": round(stats.prompt_seconds * 1e3 / max(evaluated, 1), 3),
        "prompt_per_second": round(stats.prompt_tokens_per_second, 3),
        "predicted_n": generated,
        "predicted_ms": round(stats.generate_seconds * 1e3, 3),
        "predicted_per_token_ms": round(stats.generate_seconds * 1e3 / max(generated, 1), 3),
        "predicted_per_second": round(stats.generated_tokens_per_second, 3),
    }


def usage(generations: Sequence[Generation]) -> dict[str, Any]:
    """What OpenAI's interface says of how much a request took; the prompt counts once."""
    first = generations[0].stats
    completion = sum(len(generation.tokens) for generation in generations)
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": first.prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": min(one.stats.cached_tokens for one in generations)},
        "completion_tokens_details": {"reasoning_tokens": sum(one.stats.reasoning_tokens for one in generations)},
    }
