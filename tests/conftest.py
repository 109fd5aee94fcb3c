"""What all tests share."""

import os

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh random data in every run. The seed is printed with a failure; QRUN_TEST_SEED sets it."""
    seed = int(os.environ.get("QRUN_TEST_SEED") or int.from_bytes(os.urandom(4)))
    print(f"QRUN_TEST_SEED={seed}")
    return np.random.default_rng(seed)
