"""Models, sessions and generations that nobody closes: dropped anywhere, in any order, in any state of the process.

Each script runs in a process of its own, since what goes wrong here ends the process.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tiny_model import ARCHITECTURES

MODEL = ARCHITECTURES / "llama-dense.gguf"
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is not there on this system")
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads and memory in /proc")

BEGINNING = f"""
import gc, os, sys, threading, time
from qrun.engine import Model
def load(**options):
    return Model.load({str(MODEL)!r}, threads=2, context=64, **options)
PROMPT = [1, 2, 3, 4]
"""


def run(script: str, *flags: str, seconds: float = 240, **environment: str) -> str:
    """What a script prints, in a new process that has to end well."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", BEGINNING + textwrap.dedent(script)],
        capture_output=True, text=True, timeout=seconds, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-3000:]}"
    assert "Exception ignored" not in done.stderr and "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stdout


LOADS = """
def direct():
    load().logits([1, 2, 3])
def held_by_a_function():
    model = load()
    return model.logits([1, 2])
def bound_anew():
    for _ in range(2):
        model = load()
        model.logits([1])
def an_exception():
    try:
        model = load()
        model.logits([1])
        raise ZeroDivisionError
    except ZeroDivisionError:
        pass
def a_generation_that_lives_longer():
    generation = load().generate(PROMPT, max_tokens=8)
    assert len(list(generation)) == 8
def a_generation_dropped_half_way():
    next(load().generate(PROMPT, max_tokens=8))
def a_session_that_lives_longer():
    session = load().session()
    list(session.generate(PROMPT, max_tokens=4))
    fork = session.fork()
    del session
    assert len(list(fork.generate([*PROMPT, 5], max_tokens=3))) == 3
def a_cycle():
    model = load()
    model.itself = model
    model.logits([1])
def read_by_another_thread():
    generation = load().generate(PROMPT, max_tokens=30)
    thread = threading.Thread(target=list, args=(generation,))
    thread.start()
    del generation
    thread.join()
def closed_half_way():
    model = load()
    thread = threading.Thread(target=list, args=(model.generate(PROMPT, max_tokens=40),))
    thread.start()
    model.close()
    thread.join()
def closed():
    with load() as model:
        model.logits([1])
WAYS = [direct, held_by_a_function, bound_anew, an_exception, a_generation_that_lives_longer,
        a_generation_dropped_half_way, a_session_that_lives_longer, a_cycle, read_by_another_thread, closed_half_way,
        closed]
def memory():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
def settled(threads=0):
    gc.collect()
    end = time.monotonic() + 60
    while [thread for thread in threading.enumerate() if thread.name.startswith("qrun-")]:  # they end by themselves
        if time.monotonic() > end:
            break
        time.sleep(0.01)
    counts = []  # the system has a thread for some milliseconds after Python has seen its end
    while not counts or (min(counts) > threads and (time.monotonic() < end if threads else len(counts) < 30)):
        time.sleep(0.01)
        counts.append(len(os.listdir("/proc/self/task")))
    return min(counts), memory()
gc.set_threshold(*THRESHOLD)
for i in range(22):
    WAYS[i % len(WAYS)]()
threads, before = settled()
for i in range(COUNT):
    WAYS[(i * 7) % len(WAYS)]()
after = settled(threads)
assert after[0] <= threads, f"{threads} threads became {after[0]}"
assert after[1] < before * 1.05, f"{before} kB became {after[1]}"
"""
COUNT = int(os.environ.get("QRUN_TEST_LOADS", "100"))
"""How many loads; `make soak` wants 1,000 of them."""


@needs_proc
@pytest.mark.parametrize(
    ("flags", "threshold"),
    [((), (700, 10, 10)), (("-X", "dev"), (700, 10, 10)), ((), (1, 1, 1))],
    ids=["as usual", "dev mode", "collecting all the time"],
)
def test_loads_of_all_kinds_leave_neither_threads_nor_memory(
    flags: tuple[str, ...], threshold: tuple[int, ...]
) -> None:
    run(f"COUNT, THRESHOLD = {COUNT}, {threshold}\n" + LOADS, *flags, seconds=1200)


@needs_proc
@pytest.mark.slow  # a thousand loads beside two busy loops: `make soak` runs it
@pytest.mark.skipif("QRUN_TEST_LOADS" not in os.environ, reason="set QRUN_TEST_LOADS to the number of loads")
def test_loads_beside_busy_loops() -> None:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        run(f"COUNT, THRESHOLD = {COUNT}, (700, 10, 10)\n" + LOADS, seconds=2400)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@pytest.mark.parametrize(
    "state",
    [
        "model = load(); model.logits(PROMPT)",
        "generation = load().generate(PROMPT, max_tokens=40); next(generation)",
        "model = load(); model.itself = model; generation = model.generate(PROMPT, max_tokens=40); next(generation)",
        "model = load(); sys.modules['keeper'] = model.session()",
        "threading.Thread(target=list, args=(load().generate(PROMPT * 4, max_tokens=40),), daemon=True).start()",
        "threading.Thread(target=list, args=(load().generate(PROMPT * 4, max_tokens=40),)).start()",
        "models = [load() for _ in range(4)]\n"
        "def read(model):\n"
        "    while True: model.logits(PROMPT)\n"
        "for model in models: threading.Thread(target=read, args=(model,), daemon=True).start()\n"
        "time.sleep(0.2)",
        "import atexit; model = load(); atexit.register(lambda: print(len(model.logits(PROMPT))))",
        "model = load(); model.logits(PROMPT); model.close(); model.close()",
        "import weakref; model = load(); weakref.finalize(model, lambda session: session.close(), model.session())",
    ],
    ids=lambda state: state[:40],
)
def test_the_interpreter_may_end_in_any_state(state: str) -> None:
    run(state)
    run(f"gc.set_threshold(1)\n{state}\nsys.exit(0)", "-X", "dev")


def test_what_outlives_its_model_goes_on_to_the_same_tokens() -> None:
    printed = run("""
        model = load()
        expected = model.generate(PROMPT, max_tokens=12, temperature=0)
        list(expected)
        generation = model.generate(PROMPT, max_tokens=12, temperature=0)
        next(generation)
        session = model.session()
        del model
        gc.collect()
        list(generation)
        again = session.generate(PROMPT, max_tokens=12, temperature=0)
        list(again)
        print(expected.tokens == generation.tokens == again.tokens, len(again.tokens))
    """)
    assert printed.split() == ["True", "12"]


@needs_fork
def test_after_a_fork_the_child_goes_on_with_the_model_and_loads_others() -> None:
    printed = run("""
        model = load()
        def tokens(model):
            generation = model.generate(PROMPT, max_tokens=12, temperature=0)
            list(generation)
            return generation.tokens
        expected = tokens(model)
        stop = threading.Event()
        def read():
            while not stop.is_set():
                model.logits(PROMPT * 8)
                tokens(model)
        others = [threading.Thread(target=read) for _ in range(2)]
        for other in others: other.start()
        children = []
        for _ in range(5):
            child = os.fork()
            if child == 0:
                same = tokens(model) == expected == tokens(load())
                model.stop()
                model.close()
                os._exit(0 if same else 1)
            children.append(child)
        print([os.waitpid(child, 0)[1] for child in children])
        stop.set()
        for other in others: other.join()
        print(tokens(model) == expected)
    """, seconds=60)  # fmt: skip
    assert printed.splitlines() == ["[0, 0, 0, 0, 0]", "True"]


@needs_fork
def test_a_child_ends_what_the_parent_generates() -> None:
    printed = run("""
        model = load()
        generations = [model.session().generate(PROMPT, max_tokens=50, ignore_eos=True) for _ in range(3)]
        for _ in range(2):
            for generation in generations: next(generation)
        assert all(generation._task for generation in generations)
        def states(first):
            children = []
            for _ in range(8):
                child = os.fork()
                if child == 0:
                    first()
                    os._exit(0)
                children.append(child)
            return [os.waitpid(child, 0)[1] for child in children]
        def read():
            try:
                for _ in generations[0]: pass
                os._exit(1)
            except RuntimeError as error:
                assert "forked" in str(error)
            for generation in generations:
                generation.cancel()
                assert not list(generation) and generation.stop_reason == "cancelled"
            assert len(list(model.session().generate(PROMPT, max_tokens=3, ignore_eos=True))) >= 3
            model.close()
        held, over = threading.Event(), threading.Event()
        def hold():  # what the children find held, by a thread that they do not have
            with model._host.scheduler.lock:
                held.set()
                over.wait()
        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()
        print(states(read), states(model.stop), states(model.close))
        over.set()
        holder.join()
        for generation in generations: list(generation)
        print([len(generation.tokens) for generation in generations])
    """, seconds=60)  # fmt: skip
    assert printed.splitlines() == [" ".join([str([0] * 8)] * 3), "[50, 50, 50]"]


@needs_fork
def test_a_child_can_load_models_whatever_other_threads_were_loading() -> None:
    printed = run("""
        stop = threading.Event()
        def load_and_drop():
            while not stop.is_set():
                load().logits(PROMPT)
        others = [threading.Thread(target=load_and_drop) for _ in range(3)]
        for other in others: other.start()
        expected = load().logits(PROMPT).tobytes()
        states = []
        for _ in range(12):
            child = os.fork()
            if child == 0:
                os._exit(0 if load().logits(PROMPT).tobytes() == expected else 1)
            states.append(os.waitpid(child, 0)[1])
        stop.set()
        for other in others: other.join()
        print(states)
    """, seconds=120)  # fmt: skip
    assert printed.strip() == str([0] * 12)


@needs_fork
def test_a_generation_that_another_thread_was_reading_at_a_fork_says_so_in_the_child() -> None:
    printed = run("""
        model = load()
        session = model.session()
        runtime, parent = model._runtime, os.getpid()
        team_run, computing, forked = runtime._team.run, threading.Event(), threading.Event()
        def waiting(*arguments):
            if os.getpid() == parent and threading.current_thread() is not threading.main_thread():
                computing.set()
                forked.wait(60)
            team_run(*arguments)
        runtime._team.run = waiting
        generation = session.generate(PROMPT, max_tokens=3)
        thread = threading.Thread(target=list, args=(generation,))
        thread.start()
        computing.wait(60)
        child = os.fork()
        if child == 0:
            try:
                next(generation)
            except RuntimeError as error:
                print(error, flush=True)
            try:
                session.fork()
            except RuntimeError as error:
                print(error, flush=True)
            session.close()
            model.close()
            os._exit(0)
        os.waitpid(child, 0)
        forked.set()
        thread.join()
        print(len(generation.tokens))
    """, seconds=60)  # fmt: skip
    assert printed.splitlines() == [
        "this generation was in use by another thread when the process forked: begin another",
        "this session was in use by another thread when the process forked: begin another",
        "3",
    ]


def test_an_idle_thread_sleeps_soon_whatever_else_the_machine_does() -> None:
    printed = run("""
        import subprocess
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * os.cpu_count())]
        try:
            model = load()
            for _ in range(3):
                model.logits(PROMPT)
            time.sleep(1)
            before = time.process_time()
            time.sleep(1)
            print(time.process_time() - before)
        finally:
            for loop in loops:
                loop.kill()
                loop.wait()
    """)
    assert float(printed) < 0.02
