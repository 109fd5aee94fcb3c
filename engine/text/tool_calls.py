"""What a model wrote between the marks of a call: the function's name, and its arguments as a mapping."""

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import field
from typing import Any

from qrun.engine.text.response_formats import Body, Calls
from qrun.formats.dataclass import dataclass


@dataclass
class ToolCall:
    """A call of a function. name: of the function. arguments: by their names. id: what the model named the call, or
    ""."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    id: str = ""


Texts = frozenset[tuple[str, str]]
"""Names of functions, each with the name of an argument that is a text."""


def text_arguments(tools: Iterable[Any]) -> Texts:
    """The arguments that are texts by the schemas of these functions. Where a format has no quotes around texts, "12"
    is one for such an argument, and a number for any other."""
    texts = set()
    for tool in tools:
        function = _mapping(tool).get("function", tool)
        properties = _mapping(_mapping(_mapping(function).get("parameters")).get("properties"))
        for key, schema in properties.items():
            if _mapping(schema).get("type") == "string":
                texts.add((str(function.get("name")), str(key)))
    return frozenset(texts)


def _mapping(value: Any) -> dict[Any, Any]:
    """What schemas are made of; nothing, where it is something else."""
    return value if isinstance(value, dict) else {}


_NAME = re.compile(r"[\w.:/$-]+")


class _NoCall(Exception):
    """The text is no call."""


def read_calls(calls: Calls, text: str, name: str = "", texts: Texts = frozenset()) -> list[ToolCall] | None:
    """The calls in a text; None if it is none. name: that of the function, where it does not stand in the text. texts:
    see `text_arguments`."""
    if calls.dropped:
        text = re.sub(calls.dropped, lambda found: "/" if found[0].startswith("/") else "", text)
    try:
        read = _READERS[calls.body](calls, text, texts)
    except (_NoCall, ValueError, RecursionError, SyntaxError, MemoryError):
        read = []
    if not all(_NAME.fullmatch(call.name) for call in read):
        return None
    if name and calls.body == "json":
        try:
            arguments = json.loads(text or "{}")
        except (ValueError, RecursionError):
            return None
        read = [ToolCall(name, arguments)] if isinstance(arguments, dict) else []
    return read or None


def _values(text: str) -> list[Any]:
    """All JSON values of a text, those of lists one by one."""
    values: list[Any] = []
    decoder = json.JSONDecoder(strict=False)
    at = _skip(text, 0)
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        values += value if isinstance(value, list) else [value]
        at = _skip(text, at)
    return values


def _skip(text: str, at: int) -> int:
    """Past white space, commas, fences, and tags around single calls."""
    found = re.compile(r"(?:\s|,|;|```(?:json)?|</?tool_call>)*").match(text, at)
    return found.end() if found else at


def _arguments(value: Any) -> dict[str, Any]:
    """A mapping, or the JSON of one."""
    if isinstance(value, str):
        value = json.loads(value or "{}")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _NoCall
    return value


def _json(calls: Calls, text: str, texts: Texts) -> list[ToolCall]:
    read = []
    for value in _values(text):
        if not isinstance(value, dict):
            raise _NoCall
        function = value.get("function", value)
        if isinstance(function, str):
            function = value | {"name": function}
        if not isinstance(function, dict):
            raise _NoCall
        name = function.get("name", function.get("tool_name"))
        if not isinstance(name, str):
            raise _NoCall
        given: Any = next((function[key] for key in ("arguments", "parameters", "args") if key in function), {})
        id = value.get("id", value.get("tool_call_id", ""))
        read.append(ToolCall(name, _arguments(given), str(id)))
    return read


def _json_by_name(calls: Calls, text: str, texts: Texts) -> list[ToolCall]:
    values = _values(text)
    if not all(isinstance(value, dict) for value in values):
        raise _NoCall
    return [ToolCall(name, _arguments(given)) for value in values for name, given in value.items()]


def _name_json(calls: Calls, text: str, texts: Texts) -> list[ToolCall]:
    read = []
    decoder = json.JSONDecoder(strict=False)
    head = re.compile(calls.pattern, re.DOTALL)
    at = 0
    while found := head.search(text, at):
        value, at = decoder.raw_decode(text, _skip(text, found.end()))
        named = found.groupdict()
        read.append(ToolCall(named["name"].strip(), _arguments(value), (named.get("id") or "").strip()))
    return read


def _value(text: str, is_text: bool = False) -> Any:
    """JSON where it is, as for numbers; else the text itself."""
    if is_text:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _function_tags(calls: Calls, text: str, texts: Texts) -> list[ToolCall]:
    read = []
    for function in re.finditer(r"<function=([^>]*)>(.*?)(?:</function>|(?=<function=)|\Z)", text, re.DOTALL):
        pattern = r"<parameter=([^>]*)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)"
        pairs = re.findall(pattern, function[2], re.DOTALL)
        name = function[1].strip()
        named = ((key.strip(), value) for key, value in pairs)
        read.append(ToolCall(name, {key: _value(value, (name, key) in texts) for key, value in named}))
    return read


def _invoke_tags(calls: Calls, text: str, texts: Texts) -> list[ToolCall]:
    read = []
    if calls.open == "<function ":
        text = f"<invoke {text}"
    for function in re.finditer(r'<invoke\s+name="([^"]*)"[^>]*>(.*?)(?:</invoke>|(?=<invoke\s)|\Z)', text, re.DOTALL):
        arguments = {}
        named = r'<param(?:eter)?\s+name="([^"]*)"([^>]*)>(.*?)</param(?:eter)?>'
        for key, kind, value in re.findall(named, function[2], re.DOTALL):
            arguments[key] = _value(value, 'string="true"' in kind or (function[1], key) in texts)
        if not arguments:  # the key is the tag
            tags = r"<([\w.-]+)>(.*?)</\1>"
            pairs = re.findall(tags, function[2], re.DOTALL)
            arguments = {key: _value(value, (function[1], key) in texts) for key, value in pairs}
        read.append(ToolCall(function[1], arguments))
    return read


def _key_value_tags(calls: Calls, text: str, texts: Texts) -> list[ToolCall]:
    read = []
    for part in re.split(r"</tool_call>", re.sub(r"<tool_call>|<tool_sep>", "", text)):
        name, *pairs = re.split(r"<arg_key>", part)
        if not name.strip():
            continue
        arguments = {}
        for pair in pairs:
            key, _, value = pair.partition("</arg_key>")
            found = re.search(r"<arg_value>(.*?)(?:</arg_value>|\Z)", value, re.DOTALL)
            is_text = (name.strip(), key.strip()) in texts
            arguments[key.strip()] = _value(found[1], is_text) if found else ""
        read.append(ToolCall(name.strip(), arguments))
    return read


def _python(calls: Calls, text: str, texts: Texts) -> list[ToolCall]:
    with warnings.catch_warnings(action="ignore"):  # of escapes that Python does not know
        tree = ast.parse(text.strip(), mode="eval").body
    read = []
    for call in tree.elts if isinstance(tree, ast.List | ast.Tuple) else [tree]:
        if not isinstance(call, ast.Call) or call.args:
            raise _NoCall
        arguments = {}
        for keyword in call.keywords:
            if keyword.arg is None:
                raise _NoCall
            arguments[keyword.arg] = _literal(keyword.value)
        read.append(ToolCall(ast.unparse(call.func), arguments))
    return read


class _JsonNames(ast.NodeTransformer):
    """JSON's names for Python's."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        values = {"true": True, "false": False, "null": None}
        return ast.copy_location(ast.Constant(values[node.id]), node) if node.id in values else node


def _literal(node: ast.expr) -> Any:
    """Of Python, or of JSON."""
    return ast.literal_eval(_JsonNames().visit(node))


def _bare_keys(calls: Calls, text: str, texts: Texts) -> list[ToolCall]:
    read = []
    at = 0
    while found := re.compile(r"\s*call:([^{]*)").match(text, at):
        value, at = _bare_value(text, found.end(), calls.quote)
        read.append(ToolCall(found[1].strip(), _arguments(value)))
    return read


def _bare_value(text: str, at: int, quote: str) -> tuple[Any, int]:
    at = _space(text, at)
    if text.startswith(quote, at):
        end = text.index(quote, at + len(quote))
        return text[at + len(quote) : end], end + len(quote)
    if text[at : at + 1] in ("{", "["):
        is_mapping, close = text[at] == "{", "}" if text[at] == "{" else "]"
        items: dict[str, Any] = {}
        at = _space(text, at + 1)
        while text[at : at + 1] != close:
            key = str(len(items))
            if is_mapping:
                if text.startswith(quote, at):
                    key, at = _bare_value(text, at, quote)
                    at = text.index(":", at)
                else:
                    key, at = text[at : text.index(":", at)].strip(), text.index(":", at)
                at += 1
            items[key], at = _bare_value(text, at, quote)
            at = _space(text, at)
            if text[at : at + 1] == ",":
                at = _space(text, at + 1)
            elif text[at : at + 1] != close:
                raise _NoCall
        return (items if is_mapping else list(items.values())), at + 1
    found = re.compile(r"[^,{}\[\]]+").match(text, at)
    if not found:
        raise _NoCall
    return _value(found[0].strip()), found.end()


def _space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _indexed_tags(calls: Calls, text: str, texts: Texts) -> list[ToolCall]:
    read = []
    call = r'<\|open\|>call tool="([^"]*)"[^<]*<\|sep\|>(.*?)(?:<\|close\|>call<\|sep\|>|\Z)'
    argument = r'<\|open\|>argument key="([^"]*)" type="([^"]*)"[^<]*<\|sep\|>(.*?)<\|close\|>argument<\|sep\|>'
    for name, body in re.findall(call, text, re.DOTALL):
        pairs = re.findall(argument, body, re.DOTALL)
        read.append(ToolCall(name, {key: value if kind == "string" else _value(value) for key, kind, value in pairs}))
    return read


_READERS: dict[Body, Callable[[Calls, str, Texts], list[ToolCall]]] = {
    "json": _json,
    "json-by-name": _json_by_name,
    "name-json": _name_json,
    "function-tags": _function_tags,
    "invoke-tags": _invoke_tags,
    "key-value-tags": _key_value_tags,
    "python": _python,
    "bare-keys": _bare_keys,
    "indexed-tags": _indexed_tags,
}
