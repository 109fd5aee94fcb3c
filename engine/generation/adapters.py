"""Adapters that generations ask for, by name or number."""

from __future__ import annotations

import functools
import hashlib
import math
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path

from qrun.formats.dataclass import dataclass

LoraChoice = str | int | Iterable[str | int] | Mapping[str | int, float]
"""An adapter of `Model.adapters` by its name, or by its number (the first is 0); several of them; or with scales."""

Chosen = tuple[tuple[int, float], ...]
"""Numbers of adapters, rising, and their scales."""


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter that was loaded to be asked for. scale: how strongly it counts where nobody says."""

    name: str
    path: Path
    scale: float = 1.0

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells its file from others. OSError if it has gone."""
        from qrun.engine.generation.session_file import model_fingerprint

        return model_fingerprint([self.path], "")


class Adapters:
    """Those of one model, in their order."""

    def __init__(self, adapters: Iterable[NamedAdapter] = ()) -> None:
        self.all = tuple(adapters)
        self._numbers = {adapter.name: number for number, adapter in enumerate(self.all)}

    def chosen(self, choice: LoraChoice | None) -> Chosen:
        """What a generation asks for; those of scale 0 change nothing and are left out. ValueError for an adapter that
        there is not, or a scale that is no finite number."""
        if choice is None:
            return ()
        given: Iterable[tuple[str | int, float | None]]
        if isinstance(choice, Mapping):
            given = choice.items()
        elif isinstance(choice, str) or not isinstance(choice, Iterable):
            given = [(choice, None)]
        else:
            given = [(one, None) for one in choice]
        scales: dict[int, float] = {}
        for one, scale in given:
            number = self._number(one)
            scales[number] = self.all[number].scale if scale is None else _scale(one, scale)
        return tuple((number, scale) for number, scale in sorted(scales.items()) if scale != 0)

    def _number(self, one: str | int) -> int:
        if isinstance(one, str):
            number = self._numbers.get(one, -1)
        else:
            try:
                number = -1 if isinstance(one, bool) else operator.index(one)
            except TypeError:
                number = -1
        if not 0 <= number < len(self.all):
            names = ", ".join(self._numbers) or "none"
            raise ValueError(f"lora: there is no adapter {one!r}; those that were loaded by name: {names}")
        return number

    def digest(self, chosen: Chosen) -> str:
        """What tells what was computed with these from what was computed with others. OSError if a file has gone."""
        parts = [(self.all[number].fingerprint, scale) for number, scale in chosen]
        return hashlib.sha256(repr(parts).encode()).hexdigest() if parts else ""


def _scale(one: str | int, scale: object) -> float:
    number = scale if isinstance(scale, int | float) and not isinstance(scale, bool) else math.nan
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    # What float32 cannot hold is no scale either.
    if not abs(number) <= 1e30:
        raise ValueError(f"lora: the scale of adapter {one!r} must be a finite number, not {scale!r}")
    return number
