"""Threads with little room on their stacks, as programs may make them, run models all the same."""

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_model import TEXT, write_tiny_model

from qrun.engine import Model
from qrun.engine.native import stacks

SMALL = 256 * 1024


@pytest.fixture
def small_stacks() -> Iterator[None]:
    before = threading.stack_size(SMALL)
    yield
    threading.stack_size(before)


def in_thread(function: Callable[[], object]) -> object:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found.pop()


def test_threads_have_room_unless_a_program_makes_them_small() -> None:
    assert stacks.has_room()
    assert in_thread(stacks.has_room) is True


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="the system rounds sizes up")
@pytest.mark.usefixtures("small_stacks")
def test_a_thread_with_little_room_is_found_and_ours_get_more() -> None:
    assert in_thread(stacks.has_room) is False
    with stacks.roomy_threads():
        assert in_thread(stacks.has_room) is True
    assert threading.stack_size() == SMALL


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of Linux")
def test_a_user_s_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (SMALL, SMALL))
    monkeypatch.setattr(stacks, "_of_thread", threading.local())
    assert not stacks.has_room()  # this is the first thread
    with stacks.roomy_threads():
        assert in_thread(stacks.has_room) is True
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    monkeypatch.setattr(stacks, "_of_thread", threading.local())
    assert stacks.has_room()


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="the system rounds sizes up")
@pytest.mark.usefixtures("small_stacks")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_model_answers_alike_in_a_thread_with_little_room(threads: int, tmp_path: Path) -> None:
    """Which no kernel runs in, neither of a prompt nor of an answer."""
    with Model.load(write_tiny_model(tmp_path / "model.gguf"), context=64, threads=threads) as model:
        prompt = TEXT[:40]

        def answer() -> str:
            return model.complete(prompt, max_tokens=5, temperature=0)

        assert in_thread(answer) == answer()


def test_an_interrupt_waits_for_the_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from types import SimpleNamespace
    from typing import Any

    import numpy as np

    from qrun.engine.native import team

    class Interrupted(team.SimpleQueue[None]):
        calls = 0

        def get(self, block: bool = True, timeout: float | None = None) -> None:
            self.calls += 1
            if self.calls == 1:
                raise KeyboardInterrupt
            super().get(block, timeout)

    monkeypatch.setattr(team, "SimpleQueue", Interrupted)
    done = threading.Event()
    crew: Any = SimpleNamespace(address=7, lead=lambda *arguments: done.set() if arguments == (7, 0, 0) else None)
    with pytest.raises(KeyboardInterrupt):
        team._lead_elsewhere(crew, np.zeros(1))
    assert done.is_set()
