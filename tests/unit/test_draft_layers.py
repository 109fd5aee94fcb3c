"""Draft layers of a model's own file compute what their graphs say, read along with the model, and change no text."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qrun.engine import Model
from qrun.engine.generation import draft as draft_module
from qrun.engine.generation.draft import Draft
from qrun.engine.generation.draft_layers import LayersDrafter
from qrun.engine.generation.guesses import Account
from qrun.engine.program.runtime import Runtime
from qrun.formats import FormatError, GGUFReader, GGUFWriter, TensorType, ValueType
from qrun.models import DRAFTS, architectures, build_drafts, build_graph
from qrun.models.graph import Graph
from tests.reference import hangs_on_a_digit, values_of
from tests.sketches import load, model

SKETCHES = {name: sketch for name, sketch in load().items() if sketch["architecture"] in DRAFTS}
COUNTS = {"mimo2": 2, "step35": 3}
"""Draft layers; others have one."""
NAMES = sorted(SKETCHES)


def type_of(value: Any) -> ValueType:
    if isinstance(value, bool):
        return ValueType.BOOL
    return {str: ValueType.STRING, int: ValueType.INT32, float: ValueType.FLOAT32}[type(value)]


def write_model(path: Path, name: str, *, layers: bool = True) -> Path:
    """A small random model whose last block comes again, as draft layers."""
    sketch = SKETCHES[name]
    architecture = sketch["architecture"]
    count = COUNTS.get(architecture, 1)
    rng = np.random.default_rng(3)
    metadata = {key.split(".", 1)[1]: value for key, value in sketch["metadata"].items()}
    n_layer, width = metadata["block_count"], metadata["embedding_length"]
    arrays = {key: tensor.dequantize() for key, tensor in model(sketch).tensors.items()}
    # States fade.
    arrays = {key: -np.abs(array) if key.endswith("ssm_a") else array for key, array in arrays.items()}
    stateful = {key.split(".")[1] for key in arrays if ".ssm_" in key}
    attending = max(layer for layer in range(n_layer) if str(layer) not in stateful)
    for layer in range(n_layer, n_layer + count):
        for key, array in list(arrays.items()):
            source = f"blk.{attending if '.attn' in key else n_layer - 1}."
            if key.startswith(source) and ".ssm_" not in key:
                arrays[key.replace(source, f"blk.{layer}.")] = array * rng.uniform(0.8, 1.2, array.shape)
        if layers:
            nextn = f"blk.{layer}.nextn"
            arrays[f"{nextn}.eh_proj.weight"] = rng.normal(0, (2 * width) ** -0.5, (width, 2 * width))
            for norm in ("enorm", "hnorm", "shared_head_norm"):
                arrays[f"{nextn}.{norm}.weight"] = rng.uniform(0.8, 1.2, width)
    metadata |= {"block_count": n_layer + count, "nextn_predict_layers": count}
    with GGUFWriter(path) as writer:
        writer.set_metadata("general.architecture", architecture, ValueType.STRING)
        for key, value in metadata.items():
            if isinstance(value, list):
                if len(value) == n_layer:
                    value = value + [value[attending if key.startswith("attention.") else -1]] * count
                writer.set_metadata(f"{architecture}.{key}", value, ValueType.ARRAY, type_of(value[0]))
            else:
                writer.set_metadata(f"{architecture}.{key}", value, type_of(value))
        for key, array in arrays.items():
            writer.add_tensor(key, TensorType.F32, array.shape)
        for key, array in arrays.items():
            writer.write_tensor(key, np.ascontiguousarray(array, np.float32))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Small models with draft layers, each written once."""
    folder = tmp_path_factory.mktemp("drafts")
    return functools.cache(lambda name: write_model(folder / f"{name}.gguf", name))


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """Guesses whenever there can be some, as many as a random number says."""
    monkeypatch.setattr(Account, "allows", lambda *_: True)
    monkeypatch.setattr(draft_module, "_PLAIN_FIRST", 1)
    monkeypatch.setattr(draft_module, "_PLAIN_EVERY", 1 << 30)
    monkeypatch.setattr(Draft, "_goes_on", lambda *_: rng.random() < 0.8)
    monkeypatch.setattr(Draft, "_best_count", lambda self, chances: len(chances))


def mostly_right(truth: list[int], rng: np.random.Generator) -> Callable[[LayersDrafter, int], np.ndarray]:
    """Draft layers that know the text, and forget one token of ten."""
    follow = LayersDrafter.follow

    def knowing(self: LayersDrafter, token: int) -> np.ndarray:
        logits = follow(self, token).copy()
        position = self._start + self._n_read + len(self._guessed)
        if position < len(truth) and rng.random() < 0.9:
            logits[truth[position]] = 100.0
        return logits

    return knowing


def precise(graph: Graph) -> Graph:
    """The same with a cache of float32."""
    return replace(graph, cache_layers=[replace(layer, precise=True) for layer in graph.cache_layers])


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_computes_what_the_graphs_say(files: Any, rng: np.random.Generator, name: str) -> None:
    with GGUFReader(files(name)) as reader:
        plain = precise(build_graph(reader, 64))
        graph, drafts = build_drafts(reader, plain)
        drafts = [precise(draft) for draft in drafts]
        assert graph.hidden is not None
        unclear = True
        while unclear:
            tokens = rng.integers(0, graph.n_vocab, 24)
            expected = values_of(graph, tokens)
            states = expected[graph.hidden.id]
            inputs = np.concatenate([np.zeros((1, graph.n_embd), np.float32), states[:-1]])
            by_drafts = [values_of(draft, tokens, inputs) for draft in drafts]
            computed = zip((graph, *drafts), (expected, *by_drafts), strict=True)
            unclear = any(hangs_on_a_digit(*one) for one in computed)
        assert np.array_equal(expected[graph.logits.id], values_of(plain, tokens)[plain.logits.id])

        runtime, usual = (Runtime(one, threads=1, context=64) for one in (graph, plain))
        taken: list[np.ndarray] = []
        logits = runtime.evaluate(runtime.sequence(), tokens, "all", tap=lambda *told: taken.append(told[2]))
        assert logits is not None
        assert np.array_equal(logits, usual.evaluate(usual.sequence(), tokens, "all"))
        assert error(taken[0], states) < 1e-6

        assert len(drafts) == COUNTS.get(graph.architecture, 1)
        for draft, expected in zip(drafts, by_drafts, strict=True):
            taken = []
            beside = Runtime(draft, threads=1, context=64, beside=runtime)
            result = beside.evaluate(
                beside.sequence(), tokens, "all", inputs=inputs, tap=lambda *told, to=taken: to.append(told[2])
            )
            assert result is not None and draft.hidden is not None
            assert error(result, expected[draft.logits.id]) < 1e-6
            assert error(np.concatenate(taken), expected[draft.hidden.id]) < 1e-6
            beside.close()
        runtime.close()


def error(result: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean((result - expected) ** 2) / np.mean(expected**2))


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_the_same_to_the_token(
    eager: None, monkeypatch: pytest.MonkeyPatch, files: Any, rng: np.random.Generator, name: str
) -> None:
    with (
        Model.load(files(name), threads=1, context=200, batch=64) as plain,
        Model.load(files(name), threads=1, context=200, batch=64, draft="mtp") as drafting,
    ):
        prompt = rng.integers(0, plain.graph.n_vocab, 80).tolist()
        greedy: list[int] = []
        for options in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.1}):
            expected = plain.session().generate(prompt, **options)
            list(expected)
            greedy = greedy or expected.tokens
            with monkeypatch.context() as patched:
                patched.setattr(LayersDrafter, "follow", mostly_right([*prompt, *expected.tokens], rng))
                guessed = drafting.session().generate(prompt, **options)
                list(guessed)
            assert (guessed.tokens, guessed.stop_reason) == (expected.tokens, expected.stop_reason)
            assert guessed.stats.accepted_tokens > 40
        unaided = drafting.session().generate(prompt, temperature=0.0, max_tokens=30)
        list(unaided)
        assert unaided.tokens == greedy[:30]
        assert unaided.stats.guessed_tokens > 0


@pytest.mark.parametrize("name", ["glm4moe-moe", "step35-moe-v1"])
def test_layers_know_all_that_the_model_has_read_and_kept(
    eager: None, monkeypatch: pytest.MonkeyPatch, files: Any, rng: np.random.Generator, name: str
) -> None:
    """After guesses of all lengths, right and wrong, they say the same to the bit as after one reading of the text."""
    with Model.load(files(name), threads=1, context=200, batch=32, draft="mtp") as drafting:
        prompt = rng.integers(0, drafting.graph.n_vocab, 50).tolist()
        session = drafting.session()
        first = session.generate(prompt, temperature=0.0, max_tokens=60, draft=False)
        list(first)
        session = drafting.session()
        with monkeypatch.context() as patched:
            patched.setattr(LayersDrafter, "follow", mostly_right([*prompt, *first.tokens], rng))
            list(session.generate(prompt, temperature=0.0, max_tokens=60))
        text = [*session.tokens, 5]
        fork = session.fork()
        other = drafting.session()
        list(other.generate(text[:-1], max_tokens=1, draft=False))
        said = [one._draft._drafter.read(text, 64, lambda: False).logits for one in (session, fork, other)]  # type: ignore[union-attr]
        assert np.array_equal(said[0], said[1])
        assert np.array_equal(said[0], said[2])


def test_a_shortened_text_goes_on_the_same(eager: None, files: Any) -> None:
    texts = []
    for draft in (None, "mtp"):
        with Model.load(files("glm4moe-moe"), threads=1, context=60, draft=draft) as one:
            generation = one.generate(
                [1, 2, 3], temperature=0.0, max_tokens=150, on_full=lambda tokens: tokens[:2] + tokens[-30:]
            )
            list(generation)
            texts.append(generation.tokens)
    assert len(texts[0]) == 150
    assert texts[0] == texts[1]


def test_a_saved_session_goes_on_with_draft_layers(eager: None, files: Any, tmp_path: Path) -> None:
    with Model.load(files("glm4moe-moe"), threads=1, context=128, draft="mtp") as one:
        whole = one.session().generate([1, 2, 3], max_tokens=30, temperature=0.0)
        list(whole)
        session = one.session()
        list(session.generate([1, 2, 3], max_tokens=10, temperature=0.0))
        session.save(tmp_path / "saved")
        loaded = one.session()
        loaded.load(tmp_path / "saved")
        rest = loaded.generate([1, 2, 3, *whole.tokens[:10]], max_tokens=20, temperature=0.0)
        list(rest)
        assert rest.tokens == whole.tokens[10:]
        assert rest.stats.guessed_tokens > 0


def test_what_draft_layers_have_read_is_not_kept_for_others(files: Any) -> None:
    """They would have to read it themselves: nobody can go on from it."""
    with Model.load(files("glm4moe-moe"), threads=1, context=128, draft="mtp") as one:
        one.complete([1, 2, 3], max_tokens=5)
        one.complete([1, 2, 3, 4], max_tokens=5)
        assert one.memory().cache_used == 0


def test_a_file_without_draft_layers_is_refused(tmp_path: Path) -> None:
    none = write_model(tmp_path / "none.gguf", "glm4moe-moe", layers=False)
    with pytest.raises(FormatError, match=r"none\.gguf: it has no draft layers \(mtp\): name another model"):
        Model.load(none, threads=1, draft="mtp")
    Model.load(none, threads=1).close()
    plain = Path(__file__).parents[1] / "data" / "arch" / "llama-dense.gguf"
    with pytest.raises(FormatError, match=r"llama-dense\.gguf: it has no draft layers"):
        Model.load(plain, threads=1, draft="mtp")


def test_draft_layers_of_an_architecture_that_nobody_knows_are_refused(
    monkeypatch: pytest.MonkeyPatch, files: Any
) -> None:
    monkeypatch.setattr(architectures, "DRAFTS", {name: build for name, build in DRAFTS.items() if name != "hy_v3"})
    with pytest.raises(FormatError, match=r"draft layers of hy_v3 are not supported \(supported: those of "):
        Model.load(files("hy_v3-moe"), threads=1, draft="mtp")
