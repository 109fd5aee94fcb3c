"""Guesses of the next tokens, which the model then evaluates in one batch.

That costs less than so many steps while weights come from memory, and those that the model would have chosen itself
are kept. The text is the same as without guesses, because a row's logits have the same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

MAX_GUESSES = 15
"""With the token before them, 16 rows: two panels of a matrix product."""

_GRACE = 16  # tokens' time, that an account has from the beginning
_RESERVE = 4  # tokens' time, of what guesses have gained, that may be lost again


class Guesser(Protocol):
    """Whoever guesses how a text goes on."""

    def push(self, token: int) -> None:
        """The text goes on with `token`."""

    def restart(self, text: list[int]) -> None:
        """The text has been shortened: it is this one now."""

    def guess(self, room: int, cancelled: Callable[[], bool]) -> list[int]:
        """Tokens that may follow, `room` at most; none where none are expected to pay. Raises GenerationCancelled if
        that takes long and `cancelled()` becomes true."""

    def learn(self, guessed: int, accepted: int, seconds: float) -> None:
        """A step with `guessed` guesses, its own or none, took so long, and `accepted` of them were right."""


class Account:
    """What guesses have gained and lost, in seconds.

    risk: the part of all time that may be lost to guesses that fail.
    """

    def __init__(self, risk: float) -> None:
        self.single: float | None = None
        """A step without guesses; None until there was one."""
        self.spent = 0.0
        """All steps."""
        self.gained = 0.0
        """Not more than can be lost again in a few tokens' time, so that guesses end soon where they no longer pay."""
        self._risk = risk

    def allows(self, loss: float = 0.0) -> bool:
        """Whether guesses may go on: they may if `loss`, in seconds, can be borne should they fail."""
        if self.single is None:
            return False
        return self.gained - loss >= -self._risk * (self.spent + _GRACE * self.single)

    def plain(self, seconds: float) -> None:
        """There was a step without guesses."""
        self.spent += seconds
        self.single = seconds if self.single is None else 0.8 * self.single + 0.2 * seconds

    def guessed(self, guesses: int, accepted: int, seconds: float, guessing: float = 0.0) -> float:
        """There was a step with guesses, which took `guessing` to make. Returns what it gained."""
        assert self.single is not None
        self.spent += seconds + guessing
        # A step that was interrupted by other work says little of what guesses cost.
        gain = (accepted + 1) * self.single - min(seconds, (guesses + 1) * self.single) - guessing
        self.gained = min(self.gained + gain, _RESERVE * self.single)
        return gain

    def lost(self, seconds: float) -> None:
        """So much was lost without a guess."""
        self.spent += seconds
        self.gained -= seconds
