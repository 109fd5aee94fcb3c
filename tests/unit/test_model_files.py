"""Models loaded from files: small random ones, mostly without a tokenizer, with windows shorter than the texts."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_folders import copy

from qrun.cli import main
from qrun.engine import Model
from qrun.formats import FormatError

ARCH = Path(__file__).parents[1] / "data" / "arch"


@pytest.fixture(scope="module", params=["llama-dense", "gemma3-dense", "mistral"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Of the last, all layers see a window."""
    path = ARCH / f"{request.param}.gguf"
    if request.param == "mistral":
        folder = copy("mistral", tmp_path_factory.mktemp("model"), lambda config: config.update(sliding_window=24))
        path = folder / "model.gguf"
        assert main.main(["convert", str(folder), str(path), "--type", "f32"]) == 0
    with Model.load(path, threads=2, context=256) as model:
        yield model


def prompts(model: Model, count: int, length: int = 150) -> Iterator[list[int]]:
    """Prompts of which many share beginnings."""
    random = np.random.default_rng(0)
    texts = random.integers(0, model.graph.n_vocab, (3, length))
    for _ in range(count):
        start = int(random.integers(1, length))
        end = random.integers(0, model.graph.n_vocab, random.integers(0, 20))
        yield [*texts[random.integers(3)][:start].tolist(), *end.tolist()]


def run(session: Any, prompt: list[int]) -> tuple[list[int], list[float | None]]:
    generation = session.generate(prompt, max_tokens=4, seed=1, temperature=1.0)
    return generation.tokens, [piece.logprob for piece in generation]


def test_what_a_session_reuses_changes_nothing(model: Model) -> None:
    session = model.session()
    for prompt in prompts(model, 30):
        with model.session() as fresh:
            assert run(session, prompt) == run(fresh, prompt)


def test_a_saved_session_goes_on_as_the_one_that_was_saved(model: Model, tmp_path: Path) -> None:
    for prompt in prompts(model, 8):
        with model.session() as session, model.session() as other:
            run(session, prompt)
            session.save(tmp_path / "saved")
            other.load(tmp_path / "saved")
            fork = session.fork()
            more = [*session.tokens, 1, 2, 3]
            assert run(session, more) == run(other, more) == run(fork, more)
            fork.close()


def test_a_session_of_another_model_is_refused(tmp_path: Path) -> None:
    with (
        Model.load(ARCH / "llama-dense.gguf", threads=1) as llama,
        Model.load(ARCH / "qwen2-dense.gguf", threads=1) as qwen2,
    ):
        run(session := llama.session(), [1, 2, 3])
        session.save(tmp_path / "saved")
        with pytest.raises(FormatError, match="saved by a session of another model"):
            qwen2.session().load(tmp_path / "saved")


def test_two_threads_get_what_one_gets(model: Model) -> None:
    wanted = list(prompts(model, 10))
    expected = []
    for prompt in wanted:
        with model.session() as session:
            expected.append(run(session, prompt))
    results: dict[int, Any] = {}

    def work(name: int) -> None:
        with model.session() as session:
            results[name] = [run(session, prompt) for prompt in wanted]

    threads = [threading.Thread(target=work, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: expected, 1: expected}


def test_generate_takes_token_ids(model: Model) -> None:
    generation = model.generate([1, 2, 3], max_tokens=5, temperature=0)
    pieces = list(generation)
    assert len(pieces) == 5 and (model.tokenizer is not None or pieces == [""] * 5)
    logits = model.logits([1, 2, 3, *generation.tokens])
    assert logits[2:7].argmax(axis=1).tolist() == generation.tokens


def test_defaults_of_load() -> None:
    with Model.load(ARCH / "llama-dense.gguf") as model:
        assert model.context == min(model.graph.context_length, 4096)
        assert model.threads >= 1
        assert (model.tokenizer, model.chat_template, model.chat_notice) == (None, None, None)
        with pytest.raises(ValueError, match=r"llama-dense.gguf: tokenizer kind 'test' is not supported"):
            model.complete("text")


def test_a_model_of_short_contexts_is_built_for_the_context_it_runs_with(tmp_path: Path) -> None:
    """The default is more than it was trained for; its rope factors for long contexts are not for that."""
    path = tmp_path / "model.gguf"
    folder = ARCH.parent / "huggingface" / "phi-longrope"
    override = "phi3.context_length=int:16"
    assert main.main(["convert", str(folder), str(path), "--type", "f32", "--override", override]) == 0
    reference = np.load(folder / "reference.npz")
    expected = reference["short_logits"]
    tokens = reference["tokens"][: len(expected)].tolist()
    with Model.load(path, threads=1) as model:
        assert model.context == model.graph.context == 16
        assert np.mean((model.logits(tokens) - expected) ** 2) <= 1e-6 * np.mean(expected**2)
    with Model.load(path, threads=1, context=64) as model:  # now they are
        assert np.mean((model.logits(tokens) - expected) ** 2) > 1e-6 * np.mean(expected**2)


def test_closing_twice_and_using_afterwards() -> None:
    model = Model.load(ARCH / "llama-dense.gguf", threads=2)
    session = model.session()
    before = threading.active_count()
    model.close()
    model.close()
    assert threading.active_count() <= before
    with pytest.raises(RuntimeError, match=r"^llama-dense.gguf: the model is closed$"):
        model.logits([1])
    with pytest.raises(RuntimeError, match="the session is closed, or its model"):
        session.generate([1])


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(FormatError) as caught:
        Model.load(tmp_path / "bad.gguf")
    assert "bad.gguf" in str(caught.value) and "\n" not in str(caught.value)
    for path in (tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(OSError, match=path.name):
            Model.load(path)
    with pytest.raises(ValueError, match="cache_type 'f8'"):
        Model.load(ARCH / "llama-dense.gguf", cache_type="f8")
