"""What all tests share."""

import os
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from qrun.engine.native import workers
from qrun.engine.native.codegen import code_digest
from qrun.engine.native.object_cache import ObjectCache
from qrun.engine.simd.target import Target
from qrun.models.interpreter import interpreter
from tests import reference

# On a busy machine anything may take long.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


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


class _Compiler:
    """A process that compiles kernels and stays for the next ones, until they are for another target or it has grown:
    Numba keeps some of what it has made."""

    MOST = 40

    def __init__(self) -> None:
        self._worker: workers._Worker | None = None
        self._target: Target | None = None
        self._count = 0

    def compile(self, key: str, target: Target, python: Sequence[str]) -> bytes:
        if self._target != target or self._count == self.MOST:
            self.close()
        if self._worker is None:
            self._worker, self._target, self._count = workers._Worker(target, python), target, 0
            self._worker.begin()
        self._count += 1
        return self._worker.compile(key)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


@pytest.fixture(scope="session", autouse=True)
def _one_compiler() -> Iterator[None]:
    """Kernels that a test lacks are compiled in a process that stays for the next test. Many tests lack some, and a
    pool of new processes, which import Numba first, takes longer than most kernels do.

    Of two runs of tests beside each other that want the same kernels one begins with the last of them, and what one has
    compiled the other only reads. Tests with a cache of their own, as those of the compiler are, compile as qrun does.
    """
    compiler, compile_all = _Compiler(), workers.compile_all
    python, place = interpreter(), os.environ.get("QRUN_CACHE")
    from_the_end = os.environ.get("PYTEST_XDIST_WORKER", "gw0")[-1] in "13579"

    def compile_here(keys: Sequence[str], target: Target) -> Generator[tuple[str, bytes] | None, None, None]:
        waiting = list(keys) if from_the_end else list(reversed(keys))
        cache = ObjectCache(code_digest(target))
        while waiting and python and os.environ.get("QRUN_CACHE") == place:
            try:
                code = cache.read(waiting[-1]) or compiler.compile(waiting[-1], target, python)
            except (OSError, workers._Died):
                compiler.close()
                break
            yield waiting.pop(), code
        if waiting:
            yield from compile_all(waiting, target)

    workers.compile_all = compile_here
    yield
    workers.compile_all = compile_all
    compiler.close()
