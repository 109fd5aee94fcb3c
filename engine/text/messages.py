"""The messages of a conversation as clients send them, in the shape of OpenAI's interface: checked, and copied.

What a template then makes of them is seen to by `engine.text.template_fitting`.
"""

import json
import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from qrun.formats import QrunError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Those that every conversation may have; a template can know more of them."""

# What some templates and older clients call them.
OTHER_NAMES = {"function": "tool", "ipython": "tool", "observation": "tool", "model": "assistant", "human": "user"}

REASONING = ("reasoning_content", "thinking", "reasoning", "tool_plan")
"""The names under which clients send, and templates read, what a model thought before its answer."""

_MAX_DEPTH = 100

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
THOUGHT_PARTS = ("thinking", "reasoning")
_OTHER_MEDIA = re.compile("image|audio|video|file|document|media")


class ChatTemplateError(QrunError, ValueError):
    """A conversation that cannot become a prompt, or a template that is wrong. `str()` is one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(" ".join(reason.split())[:500])


class WrongType(QrunError, TypeError):
    """Something in a conversation is of a wrong type."""


def read_messages(messages: Any) -> list[Message]:
    """Copies of the messages as plain dictionaries, without what is null; a text alone is one message of the user.

    Raises TypeError where something is of a wrong type, ChatTemplateError for a part that is no text.
    """
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if isinstance(messages, bytes | Mapping) or not isinstance(messages, Iterable):
        raise WrongType(f"messages is {_kind(messages)}: a list of dictionaries with role and content is wanted")
    return [_read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def read_tools(tools: Any) -> list[Any] | None:
    """Copies of descriptions of functions, as plain dictionaries; None for none."""
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Iterable):
        raise WrongType(f"tools is {_kind(tools)}: a list of dictionaries that describe functions is wanted")
    read = [_plain(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    for i, tool in enumerate(read):
        if not isinstance(tool, dict):
            raise WrongType(f"tools[{i}] is {_kind(tool)}: a dictionary that describes a function is wanted")
    return read or None


def _read_message(given: Any, where: str) -> Message:
    plain = _plain(given, where)
    if not isinstance(plain, dict):
        raise WrongType(f"{where} is {_kind(plain)}: a dictionary with role and content is wanted")
    message = {key: value for key, value in plain.items() if value is not None}
    role = message.get("role")
    if role is None:
        raise ChatTemplateError(f"{where} has no role")
    if not isinstance(role, str):
        raise WrongType(f"{where}: role is {_kind(role)}: a text is wanted")
    if "content" not in message and isinstance(message.get("refusal"), str):
        message["content"] = message["refusal"]
    if "content" in message:
        message["content"] = _read_content(message["content"], role, f"{where}: content")
    for name in REASONING:
        if not isinstance(message.get(name, ""), str):
            raise WrongType(f"{where}: {name} is {_kind(message[name])}: a text is wanted")
    if (function := message.pop("function_call", None)) is not None:  # of the time when a message had one at most
        message.setdefault("tool_calls", [{"type": "function", "function": function}])
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list):
        raise WrongType(f"{where}: tool_calls is {_kind(calls)}: a list is wanted")
    for i, call in enumerate(calls):
        _check_call(call, f"{where}: tool_calls[{i}]")
    return message


def _read_content(content: Any, role: str, where: str) -> Any:
    """A text, a list of parts, or (the result of a tool) another value."""
    if isinstance(content, str):
        return content
    is_result = role not in ("system", "developer", "user", "assistant")
    if isinstance(content, list):
        if is_result and not all(isinstance(part, str) or _is_part(part) for part in content):
            return json.dumps(content, ensure_ascii=False)
        return [_read_part(part, f"{where}[{i}]") for i, part in enumerate(content)] or ""
    if is_result and isinstance(content, dict):
        return content
    raise WrongType(f"{where} is {_kind(content)}: a text or a list of parts is wanted")


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and ("type" in value or "text" in value)


def _read_part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise WrongType(f"{where} is {_kind(part)}: a part of type text is wanted")
    kind = part.get("type", "text")
    if kind in THOUGHT_PARTS:
        return part
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        what = "this model reads text alone" if _OTHER_MEDIA.search(str(kind)) else "a part of type text is wanted"
        raise ChatTemplateError(f"{where} is of type {kind}: {what}")
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise WrongType(f"{where}: {_TEXT_PARTS[kind]} is {_kind(text)}: a text is wanted")
    return {"type": "text", "text": text}


def _check_call(call: Any, where: str) -> None:
    if not isinstance(call, dict):
        raise WrongType(f"{where} is {_kind(call)}: a dictionary is wanted")
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise WrongType(f"{where}: function is {_kind(function)}: a dictionary with name and arguments is wanted")
    if not isinstance(function.get("name"), str):
        raise ChatTemplateError(f"{where} has no name of a function")
    if not isinstance(function.get("arguments", {}), str | dict | None):
        raise WrongType(f"{where}: arguments is {_kind(function['arguments'])}: a dictionary, or its JSON, is wanted")


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy in dictionaries and lists; objects such as those of OpenAI's library describe themselves."""
    if depth > _MAX_DEPTH:
        raise WrongType(f"{where} holds containers in more than {_MAX_DEPTH} others")
    if isinstance(value, str):
        return str.__str__(value)  # the text of an enumeration's member, not its name
    if isinstance(value, Mapping):
        return {key: _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth + 1) for item in value]
    if callable(dump := getattr(value, "model_dump", None)) and not isinstance(value, type):
        return _plain(dump(), where, depth + 1)
    return value


def _kind(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def message_text(content: Any) -> str:
    """The text of a message's content: of parts, one below the other."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if "text" in part)
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def with_one_system(messages: list[Message]) -> list[Message]:
    """The conversation with all system messages at its start, as one."""
    systems = [message for message in messages if message["role"] == "system"]
    if not systems:
        return messages
    return [_joined(systems), *(message for message in messages if message["role"] != "system")]


def without_system(messages: list[Message]) -> list[Message]:
    """The conversation with its system message at the head of the first question."""
    system, *others = messages
    head = [system | {"role": "user"}]
    if others and others[0]["role"] == "user":
        head.append(others.pop(0))
    return [_joined(head), *others]


def without_neighbours(messages: list[Message]) -> list[Message]:
    """Neighbouring messages of the user, or of the assistant, as one."""
    groups = (list(group) for _, group in groupby(messages, key=lambda message: message["role"]))
    return [
        message
        for group in groups
        for message in ([_joined(group)] if group[0]["role"] in ("user", "assistant") else group)
    ]


def _joined(messages: list[Message]) -> Message:
    """One message with the contents, calls and thoughts of all, and what else the last has."""
    joined: Message = {}
    for message in messages:
        joined |= message
    contents = [content for message in messages if (content := message.get("content"))]
    if all(isinstance(content, str) for content in contents):
        joined["content"] = "\n\n".join(contents)
    else:
        joined["content"] = [
            part
            for content in contents
            for part in (content if isinstance(content, list) else [{"type": "text", "text": message_text(content)}])
        ]
    for name in REASONING:
        if thoughts := [message[name] for message in messages if message.get(name)]:
            joined[name] = "\n\n".join(thoughts)
    if calls := [call for message in messages for call in message.get("tool_calls", ())]:
        joined["tool_calls"] = calls
    return joined
