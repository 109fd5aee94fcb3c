"""All spellings of what an answer has to look like."""

from __future__ import annotations

from typing import Any

import pytest

from qrun.server.errors import APIError
from qrun.server.structure import structure, tool_choice

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (None, {}), ({}, {}), ({"type": "text"}, {}),
        ({"type": "json_schema", "json_schema": {"name": "n", "strict": "true", "schema": SCHEMA}}, {"schema": SCHEMA}),
        ({"type": "json_schema", "schema": SCHEMA}, {"schema": SCHEMA}),
        ({"type": "json_object", "schema": SCHEMA}, {"schema": SCHEMA}),
        ({"type": "json_object"}, {"schema": {"type": "object"}}),
        ({"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}, {"schema": SCHEMA}),
    ],
)  # fmt: skip
def test_openai(form: Any, expected: Any) -> None:
    assert structure({}, form) == expected


@pytest.mark.parametrize(
    ("form", "expected"), [("json", {"schema": {"type": "object"}}), (SCHEMA, {"schema": SCHEMA}), ("", {})]
)
def test_ollama(form: Any, expected: Any) -> None:
    assert structure({}, form, "format") == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"json_schema": SCHEMA}, {"schema": SCHEMA}),
        ({"json_schema": '{"type": "null"}'}, {"schema": {"type": "null"}}),
        ({"grammar": "root ::= x"}, {"grammar": "root ::= x"}), ({"guided_json": SCHEMA}, {"schema": SCHEMA}),
        ({"guided_regex": "a+"}, {"regex": "a+"}), ({"guided_choice": ["a.b", "c"]}, {"regex": r"a\.b|c"}),
        ({"structured_outputs": {"choice": ["x"]}}, {"regex": "x"}),
        ({"structured_outputs": {"json": SCHEMA}}, {"schema": SCHEMA}),
        ({"structured_outputs": {"json_object": True}}, {"schema": {"type": "object"}}),
        ({"grammar": "", "json_schema": None, "structured_outputs": {}}, {}),
    ],
)  # fmt: skip
def test_llama_server_and_vllm(body: Any, expected: Any) -> None:
    assert structure(body) == expected


@pytest.mark.parametrize(
    ("body", "form"),
    [
        ({"json_schema": "{"}, None), ({"json_schema": 3}, None), ({"grammar": 3}, None),
        ({"guided_choice": "x"}, None),
        ({"structured_outputs": {"structural_tag": "x"}}, None), ({"structural_tag": "x"}, None),
        ({"grammar": "x", "json_schema": {}}, None), ({"grammar": "x"}, {"type": "json_object"}),
        ({}, {"type": "json_schema"}), ({}, {"type": "json_schema", "json_schema": {"schema": 3}}),
        ({}, {"type": "xml"}), ({}, 3),
    ],
)  # fmt: skip
def test_what_is_wrong(body: Any, form: Any) -> None:
    with pytest.raises(APIError) as caught:
        structure(body, form)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("choice", "names", "expected"),
    [
        (None, "fg", {}), ("auto", "fg", {}), ("none", "", {}), ("required", "fg", {"tool_choice": "required"}),
        ({"type": "any"}, "fg", {"tool_choice": "required"}), ({"type": "auto"}, "fg", {}),
        ({"type": "function", "function": {"name": "g"}}, "fg", {"tool_choice": {"name": "g"}}),
        ({"type": "function", "name": "g"}, "fg", {"tool_choice": {"name": "g"}}),
        ({"type": "tool", "name": "f"}, "fg", {"tool_choice": {"name": "f"}}),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]}, "g",
         {"tool_choice": "required"}),
    ],
)  # fmt: skip
def test_choices(choice: Any, names: str, expected: Any) -> None:
    tools, arguments = tool_choice(choice, TOOLS)
    assert ([tool["function"]["name"] for tool in tools], arguments) == (list(names), expected)
    _, arguments = tool_choice(choice, TOOLS, parallel=False)
    assert arguments == expected | ({"parallel_tool_calls": False} if names else {})


@pytest.mark.parametrize("choice", [3, "sometimes", {"type": "function", "name": "h"}, {"type": "function"}])
def test_choices_that_are_wrong(choice: Any) -> None:
    with pytest.raises(APIError):
        tool_choice(choice, TOOLS)
