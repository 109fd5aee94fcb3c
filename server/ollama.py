"""Ollama's interface under `/api`. Streams are lines of JSON, times nanoseconds, arguments of calls objects."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Awaitable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from qrun.server import fields
from qrun.server.blocks import Part, Parts
from qrun.server.chat_requests import (
    ChatRequest,
    bias_option,
    call_id,
    continues,
    functions,
    logprob_options,
    read_thinking,
)
from qrun.server.errors import APIError, ollama_shape, path_of
from qrun.server.exchange import Exchange, encode
from qrun.server.facts import Facts, facts_of
from qrun.server.models_api import capabilities
from qrun.server.openai_chat import logprobs
from qrun.server.prompts import infill_tokens, prompt_tokens
from qrun.server.running import finish_reason
from qrun.server.state import State
from qrun.server.structure import structure
from qrun.server.threads import in_daemon

if TYPE_CHECKING:
    from qrun.engine import Generation, Model
    from qrun.server.hub import Entry

VERSION = "0.13.0"
"""Of Ollama's interface: clients ask for a number, and want a recent one."""

NDJSON = "application/x-ndjson"

_DURATION = re.compile(r"([-+]?)(\d+(?:\.\d+)?|(?:\d+(?:\.\d+)?(?:ms|s|m|h))+)")  # of one number, seconds
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|$)")
_UNITS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def now(seconds: float | None = None) -> str:
    """A time as they write it."""
    moment = datetime.fromtimestamp(time.time() if seconds is None else seconds, UTC)
    return moment.isoformat().replace("+00:00", "Z")


# Answers


async def chat(state: State, exchange: Exchange) -> None:
    body = exchange.body
    if not fields.items(body, "messages"):
        await load(state, exchange, {"message": {"role": "assistant", "content": ""}})
        return
    request = read_chat(body)
    await answer(state, exchange, request, is_chat=True)


async def generate(state: State, exchange: Exchange) -> None:
    body = exchange.body
    text = fields.field(body, "prompt", fields.text, "")
    if not text and not body.get("suffix"):
        await load(state, exchange, {"response": ""})
        return
    if body.get("images"):
        raise APIError("images are not supported: this model reads text alone")
    messages = [{"role": "user", "content": text}]
    if system := fields.field(body, "system", fields.text, ""):
        messages.insert(0, {"role": "system", "content": system})
    await answer(state, exchange, read_options(body, messages), is_chat=False)


def read_chat(body: dict[str, Any]) -> ChatRequest:
    messages = []
    for number, message in enumerate(fields.items(body, "messages")):
        if not isinstance(message, dict):
            raise APIError(f"messages[{number}] must be an object")
        if message.get("images"):
            raise APIError(f"messages[{number}] has images: this model reads text alone")
        told = {name: value for name, value in message.items() if name not in ("images", "thinking", "tool_name")}
        if isinstance(message.get("thinking"), str):
            told["reasoning_content"] = message["thinking"]
        if isinstance(message.get("tool_name"), str):
            told["name"] = message["tool_name"]
        messages.append(told)
    return read_options(body, messages)


def read_options(body: dict[str, Any], messages: list[dict[str, Any]]) -> ChatRequest:
    """A request with the options, which are in an object of their own."""
    options = fields.members(body, "options")
    request = ChatRequest(
        messages,
        functions(fields.items(body, "tools")),
        fields.sampling_options(options) | logprob_options(body),
        structure=structure({}, body.get("format"), "format"),
        bias_body=options,
    )
    read_thinking(body, request)
    request.continue_last = continues(body, messages)
    return request


async def answer(state: State, exchange: Exchange, request: ChatRequest, *, is_chat: bool) -> None:
    body = exchange.body
    stream = fields.field(body, "stream", fields.truth, True)
    suffix = "" if is_chat else fields.field(body, "suffix", fields.text, "")
    raw = not is_chat and fields.field(body, "raw", fields.truth, False)

    def start(model: Model, lora: dict[str, Any]) -> list[Generation]:
        if not raw and not suffix:
            return request.start(model, lora)
        text = body.get("prompt") or ""
        tokens = infill_tokens(model, text, suffix) if suffix else prompt_tokens(model, text)
        options = lora | request.options | bias_option(request.bias_body, model)
        return [model.generate(tokens, **options, **request.structure)]

    async with state.begin(body.get("model"), start) as (entry, generations, place):
        keep_alive(entry, body)
        (generation,) = generations
        parts = Parts(request, generation)
        steps = state.steps(generations, place, exchange.arrived)

        n_calls = 0

        def line(found: list[Part], **more: Any) -> dict[str, Any]:
            nonlocal n_calls
            said = "".join(part[1] for part in found if part[0] == "content")
            thought = "".join(part[1] for part in found if part[0] == "reasoning")
            told: dict[str, Any] = {"model": entry.id, "created_at": now()}
            if is_chat:
                told["message"] = message = {"role": "assistant", "content": said}
            else:
                told["response"] = said
                message = told
            if thought:
                message["thinking"] = thought
            calls = [part[1] for part in found if part[0] == "call"]
            if calls:
                message["tool_calls"] = [  # type: ignore[assignment]
                    {
                        "id": call_id(call, entry.loaded),
                        "function": {"index": index, "name": call.name, "arguments": call.arguments},
                    }
                    for index, call in enumerate(calls, n_calls)
                ]
                n_calls += len(calls)
            if parts.tokens and request.options["logprobs"]:
                told["logprobs"] = [without_id(one) for one in logprobs(parts.tokens, entry.loaded)]
                parts.tokens = []
            return told | more

        if not stream:
            all_parts: list[Part] = []
            async with aclosing(steps) as found:  # type: ignore[type-var]
                async for _, pieces in found:
                    all_parts += parts.of(pieces)
            all_parts += parts.calls()
            await exchange.json(line(all_parts, **last(generation, exchange)))
            return
        exchange.error_frame = lambda error: encode(ollama_shape(error)) + b"\n"
        # Nothing can be said meanwhile: clients read every line.
        async with exchange.stream(NDJSON, b"", None, 0):
            async with aclosing(steps) as found:  # type: ignore[type-var]
                async for _, pieces in found:
                    if some := list(parts.of(pieces)):
                        await exchange.write(encode(line(some, done=False)) + b"\n")
            await exchange.write(encode(line(list(parts.calls()), **last(generation, exchange))) + b"\n")


def without_id(told: dict[str, Any]) -> dict[str, Any]:
    """How likely a token was, with the likeliest in its place if there are any."""
    found = {name: told[name] for name in ("token", "logprob", "bytes")}
    if top := told.get("top_logprobs"):
        found["top_logprobs"] = [without_id(one) for one in top]
    return found


def last(generation: Generation, exchange: Exchange) -> dict[str, Any]:
    """What the last line says."""
    stats = generation.stats
    return {
        "done": True,
        "done_reason": "length" if finish_reason(generation) == "length" else "stop",
        "total_duration": int((time.perf_counter() - exchange.arrived) * 1e9),
        "load_duration": 0,
        "prompt_eval_count": stats.prompt_tokens,
        "prompt_eval_duration": int(stats.prompt_seconds * 1e9),
        "eval_count": len(generation.tokens),
        "eval_duration": int(stats.generate_seconds * 1e9),
    }


async def load(state: State, exchange: Exchange, empty: dict[str, Any]) -> None:
    """A request for nothing loads the model, or with `keep_alive: 0` unloads it."""
    entry = await state.hub.find(exchange.body.get("model"))
    reason = "load"
    if seconds_of(exchange.body.get("keep_alive")) == 0:
        await state.hub.unload(entry)
        reason = "unload"
    else:
        async with state.hub.use(entry.id):
            keep_alive(entry, exchange.body)
    await exchange.json({"model": entry.id, "created_at": now(), **empty, "done": True, "done_reason": reason})


def seconds_of(value: Any) -> float | None:
    """A duration: a number of seconds, or a text such as "5m"; None where there is none. Negative ones have no end."""
    if value is None:
        return None
    if isinstance(value, str):
        found = _DURATION.fullmatch(value.strip())
        if not found:
            raise fields.wrong("keep_alive", 'a number of seconds or a text such as "5m"', value)
        number = sum(float(part) * _UNITS[unit] for part, unit in _PART.findall(found[2]))
        number = -number if found[1] == "-" else number
    else:
        number = fields.real("keep_alive", value)
    return math.inf if number < 0 else number


def keep_alive(entry: Entry, body: dict[str, Any]) -> None:
    """How long the model stays after this request, if it says so."""
    seconds = seconds_of(body.get("keep_alive"))
    if seconds is not None:
        entry.ttl = None if seconds == math.inf else seconds


# Models


def details(facts: Facts) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": facts.architecture,
        "families": [facts.architecture],
        "parameter_size": facts.parameter_size,
        "quantization_level": facts.quantization,
    }


async def described(state: State, entry: Entry) -> dict[str, Any]:
    """A model in a list."""
    facts = await state.in_thread(facts_of, entry)
    return {
        "name": entry.id,
        "model": entry.id,
        "modified_at": now(facts.modified),
        "size": facts.size,
        "digest": facts.digest,
        "details": details(facts),
    }


async def tags(state: State, exchange: Exchange) -> None:
    await state.hub.refresh()
    await exchange.json({"models": [await described(state, entry) for entry in state.hub.entries]})


async def running(state: State, exchange: Exchange) -> None:
    told = []
    for entry in state.hub.entries:
        if entry.model is not None:
            left = entry.expires_in
            far = 100 * 365 * 86400.0
            told.append(
                await described(state, entry)
                | {
                    "expires_at": now(time.time() + (far if left is None else left)),
                    "size_vram": 0,
                    "context_length": entry.model.context,
                }
            )
    await exchange.json({"models": told})


async def show(state: State, exchange: Exchange) -> None:
    name = exchange.body.get("model") or exchange.body.get("name")
    entry = await state.hub.find(name, exact=bool(name))  # clients ask whether there is such a model
    facts = await state.in_thread(facts_of, entry)
    info = dict(facts.info) | {"general.parameter_count": facts.parameters}
    if entry.model is not None:  # what it can hold as it is loaded
        info[f"{facts.architecture}.context_length"] = entry.model.context
        able = await state.in_thread(capabilities, entry)
    else:
        able = ["completion"]
        able += ["tools"] if "tools" in facts.chat_template else []
        able += ["thinking"] if "<think>" in facts.chat_template else []
    template = facts.chat_template
    if entry.model is not None and (found := await state.in_thread(lambda: entry.loaded.chat_template)) is not None:
        template = found.source
    await exchange.json({
        "modelfile": "",
        "parameters": "",
        "template": template,
        "details": details(facts),
        "model_info": info,
        "capabilities": [one for one in able if one != "chat"],
        "modified_at": now(facts.modified),
    })  # fmt: skip


async def version(state: State, exchange: Exchange) -> None:
    await exchange.json({"version": VERSION})


async def not_here(state: State, exchange: Exchange) -> None:
    """Paths that exist at theirs."""
    path = path_of(exchange.request.scope)
    raise APIError(f"{path} is not supported", 501, "not_supported_error", code="not_supported")


# The store


def _check_store(state: State) -> None:
    if not state.settings.with_store:
        raise APIError("this server does not change the store: start it with --store to let clients do so", 403,
                       "permission_error", code="store_closed")  # fmt: skip


def pull_name(name: Any) -> str:
    """What `qrun pull` calls a model that Ollama's clients name. Addresses are not fetched."""
    name = fields.text("model", name).strip()
    for host in ("hf.co/", "huggingface.co/"):
        if name.startswith(host):
            name = f"hf:{name.removeprefix(host)}"
    if "://" in name or not name:
        raise APIError("a model is fetched by its name in the catalog, or as hf.co/ORG/REPO:QUANT")
    return name.removesuffix(":latest")


async def pull(state: State, exchange: Exchange) -> None:
    from qrun.models.download import pull as fetch

    _check_store(state)
    body = exchange.body
    name = pull_name(body.get("model") or body.get("name"))
    loop = asyncio.get_running_loop()  # which the other thread tells of its progress
    told: asyncio.Queue[tuple[int, int | None] | None] = asyncio.Queue()

    def work() -> None:
        try:
            fetch(name, progress=lambda done, total: _tell((done, total)))
        finally:
            _tell(None)

    def _tell(what: tuple[int, int | None] | None) -> None:
        loop.call_soon_threadsafe(told.put_nowait, what)

    def line(**more: Any) -> bytes:
        return encode(more) + b"\n"

    if not fields.field(body, "stream", fields.truth, True):
        await pulled(in_daemon(work))
        await state.hub.refresh()
        await exchange.json({"status": "success"})
        return
    exchange.error_frame = lambda error: line(**ollama_shape(error))
    async with exchange.stream(NDJSON, line(status="pulling manifest"), None, 0):
        work_done = asyncio.ensure_future(in_daemon(work))
        sent = 0.0
        while (progress := await told.get()) is not None:
            done, total = progress
            if time.monotonic() - sent > 0.2 or done == total:
                sent = time.monotonic()
                size = {} if total is None else {"total": total}
                await exchange.write(line(status=f"pulling {name}", digest=name, completed=done, **size))
        await pulled(work_done)
        await state.hub.refresh()
        await exchange.write(line(status="success"))


async def pulled(work: Awaitable[None]) -> None:
    from qrun.models.store import PullError

    try:
        await work
    except (PullError, LookupError) as error:
        raise APIError(str(error.args[0] if error.args else error), 404, "not_found_error") from None


async def delete(state: State, exchange: Exchange) -> None:
    from qrun.models.store import remove, stored_models

    _check_store(state)
    entry = await state.hub.find(exchange.body.get("model") or exchange.body.get("name"), exact=True)
    found = [stored for stored in await in_daemon(stored_models) if stored.path == entry.source]
    if not found:
        raise APIError(f"the model {entry.id!r} does not lie in the store", 403, "permission_error")
    if entry.users:
        raise APIError(f"the model {entry.id!r} is in use", 409, "conflict_error")
    await state.hub.unload(entry)
    await state.in_thread(remove, found[0])
    await state.hub.refresh()
    await exchange.json({"status": "success"})
