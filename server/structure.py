"""What an answer has to look like: schemas, grammars, calls that must be made.

This is the one place where all interfaces' spellings of that end. What comes out are keyword arguments of `Model.chat`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qrun.server.errors import APIError, not_supported

# vLLM's and llama-server's fields, each of which asks for a form by itself
_FIELDS = (
    "grammar", "json_schema", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs",
    "structural_tag",
)  # fmt: skip


def structure(body: Mapping[str, Any], form: Any = None, form_name: str = "response_format") -> dict[str, Any]:
    """The arguments for a request. form: what the interface's own field says, in OpenAI's nested form, its flat form
    of the Responses interface, or Ollama's."""
    for name in _FIELDS:
        if body.get(name) not in (None, "", {}):
            raise not_supported(f"{name} is not supported: this server does not constrain answers yet", name)
    kind = form.get("type") if isinstance(form, dict) else form
    if form in (None, "", {}) or kind == "text":
        return {}
    if not isinstance(form, dict | str):
        raise APIError(f"{form_name} must be an object", param=form_name)
    raise not_supported(f"{form_name} is not supported: this server does not constrain answers yet", form_name)


def tool_choice(choice: Any, tools: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    """The tools that a model is told of, and the arguments that say whether it has to call one."""
    mode: Any = choice
    if isinstance(choice, dict):
        mode = choice.get("type")
        if mode == "allowed_tools":
            allowed = choice.get("allowed_tools", choice)
            allowed = allowed if isinstance(allowed, dict) else {}
            names = {_name(tool) for tool in allowed.get("tools") or [] if isinstance(tool, dict)}
            tools = [tool for tool in tools if _name(tool) in names]
            mode = allowed.get("mode", "auto")
    if mode in (None, "auto"):
        return tools, {}
    if mode == "none":
        return [], {}
    if mode in ("required", "any", "function", "tool", "custom"):
        if not tools:
            return tools, {}
        raise not_supported("tool_choice is not supported but for auto and none: this server does not constrain "
                            "answers yet", "tool_choice")  # fmt: skip
    raise APIError("tool_choice must be auto, none, required or an object that names a function", param="tool_choice")


def _name(tool: Mapping[str, Any]) -> Any:
    function = tool.get("function")
    return function.get("name") if isinstance(function, dict) else tool.get("name")
