"""OpenAI's `/v1/responses`. Answers are kept in memory for a while, unless `store` is false."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from qrun.server import fields
from qrun.server.blocks import Part, Parts
from qrun.server.chat_requests import ChatRequest, call_id, continues, logprob_options, read_thinking
from qrun.server.errors import APIError, not_supported
from qrun.server.exchange import Exchange, event
from qrun.server.openai_chat import comment, logprobs
from qrun.server.running import finish_reason
from qrun.server.state import State
from qrun.server.structure import structure, tool_choice

if TYPE_CHECKING:
    from qrun.engine import Generation
    from qrun.engine.text.tool_calls import ToolCall
    from qrun.server.hub import Entry

_ROLES = ("system", "developer", "user", "assistant", "tool")
_CALLS = ("function_call", "custom_tool_call")
_LOGPROBS = "message.output_text.logprobs"  # what `include` calls them
_RESULTS = ("function_call_output", "custom_tool_call_output")
_KEPT_ELSEWHERE = {"conversation": "conversations", "prompt": "prompts"}


async def responses(state: State, exchange: Exchange) -> None:
    body = exchange.body
    items, n_bytes = whole_input(state, exchange)
    request = read_request(body, items)
    stream = fields.field(body, "stream", fields.truth, False)
    store = fields.field(body, "store", fields.truth, True)
    async with state.begin(body.get("model"), request.start) as (entry, generations, place):
        (generation,) = generations
        writer = ResponseStream(request, body, generation, entry)
        steps = state.steps(generations, place, exchange.arrived)
        if not stream:
            async with aclosing(steps) as found:  # type: ignore[type-var]
                async for _, pieces in found:
                    writer.frames(writer.parts.of(pieces))
            writer.close()
            response = writer.response(writer.status)
            if store:
                state.responses.keep(items, response, n_bytes)
            await exchange.json(response)
            return
        exchange.error_frame = writer.failed
        async with exchange.stream("text/event-stream", writer.begin(), comment, state.settings.ping_seconds):
            async with aclosing(steps) as found:  # type: ignore[type-var]
                async for _, pieces in found:
                    if frames := writer.frames(writer.parts.of(pieces)):
                        await exchange.write(frames)
            end = writer.end()
            if store:
                state.responses.keep(items, writer.response(writer.status), n_bytes)
            await exchange.write(end)


async def one_response(state: State, exchange: Exchange) -> None:
    """An answer that was stored."""
    await exchange.json(state.responses.get(exchange.path_parameters["name"]).response)


async def delete_response(state: State, exchange: Exchange) -> None:
    """Forget an answer."""
    id = exchange.path_parameters["name"]
    state.responses.delete(id)
    await exchange.json({"id": id, "object": "response", "deleted": True})


async def input_items(state: State, exchange: Exchange) -> None:
    """What a stored answer was given, the newest first unless `order` says otherwise."""
    id = exchange.path_parameters["name"]
    told = []
    for number, item in enumerate(state.responses.get(id).items):
        one: dict[str, Any] = {"id": f"{id}_{number}", "type": "message"}
        one |= item if isinstance(item, dict) else {"role": "user", "content": item}
        if isinstance(one.get("content"), str) and one.get("role") != "assistant":
            one |= {"content": [{"type": "input_text", "text": one["content"]}]}
        told.append(one)
    if exchange.request.query_params.get("order") != "asc":
        told.reverse()
    ends = {"first_id": told[0]["id"] if told else None, "last_id": told[-1]["id"] if told else None}
    await exchange.json({"object": "list", "data": told, **ends, "has_more": False})


async def input_tokens(state: State, exchange: Exchange) -> None:
    """How many tokens a request has."""
    items, _ = whole_input(state, exchange)
    request = read_request(exchange.body, items)
    async with state.hub.use(exchange.body.get("model")) as entry:
        tokens = await state.in_thread(request.prompt_tokens, entry.loaded)
        await exchange.json({"object": "response.input_tokens", "input_tokens": len(tokens)})


# Requests


def whole_input(state: State, exchange: Exchange) -> tuple[list[Any], int]:
    """The items of a request, behind those of the conversation that it goes on from; and how many bytes they have."""
    body = exchange.body
    given = body.get("input")
    items = [given] if isinstance(given, str) else fields.items(body, "input")
    previous = body.get("previous_response_id")
    if previous in (None, ""):
        return items, exchange.size
    found = state.responses.find(previous)
    if found is None:
        raise APIError(f"previous_response_id: there is no response {previous!r} here: send the whole conversation as "
                       "input", param="previous_response_id", code="previous_response_not_found")  # fmt: skip
    return [*found.conversation, *items], found.n_bytes + exchange.size


def read_request(body: dict[str, Any], items: list[Any]) -> ChatRequest:
    """items: see `whole_input`."""
    for name, what in _KEPT_ELSEWHERE.items():
        if body.get(name) not in (None, ""):
            raise not_supported(f"{name} is not supported: this server keeps no {what}, send all of it as input", name)
    messages: list[dict[str, Any]] = []
    instructions = fields.field(body, "instructions", fields.text, "")
    if instructions:
        messages.append({"role": "system", "content": instructions})
    messages += read_items(items)
    if not any(message["role"] != "system" for message in messages):
        raise APIError("input must be a text or a list of at least one message", param="input")
    tools = [tool for one in fields.items(body, "tools") if (tool := read_tool(one)) is not None]
    parallel = fields.field(body, "parallel_tool_calls", fields.truth, True)
    tools, forced = tool_choice(body.get("tool_choice"), tools, parallel=parallel)
    format = fields.members(body, "text").get("format")
    options = fields.sampling_options(body)
    options |= logprob_options({**body, "logprobs": _LOGPROBS in fields.items(body, "include")})
    request = ChatRequest(
        messages,
        tools,
        options,
        one_call=not parallel,
        structure=structure(body, format, "text.format") | forced,
        bias_body=body,
    )
    read_thinking(body, request)
    request.continue_last = continues(body, messages)
    return request


def read_tool(tool: Any) -> dict[str, Any] | None:
    """The description of a function; None for kinds of tools that there are none of here."""
    if not isinstance(tool, dict):
        raise APIError("tools must be a list of objects", param="tools")
    inner = tool.get("function")
    if isinstance(inner, dict):
        return tool
    name = tool.get("name")
    if not isinstance(name, str) or tool.get("type") not in ("function", "custom"):
        return None
    function = {"name": name, "description": tool.get("description") or ""}
    if tool["type"] == "custom":  # takes a text
        parameters: Any = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
    else:
        parameters = tool.get("parameters") or {"type": "object"}
    return {"type": "function", "function": function | {"parameters": parameters}}


def read_items(items: list[Any]) -> list[dict[str, Any]]:
    """The messages that items stand for. Kinds that are not known are passed over."""
    messages: list[dict[str, Any]] = []
    thought = ""

    def assistant() -> dict[str, Any]:
        """The message of the assistant that is being put together."""
        nonlocal thought
        if not messages or messages[-1]["role"] != "assistant" or thought:
            messages.append({"role": "assistant", "content": ""})
            if thought:
                messages[-1]["reasoning_content"] = thought
                thought = ""
        return messages[-1]

    for number, item in enumerate(items):
        where = f"input[{number}]"
        if isinstance(item, str):
            item = {"role": "user", "content": item}
        if not isinstance(item, dict):
            raise APIError(f"{where} must be an object", param="input")
        kind = item.get("type") or ("message" if "role" in item else "")
        if kind == "message":
            role = item.get("role")
            if role not in _ROLES:
                raise APIError(f"{where}.role must be one of {', '.join(_ROLES)}", param="input")
            content = content_text(item.get("content"), where)
            if role == "assistant":
                message = assistant()
                if message.get("tool_calls"):
                    messages.append({"role": "assistant", "content": content})
                else:
                    message["content"] = message["content"] + content
            else:
                messages.append({"role": "system" if role == "developer" else role, "content": content})
        elif kind in _CALLS:
            name = fields.text(f"{where}.name", item.get("name"))
            arguments = item.get("arguments")
            if kind == "custom_tool_call":
                arguments = json.dumps({"input": item.get("input") or ""}, ensure_ascii=False)
            elif not isinstance(arguments, str):
                arguments = json.dumps(arguments or {}, ensure_ascii=False)
            call = {"id": str(item.get("call_id") or item.get("id") or ""), "type": "function",
                    "function": {"name": name, "arguments": arguments}}  # fmt: skip
            assistant().setdefault("tool_calls", []).append(call)
        elif kind in _RESULTS:
            output = item.get("output")
            text = content_text(output, where) if isinstance(output, str | list) else json.dumps(output)
            messages.append({"role": "tool", "tool_call_id": str(item.get("call_id") or ""), "content": text})
        elif kind == "reasoning":
            parts = item.get("content") or item.get("summary") or []
            texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
            thought = "\n\n".join(text for text in texts if isinstance(text, str))
    return messages


def content_text(content: Any, where: str) -> str:
    """A text, or the text of parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for part in fields.sequence(f"{where}.content", content):
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise APIError(f"{where}.content must be a text or a list of parts", param="input")
        if part.get("type") in ("input_image", "input_file", "input_audio", "image_url"):
            raise APIError(f"{where} has a part of type {part['type']}: this model reads text alone", param="input")
        text = part.get("text", part.get("refusal"))
        if isinstance(text, str):
            texts.append(text)
    return "\n".join(texts)


# Answers


class ResponseStream:
    """The events of an answer, and the answer itself, which grows with them."""

    def __init__(self, request: ChatRequest, body: dict[str, Any], generation: Generation, entry: Entry) -> None:
        self.parts = Parts(request, generation)
        self._body = body
        self._generation = generation
        self._entry = entry
        self._id = f"resp_{secrets.token_hex(24)}"
        self._created = int(time.time())
        self._number = 0
        self._items: list[dict[str, Any]] = []
        self._open = False
        """Whether the last item may get more text."""
        tools = fields.items(body, "tools")
        self._custom = {tool.get("name") for tool in tools if isinstance(tool, dict) and tool.get("type") == "custom"}

    def response(self, status: str, error: Any = None) -> dict[str, Any]:
        """The answer as far as it is known."""
        body = self._body
        limited = status == "incomplete"
        told = {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if limited else None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "model": self._entry.id,
            "output": self._items,
            "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
            "previous_response_id": body.get("previous_response_id") or None,
            "reasoning": body["reasoning"] if isinstance(body.get("reasoning"), dict) else {"effort": None},
            "store": body.get("store") is not False,
            "temperature": body.get("temperature"),
            "text": {"format": {"type": "text"}} | (body["text"] if isinstance(body.get("text"), dict) else {}),
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
            "top_p": body.get("top_p"),
            "truncation": "disabled",
            "metadata": body.get("metadata") or {},
            "usage": None,
        }
        if status in ("completed", "incomplete"):
            stats, n_output = self._generation.stats, len(self._generation.tokens)
            told["usage"] = {
                "input_tokens": stats.prompt_tokens,
                "input_tokens_details": {"cached_tokens": stats.cached_tokens},
                "output_tokens": n_output,
                "output_tokens_details": {"reasoning_tokens": stats.reasoning_tokens},
                "total_tokens": stats.prompt_tokens + n_output,
            }
        return told

    @property
    def status(self) -> str:
        """How it has ended."""
        return "incomplete" if finish_reason(self._generation) == "length" else "completed"

    def _event(self, name: str, /, **more: Any) -> bytes:
        data = {"type": name, "sequence_number": self._number, **more}
        self._number += 1
        return event(name, data)

    def begin(self) -> bytes:
        told = self.response("in_progress")
        return self._event("response.created", response=told) + self._event("response.in_progress", response=told)

    def frames(self, parts: Iterable[Part]) -> bytes:
        found = b""
        for part in parts:
            if part[0] == "call":
                found += self.close(calls=False) + self._call(part[1])
                continue
            kind, text = part
            name = "message" if kind == "content" else "reasoning"
            if not self._open or self._items[-1]["type"] != name:
                found += self.close(calls=False) + self._begin(name)
            item = self._items[-1]
            item["content"][0]["text"] += text
            more: dict[str, Any] = {"logprobs": self._take_logprobs(item)} if name == "message" else {}
            found += self._event(f"response.{self._kind(item)}.delta", **self._place(item), delta=text, **more)
        return found

    def _take_logprobs(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        """How likely the tokens were that have come since the last time; the item has them all."""
        pieces, self.parts.tokens = self.parts.tokens, []
        told = logprobs(pieces, self._entry.loaded)
        item["content"][0]["logprobs"] += told
        return told

    def _kind(self, item: dict[str, Any]) -> str:
        return "output_text" if item["type"] == "message" else "reasoning_text"

    def _place(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self._items) - 1, "content_index": 0}

    def _begin(self, name: str) -> bytes:
        self._open = True
        if name == "message":
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item: dict[str, Any] = {"id": f"msg_{secrets.token_hex(24)}", "type": "message", "role": "assistant"}
        else:
            part = {"type": "reasoning_text", "text": ""}
            item = {"id": f"rs_{secrets.token_hex(24)}", "type": "reasoning", "summary": []}
        item |= {"status": "in_progress", "content": []}
        self._items.append(item)
        index = len(self._items) - 1
        found = self._event("response.output_item.added", output_index=index, item=item)
        item["content"] = [part]
        return found + self._event("response.content_part.added", **self._place(item), part=part)

    def close(self, *, calls: bool = True) -> bytes:
        """End the item that is open. calls: and tell all calls that have been read."""
        found = b""
        if self._open:
            self._open = False
            item = self._items[-1]
            item["status"] = self.status if calls and not self.parts.has_more else "completed"
            (part,) = item["content"]
            more: dict[str, Any] = {}
            if item["type"] == "message":
                self._take_logprobs(item)
                more["logprobs"] = part["logprobs"]
            found += self._event(f"response.{self._kind(item)}.done", **self._place(item), text=part["text"], **more)
            found += self._event("response.content_part.done", **self._place(item), part=part)
            found += self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)
        if calls:
            found += self.frames(self.parts.calls())
        return found

    def _call(self, call: ToolCall) -> bytes:
        id = call_id(call, self._entry.loaded)
        index = len(self._items)
        if call.name in self._custom:
            text = call.arguments.get("input", "")
            text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
            kind, prefix, name, event = "custom_tool_call", "ctc", "input", "response.custom_tool_call_input"
        else:
            text = json.dumps(call.arguments, ensure_ascii=False)
            kind, prefix, name, event = "function_call", "fc", "arguments", "response.function_call_arguments"
        item: dict[str, Any] = {"id": f"{prefix}_{secrets.token_hex(24)}", "type": kind, "status": "in_progress",
                                "call_id": id, "name": call.name, name: ""}  # fmt: skip
        self._items.append(item)
        place = {"item_id": item["id"], "output_index": index}
        found = self._event("response.output_item.added", output_index=index, item=item)
        item |= {name: text, "status": "completed"}
        found += self._event(f"{event}.delta", **place, delta=text)
        more = {"name": call.name} if name == "arguments" else {}
        found += self._event(f"{event}.done", **place, **more, **{name: text})
        return found + self._event("response.output_item.done", output_index=index, item=item)

    def end(self) -> bytes:
        found = self.close()
        status = self.status
        return found + self._event(f"response.{status}", response=self.response(status))

    def failed(self, error: APIError) -> bytes:
        """Something went wrong after it had begun."""
        told = {"code": error.code or error.kind, "message": error.message}
        first = self._event("error", **told, param=error.param)
        return first + self._event("response.failed", response=self.response("failed", told))
