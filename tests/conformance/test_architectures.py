"""The engine on all ten architectures: the reference engine's logits, and the same bits in any batch on any threads."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from qrun.engine.program.runtime import Runtime
from qrun.formats import GGUFReader
from qrun.models import build_graph

FILES = sorted((Path(__file__).parent.parent / "data" / "arch").glob("*.gguf"))


def logits(path: Path, tokens: np.ndarray, cuts: Sequence[int], threads: int) -> np.ndarray:
    """Logits of all tokens, computed in the batches between the cuts."""
    with GGUFReader(path) as reader:
        runtime = Runtime(build_graph(reader, 64), threads=threads, context=64)
        sequence = runtime.sequence()
        parts = [runtime.evaluate(sequence, tokens[a:b], "all") for a, b in pairwise(cuts)]
        runtime.close()
    return np.concatenate(parts)  # type: ignore[arg-type]


def test_there_are_ten() -> None:
    assert len(FILES) == 10


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_logits_match_the_reference_engine(path: Path) -> None:
    expected = np.load(path.with_suffix(".npz"))
    result = logits(path, expected["tokens"], [0, 32], 2)
    assert np.mean((result - expected["logits"]) ** 2) / np.mean(expected["logits"] ** 2) <= 1e-6


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_bits_are_the_same_in_any_batch_and_on_any_threads(path: Path) -> None:
    tokens = np.load(path.with_suffix(".npz"))["tokens"]
    whole = logits(path, tokens, [0, 32], 1)
    assert np.array_equal(whole, logits(path, tokens, [0, 32], 2))
    assert np.array_equal(whole, logits(path, tokens, range(33), 2))
    assert np.array_equal(whole, logits(path, tokens, [0, 5, 6, 23, 32], 1))
