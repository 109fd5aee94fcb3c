"""What the tokens of a generation may be, and which of them are known beforehand.

A grammar begins with the answer: what a model thinks before it is free. Or, where a model may call functions if it
wants to, everything is free but what stands between the marks of a call. So a guide reads along as the text is split
into thoughts, answer and calls, and knows at each token what applies to the next.

A token can run past a mark into what the grammar has a say in, as `>{` does. Where the grammar does not want what
follows the mark, the token is cut there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qrun.engine.sampling.constraints import Constraint
from qrun.formats.dataclass import dataclass

if TYPE_CHECKING:
    from qrun.engine.text.response_parser import ResponseParser
    from qrun.engine.text.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Rules:
    """What an answer must be.

    answer: all of it. calls: where that is None, what follows the mark that begins a call, of the function that the
    mark names ("" if it names none); None leaves the call free. several: whether there may be more than one call.
    lead: whether an answer after a thought begins with what its template writes between them.
    """

    answer: Constraint | None = None
    calls: Callable[[str], Constraint | None] = lambda name: None
    several: bool = True
    lead: bool = True


class Guide:
    """Follows one generation. marks: special tokens that the parser is to see, with their spellings."""

    def __init__(
        self,
        rules: Rules,
        tokenizer: Tokenizer,
        response: ResponseParser | None,
        marks: dict[int, str],
        prompt: Sequence[int],
    ) -> None:
        self._rules = rules
        self._tokenizer = tokenizer
        self._marks = marks
        if response is not None and not rules.lead:  # the grammar has what follows a thought
            response.closing = response.close
        self._parser = response.copy() if response else None
        self._decoder = tokenizer.stream(skip_special=True, after=prompt[-1:])
        self._constraint: Constraint | None = None
        """What applies to the next token."""
        self._opening: list[int] = []
        """Tokens that begin a thought, where the model may do so in the place of an answer."""
        self._lead = ""
        """What comes before the grammar applies."""
        self._known: list[int] | None = None
        self._bits = np.zeros((tokenizer.n_vocab + 31) // 32, np.uint32)
        self.over = False
        """Whether the text is complete, and nothing may follow."""
        if rules.answer is not None:
            self._begin_answer(rules.answer)

    def _begin_answer(self, answer: Constraint) -> None:
        parser = self._parser
        if parser is not None and parser.channel == "reasoning":
            return
        if parser is None or not parser.opening:
            self._constraint = answer.copy()
        elif parser.heading:  # such models always begin with a thought, and have no other way to an answer
            self._lead = parser.opening
        else:
            self._constraint = answer.copy()
            self._opening = self._tokenizer.encode_further(parser.opening, parse_special=True)

    def begin(self, text: str) -> None:
        """The answer begins with a text. ValueError where the grammar does not want it."""
        if self._opening and self._parser is not None and not text.startswith(self._parser.opening):
            self._opening = []
        for token in self._tokenizer.encode_further(text):
            constraint = None if self._opening else self._constraint
            if self.over or (constraint is not None and constraint.valid([token]) != 1):
                raise ValueError(
                    f"the last message, {text[:40]!r}, does not begin as the schema, grammar or function asks (JSON is "
                    "written without spaces between its parts)"
                )
            self.accept(token)

    @property
    def constrains(self) -> bool:
        """Does a grammar apply to the next token?"""
        return self._constraint is not None

    def allowed(self) -> np.ndarray | None:
        """Which tokens may come next, as `Constraint.mask` has it; None for all."""
        if self._constraint is None:
            return None
        self._constraint.mask(self._bits)
        if self._opening:
            first = self._opening[0]
            self._bits[first // 32] |= np.uint32(1 << first % 32)
        return self._bits

    def allows(self, token: int) -> bool:
        """Is this token, which does not end the text, one of `allowed`? Where it may be one that does: False."""
        if self._constraint is None or (self._opening and token == self._opening[0]):
            return True
        return self._constraint.valid([token]) == 1

    def allowed_of(self, tokens: list[int], count: int) -> list[int] | None:
        """The first of these tokens that are among `allowed`, so many. None where to find that out may take longer than
        `allowed` does, or one of them may end the text."""
        found: list[int] = []
        refused = 0
        for token in tokens:
            if token in self._tokenizer.stop_ids:
                if self._constraint is not None and self._constraint.complete:
                    return None
            elif self.allows(token):
                found.append(token)
                if len(found) == count:
                    return found
            elif (refused := refused + 1) > count:
                return None
        return None

    def valid(self, tokens: list[int]) -> list[int]:
        """As many of these guesses as the grammar wants to see."""
        if self._constraint is None or self._opening:
            return tokens
        return tokens[: self._constraint.valid(tokens)]

    def forced(self) -> list[int]:
        """The tokens that come next, as far as they are known."""
        if self._known is None:
            self._known = []
            if self._lead:
                self._known = self._tokenizer.encode_further(self._lead, parse_special=True)
            elif self._constraint is not None and not self._opening:
                self._known = self._constraint.forced()
        return self._known

    def settled(self, token: int) -> list[int]:
        """The tokens to take where the model chose this one: itself, unless it is to be cut."""
        if self._parser is None or self._constraint is not None or self._lead:
            return [token]
        if self._rules.answer is not None and token in self._tokenizer.stop_ids:  # the answer is still to come
            return self._tokenizer.encode_further(self._parser.close, parse_special=True)
        text = self._text(token, self._tokenizer.stream(skip_special=True)) if token not in self._marks else ""
        parser = self._parser.copy()
        for i, character in enumerate(text[:-1]):
            if self._passes(parser, character):
                constraint = self._next(parser)
                if constraint is None or not text[i + 1 :].strip():
                    break
                if self._rest_is_valid(constraint, self._rest(parser, text[i + 1 :])) is None:
                    return self._tokenizer.encode_further(text[: i + 1]) or [token]
                break
        return [token]

    def accept(self, token: int) -> None:
        """The text goes on with `token`."""
        self._known = None
        text = self._text(token, self._decoder)
        if self._lead:
            self._pass_lead(text)
        elif self._constraint is None:
            self._read(text)
        elif self._opening and not self._in_grammar(token):
            self._constraint = None
            self._lead = self._parser.opening if self._parser else ""
            self._opening = []
            self._pass_lead(text)
        elif token not in self._tokenizer.stop_ids:
            self._opening = []
            self._constraint.accept(token)
            if self._rules.answer is None and self._parser is not None:
                self._parser.push(text)
            self._check_end()

    def _check_end(self) -> None:
        if self._constraint is None or not self._constraint.finished:
            return
        if self._rules.answer is not None or not self._rules.several:
            self.over = True
        else:
            self._constraint = None

    def _text(self, token: int, decoder: StreamDecoder) -> str:
        return decoder.push(token) + self._marks.get(token, "")

    def _in_grammar(self, token: int) -> bool:
        assert self._constraint is not None
        return self._constraint.valid([token]) == 1

    def _pass_lead(self, text: str) -> None:
        """A token that stands before the grammar, or begins a thought."""
        self._lead = self._lead.removeprefix(text) if text and self._lead.startswith(text) else ""
        if self._parser is not None and self._constraint is None:
            self._parser.push(text)

    def _read(self, text: str) -> None:
        """A token of a text that is free."""
        parser = self._parser
        if parser is None:
            return
        for i, character in enumerate(text):
            if self._passes(parser, character):
                constraint = self._next(parser)
                if constraint is None:
                    continue
                rest = text[i + 1 :]
                parser.push(rest)
                self._constraint = constraint
                if self._rules.answer is not None and self._rules.lead and not rest.strip():
                    lead = parser.lead
                    self._lead = lead[len(rest) :] if lead.startswith(rest) else ""
                    return
                for one in self._rest_is_valid(constraint, self._rest(parser, rest)) or []:
                    constraint.accept(one)
                self._check_end()
                return

    def _passes(self, parser: ResponseParser, character: str) -> bool:
        """Reads a character, and tells whether it ends what is free."""
        before = parser.channel
        parser.push(character)
        if self._rules.answer is not None:
            return (before, parser.channel) == ("reasoning", "content")
        return before != "tool_call" and parser.channel == "tool_call"

    def _next(self, parser: ResponseParser) -> Constraint | None:
        if self._rules.answer is not None:
            return self._rules.answer.copy()
        constraint = self._rules.calls(parser.addressee)
        return constraint.copy() if constraint is not None else None

    def _rest(self, parser: ResponseParser, rest: str) -> str:
        """What of a token's text the grammar has to say something about."""
        if self._rules.answer is not None:
            return rest.lstrip()
        return parser.kept_mark + rest

    def _rest_is_valid(self, constraint: Constraint, rest: str) -> list[int] | None:
        """The tokens of such a text; None where the grammar does not want it."""
        tokens = self._tokenizer.encode_further(rest)
        return tokens if constraint.valid(tokens) == len(tokens) else None
