"""The bench of an event loop's gaps: it runs, and sees a loop that is held up."""

import sys
import time
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import event_loop


def loops() -> list[str]:
    try:
        import PySide6.QtCore  # noqa: F401
    except ImportError:
        return ["asyncio"]
    return ["asyncio", "qt"]


@pytest.mark.parametrize("loop", loops())
def test_a_thread_that_holds_the_interpreter_is_seen(loop: str) -> None:
    numbers = [1.5] * 3_000_000

    def hold() -> str:
        time.sleep(0.05)
        numbers.sort()
        for _ in range(3):
            numbers.sort()
            sum(numbers)  # one call that does not let go
        return "done"

    result, gaps = event_loop.LOOPS[loop](hold)
    assert result == "done" and len(gaps.seconds) > 5
    start = time.thread_time()  # what others do meanwhile does not count
    sum(numbers)
    assert max(gaps.seconds) > (time.thread_time() - start) / 3


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_tiny_model(tmp_path / "m.gguf")
    measured = dict(event_loop.measure(model, "asyncio", 1, 100, 10, 0.1))
    assert list(measured)[2:] == [
        "loading, compiling", "loading, kernels ready", "reading 100 tokens", "generating 10 tokens", "closing",
    ]  # fmt: skip
    assert all(gaps.seconds for gaps in measured.values())
    assert event_loop.row("x", measured["closing"]).startswith("x  ")
