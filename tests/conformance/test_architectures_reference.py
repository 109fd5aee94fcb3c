"""Graph and plain NumPy agree with the reference engine's logits, for a small random model of each architecture."""

from pathlib import Path

import numpy as np
import pytest

from qrun.formats import GGUFReader
from qrun.models import ARCHITECTURES, build_graph
from tests.reference import forward

DATA = Path(__file__).parents[1] / "data" / "arch"
MODELS = sorted(DATA.glob("*.gguf"))


def test_every_architecture_has_a_model() -> None:
    assert {path.stem.split("-")[0] for path in MODELS} == set(ARCHITECTURES)
    assert len(MODELS) == 10


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_logits_match(path: Path) -> None:
    expected = np.load(path.with_suffix(".npz"))
    with GGUFReader(path) as reader:
        logits = forward(build_graph(reader), expected["tokens"])
    error = np.mean((logits - expected["logits"]) ** 2) / np.mean(expected["logits"] ** 2)
    assert error <= 1e-6
