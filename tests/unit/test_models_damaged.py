"""Damaged metadata and tensors of every architecture: a graph, or one FormatError; never anything else."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qrun.formats import FormatError
from qrun.models import build_graph
from qrun.models.pooling import read_pooling
from tests.sketches import load, load_embedders, model

SKETCHES = load() | load_embedders()
VARIANTS = 25
INTEGERS = [0, 1, 2, 3, 5, 7, 63, 1 << 20, (1 << 31) - 1, (1 << 32) - 1, -1]
REALS = [0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"), 0.5, 7.0]


def damaged(value: Any, rng: random.Random) -> Any:
    """Another value of the kind, or now and then one of another kind."""
    if rng.random() < 0.15:
        return rng.choice([None, "", "7", True, 3, -2.5, np.array([1, 0], np.int32), np.array([], np.float32)])
    if isinstance(value, np.ndarray):
        choice = rng.randrange(3)
        if choice == 0 and len(value):
            return value[: rng.randrange(len(value))]
        if choice == 1:
            return np.concatenate([value, value])
        changed = value.copy()
        if len(changed) and changed.dtype.kind in "iu":
            changed[rng.randrange(len(changed))] = rng.choice([0, 1, 3, 127])
        return changed
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, np.integer)):
        return rng.choice(INTEGERS)
    if isinstance(value, (float, np.floating)):
        return rng.choice(REALS)
    return rng.choice(["yarn", "none", "longrope", "", "linear"])


@pytest.mark.parametrize("name", SKETCHES)
def test_a_graph_or_one_error(name: str) -> None:
    rng = random.Random(name)
    whole = model(SKETCHES[name])
    keys = [key for key in whole.metadata if key != "general.architecture"]
    build_graph(whole, 64)
    outcomes = []
    for _ in range(VARIANTS):
        reader: Any = SimpleNamespace(path=whole.path, metadata=dict(whole.metadata), tensors=dict(whole.tensors))
        for key in rng.sample(keys, rng.choice([1, 1, 2, 3])):
            reader.metadata[key] = damaged(reader.metadata[key], rng)
            if reader.metadata[key] is None:
                del reader.metadata[key]
        if rng.random() < 0.3:
            del reader.tensors[rng.choice(list(reader.tensors))]
        try:
            build_graph(reader, 64)
            if "pooled" in SKETCHES[name]:
                read_pooling(reader)
            outcomes.append(True)
        except FormatError as error:
            assert str(error).startswith(f"{whole.path}: ") and "\n" not in str(error)
            outcomes.append(False)
    # Damage that is never noticed would test nothing.
    assert sum(outcomes) < VARIANTS
