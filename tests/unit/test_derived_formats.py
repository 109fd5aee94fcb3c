"""Formats of answers that are read off from rendering, and calls for templates that know none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_response_formats import template

from qrun.engine.text.chat_template import ChatTemplate
from qrun.engine.text.generic_calls import GENERIC
from qrun.engine.text.response_formats import find_format

QUESTION = {"role": "user", "content": "Rain?"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]
CALLS = [("weather", {"city": "Oslo", "days": 2}), ("weather", {"city": "Rome"})]
JSON = '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
TURN = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<s:{{ m.role }}>{% if m.tool_calls %}CALLS"
    "{% else %}{% if m.reasoning_content %}THOUGHT{% endif %}{{ m.content }}{% endif %}<e>\n{% endfor %}"
    "{% if add_generation_prompt %}<s:assistant>{% endif %}"
)


def each(call: str, before: str = "", between: str = "", after: str = "") -> str:
    last = f"{{% if not loop.last %}}{between}{{% endif %}}" if between else ""
    return f"{before}{{% for c in m.tool_calls %}}{call}{last}{{% endfor %}}{after}"


ARGUMENTS = "{% for k, v in c.function.arguments.items() %}PAIR{% endfor %}"
# As no family of the table writes them: how calls are written, and the marks that are found.
WRITTEN: dict[str, tuple[str, tuple[str, str]]] = {
    "one pair of marks for each": (each(f"<my_call>{JSON}</my_call>"), ("<my_call>", "</my_call>")),
    "a list between marks": (each(JSON, "<|calls_on|>[", ", ", "]<|calls_off|>"), ("<|calls_on|>", "<|calls_off|>")),
    "a list after a mark": (each(JSON, "[CALLS_NOW][", ", ", "]"), ("[CALLS_NOW]", "")),
    "an empty thought before": (each(JSON, "<r></r><acts>[", ", ", "]</acts>"), ("<acts>", "</acts>")),
    "a name before its arguments": (
        each("<|fn|>{{ c.function.name }}<|args|>{{ c.function.arguments | tojson }}<|/fn|>"),
        ("<|fn|>", "<|/fn|>"),
    ),
    "a name with an id and a number": (
        each("<|one|>{{ c.id }}:{{ loop.index0 }}<|n|>{{ c.function.name }}<|a|>{{ c.function.arguments | tojson }}"
             "<|/one|>", "<|all|>", "", "<|/all|>"),
        ("<|all|>", "<|/all|>"),
    ),
    "tags of functions": (
        each("<do>\n<function={{ c.function.name }}>\n"
             + ARGUMENTS.replace("PAIR", "<parameter={{ k }}>\n{{ v }}\n</parameter>\n") + "</function>\n</do>"),
        ("<do>", "</do>"),
    ),
    "Python": (
        each("{{ c.function.name }}(" + ARGUMENTS.replace("PAIR", "{{ k }}={{ v | tojson }}"
             "{% if not loop.last %}, {% endif %}") + ")", "<|py|>[", ", ", "]<|/py|>"),
        ("<|py|>", "<|/py|>"),
    ),
}  # fmt: skip


def of_calls(calls: str) -> ChatTemplate:
    return template(TURN.replace("CALLS", calls).replace("THOUGHT", ""))


def conversation(n: int) -> list[Any]:
    calls = [
        {"id": f"abcdefgh{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(CALLS[:n])
    ]
    return [QUESTION, {"role": "assistant", "tool_calls": calls}]


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("n", [1, 2])
def test_calls_that_no_row_knows_are_read_as_the_template_shows_them(name: str, n: int) -> None:
    calls, marks = WRITTEN[name]
    chat = of_calls(calls)
    known = find_format(chat.source).calls
    assert known is None or "tags of" in name  # which a row of the table would read wrongly
    assert chat.format.calls is not None and (chat.format.calls.open, chat.format.calls.close) == marks
    prompt = chat.render([QUESTION], TOOLS)
    shown = chat.render(conversation(n), TOOLS, add_generation_prompt=False)
    assert shown.startswith(prompt)
    parser = chat.response(prompt, TOOLS)
    assert parser is not None
    for letter in shown[len(prompt) :].removesuffix("<e>\n").replace("<r></r>", ""):
        parser.push(letter)
    parser.finish()
    assert [(call.name, call.arguments) for call in parser.calls] == CALLS[:n]


@pytest.mark.parametrize(
    "calls",
    [
        each("{{ c.function.name }} with {{ c.function.arguments | tojson }}"),  # no marks at all
        each("*{{ c.function.name }}*{{ c.function.arguments | tojson }}*"),
        each("<q>{{ c.function.arguments | tojson }} for {{ c.function.name }}</q>"),
    ],
)
def test_what_is_not_understood_is_plain_content(calls: str) -> None:
    chat = of_calls(calls)
    assert chat.format.calls is None
    prompt = chat.render([QUESTION], TOOLS)
    assert chat.response(prompt, TOOLS) is None


def test_thoughts_that_no_row_knows() -> None:
    chat = template(TURN.replace("CALLS", "").replace("THOUGHT", "<ponder>\n{{ m.reasoning_content }}\n</ponder>\n\n"))
    thoughts = chat.format.thoughts
    assert thoughts is not None and (thoughts.open, thoughts.close) == ("<ponder>", "</ponder>")
    parser = chat.response(chat.render([QUESTION]))
    assert parser is not None
    split = [*parser.push("<ponder>\nWell.\n</ponder>\n\nNo."), *parser.finish()]
    assert split == [("reasoning", "Well."), ("content", "No.")]
    assert chat.render([QUESTION], think=False).endswith("<s:assistant><ponder>\n\n</ponder>\n\n")


# Templates that know no functions

CHATML = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
)


def test_functions_are_told_where_the_template_does_not() -> None:
    chat = template(CHATML)
    assert chat.format.calls is GENERIC and not chat.knows_tools
    told = chat.render([{"role": "system", "content": "Be brief."}, QUESTION], TOOLS)
    assert told.startswith("[system]Be brief.\n\n") and json.dumps(TOOLS[0]["function"]) in told
    assert "<tool_call>" in told and told.endswith("[user]Rain?\n[assistant]")
    assert "weather" in chat.render([QUESTION], TOOLS)
    assert chat.render([QUESTION]) == "[user]Rain?\n[assistant]"
    parser = chat.response(told, TOOLS)
    assert parser is not None
    parser.push('<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>')
    parser.finish()
    assert [(call.name, call.arguments) for call in parser.calls] == [("weather", {"city": "Oslo"})]


@pytest.mark.parametrize("tools", [TOOLS, None])
def test_calls_and_results_are_shown_where_the_template_does_not(tools: Any) -> None:
    talk = [*conversation(1), {"role": "tool", "tool_call_id": "abcdefgh0", "content": "sunny"}]
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
    assert template(CHATML).render(talk, tools).endswith(f"[assistant]{call}\n[tool]sunny\n[assistant]")
    result = "[user]<tool_response>\nsunny\n</tool_response>\n"  # where a tool has no place
    assert template(STRICT).render(talk, tools).endswith(f"[assistant]{call}\n{result}")


def test_functions_as_a_text_of_another_name() -> None:
    chat = template("{{ functions }}/{{ datetime | length > 9 }}/{% for m in messages %}{{ m.content }}{% endfor %}")
    assert chat.render([QUESTION], TOOLS) == f"{json.dumps([TOOLS[0]['function']])}/True/Rain?"
    assert chat.render([QUESTION]) == "[]/True/Rain?"
