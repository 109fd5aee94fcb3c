"""Errors that a user of the engine can meet, besides `qrun.formats.FormatError`. All are QrunErrors."""

from typing import NoReturn

from qrun.formats import QrunError


class OfThisProcess:
    """What holds memory that only this process has: it can be neither pickled nor copied."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied: load the model in each process; its weights are in "
            "memory once for all"
        )


class ContextOverflow(QrunError, ValueError):
    """More tokens than the context holds. The message is one line that gives both numbers.

    n_tokens, context: the same numbers, where they are known. what: has so many tokens, "text 2 of 3" say.
    """

    def __init__(
        self, message: str = "", n_tokens: int | None = None, context: int | None = None, what: str = "the prompt"
    ) -> None:
        super().__init__(message)
        self.n_tokens = n_tokens
        self.context = context
        self.what = what


class Closed(QrunError, RuntimeError):
    """A model or a session was used after it had been closed, perhaps by another thread."""


class NotFinite(QrunError, ValueError):
    """What a model has computed are no numbers: the file is damaged, or the engine is wrong."""


class NotEnoughMemory(QrunError, MemoryError):
    """This machine has less memory than something takes. The message is one line: what, how much, and how much is free.
    """


class GenerationCancelled(QrunError):
    """An evaluation was stopped between two batches because its caller asked for that.

    What was evaluated before stays in the sequence. Generations turn this into
    the stop reason "cancelled"; it reaches only those who call the runtime directly.
    """


class CacheWarning(UserWarning):
    """The cache cannot be used as it is. All works, but what would lie there is made anew in each process."""
