"""Calls of functions for models whose template knows none, or does not show those that were made.

The functions are described in the system's message, and calls stand in answers as Hermes writes them, which many models
have seen. So a model can at least try, and one that has to call (`tool_choice`) can be held to it by a grammar.
"""

import json
from typing import Any

from qrun.engine.text.messages import Message, message_text
from qrun.engine.text.response_formats import Calls

GENERIC = Calls((), "<tool_call>", "</tool_call>", "json")

_TOLD = "You may call functions to answer. Here they are, each as JSON:\n"
_HOW = """\


To call a function, answer with its name and arguments as JSON between these marks, and with nothing else:
<tool_call>
{"name": "...", "arguments": {...}}
</tool_call>"""


def with_tools_told(messages: list[Message], tools: list[Any], calls: Calls) -> list[Message]:
    """The conversation, whose system's message describes the functions as well. How a model of a known family calls
    them need not be said."""
    told = _TOLD + "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    told += _HOW if calls is GENERIC else ""
    if messages and messages[0]["role"] in ("system", "developer"):
        first = messages[0]
        return [first | {"content": f"{message_text(first.get('content', ''))}\n\n{told}"}, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]


def with_calls_as_text(messages: list[Message], calls: Calls | None, *, takes_results: bool) -> list[Message]:
    """The conversation with calls as texts of the assistant. takes_results: whether the template has a place for their
    results; else the user says them."""
    told: list[Message] = []
    for message in messages:
        if made := message.get("tool_calls"):
            texts = [message_text(message["content"])] if message.get("content") else []
            message = {key: value for key, value in message.items() if key != "tool_calls"}
            message["content"] = "\n".join([*texts, _written(made, calls or GENERIC)])
        elif message["role"] == "tool" and not takes_results:
            said = f"<tool_response>\n{message_text(message.get('content', ''))}\n</tool_response>"
            message = {"role": "user", "content": said}
        told.append(message)
    return told


def _written(made: list[dict[str, Any]], calls: Calls) -> str:
    """Calls as a model would write them, in formats of JSON and Python; in others as Hermes does."""
    named = []
    for call in made:
        function = call.get("function", call)
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = {"arguments": arguments}
        named.append((function["name"], arguments if isinstance(arguments, dict) else {"arguments": arguments}))
    if calls.body == "python":
        spelt = (f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})" for name, given in named)
        return f"{calls.open}[{', '.join(spelt)}]{calls.close}"
    spelt = (json.dumps({"name": name, "arguments": given}, ensure_ascii=False) for name, given in named)
    if calls.body == "json" and not calls.close and calls.open not in ("", "{"):
        return f"{calls.open}[{', '.join(spelt)}]"
    begin, end = (calls.open, calls.close) if calls.body == "json" and calls.close else (GENERIC.open, GENERIC.close)
    return "\n".join(f"{begin}\n{one}\n{end}" for one in spelt)
