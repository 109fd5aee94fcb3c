"""Grammars of calls: what they allow can be read as calls of the functions, with arguments that the functions take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest
from trained_tokenizer import trained_tokenizer

from qrun.engine.sampling import constraints
from qrun.engine.sampling.constraints import Constraint
from qrun.engine.text.call_grammars import CallGrammar, Function, read_functions, written
from qrun.engine.text.response_formats import CALLS, Calls, ResponseFormat, find_format
from qrun.engine.text.response_parser import ResponseParser

TOKENIZER = trained_tokenizer()
COMPILER = constraints.compiler(TOKENIZER)

CLOCK = {
    "type": "object",
    "properties": {
        "zone": {"type": "string", "enum": ["Europe/Rome", "UTC"]},
        "hours": {"type": "integer", "minimum": 1, "maximum": 99},
        "how": {"type": "object",
                "properties": {"marks": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
                "required": ["marks"], "additionalProperties": False},
        "exact": {"type": "boolean"},
    },
    "required": ["zone", "hours", "how"],
    "additionalProperties": False,
}  # fmt: skip
PAINT = {
    "type": "object",
    "properties": {"shade": {"$ref": "#/$defs/Shade"}, "layers": {"type": "number", "minimum": 0, "maximum": 9}},
    "required": ["shade"],
    "$defs": {"Shade": {"enum": [1, 2, 3]}},
    "additionalProperties": False,
}
REST: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
FUNCTIONS = [Function("clock", CLOCK), Function("paint", PAINT), Function("rest", REST)]
FREE = {"]<]minimax[>[<tool_call>", ""}
"""Marks of formats whose calls are free; of two with headers, that with tags."""


def format_of(calls: Calls) -> ResponseFormat:
    found = find_format(" ".join(calls.signs) + (" <|channel|>analysis" if "functions." in calls.signs else ""))
    assert found.calls is calls
    return found


def walk(constraint: Constraint, seed: int) -> Iterator[int]:
    """Tokens at random, to a text that is complete."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(constraint.n_words, np.uint32)
    while not constraint.finished:
        token = (constraint.forced() or [None])[0]
        if token is None:
            constraint.mask(mask)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[: TOKENIZER.n_vocab])
            token = int(rng.choice(allowed))
            if token in TOKENIZER.stop_ids or (constraint.complete and rng.random() < 0.5):
                return
        constraint.accept(token)
        yield token


@pytest.mark.parametrize("calls", CALLS, ids=[f"{calls.body} {calls.open} {i}" for i, calls in enumerate(CALLS)])
def test_what_is_allowed_is_read_as_calls(calls: Calls) -> None:
    format = format_of(calls)
    grammar = CallGrammar(format, FUNCTIONS, TOKENIZER, COMPILER)
    if written(calls) is None:
        assert calls.open in FREE and grammar.inside("", several=True) is None
        return
    constraint = COMPILER.compile(constraints.lark_source(grammar.whole(several=True)))
    called = set()
    for seed in range(12):
        text = TOKENIZER.decode(list(walk(constraint.copy(), seed)))
        parser = ResponseParser(format, with_calls=True)
        split = parser.push(text) + parser.finish()
        assert parser.calls and not "".join(piece for channel, piece in split if channel == "content").strip(), text
        for call in parser.calls:
            function = next(function for function in FUNCTIONS if function.name == call.name)
            jsonschema.validate(call.arguments, {"type": "object", **function.parameters})
            called.add(call.name)
    assert len(called) > 1
    one = COMPILER.compile(constraints.lark_source(grammar.whole(several=False)))
    for seed in range(4):
        parser = ResponseParser(format, with_calls=True)
        parser.push(TOKENIZER.decode(list(walk(one.copy(), seed))))
        parser.finish()
        assert len(parser.calls) == 1
    inside = grammar.inside("clock" if calls.open == "" else "", several=True)
    assert inside is not None
    COMPILER.compile(constraints.lark_source(inside))


@pytest.mark.parametrize("source", ["<tool_call> <function=", "<tool_call> <arg_key>", "<minimax:tool_call>"])
def test_texts_stand_bare_between_tags_to_the_first_that_ends_them(source: str) -> None:
    format = find_format(source)
    function = Function("say", {"type": "object", "properties": {"words": {"type": "string"}}, "required": ["words"]})
    grammar = CallGrammar(format, [function], TOKENIZER, COMPILER)
    constraint = COMPILER.compile(constraints.lark_source(grammar.whole(several=False)))
    value = "Hi <b>you</b>"
    text = {
        "function-tags": f"<tool_call>\n<function=say>\n<parameter=words>\n{value}\n</parameter>\n</function>\n"
        "</tool_call>",
        "key-value-tags": f"<tool_call>say\n<arg_key>words</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>",
        "invoke-tags": f'<minimax:tool_call>\n<invoke name="say">\n<parameter name="words">{value}</parameter>\n'
        "</invoke>\n</minimax:tool_call>",
    }[format.calls.body if format.calls else ""]
    tokens = TOKENIZER.encode_further(text)
    assert constraint.valid(tokens) == len(tokens)
    parser = ResponseParser(format, with_calls=True)
    parser.push(text)
    assert [call.arguments for call in parser.calls] == [{"words": "Hi <b>you</b>"}]


def test_functions_are_read_as_interfaces_describe_them() -> None:
    schema = {"type": "object"}
    read = read_functions([
        {"type": "function", "function": {"name": "a", "parameters": schema, "strict": True}},
        {"type": "function", "name": "b", "parameters": schema},
        {"name": "c", "input_schema": schema},
        {"function": {"name": "d"}},
    ])  # fmt: skip
    assert [(one.name, one.parameters, one.is_strict) for one in read] == [
        ("a", schema, True), ("b", schema, False), ("c", schema, False), ("d", {}, False)
    ]  # fmt: skip
