"""Rotary frequencies against the formulas of the papers, written out pair by pair."""

from dataclasses import replace
from math import ceil, floor, log, pi
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qrun.formats import FormatError
from qrun.models.hyperparameters import Metadata, read_head_dims
from qrun.models.rope import RopeScaling

N_ROT = 64
PLAIN = RopeScaling("linear", base=10000.0, factor=1.0, attention_factor=1.0, original_context=4096)


def plain(pair: int, base: float = 10000.0) -> float:
    return 1.0 / base ** (2 * pair / N_ROT)


def test_plain() -> None:
    rotation = PLAIN.rotation(N_ROT, interleaved=True)
    assert rotation.interleaved and rotation.magnitude == 1.0
    assert rotation.frequencies.dtype == np.float32
    np.testing.assert_allclose(rotation.frequencies, [plain(pair) for pair in range(32)], rtol=1e-6)
    assert rotation.frequencies[0] == 1.0


def test_linear_scaling_slows_every_pair() -> None:
    rotation = replace(PLAIN, factor=4.0, base=500000.0).rotation(N_ROT)
    np.testing.assert_allclose(rotation.frequencies, [plain(pair, 500000.0) / 4 for pair in range(32)], rtol=1e-6)
    assert rotation.magnitude == 1.0


def test_rope_factors_divide() -> None:
    factors = np.linspace(1, 32, 32, dtype=np.float32)
    rotation = replace(PLAIN, attention_factor=1.19).rotation(N_ROT, factors)
    np.testing.assert_allclose(rotation.frequencies, [plain(pair) / (pair + 1) for pair in range(32)], rtol=1e-6)
    assert rotation.magnitude == 1.19


def test_yarn() -> None:
    scale, context = 8.0, 4096
    rotation = replace(PLAIN, type="yarn", factor=scale).rotation(N_ROT)

    def pair_of(turns: float) -> float:
        # The pair whose wave length is context / turns: base^(2 pair / n_rot) * 2 pi = context / turns.
        return N_ROT * log(context / (turns * 2 * pi)) / (2 * log(10000.0))

    low, high = floor(pair_of(32)), ceil(pair_of(1))
    assert 0 < low < high < 32
    for pair in range(32):
        stretch = min(1.0, max(0.0, (pair - low) / (high - low)))
        expected = plain(pair) * (1 - stretch) + plain(pair) / scale * stretch
        assert rotation.frequencies[pair] == pytest.approx(expected, rel=1e-6)
    assert rotation.frequencies[low] == pytest.approx(plain(low))
    assert rotation.frequencies[high] == pytest.approx(plain(high) / scale)
    assert rotation.magnitude == pytest.approx(1 + 0.1 * log(scale))


def test_yarn_magnitude_is_multiplied_by_the_files_factor() -> None:
    scaling = replace(PLAIN, type="yarn", factor=4.0, attention_factor=0.5)
    assert scaling.rotation(N_ROT).magnitude == pytest.approx(0.5 * (1 + 0.1 * log(4)))
    assert replace(scaling, factor=0.5).rotation(N_ROT).magnitude == 0.5


@pytest.mark.parametrize(
    ("architecture", "sections", "still"),
    [
        ("qwen2vl", [4, 5, 6, 7], [15, 16, 17, 18, 19, 20, 21]),
        ("qwen2vl", [2, 2, 2, 2], [6, 7, 14, 15, 22, 23, 30, 31]),  # they begin anew when they are used up
        ("qwen3vl", [8, 8, 8, 8], [24, 25, 26, 27, 28, 29, 30, 31]),
        ("qwen3vl", [6, 4, 2, 20], [8, 11, 13, 14, 16, 17, *range(18, 32)]),
        ("qwen35", [11, 11, 10, 0], []),  # of images there are three kinds of positions: all turn in a text
        ("qwen3vl", [24, 20, 20, 0], []),
        ("glm4", [0, 0, 0, 8], []),
        ("qwen3", [8, 8, 8, 8], []),
    ],
)
def test_pairs_of_a_section_that_texts_have_no_positions_for(
    architecture: str, sections: list[int], still: list[int]
) -> None:
    values = {"general.architecture": architecture, f"{architecture}.rope.dimension_sections": np.array(sections)}
    reader: Any = SimpleNamespace(path=Path("toy.gguf"), metadata=values, tensors={})
    scaling = RopeScaling.read(Metadata(reader), SimpleNamespace(context_length=4096))  # type: ignore[arg-type]
    frequencies = scaling.rotation(N_ROT).frequencies
    assert np.flatnonzero(frequencies == 0).tolist() == still
    turning = [pair for pair in range(32) if pair not in still]
    np.testing.assert_allclose(frequencies[turning], [plain(pair) for pair in turning], rtol=1e-6)


def test_yarn_over_a_short_context_stretches_all_but_the_first_pairs() -> None:
    frequencies = replace(PLAIN, type="yarn", factor=2.0, original_context=8).frequencies(N_ROT)
    assert frequencies[0] == 1.0
    np.testing.assert_allclose(frequencies[2:], [plain(pair) / 2 for pair in range(2, 32)], rtol=1e-6)


WINDOW = {"attention.sliding_window": 32}


@pytest.mark.parametrize(
    ("architecture", "keys", "turned"),
    [
        ("gemma2", WINDOW, 8),
        ("gemma2", WINDOW | {"attention.sliding_window_pattern": np.array([False, True])}, 16),
        ("gemma2", WINDOW | {"attention.sliding_window_pattern": np.array([True, False])}, 8),
        ("gemma3", WINDOW | {"attention.sliding_window_pattern": 1}, 16),
        ("gemma3", {"attention.sliding_window": 0}, 16),
        ("deepseek4", WINDOW, 8),
        ("lfm2", WINDOW | {"attention.head_count_kv": np.array([0, 2])}, 16),
        ("lfm2", WINDOW | {"attention.head_count_kv": np.array([2, 0])}, 8),
        ("llama", WINDOW, 16),
    ],
)
def test_heads_of_some_models_turn_as_those_of_the_first_layer(
    architecture: str, keys: dict[str, Any], turned: int
) -> None:
    values = {"rope.dimension_count": 16, "rope.dimension_count_swa": 8, "attention.key_length": 32, **keys}
    named = {f"{architecture}.{key}": value for key, value in values.items()}
    reader = SimpleNamespace(path=Path("model.gguf"), metadata={"general.architecture": architecture, **named})
    assert read_head_dims(Metadata(reader), 64, (2, 2)) == (32, 32, turned)
    reader.metadata[f"{architecture}.rope.dimension_count_swa"] = 7
    if turned == 8:
        with pytest.raises(FormatError, match="dimension_count_swa is 7, expected an even number"):
            read_head_dims(Metadata(reader), 64, (2, 2))
