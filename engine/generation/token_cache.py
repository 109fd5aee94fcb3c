"""The KV cache of one sequence, with the tokens that it was computed from."""

from collections.abc import Callable, Sequence, Set
from typing import TYPE_CHECKING, Literal

import numpy as np

from qrun.engine.native.locks import ForkAwareLock

if TYPE_CHECKING:
    from qrun.engine.generation.adapters import Chosen
    from qrun.engine.program.kv_cache import KVSequence
    from qrun.engine.program.runtime import Runtime, Tap

# At how many ends of messages, the last ones, the state of a prompt is kept.
_MARKS = 2
_WORTH_MARK = 128  # tokens that a beginning has to have, for it to be kept because others begin so
_WORTH_WINDOW = 256  # tokens that are new where messages end, for what windows give back to be kept
_COMPARED = 256  # tokens at once


class TokenCache:
    """Moves a sequence from text to text, computing only what it does not hold.

    Whoever calls a method holds `lock`. `tokens` and the sequence agree whenever nobody does, even after an
    evaluation that was cancelled, interrupted or failed.
    """

    def __init__(
        self, runtime: "Runtime", sequence: "KVSequence", tokens: Sequence[int] = (), *, lasting: bool = False
    ) -> None:
        self.lock = ForkAwareLock("this session")
        self.tokens = list(tokens)
        self.sequence = sequence
        self.lasting = lasting
        """Whether several are to go on from here, so that none of them takes it away."""
        self.tap: Tap | None = None
        """Told of all that is evaluated, for draft layers."""
        self._runtime = runtime

    @property
    def n_free(self) -> int:
        """Positions of the context that are left."""
        return self._runtime.context - len(self.tokens)

    def advance_to(
        self, prompt: list[int], cancelled: Callable[[], bool], ends: Set[int] = frozenset(), alike: int = 0,
        marked: Callable[[], None] = lambda: None,
    ) -> tuple[np.ndarray, int]:  # fmt: skip
        """Hold exactly `prompt` (at least one token, at most the context). `ends` are tokens with which messages end:
        there, what follows is likely to change first, and a model with a state can only go back to where it was kept.
        alike: with how many of its tokens another prompt has begun, too. marked: called where it can be gone back to.

        Returns the logits after it, float32 [n_vocab], and how many of its tokens were held already. `cancelled` is
        asked ten times a second; if it says yes, GenerationCancelled is raised.
        """
        n_held = self.begin(prompt)
        for mark in self.marks(prompt, ends, alike):
            self._evaluate(prompt[len(self.tokens) : mark], "none", cancelled)
            self.sequence.mark()
            marked()
        logits = self._evaluate(prompt[len(self.tokens) :], "last", cancelled)
        self.sequence.mark()
        return logits, n_held

    def begin(self, prompt: list[int]) -> int:
        """Forget all that is no beginning of `prompt`, and its last token: logits are not kept. Returns how many tokens
        are held."""
        wanted = min(common_prefix(self.tokens, prompt), len(prompt) - 1)
        if wanted < len(self.tokens):
            # Sliding windows may have given back pages that the shorter text needs, and states are kept of some
            # positions only; then less is kept than wanted.
            del self.tokens[self.sequence.truncate(wanted) :]
        return len(self.tokens)

    def marks(self, prompt: list[int], ends: Set[int], alike: int = 0) -> list[int]:
        """Where in the part of a prompt that is not held something is to be kept to go back to: where messages end, the
        last few, and where it goes another way than one that has begun with `alike` tokens of it. For models that
        cannot get back to any position."""
        held = len(self.tokens)
        if not self.sequence.keeps_state and not self.sequence.has_windows:
            return []
        new = 1 if self.sequence.keeps_state else _WORTH_WINDOW
        found = {i for i in range(held + new, len(prompt)) if prompt[i - 1] in ends}
        marks = set(sorted(found)[-_MARKS:])
        if _WORTH_MARK <= alike < len(prompt) and alike > held:
            marks.add(alike)
        return sorted(marks)

    def forget(self) -> None:
        """Hold nothing, and answer nothing."""
        self.sequence.truncate(0)
        self.sequence.answer(())
        self.tokens.clear()

    def took(self, tokens: Sequence[int]) -> None:
        """The sequence has been given tokens by a step that others share."""
        self.tokens += tokens

    def become(self, other: "TokenCache", *, move: bool) -> None:
        """Hold what another cache holds, in place of what was held. move: the other is closed. Whoever calls holds both
        locks."""
        held, self.sequence = self.sequence, other.sequence if move else other.sequence.fork()
        self.tokens = list(other.tokens)
        held.close()
        if move:
            other.sequence, other.tokens = held, []

    def fork(self) -> "TokenCache":
        """Another one with the same tokens. The memory is shared until one of them writes."""
        return TokenCache(self._runtime, self.sequence.fork(), self.tokens)

    def snapshot(self) -> "TokenCache":
        """The same, to be gone on from by several."""
        return TokenCache(self._runtime, self.sequence.fork(), self.tokens, lasting=True)

    @property
    def adapters(self) -> "Chosen":
        """What changes the model for this text: see `KVSequence.adapters`."""
        return self.sequence.adapters

    @property
    def source(self) -> tuple[int, ...]:
        """What the text answers: see `KVSequence.source`."""
        return self.sequence.source

    @property
    def n_source_read(self) -> int:
        """How many tokens of the source need not be read any more."""
        return self.sequence.n_source_read

    def use(self, adapters: "Chosen", source: tuple[int, ...] = ()) -> None:
        """Change the model by these, and answer this, from now on; what was computed otherwise is forgotten."""
        if adapters != self.sequence.adapters:
            self.forget()
            self.sequence.adapters = adapters
        if source != self.source:
            self.forget()
            self.sequence.answer(source)

    def close(self) -> None:
        """Give the memory back."""
        self.sequence.close()
        self.tokens.clear()

    def peaks_of(self, logits: np.ndarray) -> np.ndarray | None:
        """What is known of logits that were just computed: see `Runtime.peaks_of`."""
        return self._runtime.peaks_of(logits)

    @property
    def n_computed(self) -> int:
        """How many tokens have been computed, with those of the source, also while another thread evaluates."""
        return self._runtime.progress(self.sequence)

    def advance(self, token: int, cancelled: Callable[[], bool]) -> np.ndarray:
        """Hold one more token; returns the logits after it, float32 [n_vocab]. `cancelled` as for `advance_to`."""
        return self._evaluate([token], "last", cancelled)

    @property
    def room_for_guesses(self) -> int:
        """How many guesses `advance_with` can take."""
        return min(self.sequence.returnable(), self._runtime.batch - 1)

    def returnable_after(self, n: int) -> int:
        """How many tokens can follow the first `n` so that `advance_to` still gets back to just after them."""
        return self.sequence.returnable(n)

    def advance_with(self, token: int, guesses: list[int], wanted: Literal["last", "all"] = "all") -> np.ndarray:
        """Hold one more token and, until `take_back`, guesses of what follows; returns the logits after each of them,
        float32 [1 + guesses, n_vocab], or after the last one, [1, n_vocab]."""
        logits = self._evaluate([token, *guesses], wanted, None)
        return logits if wanted == "all" else logits[np.newaxis]

    def take_back(self, count: int) -> None:
        """Forget the last `count` guesses."""
        if count:
            kept = self.sequence.truncate(len(self.tokens) - count)
            assert kept == len(self.tokens) - count, "more guesses than there was room for"
            del self.tokens[kept:]

    def _evaluate(
        self, tokens: list[int], wanted: Literal["none", "last", "all"], cancelled: Callable[[], bool] | None
    ) -> np.ndarray:
        before = self.sequence.n_past
        try:
            if self.tap is None:
                logits = self._runtime.evaluate(self.sequence, tokens, wanted, cancelled)
            else:
                logits = self._runtime.evaluate(self.sequence, tokens, wanted, cancelled, tap=self.tap)
        finally:
            self.tokens += tokens[: self.sequence.n_past - before]
        return np.empty(0, np.float32) if logits is None else logits


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common from the start."""
    shorter = min(len(a), len(b))
    start = 0
    while start < shorter and a[start : start + _COMPARED] == b[start : start + _COMPARED]:
        start += _COMPARED
    return next((i for i in range(start, shorter) if a[i] != b[i]), shorter)
