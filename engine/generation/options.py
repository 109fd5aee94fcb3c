"""What a generation takes by keyword, and what can be done when the context is full."""

from collections.abc import Callable, Iterable

from qrun.engine.arguments import optional_number, whole_number
from qrun.engine.generation.adapters import LoraChoice
from qrun.engine.sampling.options import SamplingArguments

OnFull = Callable[[list[int]], Iterable[int] | None]
"""All tokens of a text for which the context is too small -> fewer, from which it goes on; None ends it there."""


class GenerationArguments(SamplingArguments, total=False):
    """The options of `Model.generate`, `complete` and `chat`."""

    on_full: OnFull | None
    """Makes room when the context is full: see `Session.generate`, and `keep_newest`."""
    lora: LoraChoice | None
    """Adapters of `Model.adapters` that change the model for this text: a name, names, or names with scales."""


def keep_newest(newest: int | None = None, *, first: int = 0) -> OnFull:
    """For `on_full`: go on from the text's `first` tokens, as a system prompt has so many, and its `newest`.

    Without `newest`, both together are half of the context: what is left is read again, which one large step does more
    seldom than many small ones. Turns are cut wherever they are; `Conversation` forgets whole ones.
    """
    first, newest = whole_number("first", first, 0), optional_number("newest", newest)

    def shorten(tokens: list[int]) -> list[int] | None:
        count = max(len(tokens) // 2 - first, 1) if newest is None else newest
        return [*tokens[:first], *tokens[-count:]] if first + count < len(tokens) else None

    return shorten
