"""`/v1/models`, `/health`, `/metrics`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrun.server.errors import APIError, is_anthropic
from qrun.server.exchange import Exchange
from qrun.server.facts import facts_of
from qrun.server.state import State

if TYPE_CHECKING:
    from qrun.engine.generation.adapters import NamedAdapter
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
    if model.embeds:
        return ["embedding", *(["rerank"] if model.pooling == "rank" else [])]
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


def describe(entry: Entry, adapter: NamedAdapter | None = None) -> dict[str, Any]:
    """A model, or what an adapter makes of it, with its context in every client's spelling. Of one that is not loaded
    less is known."""
    told: dict[str, Any] = {
        "id": entry.id if adapter is None else adapter.name,
        "object": "model",
        "created": entry.created,
        "owned_by": "qrun",
        "state": "loaded" if entry.model is not None else "not-loaded",
        "capabilities": capabilities(entry),
        "architecture": {"modality": "text->text", "input_modalities": ["text"], "output_modalities": ["text"]},
    }
    if adapter is not None:
        told["parent"] = entry.id
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


def for_anthropic(told: dict[str, Any]) -> dict[str, Any]:
    """The description of a model with what Anthropic's clients read of it."""
    created = datetime.fromtimestamp(told["created"], UTC).isoformat().replace("+00:00", "Z")
    context = told.get("context_length")
    return told | {
        "type": "model", "display_name": told["id"], "created_at": created, "lifecycle": "active",
        "max_input_tokens": context, "max_tokens": context, "capabilities": None,  # theirs are an object
    }  # fmt: skip


async def list_models(state: State, exchange: Exchange) -> None:
    await state.hub.refresh()
    data = [describe(entry, adapter) for entry in state.hub.entries for adapter in (None, *entry.adapters)]
    told: dict[str, Any] = {"object": "list", "data": data}
    if is_anthropic(exchange.request.scope):  # all at once, whatever `limit` says
        told["data"] = data = [for_anthropic(one) for one in data]
        told |= {"has_more": False, "first_id": data[0]["id"] if data else None,
                 "last_id": data[-1]["id"] if data else None}  # fmt: skip
    await exchange.json(told)


async def one_model(state: State, exchange: Exchange) -> None:
    name = exchange.path_parameters["name"]
    entry = await state.hub.find(name, exact=True)
    told = describe(entry, entry.adapter_of(name))
    await exchange.json(for_anthropic(told) if is_anthropic(exchange.request.scope) else told)


async def lora_adapters(state: State, exchange: Exchange) -> None:
    """llama-server's list of adapters, for the numbers that requests name. None counts where a request names none."""
    entry = await state.hub.find(exchange.request.query_params.get("model"), lenient=True)
    found = [
        {"id": number, "path": adapter.path.name, "name": adapter.name, "scale": 0.0}
        for number, adapter in enumerate(entry.adapters)
    ]
    await exchange.json(found)


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
    await state.hub.refresh()
    data = []
    for entry in state.hub.entries:
        facts = await state.in_thread(facts_of, entry)
        model = entry.model
        told: dict[str, Any] = {
            "id": entry.id,
            "object": "model",
            "type": "llm" if model is None or not model.embeds else "embeddings",
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
