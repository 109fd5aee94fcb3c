"""AWQ: where scales can be folded into a model, that it then computes the same, and that the search finds some."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_model import ARCHITECTURES

from qrun.engine.quantize.awq import Folding, ScaledSource, Search, foldings
from qrun.engine.quantize.encoder import Encoder
from qrun.engine.quantize.imatrix import Imatrix
from qrun.engine.quantize.source import open_source
from qrun.formats import GGUFReader, TensorType
from qrun.formats.tensors import SourceTensor
from qrun.models import build_graph
from qrun.models import graph as G
from tests.reference import forward

CONTEXT = 32
TOKENS = [3, 17, 5, 90, 41, 5, 77, 12, 60, 3, 8, 121]


def places_of(path: Path) -> list[Folding]:
    with GGUFReader(path) as reader, closing(open_source(path)) as source:
        return foldings(build_graph(reader, CONTEXT), source.tensors)


def logits_of(path: Path) -> np.ndarray:
    with GGUFReader(path) as reader:
        graph = build_graph(reader, CONTEXT)
        return forward(graph, [token % graph.n_vocab for token in TOKENS])


def write(source: ScaledSource, path: Path) -> None:
    with source.writer(path) as writer:
        for name, tensor in source.tensors.items():
            writer.add_tensor(name, TensorType.F32 if tensor.type is TensorType.F16 else tensor.type, tensor.shape)
        for name, tensor in source.tensors.items():
            writer.write_tensor(name, tensor.rows(0, tensor.n_rows) if tensor.type is TensorType.F32 else
                                tensor.raw(0, tensor.n_rows))  # fmt: skip


@pytest.mark.parametrize("path", sorted(ARCHITECTURES.glob("*.gguf")), ids=lambda path: path.stem)
def test_a_model_with_scales_computes_the_same(path: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    places = places_of(path)
    assert places
    with closing(open_source(path)) as base:
        scales = [(place, np.exp2(rng.normal(size=place.n_channels)).astype(np.float32)) for place in places]
        scaled = ScaledSource(base, scales)
        assert all(not np.array_equal(scaled.tensors[name].rows(0, 1), base.tensors[name].rows(0, 1))
                   for place in places for name in (*place.columns, *place.rows))  # fmt: skip
        write(scaled, tmp_path / "scaled.gguf")
    expected, found = logits_of(path), logits_of(tmp_path / "scaled.gguf")
    assert np.square(found - expected).sum() <= 1e-9 * np.square(expected).sum()


def test_a_llama_has_scales_before_all_its_matrices() -> None:
    path = ARCHITECTURES / "llama-dense.gguf"
    places = places_of(path)
    with GGUFReader(path) as reader:
        n_layers = reader.metadata["llama.block_count"]
    assert len(places) == 4 * n_layers
    first = {place.columns: place.rows for place in places if place.columns[0].startswith("blk.0.")}
    block = "blk.0."
    assert [[name.removeprefix(block) for name in columns] for columns in first] == [
        ["attn_q.weight", "attn_k.weight", "attn_v.weight"], ["attn_output.weight"],
        ["ffn_gate.weight", "ffn_up.weight"], ["ffn_down.weight"],
    ]  # fmt: skip
    assert [rows[0].removeprefix(block) for rows in first.values()] == [
        "attn_norm.weight", "attn_v.weight", "ffn_norm.weight", "ffn_up.weight",
    ]  # fmt: skip


def test_heads_that_share_values_share_the_scale() -> None:
    path = next(iter(sorted(ARCHITECTURES.glob("llama-dense.gguf"))))
    with GGUFReader(path) as reader:
        n_heads, n_kv = (reader.metadata[f"llama.attention.{key}"] for key in ("head_count", "head_count_kv"))
        (width,) = {tensor.shape[0] for name, tensor in reader.tensors.items() if "attn_v.weight" in name}
    place = next(place for place in places_of(path) if place.columns == ("blk.0.attn_output.weight",))
    assert place.n_channels == width
    dim = width // n_kv
    assert list(place.channels) == [head // (n_heads // n_kv) * dim + i for head in range(n_heads) for i in range(dim)]


def test_what_is_not_linear_or_has_another_use_has_no_scale() -> None:
    path = ARCHITECTURES / "llama-dense.gguf"
    with GGUFReader(path) as reader, closing(open_source(path)) as source:
        graph = build_graph(reader, CONTEXT)

        def columns(graph: G.Graph) -> set[str]:
            return {place.columns[0] for place in foldings(graph, source.tensors)}

        everywhere = columns(graph)
        limited = [replace(each, kind="limited_silu") if isinstance(each, G.Activate) else each
                   for each in graph.operations]  # fmt: skip
        assert everywhere - columns(replace(graph, operations=limited)) == {
            name for name in everywhere if "ffn_down" in name
        }
        again = [*graph.operations, next(each for each in graph.operations if isinstance(each, G.Attention))]
        assert everywhere - columns(replace(graph, operations=again)) == {"blk.0.attn_output.weight"}
        used_twice = replace(graph, uses={**graph.uses, "blk.1.ffn_norm.weight": 2})
        assert everywhere - columns(used_twice) == {"blk.1.ffn_gate.weight"}
        outside = next(each for each in graph.operations if isinstance(each, G.RMSNorm))
        assert everywhere - columns(replace(graph, hidden=outside.out)) == {"blk.0.attn_q.weight"}


class Matrix(SourceTensor):
    """A tensor in memory."""

    def __init__(self, name: str, values: np.ndarray) -> None:
        super().__init__(name, TensorType.F32, values.shape)
        object.__setattr__(self, "values", values)

    def rows(self, start: int, end: int) -> np.ndarray:
        return self.values[start:end]  # type: ignore[attr-defined, no-any-return]

    def error(self, reason: str) -> Exception:  # type: ignore[override]
        return ValueError(reason)


class Matrices:
    def __init__(self, **values: np.ndarray) -> None:
        self.tensors = {name: Matrix(name, value) for name, value in values.items()}


def output_error(weights: np.ndarray, inputs: np.ndarray, scales: np.ndarray, encoder: Encoder) -> float:
    from qrun.formats.blocks import dequantize

    importance = np.square(inputs / scales).mean(axis=0)
    raw = encoder.encode(weights * scales, TensorType.Q4_0, (importance / importance.mean()).astype(np.float32)).raw
    rounded = dequantize(raw, TensorType.Q4_0, weights.shape) / scales
    return float(np.square(inputs @ (rounded - weights).T).sum())


def test_inputs_that_matter_most_get_finer_steps(rng: np.random.Generator) -> None:
    n_rows, width = 256, 64
    weights = rng.normal(size=(n_rows, width)).astype(np.float32)
    inputs = rng.normal(size=(400, width)).astype(np.float32)
    large = [3, 40]
    inputs[:, large] *= 25
    encoder = Encoder([TensorType.Q4_0])
    source = Matrices(w=weights)
    place = Folding(("w",), ("norm",), np.arange(width))
    search = Search({"w": TensorType.Q4_0}, encoder, source)  # type: ignore[arg-type]
    scales = search.scales(place, inputs.T @ inputs)
    assert scales is not None
    assert set(np.argsort(scales)[-2:]) == set(large)
    plain = output_error(weights, inputs, np.ones(width, np.float32), encoder)
    assert output_error(weights, inputs, scales, encoder) < 0.8 * plain
    # Nothing is known of inputs that never came, and nothing is changed.
    assert search.scales(place, np.zeros((width, width), np.float32)) is None


def test_importance_is_that_of_the_scaled_inputs() -> None:
    path = ARCHITECTURES / "llama-dense.gguf"
    place = places_of(path)[0]
    with closing(open_source(path)) as base:
        scales = np.linspace(0.5, 2, place.n_channels).astype(np.float32)
        width = base.tensors[place.columns[0]].row
        values = {place.columns[0]: np.ones(width, np.float32), "other": np.ones(3, np.float32)}
        found = ScaledSource(base, [(place, scales)]).importance(Imatrix(path, values)).values
    np.testing.assert_allclose(found[place.columns[0]], 1 / np.square(scales[place.channels]), rtol=1e-6)
    np.testing.assert_array_equal(found["other"], values["other"])
