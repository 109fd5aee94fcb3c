"""A conversation with a model: its messages, its session, and what goes when the context is full. No terminal here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qrun.engine.text.prompt import after, encode_prompt, marked
from qrun.formats.json_file import parse_json
from qrun.formats.whole_file import make_private_folder, write_whole

if TYPE_CHECKING:
    from qrun.engine import Model
    from qrun.engine.generation.generation import Generation, GenerationStats, Piece
    from qrun.engine.generation.options import GenerationArguments

Message = dict[str, str]
SAVED_FORMAT = "qrun conversation 1"


class Conversation:
    """Turns between a user and a model, of which the model's session computes only what is new. For one thread at a
    time, but for `stop` and `close`.

    model: a model with a tokenizer. system: the system prompt; `chat_system` of the model is not used by itself.
    sampling: options of SamplingOptions for all answers; it may be changed between them.
    on_forget: called with n when the n oldest messages have been dropped because the context was full.
    special_tokens_in_messages: see `ChatTemplate.render`.
    messages: the turns so far, dictionaries with "role", "content" and, of a thought, "reasoning_content"; they may be
        changed between answers. The first is the system prompt, if there is one.
    session: what holds the keys and values. last_stats, stop_reason: of the newest answer; None before the first.

    Raises Closed once the model is closed.
    """

    def __init__(
        self,
        model: Model,
        system: str | None = None,
        sampling: GenerationArguments | None = None,
        on_forget: Callable[[int], None] | None = None,
    ) -> None:
        self.model = model
        self.session = model.session()
        self.sampling = cast(dict[str, Any], {} if sampling is None else sampling)
        self.on_forget = on_forget or (lambda n: None)
        self.special_tokens_in_messages = False
        self.think: bool | None = None
        """Whether the model is to think before it answers; None leaves that to its template."""
        self.messages: list[Message] = []
        self.last_stats: GenerationStats | None = None
        self.stop_reason: str | None = None
        self._generation: Generation | None = None  # the newest
        # the text of the last prompt with its answer, and the tokens that the session holds for it
        self._known: tuple[str, list[int]] = ("", [])
        if system:
            self.set_system(system)

    @property
    def system(self) -> str | None:
        """The system prompt."""
        return self.messages[0]["content"] if self._first_turn else None

    @property
    def answering(self) -> bool:
        """Whether an answer is under way, and some of its text has come."""
        generation = self._generation
        return bool(generation and generation.stop_reason is None and (generation.text or generation.reasoning))

    @property
    def only_thought(self) -> bool:
        """Whether the last answer ended before anything but thoughts had come."""
        return self._generation is not None and bool(self._generation.reasoning) and not self._generation.text

    @property
    def prompt_progress(self) -> tuple[int, int]:
        """Tokens of the newest prompt that have been read, and all of them."""
        return self._generation.prompt_progress if self._generation else (0, 0)

    @property
    def _first_turn(self) -> int:
        return int(bool(self.messages) and self.messages[0]["role"] == "system")

    def set_system(self, text: str | None) -> None:
        """Replaces the system prompt; None or an empty text removes it."""
        system = [{"role": "system", "content": text}] if text else []
        self.messages[: self._first_turn] = system

    def clear(self) -> None:
        """Forgets all turns; the system prompt stays."""
        del self.messages[self._first_turn :]
        self._known = ("", [])
        self.session.clear()

    def stop(self) -> None:
        """Ends the answer under way, from any thread; of one that has yet to begin, see `answer`."""
        self.session.stop()

    def close(self) -> None:
        """Frees the session."""
        self.session.close()

    def answer(self, text: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[Piece]:
        """The model's answer to a user's turn, in pieces, with what it thinks before. All become part of the
        conversation; of the thoughts it is the template that shows those of earlier turns again, or does not.

        `stop` ends it. It knows of no answer that has yet to begin: `stopped` is asked before the first piece.
        A turn that gets no answer at all, because of an error or because it was stopped, leaves no trace, even if
        something has been thought. Raises ContextOverflow where the turn does not fit into the context even alone.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        reply = ""
        generation: Generation | None = None
        try:
            prompt_text, prompt = self._fitting_prompt()

            def forget(tokens: list[int]) -> list[int] | None:
                """The context became full in the middle of the answer: the oldest turns go, and the answer goes on."""
                nonlocal prompt_text, prompt
                assert generation is not None
                if not self._forget_oldest():
                    return None
                prompt_text, prompt = self._fitting_prompt(len(generation.tokens), forgotten=2)
                shorter = prompt + generation.tokens
                return shorter if len(shorter) < len(tokens) else None

            assert self.model.chat_template is not None
            response = self.model.chat_template.response(prompt_text)
            # An encoder's model has read the whole conversation before it answers: no room is made there.
            on_full = forget if self.model.graph.encoder is None else None
            generation = self._generation = self.session.generate(
                prompt, on_full=on_full, response=response, **self.sampling
            )
            if stopped():
                generation.cancel()
            try:
                for piece in generation:
                    if piece.channel == "content":
                        reply += piece
                    yield piece
            finally:
                self._known = self._known_after(prompt_text, prompt, generation)
                self.last_stats, self.stop_reason = generation.stats, generation.stop_reason
        finally:
            if reply:
                thought = {"reasoning_content": generation.reasoning} if generation and generation.reasoning else {}
                self.messages.append({"role": "assistant", "content": reply, **thought})
            else:
                self.messages = before

    def _fitting_prompt(self, n_reply: int = 0, forgotten: int = 0) -> tuple[str, list[int]]:
        """The prompt's text and tokens, after dropping the oldest turns where it would leave no room to answer, or to
        go on with an answer that has so many tokens already. So many messages have been forgotten for it before.

        Room is a quarter of the context, or what is left of max_tokens if that is less. Once turns have to go, they go
        until the prompt is down to half of the context: every drop costs a new reading of what is left.
        """
        context = self.model.context
        wanted = (self.sampling.get("max_tokens") or n_reply + context) - n_reply
        room = min(wanted, context // 4)
        text, tokens = self._prompt()
        if len(tokens) + n_reply + room > context:
            while len(tokens) + n_reply > context // 2 and self._forget_oldest():
                forgotten += 2
                text, tokens = self._prompt()
        if forgotten and len(tokens) + n_reply <= context:
            self.on_forget(forgotten)
        return text, tokens

    def _forget_oldest(self) -> bool:
        """Drops the oldest user turn and its answer; False where only the newest turn is left."""
        first = self._first_turn
        if len(self.messages) - first < 3:
            return False
        del self.messages[first : first + 2]
        return True

    def _prompt(self) -> tuple[str, list[int]]:
        """The rendered conversation and its tokens.

        Where the text goes on from the last answer, the tokens do too: the model's own tokens stand for its answers
        then, whatever the tokenizer would make of their text, and the session need not read them again.
        """
        assert self.model.chat_template is not None
        options: dict[str, Any] = {"special_tokens_in_messages": True} if self.special_tokens_in_messages else {}
        think = False if self.sampling.get("reasoning_budget") == 0 else self.think
        if think is not None:
            options["think"] = think
        prompt = self.model.chat_template.render(self.messages, add_generation_prompt=True, **options)
        text = marked(prompt)
        known_text, known_tokens = self._known
        tokenizer = self.model.tokenizer
        goes_on = self.model.graph.encoder is None  # and does not read all of it again
        if tokenizer and goes_on and known_tokens and (following := after(prompt, known_text)):
            rest = encode_prompt(tokenizer, following)
            # the end of the answer's turn is a token of its own, so that text can be cut there
            if rest[:1] and rest[0] in tokenizer.stop_ids:
                return text, known_tokens + rest
        return text, self.model.template_tokens(prompt)

    def _known_after(self, prompt_text: str, prompt: list[int], generation: Generation) -> tuple[str, list[int]]:
        """What is known after an answer: the prompt and what the answer's tokens spell, thoughts and marks included. A
        template that writes the same goes on from it; one that leaves thoughts out does not, and no more does an answer
        that a stop string has cut."""
        tokenizer = self.model.tokenizer
        assert tokenizer is not None
        spelt = b"".join(map(tokenizer.token_bytes, generation.tokens)).decode("utf-8", "replace")
        return prompt_text + spelt, prompt + generation.tokens

    def save(self, path: Path) -> list[Path]:
        """Writes the messages as JSON, and the session's state beside them (.npz). Returns both paths.

        On OSError each of the files is as it was before, or whole.
        """
        state = path.with_suffix(".npz")
        known_text, known_tokens = self._known
        saved = {"format": SAVED_FORMAT, "messages": self.messages, "text": known_text, "tokens": known_tokens}
        make_private_folder(path.parent)
        # halves of surrogate pairs, which a terminal of another encoding may give, are written as JSON's \uXXXX
        text = json.dumps(saved, ensure_ascii=False, indent=1).encode("utf-8", "backslashreplace")
        write_whole(path, text, private=True)
        self.session.save(state)
        return [path, state]

    def load(self, path: Path) -> bool:
        """Takes up a saved conversation. Returns whether the state came with it, so that nothing is read again.

        Raises OSError, or ValueError where the file is no saved conversation; the conversation is unchanged then.
        """
        try:
            saved = parse_json(path, path.read_bytes())
            messages = [
                {"role": str(m["role"]), "content": str(m["content"])}
                | ({"reasoning_content": str(m["reasoning_content"])} if "reasoning_content" in m else {})
                for m in saved["messages"]
            ]
            known = (str(saved["text"]), [int(token) for token in saved["tokens"]])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a saved conversation") from error
        state = path.with_suffix(".npz")
        self.messages = messages
        self._known = ("", [])
        try:
            self.session.load(state)
        except (OSError, ValueError):  # gone, damaged, or of another model: the messages are enough
            self.session.clear()
            return False
        self._known = known
        return True
