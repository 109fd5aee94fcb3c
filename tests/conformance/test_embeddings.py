"""Vectors of small random models against those of the reference engine, of every architecture that makes some."""

from pathlib import Path

import numpy as np
import pytest

from qrun.engine import Model
from qrun.formats import GGUFWriter, TensorType, ValueType
from qrun.models import build_graph
from qrun.models.pooling import POOLINGS, read_pooling, rows_graph
from tests.reference import forward
from tests.sketches import TOKENS, load_embedders, model
from tests.toys import error

SKETCHES = load_embedders()


@pytest.mark.parametrize("name", SKETCHES)
def test_the_definition_gives_the_vectors_of_the_reference(name: str) -> None:
    reader = model(SKETCHES[name])
    graph = build_graph(reader, 64)
    if not graph.embeds:
        graph = rows_graph(graph, reader)
    rows = forward(graph, TOKENS)
    pooling = read_pooling(reader)
    for number, expected in SKETCHES[name]["pooled"].items():
        kind = POOLINGS[int(number)]
        counting = {"cls": rows[:1], "last": rows[-1:]}.get(pooling.row_of(kind), rows)
        vector = pooling.vector(counting, kind)
        assert error(vector[: len(expected)], np.array(expected)) <= 1e-6


def write(path: Path, name: str) -> Path:
    """The model of a sketch as a file, without a tokenizer."""
    reader = model(SKETCHES[name])
    kinds = {bool: ValueType.BOOL, int: ValueType.UINT32, float: ValueType.FLOAT32, str: ValueType.STRING}
    with GGUFWriter(path) as writer:
        for key, value in reader.metadata.items():
            writer.set_metadata(key, value, kinds[type(value)])
        for tensor in reader.tensors.values():
            writer.add_tensor(tensor.name, TensorType.F32, tensor.shape)
        for tensor in reader.tensors.values():
            writer.write_tensor(tensor.name, np.ascontiguousarray(tensor.raw))
    return path


@pytest.mark.parametrize("name", SKETCHES)
def test_the_engine_gives_the_vectors_of_the_reference(name: str, tmp_path: Path) -> None:
    with Model.load(write(tmp_path / "model.gguf", name), threads=1) as loaded:
        for number, expected in SKETCHES[name]["pooled"].items():
            (vector,) = loaded.embed([TOKENS], pooling=POOLINGS[int(number)], normalize=False)
            assert error(vector[: len(expected)], np.array(expected)) <= 1e-6
