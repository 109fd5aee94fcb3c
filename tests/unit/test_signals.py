"""Handlers of signals run in the middle of whatever the main thread does: also of a step of a model."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tiny_model import ARCHITECTURES

from qrun.engine import Model
from qrun.engine.native.team import Team

PROMPT = [1, 2, 3, 4]
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="signals are POSIX's")


@pytest.fixture
def model() -> Iterator[Model]:
    with Model.load(ARCHITECTURES / "llama-dense.gguf", threads=2, context=64) as model:
        yield model


@pytest.fixture
def in_a_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], object]], None]]:
    """Has a handler of a signal called in the middle of the third step from then on."""
    before = signal.getsignal(signal.SIGUSR1)

    def install(handler: Callable[[], object]) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: handler())
        run, n_steps = Team.run, 0

        def run_and_signal(*arguments: Any) -> None:
            nonlocal n_steps
            run(*arguments)
            n_steps += 1
            if n_steps == 3:
                signal.raise_signal(signal.SIGUSR1)

        monkeypatch.setattr(Team, "run", run_and_signal)

    yield install
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("use", ["generate", "logits", "next"])
def test_a_handler_that_uses_the_model_in_its_step_is_told_so(
    use: str, model: Model, in_a_step: Callable[[Callable[[], object]], None]
) -> None:
    uses = {
        "generate": lambda: list(model.generate([5, 6], max_tokens=4)),
        "logits": lambda: model.logits([5, 6]),
        "next": lambda: next(generation),
    }
    refused = []

    def handler() -> None:
        with pytest.raises(RuntimeError) as error:
            uses[use]()
        refused.append(str(error.value))

    whole = model.generate(PROMPT, max_tokens=8, temperature=0)
    list(whole)
    in_a_step(handler)
    generation = model.generate(PROMPT, max_tokens=8, temperature=0)
    list(generation)
    assert generation.tokens == whole.tokens and len(refused) == 1 and "\n" not in refused[0]


@pytest.mark.parametrize("end", ["stop", "cancel"])
def test_a_handler_may_stop_what_it_interrupts(
    end: str, model: Model, in_a_step: Callable[[Callable[[], object]], None]
) -> None:
    in_a_step(lambda: model.stop() if end == "stop" else generation.cancel())
    generation = model.generate(PROMPT, max_tokens=30, temperature=0)
    list(generation)
    assert generation.stop_reason == "cancelled" and len(generation.tokens) < 8
    in_a_step(lambda: None)
    assert len(list(model.generate(PROMPT, max_tokens=4, temperature=0))) <= 4
