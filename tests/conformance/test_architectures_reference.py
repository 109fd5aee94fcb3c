"""Graph and plain NumPy agree with the reference engine's logits, for small random models of the architectures."""

from pathlib import Path

import pytest

from qrun.formats import GGUFReader
from qrun.models import build_graph
from tests.reference import forward
from tests.toys import OWN_FILES, error, more_files, tokens_and_logits


def test_there_are_models() -> None:
    assert len(OWN_FILES) >= 10


@pytest.mark.parametrize("path", OWN_FILES + more_files(), ids=lambda path: path.stem)
def test_logits_match(path: Path) -> None:
    tokens, expected = tokens_and_logits(path)
    with GGUFReader(path) as reader:
        assert error(forward(build_graph(reader, 64), tokens), expected) <= 1e-6
