"""Published chat templates, which are not part of the project: QRUN_TEST_TEMPLATES names a folder of them (`*.jinja`).

What a template writes for an answer has to be read back from it, by the table of formats and by what is derived from
rendering alone, and no conversation may end in an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qrun.engine.text.chat_template import ChatTemplate
from qrun.engine.text.derived_formats import derive_calls, derive_thoughts
from qrun.engine.text.generic_calls import GENERIC
from qrun.engine.text.response_formats import ResponseFormat, find_format
from qrun.engine.text.response_parser import ResponseParser
from qrun.engine.text.template_fitting import PROBE_TOOLS, Fitting

FOLDER = os.environ.get("QRUN_TEST_TEMPLATES", "")
TEMPLATES = sorted(Path(FOLDER).glob("*.jinja")) if FOLDER else []

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Which one."},
                    "days": {"type": "integer", "description": "How many."},
                },
                "required": ["city"],
            },
        },
    }
]
TOOLS.append({"type": "function", "function": TOOLS[0]["function"] | {"name": "clock"}})  # type: ignore[operator]
CALLS: list[tuple[str, dict[str, Any]]] = [("weather", {"city": "Oslo", "days": 3}), ("clock", {"city": "Rome"})]
END = re.compile(r"<[^<>\s]+>")  # a token at which the model has ended

pytestmark = pytest.mark.skipif(not TEMPLATES, reason="QRUN_TEST_TEMPLATES names no folder of templates")


class Tokenizer:
    bos_id, eos_id = 1, 2

    def has_piece(self, piece: str) -> bool:
        return False

    def decode(self, ids: Sequence[int]) -> str:
        return "".join({1: "<s>", 2: "</s>"}[id] for id in ids)


@pytest.fixture(params=TEMPLATES, ids=lambda path: path.stem)
def chat(request: pytest.FixtureRequest) -> ChatTemplate:
    return ChatTemplate(request.param.read_text("utf-8"), Tokenizer())  # type: ignore[arg-type]


def fitting_of(chat: ChatTemplate, tools: list[Any] | None) -> Fitting:
    chat._probe_seconds = 60
    return chat._asking(tools, {})


def test_conversations_are_no_errors(chat: ChatTemplate) -> None:
    system = {"role": "system", "content": "Be brief-zq."}
    question, answer = {"role": "user", "content": "Why-zq?"}, {"role": "assistant", "content": "Because-zq."}
    for talk in ([question], [system, question], [system, question, answer, question], [question, system, question]):
        text = chat.render(talk)
        assert all(message["content"] in text for message in talk if message is not answer)
    for n in (1, 2):
        calls = [
            {"id": f"call0000{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for i, (name, arguments) in enumerate(CALLS[:n])
        ]
        results = [{"role": "tool", "tool_call_id": call["id"], "content": f"sunny{call['id']}"} for call in calls]
        called = {"role": "assistant", "content": None, "tool_calls": calls}
        try:
            text = chat.render([question, called, *results], TOOLS)
        except ValueError as error:
            assert n == 2 and "single tool" in str(error)  # which is the template's own wish
            continue
        assert all(f"sunny{call['id']}" in text for call in calls)
        assert "Oslo" in text
        assert "weather" in chat.render([question], TOOLS)


def test_what_a_template_writes_is_read_back(chat: ChatTemplate) -> None:
    fitting = fitting_of(chat, PROBE_TOOLS)
    table = find_format(chat.source)
    derived = ResponseFormat(None, derive_calls(fitting))
    formats = [one for one in (table, derived, chat.format) if one.calls is not None and one.calls is not GENERIC]
    for n in (1, 2):
        shown = fitting.shown_calls(CALLS[:n])
        if shown is None:
            continue
        for format in formats:
            assert read(format, shown, n) == CALLS[:n]
    if table.calls is not None and derived.calls is not None:
        assert (table.calls.open.strip(), table.calls.body) == (derived.calls.open, derived.calls.body)
    thoughts = derive_thoughts(fitting_of(chat, None))
    if table.thoughts is not None and thoughts is not None:
        assert (table.thoughts.open, table.thoughts.close) == (thoughts.open, thoughts.close)


def read(format: ResponseFormat, shown: str, n: int) -> list[tuple[str, dict[str, Any]]]:
    """The calls that are read from this, whether or not a thought has been ended before."""
    found: list[tuple[str, dict[str, Any]]] = []
    for thought in (False, True):
        parser = ResponseParser(format, with_calls=True, thought=thought)
        split = [*parser.push(shown), *parser.finish()]
        rest = "".join(text for channel, text in split if channel != "tool_call")
        if len(parser.calls) >= len(found) and not END.sub("", rest).strip():
            found = [(call.name, call.arguments) for call in parser.calls]
    return found
