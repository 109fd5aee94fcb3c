"""The records of a program as lowering writes them, before addresses are known."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qrun.engine.program.arena import Place
from qrun.formats.dataclass import dataclass


@dataclass(frozen=True)
class InStep:
    """An address inside of the step's record."""

    offset: int


@dataclass(frozen=True)
class InRecord:
    """An address inside of another operation's record."""

    operation: Record
    offset: int


@dataclass(eq=False)
class Record:
    """An operation as kernels see it, before addresses are known."""

    kernel: str
    fields: dict[int, int | float | Place | InStep | InRecord | NDArray[np.generic]]
    reads: list[object]
    writes: list[object]
    by_rows: bool  # each part touches its own rows only
    barrier: bool = False


@dataclass(frozen=True)
class Routing:
    """Which rows go to which expert, as the kernel `route` leaves it: the slot of each (row, chosen expert), and the
    experts' ranges of slots. by_slot: the rows that are meant are slots."""

    slots: Place
    ranges: Place
    n_used: int
    by_slot: bool
