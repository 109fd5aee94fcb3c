"""`/v1/models`, `/health`, `/metrics`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrun.server.errors import APIError
from qrun.server.exchange import Exchange
from qrun.server.facts import facts_of
from qrun.server.state import State

if TYPE_CHECKING:
    from qrun.server.hub import Entry

STATIC = Path(__file__).parent / "static"
# Of the page and its files: nothing comes from elsewhere, no other site may show them within its own, and browsers ask
# whether they have changed, as they must be of one version.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def capabilities(entry: Entry) -> list[str]:
    """What a model can, in the words of several interfaces."""
    model = entry.model
    if model is None:
        return ["completion"]
    found = ["completion"]
    if model.tokenizer is not None:
        try:
            template = model.chat_template
        except ValueError:
            return found
        if template is not None and not template.is_fallback:
            found += ["chat"]
            if template.knows_tools:
                found.append("tools")
            if template.format.thoughts is not None:
                found.append("thinking")
    return found


def describe(entry: Entry) -> dict[str, Any]:
    """A model, with its context in every client's spelling. Of one that is not loaded less is known."""
    told: dict[str, Any] = {
        "id": entry.id,
        "object": "model",
        "created": entry.created,
        "owned_by": "qrun",
        "state": "loaded" if entry.model is not None else "not-loaded",
        "capabilities": capabilities(entry),
        "architecture": {"modality": "text->text", "input_modalities": ["text"], "output_modalities": ["text"]},
    }
    model = entry.model
    if model is not None:
        trained = model.graph.context_length
        told |= {
            "context_length": model.context,
            "max_model_len": model.context,
            "max_context_length": trained,
            "loaded_context_length": model.context,
            "context_window": model.context,
            "max_context_window": model.context,
            "meta": {
                "n_ctx": model.context,
                "n_ctx_train": trained,
                "n_vocab": model.graph.n_vocab,
                "n_embd": model.graph.n_embd,
                "architecture": model.graph.architecture,
            },
        }
    return told


async def list_models(state: State, exchange: Exchange) -> None:
    state.hub.refresh()
    data = [describe(entry) for entry in state.hub.entries]
    await exchange.json({"object": "list", "data": data})


async def one_model(state: State, exchange: Exchange) -> None:
    name = exchange.path_parameters["name"]
    entry = state.hub.find(name)
    if state.hub.named(name) is None:
        raise APIError(f"the model {name!r} does not exist", 404, "not_found_error", param="model",
                       code="model_not_found")  # fmt: skip
    await exchange.json(describe(entry))


async def health(state: State, exchange: Exchange) -> None:
    if not state.hub.is_ready:
        raise APIError("Loading model", 503, "unavailable_error", code="loading", headers={"Retry-After": "1"})
    await exchange.json({"status": "ok"})


async def metrics(state: State, exchange: Exchange) -> None:
    activities = [entry.model.activity for entry in state.hub.entries if entry.model is not None]
    used = max((one.cache_bytes / one.cache_limit for one in activities if one.cache_limit), default=0.0)
    text = state.metrics.text(state.turns.running, state.turns.waiting, used, len(activities))
    await exchange.raw(text.encode(), "text/plain; version=0.0.4; charset=utf-8")


async def list_for_lm_studio(state: State, exchange: Exchange) -> None:
    """`/api/v0/models`, which clients of LM Studio read."""
    state.hub.refresh()
    data = []
    for entry in state.hub.entries:
        facts = await state.in_thread(facts_of, entry)
        model = entry.model
        told: dict[str, Any] = {
            "id": entry.id,
            "object": "model",
            "type": "llm",
            "publisher": "",
            "arch": facts.architecture,
            "compatibility_type": "gguf",
            "quantization": facts.quantization,
            "state": "not-loaded" if model is None else "loaded",
            "max_context_length": facts.context_length,
            "capabilities": ["tool_use"] if "tools" in facts.chat_template else [],
        }
        if model is not None:
            told["loaded_context_length"] = model.context
        data.append(told)
    await exchange.json({"object": "list", "data": data})


async def root(state: State, exchange: Exchange) -> None:
    """The page, for browsers; others are told what clients of Ollama look for."""
    page = STATIC / "index.html"
    if "text/html" in exchange.request.headers.get("accept", "") and page.is_file():
        await exchange.raw(page.read_bytes(), "text/html; charset=utf-8", headers=PAGE_HEADERS)
        return
    await exchange.raw(b"Ollama is running", "text/plain; charset=utf-8")


async def embeddings(state: State, exchange: Exchange) -> None:
    """Not for models that write."""
    state.hub.find(exchange.body.get("model"), lenient=True)
    raise APIError("embeddings are not supported by this server", 501, "not_supported_error", code="not_supported")
