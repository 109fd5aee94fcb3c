"""The grids of the IQ formats: tables of the few groups of four or eight weights that a block can hold.

An IQ format of 1 to 3 bits a weight does not store weights one by one. It stores which of 256 to 2,048 groups of
magnitudes is meant, and signs beside it. Which groups there are was found by search over the weights of models and
follows no rule, so the tables are part of the format. The `gguf` package has them, and is imported when the first one
is wanted: it takes longer to import than a model takes to start, and most models need none.
"""

import functools
import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrun.formats.blocks.layout import U8Array

Grid = NDArray[np.int8]

# The digest of each table, as int8 in order. Machine code holds these tables, so they have to be the same everywhere.
_DIGESTS = {
    "IQ2_XXS": "05826b5d3e472a3a78f196be62ac78acf81df0f909626e12ab9fa2a5d490dd54",
    "IQ2_XS": "06e47aaca60b4dc1d9b5a3f34540437058a6b142b4d7a59d5ded769b4d1bf1de",
    "IQ2_S": "e1aa1473412b0552c2174c30ef22ab4073f6a181b85a17056e8249bd2932fd88",
    "IQ3_XXS": "46e35f5a997efdee6c99ce57854c8a0d4f0ff8ca57e5e8a60c0793ea580acf5d",
    "IQ3_S": "bd1af4945a1717c65610b0284e4628b9a1ba3b306fae3a06f6e5f597356e349f",
    "IQ1_S": "07540ffc1aeaf6ad4d97e96b0fcc765aae39671d4ae4a27bbd0e796fde167c6a",
}

# The types that have groups, and the name of their table.
GRIDS = {**{name: name for name in _DIGESTS}, "IQ1_M": "IQ1_S"}


@functools.cache
def grid(name: str) -> Grid:
    """A table by its name in GRIDS: int8 [groups, weights of a group].

    Raises ImportError if there is no `gguf` package, or one without this table.
    """
    needed = f"gguf 0.18 or newer is needed for weights of type {name} (pip install --upgrade gguf)"
    try:
        from gguf import quants
    except ImportError as error:
        raise ImportError(f"{needed}, and cannot be imported ({error})") from error
    try:
        coder = getattr(quants, name)
        coder.init_grid()
        groups: Grid = np.ascontiguousarray(coder.grid.reshape(coder.grid_shape), np.int8)
    except AttributeError as error:
        raise ImportError(f"{needed}, and the one that is installed has none of their tables") from error
    if hashlib.sha256(groups.tobytes()).hexdigest() != _DIGESTS[name]:
        raise ImportError(f"{needed}, and the one that is installed has another table than GGML")
    groups.setflags(write=False)
    return groups


def signs(bits: U8Array) -> Grid:
    """Eight signs from each byte, the lowest bit first and a set bit for minus: [..., n] -> 1 or -1 [..., 8 * n]."""
    return np.int8(1) - np.int8(2) * np.unpackbits(bits, axis=-1, bitorder="little").astype(np.int8)


def even_signs(bits: NDArray[np.integer[Any]]) -> Grid:
    """The same from seven bits of each number, [..., n]: the eighth sign makes the number of minus signs even."""
    low = (bits & 127).astype(np.uint8)
    return signs(low | (np.bitwise_count(low) & np.uint8(1)) << np.uint8(7))
