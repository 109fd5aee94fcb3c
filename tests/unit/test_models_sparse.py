"""Families that attend to chosen positions in a long context: what their graphs are within the budget and beyond it."""

from typing import Any

import numpy as np
import pytest
from test_models import of_type

from qrun.formats import FormatError
from qrun.models import build_graph
from qrun.models.graph import Attention, Choose, Graph
from qrun.models.support import CHOOSERS
from tests.reference import forward
from tests.sketches import TOKENS, load, model

SKETCHES = load()
SPARSE = [name for name in SKETCHES if name.endswith("-sparse")]
STARTS = {
    "deepseek32": 6, "glm-dsa": 6, "dots3note": 6, "hy_v4": 6, "glm5-next": 8 + 3, "qwen4exp": 8 + 3,
    "minimax-m3": 2 * 4, "deepseek4": 4 * 3 + 3,
}  # fmt: skip
"""The first positions whose rows do not see everything."""


def changed(name: str, keys: dict[str, Any]) -> Any:
    """A model, with other hyper-parameters. None leaves one out."""
    reader = model(SKETCHES[name])
    for key, value in keys.items():
        reader.metadata[f"{reader.metadata['general.architecture']}.{key}"] = value
        if value is None:
            del reader.metadata[f"{reader.metadata['general.architecture']}.{key}"]
    return reader


def with_budget(name: str, budget: int) -> Graph:
    return build_graph(changed(name, {"attention.indexer.top_k": budget}), 64)


def test_there_is_one_of_each_family() -> None:
    assert {SKETCHES[name]["architecture"] for name in SPARSE} == set(STARTS) == set(CHOOSERS)


@pytest.mark.parametrize("name", SPARSE)
def test_rows_see_everything_up_to_the_budget_and_chosen_positions_beyond_it(name: str) -> None:
    graph, whole = build_graph(model(SKETCHES[name]), 64), with_budget(name, 4096)
    chooses = of_type(graph, Choose)
    start = STARTS[graph.architecture]
    assert chooses and {choose.index.start for choose in chooses} == {start}
    assert not of_type(whole, Choose) and not any(attention.chosen for attention in of_type(whole, Attention))
    assert len(graph.cache_layers) >= len(whole.cache_layers) + len(chooses)
    few, all_ = forward(graph, TOKENS), forward(whole, TOKENS)
    np.testing.assert_allclose(few[:start], all_[:start], rtol=1e-4, atol=1e-4)
    assert np.abs(few[start:] - all_[start:]).max() > 1e-3


@pytest.mark.parametrize("name", SPARSE)
def test_a_context_within_the_budget_has_no_index(name: str) -> None:
    reader = model(SKETCHES[name])
    start = STARTS[reader.metadata["general.architecture"]]
    assert not of_type(build_graph(reader, start), Choose)
    assert of_type(build_graph(reader, start + 1), Choose)


@pytest.mark.parametrize("name", SPARSE)
def test_what_an_index_is_does_not_matter_within_the_budget(name: str) -> None:
    start = STARTS[SKETCHES[name]["architecture"]]
    reader = changed(name, {"attention.indexer.head_count": None, "attention.indexer.key_length": None})
    assert not of_type(build_graph(reader, start), Choose)
    with pytest.raises(FormatError, match="head_count is missing"):
        build_graph(reader, start + 1)


def test_layers_without_an_index_see_what_the_layer_before_chose() -> None:
    name = next(name for name in SPARSE if name.startswith("glm-dsa"))
    for types, chooses in ((1, 3), (np.array([1, 1, 0]), 2), (np.array([True, False, False]), 1)):
        graph = build_graph(changed(name, {"attention.indexer.types": types}), 64)
        assert len(of_type(graph, Choose)) == chooses
        assert all(attention.chosen is not None for attention in of_type(graph, Attention))
    # GLM-5.2 came before files said it, the first GLM-5 before that had a meaning.
    for context_length, chooses in ((1 << 20, 3), (1 << 17, 3)):
        keys = {"attention.indexer.types": None, "context_length": context_length}
        assert len(of_type(build_graph(changed(name, keys), 64), Choose)) == chooses
    with pytest.raises(FormatError, match="layer 0 has no indexer"):
        build_graph(changed(name, {"attention.indexer.types": np.array([0, 1, 1])}), 64)


@pytest.mark.parametrize(
    ("family", "key", "value", "problem"),
    [
        ("deepseek32", "head_count", None, "attention.indexer.head_count is missing"),
        ("deepseek32", "head_count", 7, "tensor blk.0.indexer.attn_q_b.weight has shape"),
        ("deepseek32", "key_length", 8, "attention.indexer.key_length is 8, expected 16 or more"),
        ("glm5-next", "top_k", 6, "attention.indexer.top_k is 6, which is not divisible by 4"),
        ("glm5-next", "kpool", 1, "attention.indexer.kpool is 1, expected 2"),
        ("minimax-m3", "local_blocks", 3, "attention.indexer.local_blocks is 3, expected 0 to 2"),
        ("minimax-m3", "head_count", 4, "attention.indexer.head_count is 4, expected one for each head of keys"),
        ("qwen4exp", "top_k", 6, "attention.indexer.top_k is 6, which is not divisible by 4"),
        ("qwen4exp", "key_length", 2, "attention.indexer.key_length is 2, expected "),
    ],
)
def test_what_an_index_cannot_be_is_refused(family: str, key: str, value: Any, problem: str) -> None:
    name = next(name for name in SPARSE if name.startswith(family))
    with pytest.raises(FormatError) as error:
        build_graph(changed(name, {f"attention.indexer.{key}": value}), 64)
    assert problem in str(error.value) and "\n" not in str(error.value)
