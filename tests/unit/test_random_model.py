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

SMALL = {
    "llama": {"layers": 2, "width": 256, "ffn": 512, "heads": 4, "kv_heads": 2, "vocabulary": 300},
    "qwen35": {
        "layers": 4, "width": 256, "ffn": 512, "heads": 4, "kv_heads": 2, "dim": 64, "state_heads": 4, "key_heads": 2,
        "state": 64, "vocabulary": 300,
    },
    "nemotron_h": {
        "pattern": "M-*M", "width": 256, "ffn": 512, "heads": 4, "kv_heads": 2, "dim": 64, "state_heads": 8,
        "state_dim": 32, "groups": 4, "state": 32, "vocabulary": 300,
    },
    "mamba2": {"layers": 2, "width": 256, "state": 32, "groups": 2, "vocabulary": 300},
    "mamba": {"layers": 2, "width": 256, "vocabulary": 300},
    "gpt-oss": {
        "layers": 2, "width": 256, "ffn": 256, "heads": 4, "kv_heads": 2, "experts": 4, "used": 2, "vocabulary": 300,
    },
    "gemma4": {"layers": 6, "width": 256, "ffn": 512, "heads": 4, "kv_heads": 2, "dim": 64, "vocabulary": 300},
    "deepseek2": {
        "layers": 2, "width": 256, "ffn": 512, "heads": 4, "asked": 256, "rank": 256, "expert_ffn": 256, "experts": 4,
        "used": 2, "vocabulary": 300,
    },
    "deepseek32": {
        "layers": 2, "width": 256, "ffn": 512, "heads": 4, "asked": 256, "rank": 256, "expert_ffn": 256, "experts": 4,
        "used": 2, "vocabulary": 300, "index_heads": 3, "index_dim": 64, "chosen": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", [*random_model.QUANTISED, "F16", "BF16", "F32"])
def test_weights_have_a_mean_near_zero_and_the_deviation_asked_for(rng: np.random.Generator, name: str) -> None:
    type_ = TensorType[name]
    raw = random_model.random_blocks(rng, type_, 256 * 1024, 0.02)
    weights = dequantize(raw, type_, (256 * 1024,))
    assert abs(weights.mean()) < 0.005
    assert 0.015 < weights.std() < 0.025


@pytest.mark.parametrize("architecture", random_model.ARCHITECTURES)
def test_a_model_runs_and_has_no_tokenizer(tmp_path: Path, rng: np.random.Generator, architecture: str) -> None:
    path = tmp_path / "random.gguf"
    random_model.write(path, "Q4_K_M", random_model.ARCHITECTURES[architecture](**SMALL[architecture]))
    with Model.load(path, threads=1, context=64) as model:
        assert model.tokenizer is None
        logits = model.logits(rng.integers(0, 300, 60).tolist())
        assert np.isfinite(logits).all() and logits.std() > 0
    with GGUFReader(path) as reader:
        types = {tensor.type for tensor in reader.tensors.values()}
    assert {TensorType.F32, TensorType.Q4_K, TensorType.Q6_K} <= types


@pytest.mark.parametrize("architecture", random_model.ARCHITECTURES)
def test_by_default_they_have_about_a_billion_weights(architecture: str) -> None:
    assert 0.7e9 < random_model.ARCHITECTURES[architecture]().n_weights < 1.5e9


def test_the_llama_is_llama_3_2_1b_in_the_usual_mix() -> None:
    llama = random_model.llama()
    assert 1.2e9 < llama.n_weights < 1.25e9
    types = llama.types("Q4_K_M")
    assert [i for i in range(16) if types[f"blk.{i}.attn_v.weight"] == TensorType.Q6_K] == [0, 1, 4, 7, 10, 13, 14, 15]
    assert types["blk.0.attn_q.weight"] == TensorType.Q4_K
    assert types["token_embd.weight"] == TensorType.Q6_K
    assert set(llama.types("Q5_0").values()) == {TensorType.Q5_0, TensorType.F32}


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
