"""What an answer has to look like: schemas, grammars, calls that must be made.

This is the one place where all interfaces' spellings of that end. What comes out are keyword arguments of `Model.chat`
and `Model.generate`; forms that those do not have are refused, and never passed over.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from qrun.server.errors import APIError, not_supported

Arguments = dict[str, Any]

_ANY_OBJECT = {"type": "object"}
"""What clients that ask for JSON without a schema go on to read: no number, and no list."""


def structure(body: Mapping[str, Any], form: Any = None, form_name: str = "response_format") -> Arguments:
    """The arguments for a request. form: what the interface's own field says, in OpenAI's nested form, its flat form
    of the Responses interface, or Ollama's."""
    found = [(name, arguments) for name, read in _FIELDS.items() if (arguments := read(name, body.get(name)))]
    if arguments := _form(form_name, form):
        found.append((form_name, arguments))
    if not found:
        return {}
    name, arguments = found[0]
    if len(found) > 1:
        raise APIError(f"{name} and {found[1][0]} do not go together", param=name)
    return arguments


def _form(name: str, form: Any) -> Arguments:
    """OpenAI's `response_format`, `text.format` and their relatives."""
    if form in (None, "", {}) or form == "text":
        return {}
    if form == "json" and name == "format":  # Ollama's
        return {"schema": _ANY_OBJECT}
    if not isinstance(form, dict):
        raise APIError(f"{name} must be {'json or a JSON schema' if name == 'format' else 'an object'}", param=name)
    kind = form.get("type")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"schema": form.get("schema") or _ANY_OBJECT}
    if kind == "json_schema":
        inner = form.get("json_schema")
        schema = (inner if isinstance(inner, dict) else form).get("schema")
        if schema is None:
            raise APIError(f"{name} has no schema", param=name)
        return {"schema": _schema(name, schema)}
    if kind in ("grammar", "regex"):
        return {kind: _text(name, form.get(kind) or form.get("value"))}
    if name == "format":  # Ollama's: the schema itself
        return {"schema": form}
    raise APIError(f"{name}.type must be text, json_object or json_schema", param=name)


def _schema(name: str, value: Any) -> Any:
    if value in (None, ""):
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise APIError(f"{name} is no JSON", param=name) from None
    if not isinstance(value, dict | bool):
        raise APIError(f"{name} must be a JSON schema", param=name)
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise APIError(f"{name} must be a text", param=name)
    return value


def _json_field(name: str, value: Any) -> Arguments:
    schema = _schema(name, value)
    return {} if schema is None else {"schema": schema}


def _text_field(argument: str, name: str, value: Any) -> Arguments:
    return {} if value in (None, "") else {argument: _text(name, value)}


def _choice(name: str, value: Any) -> Arguments:
    if value in (None, []):
        return {}
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise APIError(f"{name} must be a list of texts", param=name)
    return {"regex": "|".join(re.escape(one) for one in value)}


def _outputs(name: str, value: Any) -> Arguments:
    """vLLM's `structured_outputs`."""
    if value in (None, {}):
        return {}
    if not isinstance(value, dict):
        raise APIError(f"{name} must be an object", param=name)
    readers: dict[str, Callable[[str, Any], Arguments]] = {
        "json": _json_field, "regex": functools.partial(_text_field, "regex"), "choice": _choice,
        "grammar": functools.partial(_text_field, "grammar"),
    }  # fmt: skip
    for kind, read in readers.items():
        if arguments := read(f"{name}.{kind}", value.get(kind)):
            return arguments
    if value.get("json_object"):
        return {"schema": _ANY_OBJECT}
    raise not_supported(f"{name} has nothing in it that is supported", name)


def _never(name: str, value: Any) -> Arguments:
    if value in (None, "", {}):
        return {}
    raise not_supported(f"{name} is not supported", name)


# llama-server's and vLLM's fields
_FIELDS: dict[str, Callable[[str, Any], Arguments]] = {
    "grammar": functools.partial(_text_field, "grammar"),
    "json_schema": _json_field,
    "guided_json": _json_field,
    "guided_regex": functools.partial(_text_field, "regex"),
    "guided_choice": _choice,
    "guided_grammar": functools.partial(_text_field, "grammar"),
    "structured_outputs": _outputs,
    "structural_tag": _never,
}


def tool_choice(
    choice: Any, tools: list[Any], *, parallel: bool = True, field: str = "tool_choice"
) -> tuple[list[Any], Arguments]:
    """The tools that a model is told of, and the arguments that say whether it has to call one, and how many. field:
    where the choice stands."""
    mode: Any = choice
    if isinstance(choice, dict):
        mode = choice.get("type")
        if mode == "allowed_tools":
            allowed = choice.get("allowed_tools", choice)
            allowed = allowed if isinstance(allowed, dict) else {}
            names = {_name(tool) for tool in allowed.get("tools") or [] if isinstance(tool, dict)}
            tools = [tool for tool in tools if _name(tool) in names]
            mode = allowed.get("mode", "auto")
    one = {} if parallel or not tools else {"parallel_tool_calls": False}
    if mode in (None, "auto"):
        return tools, one
    if mode == "none":
        return [], {}
    if mode in ("required", "any"):
        return tools, {"tool_choice": "required"} | one if tools else {}
    if mode in ("function", "tool", "custom"):
        name = _name(choice)
        if name not in [_name(tool) for tool in tools]:
            raise APIError(f"{field} names a function that is not among the tools", param=field)
        return tools, {"tool_choice": {"name": name}} | one
    raise APIError(f"{field} must be auto, none, required or an object that names a function", param=field)


def _name(tool: Mapping[str, Any]) -> Any:
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else tool.get("name")
    return name if isinstance(name, str) else None
