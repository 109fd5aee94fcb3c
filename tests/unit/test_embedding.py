"""Vectors of texts through the public face, the command line and the server."""

from __future__ import annotations

import base64
import gc
import json
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asgi_client import call
from click.testing import CliRunner
from tiny_embedder import write_embedder
from tiny_model import write_tiny_model

from qrun.cli.main import cli
from qrun.engine import ContextOverflow, Model
from qrun.engine.program import runtime
from qrun.engine.simd.target import Target, host_target
from qrun.server import app, exchange, state
from qrun.server.exchange import dumps, in_parts

TEXTS = ["the cat sat", "a", "on the mat 42", "", "w" * 40, "the cat sat"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embedder(tmp_path_factory.mktemp("models") / "bert.gguf")


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with Model.load(path, threads=2) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Model.load(write_embedder(tmp_path_factory.mktemp("models") / "r.gguf", "bert-reranker"), threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Model.load(write_tiny_model(tmp_path_factory.mktemp("models") / "m.gguf"), threads=2, context=64) as loaded:
        yield loaded


# The library


def test_a_vector_is_the_same_to_the_bit_alone_and_in_any_company(model: Model, writer: Model) -> None:
    for loaded, texts in ((model, TEXTS), (writer, ["the cat sat", "a", "w" * 40])):
        for pooling in ("mean", "cls", "last"):
            vectors = loaded.embed(texts, pooling=pooling)  # type: ignore[arg-type]
            assert vectors.dtype == np.float32 and len(vectors) == len(texts)
            alone = [loaded.embed(text, pooling=pooling)[0] for text in texts]  # type: ignore[arg-type]
            assert np.array_equal(vectors, np.stack(alone))
    assert np.array_equal(model.embed(TEXTS)[0], model.embed(TEXTS)[-1])


def test_threads_and_callers_change_no_bit(model: Model, path: Path) -> None:
    expected = model.embed(TEXTS)
    with Model.load(path, threads=1, context=42) as other:
        assert np.array_equal(other.embed(TEXTS), expected)
    found: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: found.append(model.embed(TEXTS))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(np.array_equal(one, expected) for one in found)


def test_kernels_are_those_for_models_that_only_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def default_target(folded: bool = False) -> Target:
        asked.append(folded)
        return host_target()

    monkeypatch.setattr(runtime, "default_target", default_target)
    with Model.load(path, threads=1) as loaded:
        loaded.embed("a")
    assert asked == [True]


def test_poolings_are_what_they_say(model: Model) -> None:
    rows = model.embed(["the cat"], pooling="none", normalize=False)
    assert rows.shape == (len(model.tokenize("the cat")), 48)
    for pooling, expected in (("cls", rows[0]), ("last", rows[-1]), ("mean", rows.mean(0, dtype=np.float64))):
        vector = model.embed("the cat", pooling=pooling, normalize=False)[0]  # type: ignore[arg-type]
        np.testing.assert_allclose(vector, expected, rtol=1e-6, atol=1e-6)
    assert model.pooling == "cls"  # as the file says
    assert np.array_equal(model.embed("the cat"), model.embed("the cat", pooling="cls"))


def test_vectors_are_as_long_as_1_and_as_wide_as_is_asked_for(model: Model) -> None:
    plain = model.embed("the cat", normalize=False)[0]
    assert abs(np.linalg.norm(model.embed("the cat")[0]) - 1) < 1e-6 < abs(np.linalg.norm(plain) - 1)
    short = model.embed("the cat", dimensions=8)[0]
    np.testing.assert_allclose(short, plain[:8] / np.linalg.norm(plain[:8]), rtol=1e-5)
    with pytest.raises(ValueError, match="dimensions is 49, and the model's vectors have 48"):
        model.embed("the cat", dimensions=49)
    with pytest.raises(ValueError, match="dimensions must be at least 1, not 0"):
        model.embed("the cat", dimensions=0)
    assert model.embed([]).shape == (0, 48)


def test_an_instruction_goes_before_a_text_or_around_it(model: Model) -> None:
    expected = model.embed("query the cat")
    assert np.array_equal(model.embed("the cat", instruction="query "), expected)
    assert np.array_equal(model.embed("the", instruction="query {text} cat"), expected)


def test_tokens_are_texts_too(model: Model) -> None:
    assert np.array_equal(model.embed([model.tokenize("the cat"), "a"]), model.embed(["the cat", "a"]))
    with pytest.raises(ValueError, match=r"^the text: token 500 is not in the vocabulary"):
        model.embed([[500]])
    with pytest.raises(ValueError, match=r"^text 2 of 3: token 500 is not in the vocabulary"):
        model.embed(["a", [500], "b"])
    with pytest.raises(ValueError, match=r"^text 2 of 2 is empty"):
        model.embed(["a", []])
    with pytest.raises(ValueError, match=r"^the second is empty"):
        model.embed(["a", []], names=["the first", "the second"])


def test_a_text_that_is_too_long_is_an_error_or_cut(model: Model) -> None:
    text = "a " * 100
    with pytest.raises(ContextOverflow, match="text 2 of 2 has 102 tokens, and the context holds 64"):
        model.embed(["b", text])
    tokens = model.tokenize(text)
    assert np.array_equal(model.embed(text, truncate=True), model.embed([[*tokens[:63], tokens[-1]]]))


def test_what_a_model_does_not_make_is_said(model: Model, writer: Model) -> None:
    for ask in (
        lambda: model.complete("the"), lambda: model.chat("the"), lambda: model.logits([1, 2]), model.session,
        lambda: model.prompt_logprobs([1, 2]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="the model makes embeddings and no text"):
            ask()
    for one in (model, writer):
        with pytest.raises(ValueError, match="compares no texts"):
            one.rerank("a", ["b"])
    with pytest.raises(ValueError, match="pooling is 'sum', expected one of none, mean"):
        model.embed("a", pooling="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the text is empty"):
        writer.embed("")


def test_a_model_that_writes_makes_vectors_beside_its_texts(writer: Model) -> None:
    before = writer.complete("the", max_tokens=5, temperature=0)
    vector = writer.embed("the cat sat")[0]
    assert writer.pooling == "last" and vector.shape == (writer.graph.n_embd,)
    assert writer.complete("the", max_tokens=5, temperature=0) == before
    assert writer.memory().cache_used >= 0


def test_pairs_are_compared(reranker: Model) -> None:
    scores = reranker.rerank("the cat", ["a", "mat", "the cat sat"])
    assert scores.shape == (3,) and len(set(scores.tolist())) == 3
    assert scores[1] == reranker.rerank("the cat", ["mat"])[0]
    tokenizer = reranker.tokenizer
    assert tokenizer is not None
    cat, mat = (tokenizer.encode(text, add_special=False) for text in ("cat", "mat"))
    assert reranker.pair_tokens("cat", "mat") == [2, *cat, 3, *mat, 3]
    with pytest.raises(ContextOverflow):
        reranker.rerank("the", ["a " * 90])
    assert len(reranker.pair_tokens("the", "a " * 90, truncate=True)) == 64


def test_a_template_for_pairs_is_filled_and_its_special_tokens_alone_count(tmp_path: Path) -> None:
    metadata = {"tokenizer.chat_template.rerank": "[CLS]q {query}[SEP]d {document}"}
    path = write_embedder(tmp_path / "m.gguf", "qwen3-reranker", metadata)
    with Model.load(path, threads=1) as loaded:
        assert loaded.pooling == "rank" and not loaded.embeds
        scores = loaded.embed([loaded.pair_tokens("cat", "mat")], pooling="rank")
        assert scores.shape == (1, 2) and abs(scores.sum() - 1) < 1e-6
        assert loaded.rerank("cat", ["mat"])[0] == scores[0, 0]
        plain = loaded.pair_tokens("cat", "mat")
        assert plain.count(2) == plain.count(3) == 1
        assert loaded.pair_tokens("cat[SEP]", "mat").count(3) == 1
        cut = loaded.pair_tokens("cat", "a " * 90, truncate=True)
        assert len(cut) == 64 and cut[: len(plain) - 3] == [*plain[: len(plain) - 3]]


# The command line


def run(*arguments: object, input: str | None = None) -> Any:
    return CliRunner().invoke(cli, ["embed", *map(str, arguments)], input=input)


def test_embed_prints_lines_of_json(path: Path, model: Model, tmp_path: Path) -> None:
    found = run(path, "the cat", "a")
    assert found.exit_code == 0, found.stderr
    vectors = np.array([json.loads(line) for line in found.stdout.splitlines()], np.float32)
    assert np.array_equal(vectors, model.embed(["the cat", "a"]))
    file = tmp_path / "texts.txt"
    file.write_text("the cat\n\na\n")
    assert run(path, "--file", file).stdout == found.stdout
    lines = tmp_path / "texts.jsonl"
    lines.write_text('"the cat"\n{"text": "a"}\n')
    assert run(path, "-f", lines).stdout == found.stdout
    assert run(path, "-f", "-", input="the cat\na\n").stdout == found.stdout


def test_embed_names_the_text_that_is_wrong(path: Path, tmp_path: Path) -> None:
    long = "x " * 100
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(["a", "", *["b"] * 80, "", long, "c"]))
    lines = tmp_path / "texts.jsonl"
    lines.write_text("\n".join(["", *['"b"'] * 70, json.dumps({"text": long})]))
    for arguments, name in (
        (["-f", file], f"{file}, line 84"),
        (["-f", lines], f"{lines}, line 72"),
        ([*["a"] * 70, long, "-f", file], "text 71 of 71"),
        (["a", long], "text 2 of 2"),
    ):
        found = run(path, *arguments)
        assert str(found.exception) == f"{name} has 102 tokens, and the context holds 64"
    found = run(path, "-f", "-", input=f"a\n\n{long}")
    assert str(found.exception).startswith("standard input, line 3 has 102 tokens")


def test_a_line_of_a_text_ends_at_its_newline_alone(path: Path, model: Model, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    texts = ["the\u2028cat", "a\x0cmat", "on the mat"]
    file.write_bytes("\r\n".join(texts).encode())
    vectors = [json.loads(line) for line in run(path, "-f", file).stdout.splitlines()]
    assert np.array_equal(np.array(vectors, np.float32), model.embed(texts))


@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_a_numpy_file_of_many_texts_is_what_numpy_would_have_written(
    pooling: str, path: Path, model: Model, tmp_path: Path
) -> None:
    texts = [f"the cat {i}" for i in range(150)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    found = run(path, "-f", tmp_path / "texts.txt", "-o", tmp_path / "found.npy", "--pooling", pooling)
    assert found.exit_code == 0, found.exception
    np.save(tmp_path / "expected.npy", model.embed(texts, pooling=pooling))  # type: ignore[arg-type]
    expected = np.load(tmp_path / "expected.npy", mmap_mode="r")
    assert np.array_equal(np.load(tmp_path / "found.npy", mmap_mode="r"), expected)
    assert (tmp_path / "found.npy").stat().st_size == (tmp_path / "expected.npy").stat().st_size


def test_a_numpy_file_that_cannot_be_completed_leaves_what_was_there(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors.npy"
    out.write_bytes(b"before")
    found = run(path, *["a"] * 70, "x " * 100, "-o", out)
    assert found.exit_code == 1 and "text 71 of 71" in str(found.exception)
    assert out.read_bytes() == b"before" and [file.name for file in tmp_path.iterdir()] == [out.name]
    found = run(tmp_path / "no-model.gguf", "a", "-o", tmp_path / "no-folder" / "vectors.npy")
    assert "no-folder" in str(found.exception)  # said before a model is loaded


def test_vectors_are_not_kept_while_others_are_made(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Printed or written, memory does not grow with the texts."""
    made: list[weakref.ref[np.ndarray]] = []
    most = 0
    embed = Model.embed

    def counted(*arguments: Any, **options: Any) -> np.ndarray:
        nonlocal most
        gc.collect()
        most = max(most, sum(one() is not None for one in made))
        vectors = embed(*arguments, **options)
        made.append(weakref.ref(vectors))
        return vectors

    monkeypatch.setattr(Model, "embed", counted)
    for more in ((), ("-o", tmp_path / "vectors.npy")):
        assert run(path, *["a"] * 300, *more).exit_code == 0
    assert len(made) == 10 and most <= 1


def test_embed_writes_a_numpy_file(path: Path, model: Model, tmp_path: Path) -> None:
    out = tmp_path / "vectors.npy"
    found = run(path, "the cat", "a", "-o", out, "--dimensions", 8, "--pooling", "mean", "--no-normalize")
    assert (found.exit_code, found.stdout) == (0, "")
    assert np.array_equal(np.load(out), model.embed(["the cat", "a"], dimensions=8, pooling="mean", normalize=False))


def test_embed_ranks(tmp_path: Path, reranker: Model) -> None:
    path, out = write_embedder(tmp_path / "r.gguf", "bert-reranker"), tmp_path / "scores.npy"
    found = run(path, "--query", "the cat", "a", "mat")
    expected = reranker.rerank("the cat", ["a", "mat"])
    assert [np.float32(line) for line in found.stdout.split()] == list(expected)
    assert run(path, "--query", "the cat", "a", "mat", "-o", out).exit_code == 0
    assert np.array_equal(np.load(out), expected)


def test_embed_says_what_is_wrong(path: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('"a"\n3\n')
    for arguments, words in (
        (["x " * 100], "the text has 102 tokens, and the context holds 64"),
        (["-f", bad], "bad.jsonl, line 2: it is neither a text nor an object"),
        (["-f", tmp_path / "none.txt"], "No such file or directory"),
        ([], "There are no texts"),
        (["a", "-o", "x.json"], "ends in .npy"),
        (["a", "--query", "b"], "compares no texts"),
        (["a", "--query", "b", "--pooling", "mean"], "--query goes with no --pooling"),
    ):
        found = run(path, *arguments)
        assert found.exit_code != 0 and not found.stdout
        assert words in found.stderr + str(found.exception), arguments


def test_info_says_what_a_model_is_for(path: Path, tmp_path: Path) -> None:
    for file, words in (
        (path, "embeddings, by the first row of a text"),
        (write_embedder(tmp_path / "r.gguf", "bert-reranker"), "reranking: it says how well texts answer a query"),
        (write_embedder(tmp_path / "q.gguf", "qwen3-embedding"), "embeddings, by the last row of a text"),
    ):
        told = CliRunner().invoke(cli, ["info", str(file)])
        assert f"it is for       {words}" in told.stdout, told.stdout


# The server


@pytest.fixture
def served(model: Model) -> Any:
    return app({"bert": model})


def test_embeddings_as_openai_has_them(served: Any, model: Model) -> None:
    texts = ["the cat", "a"]
    answer = call(served, "POST", "/v1/embeddings", {"input": texts, "model": "bert"}).json()
    assert [one["index"] for one in answer["data"]] == [0, 1]
    vectors = np.array([one["embedding"] for one in answer["data"]], np.float32)
    assert np.array_equal(vectors, model.embed(texts))
    n_tokens = sum(len(model.tokenize(text)) for text in texts)
    assert answer["usage"] == {"prompt_tokens": n_tokens, "total_tokens": n_tokens} and answer["model"] == "bert"

    def asked(**body: Any) -> np.ndarray:
        told = call(served, "POST", "/v1/embeddings", body).json()["data"]
        raw = [base64.b64decode(one["embedding"]) for one in told]
        return np.stack([np.frombuffer(one, "<f4") for one in raw])

    assert np.array_equal(asked(input="the cat", encoding_format="base64"), vectors[:1])
    assert np.array_equal(asked(input=model.tokenize("the cat"), encoding_format="base64"), vectors[:1])
    ids = [model.tokenize(text) for text in texts]
    assert np.array_equal(asked(input=ids, encoding_format="base64"), vectors)
    few = asked(input=texts, encoding_format="base64", dimensions=6)
    assert np.array_equal(few, model.embed(texts, dimensions=6))


@pytest.mark.parametrize(
    "body",
    [{}, {"input": ""}, {"input": []}, {"input": 3}, {"input": [1, "a"]}, {"input": {"a": 1}}, {"input": ["a", ""]},
     {"input": "a", "encoding_format": "int8"}, {"input": "a", "dimensions": 0}, {"input": "a", "dimensions": 500},
     {"input": [[]]}, {"input": [999]}, {"input": "x " * 100}],
)  # fmt: skip
def test_wrong_requests_are_the_clients_fault(served: Any, body: dict[str, Any]) -> None:
    answer = call(served, "POST", "/v1/embeddings", body)
    assert answer.status == 400 and answer.json()["error"]["message"], answer.text


def test_errors_name_one_of_many_texts(served: Any, reranker: Model) -> None:
    long = "x " * 100
    for route, name in (("/v1/embeddings", "input"), ("/embedding", "content")):
        answer = call(served, "POST", route, {name: [*["a"] * 40, long, "b"]})
        assert answer.status == 400 and "text 41 of 42 has 102: the request" in answer.text
        answer = call(served, "POST", route, {name: [*[[5]] * 40, [999], [6]]})
        assert answer.status == 400 and "text 41 of 42: token 999 is not in the vocabulary" in answer.text
    answer = call(app({"ranker": reranker}), "POST", "/rerank", {"query": "a", "documents": [*["a"] * 40, long]})
    assert answer.status == 400 and "document 41 of 41 has " in answer.text


@pytest.mark.parametrize(
    ("route", "name"), [("/v1/embeddings", "input"), ("/embedding", "content"), ("/api/embed", "input")]
)
def test_vectors_are_put_into_words_beside_the_event_loop(
    route: str, name: str, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()

    def noted(value: Any) -> str:
        threads.add(threading.current_thread().name)
        return in_parts(value)

    monkeypatch.setattr(state, "in_parts", noted)
    assert call(served, "POST", route, {name: ["the cat", "a"]}).status == 200
    assert len(threads) == 1 and threads.pop().startswith("qrun server")


def test_json_in_parts_is_the_same_json() -> None:
    values: list[Any] = [{}, [], [[]], {"a": {}}, "é", None, [1, 2.5]]
    values += [[None, {"b": [1, {"c": "\u2028"}]}], {"d": [[0.1], []], "e": 3}]
    for value in (*values, values, {"all": values}):
        assert in_parts(value) == dumps(value)
    made: list[int] = []

    def counted(value: Any) -> str:
        made.append(len(value) if isinstance(value, list) else 1)
        return dumps(value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "dumps", counted)
        in_parts({"data": [{"index": i, "embedding": [0.5] * 100} for i in range(50)]})
    assert max(made) <= 100  # nothing holds the interpreter for longer than a vector takes


def test_embeddings_as_ollama_has_them(served: Any, model: Model) -> None:
    told = call(served, "POST", "/api/embed", {"model": "bert", "input": ["the cat", "a"]}).json()
    assert np.array_equal(np.array(told["embeddings"], np.float32), model.embed(["the cat", "a"]))
    assert told["prompt_eval_count"] == 11 and told["total_duration"] > 0
    assert call(served, "POST", "/api/embed", {"model": "bert", "input": ""}).json()["embeddings"] == []
    cut = call(served, "POST", "/api/embed", {"input": "a " * 100}).json()["embeddings"]
    assert np.array_equal(np.array(cut, np.float32), model.embed("a " * 100, truncate=True))
    refused = call(served, "POST", "/api/embed", {"input": "a " * 100, "truncate": False})
    assert refused.status == 400 and isinstance(refused.json()["error"], str)
    old = call(served, "POST", "/api/embeddings", {"prompt": "the cat"}).json()["embedding"]
    assert np.array_equal(np.array(old, np.float32), model.embed("the cat", normalize=False)[0])


def test_embeddings_as_llama_server_has_them(served: Any, model: Model) -> None:
    for path in ("/embedding", "/embeddings"):
        told = call(served, "POST", path, {"content": ["the cat", "a"]}).json()
        vectors = np.array([one["embedding"][0] for one in told], np.float32)
        assert np.array_equal(vectors, model.embed(["the cat", "a"]))
    assert call(served, "POST", "/embedding", {}).status == 400


def test_documents_are_ranked(reranker: Model) -> None:
    served = app({"ranker": reranker})
    documents = ["a", "mat", "the cat sat"]
    scores = reranker.rerank("the cat", documents)
    best = sorted(range(3), key=lambda i: -scores[i])
    told = call(served, "POST", "/v1/rerank", {"query": "the cat", "documents": documents}).json()
    assert [one["index"] for one in told["results"]] == best
    assert np.array_equal([np.float32(one["relevance_score"]) for one in told["results"]], scores[best])
    assert told["usage"]["total_tokens"] > 0
    body = {"query": "the cat", "documents": [{"text": one} for one in documents], "top_n": 1, "return_documents": True}
    (first,) = call(served, "POST", "/reranking", body).json()["results"]
    assert first["document"] == {"text": documents[best[0]]}
    texts = call(served, "POST", "/rerank", {"query": "the cat", "texts": documents, "return_text": True}).json()
    assert [one["text"] for one in texts] == [documents[i] for i in best]
    for wrong in ({}, {"query": "a"}, {"query": "a", "documents": [3]}, {"query": "a", "documents": "b"}):
        assert call(served, "POST", "/v1/rerank", wrong).status == 400
    assert call(served, "GET", "/v1/models").json()["data"][0]["capabilities"] == ["embedding", "rerank"]


def test_a_model_that_makes_vectors_alone_says_so_when_it_is_asked_to_write(served: Any) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    for path, more in (("/v1/chat/completions", body), ("/v1/completions", {"prompt": "a"}), ("/api/chat", body)):
        answer = call(served, "POST", path, more)
        assert answer.status == 400 and "makes embeddings and no text" in answer.text
    assert call(served, "POST", "/v1/rerank", {"query": "a", "documents": ["b"]}).status == 400


def test_a_model_that_predicts_nothing_is_measured_by_no_text(path: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "imatrix.gguf"
    text.write_text("the cat sat on the mat " * 100)
    for name, wanted, *arguments in (
        ("perplexity", "perplexity", text),
        ("imatrix", "importance matrix", text, "-o", out),
        ("compare", "perplexity", "--text", text),
    ):
        found = CliRunner().invoke(cli, [name, str(path), *map(str, arguments), "--ctx", "16"])
        assert str(found.exception) == (
            f"{path}: it does not predict the next token (embeddings, by the first row of a text), so that there is no "
            f"{wanted} of it"
        )
    assert not out.exists()
