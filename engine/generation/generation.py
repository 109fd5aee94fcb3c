"""The loop from a prompt to a text: evaluate, sample, stream, and know when to end."""

import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence, Set
from contextlib import suppress
from itertools import groupby
from typing import TYPE_CHECKING, Literal, Self

import numpy as np

from qrun.engine.errors import GenerationCancelled, OfThisProcess
from qrun.engine.generation.guesses import Guesser
from qrun.engine.generation.guide import Guide, Rules
from qrun.engine.generation.lookup import Lookup
from qrun.engine.generation.piece import Piece, Sampled
from qrun.engine.native.locks import ForkAwareLock
from qrun.engine.sampling.sampler import Sampler
from qrun.engine.text.response_formats import Channel
from qrun.engine.text.stop_strings import StopStrings
from qrun.formats.dataclass import dataclass

if TYPE_CHECKING:
    from qrun.engine.generation.adapters import Chosen
    from qrun.engine.generation.scheduler import Scheduler, Sink, Task
    from qrun.engine.generation.token_cache import TokenCache
    from qrun.engine.text.response_parser import ResponseParser
    from qrun.engine.text.tokenizer import Tokenizer
    from qrun.engine.text.tool_calls import ToolCall

# Pieces that are computed before anybody asks for them, where several generations share steps: so that a step need not
# wait for readers.
_AHEAD = 2


# In the place of a token: the text is complete.
_END = -1
_CERTAIN = Lookup(())  # in the place of a guesser, and never asked: tokens that are known beforehand


class _OthersCame(Exception):
    """A generation is not alone any more."""


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
    guessed_tokens: int = 0
    """Guesses of a lookup or a draft that were checked."""
    accepted_tokens: int = 0
    """Those of them that were right."""
    reasoning_tokens: int = 0
    """Generated tokens of thoughts."""
    forced_tokens: int = 0
    """Generated tokens that the model did not choose: a grammar left no choice, or `reasoning_budget` ended a
    thought."""

    @property
    def prompt_tokens_per_second(self) -> float:
        """Evaluated tokens of the prompt over time; 0 if nothing was measured."""
        return (self.prompt_tokens - self.cached_tokens) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generated_tokens_per_second(self) -> float:
        """Tokens after the first over the time that they took; 0 for a generation of fewer than two."""
        return max(self.generated_tokens - 1, 0) / self.generate_seconds if self.generate_seconds else 0.0


class Generation(OfThisProcess, Iterator[Piece]):
    """Pieces of text, each computed when it is asked for. Made by `Session.generate`.

    The prompt is evaluated with the first piece. `text` (the answer), `reasoning` (what the model thought before it)
    and `tokens` (of all) grow with the pieces; `stop_reason` is None until the end, then one of these. One thread at a
    time may ask for a piece: RuntimeError if two do.
      "stop"       the model ended its turn, or a stop string came up
      "length"     `max_tokens` were generated
      "context"    the context is full, and there is no `on_full` that makes room
      "cancelled"  `cancel` or `Session.stop` was called, the session was put to another use, or an error ended it
    """

    fills_in = False
    """Whether the text comes by diffusion; `prompt_progress` then counts steps."""

    def __init__(
        self,
        session: object,
        cache: "TokenCache",
        prompt: list[int],
        sampler: Sampler,
        tokenizer: "Tokenizer | None",
        on_full: Callable[[list[int]], list[int] | None] | None = None,
        guessers: Sequence[Guesser] = (),
        response: "ResponseParser | None" = None,
        scheduler: "Scheduler | None" = None,
        rules: "Rules | None" = None,
        begun: str = "",
        adapters: "Chosen" = (),
        source: tuple[int, ...] = (),
    ) -> None:
        self.session = session
        """Whose generation it is: a session lives as long as its generations."""
        self.text = ""
        self.reasoning = ""
        self.tokens: list[int] = []
        self.seed = sampler.seed
        """The seed that the tokens are chosen with: the one that was given, or a new one."""
        self._cache = cache
        self._adapters = adapters
        self._source = source
        self._prompt = prompt
        self._max_tokens = sampler.options.max_tokens
        self._sampler = sampler
        self._stop_ids = tokenizer.stop_ids if tokenizer else frozenset[int]()
        self._decoder = tokenizer.stream(skip_special=True, after=prompt[-1:]) if tokenizer else None
        self._stop_strings = StopStrings(sampler.options.stop)
        self._guessers = guessers
        """They know the prompt. The first that has guesses is asked only."""
        self._tokenizer = tokenizer
        self._response = response if tokenizer else None
        self._marks = _special_marks(tokenizer, response) if tokenizer and response else {}
        self._guide = Guide(rules, tokenizer, response, self._marks, prompt) if rules and tokenizer else None
        if begun and self._guide is not None:
            self._guide.begin(begun)
        if begun and self._response is not None:
            self._response.begin(begun)
        self._ready: deque[Piece] = deque()
        """Pieces that came with the one before them."""
        self._forced: deque[int] = deque()
        """Tokens that come next, whatever the model would choose."""
        self._n_forced = 0
        self._budget = sampler.options.reasoning_budget
        self._n_reasoning = 0
        self._sampled: deque[Sampled] = deque()
        """Tokens without a piece yet."""
        self._cancelled = False
        self._reason: str | None = None
        self.when_over: Callable[[], object] | None = None
        """Called once when the generation has ended, by the thread in which it did."""
        self._scheduler = scheduler
        self._task: Task | None = None
        """Set once the scheduler computes the pieces."""
        self._reading = ForkAwareLock("this generation")
        self._is_read = False
        self._on_full = on_full
        self._full = False
        """Whether the context has no room for the last token, so that `on_full` is to make some."""
        self._started = False
        """Whether the cache holds the prompt."""
        self._n_prompt = len(source) + len(prompt)
        self._n_cached = 0
        self._n_sampled = 0
        self._n_guessed = self._n_accepted = 0
        self._prompt_seconds = self._first_token_seconds = self._generate_seconds = 0.0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        if not self._reading.acquire(blocking=False):
            raise RuntimeError("this generation is being read by another thread")
        if self._is_read:
            self._reading.release()
            raise RuntimeError("this generation is being read by what has been interrupted, as by a signal")
        self._is_read = True
        try:
            piece = self._read()
            if self._reason is not None and (self._task is None or not self._task.held):
                self._end()
            if piece is None:
                raise StopIteration
            self._count(piece)
            return piece
        finally:
            self._is_read = False
            self._reading.release()

    def _read(self) -> Piece | None:
        """The next piece: from the scheduler where others generate at the same time, else computed here."""
        scheduler = self._scheduler
        fresh = self._task is None and self._reason is None and not self._ready
        if scheduler is not None and fresh and self._can_share and scheduler.shared(self):
            self._task = scheduler.add(self, ahead=_AHEAD)
        if self._task is not None:
            return self._task.read()
        if self._ready:
            return self._ready.popleft()
        if self._reason is not None:
            return None
        try:
            return self._next_piece()
        except _OthersCame:
            assert scheduler is not None
            self._task = scheduler.add(self, ahead=_AHEAD)
            return self._task.read()
        except BaseException:
            self._reason = "cancelled"
            raise

    def _end(self) -> None:
        """All has been computed."""
        when_over, self.when_over = self.when_over, None
        if when_over is not None:
            when_over()

    def start(self, sink: "Sink") -> None:
        """Have all pieces computed, whether or not anybody asks, and handed to `sink` by the thread that computes them.

        In the place of iterating. ValueError for a generation that was begun, or that another thread cannot compute:
        one with `on_full`, or of a session with a draft.
        """
        if self._scheduler is None or not self._can_share:
            raise ValueError("this generation can only be computed by the thread that asks for its pieces")
        if self._task is not None or self._started:
            raise ValueError("this generation has begun")
        self._task = self._scheduler.add(self, sink=sink)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """The pieces, for asyncio. When the task that waits for one is cancelled, so is the generation."""
        from qrun.engine.generation.asynchronous import pieces

        async for piece in pieces(self):
            yield piece

    def _count(self, piece: Piece) -> None:
        """A piece goes to whoever reads."""
        if piece.channel == "content":
            self.text += piece
        elif piece.channel == "reasoning":
            self.reasoning += piece

    @property
    def stop_reason(self) -> str | None:
        """Why the generation ended; None before its last piece has been read. See above."""
        return None if self._task is not None and self._task.unread else self._reason

    def cancel(self) -> None:
        """End as soon as possible, from any thread: after the token under way, or within a tenth of a second."""
        self._cancelled = True
        if self._task is not None:
            self._task.wake()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    @property
    def stop_string(self) -> str | None:
        """The one of `stop` that ended the text; None if none did."""
        return self._stop_strings.found

    @property
    def tool_calls(self) -> "list[ToolCall]":
        """The calls of functions that have been read, with their names and arguments; see `Model.chat`."""
        return self._response.calls if self._response else []

    @property
    def prompt_progress(self) -> tuple[int, int]:
        """Tokens of the prompt that the session holds, and all of them. It grows while another thread evaluates.
        A text that `on_full` shortened takes the prompt's place."""
        total = len(self._source) + len(self._prompt)
        return min(self._cache.n_computed, total), total

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
            guessed_tokens=self._n_guessed,
            accepted_tokens=self._n_accepted,
            reasoning_tokens=self._n_reasoning,
            forced_tokens=self._n_forced,
        )

    def _next_piece(self) -> Piece | None:
        """The next piece; None, with the stop reason set, if there is none."""
        start, read_before = time.perf_counter(), self._prompt_seconds
        if not self._sampled:
            if self._full and not self.cancelled and not self._make_room():
                return self._last_piece("context")
            with self._cache.lock:
                self._sample()
        piece = self._take_piece()
        seconds = time.perf_counter() - start
        if self._n_sampled == 1:
            self._first_token_seconds = seconds
        elif self._n_sampled > 1:
            self._generate_seconds += seconds - (self._prompt_seconds - read_before)
        return piece

    def _take_piece(self) -> Piece | None:
        """The piece of a token that has been sampled."""
        if self.cancelled:
            return self._last_piece("cancelled")
        if self._max_tokens == 0:
            return self._last_piece("length")
        sampled = self._sampled.popleft()
        self._n_sampled += sampled.token != _END
        return self._piece(sampled)

    # For the scheduler, which holds the cache's lock

    @property
    def _can_share(self) -> bool:
        """Can its rows be computed together with those of others?"""
        alone = self._on_full is not None or self._cache.tap is not None
        return not alone and all(isinstance(guesser, Lookup) for guesser in self._guessers)

    def _next_rows(self) -> tuple[list[int], Guesser | None]:
        """The tokens to evaluate after the prompt: the last, and guesses; and whose these are."""
        guesser, guesses = self._guesses()
        return [self.tokens[-1], *guesses], guesser

    def _wanted(self, guesser: Guesser | None) -> Literal["last", "all"]:
        """Which of these rows' logits are wanted. What is known beforehand is not chosen by any."""
        told = self._guide is not None and self._sampler.options.logprobs
        return "all" if guesser is not None and (guesser is not _CERTAIN or told) else "last"

    def _begin_prompt(self, n_cached: int) -> None:
        """The prompt is being read, of which so many tokens were held."""
        if not self._started:  # else its memory was wanted in between
            self._n_cached = n_cached

    def _take_prompt(self, logits: np.ndarray, seconds: float) -> None:
        """The prompt has been evaluated; `logits` [n_vocab] follow it. seconds: since the generation began."""
        again = self._started  # its memory was wanted in between
        self._started = True
        if not again:
            self._prompt_seconds = seconds
        if self._max_tokens != 0:
            self._choose(logits, self._cache.n_free)
            if not again:
                self._first_token_seconds = seconds

    def _take_rows(self, rows: np.ndarray, tokens: list[int], guesser: Guesser | None, seconds: float) -> None:
        """`tokens` of `_next_rows` have been evaluated, in so many seconds; `rows` are the logits after each, or
        after the last one, as `_wanted` has it."""
        self._generate_seconds += seconds
        if guesser is not None:
            self._accept(rows, tokens[1:], guesser, seconds)
            return
        self._choose(rows[0], self._cache.n_free)
        for one in self._guessers:
            one.learn(0, 0, seconds)

    def _drain(self) -> list[Piece]:
        """The pieces of all that has been sampled; of a cancelled generation, the last."""
        pieces: list[Piece] = []
        while self._ready or (self._reason is None and (self._sampled or self.cancelled or self._max_tokens == 0)):
            piece = self._ready.popleft() if self._ready else self._take_piece()
            if piece is None:
                break
            pieces.append(piece)
        return pieces

    def _make_room(self) -> bool:
        """Have `on_full` shorten the text, which is read again with the next piece; False if it ends here."""
        assert self._on_full is not None
        shorter = self._on_full([*self._cache.tokens, self.tokens[-1]])
        if shorter is None:
            return False
        self._prompt = shorter
        for guesser in self._guessers:
            guesser.restart(shorter)
        self._n_prompt += len(shorter)
        self._started = self._full = False
        return True

    def _sample(self) -> None:
        """Evaluate, and sample at least one token, unless the generation is cancelled or wants none.

        All under the lock: the logits may lie where the next evaluation will write.
        """
        if self.cancelled:
            return
        guesser, guesses = self._guesses()
        if self.cancelled:
            return
        if guesser is not None:
            self._sample_with(guesses, guesser)
            return
        start = time.perf_counter()
        prompt_done = self._started
        logits = self._next_logits()
        if logits is None or self.cancelled or self._max_tokens == 0:
            return
        self._choose(logits, self._cache.n_free)
        if prompt_done:
            for guesser in self._guessers:
                guesser.learn(0, 0, time.perf_counter() - start)

    def _choose(self, logits: np.ndarray | None, n_free: int) -> int:
        """The next token, by the logits after those before it; None for one that is known, where nobody wants to hear
        how likely it was."""
        guide = self._guide
        if logits is not None:
            logits = logits[: self._sampler.n_vocab]
        if guide is not None and guide.over:  # the prompt has all of it
            self._sampled.append(Sampled(_END, None, None, n_free))
            return _END
        if guide is not None and not self._forced:
            self._forced.extend(guide.forced())
        if self._forced:
            token = self._forced.popleft()
            logprob = self._sampler.logprob(logits, token) if guide is not None and logits is not None else None
            sampled = Sampled(token, logprob, None, n_free)
            self._n_forced += 1
        elif logits is None:
            raise AssertionError("the logits of a token that is not known are missing")
        elif guide is None:
            token, logprob = self._sampler.sample(logits, None, self._banned(), self._cache.peaks_of(logits))
            sampled = Sampled(token, logprob, self._sampler.top, n_free)
        else:
            chosen, logprob = self._sample_allowed(logits, guide)
            token, *rest = guide.settled(chosen)
            if token != chosen:
                logprob = self._sampler.logprob(logits, token)
            sampled = Sampled(token, logprob, self._sampler.top, n_free)
            self._forced.extend(rest)
        self._sampler.accept(token)
        for guesser in self._guessers:
            guesser.push(token)
        self._sampled.append(sampled)
        if guide is not None:
            guide.accept(token)
            if guide.over:
                self._sampled.append(Sampled(_END, None, None, n_free))
            elif not self._forced:
                self._forced.extend(guide.forced())
        return token

    def _sample_allowed(self, logits: np.ndarray, guide: Guide) -> tuple[int, float | None]:
        """The next token of those that the grammar allows, where it leaves a choice."""
        banned, peaks = self._banned(), self._cache.peaks_of(logits)
        if self._sampler.greedy:  # to ask about the likeliest token takes far less than to ask for all that are allowed
            token, logprob = self._sampler.sample(logits, None, banned, peaks)
            if guide.allows(token):
                return token, logprob
        asked = not banned and guide.constrains
        if asked and (found := self._sampler.sample_asking(logits, guide.allowed_of, peaks)) is not None:
            return found
        allowed = guide.allowed()
        if banned and allowed is not None and not any_but(allowed, banned):
            banned = frozenset()  # the grammar has come to its end
        return self._sampler.sample(logits, allowed, banned, peaks)

    def _banned(self) -> frozenset[int]:
        """Tokens that would end the text, where it may not end yet."""
        options = self._sampler.options
        too_early = options.ignore_eos or len(self.tokens) + len(self._sampled) < options.min_tokens
        return self._stop_ids if too_early else frozenset()

    def _guesses(self) -> tuple[Guesser | None, list[int]]:
        """Guesses, and whose they are, if anybody has any."""
        if (self._guessers or self._forced) and self._started:
            room = self._cache.room_for_guesses
            if self._max_tokens is not None:
                room = min(room, self._max_tokens - len(self.tokens) - 1)
            if self._forced:
                known = list(self._forced)[: max(room, 0)]
                return (_CERTAIN, known) if known else (None, [])
            if self._budget is not None and self._response and self._response.channel == "reasoning":
                room = min(room, self._budget - self._n_reasoning - 1)
            with suppress(GenerationCancelled):
                for guesser in self._guessers:
                    if guesses := guesser.guess(room, lambda: self._cancelled):
                        if self._guide is not None:
                            guesses = self._guide.valid(guesses)
                        return (guesser, guesses) if guesses else (None, [])
        return None, []

    def _sample_with(self, guesses: list[int], guesser: Guesser) -> None:
        """Evaluate the guesses together with the last token; sample until a token is not the one guessed."""
        start = time.perf_counter()
        rows = self._cache.advance_with(self.tokens[-1], guesses, self._wanted(guesser))
        self._accept(rows, guesses, guesser, start=start)

    def _accept(
        self, rows: np.ndarray, guesses: list[int], guesser: Guesser, seconds: float = 0.0, start: float | None = None
    ) -> None:
        """Sample from the rows after the last token and its guesses, or the one after the last of them, until a token
        is not the one guessed. start: when that began, in place of how long the rows took."""
        n_free = self._cache.n_free + len(guesses)
        n_right = 0
        missing = 1 + len(guesses) - len(rows)
        try:
            for i in range(1 + len(guesses)):
                token = self._choose(rows[i - missing] if i >= missing else None, n_free - i)
                if i == len(guesses) or token != guesses[i] or token in self._stop_ids:
                    break
                if self._sampled[-1].token == _END:
                    break
                n_right += 1
        finally:
            self._cache.take_back(len(guesses) - n_right)
        if guesser is _CERTAIN:
            return
        self._n_guessed += len(guesses)
        self._n_accepted += n_right
        guesser.learn(len(guesses), n_right, seconds if start is None else time.perf_counter() - start)

    def _next_logits(self) -> np.ndarray | None:
        """Logits after all tokens so far; None if the evaluation was cancelled. Raises _OthersCame where the prompt had
        better be read in steps that others share."""
        if self._started:
            with suppress(GenerationCancelled):
                return self._cache.advance(self.tokens[-1], lambda: self._cancelled)
            return None
        scheduler = self._scheduler if self._can_share else None
        start = time.perf_counter()
        alike = 0
        self._cache.use(self._adapters, self._source)
        if scheduler is not None:
            known = scheduler.prefixes.fetch(self._cache, self._prompt, self._adapters)
            alike = max(known, scheduler.prefixes.adopt(self._cache, self._prompt))
        n_before = self._n_cached
        self._n_cached += self._cache.n_source_read + self._cache.begin(self._prompt)
        try:
            logits, _ = self._cache.advance_to(
                self._prompt, lambda: self._cancelled or (scheduler is not None and scheduler.busy), self._stop_ids,
                alike, self._marked,
            )  # fmt: skip
        except GenerationCancelled:
            self._prompt_seconds += time.perf_counter() - start
            if self._cancelled:
                return None
            self._n_cached = n_before
            raise _OthersCame from None
        self._started = True
        self._prompt_seconds += time.perf_counter() - start
        return logits

    def _marked(self) -> None:
        """The prompt has been read to where others may go on from."""
        if self._scheduler is not None:
            self._scheduler.prefixes.snapshot(self._cache)

    def _piece(self, sampled: Sampled) -> Piece | None:
        """The piece of a token, with which the generation may end."""
        token, n_free = sampled.token, sampled.n_free
        if token in self._stop_ids or token == _END:
            return self._last_piece("stop")
        self.tokens.append(token)
        texts = self._split(self._decoder.push(token) + self._marks.get(token, "")) if self._decoder else []
        if self._stop_strings.found:
            self._reason = "stop"
        elif self._sampled and self._sampled[0].token == _END:
            texts += self._held_back("stop")
        elif self._max_tokens is not None and len(self.tokens) >= self._max_tokens:
            texts += self._held_back("length")
        elif n_free == 0 and self._on_full is not None:
            self._full = True
        elif n_free == 0:
            texts += self._held_back("context")
        self._count_reasoning()
        return self._joined(texts, sampled) or _carrying(sampled, "", self._channel)

    def _last_piece(self, reason: str) -> Piece | None:
        return self._joined(self._held_back(reason))

    def _joined(self, texts: list[tuple[Channel, str]], sampled: Sampled | None = None) -> Piece | None:
        """The first of the pieces that these make, None if there are none; the others follow. What is of one channel is
        one piece. The first carries the token."""
        for channel, group in groupby(texts, key=lambda text: text[0]):
            if text := "".join(text for _, text in group):
                self._ready.append(_carrying(sampled, text, channel) if sampled else Piece(text, channel=channel))
                sampled = None
        return self._ready.popleft() if self._ready else None

    @property
    def _channel(self) -> Channel:
        return self._response.channel if self._response else "content"

    def _count_reasoning(self) -> None:
        """Counts a token of a thought, and ends one that has become too long."""
        response = self._response
        if response is None or response.channel != "reasoning":
            return
        self._n_reasoning += 1
        if self._budget is None or self._n_reasoning < self._budget or self._forced or self._reason is not None:
            return
        assert self._tokenizer is not None
        self._forced.extend(self._tokenizer.encode(response.closing, add_special=False, parse_special=True))

    def _split(self, text: str) -> list[tuple[Channel, str]]:
        """More text, by what it is, as far as that is known. Stop strings are looked for in the answer alone: who gives
        one means the answer's end, and what a model thinks may well have it before there is an answer."""
        return self._up_to_stop(self._response.push(text) if self._response else [("content", text)])

    def _up_to_stop(self, split: list[tuple[Channel, str]]) -> list[tuple[Channel, str]]:
        texts: list[tuple[Channel, str]] = []
        for channel, text in split:
            if channel == "content" and len(self.tokens) < self._sampler.options.min_tokens:
                texts.append((channel, text))
            elif channel == "content":
                texts.append((channel, self._stop_strings.push(text)))
            else:
                texts += [("content", self._stop_strings.flush()), (channel, text)]
            if self._stop_strings.found:
                break
        return texts

    def _held_back(self, reason: str) -> list[tuple[Channel, str]]:
        """Ends the generation; returns the text that was held back, which no stop string claims any more."""
        self._reason = reason
        # A character that was cut in the middle shows as U+FFFD, as it does in Tokenizer.decode, but someone who
        # stops a generation did not ask for its broken end.
        rest = self._decoder.flush() if self._decoder and reason != "cancelled" else ""
        texts = self._split(rest)
        if self._response and not self._stop_strings.found:
            texts += self._up_to_stop(self._response.finish())
        if self._stop_strings.found:
            self._reason = "stop"
            return texts
        return [*texts, ("content", self._stop_strings.flush())]


def any_but(allowed: np.ndarray, tokens: Set[int]) -> bool:
    """Does a mask as `Constraint.mask` has it allow more than these tokens?"""
    rest = allowed.copy()
    for token in tokens:
        if token // 32 < len(rest):
            rest[token // 32] &= ~np.uint32(1 << token % 32)
    return bool(rest.any())


def _carrying(sampled: Sampled, text: str, channel: Channel) -> Piece:
    return Piece(text, sampled.token, sampled.logprob, channel, sampled.top_logprobs)


def _special_marks(tokenizer: "Tokenizer", response: "ResponseParser") -> dict[int, str]:
    """The special tokens that are marks of a format, or begin one, with their spellings, which the decoder leaves
    out."""
    ids = {id for mark in response.marks for id in tokenizer.encode(mark, add_special=False, parse_special=True)}
    return {
        id: tokenizer.token_bytes(id).decode("utf-8", "replace")
        for id in ids
        if not tokenizer.decode([id], skip_special=True) and tokenizer.decode([id])
    }
