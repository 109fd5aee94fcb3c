"""Marks of thoughts and calls: which template has which, and that the table agrees with what templates do."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import pytest

from qrun.engine.text.chat_template import ChatTemplate, ChatTemplateError
from qrun.engine.text.response_formats import CALLS, THOUGHTS, ResponseFormat, find_format
from qrun.engine.text.response_parser import ResponseParser
from qrun.engine.text.tool_calls import ToolCall

BAR, BLANK = "\uff5c", "\u2581"  # as DeepSeek writes them
TOOL = f"<{BAR}tool{BLANK}"
QUESTION = [{"role": "user", "content": "Why?"}]
THOUGHT, ANSWER = "I wonder.\nWell.", "Because."


class Tokenizer:
    bos_id, eos_id = 1, 2

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def has_piece(self, piece: str) -> bool:
        return piece in self.pieces

    def decode(self, ids: Sequence[int]) -> str:
        return "".join({1: "<s>", 2: "</s>"}[id] for id in ids)


def template(source: str, *pieces: str) -> ChatTemplate:
    return ChatTemplate(source, Tokenizer(*pieces))  # type: ignore[arg-type]


def chatml(answer: str, prompt: str) -> str:
    """A template that shows past answers and ends the prompt so; {R} stands for the thought and {A} for the answer."""
    shown = answer.replace("{R}", "{{ m.reasoning_content }}").replace("{A}", "{{ m.content }}")
    return (
        "{% for m in messages %}{% if m.role == 'assistant' and m.reasoning_content %}<|im_start|>assistant\n"
        + shown + "<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}<|im_start|>assistant\n" + prompt + "{% endif %}"
    )  # fmt: skip


SWITCHED = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
OPEN_OR_NOT = (
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
)
FLASH = "{% if enable_thinking is defined and not enable_thinking %}</think>{% else %}<think>{% endif %}"
OFF_BY_DEFAULT = "{% if thinking is defined and thinking %}<think>{% else %}<think></think>{% endif %}"
EFFORT = (
    "{% if reasoning_effort is defined and reasoning_effort == 'none' %}<|START_THINKING|><|END_THINKING|>"
    "{% else %}<|START_THINKING|>{% endif %}"
)

# As the families' own templates write an answer: name -> how one with a thought is shown, the end of the prompt, and
# the ends of the prompts with thinking on and off.
FAMILIES = {
    "qwen3": ("<think>\n{R}\n</think>\n\n{A}", SWITCHED, "", "<think>\n\n</think>\n\n"),
    "qwen3.5": ("<think>\n{R}\n</think>\n\n{A}", OPEN_OR_NOT, "<think>\n", "<think>\n\n</think>\n\n"),
    "glm-4.7": ("<think>{R}</think>{A}", FLASH, "<think>", "</think>"),
    "deepseek-v3.1": ("<think>{R}</think>{A}", OFF_BY_DEFAULT, "<think>", "<think></think>"),
    "minimax-m2, no switch": ("<think>\n{R}\n</think>\n\n{A}", "<think>\n", "<think>\n", "<think>\n\n</think>\n\n"),
    "lfm2.5, no switch and not begun": ("<think>{R}</think>{A}", "", "<think>", "<think></think>"),
    "seed": ("<seed:think>{R}</seed:think>\n{A}", "", "<seed:think>", "<seed:think></seed:think>\n"),
    "mistral": ("[THINK]{R}[/THINK]{A}", "", "[THINK]", "[THINK][/THINK]"),
    "minimax-m3": ("<mm:think>{R}</mm:think>{A}", "", "<mm:think>", "<mm:think></mm:think>"),
    "kimi-vl": ("◁think▷\n{R}\n◁/think▷\n{A}", "", "◁think▷\n", "◁think▷\n\n◁/think▷\n"),
    "gemma4": ("<|channel>thought\n{R}\n<channel|>{A}", "", "<|channel>thought\n", "<|channel>thought\n\n<channel|>"),
    "apriel": (
        "Here are my reasoning steps:\n{R}\n[BEGIN FINAL RESPONSE]\n{A}", "Here are my reasoning steps:\n",
        "Here are my reasoning steps:\n", "Here are my reasoning steps:\n\n[BEGIN FINAL RESPONSE]\n",
    ),
    "command": (
        "<|START_THINKING|>{R}<|END_THINKING|><|START_TEXT|>{A}<|END_TEXT|>", EFFORT,
        "<|START_THINKING|>", "<|START_THINKING|><|END_THINKING|>",
    ),
    "kimi-k3": (
        "<|open|>think<|sep|>{R}<|close|>think<|sep|><|open|>response<|sep|>{A}<|close|>response<|sep|>", "",
        "<|open|>think<|sep|>", "<|open|>think<|sep|><|close|>think<|sep|><|open|>response<|sep|>",
    ),
    "gpt-oss": (
        "<|channel|>analysis<|message|>{R}<|end|><|start|>assistant<|channel|>final<|message|>{A}", "", "",
        "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    "muse": (
        " to=self<|message|>{R}<|eom|><|start|>assistant to=user<|message|>{A}", "", "",
        " to=self<|message|><|eom|><|start|>assistant to=user<|message|>",
    ),
    "solar": (
        "<|think|>{R}<|end|><|begin|>assistant<|content|>{A}", "", "<|think|>",
        "<|think|><|end|><|begin|>assistant<|content|>",
    ),
}  # fmt: skip


def split(parser: ResponseParser | None, text: str, size: int = 1) -> dict[str, str]:
    assert parser is not None
    texts: dict[str, str] = {}
    for start in range(0, len(text), size):
        for channel, part in parser.push(text[start : start + size]):
            texts[channel] = texts.get(channel, "") + part
    for channel, part in parser.finish():
        texts[channel] = texts.get(channel, "") + part
    return texts


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_template_shows_is_what_the_table_says(family: str) -> None:
    """Rendered with a thought and an answer, and read back from where each of its prompts ends."""
    answer, prompt, _, _ = FAMILIES[family]
    chat = template(chatml(answer, prompt))
    said = {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT}
    shown = chat.render([*QUESTION, said], add_generation_prompt=False).removesuffix("<|im_end|>\n")
    for think in (None, True, False):
        begun = chat.render(QUESTION, think=think)
        rest = shown[len(begun) :] if shown.startswith(begun) else None
        if rest is not None:
            for size in (1, 2, 3, 5, 1000):
                assert split(chat.response(begun), rest, size) == {"reasoning": THOUGHT, "content": ANSWER}
        else:  # the prompt has ended the thought
            assert think is not True
            assert split(chat.response(begun), ANSWER) == {"content": ANSWER}


@pytest.mark.parametrize("family", FAMILIES)
def test_thinking_is_switched_by_the_template_or_by_an_empty_thought(family: str) -> None:
    answer, prompt, on, off = FAMILIES[family]
    chat = template(chatml(answer, prompt))
    start = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.render(QUESTION, think=True) == start + on
    assert chat.render(QUESTION, think=False) == start + off
    response = chat.response(chat.render(QUESTION, think=False))
    assert response is not None
    assert (response.channel, split(response, "Yes.")) == ("content", {"content": "Yes."})


@pytest.mark.parametrize("family", FAMILIES)
def test_what_ends_a_thought_leads_over_to_the_answer(family: str) -> None:
    answer, prompt, _, _ = FAMILIES[family]
    chat = template(chatml(answer, prompt))
    begun = chat.render(QUESTION, think=True)
    response = chat.response(begun)
    assert response is not None
    opening = "" if response.channel == "reasoning" else answer.partition("{R}")[0]
    assert split(response, opening + THOUGHT + response.closing + ANSWER) == {"reasoning": THOUGHT, "content": ANSWER}


def test_a_switch_that_the_caller_sets_stays() -> None:
    chat = template(chatml("<think>\n{R}\n</think>\n\n{A}", OPEN_OR_NOT))
    assert chat.render(QUESTION, think=True, enable_thinking=False).endswith("</think>\n\n")


def test_templates_without_thoughts() -> None:
    chat = template(chatml("{A}", ""))
    prompt = chat.render(QUESTION)
    assert chat.render(QUESTION, think=False) == prompt
    assert chat.response(prompt) is None
    with pytest.raises(ChatTemplateError, match="does not think"):
        chat.render(QUESTION, think=True)


def test_a_vocabulary_tells_where_the_template_does_not() -> None:
    chat = template(chatml("{A}", ""), "<think>", "</think>")
    assert split(chat.response(chat.render(QUESTION)), "<think>Hm.</think>Yes.") == {
        "reasoning": "Hm.",
        "content": "Yes.",
    }
    assert find_format("no marks", lambda piece: piece == "<think>").thoughts is None


def test_every_row_can_be_reached() -> None:
    """None is hidden behind one before it."""
    for i, row in enumerate(THOUGHTS):
        assert find_format(" ".join(row.signs)).thoughts is row, row
        assert all(not set(other.signs) <= set(row.signs) for other in THOUGHTS[:i])
    for calls in CALLS:
        assert find_format(" ".join(calls.signs)).calls is calls, calls


# Splitting


def think(text: str, size: int = 1, **options: Any) -> dict[str, str]:
    return split(ResponseParser(find_format("<think></think>"), **options), text, size)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("plain", {"content": "plain"}),
        ("\n plain \n", {"content": "\n plain \n"}),
        ("", {}),
        ("<think>never ends", {"reasoning": "never ends"}),
        ("<think>a < b </thin b</think>c", {"reasoning": "a < b </thin b", "content": "c"}),
        ("\n<think>\n\n</think>\n\nc", {"content": "c"}),
        ("<think>a</think>", {"reasoning": "a"}),
        ("In <think>x</think> tags", {"content": "In <think>x</think> tags"}),
        ("<think>a</think>b</think>c<think>d", {"reasoning": "a", "content": "b</think>c<think>d"}),
        ("<think>a <think> b</think>c", {"reasoning": "a <think> b", "content": "c"}),
        ("<think>a</think><think>b</think>c", {"reasoning": "ab", "content": "c"}),
        ("</think>\n\nc", {"content": "c"}),
        ("<thin", {"content": "<thin"}),
        ("<think>a</thi", {"reasoning": "a</thi"}),
        ("  code", {"content": "  code"}),
    ],
)
def test_thoughts_stand_at_the_start(text: str, texts: dict[str, str], size: int) -> None:
    assert think(text, size) == texts


def test_a_thought_that_the_prompt_began() -> None:
    assert think("\na\n</think>\n\n    b", thinking=True) == {"reasoning": "a", "content": "b"}
    assert think("\n\nb", thought=True) == {"content": "b"}
    assert think("<think>a</think>b", thought=True) == {"reasoning": "a", "content": "b"}


def test_what_is_known_is_given_out_at_once() -> None:
    parser = ResponseParser(find_format("<think></think>"))
    assert parser.push("<thi") == []
    assert (parser.push("nk>One two "), parser.channel) == ([("reasoning", "One two")], "reasoning")
    assert parser.push("three <") == [("reasoning", " three")]
    assert parser.push("4") == [("reasoning", " <4")]
    assert parser.push(" </think> Yes ") == [("content", "Yes ")]
    assert parser.push("<think> no") == [("content", "<think> no")]


HARMONY = find_format("<|channel|>analysis functions. <|channel|>commentary")


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("<|channel|>final<|message|>Yes.", {"content": "Yes."}),
        ("<|channel|>analysis<|message|>Hm", {"reasoning": "Hm"}),
        ("<|channel|>commentary<|message|>First.<|end|><|start|>assistant<|channel|>final<|message|> Second.",
         {"content": "First.Second."}),
        ("No header at all.", {"content": "No header at all."}),
        ("<|channel|>final", {}),
        ("<|channel|>fi" + "x" * 300, {"content": "<|channel|>fi" + "x" * 300}),
    ],
)  # fmt: skip
def test_messages_with_headers(text: str, texts: dict[str, str], size: int) -> None:
    assert split(ResponseParser(HARMONY), text, size) == texts


# Calls

JSON_CALL = '{"name": "f", "arguments": {"k": "v", "n": 3}}'
ONE = [ToolCall("f", {"k": "v", "n": 3})]
INVOKE = '<invoke name="f"><parameter name="k">v</parameter><parameter name="n">3</parameter></invoke>'
BAD = ("", "{", "3 4", "[1]", '{"name": 3}', '{"name": "f", "arguments": "x"}', "call:f{", "f(*a)", "f(", "\0", "[[[")

WRITTEN = {
    "<tool_call>": f"<tool_call>\n{JSON_CALL}\n</tool_call>",
    "<tool_call> <function=":
        "<tool_call>\n<function=f>\n<parameter=k>\nv\n</parameter>\n<parameter=n>\n3\n</parameter>\n</function>\n"
        "</tool_call>",
    "<tool_call> <arg_key>":
        "<tool_call>f\n<arg_key>k</arg_key>\n<arg_value>v</arg_value><arg_key>n</arg_key><arg_value>3</arg_value>"
        "</tool_call>",
    "[TOOL_CALLS]": f"[TOOL_CALLS][{JSON_CALL}]",
    "[TOOL_CALLS] [ARGS]": '[TOOL_CALLS]f[ARGS]{"k": "v", "n": 3}',
    "<|tool_call_start|>": '<|tool_call_start|>[f(k="v", n=3)]<|tool_call_end|>',
    "<minimax:tool_call>": f"<minimax:tool_call>\n{INVOKE}\n</minimax:tool_call>",
    "]<]minimax[>[":
        ']<]minimax[>[<tool_call>\n]<]minimax[>[<invoke name="f">]<]minimax[>[<k>v]<]minimax[>[</k>]<]minimax[>[<n>3'
        "]<]minimax[>[</n>]<]minimax[>[</invoke>]<]minimax[>[</tool_call>",
    "<|tool_call> <tool_call|>": '<|tool_call>call:f{k:<|"|>v<|"|>,n:3}<tool_call|>',
    "<start_function_call>": "<start_function_call>call:f{k:<escape>v<escape>,n:3}<end_function_call>",
    "<|tool_call|>": f"<|tool_call|>[{JSON_CALL}]",
    "<|START_ACTION|>":
        '<|START_ACTION|>[{"tool_name": "f", "parameters": {"k": "v", "n": 3}}]<|END_ACTION|>',
    "<|tools_prefix|>": '<|tools_prefix|>[{"f": {"k": "v", "n": 3}}]<|tools_suffix|>',
    "<TOOLCALL>": f"<TOOLCALL>[{JSON_CALL}]</TOOLCALL>",
    "<|function_call|>": f"<|function_call|>{JSON_CALL}",
    "<function= </function>": '<function=f>{"k": "v", "n": 3}</function>',
    '"parameters": dictionary of argument name': '{"name": "f", "parameters": {"k": "v", "n": 3}}',
    "<function name=": '<function name="f"><param name="k">v</param><param name="n">3</param></function>',
    f"{TOOL}calls{BLANK} ```json":
        f"{TOOL}calls{BLANK}begin{BAR}>{TOOL}call{BLANK}begin{BAR}>function{TOOL}sep{BAR}>f\n"
        f'```json\n{{"k": "v", "n": 3}}\n```{TOOL}call{BLANK}end{BAR}>{TOOL}calls{BLANK}end{BAR}>',
    f"{TOOL}calls{BLANK}":
        f"{TOOL}calls{BLANK}begin{BAR}>{TOOL}call{BLANK}begin{BAR}>f{TOOL}sep{BAR}>"
        f'{{"k": "v", "n": 3}}{TOOL}call{BLANK}end{BAR}>{TOOL}calls{BLANK}end{BAR}>',
    f"{BAR}DSML{BAR}":
        f'<{BAR}DSML{BAR}function_calls>\n<{BAR}DSML{BAR}invoke name="f">\n<{BAR}DSML{BAR}parameter name="k" '
        f'string="true">v</{BAR}DSML{BAR}parameter>\n<{BAR}DSML{BAR}parameter name="n" string="false">3'
        f"</{BAR}DSML{BAR}parameter>\n</{BAR}DSML{BAR}invoke>\n</{BAR}DSML{BAR}function_calls>",
}  # fmt: skip


@pytest.mark.parametrize("signs", WRITTEN)
@pytest.mark.parametrize("size", [1, 4, 1000])
def test_calls_are_read(signs: str, size: int) -> None:
    parser = ResponseParser(find_format(signs), with_calls=True)
    assert split(parser, WRITTEN[signs], size) == {"tool_call": WRITTEN[signs]}
    assert parser.calls == ONE
    if "{" not in find_format(signs).calls.open:  # type: ignore[union-attr]
        parser = ResponseParser(find_format(signs), with_calls=True)
        texts = split(parser, "I look.\n" + WRITTEN[signs], size)
        assert texts == {"content": "I look.\n", "tool_call": WRITTEN[signs]}
        assert parser.calls == ONE


@pytest.mark.parametrize("signs", WRITTEN)
@pytest.mark.parametrize("body", BAD)
def test_a_call_that_cannot_be_read_is_part_of_the_answer(signs: str, body: str) -> None:
    calls = find_format(signs).calls
    assert calls is not None
    text = (calls.open if calls.open != "{" else "{ ") + body + calls.close
    parser = ResponseParser(find_format(signs), with_calls=True)
    assert (split(parser, text), parser.calls) == ({"content": text}, [])


def test_calls_without_tools_are_text() -> None:
    text = f"<tool_call>{JSON_CALL}</tool_call>"
    assert split(ResponseParser(find_format("<tool_call>")), text) == {"content": text}


def test_a_call_after_a_thought_and_a_thought_after_a_call() -> None:
    parser = ResponseParser(find_format("<think></think><tool_call>"), with_calls=True, thinking=True)
    call = f"<tool_call>{JSON_CALL}</tool_call>"
    texts = split(parser, f"Hm.</think>\n\n{call}\n<think>So.</think>Done. {call}")
    assert texts == {"reasoning": "Hm.So.", "tool_call": call * 2, "content": "Done. "}
    assert parser.calls == ONE * 2


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_call_of_special_tokens_ends_a_thought_that_was_left_open(size: int) -> None:
    format = find_format("<think></think><|tool_call_start|>")
    call = '<|tool_call_start|>[f(k="v", n=3)]<|tool_call_end|>'
    parser = ResponseParser(format, with_calls=True, thinking=True)
    assert split(parser, f"Hm. {call}Done.", size) == {"reasoning": "Hm.", "tool_call": call, "content": "Done."}
    assert parser.calls == ONE
    parser = ResponseParser(format, with_calls=True, thinking=True)
    assert split(parser, "Hm. <|tool_call_start|>no<|tool_call_end|> So.</think>Yes.", size) == {
        "reasoning": "Hm. <|tool_call_start|>no<|tool_call_end|> So.",
        "content": "Yes.",
    }
    parser = ResponseParser(find_format("<think></think><tool_call>"), with_calls=True, thinking=True)
    text = f"I may write <tool_call>{JSON_CALL}</tool_call>"
    assert split(parser, text, size) == {"reasoning": text}


def test_a_call_is_addressed_by_a_header() -> None:
    parser = ResponseParser(HARMONY, with_calls=True)
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        '<|constrain|>json<|message|>{"k": "v", "n": 3}'
    )
    assert split(parser, text) == {"reasoning": "Hm.", "tool_call": '{"k": "v", "n": 3}'}
    assert parser.calls == ONE


QUOTING = {
    "<tool_call>": '<tool_call>{"name": "f", "arguments": {"k": "a </tool_call> \\" b", "n": 3}}</tool_call>',
    "[TOOL_CALLS] [ARGS]": '[TOOL_CALLS]f[ARGS]{"k": "a [TOOL_CALLS]g[ARGS] \\" b", "n": 3}',
    "<|tool_call_start|>": """<|tool_call_start|>[f(k='a <|tool_call_end|> " b', n=3)]<|tool_call_end|>""",
    "<|tool_call> <tool_call|>": '<|tool_call>call:f{k:<|"|>a <tool_call|> " b<|"|>,n:3}<tool_call|>',
}  # fmt: skip


@pytest.mark.parametrize("signs", QUOTING)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_mark_in_the_text_of_an_argument_is_text(signs: str, size: int) -> None:
    format = find_format(signs)
    assert format.calls is not None
    parser = ResponseParser(format, with_calls=True)
    assert split(parser, QUOTING[signs] + ("Done." if format.calls.close else ""), size)["tool_call"] == QUOTING[signs]
    (found,) = parser.calls
    mark = "[TOOL_CALLS]g[ARGS]" if "ARGS" in signs else format.calls.close
    assert found.name == "f" and found.arguments == {"k": f'a {mark} " b', "n": 3}


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_mark_that_ends_a_thought_is_text_there_too(size: int) -> None:
    parser = ResponseParser(HARMONY, with_calls=True)
    head = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
    split(parser, head + '{"k": "a <|end|> <|call|> b"}<|call|>', size)
    assert parser.calls == [ToolCall("f", {"k": "a <|end|> <|call|> b"})]


@pytest.mark.parametrize("size", [1, 1000])
def test_a_text_that_never_ends_holds_back_no_more_than_its_call(size: int) -> None:
    parser = ResponseParser(find_format("<tool_call>"), with_calls=True)
    bad = '<tool_call>{"name": "f", "arguments": {"k": "v}}</tool_call>'
    good = f"<tool_call>{JSON_CALL}</tool_call>"
    assert split(parser, f"{bad} And: {good} Done.", size) == {
        "content": f"{bad} And: Done.", "tool_call": good
    }  # fmt: skip
    assert parser.calls == ONE


def test_what_the_reader_has_is_not_told_again() -> None:
    parser = ResponseParser(find_format("<think></think><tool_call>"), with_calls=True, thought=True)
    parser.begin("Yes <")
    assert split(parser, " 3 is true.") == {"content": " 3 is true."}
    parser = ResponseParser(find_format("<think></think><tool_call>"), with_calls=True)
    parser.begin(f"I look. <tool_call>{JSON_CALL[:9]}")
    assert split(parser, f"{JSON_CALL[9:]}</tool_call>") == {"tool_call": f"<tool_call>{JSON_CALL}</tool_call>"}
    assert parser.calls == ONE
    parser = ResponseParser(find_format("<think></think>"))
    parser.begin("<think>\nI was")
    assert split(parser, " here.</think>\n\nSo.") == {"reasoning": " here.", "content": "So."}


def test_several_calls_and_their_ids() -> None:
    parser = ResponseParser(find_format("[TOOL_CALLS] [CALL_ID]"), with_calls=True)
    split(parser, '[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{"k": "v", "n": 3}[TOOL_CALLS]g[ARGS]{}')
    assert parser.calls == [ToolCall("f", {"k": "v", "n": 3}, "abc123def"), ToolCall("g")]
    section = (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_call_begin|>functions.g:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"
    )
    parser = ResponseParser(find_format("<|tool_calls_section_begin|>"), with_calls=True)
    split(parser, section)
    assert parser.calls == [ToolCall("f", id="functions.f:0"), ToolCall("g", id="functions.g:1")]


def test_marks_are_all_that_must_be_seen() -> None:
    parser = ResponseParser(find_format("[THINK] [TOOL_CALLS] [CALL_ID]"), with_calls=True)
    assert {"[THINK]", "[/THINK]", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"} <= set(parser.marks)
    assert {"<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>"} <= set(
        re.findall(r"<\|\w+\|>", " ".join(ResponseParser(HARMONY, with_calls=True).marks))
    )


def test_a_schema_tells_texts_from_numbers() -> None:
    """Where the format has no quotes."""
    types = {"k": "string", "n": "integer"}
    properties = {key: {"type": type} for key, type in types.items()}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}]
    for signs in ("<tool_call> <function=", "<tool_call> <arg_key>", "<minimax:tool_call>", "]<]minimax[>["):
        text = WRITTEN[signs].replace("v", "12").replace("12alue", "value").replace("in12oke", "invoke")
        chat = template("{{ messages[0].content }}{# " + signs + " #}")
        for given, value in ((tools, "12"), ([{"name": "f"}, {"parameters": 3}, {"function": []}], 12)):
            parser = chat.response("", given)
            assert parser is not None
            split(parser, text)
            assert parser.calls == [ToolCall("f", {"k": value, "n": 3})]


@pytest.mark.parametrize("seed", range(20))
def test_nothing_that_is_written_is_an_error_and_pieces_make_no_difference(seed: int) -> None:
    """Texts of marks, broken marks and other things, in any order, for every row of the tables."""
    chance = random.Random(seed)
    words = [*'[{} \n\0é"<|', "text", " to=", "functions.f ", "final", JSON_CALL, INVOKE, "call:f{k:3}", "f[ARGS]{}"]
    for format in (ResponseFormat(thoughts, chance.choice(CALLS)) for thoughts in THOUGHTS):
        marks = list(ResponseParser(format, with_calls=True).marks)
        for _ in range(10):
            options = {"thinking": chance.random() < 0.3, "with_calls": chance.random() < 0.7}
            text = "".join(chance.choice(chance.choice((marks, words))) for _ in range(chance.randint(0, 9)))
            text = text[: len(text) - chance.randint(0, 3)]
            whole, pieces = (ResponseParser(format, **options) for _ in range(2))
            assert split(whole, text, 10**6) == split(pieces, text, chance.randint(1, 4)), (format, text)
            assert whole.calls == pieces.calls
