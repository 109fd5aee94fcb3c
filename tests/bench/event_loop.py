"""How long an event loop has to wait while a model is loaded, compiled for, read into and generated with.

    python tests/bench/event_loop.py model.gguf
    python tests/bench/event_loop.py model.gguf --loop qt --threads 2 --prompt 3000
    QRUN_KERNELS=kernels python tests/bench/event_loop.py model.gguf --loop window

A loop wakes every two milliseconds, as a window does that is drawn. What lies between two times beyond that is a gap:
in that time nothing can be clicked. First come the gaps of the same loop while nothing is done, and while other
processes keep all cores busy: what the machine itself does, which nobody can mend. Beside the worst gap stands how long
this process computed in it, all of its threads together: where that is much less, others had the cores.

`--loop window` is the sample in examples/desktop_qt, which is asked a question of so many words: what it draws counts,
too. They are the first of `--text`, or a sentence again and again.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from qrun.engine.native.cpu_count import available_cores

TICK = 0.002
"""Seconds."""
WANTED = 0.05
"""The longest gap in seconds that nobody feels."""

Work = Callable[[], Any]


class Gaps:
    """Those of a loop that calls `tick` again and again."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.worst_computing = 0.0
        self._before = time.perf_counter()
        self._computed = time.process_time()

    def tick(self) -> None:
        """The loop has come round."""
        now, computed = time.perf_counter(), time.process_time()
        gap = now - self._before - TICK
        if gap >= max(self.seconds, default=0):
            self.worst_computing = computed - self._computed
        self.seconds.append(gap)
        self._before, self._computed = now, computed


def gaps_with_asyncio(work: Work) -> tuple[Any, Gaps]:
    """What `work` returns, done in another thread, and the gaps of an event loop meanwhile."""

    async def main() -> tuple[Any, Gaps]:
        working = asyncio.create_task(asyncio.to_thread(work))
        gaps = Gaps()
        while not working.done():
            await asyncio.sleep(TICK)
            gaps.tick()
        return await working, gaps

    return asyncio.run(main())


def gaps_with_qt(work: Work) -> tuple[Any, Gaps]:
    """The same of Qt's loop."""
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    from PySide6.QtCore import QCoreApplication, Qt, QTimer

    app = QCoreApplication.instance() or QCoreApplication([])
    results: list[Any] = []

    def tick() -> None:
        gaps.tick()
        if not working.is_alive():
            app.quit()

    timer = QTimer(timerType=Qt.TimerType.PreciseTimer, interval=int(TICK * 1000))
    timer.timeout.connect(tick)
    working = threading.Thread(target=lambda: results.append(work()))
    gaps = Gaps()
    working.start()
    timer.start()
    app.exec()
    working.join()
    return results[0], gaps


LOOPS = {"asyncio": gaps_with_asyncio, "qt": gaps_with_qt}


def measure_window(model: Path, threads: int, text: str, tokens: int) -> Iterator[tuple[str, Gaps]]:
    """The gaps of the window's loop from its first to its last moment, by what it does."""
    words = len(text.split())
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "desktop_qt"))
    import qrun_desktop
    from PySide6.QtCore import Qt, QTimer

    def started(window: Any) -> None:
        window.settings.values.update(temperature=0, max_tokens=tokens, context=3 * words + tokens, threads=threads)
        window.load(str(model))

        def tick() -> None:
            phases[-1][1].tick()
            if len(phases) == 1 and not window._busy:
                begin(f"reading {words} words")
                window.line.setPlainText(text)
                window.send()
            elif len(phases) == 2 and window._busy and window.transcript.answer.text:
                begin(f"generating {tokens} tokens")
            elif len(phases) in (2, 3) and not window._busy:
                failed.append(window.status.toolTip() if window.transcript.answer is None else "")
                begin("closing")
                QTimer.singleShot(100, window.close)

        timer = QTimer(window, timerType=Qt.TimerType.PreciseTimer, interval=int(TICK * 1000))
        timer.timeout.connect(tick)
        begin("opening, loading")
        timer.start()

    def begin(name: str) -> None:
        phases.append((name, Gaps()))

    phases: list[tuple[str, Gaps]] = []
    failed: list[str] = []
    status = qrun_desktop.main(["qrun-desktop-bench"], started)
    yield from phases
    if status or any(failed):
        raise SystemExit(f"the window ended with {status}: {failed}")


def busy(until: float) -> None:
    """A process that computes and holds nothing that others need."""
    while time.time() < until:
        np.dot(np.ones(1000), np.ones(1000))


@contextmanager
def busy_processes(count: int, seconds: float) -> Iterator[None]:
    """Other programs."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=busy, args=(time.time() + seconds + 2,), daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    time.sleep(1)
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


HEAD = "p50, p99, worst, computing in that (ms); gaps over 50 ms; seconds"


def row(name: str, gaps: Gaps) -> str:
    """What HEAD says."""
    p50, p99, worst = np.percentile(gaps.seconds, [50, 99, 100]) * 1000
    over = sum(gap > WANTED for gap in gaps.seconds)
    seconds = sum(gaps.seconds) + TICK * len(gaps.seconds)
    return f"{name:34} {p50:8.1f} {p99:8.1f} {worst:8.1f} {gaps.worst_computing * 1000:8.1f} {over:6} {seconds:8.1f}"


def measure(
    model: Path, loop: str, threads: int, prompt: int, tokens: int, seconds: float
) -> Iterator[tuple[str, Gaps]]:
    """The gaps of each thing that is done. Kernels are compiled into an empty cache first."""
    gaps_of = LOOPS[loop]
    yield "nothing", gaps_of(lambda: time.sleep(seconds))[1]
    with busy_processes(threads, seconds):
        yield f"{threads} other programs", gaps_of(lambda: time.sleep(seconds))[1]

    from qrun.engine import Model

    def load() -> Model:
        return Model.load(model, threads=threads, context=prompt + tokens + 8)

    loaded, gaps = gaps_of(load)
    yield "loading, compiling", gaps
    loaded.close()
    loaded, gaps = gaps_of(load)
    yield "loading, kernels ready", gaps
    text = [5 + i % 90 for i in range(prompt)]
    generation = loaded.generate(text, max_tokens=tokens, temperature=0)
    yield f"reading {prompt} tokens", gaps_of(lambda: next(generation))[1]
    yield f"generating {tokens} tokens", gaps_of(lambda: list(generation))[1]
    yield "closing", gaps_of(loaded.close)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--loop", choices=[*LOOPS, "window"], default="asyncio")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--prompt", type=int, default=3000)
    parser.add_argument("--text", type=Path, help="a file whose first words a window is asked")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=5, help="how long nothing, and other programs, are measured")
    parser.add_argument("--in-process", action="store_true", help="compile in this process, as packed apps do")
    args = parser.parse_args()
    if args.in_process:
        sys.frozen = True  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["QRUN_CACHE"] = cache
        print(f"{args.loop}, {args.threads} threads: {HEAD}")
        if args.loop == "window":
            os.environ |= {name: cache for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME")}
            text = args.text.read_text("utf-8") if args.text else "Words, and some more of them.\n" * args.prompt
            (end,) = [found.end() for found in islice(re.finditer(r"\S+", text), args.prompt)][-1:]
            found = measure_window(args.model, args.threads, text[:end], args.tokens)
        else:
            found = measure(args.model, args.loop, args.threads, args.prompt, args.tokens, args.seconds)
        for name, gaps in found:
            print(row(name, gaps), flush=True)


if __name__ == "__main__":
    main()
