"""What operations take and give: rows of numbers, and tensors of the file."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qrun.formats import TensorType

Constant = NDArray[np.float32]
Indices = NDArray[np.int32]


@dataclass(frozen=True)
class Value:
    """The result of one operation: float32 [rows, width]."""

    id: int
    width: int


@dataclass(frozen=True, eq=False)
class Weight:
    """A tensor of the file, in file layout. Its existence, shape and type have been checked.

    `shape` is row-major, as NumPy has it: a matrix is (rows, columns), experts are (n_expert, rows, columns).
    `raw` is a flat uint8 view of the mapped file. One tensor is one `Weight` object, however often it is used.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    raw: NDArray[np.uint8]
