"""A model at work: its program, its threads, and the steps that they run."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qrun.engine.errors import ContextOverflow, GenerationCancelled
from qrun.engine.kernels import records as R
from qrun.engine.native.compiler import Progress, default_target, load_kernels
from qrun.engine.native.locks import ForkAwareLock
from qrun.engine.native.team import TEAM_KERNELS, Team
from qrun.engine.program.adapted import AdaptedLowering, SwitchedAdapters
from qrun.engine.program.arena import rows_of
from qrun.engine.program.background import BACKGROUND_ROWS, Background, BackgroundBatch
from qrun.engine.program.early_selection import select_early
from qrun.engine.program.kv_cache import CacheLayout, KVSequence
from qrun.engine.program.lowering import Lowering
from qrun.engine.program.observing import ObservingLowering
from qrun.engine.program.pages import PagePool
from qrun.engine.program.pieces import Pace, run_pieces
from qrun.engine.program.program import Program
from qrun.engine.program.state_blocks import StateBlocks, state_sizes
from qrun.engine.program.step import Step
from qrun.engine.simd.target import Target
from qrun.formats import TensorInfo
from qrun.formats.dataclass import dataclass
from qrun.formats.mapping import FileMap, map_under
from qrun.models.adapter import Adapter
from qrun.models.graph import Graph

# Rows whose logits are computed in one go: the matrix of a large vocabulary is most of a small model, and is read so
# many times less.
HEAD_ROWS = 64

# A batch can take seconds. It is run in pieces of about this length, between which it can be cancelled, Python handles
# signals (Ctrl-C), and others learn how far it has come.
PIECE_SECONDS = 0.1

Tap = Callable[[int, NDArray[np.int64], NDArray[np.float32]], None]
"""Gets what draft layers go on from: the first position of a step, its tokens, and hidden states [rows, n_embd]."""


@dataclass(frozen=True)
class Part:
    """Tokens to append to a sequence, and whose logits are wanted."""

    sequence: KVSequence
    tokens: Sequence[int]
    logits: Literal["none", "first", "last", "all"] = "last"


class Runtime:
    """Computes logits. One step runs at a time; callers from several threads take turns.

    Goes away, with its threads and memory, when nobody holds it any more; `close` does that at once. A child process
    (`os.fork`) can go on with it, but not with sequences that another thread was computing.

    context: positions that one sequence can have. batch: rows of one step at most (up to 512); of a model whose tokens
    all see each other it is the context, as a text is one step there.
    causal: does a token see those before it only? width: of what is computed: the vocabulary, or of a model that makes
    embeddings a row's width. start: the token with which answers begin, of models that answer a source, which a
    sequence has to be told first (`KVSequence.answer`); None of others.
    progress(done, total): called while kernels are compiled, if any have to be.
    observe: collect in `observations` what matmuls take (see program.observing); of the tensors for which `keep` is
    true the rows themselves, if it is given.
    adapters: what can be switched for each sequence (`KVSequence.adapters` has their numbers): steps with such
    sequences run a program of their own.
    simd: the form of the kernels, as QRUN_SIMD names it.
    beside: another runtime, with whose threads this one works, in turns; it has to be closed after this one.
    """

    def __init__(
        self, graph: Graph, *, threads: int, context: int, cache_type: str = "f16", batch: int = R.MAX_COLUMNS,
        progress: Progress | None = None, target: Target | None = None, observe: bool = False,
        keep: Callable[[str], bool] | None = None,
        beside: Runtime | None = None, adapters: Sequence[Adapter[TensorInfo]] = (),
    ) -> None:  # fmt: skip
        if context < 1:
            raise ValueError(f"context is {context}: it must be at least 1")
        if not 1 <= batch <= R.MAX_COLUMNS:
            raise ValueError(f"batch is {batch}: it can be 1 to {R.MAX_COLUMNS}")
        self.target = target = target or default_target(folded=graph.embeds)
        self.graph, self.threads, self.context, self.cache_type = graph, threads, context, cache_type
        self.simd = target.form
        self.n_vocab, self.width, self.causal = graph.n_vocab, graph.logits.width, graph.causal
        self.start = None if graph.encoder is None else graph.start
        # A text whose tokens all see each other is computed in one step.
        self.batch = min(batch, context) if graph.causal else context
        self._layout = CacheLayout(graph.cache_layers, cache_type, state_sizes(graph))
        self._pools = [PagePool(size) for size in self._layout.page_bytes]
        self._blocks = PagePool(self._layout.block_bytes)
        # Those who observe want to see all rows of the last block too.
        to_lower = graph if observe else select_early(graph)
        settings: dict[str, Any] = {
            "batch": self.batch, "head_rows": self.batch if graph.embeds else min(HEAD_ROWS, self.batch),
            "context": context, "threads": threads,
        }  # fmt: skip
        lowering = (
            ObservingLowering(to_lower, self._layout, target, keep=keep, **settings) if observe
            else Lowering(to_lower, self._layout, target, **settings)
        )  # fmt: skip
        self.observations = lowering.observations if isinstance(lowering, ObservingLowering) else []
        self._switched = SwitchedAdapters(adapters, self.batch) if adapters else None
        self._background: Background | None = None  # once it is wanted
        self._preparing = ForkAwareLock()  # it
        self._to_lower, self._settings = to_lower, settings
        encoding = None
        if graph.encoder is not None:
            if observe or adapters:
                raise ValueError("this is not possible for models with an encoder and a decoder")
            # A source, whose tokens all see each other, is read in one step.
            encoding = Lowering(
                graph.encoder, self._layout, target, batch=context, head_rows=context, context=context, threads=threads
            )
        adapted = (
            AdaptedLowering(
                to_lower, self._layout, target, adapters=self._switched, rope_tables=lowering.rope_tables, **settings
            )
            if self._switched else None
        )  # fmt: skip
        more = [other for other in (adapted, encoding) if other is not None]
        keys = [*TEAM_KERNELS, *lowering.kernel_keys, *(key for other in more for key in other.kernel_keys)]
        self._kernels = kernels = load_kernels(list(dict.fromkeys(keys)), target, progress)
        self._step = Step(max(self.batch, context) if encoding else self.batch, len(self._pools))
        # The larger one first: the other lies in its memory.
        self._adapted = Program(adapted, kernels, self._step.address) if adapted else None
        self._encoder = Program(encoding, kernels, self._step.address) if encoding else None
        self._program = Program(lowering, kernels, self._step.address, self._adapted or self._encoder)
        arrays = [value for other in (self._program, self._adapted, self._encoder) if other for value in other.arrays()]
        self._files = {id(file): file for array in arrays if (file := map_under(array)) is not None}
        # Two teams would be in each other's way: threads of the one spin for a while when the other's turn comes.
        self._team: Team | None = beside._team if beside else Team(kernels, threads)
        self._owns_team = beside is None
        self._lock: ForkAwareLock = beside._lock if beside else ForkAwareLock()  # whoever runs steps
        self._pages_lock = ForkAwareLock()  # sequences, while they change what they share
        self._pace = Pace(PIECE_SECONDS)
        self._under_way: tuple[KVSequence, float] | None = None  # what `progress` tells
        self._stepping: tuple[int, int] | None = None  # the process and the thread that compute a step
        self._hidden = np.empty((0, 0), np.float32)  # of the last step
        self._logits = np.empty((0, self.width), np.float32)  # of `step`
        self._peaks = self._program.peaks[:0]  # of these
        self._newest = self._logits, self._peaks  # what was returned, one row or those of a step

    @property
    def files(self) -> list[FileMap]:
        """Those in which the weights lie."""
        return list(self._files.values())

    def sequence(self) -> KVSequence:
        """A new, empty sequence."""
        return KVSequence(self._layout, self._pools, self.context, self._pages_lock, StateBlocks(self._blocks))

    def progress(self, sequence: KVSequence) -> int:
        """How many positions of the sequence have been computed, with those of its source; also while a batch of it is
        under way, from any thread: then with the part of the batch that corresponds to the work done."""
        under_way = self._under_way
        reached = under_way[1] if under_way is not None and under_way[0] is sequence else 0
        return max(sequence.n_source_read + sequence.n_past, int(reached))

    def evaluate(
        self, sequence: KVSequence, tokens: Sequence[int] | NDArray[np.integer],
        logits: Literal["none", "last", "all"] = "last",
        cancelled: Callable[[], bool] | None = None, *, inputs: NDArray[np.float32] | None = None,
        tap: Tap | None = None,
    ) -> NDArray[np.float32] | None:  # fmt: skip
        """Append tokens to the sequence.

        inputs: a row for each token, [n, width], where the graph takes such. tap: called after each step, of a graph
        with hidden states; with those of all rows, or where the graph has them behind the selection, of those whose
        logits are wanted.

        Returns float32 [n_vocab] of the last token, [n, n_vocab] of all of them, or nothing.
        Raises ContextOverflow if the sequence would outgrow the context, ValueError for an id outside of the
        vocabulary, GenerationCancelled if `cancelled()` becomes true: it is asked ten times a second. What is left then
        are whole batches.
        """
        ids = self._checked(tokens)
        if sequence.n_past + len(ids) > self.context:
            raise ContextOverflow(
                f"{sequence.n_past + len(ids)} tokens do not fit into the context of {self.context} tokens"
            )
        self._check_whole(sequence)
        out = rows_of(len(ids), self.width) if logits == "all" else None
        last: NDArray[np.float32] | None = None
        for start in range(0, len(ids), self.batch):
            part = ids[start : start + self.batch]
            ends = start + len(part) == len(ids)
            wanted = (
                range(len(part))
                if out is not None
                else range(len(part) - 1, len(part))
                if logits == "last" and ends
                else range(0)
            )
            with self._lock:
                sequence.reserve(len(part))
                into = None if out is None else out[start : start + len(part)]
                given = None if inputs is None else inputs[start : start + len(part)]
                peaks = rows_of(1, self._peaks.shape[1]) if len(wanted) == 1 else None
                try:
                    rows = self._run([(sequence, part)], wanted, into, cancelled, given, peaks)
                    hidden = self._hidden
                    if peaks is not None:
                        self._newest = rows, peaks
                    sequence.advance(len(part))
                    if len(part) == self.batch and not ends:
                        sequence.mark()
                finally:
                    self._under_way = None
            if tap is not None:
                tap(sequence.n_past - len(part), part, hidden)
            if out is None and len(rows):
                last = rows[0]
        return out if logits == "all" else last

    def step(
        self, parts: Sequence[Part], cancelled: Callable[[], bool] | None = None
    ) -> list[NDArray[np.float32]]:
        """Append tokens to several sequences in one step of at most `batch` rows.

        Returns for each part the logits that it wants, float32 [n, n_vocab] with n 0, 1 or as many as its tokens: views
        of memory that the next `step` writes to. Errors are those of `evaluate`; then nothing has been appended.
        """
        if len({id(part.sequence) for part in parts}) != len(parts):
            raise ValueError("a step takes a sequence once")
        rows, ends = 0, [0]
        wanted: list[int] = []
        for part in parts:
            count = len(part.tokens)
            self._check_whole(part.sequence)
            if part.sequence.n_past + count > self.context:
                raise ContextOverflow(
                    f"{part.sequence.n_past + count} tokens do not fit into the context of {self.context} tokens"
                )
            first, end = {"all": (0, count), "first": (0, 1), "last": (count - 1, count), "none": (0, 0)}[part.logits]
            wanted += range(rows + first, rows + end)
            ends.append(len(wanted))
            rows += count
        if rows > self.batch:
            raise ValueError(f"{rows} rows are more than the {self.batch} of a step")
        tokens = [(part.sequence, self._checked(part.tokens)) for part in parts]
        if len(self._logits) < len(wanted):
            self._logits = rows_of(len(wanted), self.width)
            self._peaks = rows_of(len(wanted), self._peaks.shape[1])
        out, peaks = self._logits[: len(wanted)], self._peaks[: len(wanted)]
        with self._lock:
            for part in parts:
                part.sequence.reserve(len(part.tokens))
            try:
                self._run(tokens, wanted, out, cancelled, peaks=peaks)
                self._newest = out, peaks
            finally:
                self._under_way = None
            for part in parts:
                part.sequence.advance(len(part.tokens))
        return [out[a:b] for a, b in itertools.pairwise(ends)]

    def peaks_of(self, row: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """The highest of parts of a row of logits (see `kernels.peaks`); None for a small vocabulary, and for a row
        that the newest step or evaluation did not return."""
        logits, peaks = self._newest
        number, rest = divmod(row.ctypes.data - logits.ctypes.data, 4 * self.width)
        return peaks[number] if peaks.shape[1] and 0 <= number < len(peaks) and not rest else None

    def prepare_background(self) -> None:
        """Make what `begin_in_background` needs, which takes some hundredths of a second the first time. Steps need not
        wait for it."""
        with self._preparing:
            with self.alone():
                if self._background is not None:
                    return
                switched, kernels, to_lower = self._switched, self._kernels, self._to_lower
                tables = (self._adapted or self._program).rope_tables
            rows = min(BACKGROUND_ROWS, self.batch)
            settings = self._settings | {"batch": rows, "head_rows": 1, "rope_tables": tables}
            switched = None if switched is None else switched.beside(rows)
            lowering = (
                Lowering(to_lower, self._layout, self.target, **settings) if switched is None
                else AdaptedLowering(to_lower, self._layout, self.target, adapters=switched, **settings)
            )  # fmt: skip
            step = Step(rows, len(self._pools))
            background = Background(Program(lowering, kernels, step.address), step, switched)
            with self.alone():
                self._background = background

    def begin_in_background(self, part: Part) -> BackgroundBatch:
        """Begin to append tokens to a sequence, of which up to BACKGROUND_ROWS are taken: they are computed whenever
        the batch is told to go on. There is one such batch at a time: another one ends it. Logits are "last" or "none".
        Errors are those of `evaluate`; a source has to be read before."""
        self._check_whole(part.sequence)
        self.prepare_background()
        with self.alone():
            background = self._background
            assert background is not None and part.logits in ("last", "none")
            count = min(len(part.tokens), len(background.step.tokens))
            ids = self._checked(part.tokens[:count])
            if part.sequence.n_past + count > self.context:
                raise ContextOverflow(
                    f"{part.sequence.n_past + count} tokens do not fit into the context of {self.context} tokens"
                )
            ends = part.logits == "last" and count == len(part.tokens)
            return BackgroundBatch(self, background, part.sequence, ids, ends=ends)

    @property
    def team(self) -> Team:
        """The threads. ValueError once they have been ended."""
        self._check_open()
        assert self._team is not None
        return self._team

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For whoever uses the team: nobody else does meanwhile. ValueError if the model is closed."""
        with self._lock:
            self._check_open()
            yield

    def read_source(self, sequence: KVSequence, cancelled: Callable[[], bool] | None = None) -> None:
        """Read what a sequence answers, if that has not been done: the first step with it does so otherwise. Errors are
        those of `evaluate`; then nothing of it is kept."""
        with self.alone():
            if sequence.source and not sequence.source_read:
                self._read_source(sequence, cancelled)

    def infill(
        self, tokens: NDArray[np.int64], rows: Sequence[int], cancelled: Callable[[], bool] | None = None,
        adapters: tuple[tuple[int, float], ...] = (),
    ) -> NDArray[np.float32]:  # fmt: skip
        """Logits [len(rows), n_vocab] of some rows of a text that is computed as a whole and then forgotten. Errors are
        those of `evaluate`."""
        ids = self._checked(tokens)
        if len(ids) > self.batch:
            raise ContextOverflow(f"{len(ids)} tokens do not fit into the context of {self.context} tokens")
        sequence = self.sequence()
        sequence.adapters = adapters
        try:
            with self._lock:
                sequence.reserve(len(ids))
                try:
                    return self._run([(sequence, ids)], rows, None, cancelled)
                finally:
                    self._under_way = None
        finally:
            sequence.close()

    def bytes_of(self, n: int, source: int | None = None) -> int:
        """What a sequence of n positions holds of the cache. source: see `CacheLayout.bytes_at`."""
        return self._layout.bytes_at(n, source) + 2 * self._layout.block_bytes

    @property
    def goes_anywhere(self) -> bool:
        """Can a sequence be cut after any position, as the model has no windows and no states?"""
        return not self._layout.block_bytes and not self._layout.has_windows

    def returns(self, n_past: int, n: int) -> bool:
        """Can a sequence that was saved at a position be cut after n?"""
        layout = self._layout
        chunk = n_past // R.STATE_ROWS * R.STATE_ROWS if layout.block_bytes else 0
        groups = range(len(layout.groups))
        return n >= chunk and all(layout.needed(i, n_past).start == layout.needed(i, n).start for i in groups)

    @property
    def context_bytes(self) -> int:
        """What it holds at the end of the context."""
        return self.bytes_of(self.context)

    @property
    def cache_bytes(self) -> int:
        """What sequences hold of the cache."""
        return sum(pool.used_bytes for pool in (*self._pools, self._blocks))

    def evaluate_together(self, sequences: Sequence[KVSequence], tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append one token to each of several sequences. Returns float32 [n, n_vocab]."""
        ids = self._checked(tokens)
        if len(ids) != len(sequences) or len({id(s) for s in sequences}) != len(sequences):
            raise ValueError("evaluate_together takes one token for each of several different sequences")
        out = rows_of(len(ids), self.width)
        for sequence in sequences:
            self._check_whole(sequence)
            if sequence.n_past >= self.context:
                raise ContextOverflow(
                    f"{sequence.n_past + 1} tokens do not fit into the context of {self.context} tokens"
                )
        for start in range(0, len(ids), self.batch):
            chosen = sequences[start : start + self.batch]
            with self._lock:
                for sequence in chosen:
                    sequence.reserve(1)
                parts = [(s, ids[start + i : start + i + 1]) for i, s in enumerate(chosen)]
                self._run(parts, range(len(chosen)), out[start : start + len(chosen)])
                for sequence in chosen:
                    sequence.advance(1)
        return out

    def memory(self) -> dict[str, int]:
        """Bytes in use: the weights (mapped from the file), the arena, and the pages of the cache."""
        seen = {
            id(value): value.nbytes
            for program in (self._program, self._encoder) if program
            for value in program.arrays()
        }
        if self._switched is not None:
            seen |= {id(array): array.nbytes for array in self._switched.arrays}
        cache = sum(pool.allocated * pool.page_bytes for pool in (*self._pools, self._blocks))
        larger = self._adapted or self._encoder  # the other one lies in its memory
        arena = max(program.arena.size for program in (self._program, larger) if program)
        arena += self._background.program.arena.size if self._background else 0
        return {"weights": sum(seen.values()), "arena": arena, "cache": cache}

    def close(self) -> None:
        """End the threads and let the memory go. Safe to call twice."""
        with self._lock:
            if self._team is None:
                return
            if self._owns_team:
                self._team.close()
            for pool in (*self._pools, self._blocks):
                pool.free.clear()
            # The program holds views of the mapped file, and the graph too.
            self._team = None
            self._adapted = self._switched = self._encoder = self._background = None
            self._files = {}
            del self._program, self._step, self._to_lower, self._kernels, self.graph

    def _check_open(self) -> None:
        if self._team is None:
            raise ValueError("this model is closed")

    def _check_whole(self, sequence: KVSequence) -> None:
        if sequence.n_past and not self.causal:
            raise ValueError("nothing can be appended to a text whose tokens all see each other")
        if self._encoder is not None and not sequence.source:
            raise ValueError("the model answers a text that it has read (it has an encoder): that is missing here")

    def _checked(self, tokens: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        ids = np.asarray(tokens, np.int64).reshape(-1)
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.n_vocab):
            raise ValueError(f"a token id is outside of the vocabulary of {self.n_vocab}")
        return ids

    def _run(
        self, parts: list[tuple[KVSequence, NDArray[np.int64]]], wanted: Sequence[int],
        out: NDArray[np.float32] | None = None, cancelled: Callable[[], bool] | None = None,
        inputs: NDArray[np.float32] | None = None, peaks: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:  # fmt: skip
        """One step over the rows of all parts; logits [len(wanted), n_vocab] of the rows wanted, in `out` if given, and
        their peaks, likewise. Leaves hidden states, if the graph has any, in `_hidden`."""
        self._check_open()
        self.check_not_stepping()
        self._stepping = (os.getpid(), threading.get_ident())
        try:
            return self._step_of(parts, wanted, out, cancelled, inputs, peaks)
        finally:
            self._stepping = None

    def check_not_stepping(self) -> None:
        """RuntimeError within a step of this very thread. There a handler of signals runs, and would write over what
        the step has computed, or wait for it for ever."""
        if self._stepping == (os.getpid(), threading.get_ident()):
            raise RuntimeError(
                "this model is computing in this very thread: who interrupts it, as a signal's handler does, may stop "
                "or close it, and not use it"
            )

    def _step_of(
        self, parts: list[tuple[KVSequence, NDArray[np.int64]]], wanted: Sequence[int],
        out: NDArray[np.float32] | None, cancelled: Callable[[], bool] | None, inputs: NDArray[np.float32] | None,
        peaks: NDArray[np.float32] | None,
    ) -> NDArray[np.float32]:  # fmt: skip
        """See `_run`."""
        for sequence, _ in parts:
            if sequence.source and not sequence.source_read:
                self._read_source(sequence, cancelled)
        step, program = self._step, self._program
        rows = step.fill(parts)
        if self._adapted is not None and any(sequence.adapters for sequence, _ in parts):
            assert self._switched is not None
            program = self._adapted
            self._switched.fill([(sequence.adapters, len(ids)) for sequence, ids in parts])
        for table in program.rope_tables:
            table.fill(int(step.positions[:rows].max()) + 1)
        if inputs is not None:
            program.inputs[:rows] = inputs
        if out is None:
            out = rows_of(len(wanted), self.width)
        self._hidden = hidden = np.empty(
            (rows if program.hidden_of_all_rows else len(wanted), program.hidden.shape[1]), np.float32
        )
        if rows == 1 and len(wanted) == 1:
            step.select(range(1))
            there = program.leave_logits(out, program.peaks[:1] if peaks is None else peaks)
            self._run_pieces(program, program.whole, rows, cancelled)
            if not there:
                out[0] = program.logits[0]
            hidden[:] = program.hidden[: len(hidden)]
            return out
        self._run_pieces(program, program.body, rows, cancelled, parts[0][0] if len(parts) == 1 else None)
        if program.hidden_of_all_rows:
            hidden[:] = program.hidden[:rows]
        for start in range(0, len(wanted), len(program.logits)):
            chosen = wanted[start : start + len(program.logits)]
            step.select(chosen)
            into = out[start : start + len(chosen)]
            highest = program.peaks[: len(chosen)] if peaks is None else peaks[start : start + len(chosen)]
            there = program.leave_logits(into, highest)
            self._run_pieces(program, program.head, len(chosen), cancelled)
            if not there:
                into[:] = program.logits[: len(chosen)]
            if not program.hidden_of_all_rows:
                hidden[start : start + len(chosen)] = program.hidden[: len(chosen)]
        return out

    def _read_source(self, sequence: KVSequence, cancelled: Callable[[], bool] | None) -> None:
        """Leave keys and values of what a sequence answers in the cache."""
        assert self._encoder is not None and sequence.n_past == 0
        ids = self._checked(sequence.source)
        try:
            sequence.reserve_source()
            rows = self._step.fill([(sequence, ids)])
            self._run_pieces(self._encoder, self._encoder.whole, rows, cancelled, sequence)
            sequence.keep_source()
        except BaseException:
            sequence.drop_source()
            raise
        finally:
            self._under_way = None

    def _run_pieces(
        self, program: Program, operations: NDArray[np.int64], rows: int, cancelled: Callable[[], bool] | None,
        sequence: KVSequence | None = None,
    ) -> None:  # fmt: skip
        """Run all operations, on that many rows. sequence: that whose next positions the rows are, for `progress`."""

        def check() -> None:
            if cancelled is not None and cancelled():
                raise GenerationCancelled("evaluation was cancelled")
            self.check_files()

        done = sequence.n_source_read + sequence.n_past if sequence is not None else 0
        # Of more rows than a batch has at most, which see each other, an attention alone can take long.
        long = program.attentions if rows > R.MAX_COLUMNS and operations is not program.head else frozenset[int]()
        self._pace.tiles.clear()  # those of the last step may have seen a shorter text
        for reached in run_pieces(self.team, program, operations, self._step.record, rows, self._pace, long, check):
            if sequence is not None:
                self._under_way = (sequence, done + rows * reached / len(operations))

    def check_files(self) -> None:
        """FormatError where a file of weights has been cut, or changed, since it was mapped."""
        for file in self._files.values():
            file.check()
