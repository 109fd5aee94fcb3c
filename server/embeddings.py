"""Vectors of texts, and how well documents answer a query: `/v1/embeddings`, Ollama's `/api/embed` and
`/api/embeddings`, llama-server's `/embedding`, and `/v1/rerank`."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from qrun.engine.embedding.embedder import names_of, numbers
from qrun.server import fields
from qrun.server.errors import APIError
from qrun.server.exchange import Exchange
from qrun.server.ollama import keep_alive
from qrun.server.prompts import Prompt, read_prompts
from qrun.server.state import State
from qrun.server.threads import in_daemon

if TYPE_CHECKING:
    from qrun.engine import Model
    from qrun.server.hub import Entry

MAX_INPUTS = 2048
AT_A_TIME = 32
"""Texts, between which it is noticed that a client has gone."""


async def vectors_of(
    state: State, model: Model, tokenize: Callable[[], list[list[int]]], names: list[str], **options: Any
) -> tuple[list[np.ndarray], int]:
    """A vector for each of some texts, and how many tokens they have. tokenize: gives their tokens, in another thread.
    names: of the texts, for errors. options: those of `Model.embed`."""
    async with state.turns.place() as place:
        await place.turn()
        tokens = await state.in_thread(tokenize)
        vectors: list[np.ndarray] = []
        for start in range(0, len(tokens), AT_A_TIME):
            some = slice(start, start + AT_A_TIME)
            vectors += list(await in_daemon(partial(model.embed, tokens[some], names=names[some], **options)))
    count = sum(min(len(one), model.context) for one in tokens)
    state.metrics.prompt_tokens += count
    return vectors, count


async def embedded(state: State, entry: Entry, inputs: list[Prompt], **options: Any) -> tuple[list[np.ndarray], int]:
    """The same of texts and lists of token ids."""
    model = entry.loaded

    def tokenize() -> list[list[int]]:
        return [model.embedding_tokens(one) if isinstance(one, str) else one for one in inputs]

    return await vectors_of(state, model, tokenize, names_of(len(inputs)), **options)


async def openai(state: State, exchange: Exchange) -> None:
    """`/v1/embeddings`; with `content` in the place of `input` it is llama-server's."""
    body = exchange.body
    if body.get("input") is None and body.get("content") is not None:
        await llama_server(state, exchange)
        return
    if body.get("input") is None:
        raise APIError("input is missing", param="input")
    inputs = read_prompts(body["input"], "input", MAX_INPUTS)
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

        def told() -> dict[str, Any]:
            data = [{"object": "embedding", "index": i, "embedding": one(vector)} for i, vector in enumerate(vectors)]
            usage = {"prompt_tokens": count, "total_tokens": count}
            return {"object": "list", "data": data, "model": entry.id, "usage": usage}

        await state.answer(exchange, told)


async def llama_server(state: State, exchange: Exchange) -> None:
    """`/embedding`: a list, whose vectors are lists of one vector. `embd_normalize` -1 leaves vectors as they are."""
    body = exchange.body
    given = body.get("content") if body.get("content") is not None else body.get("input")
    inputs = read_prompts(given, "content", MAX_INPUTS)
    kind = fields.field(body, "embd_normalize", fields.whole, 2)
    if kind not in (-1, 2):
        raise fields.wrong("embd_normalize", "2 (the length 1) or -1 (as they are)", kind)
    async with state.hub.use(body.get("model")) as entry:
        vectors, _ = await embedded(state, entry, inputs, normalize=kind == 2)
        await state.answer(
            exchange, lambda: [{"index": i, "embedding": [numbers(vector)]} for i, vector in enumerate(vectors)]
        )


async def ollama(state: State, exchange: Exchange) -> None:
    """`/api/embed`: texts that are too long are cut, unless `truncate` is false."""
    body = exchange.body
    given = body.get("input", "")
    inputs = [] if given in ("", []) else read_prompts(given, "input", MAX_INPUTS)
    truncate = fields.field(body, "truncate", fields.truth, True)
    dimensions = fields.optional(body, "dimensions", fields.whole)
    async with state.hub.use(body.get("model")) as entry:
        keep_alive(entry, body)
        loaded = time.perf_counter()
        vectors, count = await embedded(state, entry, inputs, truncate=truncate, dimensions=dimensions)
        await state.answer(exchange, lambda: {
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
        usage = {"prompt_tokens": count, "total_tokens": count}
        whole = {"model": entry.id, "object": "list", "usage": usage, "results": results}
        await state.answer(exchange, lambda: results if texts_only else whole)


async def _scores(state: State, model: Model, query: str, documents: list[str]) -> tuple[list[float], int]:
    """How well each document answers the query, and how many tokens all the pairs have."""

    def tokenize() -> list[list[int]]:
        return [model.pair_tokens(query, document) for document in documents]

    names = names_of(len(documents), "document")
    vectors, count = await vectors_of(state, model, tokenize, names, pooling="rank")
    return [numbers(vector)[0] for vector in vectors], count
