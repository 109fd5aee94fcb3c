"""Generations that share steps: the same texts as alone, whoever comes, goes, or waits."""

import asyncio
import gc
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qrun.engine import Model, Session, keep_newest
from qrun.engine.generation import asynchronous
from qrun.engine.generation import scheduler as scheduler_module
from qrun.engine.generation.generation import Generation
from qrun.engine.generation.piece import Piece
from qrun.engine.program import background

PATH = Path(__file__).parents[1] / "data" / "arch" / "llama-dense.gguf"


@pytest.fixture
def model() -> Iterator[Model]:
    with Model.load(PATH, threads=2, context=256, batch=64) as model:
        yield model


def prompts(rng: np.random.Generator, model: Model, count: int, longest: int = 120) -> list[list[int]]:
    """Random ones, some of which begin alike."""
    begin = rng.integers(0, model.graph.n_vocab, longest)
    found = []
    for _ in range(count):
        alike, own = rng.integers(0, longest // 2, 2)
        found.append([*begin[:alike].tolist(), *rng.integers(0, model.graph.n_vocab, own + 1).tolist()])
    return found


def alone(prompt: list[int], **options: Any) -> list[int]:
    """What a model that does nothing else makes of a prompt."""
    with Model.load(PATH, threads=1, context=256) as other:
        generation = other.generate(prompt, **options)
        list(generation)
        return generation.tokens


class Collector:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.pieces: dict[int, list[Piece]] = {}
        self.errors: list[BaseException] = []
        self.ended = threading.Semaphore(0)
        self.flushes = 0

    def put(self, generation: Any, pieces: list[Piece], error: BaseException | None) -> None:
        self.pieces.setdefault(id(generation), []).extend(pieces)
        if error is not None:
            self.errors.append(error)
        if generation.stop_reason is not None or error is not None:
            self.ended.release()

    def flush(self) -> None:
        self.flushes += 1

    def hurry(self, generation: Any) -> None:
        pass


def run_threads(model: Model, jobs: list[tuple[list[int], dict[str, Any]]]) -> list[list[int]]:
    """Each job in a thread of its own."""
    results: list[list[int]] = [[] for _ in jobs]

    def run(i: int) -> None:
        prompt, options = jobs[i]
        generation = model.generate(prompt, **options)
        list(generation)
        results[i] = generation.tokens

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_get_the_same_texts_as_alone(model: Model, rng: np.random.Generator) -> None:
    jobs = [
        (prompt, {"temperature": float(i % 2), "seed": i, "max_tokens": 20 + i, "lookup": i % 3 == 0})
        for i, prompt in enumerate(prompts(rng, model, 9))
    ]
    assert run_threads(model, jobs) == [alone(prompt, **options) for prompt, options in jobs]
    wait_for_the_thread_to_end(model)


def until(reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def wait_for_the_thread_to_end(model: Model) -> None:
    scheduler = model._host.scheduler
    until(lambda: scheduler._thread is None)
    assert scheduler._thread is None and (scheduler.running, scheduler.waiting) == (0, 0)


@pytest.mark.parametrize("long", [False, True])
def test_a_hundred_random_schedules(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, long: bool) -> None:
    """Requests that come at any time, go on or are cancelled, in threads and pushed: each text is a beginning of what
    it is alone, and all of it where nobody cancelled. long: most prompts count as long."""
    if long:
        monkeypatch.setattr(scheduler_module, "LONG_PROMPT", 10)
        monkeypatch.setattr(background, "PIECE_SECONDS", 0.0)
    with Model.load(PATH, threads=2, context=256, batch=32) as model:
        jobs = [
            (prompt, {"temperature": 0.8, "seed": int(rng.integers(1000)), "max_tokens": int(rng.integers(1, 30))})
            for prompt in prompts(rng, model, 12, longest=80)
        ]
        expected = [alone(prompt, **options) for prompt, options in jobs]
        for _ in range(50):
            chosen = rng.integers(0, len(jobs), rng.integers(1, 7)).tolist()
            collector = Collector()
            pushed: list[tuple[int, Generation, bool]] = []
            for i in chosen:
                generation = model.generate(jobs[i][0], **jobs[i][1])
                generation.start(collector)
                pushed.append((i, generation, bool(rng.random() < 0.2)))
                time.sleep(float(rng.choice([0.0, 0.0, 0.002])))
                if pushed[-1][2]:
                    generation.cancel()
            for _ in pushed:
                assert collector.ended.acquire(timeout=60)
            for i, generation, cancelled in pushed:
                assert generation.tokens == expected[i][: len(generation.tokens)]
                assert cancelled or generation.tokens == expected[i]
        assert not collector.errors


def test_pieces_of_a_step_come_together(
    model: Model, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector, all_there, step = Collector(), threading.Event(), model._runtime.step

    def waiting(*arguments: Any) -> Any:
        assert all_there.wait(60)
        return step(*arguments)

    monkeypatch.setattr(model._runtime, "step", waiting)
    generations = [model.generate(prompt, max_tokens=25, temperature=0) for prompt in prompts(rng, model, 4)]
    for generation in generations:
        generation.start(collector)
    all_there.set()
    for _ in generations:
        assert collector.ended.acquire(timeout=60)
    assert [len(collector.pieces[id(generation)]) for generation in generations] == [25] * 4
    assert collector.flushes < 60
    assert all(generation.stop_reason == "length" for generation in generations)


def test_what_was_pushed_goes_without_the_collector_of_garbage(model: Model, rng: np.random.Generator) -> None:
    over = threading.Event()

    class Sink:
        def put(self, generation: Any, pieces: Any, error: Any) -> None:
            if generation.stop_reason is not None:
                over.set()

        def flush(self) -> None: ...

    gc.collect()
    gc.disable()
    try:
        generation = model.generate(
            prompts(rng, model, 1)[0], max_tokens=5, frequency_penalty=0.5, dry_multiplier=0.8, xtc_probability=0.5
        )
        generation.start(Sink())
        assert over.wait(60)
        sampler, gone = weakref.ref(generation._sampler), weakref.ref(generation)
        del generation
        deadline = time.monotonic() + 60
        while (sampler() or gone()) and time.monotonic() < deadline:
            time.sleep(0.01)  # the thread that has computed it lets go of it last
        assert gone() is None and sampler() is None
    finally:
        gc.enable()


def test_in_asyncio(model: Model, rng: np.random.Generator) -> None:
    asked = prompts(rng, model, 5)

    async def one(prompt: list[int]) -> list[int]:
        generation = model.generate(prompt, max_tokens=20, temperature=0)
        async for _ in generation:
            pass
        return generation.tokens

    async def cancelled() -> Generation:
        generation = model.generate(asked[0], max_tokens=150, temperature=0)

        begun = asyncio.Event()

        async def read() -> None:
            async for _ in generation:
                begun.set()
                await asyncio.sleep(60)

        task = asyncio.create_task(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return generation

    async def all_of_them() -> tuple[Any, ...]:
        return await asyncio.gather(cancelled(), *(one(prompt) for prompt in asked))

    gone, *results = asyncio.run(all_of_them())
    assert results == [alone(prompt, max_tokens=20, temperature=0) for prompt in asked]
    assert gone.cancelled or len(gone.tokens) == 150  # it may have been computed to its end meanwhile
    wait_for_the_thread_to_end(model)


def test_in_asyncio_with_what_cannot_be_shared(rng: np.random.Generator) -> None:
    """A thread reads then, while the loop goes on; the texts are the same."""
    with Model.load(PATH, threads=1, context=64, draft=PATH) as model:
        prompt = rng.integers(0, model.graph.n_vocab, 20).tolist()
        options: list[dict[str, Any]] = [{}, {"draft": False, "on_full": keep_newest()}, {"draft": False}]
        expected = ["".join(model.generate(prompt, max_tokens=80, temperature=0, **one)) for one in options]

        async def text(options: dict[str, Any]) -> str:
            return "".join([piece async for piece in model.generate(prompt, max_tokens=80, temperature=0, **options)])

        async def stopped() -> Generation:
            generation = model.generate(prompt, max_tokens=10_000, temperature=0, on_full=keep_newest())
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    async for _ in generation:
                        pass
            return generation

        async def all_of_them() -> list[Any]:
            return await asyncio.gather(*map(text, options), stopped())

        *texts, gone = asyncio.run(all_of_them())
        assert texts == expected
        assert gone.cancelled


def test_a_beginning_is_read_once_though_all_come_together(rng: np.random.Generator) -> None:
    with Model.load(PATH, threads=1, context=256, batch=64) as model:
        begin = rng.integers(0, model.graph.n_vocab, 150).tolist()
        generations = [model.generate([*begin, i, i + 1, i + 2], max_tokens=4, temperature=0) for i in range(8)]
        collector = Collector()
        for generation in generations:
            generation.start(collector)
        for _ in generations:
            assert collector.ended.acquire(timeout=60)
        computed = sum(g.stats.prompt_tokens - g.stats.cached_tokens for g in generations)
        assert computed <= 153 + 7 * 3
        for i, generation in enumerate(generations):
            assert generation.tokens == alone([*begin, i, i + 1, i + 2], max_tokens=4, temperature=0)


class TestPromptsBesideOthers:
    """How many rows of prompts a step has, where a row takes a millisecond and a step without any ten; and for how long
    a long prompt is read between steps."""

    @pytest.fixture
    def model(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
        with Model.load(PATH, threads=1, context=4096) as model:
            scheduler = model._host.scheduler
            monkeypatch.setattr(scheduler, "_learn", lambda *_: None)
            scheduler._row_seconds = 0.001
            self.takes(model, 0.01)
            yield model

    def takes(self, model: Model, *seconds: float) -> None:
        """Steps without prompts have taken so long, whoever generated."""
        model._host.scheduler._decode_times = {n: deque(seconds * 3) for n in range(1, 9)}

    def bearable(self, model: Model, gone: float, n_generating: int, n_prompts: int) -> float:
        """What may be read of a long prompt so many seconds after the last step's end."""
        scheduler = model._host.scheduler
        scheduler._last_end = 0.0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scheduler_module, "time", SimpleNamespace(perf_counter=lambda: gone))
            return scheduler._bearable(n_generating, n_prompts)

    def read(
        self, model: Model, monkeypatch: pytest.MonkeyPatch, running: int, lengths: list[int]
    ) -> tuple[list[list[int]], list[int]]:
        """Prompts of these lengths come at once while others generate: the rows that steps have of each, and the
        batches that were computed in the background."""
        rows: list[list[int]] = []
        batches: list[int] = []
        held, all_there = threading.Event(), threading.Event()
        step, begin = model._runtime.step, model._runtime.begin_in_background

        def noted(parts: Any, cancelled: Any = None) -> Any:
            held.set()
            assert all_there.wait(60)
            rows.append([len(part.tokens) for part in parts if len(part.tokens) > 1])
            return step(parts, cancelled)

        def noted_behind(part: Any) -> Any:
            batches.append(len(batch := begin(part)))
            return batch

        rng = np.random.default_rng(5)
        collector = Collector()
        others = [model.generate([i], max_tokens=3000, temperature=0) for i in range(running)]
        for other in others:
            other.start(collector)
        until(lambda: all(other.tokens for other in others))
        monkeypatch.setattr(model._runtime, "step", noted)
        monkeypatch.setattr(model._runtime, "begin_in_background", noted_behind)
        assert held.wait(60)
        asked = [rng.integers(0, model.graph.n_vocab, n).tolist() for n in lengths]
        answers = [model.generate(prompt, max_tokens=3, temperature=0) for prompt in asked]
        for answer in answers:
            answer.start(collector)
        until(lambda: not any(answer._task is not None and answer._task.fetching for answer in answers))
        all_there.set()
        for _ in lengths:
            assert collector.ended.acquire(timeout=60)
        for other in others:
            other.cancel()
        monkeypatch.undo()
        assert [one.tokens for one in answers] == [long_alone(prompt) for prompt in asked]
        return [step for step in rows if step], batches

    def test_a_long_one_is_read_between_steps(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.read(model, monkeypatch, 3, [1500]) == ([], [128] * 11 + [92])

    def test_two_are_read_one_after_the_other(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.read(model, monkeypatch, 3, [1100, 1100]) == ([], ([128] * 8 + [76]) * 2)

    def test_a_short_one_takes_a_tenth_of_a_second(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.read(model, monkeypatch, 3, [500]) == ([[96]] * 5 + [[20]], [])

    def test_and_as_long_as_others_take_without_it(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.takes(model, 0.3)
        assert self.read(model, monkeypatch, 3, [500]) == ([[296], [204]], [])

    def test_they_take_longer_while_as_many_wait_as_generate(
        self, model: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows, _ = self.read(model, monkeypatch, 2, [400, 400])
        assert rows == [[296], [104, 192], [96], [96], [16]]

    def test_short_ones_go_before_a_long_one(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        rows, batches = self.read(model, monkeypatch, 4, [1500, 60, 60])
        assert (rows, batches) == ([[60, 36], [24]], [128] * 11 + [92])

    def test_it_takes_nearly_as_long_as_a_step(self, model: Model) -> None:
        self.takes(model, 0.02)
        for seconds, left in ((0.021, 0.015), (0.03, 0.006), (0.0, 0.036), (0.1, 0.0048)):
            assert self.bearable(model, seconds, 3, 1) == pytest.approx(left)

    def test_the_more_wait_the_longer_it_takes(self, model: Model) -> None:
        self.takes(model, 0.02)
        for generating, waiting, left in ((7, 1, 0.016), (8, 8, 0.02), (4, 8, 0.04), (1, 8, 0.16), (1, 99, 0.3)):
            assert self.bearable(model, 0.02, generating, waiting) == pytest.approx(left)

    def test_where_most_steps_are_slow_it_is_not_taken_from_it(self, model: Model) -> None:
        self.takes(model, 0.02)
        for slow, left in ((0.026, 0.016), (0.1, 0.0048)):
            for _ in range(8):
                found = self.bearable(model, slow, 3, 1)
            assert found == pytest.approx(left)
        assert self.bearable(model, 0.04, 3, 1) == pytest.approx(0.006)

    def test_a_step_that_was_disturbed_does_not_make_it_longer(self, model: Model) -> None:
        self.takes(model, 0.02, 0.02, 0.02, 0.09, 0.09)  # a request came, say, and its text was made tokens of
        assert self.bearable(model, 0.02, 3, 1) == pytest.approx(0.016)

    def test_nor_is_it_more_than_a_tenth_of_a_second_or_three_where_many_wait(self, model: Model) -> None:
        self.takes(model, 1.0)
        assert self.bearable(model, 1.0, 2, 1) == 0.1
        assert self.bearable(model, 1.0, 1, 1) == 0.3

    def test_and_always_some_milliseconds(self, model: Model) -> None:
        self.takes(model, 0.003)
        assert self.bearable(model, 0.003, 1, 1) == pytest.approx(0.01)

    def test_it_is_short_while_nothing_is_known(self, model: Model) -> None:
        model._host.scheduler._decode_times.clear()
        assert self.bearable(model, 0.02, 3, 1) == pytest.approx(0.003)

    def test_it_is_read_to_its_end_when_nobody_generates_any_more(
        self, model: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        collector, scheduler = Collector(), model._host.scheduler
        other, prompt = model.generate([1], max_tokens=3000), [i % 50 for i in range(3000)]
        monkeypatch.setattr(scheduler, "_bearable", lambda n_generating, n_prompts: 0.0)
        other.start(collector)
        until(lambda: other.tokens)
        answer = model.generate(prompt, max_tokens=3, temperature=0)
        answer.start(collector)
        until(lambda: answer._task is not None and answer._task.batch is not None)
        other.cancel()
        for _ in range(2):
            assert collector.ended.acquire(timeout=60)
        assert answer.tokens == long_alone(prompt)

    def test_who_cancels_while_it_is_read_leaves_nothing_behind(
        self, model: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        collector = Collector()
        other, prompt = model.generate([1], max_tokens=3000), [i % 50 for i in range(3000)]
        other.start(collector)
        until(lambda: other.tokens)
        with model.session() as session:
            first = session.generate(prompt, max_tokens=3, temperature=0)
            first.start(collector)
            until(lambda: first._task is not None and first._task.batch is not None)
            second = session.generate(prompt[:2000], max_tokens=3, temperature=0)  # which ends the first
            assert len(list(second)) == 3 and first.stop_reason == "cancelled"
            assert second.tokens == long_alone(prompt[:2000])
        other.cancel()
        for _ in range(2):
            assert collector.ended.acquire(timeout=60)
        wait_for_the_thread_to_end(model)

    def test_what_is_wrong_with_it_is_told_to_whoever_asked(
        self, model: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(part: Any) -> Any:
            raise RuntimeError("no memory")

        monkeypatch.setattr(model._runtime, "begin_in_background", fail)
        collector = Collector()
        other = model.generate([1], max_tokens=400, temperature=0)
        other.start(collector)
        until(lambda: other.tokens)
        model.generate([i % 50 for i in range(3000)], max_tokens=3).start(collector)
        for _ in range(2):
            assert collector.ended.acquire(timeout=60)
        assert [str(error) for error in collector.errors] == ["no memory"] and len(other.tokens) == 400


def long_alone(prompt: list[int]) -> list[int]:
    """Three tokens that follow a long prompt, in a model that does nothing else."""
    with Model.load(PATH, threads=1, context=4096) as other:
        generation = other.generate(prompt, max_tokens=3, temperature=0)
        list(generation)
        return generation.tokens


def test_what_rows_take_is_learned_from_long_prompts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a server that is only asked long questions would read them eight rows at a time beside others."""
    with Model.load(PATH, threads=1, context=4096) as model:
        scheduler, collector, step = model._host.scheduler, Collector(), model._runtime.step
        deep: list[float] = []

        def noted(parts: Any, cancelled: Any = None) -> Any:
            deep.append(scheduler._row_seconds)
            return step(parts, cancelled)

        monkeypatch.setattr(model._runtime, "step", noted)
        model.generate([i % 50 for i in range(3000)], max_tokens=1).start(collector)
        assert collector.ended.acquire(timeout=60)
        # The first 1,024 are as those of any prompt; deeper in a text rows take longer.
        assert deep[0] == 0.0 < deep[1] and deep[1] != deep[2] == deep[-1] == scheduler._row_seconds


def test_who_drops_a_generation_holds_nobody_up(model: Model, rng: np.random.Generator) -> None:
    first, second, third = (model.generate(p, max_tokens=60, temperature=0) for p in prompts(rng, model, 3))
    next(first), next(second)
    del first
    gc.collect()
    next(third)
    assert len(list(second)) == 59
    third.cancel()
    assert list(third) == [] and third.stop_reason == "cancelled"
    del second, third
    wait_for_the_thread_to_end(model)


def test_who_cancels_does_not_wait_for_a_long_step(
    model: Model, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prompts(rng, model, 3)
    first, *others = (model.generate(prompt, max_tokens=40, temperature=0) for prompt in asked)
    collector, steps = Collector(), model._runtime.step
    gate, under_way = threading.Event(), threading.Event()

    def long_step(*arguments: Any) -> Any:
        until(lambda: first._task is not None)  # or the others would be done before it comes
        if first.tokens:
            under_way.set()
            assert gate.wait(60)
        return steps(*arguments)

    monkeypatch.setattr(model._runtime, "step", long_step)
    for other in others:
        other.start(collector)
    next(first)
    rest: list[Piece] = []
    over = threading.Event()
    session = first.session
    assert isinstance(session, Session)

    def read() -> None:
        rest.extend(first)
        over.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert under_way.wait(60)
    first.cancel()
    assert over.wait(60)  # while the step goes on
    assert first.stop_reason == "cancelled" and not session.closed  # its cache is at work
    n_tokens = len(first.tokens)
    gate.set()
    for _ in others:
        assert collector.ended.acquire(timeout=60)
    reader.join()
    assert [one.tokens for one in others] == [alone(prompt, max_tokens=40, temperature=0) for prompt in asked[1:]]
    wait_for_the_thread_to_end(model)
    assert session.closed and len(first.tokens) == n_tokens and list(first) == []


def test_who_is_not_cancelled_is_not_meant(model: Model, rng: np.random.Generator) -> None:
    """A sink knows generations by their addresses, and these are used again."""
    (prompt,) = prompts(rng, model, 1)
    generation = model.generate(prompt, max_tokens=40, temperature=0)

    async def read() -> int:
        count = 0
        async for _ in generation:
            asynchronous.loop_sink().hurry(generation)
            count += 1
            await asyncio.sleep(0.01)
        return count

    assert asyncio.run(read()) == 40 and generation.stop_reason == "length"


def test_nor_does_who_reads_in_asyncio(model: Model, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = (model.generate(prompt, max_tokens=40, temperature=0) for prompt in prompts(rng, model, 2))
    collector, steps = Collector(), model._runtime.step
    other.start(collector)
    gate, under_way = threading.Event(), threading.Event()

    def long_step(*arguments: Any) -> Any:
        if first.tokens:
            under_way.set()
            assert gate.wait(60)
        return steps(*arguments)

    monkeypatch.setattr(model._runtime, "step", long_step)

    async def read() -> list[Piece]:
        return [piece async for piece in first]

    async def cancelled() -> list[Piece]:
        reading = asyncio.create_task(read())
        await asyncio.to_thread(under_way.wait, 60)
        first.cancel()
        return await asyncio.wait_for(reading, 30)  # while the step goes on

    pieces = asyncio.run(cancelled())
    assert not gate.is_set() and first.stop_reason == "cancelled"
    assert len(pieces) == len(first.tokens) < 40
    gate.set()
    assert collector.ended.acquire(timeout=60) and len(other.tokens) == 40
    wait_for_the_thread_to_end(model)
    assert len(pieces) == len(first.tokens)


def test_nor_does_who_was_cancelled_before_it_began(
    model: Model, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = (model.generate(prompt, max_tokens=4, temperature=0) for prompt in prompts(rng, model, 2))
    collector, step = Collector(), model._runtime.step
    gate, under_way = threading.Event(), threading.Event()

    def long_step(*arguments: Any) -> Any:
        under_way.set()
        assert gate.wait(60)
        return step(*arguments)

    monkeypatch.setattr(model._runtime, "step", long_step)
    other.start(collector)
    assert under_way.wait(60)
    first.cancel()

    async def read() -> list[Piece]:
        return [piece async for piece in first]

    assert asyncio.run(asyncio.wait_for(read(), 30)) == [] and first.stop_reason == "cancelled"
    gate.set()
    assert collector.ended.acquire(timeout=60) and len(other.tokens) == 4
    wait_for_the_thread_to_end(model)


def test_who_was_cancelled_hears_of_it_before_the_next_step(
    model: Model, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (model.generate(prompt, max_tokens=40, temperature=0) for prompt in prompts(rng, model, 2))
    collector, step = Collector(), model._runtime.step
    reasons: list[str | None] = []

    def cancelling(*arguments: Any) -> Any:
        reasons.append(second.stop_reason)
        if len(reasons) == 10:  # it comes while this step is computed, and goes
            second.start(collector)
            second.cancel()
        return step(*arguments)

    monkeypatch.setattr(model._runtime, "step", cancelling)
    first.start(collector)
    for _ in range(2):
        assert collector.ended.acquire(timeout=60)
    assert reasons[:11] == [None] * 10 + ["cancelled"]


def test_more_than_the_cache_holds_is_computed_again_to_the_same_bits(rng: np.random.Generator) -> None:
    with Model.load(PATH, threads=1, context=256) as model:
        page = model._runtime.context_bytes // 4  # of 64 positions
    with Model.load(PATH, threads=1, context=256, batch=64, cache_bytes=5 * page) as model:
        jobs = [
            (prompt, {"temperature": 0.0, "max_tokens": 90})
            for prompt in rng.integers(0, model.graph.n_vocab, (6, 60)).tolist()
        ]
        collector = Collector()
        generations = [model.generate(prompt, **options) for prompt, options in jobs]
        for generation in generations:
            generation.start(collector)
        most = 0
        for _ in generations:
            while not collector.ended.acquire(timeout=0.002):
                most = max(most, model._runtime.cache_bytes)
        assert [generation.tokens for generation in generations] == [alone(p, **o) for p, o in jobs]
        assert most <= 8 * page
        for stats in (generation.stats for generation in generations):  # of the first time that they were read
            assert stats.cached_tokens < stats.prompt_tokens
            assert stats.prompt_seconds == stats.first_token_seconds


def test_what_ended_is_forgotten_when_there_is_no_room(rng: np.random.Generator) -> None:
    with Model.load(PATH, threads=1, context=256) as model:
        page = model._runtime.context_bytes // 4
    with Model.load(PATH, threads=1, context=256, cache_bytes=6 * page) as model:
        for prompt in rng.integers(0, model.graph.n_vocab, (20, 100)).tolist():
            model.complete(prompt, max_tokens=1)
        assert model._runtime.cache_bytes <= 8 * page


def test_an_error_of_one_is_not_that_of_others(model: Model, rng: np.random.Generator) -> None:
    first, second = (model.generate(prompt, max_tokens=10, temperature=0) for prompt in prompts(rng, model, 2))

    def fail(logits: np.ndarray, *_: Any, **__: Any) -> Any:
        raise ValueError("the model's logits are not finite numbers")

    first._sampler.sample = fail  # type: ignore[method-assign]
    collector = Collector()
    first.start(collector)
    second.start(collector)
    assert collector.ended.acquire(timeout=60) and collector.ended.acquire(timeout=60)
    assert [str(error) for error in collector.errors] == ["the model's logits are not finite numbers"]
    assert second.stop_reason == "length"


@pytest.mark.parametrize("method", ["_next_rows", "begin"])
def test_an_error_before_the_step_is_that_of_one_too(model: Model, rng: np.random.Generator, method: str) -> None:
    first, second, third = (model.generate(prompt, max_tokens=10, temperature=0) for prompt in prompts(rng, model, 3))

    def fail(*_: Any) -> Any:
        raise RuntimeError("no plan")

    setattr(second if method == "_next_rows" else second._cache, method, fail)
    collector = Collector()
    for generation in (first, second, third):
        generation.start(collector)
    for _ in range(3):
        assert collector.ended.acquire(timeout=60)
    assert [str(error) for error in collector.errors] == ["no plan"]
    assert (first.stop_reason, third.stop_reason) == ("length", "length")


def test_a_cache_that_a_fork_left_half_changed_fails_its_own_generation_alone(
    model: Model, rng: np.random.Generator
) -> None:
    first, second, third = (model.generate(prompt, max_tokens=10, temperature=0) for prompt in prompts(rng, model, 3))
    first._cache.lock.abandoned = True  # as it is in the child
    collector = Collector()
    for generation in (first, second, third):
        generation.start(collector)
    for _ in range(3):
        assert collector.ended.acquire(timeout=60)
    assert [str(error) for error in collector.errors] == [
        "this session was in use by another thread when the process forked: begin another"
    ]
    assert (second.stop_reason, third.stop_reason) == ("length", "length")
    first._cache.lock.abandoned = False
    assert second._cache.lock.acquire(blocking=False)  # no lock was left behind
    second._cache.lock.release()


def test_event_loops_are_not_kept(model: Model) -> None:
    async def two() -> None:
        async def one() -> None:
            async for _ in model.generate([1, 2, 3], max_tokens=5):
                pass

        await asyncio.gather(one(), one())

    for _ in range(3):
        asyncio.run(two())
    deadline = time.monotonic() + 60
    while len(asynchronous._sinks) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert len(asynchronous._sinks) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is not there on this system")
def test_a_fork_while_another_thread_looks_for_a_beginning(model: Model) -> None:
    model.complete([1, 2, 3], max_tokens=2)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with model._host.prefixes._lock, model._host.scheduler.lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    child = os.fork()
    if not child:
        threading.Timer(20.0, os._exit, (1,)).start()
        model.session()
        os._exit(0 if model.activity.running == 0 else 2)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_cannot_be_pushed_is_refused(model: Model) -> None:
    generation = model.generate([1, 2, 3], max_tokens=3, on_full=lambda tokens: None)
    with pytest.raises(ValueError, match="only be computed by the thread"):
        generation.start(Collector())
    begun = model.generate([1, 2, 3], max_tokens=3)
    next(begun)
    with pytest.raises(ValueError, match="has begun"):
        begun.start(Collector())


@pytest.mark.parametrize("shared", [False, True])
def test_what_was_held_of_a_prompt_is_known_before_the_rest_is_read(
    model: Model, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    prompt = rng.integers(0, model.graph.n_vocab, 200).tolist()
    list(model.generate(prompt[:100], max_tokens=1))
    told: list[int] = []
    run = model._runtime._run

    def watched(*arguments: Any, **more: Any) -> Any:
        told.append(generation.stats.cached_tokens)
        return run(*arguments, **more)

    monkeypatch.setattr(model._runtime, "_run", watched)
    generation = model.generate(prompt, max_tokens=1)
    if shared:
        sink = Collector()
        generation.start(sink)
        assert sink.ended.acquire(timeout=30)
    else:
        list(generation)
    assert len(told) >= 2 and set(told) == {100} and generation.stats.cached_tokens == 100
