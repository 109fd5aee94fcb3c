"""What an answer must be, from what a caller asks for: a schema, a grammar, calls of functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qrun.engine.generation.guide import Rules
from qrun.engine.sampling import constraints
from qrun.engine.sampling.constraints import Constraint

if TYPE_CHECKING:
    from qrun.engine.text.response_formats import ResponseFormat
    from qrun.engine.text.tokenizer import Tokenizer


def text_rules(tokenizer: Tokenizer, schema: Any = None, grammar: str | None = None, regex: str | None = None) -> Rules:
    """For a text that a schema, a grammar or a regular expression describes. ValueError if it is wrong, or not
    supported, or there are several."""
    return Rules(_constraint(tokenizer, schema, grammar, regex))


def chat_rules(
    tokenizer: Tokenizer | None,
    format: ResponseFormat,
    tools: list[Any] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    several: bool = True,
    schema: Any = None,
    grammar: str | None = None,
    regex: str | None = None,
) -> tuple[Rules | None, bool]:
    """The rules of an answer in a conversation, None where it is free; and whether calls are looked for in it.

    Raises ValueError for a wrong choice, and as `text_rules`.
    """
    assert tokenizer is not None
    given = schema is not None or grammar is not None or regex is not None
    choice, name = _read_choice(tool_choice, tools)
    if not tools or choice == "none":
        return text_rules(tokenizer, schema, grammar, regex) if given else None, False
    if format.calls is None:
        if choice != "auto":
            raise ValueError(f"tool_choice: {choice!r} is not possible: the model's chat template knows no calls")
        return text_rules(tokenizer, schema, grammar, regex) if given else None, False
    if choice == "auto" and not given and not constraints.available():
        return None, True

    from qrun.engine.text.call_grammars import CallGrammar, read_functions

    functions = read_functions(tools)
    if name:
        functions = [function for function in functions if function.name == name]
    if given and (grammar is not None or regex is not None) and choice == "auto":
        raise ValueError("a grammar or regex and tools do not go together; a schema and tools do")
    compiler = constraints.compiler(tokenizer)
    calls = CallGrammar(format, functions, tokenizer, compiler)
    header = format.thoughts is not None and format.thoughts.header is not None
    if choice == "auto" and not given:
        compiled: dict[str, Constraint | None] = {}

        def inside(name: str) -> Constraint | None:
            if name not in compiled:
                source = calls.inside(name, several=several)
                compiled[name] = None if source is None else compiler.compile(constraints.lark_source(source), "tools")
            return compiled[name]

        inside("")
        for function in functions if header else ():
            inside(function.name)
        return Rules(calls=inside, several=several), True
    if schema is not None and choice == "auto":
        compiler.compile(constraints.schema_source(schema), "schema")  # for a fault that is its own
    source = calls.whole(several=several and not name, schema=schema if choice == "auto" else None)
    return Rules(compiler.compile(constraints.lark_source(source), "tools"), lead=not header), True


def _constraint(tokenizer: Tokenizer, schema: Any, grammar: str | None, regex: str | None) -> Constraint:
    given = {"schema": schema, "grammar": grammar, "regex": regex}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} do not go together: one says what the text must be")
    if schema is not None:
        source = constraints.schema_source(schema)
    else:
        source = constraints.regex_source(regex) if regex is not None else constraints.grammar_source(grammar or "")
    return constraints.compiler(tokenizer).compile(source, names[0])


def _read_choice(given: Any, tools: list[Any] | None) -> tuple[str, str]:
    """"auto", "none" or "required", and a function's name where one is wanted."""
    if given is None:
        return "auto", ""
    if isinstance(given, Mapping):
        function = given.get("function", given)
        name = function.get("name") if isinstance(function, Mapping) else None
        known = [_name(tool) for tool in tools or ()]
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"tool_choice: {name!r:.60} is none of the tools")
        return "required", name
    if given not in ("auto", "none", "required"):
        raise ValueError(f'tool_choice must be "auto", "none", "required" or {{"name": ...}}, not {given!r:.60}')
    if given == "required" and not tools:
        raise ValueError("tool_choice: a call is required, and there are no tools")
    return given, ""


def _name(tool: Any) -> Any:
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, Mapping) else None
