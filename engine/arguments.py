"""Checks of arguments: a wrong one is a ValueError of one line that names it."""

import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MOST = 2**31 - 1
"""Of what is counted one by one."""
MOST_BYTES = 2**63 - 1


def whole_number(name: str, value: Any, least: int | None = 1, most: int | None = MOST) -> int:
    """An integer of any kind, NumPy's among them, within bounds, where there are any."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise _wrong(name, "a whole number", value)
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, not {number}")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most}, not {number}")
    return number


def optional_number(name: str, value: Any, most: int = MOST) -> int | None:
    """The same from 1 on, or None."""
    return None if value is None else whole_number(name, value, most=most)


def path(name: str, value: Any) -> Path:
    """A path that a system can be asked for; not an empty one, which would mean the working directory."""
    try:
        encoded = os.fsencode(value)
    except (TypeError, UnicodeEncodeError):
        encoded = b"\0"
    if not encoded or b"\0" in encoded:
        raise _wrong(name, "a path", value)
    return Path(os.fsdecode(value))


def text(name: str, value: Any) -> str:
    """A text, and not its bytes."""
    if not isinstance(value, str):
        raise _wrong(name, "a text", value)
    return value


def mapping(name: str, value: Any) -> Mapping[str, Any]:
    """Anything with names."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _wrong(name, "a dictionary with names", value)
    return value


def several(name: str, value: Any) -> list[Any]:
    """A list or its like, and not one thing that could stand in it."""
    if isinstance(value, str | bytes | os.PathLike | Mapping) or not isinstance(value, Iterable):
        raise _wrong(name, "a list", value)
    return list(value)


def callback(name: str, value: Any) -> None:
    """Something that can be called, or None."""
    if value is not None and not callable(value):
        raise _wrong(name, "a function", value)


def _wrong(name: str, wanted: str, value: Any) -> ValueError:
    said = " ".join(repr(value).split())
    return ValueError(f"{name} must be {wanted}, not {said if len(said) <= 80 else said[:77] + '...'}")
