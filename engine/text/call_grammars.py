"""From a format of calls and descriptions of functions to a grammar: arguments are always what a function takes.

How a call is written is data, beside the rows of `response_formats`: a text with places for its parts, as the templates
of the families write it. Where a format has no such text, its calls are free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qrun.engine.sampling.constraints import COMPACT, Compiler, schema_source, schema_text
from qrun.engine.text.response_formats import Calls, ResponseFormat

if TYPE_CHECKING:
    from qrun.engine.text.tokenizer import Tokenizer

# As Python's json writes it, which is what templates show.
_SPACED = COMPACT | {"item_separator": ", ", "key_separator": ": "}
_TEXT = r"/(.|\n)*/"
_MOST_BARE = 2000  # values in Gemma's notation that are described one by one; others may be any


@dataclass(frozen=True)
class Written:
    """How a call is written, and several between one pair of marks.

    {NAME}, {ARGUMENTS} and {ID} stand for these, {NL} for a line's end that may be missing. Where arguments are not one
    JSON object, `pair` is how each is written, with {KEY}, {VALUE}, {TYPE} (as JSON Schema calls it) and {TEXT} ("true"
    for a text), and `join` stands between them.
    """

    call: str
    first: str = ""
    between: str | None = None
    """None: there is one call between a pair of marks."""
    last: str = ""
    pair: str = ""
    join: str = ""
    is_bare: bool = True
    """Of pairs: whether a text stands there as it is, rather than as JSON."""
    id: str = "[0-9]{1,3}"


_BAR, _BLANK = "\uff5c", "\u2581"
_BEGIN, _SEP, _END = (f"<{_BAR}tool{_BLANK}{what}{_BAR}>" for what in (f"call{_BLANK}begin", "sep", f"call{_BLANK}end"))
_DSML = f"{_BAR}DSML{_BAR}"
_NAMED = '{"name": "{NAME}", "arguments": {ARGUMENTS}}'
_LIST = Written(_NAMED, "[", ", ", "]")
_ARGUMENT_TAGS = "<arg_key>{KEY}</arg_key>{NL}<arg_value>{VALUE}</arg_value>{NL}"
_DSML_CALL = Written(
    f'<{_DSML}invoke name="{{NAME}}">\n{{ARGUMENTS}}</{_DSML}invoke>\n', "\n", "",
    pair=f'<{_DSML}parameter name="{{KEY}}" string="{{TEXT}}">{{VALUE}}</{_DSML}parameter>\n',
)  # fmt: skip

# By the kind of body and the mark before it; "" for others of the kind.
_WRITTEN = {
    ("json", ""): Written("{NL}" + _NAMED + "{NL}"),
    ("json", "{"): Written('{"name": "{NAME}", "parameters": {ARGUMENTS}}'),
    ("json", "[TOOL_CALLS]"): _LIST,
    ("json", "<TOOLCALL>"): _LIST,
    ("json", "<|tool_call|>"): _LIST,
    ("json", "<|function_call|>"): Written(_NAMED),
    ("json", "<tool_calls>"): Written(_NAMED, "{NL}", "\n", "{NL}"),
    ("json", "<|START_ACTION|>"): Written(
        '{"tool_call_id": "{ID}", "tool_name": "{NAME}", "parameters": {ARGUMENTS}}', "[\n    ", ",\n    ", "\n]"),
    ("json-by-name", ""): Written('{"{NAME}": {ARGUMENTS}}', "[", ", ", "]"),
    ("name-json", "<|tool_calls|>"): Written(
        "<|tool_call:begin|>{ID}<|tool_call:name|>{NAME}<|tool_call:args|>{ARGUMENTS}<|tool_call:end|>", between="",
        id="[0-9A-Za-z]{1,10}"),
    ("name-json", "<|tool_calls_section_begin|>"): Written(
        "<|tool_call_begin|>functions.{NAME}:{ID}<|tool_call_argument_begin|>{ARGUMENTS}<|tool_call_end|>",
        between=""),
    ("name-json", "<function="): Written("{NAME}>{ARGUMENTS}"),
    ("function-tags", ""): Written(
        "{NL}<function={NAME}>\n{ARGUMENTS}</function>{NL}", pair="<parameter={KEY}>\n{VALUE}\n</parameter>\n"),
    ("function-tags", "<seed:tool_call>"): Written(
        "{NL}<function={NAME}>\n{ARGUMENTS}</function>{NL}", pair="<parameter={KEY}>{VALUE}</parameter>\n"),
    ("key-value-tags", ""): Written("{NAME}{NL}{ARGUMENTS}", pair=_ARGUMENT_TAGS),
    ("key-value-tags", "<tool_calls:opensource>"): Written(
        "<tool_call:opensource>{NAME}<tool_sep:opensource>\n{ARGUMENTS}</tool_call:opensource>\n", "\n", "",
        pair="<arg_key:opensource>{KEY}</arg_key:opensource>\n<arg_value:opensource>{VALUE}</arg_value:opensource>\n"),
    ("invoke-tags", "<minimax:tool_call>"): Written(
        '<invoke name="{NAME}">\n{ARGUMENTS}</invoke>\n', "\n", "",
        pair='<parameter name="{KEY}">{VALUE}</parameter>\n'),
    ("invoke-tags", "<function "): Written(
        'name="{NAME}">{ARGUMENTS}', pair='<param name="{KEY}">{VALUE}</param>'),
    ("invoke-tags", f"<{_DSML}tool_calls>"): _DSML_CALL,
    ("invoke-tags", f"<{_DSML}function_calls>"): _DSML_CALL,
    ("python", ""): Written("{NAME}({ARGUMENTS})", "[", ", ", "]", pair="{KEY}={VALUE}", join=", ", is_bare=False),
    ("bare-keys", ""): Written("call:{NAME}{ARGUMENTS}"),
    ("indexed-tags", ""): Written(
        '<|open|>call tool="{NAME}" index="{ID}"<|sep|>{ARGUMENTS}<|close|>call<|sep|>', between="",
        pair='<|open|>argument key="{KEY}" type="{TYPE}"<|sep|>{VALUE}<|close|>argument<|sep|>'),
}  # fmt: skip

_PLACES = re.compile(r"\{(NAME|ARGUMENTS|ID|NL|KEY|VALUE|TYPE|TEXT)\}")
_NAME = re.compile(r"[\w.:/$-]{1,200}")


def written(calls: Calls) -> Written | None:
    """How calls of this format are written; None where that is not known, so that they are free."""
    if calls.body == "name-json" and calls.open == "[TOOL_CALLS]":
        with_id = "CALL_ID" in calls.pattern
        return Written("{NAME}[CALL_ID]{ID}[ARGS]{ARGUMENTS}" if with_id else "{NAME}[ARGS]{ARGUMENTS}",
                       id="[0-9A-Za-z]{9}")  # fmt: skip
    if calls.body == "name-json" and f"{_BAR}tool" in calls.open:
        if "```json" in calls.pattern:
            fenced = f"{_BEGIN}function{_SEP}{{NAME}}\n```json\n{{ARGUMENTS}}\n```{_END}"
            return Written(fenced, between="\n")
        return Written(f"{_BEGIN}{{NAME}}{_SEP}{{ARGUMENTS}}{_END}", between="")
    if calls.open == "" and calls.body != "json":
        return None
    return _WRITTEN.get((calls.body, calls.open)) or (
        _WRITTEN.get((calls.body, "")) if not calls.dropped else None
    )


@dataclass(frozen=True)
class Function:
    """What is asked of a description of a function. is_strict: its arguments must be checked in all that the
    description says."""

    name: str
    parameters: Mapping[str, Any]
    is_strict: bool = False


def read_functions(tools: Iterable[Any]) -> list[Function]:
    """ValueError for a function without a name, or with one that no call could spell."""
    functions = []
    for i, tool in enumerate(tools):
        given = tool.get("function", tool)
        given = given if isinstance(given, dict) else tool
        name = given.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"tools[{i}]: {name!r:.60} is no name of a function")
        parameters = given.get("parameters", given.get("input_schema", given.get("inputSchema")))
        parameters = parameters if isinstance(parameters, dict) else {}
        functions.append(Function(name, parameters, bool(given.get("strict"))))
    return functions


class CallGrammar:
    """Grammars, in Lark's syntax, for calls of some functions."""

    def __init__(
        self, format: ResponseFormat, functions: Sequence[Function], tokenizer: Tokenizer, compiler: Compiler
    ) -> None:
        assert format.calls is not None
        self._calls = format.calls
        self._thoughts = format.thoughts
        self._has_headers = format.thoughts is not None and format.thoughts.header is not None
        self._functions = {function.name: function for function in functions}
        self._tokenizer = tokenizer
        self._control = tokenizer.control_ids | tokenizer.stop_ids
        self._compiler = compiler
        self._written = written(format.calls)
        self._rules: list[str] = []
        self._arguments_of: dict[str, str] = {}
        self._n_bare = 0

    def whole(self, *, several: bool, schema: Any = None) -> str:
        """An answer that is a call (or several), or, with a schema, a JSON value."""
        self._rules = []
        choices = [self._sequence(several)]
        if schema is not None:
            after = self._thoughts.after if self._thoughts is not None and self._has_headers else ""
            text = json.dumps({"x-guidance": COMPACT} | json.loads(schema_text(schema)), ensure_ascii=False)
            choices.append(f"{self._spelt(after)} %json {text}")
        return self._lark(" | ".join(choices))

    def inside(self, name: str, *, several: bool) -> str | None:
        """What follows the mark that begins calls, to the end of the one that ends them; name: of the function, where
        the mark has it. None where that is free."""
        if self._written is None or (name and name not in self._functions):
            return None
        if self._has_headers and not name:
            return None
        self._rules = []
        if name:
            return self._lark(self._arguments(self._functions[name]))
        body = self._body(several)
        if not self._calls.close:
            again = self._spelt(self._calls.open)
            repeats = several and self._written.between is None and self._calls.open != "{"
            return self._lark(f"{body} ({again} {body})*" if repeats else body)
        return self._lark(f"{body} {self._spelt(self._calls.close)}")

    def _lark(self, start: str) -> str:
        return "\n".join(["%llguidance {}", f"start: {start}", *dict.fromkeys(self._rules)])

    def _sequence(self, several: bool) -> str:
        """Marks and all."""
        calls = self._calls
        if self._has_headers and calls.body == "json":
            start = self._thoughts.after.partition("<|channel|>")[0] if self._thoughts else ""
            head = start + "<|channel|>commentary to=functions.{NAME} <|constrain|>json<|message|>{ARGUMENTS}"
            return "(" + " | ".join(self._filled(head, function) for function in self._functions.values()) + ")"
        opening = "" if calls.open == "{" else self._spelt(calls.open)
        one = f"{opening} {self._body(several)} {self._spelt(calls.close)}"
        if not several or calls.open == "{" or (self._written is not None and self._written.between is not None):
            return one
        apart = '("\\n")?' if calls.close else ""
        return f"{one} ({apart} {one})*"

    def _body(self, several: bool) -> str:
        """What stands between the marks."""
        form = self._written
        if form is None:
            return "free" if self._rule("free", _TEXT) else ""
        one = "(" + " | ".join(self._filled(form.call, function) for function in self._functions.values()) + ")"
        more = f"({self._spelt(form.between)} {one})*" if several and form.between is not None else ""
        return f"{self._filled(form.first)} {one} {more} {self._filled(form.last)}"

    def _filled(self, text: str, function: Function | None = None) -> str:
        """A text with its places filled."""
        parts = []
        for i, part in enumerate(_PLACES.split(text)):
            if i % 2 == 0:
                parts.append(self._spelt(part))
            elif part == "NL":
                parts.append('("\\n")?')
            elif part == "ID":
                assert self._written is not None
                parts.append(f"/{self._written.id}/")
            elif function is not None:
                parts.append(self._spelt(function.name) if part == "NAME" else self._arguments(function))
        return " ".join(part for part in parts if part)

    def _arguments(self, function: Function) -> str:
        form = self._written
        if self._calls.body == "bare-keys":
            self._any_bare()
            return self._bare(self._object_of(function.parameters))
        if form is None or not form.pair:
            return self._json(self._checked(function.parameters, function))
        pairs = []
        required = function.parameters.get("required")
        required = required if isinstance(required, list) else []
        for key, schema in self._properties(function.parameters):
            pairs.append((self._pair(form, key, schema, function), key in required))
        if not form.join:
            return " ".join(pair if needed else f"({pair})?" for pair, needed in pairs)
        return self._joined(pairs, self._spelt(form.join))

    def _joined(self, items: list[tuple[str, bool]], join: str) -> str:
        """Items in their order, with something between each two; those that are not needed may be missing."""
        if not items:
            return ""
        # Rule i: what may come from item i on, after an item; from the last one to the first.
        rest: list[str] = ['""'] * (len(items) + 1)
        begun = ""
        for i in range(len(items) - 1, -1, -1):
            item, needed = items[i]
            after = f"{item} {rest[i + 1]}" if rest[i + 1] != '""' else item
            rest[i] = self._named_rule(f"{join} {after}" if needed else f"({join} {after}) | {rest[i + 1]}")
            start = after if needed else f"({after})" + (f" | {begun}" if begun else ' | ""')
            begun = self._named_rule(start)
        return begun

    def _pair(self, form: Written, key: str, schema: Any, function: Function) -> str:
        before, _, after = form.pair.partition("{VALUE}")
        is_text = form.is_bare and _may_be_text(schema)
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        kind = {"integer": "number"}.get(kind, kind) if isinstance(kind, str) else "string" if is_text else "object"
        for place, value in (("KEY", key), ("TYPE", kind), ("TEXT", "true" if is_text else "false")):
            before = before.replace(f"{{{place}}}", value)
        if not is_text:
            style = _SPACED if form.is_bare or self._calls.body == "python" else COMPACT
            return f"{self._filled(before)} {self._json(self._checked(schema, function), style)} {self._filled(after)}"
        words = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(words, list) and words:
            values = " | ".join(self._spelt(word if isinstance(word, str) else json.dumps(word)) for word in words)
            return f"{self._filled(before)} ({values}) {self._filled(after)}"
        return f"{self._filled(before)} {self._up_to(after)}"

    def _up_to(self, after: str) -> str:
        """A text, and what ends it."""
        mark = after.lstrip("\n")
        mark = mark[: mark.find(">") + 1] or mark
        spelt = self._spelt(mark)
        if spelt.startswith("<["):  # no text has such a token
            return f"{_TEXT} {self._filled(after)}"
        rest = after.partition(mark)[2]
        name = f"until_{re.sub('[^a-z]', '', mark.lower())}"
        self._rule(f"{name}[lazy]", r"/(.|\n)*" + _escaped(mark) + "/")
        return f"{name} {self._filled(rest)}"

    def _properties(self, parameters: Mapping[str, Any]) -> list[tuple[str, Any]]:
        properties = parameters.get("properties")
        if not isinstance(properties, Mapping):
            return []
        return [(key, _inner(schema, parameters)) for key, schema in properties.items()]

    def _object_of(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return {"type": "object", **parameters}

    def _checked(self, schema: Any, function: Function) -> dict[str, Any]:
        """A schema as far as it can be followed."""
        if schema == function.parameters:
            schema = self._object_of(schema)
        plain = {key: value for key, value in schema.items() if key != "x-guidance"}
        if self._compiler.allows(plain):
            return plain
        if function.is_strict:
            try:
                self._compiler.compile(schema_source(plain), f"the parameters of {function.name}")
            except ValueError as error:
                raise ValueError(str(error)) from None
        lenient = plain | {"x-guidance": {"lenient": True}}
        if self._compiler.allows(lenient):
            return lenient
        return {"type": "object"} if plain.get("type") == "object" else {}

    def _json(self, schema: dict[str, Any], style: Mapping[str, Any] = _SPACED) -> str:
        guidance = {**style, **schema.get("x-guidance", {})}
        text = json.dumps(schema | {"x-guidance": guidance}, ensure_ascii=False)
        return self._named_rule(f"%json {text}")

    # Gemma's own notation

    def _bare(self, schema: Any, depth: int = 0) -> str:
        """A value with bare keys and texts between quotes of their own."""
        self._n_bare += 1
        if self._n_bare > _MOST_BARE:
            return "bare_value"
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        if isinstance(schema, Mapping) and isinstance(schema.get("enum"), list):
            return "(" + " | ".join(self._bare_constant(value) for value in schema["enum"]) + ")"
        if kind == "string":
            return "bare_text"
        if kind in ("number", "integer", "boolean", "null"):
            return self._json(self._plain(schema, kind))
        if kind == "array" and depth < 8:
            item = self._bare(_inner(schema.get("items"), schema), depth + 1)
            return f'"[" ({item} ("," {item})*)? "]"'
        if kind == "object" and depth < 8 and isinstance(schema.get("properties"), Mapping):
            required = schema.get("required", [])
            items = [
                (f"{self._spelt(key + ':')} {self._bare(value, depth + 1)}", key in required)
                for key, value in self._properties(schema)
            ]
            return f'"{{" {self._joined(items, self._spelt(","))} "}}"'
        return "bare_object" if kind == "object" else "bare_value"

    def _plain(self, schema: Any, kind: str) -> dict[str, Any]:
        return dict(schema) if self._compiler.allows(schema) else {"type": kind}

    def _bare_constant(self, value: Any) -> str:
        quote = self._spelt(self._calls.quote)
        return f"{quote} {self._spelt(value)} {quote}" if isinstance(value, str) else self._spelt(json.dumps(value))

    def _any_bare(self) -> None:
        quote = self._calls.quote
        spelt = self._spelt(quote)
        if spelt.startswith("<["):
            self._rule("bare_text", f"{spelt} {_TEXT} {spelt}")
        else:
            self._rule("bare_end[lazy]", r"/(.|\n)*" + _escaped(quote) + "/")
            self._rule("bare_text", f"{spelt} bare_end")
        self._rule("bare_value", "bare_text | bare_object | bare_list | BARE_WORD")
        self._rule("BARE_WORD", r"/true|false|null|-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,15})?/")
        self._rule("bare_list", '"[" (bare_value ("," bare_value)*)? "]"')
        self._rule("bare_object", '"{" (bare_pair ("," bare_pair)*)? "}"')
        self._rule("bare_pair", '/[A-Za-z_][A-Za-z0-9_]{0,63}/ ":" bare_value')

    # Lark

    def _rule(self, name: str, body: str) -> str:
        self._rules.append(f"{name}: {body}")
        return name

    def _named_rule(self, body: str) -> str:
        if body not in self._arguments_of:
            self._arguments_of[body] = f"r{len(self._arguments_of)}"
        return self._rule(self._arguments_of[body], body)

    def _spelt(self, text: str) -> str:
        """A text, with the tokens that no text spells by their numbers; those that end an answer are left out."""
        if not text:
            return ""
        parts: list[str] = []
        plain: list[int] = []
        tokenizer = self._tokenizer
        ids = tokenizer.encode_further(text, parse_special=True)
        if self._control.isdisjoint(ids):
            return json.dumps(text, ensure_ascii=False)
        for id in [*ids, -1]:
            if id in self._control or id == -1:
                if plain:
                    parts.append(json.dumps(tokenizer.decode(plain), ensure_ascii=False))
                    plain = []
                if id != -1 and id not in tokenizer.stop_ids:
                    parts.append(f"<[{id}]>")
            else:
                plain.append(id)
        return " ".join(parts)


def _may_be_text(schema: Any) -> bool:
    """Whether a value may be a text, by its schema."""
    if not isinstance(schema, Mapping):
        return True
    if isinstance(kind := schema.get("type"), str):
        return kind == "string"
    if isinstance(kind, list):
        return "string" in kind
    if words := schema.get("enum"):
        return isinstance(words, list) and any(isinstance(word, str) for word in words)
    if "const" in schema:
        return isinstance(schema["const"], str)
    for key in ("anyOf", "oneOf"):
        if isinstance(choices := schema.get(key), list):
            return any(_may_be_text(choice) for choice in choices)
    return not any(key in schema for key in ("$ref", "allOf", "properties", "items"))


def _inner(schema: Any, parent: Mapping[str, Any]) -> dict[str, Any]:
    """A schema within another, with what it refers to there."""
    defs = {key: parent[key] for key in ("$defs", "definitions") if key in parent}
    found = dict(schema) if isinstance(schema, Mapping) else {}
    for _ in range(8):
        target: Any = defs
        reference = found.get("$ref")
        for step in reference.removeprefix("#/").split("/") if isinstance(reference, str) else ():
            target = target.get(step) if isinstance(target, Mapping) else None
        if not isinstance(reference, str) or not isinstance(target, Mapping):
            break
        found = {**target, **{key: value for key, value in found.items() if key != "$ref"}}
    return {**found, **defs}


def _escaped(text: str) -> str:
    """A text as a part of a regular expression."""
    return re.sub(r"([\\^$.|?*+()\[\]{}/])", r"\\\1", text).replace("\n", "\\n")
