"""What all tests share."""

import os
from typing import Any

import numpy as np
import pytest

from tests import reference


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh random data in every run. The seed is printed with a failure; QRUN_TEST_SEED sets it."""
    seed = int(os.environ.get("QRUN_TEST_SEED") or int.from_bytes(os.urandom(4)))
    print(f"QRUN_TEST_SEED={seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def half_precision_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain forward pass keeps keys and values in float16, as the engine's cache does: without that the inputs of
    later layers differ in the fourth digit, and now and then a token goes to another expert."""
    attention = reference.attention

    def rounded(q: np.ndarray, k: np.ndarray, v: np.ndarray, cache: Any, *rest: Any, **named: Any) -> np.ndarray:
        if not cache.precise:
            k, v = (x.astype(np.float16).astype(np.float32) for x in (k, v))
        return attention(q, k, v, cache, *rest, **named)

    monkeypatch.setattr(reference, "attention", rounded)
