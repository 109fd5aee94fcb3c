"""What the server offers, as an OpenAPI text: made from its routes and its table of fields."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

from qrun.engine import __version__
from qrun.engine.sampling.options import ORDERS
from qrun.server import fields

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number"}
_WHOLE: Schema = {"type": "integer"}
_TRUTH: Schema = {"type": "boolean"}
_OBJECT: Schema = {"type": "object"}

_ADAPTER: Schema = {
    "type": "object",
    "properties": {"id": {"type": "integer", "minimum": 0}, "name": _TEXT, "scale": {"type": ["number", "null"]}},
    "anyOf": [{"required": ["id"]}, {"required": ["name"]}],
}
# What an option may be, by what reads it.
_KINDS: dict[Callable[..., Any], Schema] = {
    fields.real: _NUMBER,
    fields.at_least_zero: _NUMBER,
    fields.whole: _WHOLE,
    fields.count: _WHOLE,
    fields.whole_or_none: _WHOLE,
    fields.truth: _TRUTH,
    fields.mirostat: {"enum": [0, 2]},
    fields.order: {"enum": list(ORDERS)},
    fields.stop_strings: {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]},
    fields.dry_breakers: {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": fields.MAX_DRY_BREAKERS}]},
    fields.adapters: {
        "anyOf": [
            _TEXT,
            {"type": "array", "items": _TEXT},
            {"type": "object", "additionalProperties": _NUMBER},
            {"type": "array", "items": _ADAPTER},
        ]
    },
}

_MESSAGES: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {"anyOf": [_TEXT, {"type": "array", "items": _OBJECT}, {"type": "null"}]},
        },
        "required": ["role"],
    },
}
_TOOLS: Schema = {"type": "array", "items": _OBJECT}
_PROMPT: Schema = {"anyOf": [_TEXT, {"type": "array"}]}
_STREAM: Schema = {"stream": _TRUTH, "stream_options": _OBJECT}
_MANY: Schema = {"n": {"type": "integer", "minimum": 1, "maximum": fields.MAX_CHOICES}}

# By path: what a body has besides the options of sampling (none of those where the path is not in `_SAMPLED`), and
# which fields it must have.
_BODIES: dict[str, tuple[Schema, list[str]]] = {
    "/v1/chat/completions": (
        {"messages": _MESSAGES, "tools": _TOOLS, "tool_choice": {}, "parallel_tool_calls": _TRUTH,
         "response_format": _OBJECT, "logprobs": _TRUTH,
         "top_logprobs": {"type": "integer", "minimum": 0, "maximum": fields.MAX_TOP_LOGPROBS},
         "reasoning_effort": _TEXT, "chat_template_kwargs": _OBJECT, **_MANY, **_STREAM},
        ["messages"],
    ),
    "/v1/completions": (
        {"prompt": _PROMPT, "suffix": _TEXT, "echo": _TRUTH, "logprobs": _WHOLE, "best_of": _WHOLE, **_MANY, **_STREAM},
        ["prompt"],
    ),
    "/v1/messages": (
        {"messages": _MESSAGES, "system": {}, "tools": _TOOLS, "tool_choice": _OBJECT, "thinking": _OBJECT,
         "stream": _TRUTH},
        ["messages", "max_tokens"],
    ),
    "/v1/messages/count_tokens": ({"messages": _MESSAGES, "system": {}, "tools": _TOOLS}, ["messages"]),
    "/v1/responses": (
        {"input": {"anyOf": [_TEXT, {"type": "array"}]}, "instructions": _TEXT, "tools": _TOOLS, "tool_choice": {},
         "text": _OBJECT, "reasoning": _OBJECT, "stream": _TRUTH},
        ["input"],
    ),
    "/v1/responses/input_tokens": ({"input": {"anyOf": [_TEXT, {"type": "array"}]}, "instructions": _TEXT}, ["input"]),
    "/v1/embeddings": ({"input": {"anyOf": [_TEXT, {"type": "array"}]}}, ["input"]),
    "/api/chat": (
        {"messages": _MESSAGES, "tools": _TOOLS, "options": _OBJECT, "format": {}, "stream": _TRUTH, "think": {}},
        ["messages"],
    ),
    "/api/generate": ({"prompt": _TEXT, "options": _OBJECT, "format": {}, "stream": _TRUTH}, ["prompt"]),
    "/completion": (
        {"prompt": _PROMPT, "stream": _TRUTH, "grammar": _TEXT, "json_schema": _OBJECT, "n_probs": _WHOLE}, ["prompt"],
    ),
    "/infill": ({"input_prefix": _TEXT, "input_suffix": _TEXT, "stream": _TRUTH}, []),
    "/v1/tokenize": ({"content": _TEXT, "add_special": _TRUTH, "parse_special": _TRUTH, "with_pieces": _TRUTH}, []),
    "/v1/detokenize": ({"tokens": {"type": "array", "items": _WHOLE}}, ["tokens"]),
    "/apply-template": ({"messages": _MESSAGES, "tools": _TOOLS}, ["messages"]),
}  # fmt: skip
_SAMPLED = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/completion", "/infill")
_STREAMED = {"/api/chat": "application/x-ndjson", "/api/generate": "application/x-ndjson"} | dict.fromkeys(
    _SAMPLED, "text/event-stream"
)
_OTHER_TYPES = {"/": "text/plain", "/metrics": "text/plain"}


def document(routes: Iterable[tuple[str, str, Callable[..., Any]]]) -> dict[str, Any]:
    """Of these routes: method, path and what answers."""
    paths: dict[str, dict[str, Any]] = {}
    for method, path, handler in routes:
        shown = path.replace(":path}", "}")
        paths.setdefault(shown, {})[method.lower()] = _operation(method, path, handler)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "qrun",
            "version": __version__,
            "description": "Language models in the interfaces of OpenAI, Anthropic, Ollama and llama-server. Fields "
            "that are not named here are passed over, and null is as good as absent. Paths below /v1 are reached "
            "without it too.",
        },
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _operation(method: str, path: str, handler: Callable[..., Any]) -> dict[str, Any]:
    kinds = [_OTHER_TYPES.get(path, "application/json"), *([_STREAMED[path]] if path in _STREAMED else [])]
    if path == "/":
        kinds.append("text/html")
    error = {"application/json": {"schema": {"type": "object", "required": ["error"]}}}
    operation: dict[str, Any] = {
        "summary": (inspect.getdoc(handler) or path).partition("\n\n")[0].replace("\n", " "),
        "operationId": f"{method.lower()}{re.sub('{name(:path)?}', 'name', path).replace('/', '_')}",
        "responses": {
            "200": {"description": "The answer.", "content": {kind: {} for kind in kinds}},
            "default": {"description": "What is wrong.", "content": error},
        },
    }
    if "{name" in path:
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": _TEXT}]
    if method != "GET":
        properties, required = _BODIES.get(path, ({}, []))
        properties = {"model": _TEXT} | properties | (_sampling() if path in _SAMPLED else {})
        schema = {"type": "object", "properties": properties, **({"required": required} if required else {})}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def _sampling() -> dict[str, Schema]:
    """The options of sampling, each under the first of its names."""
    found = {option.names.split()[0]: _KINDS[option.read] for option in fields.SAMPLING}
    return found | {"max_tokens": {"type": "integer", "minimum": 0}, "logit_bias": _OBJECT}
