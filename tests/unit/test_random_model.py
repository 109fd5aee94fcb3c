"""The models of random weights that speed is measured with: they load, run, and have weights of a sane size."""

import sys
from pathlib import Path

import numpy as np
import pytest

from qrun.engine import Model
from qrun.formats import GGUFReader, TensorType, dequantize

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import random_model
import table

SMALL = random_model.Shape(layers=2, width=256, ffn=512, heads=4, kv_heads=2, vocabulary=300, context=64)


@pytest.mark.parametrize("name", [*random_model.QUANTISED, "F16", "BF16", "F32"])
def test_weights_have_a_mean_near_zero_and_the_deviation_asked_for(rng: np.random.Generator, name: str) -> None:
    type_ = TensorType[name]
    raw = random_model.random_blocks(rng, type_, 256 * 1024, 0.02)
    weights = dequantize(raw, type_, (256 * 1024,))
    assert abs(weights.mean()) < 0.005
    assert 0.015 < weights.std() < 0.025


def test_a_model_runs_and_has_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    random_model.write(path, "Q4_K_M", SMALL)
    with Model.load(path, threads=1, context=16) as model:
        assert model.tokenizer is None
        assert np.isfinite(model.logits([1, 2, 299])).all()
    with GGUFReader(path) as reader:
        types = {tensor.type for tensor in reader.tensors.values()}
    assert types == {TensorType.F32, TensorType.Q4_K, TensorType.Q6_K}


def test_the_default_shape_has_1_2_billion_weights_in_the_usual_mix() -> None:
    matrices = random_model.Shape().matrices()
    assert 1.2e9 < sum(rows * columns for rows, columns in matrices.values()) < 1.25e9
    more = [i for i in range(16) if random_model.type_of(f"blk.{i}.attn_v", "Q4_K_M", 16) == TensorType.Q6_K]
    assert more == [0, 1, 4, 7, 10, 13, 14, 15]
    assert random_model.type_of("blk.0.attn_q", "Q4_K_M", 16) == TensorType.Q4_K
    assert random_model.type_of("token_embd", "Q4_K_M", 16) == TensorType.Q6_K


def test_the_table_has_a_line_for_each_figure() -> None:
    task = table.Task("models/a.gguf", 512, 64, 3, 4096, 1)
    rows = [
        {"threads": t, "metric": m, "qrun": 10.0 * t, "peers": {"p": 5.0}, "ratios": {"p": 2.0 * t}}
        for t in (1, 2) for m in ("pp512", "tg64")
    ]  # fmt: skip
    rows[1] |= {"memory": 20.0, "share": 0.95}
    assert table.markdown([(task, rows)]).splitlines() == [
        "| model | tokens/s | qrun, 1 thread | p | qrun, 2 threads | p |",
        "|---|---|--:|--:|--:|--:|",
        "| a | pp512 after 4096 | 10.0 | 5.0 (**2.00x**) | 20.0 | 5.0 (**4.00x**) |",
        "| a | tg64 after 4096 | 10.0 (95% of 20 GB/s) | 5.0 (**2.00x**) | 20.0 | 5.0 (**4.00x**) |",
    ]
