"""Lookup decoding: guesses of the next tokens from the text so far (A. Saxena, "Prompt lookup decoding", 2023).

Where the text repeats itself, as summaries and edits of a prompt do, what followed the last tokens before is likely to
follow them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from qrun.engine.generation.guesses import MAX_GUESSES, Account

_FEWEST = 3  # guesses after a failure: with the token before them, half a panel of eight
_AGREEING, _AGREEING_LESS = 3, 2  # tokens that have to agree with an earlier place: at first, and while guesses pay
_COMPARED = 16  # tokens, at most
_PLACES = 4  # the last so many places are compared
_RISK = 0.02  # of the time of a generation may be lost to guesses that fail


class Lookup:
    """Guesses for one text. `tokens` is the text before the first token that `push` adds."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens: list[int] = []
        self._places: dict[tuple[int, int], list[int]] = {}  # two tokens -> where the token after them is
        self._limit = _FEWEST
        self._account = Account(_RISK)
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """The text goes on with `token`."""
        self._tokens.append(token)
        if len(self._tokens) >= 2:
            places = self._places.setdefault((self._tokens[-2], token), [])
            places.append(len(self._tokens))
            del places[:-_PLACES]

    def restart(self, text: list[int]) -> None:
        """The text has been shortened: what it was may come again all the same."""

    def guess(self, room: int, cancelled: Callable[[], bool] = lambda: False) -> list[int]:
        """Tokens that may follow, `room` at most; none where nothing is known, or where guesses have not paid."""
        if not self._account.allows():
            return []
        count = min(self._limit, room)
        place, length = self._best_place()
        if count < 1 or length < (_AGREEING_LESS if self._account.gained > 0 else _AGREEING):
            return []
        guesses: list[int] = []
        for i in range(place, place + count):  # past the end of the text, it repeats itself
            guesses.append(self._tokens[i] if i < len(self._tokens) else guesses[i - len(self._tokens)])
        return guesses

    def learn(self, guessed: int, accepted: int, seconds: float) -> None:
        """A step with `guessed` guesses took so long, and `accepted` of them were right."""
        if not guessed:
            self._account.plain(seconds)
            return
        self._account.guessed(guessed, accepted, seconds)
        self._limit = min(2 * self._limit + 1, MAX_GUESSES) if accepted == guessed else max(_FEWEST, accepted)

    def _best_place(self) -> tuple[int, int]:
        """Where the longest earlier agreement with the end of the text ends, the latest of several, and its length."""
        text, end = self._tokens, len(self._tokens)
        best = (0, 0)
        for place in self._places.get((text[-2], text[-1]), []) if end >= 2 else []:
            length = 2
            while length < min(_COMPARED, place) and text[place - 1 - length] == text[end - 1 - length]:
                length += 1
            if place < end and length >= best[1]:
                best = (place, length)
        return best
