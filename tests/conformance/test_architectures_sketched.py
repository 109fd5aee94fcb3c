"""Every architecture, with random weights: as it was when it gave the reference engine's logits, and in the engine."""

from typing import Any

import numpy as np
import pytest

from qrun.engine.program.runtime import Runtime
from qrun.models import ARCHITECTURES, build_graph
from tests.reference import forward
from tests.sketches import SOURCE, TOKENS, load, model, some_logits
from tests.toys import error

SKETCHES = load()


def test_there_is_one_of_every_architecture() -> None:
    assert {sketch["architecture"] for sketch in SKETCHES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", SKETCHES)
def test_logits_are_what_they_were(name: str) -> None:
    sketch: dict[str, Any] = SKETCHES[name]
    np.testing.assert_allclose(some_logits(model(sketch)), sketch["logits"], rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("half_precision_cache")
@pytest.mark.parametrize("name", SKETCHES)
def test_the_engine_gives_the_logits_of_the_plain_forward_pass(name: str) -> None:
    graph = build_graph(model(SKETCHES[name]), 64)
    runtime = Runtime(graph, threads=1, context=64)
    sequence, source = runtime.sequence(), SOURCE if graph.encoder else []
    sequence.answer(tuple(source))
    result = runtime.evaluate(sequence, np.array(TOKENS), "all")
    runtime.close()
    assert error(result, forward(graph, TOKENS, source or None)) <= 1e-5  # type: ignore[arg-type]
