"""Looking up the groups of weights of the IQ formats (`formats.blocks.grids`), for all rows of a vector at once.

There are two ways. Everywhere, a row's index is a number, and its group goes from a table in memory to the row's place
in another one, from where vectors are read. With AVX-512 VBMI, which permutes bytes of two registers, no
memory is needed: a group packs into 16 bits (eight magnitudes of 2 bits, or four of 4), the table into two planes of
bytes, and an instruction looks up 128 bytes of a plane for 64 indices. That is 0.5 (IQ2_XXS) to 4 (IQ1) lookups for 64
weights, where 8 or 16 groups would be loaded and stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from llvmlite import ir

from qrun.engine.simd.vector import I8, I16, I32, I64, Emitter, Vector
from qrun.formats.blocks.grids import grid

# Indices that one lookup of bytes tells apart.
CHUNK = 128
# Sub-blocks of 32 weights in a block.
SUB_BLOCKS = 8
# Groups that are loaded one after the other before they are stored: a load that comes behind a store to another page
# with the same place in it waits. With AVX2, 4 are faster than 1 and than 8.
TOGETHER = 4


class Lookup:
    """The groups of one format. name: as in `formats.blocks.grids`. A magnitude or level becomes a byte of
    times * magnitude + zero."""

    def __init__(self, e: Emitter, name: str, *, zero: int, times: int = 1) -> None:
        self.e, self.name, self.zero = e, name, zero
        self.groups = (grid(name) * times + zero).astype(np.uint8)

    @property
    def words(self) -> int:
        """Words of a group."""
        return self.groups.shape[1] // 4

    @property
    def permutes(self) -> bool:
        """Whether groups are looked up by permuting bytes."""
        return self.e.permutes_bytes

    # --- by loads and stores ------------------------------------------------------------------------------------------

    def load(self, indices: Sequence[Sequence[Vector]], order: Sequence[int] = (0, 2, 1, 3)) -> Stored:
        """The words of a block of each row. indices: of each sub-block, four in the bytes of int32 or, where they have
        more than eight bits, in the halves of two such vectors: those of the groups `order`, and of four more in the
        next two. (Of groups 0 and 2 in one vector they come out of one number by a mask and a shift.)

        Indices are worked out for all rows at once, and go through memory: that leaves three instructions for a group.
        A store that was long ago is read faster than one that is still under way, so a block is looked up as a whole.
        """
        e, b = self.e, self.e.builder
        table = e.table(f"groups of {self.name} from {self.zero}", self.groups.tobytes())
        size, vector_bytes = 4 * self.words, 4 * e.lanes
        n_vectors = len(indices[0])
        of_indices = e.scratch(SUB_BLOCKS * n_vectors * vector_bytes)
        for number, vector in enumerate(vector for sub_block in indices for vector in sub_block):
            e.store(vector.value, of_indices, number * vector_bytes)
        stored = Stored(e, self.words, e.scratch(SUB_BLOCKS * 32 * e.lanes))
        with e.loop(SUB_BLOCKS) as sub_block:
            source = b.add(of_indices, b.mul(sub_block, ir.Constant(I64, n_vectors * vector_bytes)))
            out = b.add(stored.address, b.mul(sub_block, ir.Constant(I64, 32 * e.lanes)))
            for g, first in product(range(8 // self.words), range(0, e.lanes, TOGETHER)):
                at, element = self._index_at(g, n_vectors, order)
                values = []
                for row in range(first, min(first + TOGETHER, e.lanes)):
                    index = b.zext(e.load_scalar(source, at + 4 * row, element), I64)
                    group = b.add(table, b.mul(index, ir.Constant(I64, size)))
                    values.append(e.load_scalar(group, 0, ir.IntType(8 * size)))
                for row, value in enumerate(values, first):
                    e.store(value, out, size * (g * e.lanes + stored.place_of(row)))
        return stored

    def _index_at(self, g: int, n_vectors: int, order: Sequence[int]) -> tuple[int, ir.IntType]:
        """Where the first row's index of a group lies, and as what."""
        vector_bytes, four = 4 * self.e.lanes, g // 4
        if 4 * n_vectors * self.words == 8:
            return four * vector_bytes + g % 4, I8
        place = list(order).index(g % 4)
        return (2 * four + place // 2) * vector_bytes + 2 * (place % 2), I16

    # --- by permutations ----------------------------------------------------------------------------------------------

    def permute(self, low: Vector, high: Sequence[Vector], order: Sequence[int] = (0, 1, 2, 3)) -> list[Vector]:
        """The words of four groups of each row. low: int32 whose byte order[g] has the low eight bits of index g.
        high: for each bit above, the lowest first, which of those bytes have it clear, as single bits."""
        bits = 16 // self.groups.shape[1]
        values = np.unique(self.groups)
        codes = np.searchsorted(values, self.groups).astype(np.uint32)
        packed = np.bitwise_or.reduce(codes << np.arange(0, 16, bits, dtype=np.uint32), axis=-1)
        clear = [self.e.vector(low.bits_as(I8).less(0).value), *high]
        planes = [self._of_plane(low.bits_as(I8), clear, (packed >> 8 * p & 0xFF).astype(np.uint8)) for p in range(2)]
        of_code = np.pad(values, (0, (1 << bits) - len(values))).tolist()
        if self.words == 2:
            return [self._spread(plane, 8 * order[g], bits, of_code) for g in range(4) for plane in planes]
        words = []
        for pair in (order[:2], order[2:]):
            lane = [b + size for b in pair for size in (0, 64)]
            both = planes[0].shuffle(planes[1], [b + 4 * r for r in range(self.e.lanes) for b in lane])
            words += [self._spread(both, place, bits, of_code) for place in (0, 16)]
        return words

    def _of_plane(self, low: Vector, clear: list[Vector], plane: np.ndarray) -> Vector:
        """Of each byte, the entry in a plane of as many bytes as there are groups."""

        def part(first: int, last: int) -> Vector:
            if last - first == CHUNK:
                halves = [plane[first : first + 64], plane[first + 64 : last]]
                tables = [low._new(ir.Constant(low.value.type, half.tolist())) for half in halves]
                return self.e.permute_two(tables, low)
            middle = (first + last) // 2
            level = (middle - first).bit_length() - CHUNK.bit_length()
            below, above = part(first, middle), part(middle, last)
            return clear[level].choose(below, above) if level else clear[0].choose(above, below)

        return part(0, len(plane))

    def _spread(self, plane: Vector, place: int, bits: int, of_code: list[int]) -> Vector:
        """int32 whose byte j is of_code[the code of `bits` bits at bit place + bits * j of the lane]."""
        shifts = [32 * (r % 2) + place + bits * j for r in range(self.e.lanes) for j in range(4)]
        codes = self.e.shift_bytes(plane, shifts)
        return self.e.permute_one(of_code * (64 // len(of_code)), codes).bits_as(I32)


class Stored:
    """Groups of all rows in memory: of each sub-block and each of its groups, those of all rows are neighbours."""

    def __init__(self, e: Emitter, words: int, address: ir.Value) -> None:
        self.e, self.size, self.address = e, words, address

    def place_of(self, row: int) -> int:
        """At which place the group of a row lies. Of groups of two words, a shuffle of two vectors that does not cross
        128 bits gives the first words of all rows in their order, and another one the second words: of four rows, the
        first two are in one vector and the others in the next."""
        return row if self.size == 1 else row % 2 + row // 2 % 2 * (self.e.lanes // 2) + row // 4 * 2

    def words(self, sub_block: int) -> list[Vector]:
        """The eight words of a sub-block."""
        lanes = self.e.lanes
        vectors = [self.e.load(self.address, 4 * lanes * (8 * sub_block + i), I32, lanes) for i in range(8)]
        if self.size == 1:
            return vectors
        words = []
        for a, b in zip(vectors[::2], vectors[1::2], strict=True):
            for first in range(2):
                four = (first, first + 2, lanes + first, lanes + first + 2)
                words.append(a.shuffle(b, [4 * k + lane for k in range(lanes // 4) for lane in four]))
        return words
