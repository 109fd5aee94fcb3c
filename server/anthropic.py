"""Anthropic's interface: `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from qrun.server import fields
from qrun.server.blocks import Part, Parts
from qrun.server.chat_requests import ChatRequest, call_id, continues, read_thinking
from qrun.server.errors import APIError, anthropic_shape
from qrun.server.exchange import Exchange, dumps, event
from qrun.server.running import finish_reason
from qrun.server.state import State
from qrun.server.structure import structure, tool_choice

if TYPE_CHECKING:
    from qrun.engine import Generation, Model
    from qrun.engine.text.tool_calls import ToolCall
    from qrun.server.hub import Entry

# Claude Code begins its system prompt with a line that is another one in each request, and would have the whole prompt
# read anew each time.
_BILLING = re.compile(r"x-anthropic-billing-header:[^\n]*\n?")


async def messages(state: State, exchange: Exchange) -> None:
    body = exchange.body
    request = read_request(body)
    stream = fields.field(body, "stream", fields.truth, False)
    async with state.begin(body.get("model"), request.start, lenient=True) as (entry, generations, place):
        (generation,) = generations
        steps = state.steps(generations, place, exchange.arrived)
        if not stream:
            parts = Parts(request, generation)
            blocks: list[Part] = []
            async with aclosing(steps) as found:  # type: ignore[type-var]
                async for _, pieces in found:
                    blocks += parts.of(pieces)
            blocks += parts.calls()
            await exchange.json(answer(blocks, generation, entry))
            return
        writer = MessageStream(request, generation, entry)
        exchange.error_frame = lambda error: event("error", anthropic_shape(error))
        async with exchange.stream("text/event-stream", writer.begin(), ping, max(state.settings.ping_seconds, 1.0)):
            async with aclosing(steps) as found:  # type: ignore[type-var]
                async for _, pieces in found:
                    if frames := writer.frames(writer.parts.of(pieces)):
                        await exchange.write(frames)
            await exchange.write(writer.end())


async def count_tokens(state: State, exchange: Exchange) -> None:
    request = read_request(exchange.body)
    async with state.hub.use(exchange.body.get("model"), lenient=True) as entry:
        tokens = await state.in_thread(request.prompt_tokens, entry.loaded)
        await exchange.json({"input_tokens": len(tokens)})


def ping() -> bytes:
    return event("ping", {"type": "ping"})


# Requests


def read_request(body: dict[str, Any]) -> ChatRequest:
    given = fields.items(body, "messages")
    if not given:
        raise APIError("messages: at least one message is required", param="messages")
    told: list[dict[str, Any]] = []
    system = system_text(body.get("system"))
    if system:
        told.append({"role": "system", "content": system})
    for number, message in enumerate(given):
        if not isinstance(message, dict):
            raise APIError(f"messages.{number} must be an object", param="messages")
        told += read_message(message, f"messages.{number}")
    tools = [tool for one in fields.items(body, "tools") if (tool := read_tool(one)) is not None]
    choice = body.get("tool_choice")
    one_call = isinstance(choice, dict) and choice.get("disable_parallel_tool_use") is True
    tools, forced = tool_choice(choice, tools, parallel=not one_call)
    output = fields.members(body, "output_config")
    options = fields.sampling_options(body)
    request = ChatRequest(
        told,
        tools,
        options | {"logprobs": False},
        one_call=one_call,
        structure=structure(body, output.get("format") or body.get("output_format"), "output_config.format") | forced,
        bias_body=body,
    )
    read_thinking(body, request)
    request.continue_last = continues(body, told)
    return request


def system_text(value: Any) -> str:
    """The system prompt, a text or blocks."""
    if value is None:
        return ""
    if isinstance(value, str):
        return _BILLING.sub("", value)
    texts = []
    for block in fields.sequence("system", value):
        if not isinstance(block, dict) or not isinstance(block.get("text"), str):
            raise APIError("system must be a text or a list of blocks of type text", param="system")
        texts.append(_BILLING.sub("", block["text"]))
    return "\n".join(text for text in texts if text)


def read_tool(tool: Any) -> dict[str, Any] | None:
    """The description of a function; None for tools that only Anthropic's servers have."""
    if not isinstance(tool, dict):
        raise APIError("tools must be a list of objects", param="tools")
    if tool.get("type") not in (None, "custom") or not isinstance(tool.get("name"), str):
        return None
    function = {"name": tool["name"], "description": tool.get("description") or ""}
    return {"type": "function", "function": function | {"parameters": tool.get("input_schema") or {"type": "object"}}}


def read_message(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The messages that one of theirs stands for: results of tools are messages of their own."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise APIError(f"{where}.role must be user or assistant", param="messages")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise APIError(f"{where}.content must be a text or a list of blocks", param="messages")
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number, block in enumerate(content):
        if not isinstance(block, dict):
            raise APIError(f"{where}.content.{number} must be an object", param="messages")
        kind = block.get("type", "text")
        if kind == "text":
            texts.append(fields.text(f"{where}.content.{number}.text", block.get("text")))
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind == "tool_use":
            name = fields.text(f"{where}.content.{number}.name", block.get("name"))
            arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
            function = {"name": name, "arguments": arguments}
            calls.append({"id": str(block.get("id") or ""), "type": "function", "function": function})
        elif kind == "tool_result":
            result = result_text(block.get("content"))
            if block.get("is_error"):
                result = f"Error: {result}"
            results.append({"role": "tool", "tool_call_id": str(block.get("tool_use_id") or ""), "content": result})
        elif kind in ("document", "search_result"):
            texts.append(document_text(block, f"{where}.content.{number}"))
        elif kind == "image":
            raise APIError(f"{where}.content.{number} is of type {kind}: this model reads text alone", param="messages")
    told = list(results)
    if texts or calls or thoughts or not results:
        one: dict[str, Any] = {"role": role, "content": "\n\n".join(texts)}
        if any(thoughts):
            one["reasoning_content"] = "\n\n".join(thoughts)
        if calls:
            one["tool_calls"] = calls
        told.append(one)
    return told


def document_text(block: Mapping[str, Any], where: str) -> str:
    """A document, or what a search has found, under its title. APIError where it is no text."""
    source = block.get("source")
    if block.get("type") == "search_result":
        content, heading = block.get("content"), [block.get("title"), source]
    else:
        source = fields.mapping(f"{where}.source", source)
        heading = [block.get("title"), block.get("context")]
        if source.get("type") not in ("text", "content"):
            raise APIError(f"{where}.source is of type {source.get('type')}: this model reads text alone",
                           param="messages")  # fmt: skip
        content = source.get("data") if source["type"] == "text" else source.get("content")
    if not isinstance(content, str):
        content = "\n".join(
            fields.text(f"{where}.content.{number}.text", part.get("text") if isinstance(part, dict) else None)
            for number, part in enumerate(fields.sequence(f"{where}.content", content))
        )
    return "\n".join([*(one for one in heading if isinstance(one, str) and one), content])


def result_text(content: Any) -> str:
    """What a tool has said: a text, or blocks."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return json.dumps(content, ensure_ascii=False)
    texts = []
    for block in content:
        if isinstance(block, dict) and block.get("type") == "image":
            raise APIError("the result of a tool is a picture: this model reads text alone", param="messages")
        if isinstance(block, dict) and block.get("type") in ("document", "search_result"):
            texts.append(document_text(block, "the result of a tool"))
            continue
        is_text = isinstance(block, dict) and isinstance(block.get("text"), str)
        texts.append(block["text"] if is_text else json.dumps(block, ensure_ascii=False))
    return "\n".join(texts)


# Answers


def stop_reason(generation: Generation) -> tuple[str, str | None]:
    """Why an answer has ended, and the stop string that did it."""
    if finish_reason(generation) == "length":
        return "max_tokens", None
    if generation.tool_calls:
        return "tool_use", None
    if generation.stop_string is not None:
        return "stop_sequence", generation.stop_string
    return "end_turn", None


def usage(generation: Generation) -> dict[str, int]:
    stats = generation.stats
    return {
        "input_tokens": stats.prompt_tokens - stats.cached_tokens,
        "cache_read_input_tokens": stats.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": len(generation.tokens),
    }


def tool_use(call: ToolCall, model: Model) -> dict[str, Any]:
    id = call_id(call, model)
    return {"type": "tool_use", "id": id.replace("call_", "toolu_", 1), "name": call.name, "input": call.arguments}


def answer(parts: Iterable[Part], generation: Generation, entry: Entry) -> dict[str, Any]:
    """The whole answer."""
    content: list[dict[str, Any]] = []
    for part in parts:
        if part[0] == "call":
            content.append(tool_use(part[1], entry.loaded))
            continue
        kind, text = part
        name = "text" if kind == "content" else "thinking"
        if content and content[-1]["type"] == name:
            content[-1][name] += text
        else:
            content.append({"type": name, name: text} | ({"signature": ""} if name == "thinking" else {}))
    reason, sequence = stop_reason(generation)
    return {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": entry.id,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": sequence,
        "usage": usage(generation),
    }


class MessageStream:
    """The events of an answer that is streamed."""

    def __init__(self, request: ChatRequest, generation: Generation, entry: Entry) -> None:
        self.parts = Parts(request, generation)
        self._generation = generation
        self._entry = entry
        self._index = -1
        self._open = ""  # the kind of the block that is not closed yet
        self._delta = ""  # how its deltas begin

    def begin(self) -> bytes:
        message: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": self._entry.id,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage(self._generation),
        }
        return event("message_start", {"type": "message_start", "message": message}) + ping()

    def frames(self, parts: Iterable[Part]) -> bytes:
        found = b""
        for part in parts:
            if part[0] == "call":
                found += self._call(part[1])
                continue
            kind, text = part
            if self._open != kind:
                found += self._close() + self._begin(kind)
            found += f"{self._delta}{dumps(text)}}}}}\n\n".encode()
        return found

    def _begin(self, kind: str) -> bytes:
        self._index += 1
        self._open = kind
        if kind == "reasoning":
            block, delta, name = {"type": "thinking", "thinking": "", "signature": ""}, "thinking_delta", "thinking"
        else:
            block, delta, name = {"type": "text", "text": ""}, "text_delta", "text"
        self._delta = (
            'event: content_block_delta\ndata: {"type":"content_block_delta",'
            f'"index":{self._index},"delta":{{"type":"{delta}","{name}":'
        )
        return self._event("content_block_start", content_block=block)

    def _close(self) -> bytes:
        if not self._open:
            return b""
        found = b""
        if self._open == "reasoning":
            found = self._event("content_block_delta", delta={"type": "signature_delta", "signature": ""})
        self._open = ""
        return found + self._event("content_block_stop")

    def _call(self, call: ToolCall) -> bytes:
        found = self._close()
        self._index += 1
        block = tool_use(call, self._entry.loaded)
        found += self._event("content_block_start", content_block=block | {"input": {}})
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        found += self._event("content_block_delta", delta={"type": "input_json_delta", "partial_json": arguments})
        return found + self._event("content_block_stop")

    def _event(self, name: str, **more: Any) -> bytes:
        return event(name, {"type": name, "index": self._index, **more})

    def end(self) -> bytes:
        found = self.frames(self.parts.calls()) + self._close()
        reason, sequence = stop_reason(self._generation)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        figures = usage(self._generation)
        found += event("message_delta", {"type": "message_delta", "delta": delta, "usage": figures})
        return found + event("message_stop", {"type": "message_stop"})
