"""The choice of a type for each tensor, against all choices there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qrun.engine.quantize.allocation import Option, allocate, least_bytes, undominated
from qrun.formats import TensorType as T

TYPES = (T.Q2_K, T.Q3_K, T.Q4_K, T.Q6_K)


def options(rng: np.random.Generator) -> list[Option]:
    sizes = np.sort(rng.integers(1, 60, len(TYPES)))
    return [Option(type, int(size), float(rng.uniform(0, 1))) for type, size in zip(TYPES, sizes, strict=True)]


@pytest.mark.parametrize("seed", range(8))
def test_a_choice_fits_and_is_nearly_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = {f"t{i}": options(rng) for i in range(6)}
    everything = list(itertools.product(*tensors.values()))
    sizes = [sum(option.n_bytes for option in choice) for choice in everything]
    losses = [sum(option.loss for option in choice) for choice in everything]
    for budget in range(min(sizes), max(sizes) + 1, 17):
        chosen = allocate(tensors, budget)
        assert chosen.keys() == tensors.keys()
        assert sum(option.n_bytes for option in chosen.values()) <= budget
        loss = sum(option.loss for option in chosen.values())
        best = min(loss for loss, size in zip(losses, sizes, strict=True) if size <= budget)
        # Between two neighbours of the hull it can miss what one tensor gains.
        assert best <= loss + 1e-12 and loss <= best + 0.35


def test_with_room_for_everything_nothing_is_lost_that_need_not_be() -> None:
    tensors = {"a": [Option(T.Q2_K, 1, 3.0), Option(T.Q6_K, 9, 0.5)], "b": [Option(T.Q4_K, 4, 0.1)]}
    chosen = allocate(tensors, 1000)
    assert [option.type for option in chosen.values()] == [T.Q6_K, T.Q4_K]


def test_what_has_more_bytes_and_more_loss_is_never_chosen() -> None:
    bad, good = Option(T.Q4_0, 10, 2.0), Option(T.Q4_K, 9, 1.0)
    assert undominated([bad, good]) == [good]


def test_what_is_left_is_spent() -> None:
    tensors = {name: [Option(T.Q3_K, 3, 2.0), Option(T.Q4_K, 4, 1.0)] for name in "abcd"}
    chosen = allocate(tensors, 14)
    assert sum(option.n_bytes for option in chosen.values()) == 14


def test_too_small_a_size_says_what_the_smallest_is() -> None:
    tensors = {"a": [Option(T.Q6_K, 9, 0.0), Option(T.Q2_K, 3, 1.0)], "b": [Option(T.Q2_K, 4, 1.0)]}
    assert least_bytes(tensors) == 7
    with pytest.raises(ValueError, match="smallest choice has 7 bytes"):
        allocate(tensors, 6)
