"""The error above all of qrun's own, and the one that a bad model file raises."""

import os


class QrunError(Exception):
    """Above every error of qrun's own. What Python raises by itself stands beside it: OSError for a file that is not
    there, TypeError and ValueError for a wrong argument, MemoryError."""


class FormatError(QrunError, ValueError):
    """A file that is missing, damaged, hostile, or of a kind that is not supported.

    path: the file. reason: what is wrong. offset: where, in bytes from its start; None where that does not apply.
    `str()` is one line: the file, the byte offset where it applies, and what is wrong there.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, offset: int | None = None) -> None:
        self.path = os.fspath(path)
        self.reason = reason
        self.offset = offset
        where = "" if offset is None else f"at byte {offset}: "
        super().__init__(f"{self.path}: {where}{reason}")
