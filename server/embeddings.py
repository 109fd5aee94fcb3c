"""Vectors of texts, and how well documents answer a query: `/v1/embeddings`, Ollama's `/api/embed` and
`/api/embeddings`, llama-server's `/embedding`, and `/v1/rerank`."""

from __future__ import annotations

import base64
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from qrun.engine.embedding.embedder import numbers
from qrun.server import fields
from qrun.server.errors import APIError
from qrun.server.exchange import Exchange
from qrun.server.ollama import keep_alive
from qrun.server.state import State
from qrun.server.threads import in_daemon

if TYPE_CHECKING:
    from qrun.engine import Model
    from qrun.server.hub import Entry

MAX_INPUTS = 2048
AT_A_TIME = 32
"""Texts, between which it is noticed that a client has gone."""

Input = str | list[int]


def read_inputs(value: Any, name: str) -> list[Input]:
    """A text, a list of texts, a list of token ids, or a list of such lists."""
    problem = f"{name} must be a text, a list of texts, a list of token ids, or a list of such lists"
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise APIError(problem, param=name)
    if not value:
        raise APIError(f"{name} is empty", param=name)
    if all(_is_id(one) for one in value):
        return [list(value)]
    if len(value) > MAX_INPUTS:
        raise APIError(f"{name} has {len(value)} texts: a request can have {MAX_INPUTS}", param=name)
    for one in value:
        if not isinstance(one, str) and not (isinstance(one, list) and all(_is_id(id) for id in one)):
            raise APIError(problem, param=name)
    return list(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


async def embedded(state: State, entry: Entry, inputs: list[Input], **options: Any) -> tuple[list[np.ndarray], int]:
    """A vector for each text, and how many tokens they have. options: those of `Model.embed`."""
    model = entry.loaded

    def tokenize() -> list[list[int]]:
        return [model.embedding_tokens(one) if isinstance(one, str) else one for one in inputs]

    async with state.turns.place() as place:
        await place.turn()
        tokens = await state.in_thread(tokenize)
        vectors: list[np.ndarray] = []
        for start in range(0, len(tokens), AT_A_TIME):
            vectors += list(await in_daemon(lambda at=start: model.embed(tokens[at : at + AT_A_TIME], **options)))
    count = sum(min(len(one), model.context) for one in tokens)
    state.metrics.prompt_tokens += count
    return vectors, count


async def openai(state: State, exchange: Exchange) -> None:
    """`/v1/embeddings`; with `content` in the place of `input` it is llama-server's."""
    body = exchange.body
    if body.get("input") is None and body.get("content") is not None:
        await llama_server(state, exchange)
        return
    if body.get("input") is None:
        raise APIError("input is missing", param="input")
    inputs = read_inputs(body["input"], "input")
    if any(one == "" for one in inputs):
        raise APIError("input has an empty text", param="input")
    encoding = fields.field(body, "encoding_format", fields.text, "float")
    if encoding not in ("float", "base64"):
        raise fields.wrong("encoding_format", "float or base64", encoding)
    dimensions = fields.optional(body, "dimensions", fields.whole)
    async with state.hub.use(body.get("model")) as entry:
        vectors, count = await embedded(state, entry, inputs, dimensions=dimensions)

        def one(vector: np.ndarray) -> Any:
            if encoding == "base64":
                return base64.b64encode(vector.astype("<f4").tobytes()).decode()
            return numbers(vector)

        data = [{"object": "embedding", "index": i, "embedding": one(vector)} for i, vector in enumerate(vectors)]
        usage = {"prompt_tokens": count, "total_tokens": count}
        await exchange.json({"object": "list", "data": data, "model": entry.id, "usage": usage})


async def llama_server(state: State, exchange: Exchange) -> None:
    """`/embedding`: a list, whose vectors are lists of one vector. `embd_normalize` -1 leaves vectors as they are."""
    body = exchange.body
    given = body.get("content") if body.get("content") is not None else body.get("input")
    inputs = read_inputs(given, "content")
    kind = fields.field(body, "embd_normalize", fields.whole, 2)
    if kind not in (-1, 2):
        raise fields.wrong("embd_normalize", "2 (the length 1) or -1 (as they are)", kind)
    async with state.hub.use(body.get("model")) as entry:
        vectors, _ = await embedded(state, entry, inputs, normalize=kind == 2)
        await exchange.json([{"index": i, "embedding": [numbers(vector)]} for i, vector in enumerate(vectors)])


async def ollama(state: State, exchange: Exchange) -> None:
    """`/api/embed`: texts that are too long are cut, unless `truncate` is false."""
    body = exchange.body
    given = body.get("input", "")
    inputs = [] if given in ("", []) else read_inputs(given, "input")
    truncate = fields.field(body, "truncate", fields.truth, True)
    dimensions = fields.optional(body, "dimensions", fields.whole)
    async with state.hub.use(body.get("model")) as entry:
        keep_alive(entry, body)
        loaded = time.perf_counter()
        vectors, count = await embedded(state, entry, inputs, truncate=truncate, dimensions=dimensions)
        await exchange.json({
            "model": entry.id,
            "embeddings": [numbers(vector) for vector in vectors],
            "total_duration": int((time.perf_counter() - exchange.arrived) * 1e9),
            "load_duration": int((loaded - exchange.arrived) * 1e9),
            "prompt_eval_count": count,
        })  # fmt: skip


async def ollama_old(state: State, exchange: Exchange) -> None:
    """`/api/embeddings`: one text, whose vector has whatever length it has."""
    body = exchange.body
    text = fields.field(body, "prompt", fields.text, "")
    async with state.hub.use(body.get("model")) as entry:
        keep_alive(entry, body)
        vectors, _ = await embedded(state, entry, [text] if text else [], truncate=True, normalize=False)
        await exchange.json({"embedding": numbers(vectors[0]) if vectors else []})


async def rerank(state: State, exchange: Exchange) -> None:
    """`/v1/rerank`, as Jina and Cohere have it; with `texts` in the place of `documents` as Hugging Face's server."""
    body = exchange.body
    query = fields.field(body, "query", fields.text, "")
    if not query:
        raise APIError("query is missing", param="query")
    texts_only = body.get("documents") is None and body.get("texts") is not None
    name = "texts" if texts_only else "documents"
    given = fields.items(body, name)
    documents = [fields.text(name, one.get("text") if isinstance(one, dict) else one) for one in given]
    if not documents:
        raise APIError(f"{name} is missing or empty", param=name)
    if len(documents) > MAX_INPUTS:
        raise APIError(f"{name} has {len(documents)} texts: a request can have {MAX_INPUTS}", param=name)
    top = fields.field(body, "top_n", fields.whole, len(documents))
    returned = fields.field(body, "return_documents return_text", fields.truth, False)
    async with state.hub.use(body.get("model")) as entry:
        scores, count = await _scores(state, entry.loaded, query, documents)
        order = sorted(range(len(documents)), key=lambda i: (-scores[i], i))[: max(top, 0)]
        score, text = ("score", "text") if texts_only else ("relevance_score", "document")

        def one(i: int) -> dict[str, Any]:
            told: dict[str, Any] = {"index": i, score: scores[i]}
            if returned:
                told[text] = documents[i] if texts_only else {"text": documents[i]}
            return told

        results = [one(i) for i in order]
        if texts_only:
            await exchange.json(results)
            return
        usage = {"prompt_tokens": count, "total_tokens": count}
        await exchange.json({"model": entry.id, "object": "list", "usage": usage, "results": results})


async def _scores(state: State, model: Model, query: str, documents: list[str]) -> tuple[list[float], int]:
    async with state.turns.place() as place:
        await place.turn()
        pairs = await state.in_thread(lambda: [model.pair_tokens(query, document) for document in documents])
        scores: list[float] = []
        for start in range(0, len(pairs), AT_A_TIME):
            some = await in_daemon(lambda at=start: model.embed(pairs[at : at + AT_A_TIME], pooling="rank"))
            scores += numbers(some[:, 0])
    count = sum(map(len, pairs))
    state.metrics.prompt_tokens += count
    return scores, count
