"""Stop strings in a stream of text."""


class StopStrings:
    """Lets text through until a stop string comes up, of which nothing gets through.

    Text that may yet become a stop string is held back until that is known. Where several could end the text, the one
    that is complete first does (of those, the one that began first), so the outcome does not depend on how the text
    was cut into pieces.
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        self.found: str | None = None
        """The stop string that ended the text."""
        self._strings = strings
        self._longest = max(map(len, strings), default=0)
        self._held = ""

    def push(self, text: str) -> str:
        """Takes more text; returns what may be shown of all that is known now."""
        if self.found is not None or not self._strings:
            return "" if self._strings else text
        text = self._held + text
        hits = [(at + len(string), at, string) for string in self._strings if (at := text.find(string)) >= 0]
        if hits:
            _, at, self.found = min(hits)
            self._held = ""
            return text[:at]
        keep = next(n for n in range(min(self._longest - 1, len(text)), -1, -1) if self._may_become_one(text, n))
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text held back, when no more will come."""
        text, self._held = self._held, ""
        return text

    def _may_become_one(self, text: str, n: int) -> bool:
        """Whether the last n characters begin a stop string."""
        return n == 0 or any(string.startswith(text[len(text) - n :]) for string in self._strings)
