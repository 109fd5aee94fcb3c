"""Beginnings of texts that are kept on disk: the same bits, in a folder that may be shared, full, or damaged."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_random_model import SMALL, random_model

from qrun.engine import CacheWarning, Model
from qrun.engine.generation import disk_prefixes, prefixes, session_file
from qrun.engine.generation.disk_prefixes import DiskPrefixes
from qrun.engine.program import runtime

DATA = Path(__file__).parents[1] / "data" / "arch"
LLAMA = DATA / "llama-dense.gguf"
# Attention to all, sliding windows, and states beside and in place of attention.
KINDS = ["llama", "gemma3", "qwen35", "mamba2"]


@pytest.fixture(autouse=True)
def short_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_prefixes, "WORTH", 64)
    monkeypatch.setattr(prefixes, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(prefixes, "CLOSING_SECONDS", 60.0)  # a disk that others use may be slow


def load(path: Path, folder: Path | None, **options: Any) -> Model:
    return Model.load(path, threads=1, context=512, cache_disk=folder, **options)


def answer(model: Model, prompt: list[int]) -> tuple[list[int], list[float | None], int]:
    generation = model.generate(prompt, max_tokens=6, temperature=0)
    pieces = list(generation)
    logprobs = [piece.logprob for piece in pieces if piece.token is not None]
    return generation.tokens, logprobs, generation.stats.cached_tokens


def texts(rng: np.random.Generator, n_vocab: int, n: int = 200) -> list[int]:
    found: list[int] = rng.integers(0, n_vocab, n).tolist()
    return found


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.prefix"))


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_a_folder_that_cannot_be_is_refused_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(*_: Any, **__: Any) -> Any:
        raise AssertionError("kernels were compiled for nothing")

    monkeypatch.setattr(runtime, "load_kernels", compiled)
    (file := tmp_path / "file").write_text("")
    for folder in (file, file / "kept"):
        with pytest.raises(NotADirectoryError) as caught:
            load(LLAMA, folder)
        assert str(caught.value.filename).startswith(str(file))


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_process_goes_on_from_there_to_the_same_bits(
    kind: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    path, folder = DATA / f"{kind}-dense.gguf", tmp_path / "kept"
    if not path.is_file():
        path = tmp_path / "model.gguf"
        random_model.write(path, "F32", random_model.ARCHITECTURES[kind](**SMALL[kind]))
    with load(path, folder) as model:
        begin = texts(rng, model.graph.n_vocab)
        own = [texts(rng, model.graph.n_vocab, 20) for _ in range(3)]
        first = answer(model, begin)
        for rest in own[:2]:  # where texts part is learnt from the second on
            answer(model, begin + rest)
    assert kept(folder)
    with load(path, folder) as model:
        tokens, logprobs, cached = answer(model, begin + own[2])
    with load(path, None) as model:
        again = answer(model, begin + own[2])
        assert answer(model, begin)[:2] == first[:2]
    assert (tokens, logprobs) == again[:2]
    assert cached >= 128 and again[2] == 0


def test_the_folder_and_its_files_are_for_their_owner(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = tmp_path / "a" / "b"
    with load(LLAMA, folder) as model:
        answer(model, texts(rng, model.graph.n_vocab))
    assert os.stat(folder).st_mode & 0o777 == 0o700
    assert [os.stat(path).st_mode & 0o777 for path in kept(folder)] == [0o600]
    os.chmod(folder, 0o777)
    with pytest.raises(PermissionError, match=f"{folder}"):
        load(LLAMA, folder)
    with pytest.raises(NotADirectoryError):
        load(LLAMA, LLAMA)


def test_short_texts_and_what_is_there_already_are_not_written(tmp_path: Path, rng: np.random.Generator) -> None:
    with load(LLAMA, tmp_path / "kept") as model:
        answer(model, texts(rng, model.graph.n_vocab, 30))
    assert kept(tmp_path / "kept") == []
    for extra in (0, 10, 200):  # only the last has much more to say
        with load(LLAMA, tmp_path / "kept") as model:
            begin = [1, 2, 3] * 40
            answer(model, begin + [4] * extra)
        assert len(kept(tmp_path / "kept")) == 1
    with load(LLAMA, tmp_path / "kept") as model:
        assert answer(model, begin + [4] * 200)[2] == 319


def test_what_is_idle_is_written_while_the_model_lives(tmp_path: Path, rng: np.random.Generator) -> None:
    with load(LLAMA, tmp_path / "kept") as model, load(LLAMA, tmp_path / "kept") as other:
        prompt = texts(rng, model.graph.n_vocab)
        expected = answer(model, prompt)
        wait_for(lambda: kept(tmp_path / "kept"))
        assert answer(other, prompt) == (*expected[:2], 199)  # of another server, at the same time
        wait_for(lambda: model._host.prefixes._writer is None)


def test_what_has_no_room_in_memory_leaves_by_the_disk(tmp_path: Path, rng: np.random.Generator) -> None:
    with load(LLAMA, None) as model:
        size = model._runtime.bytes_of(256)
    with load(LLAMA, tmp_path / "kept", cache_bytes=8 * size) as model:
        prefixes = [texts(rng, model.graph.n_vocab) for _ in range(12)]
        first = answer(model, prefixes[0])
        for prompt in prefixes[1:]:
            answer(model, prompt)
            wait_for(lambda: not model._host.prefixes._leaving)  # the thread that writes gives way to all others
        wait_for(lambda: len(kept(tmp_path / "kept")) == 12)
        again = answer(model, prefixes[0])
        assert again == (*first[:2], 199)
        assert model._runtime.cache_bytes <= 11 * size


def test_what_has_to_go_while_its_turn_to_be_written_comes_is_written(tmp_path: Path, rng: np.random.Generator) -> None:
    with load(LLAMA, tmp_path / "kept") as model:
        kept_ones = model._host.prefixes
        chosen, gone, write = threading.Event(), threading.Event(), kept_ones.write

        def late(cache: Any) -> None:
            chosen.set()
            assert gone.wait(60)
            write(cache)

        kept_ones.write = late  # type: ignore[method-assign]
        answer(model, texts(rng, model.graph.n_vocab))
        assert chosen.wait(60)
        assert kept_ones.trim(kept_ones.limit)
        gone.set()
        wait_for(lambda: len(kept(tmp_path / "kept")) == 1 and not kept_ones._leaving)
        assert model._runtime.cache_bytes == 0


def test_a_model_that_is_closed_waits_for_a_slow_disk_for_a_while_only(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, folder = session_file.write, tmp_path / "kept"

    def slow(path: Any, saved: Any) -> None:
        time.sleep(0.2)
        write(path, saved)

    monkeypatch.setattr(session_file, "write", slow)
    monkeypatch.setattr(prefixes, "IDLE_SECONDS", 60.0)
    monkeypatch.setattr(prefixes, "CLOSING_SECONDS", 0.3)
    with load(LLAMA, folder) as model:
        sessions = [model.session() for _ in range(6)]
        for session in sessions:
            list(session.generate(texts(rng, model.graph.n_vocab), max_tokens=1))
    assert 1 <= len(kept(folder)) <= 2  # those that begin within the time
    assert all(session.closed for session in sessions)


def test_together_with_others_nobody_waits_for_the_disk(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = tmp_path / "kept"
    with load(LLAMA, folder) as model:
        prompt = texts(rng, model.graph.n_vocab)
        expected = answer(model, prompt)[0]
    with load(LLAMA, folder) as model:
        disk = model._host.prefixes.disk
        assert disk is not None
        going, loading = threading.Event(), disk.load

        def slow(*arguments: Any) -> Any:
            assert going.wait(60)
            return loading(*arguments)

        disk.load = slow  # type: ignore[method-assign]
        results: list[list[int]] = []

        def run() -> None:
            generation = model.generate(prompt, max_tokens=6, temperature=0)
            list(generation)
            assert generation.stats.cached_tokens == 199
            results.append(generation.tokens)

        other = model.generate([1, 2, 3], max_tokens=100, temperature=0)
        next(other)
        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert len(list(other)) == 99
        assert results == []
        going.set()
        for thread in threads:
            thread.join()
        assert results == [expected] * 3


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_damaged_files_are_deleted_and_told_once(
    damage: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefixes, "IDLE_SECONDS", 600.0)  # they are written again when the model is closed
    folder = tmp_path / "kept"
    with load(LLAMA, folder) as model:
        prompts = [[first, *texts(rng, model.graph.n_vocab, 199)] for first in (1, 2)]  # have no beginning in common
        expected = [answer(model, prompt)[:2] for prompt in prompts]
    for path in kept(folder):
        content = bytearray(path.read_bytes())
        if damage == "flip":
            content[len(content) // 2] ^= 1
        path.write_bytes({"cut": content[:-700], "empty": b"", "other": b"no archive" * 999}.get(damage, content))
    lines: list[str] = []
    with load(LLAMA, folder, notice=lines.append) as model:
        assert [answer(model, prompt) for prompt in prompts] == [(*one, 0) for one in expected]
        assert not kept(folder) or damage == "flip"
    assert len(lines) == 1 and str(folder) in lines[0] and "\n" not in lines[0]
    with load(LLAMA, folder) as model:  # and they have been written again
        assert answer(model, prompts[0])[2] == 199


def test_a_file_that_is_found_before_its_writer_is_done_stays(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = session_file.write
    with load(LLAMA, tmp_path / "kept") as model:
        disk = model._host.prefixes.disk
        assert disk is not None

        def write_and_look(path: Any, saved: Any) -> None:
            write(path, saved)
            assert disk.longest(saved.tokens, ())[0] == len(saved.tokens)

        monkeypatch.setattr(session_file, "write", write_and_look)
        answer(model, texts(rng, model.graph.n_vocab))
    assert len(kept(tmp_path / "kept")) == 1


def test_the_folder_is_bounded_and_the_oldest_goes(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = tmp_path / "kept"
    with load(LLAMA, folder) as model:
        one = texts(rng, model.graph.n_vocab)
        answer(model, one)
    size = os.path.getsize(kept(folder)[0])
    os.utime(kept(folder)[0], (1, 1))
    left = folder / f".{kept(folder)[0].name}.12345678.part"
    left.write_bytes(b"x")
    os.utime(left, (1, 1))
    for _ in range(3):
        with load(LLAMA, folder, cache_disk_bytes=int(2.5 * size)) as model:
            answer(model, one)
            answer(model, texts(rng, model.graph.n_vocab))
        assert len(kept(folder)) == 2
        time.sleep(0.01)
    assert not left.exists()
    with load(LLAMA, folder, cache_disk_bytes=int(2.5 * size)) as model:
        assert answer(model, one)[2] == 199


def test_a_disk_that_is_full_is_told_once(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qrun.engine.generation import session_file

    def full(path: Any, saved: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(session_file, "write", full)
    with pytest.warns(CacheWarning, match="No space left") as found, load(LLAMA, tmp_path / "kept") as model:
        for _ in range(3):
            answer(model, texts(rng, model.graph.n_vocab))
    assert len(found) == 1


def test_other_types_of_caches_and_models_have_files_of_their_own(tmp_path: Path, rng: np.random.Generator) -> None:
    prompt = texts(rng, 100)
    for i, options in enumerate(({}, {"cache_type": "q8_0"})):
        with load(LLAMA, tmp_path / "kept", **options) as model:
            assert answer(model, prompt)[2] == 0
        assert len(kept(tmp_path / "kept")) == i + 1


def test_a_folder_that_goes_away_is_no_error(tmp_path: Path, rng: np.random.Generator) -> None:
    import shutil

    with load(LLAMA, tmp_path / "kept", notice=lambda text: None) as model:
        shutil.rmtree(tmp_path / "kept")
        assert answer(model, texts(rng, model.graph.n_vocab))[2] == 0
        assert isinstance(model._host.prefixes.disk, DiskPrefixes)
