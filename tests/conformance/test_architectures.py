"""The engine on all architectures: the reference engine's logits, and the same bits in any batch on any threads."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qrun.engine.program.runtime import Runtime
from qrun.formats import GGUFReader
from qrun.models import build_graph
from tests.reference import forward
from tests.toys import OWN_FILES, error, more_files, source_of, tokens_and_logits

own_files = pytest.mark.parametrize("path", OWN_FILES, ids=lambda path: path.stem)
all_files = pytest.mark.parametrize("path", OWN_FILES + more_files(), ids=lambda path: path.stem)


def logits(path: Path, tokens: np.ndarray, cuts: Sequence[int], threads: int) -> np.ndarray:
    """Logits of all tokens, computed in the batches between the cuts (but all at once where tokens see each other), and
    once more those of the last token alone."""
    context = max(64, len(tokens))
    with GGUFReader(path) as reader:
        graph = build_graph(reader, context)
        cuts = cuts if graph.causal else (0, len(tokens))
        runtime = Runtime(graph, threads=threads, context=context)
        sequence, other = runtime.sequence(), runtime.sequence()
        for one in (sequence, other):
            one.answer(source_of(path))
        parts = [runtime.evaluate(sequence, tokens[a:b], "all") for a, b in pairwise(cuts)]
        last = runtime.evaluate(other, tokens)
        runtime.close()
    whole = np.concatenate(parts)  # type: ignore[arg-type]
    assert np.array_equal(last, whole[-1])
    return whole


@all_files
def test_logits_match_the_reference_engine_and_are_the_same_in_batches_cut_at_random(
    path: Path, rng: np.random.Generator
) -> None:
    tokens, expected = tokens_and_logits(path)
    n = len(tokens)
    whole = logits(path, tokens, [0, n], 2)
    assert error(whole, expected) <= 1e-6
    cuts = [0, *sorted(rng.choice(np.arange(1, n), 4, replace=False)), n]
    assert np.array_equal(whole, logits(path, tokens, cuts, 1)), cuts


@pytest.mark.usefixtures("half_precision_cache")
@all_files
def test_windows_shorter_than_the_text_and_yarn_are_as_defined(path: Path) -> None:
    """What most of these models do not have by themselves."""
    tokens = tokens_and_logits(path)[0][:64]
    with GGUFReader(path) as reader:
        prefix = reader.metadata["general.architecture"]
        changes = {
            "attention.sliding_window": 5, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
        }  # fmt: skip
        metadata = dict(reader.metadata) | {f"{prefix}.{key}": value for key, value in changes.items()}
        changed: Any = SimpleNamespace(path=path, metadata=metadata, tensors=reader.tensors)
        graph = build_graph(changed, 64)
        runtime = Runtime(graph, threads=1, context=64)
        sequence, source = runtime.sequence(), source_of(path)
        sequence.answer(source)
        result = runtime.evaluate(sequence, tokens, "all")
        runtime.close()
        assert error(result, forward(graph, tokens, source or None)) <= 1e-5


@own_files
def test_bits_are_the_same_in_any_batch_and_on_any_threads(path: Path) -> None:
    tokens, _ = tokens_and_logits(path)
    n = len(tokens)
    whole = logits(path, tokens, [0, n], 1)
    assert np.array_equal(whole, logits(path, tokens, [0, n], 2))
    assert np.array_equal(whole, logits(path, tokens, range(n + 1), 2))
    assert np.array_equal(whole, logits(path, tokens, [0, 5, 6, 23, n], 1))
