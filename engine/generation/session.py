"""The state of one conversation: tokens, and the keys and values computed from them."""

import os
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Self, Unpack

import numpy as np

from qrun.engine import arguments
from qrun.engine.errors import Closed, ContextOverflow, OfThisProcess
from qrun.engine.generation.adapters import Adapters, Chosen, LoraChoice
from qrun.engine.generation.draft import Draft, DraftGuesser
from qrun.engine.generation.generation import Generation
from qrun.engine.generation.guesses import Guesser
from qrun.engine.generation.lookup import Lookup
from qrun.engine.generation.options import OnFull
from qrun.engine.generation.prefixes import Prefixes
from qrun.engine.generation.scheduler import Scheduler
from qrun.engine.generation.token_cache import TokenCache
from qrun.engine.native.locks import ForkAwareLock
from qrun.engine.sampling import dry
from qrun.engine.sampling.options import SamplingArguments, SamplingOptions
from qrun.engine.sampling.sampler import Sampler
from qrun.formats import FormatError
from qrun.models.support import CHOOSERS

if TYPE_CHECKING:
    from qrun.engine.generation.diffusion import Diffusion
    from qrun.engine.generation.guide import Rules
    from qrun.engine.program.runtime import Runtime
    from qrun.engine.text.response_parser import ResponseParser
    from qrun.engine.text.tokenizer import Tokenizer
    from qrun.models import Graph


def check_tokens(tokens: Iterable[int], n_vocab: int, context: int) -> list[int]:
    """The tokens as a list of int. Raises ValueError where there are none or one is not in the vocabulary,
    ContextOverflow where they are more than the context holds."""
    ids = np.asarray(tokens if isinstance(tokens, np.ndarray) else list(tokens))
    if ids.size == 0:
        raise ValueError("the prompt is empty: there is nothing to go on from")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError("a prompt must be one list of token ids, all whole numbers")
    wrong = ids[(ids < 0) | (ids >= n_vocab)]
    if wrong.size:
        raise ValueError(f"token {wrong[0]} is not in the vocabulary of {n_vocab}")
    if ids.size > context:
        message = f"the prompt has {ids.size} tokens, and the context holds {context}"
        raise ContextOverflow(message, int(ids.size), context)
    return ids.tolist()


def another_model(graph: "Graph") -> str:
    """What is wrong with a session that was not saved by this model, as it is."""
    from qrun.models.graph import Choose

    other = "saved by a session of another model"
    if graph.architecture not in CHOOSERS:
        return other
    # What such a model keeps of a text is not the same in a short context.
    starts = [each.index.start for each in graph.operations if isinstance(each, Choose)]
    if starts:
        return f"{other}, or of this one with a context of at most {min(starts)} tokens: it goes on in such a one only"
    return f"{other}, or of this one with a longer context, in which more of a text is kept: it goes on in that only"


class Host:
    """What the sessions of one model share. `fingerprint` tells the model from others; it is asked for when needed.

    draft: makes the draft of a new session, for models that have one. diffusion: of models that fill in masks.
    """

    def __init__(
        self,
        runtime: "Runtime",
        tokenizer: "Tokenizer | None",
        defaults: SamplingOptions,
        fingerprint: Callable[[], str],
        draft: Callable[[], Draft] | None = None,
        cache_bytes: int = 0,
        diffusion: "Diffusion | None" = None,
        adapters: Adapters | None = None,
    ) -> None:
        self.runtime = runtime
        self.diffusion = diffusion
        self.prefixes = Prefixes(runtime, cache_bytes)
        self.scheduler = Scheduler(runtime, self.prefixes)
        self.draft = draft
        self.adapters = adapters or Adapters()
        self.tokenizer = tokenizer
        self.defaults = defaults
        self._fingerprint = fingerprint
        self._lock = ForkAwareLock()
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()

    def fingerprint(self, adapters: Chosen = ()) -> str:
        """The model's, with adapters that were chosen."""
        return self._fingerprint() + self.adapters.digest(adapters)

    def add(self, session: "Session") -> None:
        """Note that there is one more session."""
        with self._lock:
            self._sessions.add(session)
        self.prefixes.know(session._cache)

    def sessions(self) -> list["Session"]:
        """All sessions that somebody still holds."""
        with self._lock:
            return list(self._sessions)


class Session(OfThisProcess):
    """The KV state of one conversation. Made by `Model.session`; several of one model work side by side.

    One thread at a time generates in a session. `stop` and `close` may be called from any.
    """

    def __init__(self, host: Host, cache: TokenCache | None = None, draft: Draft | None = None) -> None:
        self.context = host.runtime.context
        """The most tokens that the session can hold."""
        self._host = host
        self._cache = cache or TokenCache(host.runtime, host.runtime.sequence())
        self._draft = draft if draft or not host.draft else host.draft()
        """Used by whoever holds the cache's lock."""
        self._cache.tap = self._draft.tap if self._draft else None
        self._closed = False
        # Guards who generates: the three below. Never held while anything is computed.
        self._guard = ForkAwareLock()
        self._generation: weakref.ref[Generation] | None = None
        self._owner = 0
        host.add(self)

    @property
    def tokens(self) -> list[int]:
        """The tokens that the cache holds now. One just generated joins them when the one after it is computed."""
        return list(self._cache.tokens)

    @property
    def busy(self) -> bool:
        """Whether a generation has begun that has neither ended nor been cancelled or dropped."""
        generation = self._current()
        return generation is not None and generation.stop_reason is None and not generation.cancelled

    @property
    def closed(self) -> bool:
        """Whether `close` was called, on the session or its model."""
        return self._closed

    def generate(
        self,
        prompt_tokens: Iterable[int],
        *,
        on_full: OnFull | None = None,
        response: "ResponseParser | None" = None,
        rules: "Rules | None" = None,
        begun: str = "",
        lora: LoraChoice | None = None,
        **options: Unpack[SamplingArguments],
    ) -> Generation:
        """Go on from a prompt: the whole text so far, of which only what the session does not hold is evaluated. A
        model with an encoder answers the prompt, in a text of its own: that is what the session holds.

        `on_full` is called when the context is full before the text has ended, with all tokens of the text: prompt and
        answer, one more than the context holds. It returns those to go on from, fewer, or None to end there. What is
        left is read again as far as it has changed; decoder, stop strings, sampler and counts go on over the gap, so
        that the answer is one text. `on_full=keep_newest(1024, first=64)` goes on for ever.
        Called by the thread that asks for pieces. What it raises, or ContextOverflow if it shortens nothing, ends
        the generation.

        `response`, which `ChatTemplate.response` makes for a prompt, tells thoughts from the answer. Without it all is
        answer, marks included.

        `rules`: what the answer must be. A tokenizer is wanted for that. `begun`: how the answer begins, where the
        prompt ends with that.

        `lora`: adapters that change the model for this text: see `GenerationArguments`.

        `options` are those of SamplingOptions, by keyword, on top of the model's defaults. A generation of the same
        thread that has not ended is cancelled. Nothing is computed before the first piece is asked for, but the
        arguments are checked: TypeError for an unknown option, ValueError for a wrong value or token,
        ContextOverflow (a ValueError) for a prompt that is longer than the context. RuntimeError if the session is
        closed or generates in another thread.
        """
        self._check_open()
        tokenizer, n_vocab = self._host.tokenizer, self._host.runtime.n_vocab
        chosen = self._host.defaults.replace(**options)
        adapters = self._host.adapters.chosen(lora)
        prompt = check_tokens(prompt_tokens, n_vocab, self.context)
        source: tuple[int, ...] = ()
        if (start := self._host.runtime.start) is not None:
            prompt, source = [start], tuple(prompt)
        breakers: dry.Breakers = {}
        if tokenizer is not None:
            # The head of a model may have rows of padding, for which there are no tokens.
            n_vocab = min(n_vocab, tokenizer.n_vocab)
            if chosen.dry_multiplier > 0:
                breakers = dry.find_breakers(tokenizer, chosen.dry_breakers)
        elif chosen.stop:
            raise ValueError("stop strings need a tokenizer, and the model has none")
        sampler = Sampler(chosen, n_vocab, prompt, breakers)

        def shorten(tokens: list[int]) -> list[int] | None:
            assert on_full is not None
            shorter = on_full(tokens)
            return None if shorter is None else check_tokens(shorter, self._host.runtime.n_vocab, self.context)

        if not self._host.runtime.causal:
            generation = self._diffuse(prompt, sampler, response, rules, begun, adapters)
            self._take_over(generation)
            return generation
        guessers: list[Guesser] = [Lookup([*source, *prompt])] if chosen.lookup else []
        if self._draft is not None and chosen.draft:
            guessers.append(DraftGuesser(self._draft, prompt))
        shorten_if_asked = shorten if on_full else None
        generation = Generation(
            self, self._cache, prompt, sampler, tokenizer, shorten_if_asked, guessers, response,
            self._host.scheduler, rules, begun, adapters, source,
        )  # fmt: skip
        self._take_over(generation)
        return generation

    def _diffuse(
        self, prompt: list[int], sampler: Sampler, response: "ResponseParser | None", rules: "Rules | None",
        begun: str, adapters: Chosen,
    ) -> Generation:  # fmt: skip
        """A generation of a model that fills in masks."""
        from qrun.engine.generation.diffusion import DiffusionGeneration

        host = self._host
        if host.diffusion is None:
            raise ValueError("the model's tokens see those behind them, and the file names no mask: it cannot write")
        if rules is not None:
            raise ValueError("a model that writes by diffusion follows no schema, grammar or tool_choice")
        return DiffusionGeneration(
            host.runtime, host.diffusion, self, self._cache, prompt, sampler, host.tokenizer, None, (), response,
            host.scheduler, None, begun, adapters,
        )  # fmt: skip

    def stop(self) -> None:
        """End the generation under way, if there is one, with the stop reason "cancelled"; from any thread."""
        generation = self._current()
        if generation is not None:
            generation.cancel()

    def fork(self) -> "Session":
        """A second session with the same tokens. The cache is shared until one of them writes."""
        with self._cache.lock:
            self._check_open()
            cache = self._cache.fork()
            draft = self._draft.fork() if self._draft else None
        return Session(self._host, cache, draft)

    def clear(self) -> None:
        """Forget all tokens. Raises RuntimeError if the session generates in another thread."""
        self._take_over(None)
        with self._cache.lock:
            self._cache.forget()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the session to a file, from which `load` gets it back, in this model or another loaded from the
        same file with the same cache type. Written under another name first, so that a failure (OSError) leaves what
        was there before. Nobody but the file's owner can read it."""
        from qrun.engine.generation import session_file  # not for those who save nothing: it takes 10 ms

        path = arguments.path("path", path)
        host, cache = self._host, self._cache
        with cache.lock:  # to the end: the state may be a view of the cache
            self._check_open()
            state = cache.sequence.state()
            adapters = {host.adapters.all[number].name: scale for number, scale in cache.adapters}
            saved = session_file.SavedSession(
                host.fingerprint(cache.adapters), host.runtime.cache_type, cache.tokens, state, adapters
            )
            session_file.write(path, saved)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take the place of a saved session.

        Raises FormatError (a ValueError) if the file is missing, damaged, no saved session, or one of another model or
        cache type; ContextOverflow if it holds more tokens than the context. Then the session stays as it was.
        """
        from qrun.engine.generation import session_file

        self._check_open()
        runtime = self._host.runtime
        saved = session_file.read(arguments.path("path", path))
        try:
            adapters = self._host.adapters.chosen(saved.adapters)
        except ValueError:
            raise FormatError(path, f"saved with adapters that are not loaded: {', '.join(saved.adapters)}") from None
        if saved.fingerprint != self._host.fingerprint(adapters):
            raise FormatError(path, another_model(runtime.graph))
        if saved.cache_type != runtime.cache_type:
            raise FormatError(path, f"saved with cache type {saved.cache_type}, not {runtime.cache_type} as loaded")
        tokens = check_tokens(saved.tokens, runtime.n_vocab, self.context) if saved.tokens else []
        sequence = runtime.sequence()
        try:
            sequence.restore(saved.state)
            if sequence.n_past != len(tokens):
                raise ValueError(f"it has {len(tokens)} tokens and a cache of {sequence.n_past}")
            if sequence.source:
                check_tokens(sequence.source, runtime.n_vocab, self.context)
            self._take_over(None)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            sequence.close()
            raise FormatError(path, f"a saved session that does not fit: {error}") from error
        except BaseException:
            sequence.close()
            raise
        with self._cache.lock:
            old, self._cache.sequence, self._cache.tokens = self._cache.sequence, sequence, tokens
            sequence.adapters = adapters
            old.close()

    def close(self) -> None:
        """Give the cache back; from any thread, after the step that is being computed. A second time does nothing."""
        with self._guard:
            closed, self._closed = self._closed, True
        if not closed:
            self.stop()
            if self._cache.lock.abandoned:  # its threads are those of another process
                return
            self._host.prefixes.write(self._cache)
            with self._cache.lock:
                self._cache.close()
                if self._draft is not None:
                    self._draft.close()

    def leave(self) -> None:
        """Close the session, but let others of the model have what it has computed, as long as there is room. What was
        computed with draft layers goes: nobody can go on from it (see `Prefixes.adopt`)."""
        if self._cache.tap is not None:
            self.close()
            return
        with self._guard:
            closed, self._closed = self._closed, True
        if not closed:
            self._host.prefixes.keep(self._cache)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _current(self) -> Generation | None:
        return self._generation() if self._generation is not None else None

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("the session is closed, or its model")

    def _take_over(self, generation: Generation | None) -> None:
        """Make this generation, or none, the one that the session is for; cancel the one before it."""
        with self._guard:
            self._check_open()
            if self.busy and self._owner != threading.get_ident():
                raise RuntimeError("the session generates in another thread: stop it first, or use a fork")
            self.stop()
            self._generation = weakref.ref(generation) if generation is not None else None
            self._owner = threading.get_ident()
