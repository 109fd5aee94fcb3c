"""Attention to chosen positions of a long context: what all indexes have that choose them."""

from qrun.models.graph import Index
from qrun.models.hyperparameters import MAX_CONTEXT, MAX_HEAD_DIM, MAX_HEADS, Metadata


def read_index(
    metadata: Metadata, context: int, n_rot: int, *, every: int = 1, block: int = 1, of_entries: bool = False
) -> Index | None:
    """The index of a file, or None for a context within its budget, in which all positions are seen.

    n_rot: how many dimensions of a head turn. every, block, of_entries: as in `Index`.
    """
    budget = metadata.integer("attention.indexer.top_k", high=MAX_CONTEXT)
    n_keys = budget if of_entries else budget // every  # else it is one of positions, or of blocks of them
    if context <= Index(1, 1, n_keys, every, block).start:
        return None
    if not of_entries and budget % every:
        raise metadata.error("attention.indexer.top_k", f"is {budget}, which is not divisible by {every}")
    n_heads = metadata.integer("attention.indexer.head_count", high=MAX_HEADS)
    dim = metadata.integer("attention.indexer.key_length", high=MAX_HEAD_DIM)
    if dim < n_rot:
        raise metadata.error("attention.indexer.key_length", f"is {dim}, expected {n_rot} or more")
    return Index(n_heads, dim, n_keys, every, block, of_entries=of_entries)
