"""Vectors of small random models against those of the reference engine, of every architecture that makes some."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from qrun.cli.main import cli
from qrun.engine import Model
from qrun.formats import GGUFWriter
from qrun.models import build_graph
from qrun.models.pooling import POOLINGS, read_pooling, rows_graph
from tests.reference import forward
from tests.sketches import TOKENS, load_embedders, model, write_metadata, write_tensors
from tests.toys import error

DATA = Path(__file__).parents[1] / "data"
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
    with GGUFWriter(path) as writer:
        write_metadata(writer, reader.metadata)
        write_tensors(writer, reader)
    return path


@pytest.mark.parametrize("name", SKETCHES)
def test_the_engine_gives_the_vectors_of_the_reference(name: str, tmp_path: Path) -> None:
    with Model.load(write(tmp_path / "model.gguf", name), threads=1) as loaded:
        for number, expected in SKETCHES[name]["pooled"].items():
            (vector,) = loaded.embed([TOKENS], pooling=POOLINGS[int(number)], normalize=False)
            assert error(vector[: len(expected)], np.array(expected)) <= 1e-6


@pytest.mark.parametrize("folder", sorted((DATA / "encoders").iterdir()), ids=lambda folder: folder.name)
def test_converted_checkpoints_give_the_vectors_of_transformers(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    done = CliRunner().invoke(cli, ["convert", str(folder), str(out), "--type", "f32"])
    assert done.exit_code == 0 and "not known here" not in done.stderr, done.stderr
    compares = folder.name.endswith("classifier")
    expected = json.loads((folder / "expected.json").read_text())
    with Model.load(out, threads=1) as loaded:
        for text, told in expected.items():
            assert loaded.embedding_tokens(text) == told["ids"]
        vectors = loaded.embed(list(expected), normalize=False)
        assert loaded.pooling == ("rank" if compares else "cls" if folder.name == "bert" else "mean")
        if compares:
            first, second = (loaded.tokenize(text, add_special=False) for text in list(expected)[:2])
            begin, *_, end = expected[next(iter(expected))]["ids"]
            between = [end, end] if folder.name.startswith("xlm") else [end]
            pair = loaded.pair_tokens(*list(expected)[:2])
            assert pair == [begin, *first, *between, *second, end]
    assert error(vectors, np.array([told["vector"] for told in expected.values()])) <= 1e-6
