"""The loop from a prompt to a text: evaluate, sample, stream, and know when to end."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from qrun.engine.errors import GenerationCancelled
from qrun.engine.generation.lookup import Lookup
from qrun.engine.native.locks import ForkAwareLock
from qrun.engine.sampling.sampler import Sampler
from qrun.engine.text.stop_strings import StopStrings

if TYPE_CHECKING:
    from qrun.engine.generation.token_cache import TokenCache
    from qrun.engine.text.tokenizer import Tokenizer


class Piece(str):
    """Text of one generated token, as far as it can be shown yet.

    It is "" while the token only begins a character, or what may become a stop string; the piece that completes it
    has it all. All pieces joined are the text of the generation.
    """

    token: int | None
    """The token; None for text that was held back until the end and that no token is left for."""
    logprob: float | None
    """Natural logarithm of the token's probability, by the model's logits as they came; None with `logprobs` off."""

    def __new__(cls, text: str, token: int | None = None, logprob: float | None = None) -> Self:
        piece = super().__new__(cls, text)
        piece.token = token
        piece.logprob = logprob
        return piece


@dataclass(frozen=True)
class GenerationStats:
    """What a generation did, and how long it took, without the time that its consumer took between pieces."""

    prompt_tokens: int
    """Tokens of the prompt, cached ones included; those of a text that `on_full` shortened count again."""
    cached_tokens: int
    """Tokens of the prompt that did not have to be evaluated, because the session held them."""
    prompt_seconds: float
    """Evaluation of the prompt's other tokens."""
    generated_tokens: int
    """Tokens sampled; one that ends the generation counts, though it has no piece."""
    generate_seconds: float
    """Evaluation of generated tokens and sampling, after the first token."""
    first_token_seconds: float
    """From the start until the first token was sampled."""

    @property
    def prompt_tokens_per_second(self) -> float:
        """Evaluated tokens of the prompt over time; 0 if nothing was measured."""
        return (self.prompt_tokens - self.cached_tokens) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generated_tokens_per_second(self) -> float:
        """Tokens after the first over the time that they took; 0 for a generation of fewer than two."""
        return max(self.generated_tokens - 1, 0) / self.generate_seconds if self.generate_seconds else 0.0


class Generation(Iterator[Piece]):
    """Pieces of text, each computed when it is asked for. Made by `Session.generate`.

    The prompt is evaluated with the first piece. `text` and `tokens` grow with the pieces; `stop_reason` is None until
    the end, then one of these. One thread at a time may ask for a piece: RuntimeError if two do.
      "stop"       the model ended its turn, or a stop string came up
      "length"     `max_tokens` were generated
      "context"    the context is full, and there is no `on_full` that makes room
      "cancelled"  `cancel` or `Session.stop` was called, the session was put to another use, or an error ended it
    """

    def __init__(
        self,
        session: object,
        cache: "TokenCache",
        prompt: list[int],
        sampler: Sampler,
        tokenizer: "Tokenizer | None",
        on_full: Callable[[list[int]], list[int] | None] | None = None,
    ) -> None:
        self.session = session
        """Whose generation it is: a session lives as long as its generations."""
        self.text = ""
        self.tokens: list[int] = []
        self.stop_reason: str | None = None
        self.seed = sampler.seed
        self._cache = cache
        self._prompt = prompt
        self._max_tokens = sampler.options.max_tokens
        self._sampler = sampler
        self._stop_ids = tokenizer.stop_ids if tokenizer else frozenset[int]()
        self._decoder = tokenizer.stream(skip_special=True, after=prompt[-1:]) if tokenizer else None
        self._stop_strings = StopStrings(sampler.options.stop)
        self._lookup = Lookup(prompt) if sampler.options.lookup else None
        self._sampled: deque[tuple[int, float | None, int]] = deque()
        """Tokens without a piece yet, each with its log probability and the positions left before it."""
        self._cancelled = False
        self._reading = ForkAwareLock("this generation")
        self._on_full = on_full
        self._full = False
        """Whether the context has no room for the last token, so that `on_full` is to make some."""
        self._started = False
        """Whether the cache holds the prompt."""
        self._n_prompt = len(prompt)
        self._n_cached = 0
        self._n_sampled = 0
        self._prompt_seconds = self._first_token_seconds = self._generate_seconds = 0.0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        if not self._reading.acquire(blocking=False):
            raise RuntimeError("this generation is being read by another thread")
        try:
            if self.stop_reason is not None:
                raise StopIteration
            try:
                piece = self._next_piece()
            except BaseException:
                self.stop_reason = "cancelled"
                raise
            if piece is None:
                raise StopIteration
            self.text += piece
            return piece
        finally:
            self._reading.release()

    def cancel(self) -> None:
        """End as soon as possible, from any thread: after the token under way, or within a tenth of a second."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    @property
    def prompt_progress(self) -> tuple[int, int]:
        """Tokens of the prompt that the session holds, and all of them. It grows while another thread evaluates.
        A text that `on_full` shortened takes the prompt's place."""
        return min(self._cache.n_computed, len(self._prompt)), len(self._prompt)

    @property
    def stats(self) -> GenerationStats:
        """Counts and times so far."""
        return GenerationStats(
            prompt_tokens=self._n_prompt,
            cached_tokens=self._n_cached,
            prompt_seconds=self._prompt_seconds,
            generated_tokens=self._n_sampled,
            generate_seconds=self._generate_seconds,
            first_token_seconds=self._first_token_seconds,
        )

    def _next_piece(self) -> Piece | None:
        """The next piece; None, with the stop reason set, if there is none."""
        start, read_before = time.perf_counter(), self._prompt_seconds
        if not self._sampled:
            if self._full and not self.cancelled and not self._make_room():
                return self._last_piece("context")
            with self._cache.lock:
                self._sample()
        if self.cancelled:
            return self._last_piece("cancelled")
        if self._max_tokens == 0:
            return self._last_piece("length")
        token, logprob, n_free = self._sampled.popleft()
        self._n_sampled += 1
        piece = self._piece(token, logprob, n_free)
        seconds = time.perf_counter() - start
        if self._n_sampled == 1:
            self._first_token_seconds = seconds
        else:
            self._generate_seconds += seconds - (self._prompt_seconds - read_before)
        return piece

    def _make_room(self) -> bool:
        """Have `on_full` shorten the text, which is read again with the next piece; False if it ends here."""
        assert self._on_full is not None
        shorter = self._on_full([*self._cache.tokens, self.tokens[-1]])
        if shorter is None:
            return False
        self._prompt = shorter
        self._n_prompt += len(shorter)
        self._started = self._full = False
        return True

    def _sample(self) -> None:
        """Evaluate, and sample at least one token, unless the generation is cancelled or wants none.

        All under the lock: the logits may lie where the next evaluation will write.
        """
        if self.cancelled:
            return
        if self._lookup is not None and self._started and (guesses := self._guesses(self._lookup)):
            self._sample_with(guesses, self._lookup)
            return
        start = time.perf_counter()
        prompt_done = self._started
        logits = self._next_logits()
        if logits is None or self.cancelled or self._max_tokens == 0:
            return
        self._choose(logits, self._cache.n_free)
        if self._lookup is not None and prompt_done:
            self._lookup.learn(0, 0, time.perf_counter() - start)

    def _choose(self, logits: np.ndarray, n_free: int) -> int:
        token, logprob = self._sampler.sample(logits[: self._sampler.n_vocab])
        self._sampler.accept(token)
        if self._lookup is not None:
            self._lookup.push(token)
        self._sampled.append((token, logprob, n_free))
        return token

    def _guesses(self, lookup: Lookup) -> list[int]:
        room = self._cache.room_for_guesses
        if self._max_tokens is not None:
            room = min(room, self._max_tokens - len(self.tokens) - 1)
        return lookup.guess(room)

    def _sample_with(self, guesses: list[int], lookup: Lookup) -> None:
        """Evaluate the guesses together with the last token; sample until a token is not the one guessed."""
        start = time.perf_counter()
        n_free = self._cache.n_free - 1
        rows = self._cache.advance_with(self.tokens[-1], guesses)
        n_right = 0
        try:
            for i, row in enumerate(rows):
                token = self._choose(row, n_free - i)
                if i == len(guesses) or token != guesses[i] or token in self._stop_ids:
                    break
                n_right += 1
        finally:
            self._cache.take_back(len(guesses) - n_right)
        lookup.learn(len(guesses), n_right, time.perf_counter() - start)

    def _next_logits(self) -> np.ndarray | None:
        """Logits after all tokens so far; None if the evaluation was cancelled."""
        with suppress(GenerationCancelled):
            if self._started:
                return self._cache.advance(self.tokens[-1], lambda: self._cancelled)
            self._started = True
            start = time.perf_counter()
            try:
                logits, n_cached = self._cache.advance_to(self._prompt, lambda: self._cancelled, self._stop_ids)
                self._n_cached += n_cached
            finally:
                self._prompt_seconds += time.perf_counter() - start
            return logits
        return None

    def _piece(self, token: int, logprob: float | None, n_free: int) -> Piece | None:
        """The piece of a sampled token, with which the generation may end. `n_free` positions are left before it."""
        if token in self._stop_ids:
            return self._last_piece("stop")
        self.tokens.append(token)
        text = self._stop_strings.push(self._decoder.push(token)) if self._decoder else ""
        if self._stop_strings.found:
            self.stop_reason = "stop"
        elif self._max_tokens is not None and len(self.tokens) >= self._max_tokens:
            text += self._held_back("length")
        elif n_free == 0 and self._on_full is not None:
            self._full = True
        elif n_free == 0:
            text += self._held_back("context")
        return Piece(text, token, logprob)

    def _last_piece(self, reason: str) -> Piece | None:
        text = self._held_back(reason)
        return Piece(text) if text else None

    def _held_back(self, reason: str) -> str:
        """Ends the generation; returns the text that was held back, which no stop string claims any more."""
        self.stop_reason = reason
        # A character that was cut in the middle shows as U+FFFD, as it does in Tokenizer.decode, but someone who
        # stops a generation did not ask for its broken end.
        rest = self._decoder.flush() if self._decoder and reason != "cancelled" else ""
        text = self._stop_strings.push(rest)
        if self._stop_strings.found:
            self.stop_reason = "stop"
            return text
        return text + self._stop_strings.flush()
