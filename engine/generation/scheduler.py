"""One step for many: the rows of all generations under way are computed together.

A generation that is alone computes for itself, in the thread that asks for its pieces. As soon as there are several, a
thread of the scheduler's takes over. Each of its steps has a row (or guesses) of every generation that has read its
prompt, and then rows of prompts, as many as the time allows that the others can wait. That is long for short prompts,
which are soon over: what is read sooner is generated together. A long prompt is read between steps, a while at a time,
and never for longer than others are used to wait. A row's bits do not depend on the rows beside it, so no text depends
on who else generates.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Literal, Protocol

from qrun.engine.errors import GenerationCancelled
from qrun.engine.generation.prefixes import Prefixes, shared_beginning
from qrun.engine.generation.token_cache import common_prefix
from qrun.engine.native.locks import tell_of_forks
from qrun.engine.native.stacks import roomy_threads

if TYPE_CHECKING:
    import numpy as np

    from qrun.engine.generation.adapters import Chosen
    from qrun.engine.generation.guesses import Guesser
    from qrun.engine.generation.piece import Piece, Sampled
    from qrun.engine.generation.token_cache import TokenCache
    from qrun.engine.program.background import BackgroundBatch
    from qrun.engine.program.runtime import Part, Runtime

# How many seconds of a step rows of prompts may take while others generate, the second where at least as many wait as
# generate; and always as long as a step without. More than LONG_PROMPT rows are read in the background, between steps,
# for no longer than that: from one step's end to the next it takes as long as STEPS_APART steps without prompts; or as
# one step, and one more for each that waits for each that generates; or as one step and BACKGROUND_SECONDS where steps
# are short. Of what a step took longer by itself, as much is taken from that, but for LEAST_SHARE of it; where most of
# the last SLOW_STEPS take longer, as beside another program, that is what steps take now, up to MOST_SLOWER times as
# long as before.
BESIDE_SECONDS, BURST_SECONDS, BACKGROUND_SECONDS = 0.1, 0.3, 0.01
STEPS_APART, LEAST_SHARE, SLOW_STEPS, MOST_SLOWER = 1.8, 0.3, 8, 1.5
LONG_PROMPT = 1024
TILE_ROWS = 8  # of prompts: what attention takes at once where it takes fewest
SHORT_PROMPT = 128  # rows that are left of it; such go before longer ones that came earlier,
WORTH_WAITING = 32  # tokens that another prompt is about to read as well
PATIENCE = 1.0  # but not before those that have waited for so many seconds
_RESERVE = 64  # positions that there must be room for behind a prompt before it is begun beside others
LEAVE_SECONDS = 0.1  # so long a reader who cancels waits for the end of the step under way
_LEARNING = 0.3  # how much a step says about how long a row of a prompt will take
_STEPS_KEPT = 256  # without prompts: a quarter of them took no longer than what counts as ordinary, as others may have
# been slowed down by something else, for a while


class Sharing(Protocol):
    """A generation, as far as the scheduler knows it: see `Generation`."""

    tokens: list[int]
    _cache: TokenCache
    _prompt: list[int]
    _adapters: Chosen
    _source: tuple[int, ...]
    _sampled: deque[Sampled]
    _stop_ids: frozenset[int]
    _started: bool
    _reason: str | None
    _task: Task | None

    @property
    def cancelled(self) -> bool: ...

    @property
    def stop_reason(self) -> str | None: ...

    def cancel(self) -> None: ...

    def start(self, sink: Sink) -> None: ...

    def __next__(self) -> Piece: ...

    @property
    def _can_share(self) -> bool: ...

    def _next_rows(self) -> tuple[list[int], Guesser | None]: ...

    def _wanted(self, guesser: Guesser | None) -> Literal["last", "all"]: ...

    def _begin_prompt(self, n_cached: int) -> None: ...

    def _take_prompt(self, logits: np.ndarray, seconds: float) -> None: ...

    def _take_rows(self, rows: np.ndarray, tokens: list[int], guesser: Guesser | None, seconds: float) -> None: ...

    def _drain(self) -> list[Piece]: ...

    def _count(self, piece: Piece) -> None: ...

    def _end(self) -> None: ...


class Sink(Protocol):
    """Who takes pieces, in the scheduler's thread: it must be quick, and not raise."""

    def put(self, generation: Sharing, pieces: list[Piece], error: BaseException | None) -> None:
        """More pieces. After the last of a generation its `stop_reason` is set, or there is an error."""

    def flush(self) -> None:
        """A step has ended, after one `put` or more."""

    def hurry(self, generation: Sharing) -> None:
        """A generation was cancelled, and the step under way may take long: from any thread."""


class Task:
    """A generation that the scheduler computes.

    ahead: how many pieces may wait for their reader. With a sink, nobody reads, and none wait.
    """

    def __init__(self, scheduler: Scheduler, generation: Sharing, ahead: int, sink: Sink | None) -> None:
        self._scheduler = scheduler
        # Whoever reads holds the generation; when nobody does any more, it need not go on. One with a sink is held, and
        # one whose reader has left before the scheduler let go of it.
        self.generation = weakref.ref(generation)
        self._held = generation if sink is not None else None
        self.ahead, self.sink = ahead, sink
        self.arrived = time.perf_counter()
        self.cache = generation._cache
        self.prompt = generation._prompt
        self.adapters, self.source = generation._adapters, generation._source
        self.marks: deque[int] = deque()
        self.begun = self.fetching = self.long = False
        """fetching: whether what the disk has of its prompt is being read, or the background made ready for it. long:
        see LONG_PROMPT."""
        self.batch: BackgroundBatch | None = None
        """Rows of its prompt that are being read in the background."""
        self.known = 0  # tokens of its prompt with which texts on the disk begin
        self.n_repeated = 0
        """Generated tokens that are part of the prompt now."""
        self.pieces: deque[Piece] = deque()
        self.error: BaseException | None = None
        self.over = False
        self.ready = threading.Condition(scheduler.lock)

    @property
    def held(self) -> bool:
        """Is the scheduler to end the generation?"""
        return self._held is not None

    @property
    def unread(self) -> bool:
        """Are there pieces that nobody has read?"""
        return bool(self.pieces) or not self.over

    @property
    def decoding(self) -> bool:
        """Has the prompt been read?"""
        return self.begun and len(self.cache.tokens) >= len(self.prompt)

    @property
    def left(self) -> int:
        """Tokens of the prompt that have not been read, and of what it answers."""
        return self.source_left + len(self.prompt) - len(self.cache.tokens)

    @property
    def source_left(self) -> int:
        """Tokens of the source that have not been read."""
        return len(self.source) - (self.cache.n_source_read if self.cache.source == self.source else 0)

    def read(self) -> Piece | None:
        """The next piece, when there is one; None after the last. What was computed ahead of a reader who cancels is
        dropped, and where the step under way takes long, it is not waited for."""
        generation = self.generation()
        self._scheduler.check_not_stepping()
        with self._scheduler.lock:
            while not self.pieces and not self.over:
                cancelled = generation is not None and generation.cancelled
                if not self.ready.wait(LEAVE_SECONDS if cancelled else None):
                    break
            if generation is not None and generation.cancelled and (self.pieces or self.error or not self.over):
                self._leave(generation)
            if self.pieces:
                piece = self.pieces.popleft()
                if len(self.pieces) < self.ahead:
                    self._scheduler.changed.notify()
                return piece
            error, self.error = self.error, None
        if error is not None:
            raise error
        return None

    def _leave(self, generation: Sharing) -> None:
        """End a cancelled generation for whoever reads; the scheduler, whose lock is held, lets go of it later."""
        self.pieces.clear()
        self.error = None
        if not self.over:
            self._held = generation
        generation._reason, self.over = "cancelled", True

    def leave(self, generation: Sharing) -> None:
        """The same, where a sink takes the pieces."""
        with self._scheduler.lock:
            if not self.over:
                self._leave(generation)

    def wake(self) -> None:
        """Its generation was cancelled: the scheduler should look, and its reader."""
        generation = self.generation()
        with self._scheduler.lock:
            self._scheduler.changed.notify()
            self.ready.notify_all()
        if self.sink is not None and generation is not None:
            self.sink.hurry(generation)

    def leave_parent(self) -> None:
        """This is a child process, which has neither the thread that computed the generation nor what it was about to
        say."""
        self.ready = threading.Condition(self._scheduler.lock)
        generation = self.generation()
        if generation is not None and not self.over:
            error = RuntimeError("the process forked while another thread computed this generation: begin another")
            _fail(self, generation, error)
        self.over, self._held = True, None


class Scheduler:
    """Computes the generations of one model, if there are several at a time.

    prefixes: what has been computed of earlier prompts.
    """

    def __init__(self, runtime: Runtime, prefixes: Prefixes) -> None:
        self.prefixes = prefixes
        self._runtime = runtime
        self._begin()
        tell_of_forks(self)

    def _begin(self) -> None:
        self.lock = threading.RLock()  # a signal's handler may stop what it interrupts
        self.changed = threading.Condition(self.lock)
        self._tasks: list[Task] = []
        self._live: weakref.WeakSet[Sharing] = weakref.WeakSet()
        self._thread: threading.Thread | None = None
        self._decode_times: dict[int, deque[float]] = {}  # of steps without rows of prompts, by who generates
        self._row_seconds = 0.0  # of a row of a prompt
        self._last_end = 0.0  # of a step, with what came behind it
        self._last_gone: deque[float] = deque(maxlen=SLOW_STEPS)  # from there to where a long prompt could be read

    def leave_parent(self) -> None:
        """A child process has the threads of its parent no more, nor what they were in the middle of."""
        tasks = self._tasks
        self._begin()
        for task in tasks:
            task.leave_parent()

    def shared(self, generation: Sharing) -> bool:
        """A generation wants to go on: are there others under way?"""
        with self.lock:
            self._live.add(generation)
            return bool(self._tasks) or any(
                other is not generation and other._reason is None and not other.cancelled for other in self._live
            )

    @property
    def busy(self) -> bool:
        """Are there generations that the scheduler computes?"""
        return bool(self._tasks)

    def add(self, generation: Sharing, *, ahead: int = 0, sink: Sink | None = None) -> Task:
        """Compute a generation from now on."""
        self.check_not_stepping()
        task = Task(self, generation, ahead, sink)
        task.begun = generation._started
        if not task.begun and (self.prefixes.may_fetch(task.cache, task.prompt) or len(task.prompt) > LONG_PROMPT):
            task.fetching = True
            threading.Thread(target=self._fetch, args=(task,), name="qrun prefix", daemon=True).start()
        with self.lock:
            self._live.add(generation)
            self._tasks.append(task)
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="qrun scheduler", daemon=True)
                with roomy_threads():
                    self._thread.start()
            self.changed.notify()
        return task

    def check_not_stepping(self) -> None:
        """RuntimeError where this very thread is in a step, and would wait for itself."""
        self._runtime.check_not_stepping()

    @property
    def running(self) -> int:
        """Generations that have read their prompts."""
        with self.lock:
            return sum(task.decoding for task in self._tasks)

    @property
    def waiting(self) -> int:
        """Those that have not."""
        with self.lock:
            return sum(not task.decoding for task in self._tasks)

    def _fetch(self, task: Task) -> None:
        """In a thread of its own: nobody who computes waits for the disk."""
        try:
            if len(task.prompt) > LONG_PROMPT:
                with suppress(Exception):  # whatever it is, the task will hear of it
                    self._runtime.prepare_background()
            task.known = self.prefixes.fetch(task.cache, task.prompt, task.adapters)
        finally:
            with self.lock:
                task.fetching = False
                self.changed.notify()

    # The thread

    def _loop(self) -> None:
        while True:
            with self.lock:
                while not (tasks := self._wanting()):
                    if not self._tasks:
                        self._thread = None
                        return
                    self.changed.wait(1.0)  # whose readers have gone without a word is noticed then
            self._step(tasks)
            del tasks  # or their generations would live as long as the wait

    def _wanting(self) -> list[tuple[Task, Sharing]]:
        """The tasks that can go on, in the order in which they came; those that nobody wants any more are dropped."""
        found: list[tuple[Task, Sharing]] = []
        for task in list(self._tasks):
            generation = task.generation()
            if generation is None:
                self._tasks.remove(task)
            elif task.fetching and not generation.cancelled:
                continue
            elif generation.cancelled or task.sink is not None or len(task.pieces) < task.ahead:
                found.append((task, generation))
        return found

    def _step(self, tasks: Sequence[tuple[Task, Sharing]]) -> None:
        """Compute one step, and hand out what came of it. Those who were cancelled need not wait for it."""
        gone = [(task, generation) for task, generation in tasks if generation.cancelled]
        self._deliver([(task, generation, generation._drain()) for task, generation in gone])
        tasks = [pair for pair in tasks if pair not in gone]
        if not tasks:
            return
        locked: list[tuple[Task, Sharing]] = []
        refused: list[tuple[Task, Sharing, list[Piece]]] = []
        try:
            for task, generation in tasks:
                try:
                    if task.cache.lock.acquire(blocking=False):
                        locked.append((task, generation))
                except RuntimeError as error:  # another thread used it when this process was forked
                    _fail(task, generation, error)
                    refused.append((task, generation, []))
            try:
                self._compute(locked)
            except GenerationCancelled:
                pass  # all of them were
            except BaseException as error:
                for task, generation in locked:
                    _fail(task, generation, error)
            results = [(task, generation, generation._drain()) for task, generation in locked]
        finally:
            for task, _ in locked:
                task.cache.lock.release()
        if not locked and not refused:
            time.sleep(0.001)  # their owners save or fork them
        self._deliver(refused + results)

    def _deliver(self, results: Sequence[tuple[Task, Sharing, list[Piece]]]) -> None:
        sinks: dict[int, Sink] = {}
        for task, generation, pieces in results:
            with self.lock:
                if task.sink is None and not task.over:  # else its reader has left
                    task.pieces += pieces
                task.over = over = generation._reason is not None
                if over:
                    self._tasks.remove(task)
                    self._live.discard(generation)
                if pieces or over:
                    task.ready.notify_all()
            if over:
                task._held = None  # or task and generation would hold each other
                generation._end()
            if task.sink is not None and (pieces or over):
                for piece in pieces:
                    generation._count(piece)
                task.sink.put(generation, pieces, task.error)
                sinks[id(task.sink)] = task.sink
        for sink in sinks.values():
            sink.flush()

    def _compute(self, tasks: Sequence[tuple[Task, Sharing]]) -> None:
        """Evaluate rows of these tasks, and sample from what was wanted."""
        from qrun.engine.program.runtime import Part  # not for those who only import the face

        going = [(task, generation) for task, generation in tasks if not generation.cancelled]
        parts: list[Part] = []
        whose: list[tuple[Task, Sharing, list[int], Guesser | None]] = []
        room = self._runtime.batch

        def plan(task: Task, generation: Sharing, tokens: list[int], guesser: Guesser | None = None) -> None:
            ends = task.decoding or len(task.cache.tokens) + len(tokens) == len(task.prompt)
            logits: Literal["none", "last", "all"] = generation._wanted(guesser) if ends else "none"
            parts.append(Part(task.cache.sequence, tokens, logits))
            whose.append((task, generation, tokens, guesser))

        self._make_room(going)
        for task, generation in going:
            if task.decoding and room and not generation._sampled:
                try:
                    tokens, guesser = generation._next_rows()
                except Exception as error:  # of this one alone
                    _fail(task, generation, error)
                    continue
                if len(tokens) > room:
                    tokens, guesser = tokens[:1], None
                plan(task, generation, tokens, guesser)
                room -= len(tokens)
        n_decode = sum(len(part.tokens) for part in parts)
        prompts = self._prompts(going)
        n_generating = len(parts)
        if n_generating and prompts:
            most = max(_most_seconds(n_generating, len(prompts)), self._decode_seconds(n_generating))
            room = min(room, self._rows_in(most))
        planned = 0  # bytes of those that begin now
        behind = next((pair for pair in prompts if pair[0].batch is not None), None)
        """Whose prompt is read in the background."""
        for task, generation in prompts:
            if room <= 0 and (behind is not None or len(task.prompt) <= LONG_PROMPT):
                continue
            if not task.begun:
                wanted = planned + self._runtime.bytes_of(len(task.prompt) + _RESERVE, len(task.source))
                if any(other.begun for other, _ in going) and not self.prefixes.trim(wanted):
                    continue
                planned = wanted
                try:
                    self._begin_prompt(task, generation)
                except Exception as error:
                    _fail(task, generation, error)
                    continue
            if n_source := task.source_left:  # read as a whole, before the step: its first row is one of the next
                room -= n_source
                self._read_source(task, generation)
            elif task.batch is None and not (task.long and n_generating):
                tokens = task.prompt[len(task.cache.tokens) : self._next_mark(task)][: max(room, 0)]
                if tokens:
                    plan(task, generation, tokens)
                room -= len(tokens)
            elif behind is None:
                behind = task, generation
        if parts:
            begin = time.perf_counter()
            rows = self._runtime.step(parts, lambda: all(generation.cancelled for _, generation, _, _ in whose))
            seconds = time.perf_counter() - begin
            reading = [task for task, _, _, _ in whose if not task.decoding]
            self._learn(n_generating, sum(len(part.tokens) for part in parts) - n_decode, seconds, reading)
            for (task, generation, tokens, guesser), logits in zip(whose, rows, strict=True):
                self._take(task, generation, tokens, guesser, logits, seconds)
        if behind is not None:
            self._read_behind(*behind, self._bearable(n_generating, len(prompts)) if n_generating else math.inf)
        self._last_end = time.perf_counter()

    def _next_mark(self, task: Task) -> int:
        """Up to where the prompt is read next."""
        return task.marks[0] if task.marks else len(task.prompt)

    def _read_behind(self, task: Task, generation: Sharing, seconds: float) -> None:
        """Read on in a long prompt for so long, or to the end of a batch where there is no limit."""
        end = time.perf_counter() + seconds
        try:
            while self._read_batch(task, generation, end - time.perf_counter()):
                if task.decoding or generation._reason is not None or not time.perf_counter() < end < math.inf:
                    break
        except Exception as error:  # of this one alone
            _fail(task, generation, error)

    def _read_batch(self, task: Task, generation: Sharing, seconds: float) -> bool:
        """Go on with a batch of it, or begin one; whether it has been read."""
        from qrun.engine.program.runtime import Part

        if task.batch is None or not task.batch.valid:  # another thread has used the session
            end = self._next_mark(task)
            logits: Literal["none", "last"] = "last" if end == len(task.prompt) else "none"
            part = Part(task.cache.sequence, task.prompt[len(task.cache.tokens) : end], logits)
            task.batch = self._runtime.begin_in_background(part)
        if not task.batch.run(seconds, lambda: generation.cancelled):
            return False
        batch, task.batch = task.batch, None
        start = len(task.cache.tokens)
        self._take(task, generation, task.prompt[start : start + len(batch)], None, batch.logits, 0.0)
        return True

    def _read_source(self, task: Task, generation: Sharing) -> None:
        """Read what a task's prompt answers, unless it is cancelled meanwhile."""
        try:
            self._runtime.read_source(task.cache.sequence, lambda: generation.cancelled)
        except GenerationCancelled:
            pass
        except Exception as error:  # of this one alone
            _fail(task, generation, error)

    def _take(
        self, task: Task, generation: Sharing, tokens: list[int], guesser: Guesser | None, logits: np.ndarray,
        seconds: float,
    ) -> None:  # fmt: skip
        """A task's rows have been computed."""
        decoding = task.decoding
        task.cache.took(tokens)
        try:
            if decoding:
                generation._take_rows(logits, tokens, guesser, seconds)
                return
            if task.marks and task.marks[0] == len(task.cache.tokens):
                task.marks.popleft()
                task.cache.sequence.mark()
                self.prefixes.snapshot(task.cache)
            if task.decoding:
                task.cache.sequence.mark()
                generation._take_prompt(logits[0], time.perf_counter() - task.arrived)
        except Exception as error:  # of this one alone: its logits were no numbers, say
            _fail(task, generation, error)

    def _prompts(self, tasks: Sequence[tuple[Task, Sharing]]) -> list[tuple[Task, Sharing]]:
        """Those whose prompts are to be read, the next first. Whose prompt begins like one that is being read waits
        until that has been read so far."""
        now = time.perf_counter()
        waiting = [pair for pair in tasks if not pair[0].decoding]
        waiting.sort(key=lambda pair: (pair[0].left > SHORT_PROMPT and now - pair[0].arrived < PATIENCE))
        chosen: list[tuple[Task, Sharing]] = []
        for task, generation in waiting:
            if task.begun or not any(_ahead_of(task, other) for other, _ in chosen):
                chosen.append((task, generation))
        return chosen

    def _make_room(self, tasks: Sequence[tuple[Task, Sharing]]) -> None:
        """Where the cache has outgrown its limit, kept prefixes go first, and then what the task has computed that came
        last: it will be computed again, to the same bits, when there is room."""
        if self.prefixes.trim():
            return
        holding = [(task, generation) for task, generation in tasks if task.begun]
        if len(holding) > 1:
            task, generation = holding[-1]
            task.batch = None
            task.prompt = [*task.prompt, *generation.tokens[task.n_repeated :]]
            task.n_repeated = len(generation.tokens)
            task.cache.forget()
            task.begun = False

    def _begin_prompt(self, task: Task, generation: Sharing) -> None:
        task.cache.use(task.adapters, task.source)
        alike = max(task.known, self.prefixes.adopt(task.cache, task.prompt))
        generation._begin_prompt(task.cache.begin(task.prompt) + task.cache.n_source_read)
        task.long = task.left > LONG_PROMPT
        task.marks = deque(task.cache.marks(task.prompt, generation._stop_ids, alike))
        task.begun = True

    def _bearable(self, n_generating: int, n_prompts: int) -> float:
        """For how many seconds a long prompt may be read now, where so many generate, so many prompts are to be read,
        and a step has just ended."""
        ordinary = self._decode_seconds(n_generating)
        more = max((STEPS_APART - 1) * ordinary, n_prompts / n_generating * ordinary, BACKGROUND_SECONDS)
        gone = time.perf_counter() - self._last_end
        self._last_gone.append(gone)
        usual = sorted(self._last_gone)[SLOW_STEPS // 2] if len(self._last_gone) == SLOW_STEPS else 0.0
        now = min(max(usual, ordinary), MOST_SLOWER * ordinary)
        return min(max(now + more - gone, LEAST_SHARE * more), _most_seconds(n_generating, n_prompts))

    def _decode_seconds(self, n_generating: int) -> float:
        """What a step without prompts takes where so many generate, or as near to that as is known; 0 if nothing is."""
        if not self._decode_times:
            return 0.0
        nearest = min(self._decode_times, key=lambda n: (abs(n - n_generating), n))
        times = sorted(self._decode_times[nearest])
        return times[len(times) // 4]

    def _rows_in(self, seconds: float) -> int:
        """How many rows of prompts take so long."""
        rows = int(seconds / self._row_seconds) if self._row_seconds else TILE_ROWS
        return max(rows // TILE_ROWS, 1) * TILE_ROWS

    def _learn(self, n_generating: int, n_prompt: int, seconds: float, reading: Sequence[Task]) -> None:
        """A step of so many who generate, and so many rows of these tasks' prompts, took so long."""
        if not n_prompt:
            self._decode_times.setdefault(n_generating, deque(maxlen=_STEPS_KEPT)).append(seconds)
        elif n_prompt >= TILE_ROWS and not any(task.long and len(task.cache.tokens) >= LONG_PROMPT for task in reading):
            others = self._decode_seconds(n_generating) if n_generating else 0.0
            each = max(seconds - others, 0.1 * seconds) / n_prompt
            self._row_seconds = _learned(self._row_seconds, each)


def _most_seconds(n_generating: int, n_prompts: int) -> float:
    """For how long those who generate may wait for prompts, for as long as a step takes by itself not counted."""
    return BURST_SECONDS if n_prompts >= n_generating else BESIDE_SECONDS


def _learned(before: float, seconds: float) -> float:
    """What takes so long now, and took so long before, if that is known."""
    return before + (seconds - before) * _LEARNING if before else seconds


def _fail(task: Task, generation: Sharing, error: BaseException) -> None:
    """End a generation; its reader gets the error."""
    generation._reason = "cancelled"
    task.error = error


def _ahead_of(task: Task, other: Task) -> bool:
    """Is another task reading what this one's prompt answers or begins with, and has more of it to come?"""
    if task.adapters != other.adapters or task.source != other.source:
        return False
    if other.source_left:
        return task.source_left > 0
    wanted = task.prompt[:-1]
    alike = common_prefix(wanted, other.prompt)
    if alike < WORTH_WAITING or len(other.cache.tokens) >= alike:
        return False
    return alike >= shared_beginning(task.cache, wanted) + WORTH_WAITING
