"""Stop strings in a stream of text."""

from bisect import bisect_left


class StopStrings:
    """Lets text through until a stop string comes up, of which nothing gets through.

    Text that may yet become a stop string is held back until that is known. Where several could end the text, the one
    that is complete first does (of those, the one that began first), so the outcome does not depend on how the text
    was cut into pieces.
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        self.found: str | None = None
        """The stop string that ended the text."""
        # Between two steps, which all generations wait for: what a piece takes does not grow with how many there are.
        self._strings = frozenset(strings)
        self._sorted = sorted(self._strings)
        self._lengths = sorted(set(map(len, strings)), reverse=True)
        self._longest = max(self._lengths, default=0)
        self._held = ""

    def push(self, text: str) -> str:
        """Takes more text; returns what may be shown of all that is known now."""
        if self.found is not None or not self._strings:
            return "" if self._strings else text
        n_held = len(self._held)
        text = self._held + text
        for end in range(n_held, len(text) + 1):
            for length in self._lengths:
                if length <= end and text[end - length : end] in self._strings:
                    self.found, self._held = text[end - length : end], ""
                    return text[: end - length]
        keep = next(n for n in range(min(self._longest - 1, len(text)), -1, -1) if self._may_become_one(text, n))
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text held back, when no more will come."""
        text, self._held = self._held, ""
        return text

    def _may_become_one(self, text: str, n: int) -> bool:
        """Whether the last n characters begin a stop string."""
        end = text[len(text) - n :]
        place = bisect_left(self._sorted, end)  # where those that begin so are, if there are any
        return n == 0 or (place < len(self._sorted) and self._sorted[place].startswith(end))
