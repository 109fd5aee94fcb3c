"""Where a grammar begins and ends: after thoughts, within calls, and what becomes of tokens that run over a mark."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from engine_fakes import FakeRuntime
from trained_tokenizer import END, trained_tokenizer

from qrun.engine.generation.answer_rules import chat_rules
from qrun.engine.generation.generation import Generation
from qrun.engine.generation.session import Host, Session
from qrun.engine.sampling.constraints import Constraint
from qrun.engine.sampling.options import SamplingOptions
from qrun.engine.sampling.sampler import Sampler
from qrun.engine.text.response_formats import ResponseFormat, find_format
from qrun.engine.text.response_parser import ResponseParser

TOKENIZER = trained_tokenizer()
PROMPT = TOKENIZER.encode("Say:")
THINKING = find_format("<think></think>")
HERMES = find_format("<think></think><tool_call>")
HARMONY = find_format("<|channel|>analysis functions. <|channel|>commentary")
FINAL = "<|start|>assistant<|channel|>final<|message|>"
SCHEMA = {
    "type": "object", "properties": {"answer": {"enum": ["yes", "no"]}}, "required": ["answer"],
    "additionalProperties": False,
}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "look_up", "parameters": {
        "type": "object",
        "properties": {"word": {"enum": ["cat", "dog"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["word", "n"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "wait", "parameters": {
        "type": "object", "additionalProperties": False}}},
]  # fmt: skip


def saying(text: str | list[int]) -> Callable[[list[int]], int]:
    """A rule: the model would say this text, and goes on in it after whatever it was made to say."""
    script = text if isinstance(text, list) else encode(text)
    return lambda held: script[len(held) - len(PROMPT)] if len(held) - len(PROMPT) < len(script) else END


def encode(text: str) -> list[int]:
    return TOKENIZER.encode_further(text, parse_special=True)


def answer(
    rule: Callable[[list[int]], int],
    format: ResponseFormat = THINKING,
    *,
    thinking: bool = False,
    thought: bool = False,
    options: dict[str, Any] | None = None,
    **asked: Any,
) -> Generation:
    rules, with_calls = chat_rules(TOKENIZER, format, **asked)
    closing = "<|end|>" + FINAL if format is HARMONY else "\n</think>\n\n"
    response = ResponseParser(format, thinking=thinking, thought=thought, with_calls=with_calls, closing=closing)
    runtime: Any = FakeRuntime(rule, n_vocab=TOKENIZER.n_vocab, batch=64)
    session = Session(Host(runtime, TOKENIZER, SamplingOptions(temperature=0, max_tokens=120), lambda: "model"))
    generation = session.generate(PROMPT, response=response, rules=rules, **(options or {}))
    for _ in generation:
        pass
    return generation


@pytest.mark.parametrize(
    "wanted",
    ['{"answer":"no"}', "Sure: yes", "<think>\nIs it {so}?\n</think>\n\nno", '<think>\n</think>{"answer":"no"}'],
)
def test_the_likeliest_token_is_asked_about_first_to_the_same_text(
    wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[int] = []
    mask = Constraint.mask
    monkeypatch.setattr(Constraint, "mask", lambda self, out: (masks.append(1), mask(self, out))[1])
    options = {"ignore_eos": True}
    found = answer(saying(wanted), schema=SCHEMA, options=options)
    asked = len(masks)
    monkeypatch.setattr(Sampler, "greedy", False)
    expected = answer(saying(wanted), schema=SCHEMA, options=options)
    assert (found.tokens, found.text, found.stop_reason) == (expected.tokens, expected.text, expected.stop_reason)
    assert json.loads(found.text)["answer"] in ("yes", "no")
    if wanted.endswith("}"):
        assert asked < len(masks) - asked


class TestThoughts:
    def test_the_grammar_begins_after_them(self) -> None:
        generation = answer(saying("<think>\nIs it {so}?\n</think>\n\nYes, it is."), schema=SCHEMA)
        assert generation.reasoning == "Is it {so}?"
        assert json.loads(generation.text)["answer"] in ("yes", "no")
        assert generation.stop_reason == "stop"

    def test_also_where_the_prompt_began_them(self) -> None:
        generation = answer(saying("Hm {.\n</think>Yes"), thinking=True, schema=SCHEMA)
        assert generation.reasoning == "Hm {."
        assert json.loads(generation.text)

    def test_what_stands_between_a_thought_and_the_answer_is_written(self) -> None:
        generation = answer(saying("Hm.</think>Yes"), thinking=True, schema=SCHEMA)
        assert TOKENIZER.decode(generation.tokens).startswith("Hm.</think>\n\n{")

    def test_a_model_need_not_think(self) -> None:
        generation = answer(saying('{"answer":"yes"}'), schema=SCHEMA)
        assert (generation.reasoning, json.loads(generation.text)) == ("", {"answer": "yes"})

    def test_nor_can_it_where_it_shall_not(self) -> None:
        generation = answer(saying("<think>"), thought=True, schema=SCHEMA)
        assert generation.reasoning == "" and json.loads(generation.text)

    def test_a_model_that_ends_within_one_has_to_answer(self) -> None:
        generation = answer(saying("<think>\nHm."), schema=SCHEMA)
        assert generation.reasoning == "Hm." and json.loads(generation.text)
        generation = answer(saying("<think>Hm."), HERMES, tools=TOOLS, tool_choice="required")
        assert generation.reasoning == "Hm." and generation.tool_calls

    @pytest.mark.parametrize("begun", ["", "{", '{"ans', '{"answer":"y', '{"answer":"no"}'])
    def test_an_answer_that_has_begun_goes_on_in_the_grammar(self, begun: str) -> None:
        script = saying("Hm.")
        generation = answer(script, thought=True, schema=SCHEMA, options={"begun": begun})
        assert json.loads(begun + generation.text)["answer"] in ("yes", "no")
        assert generation.stop_reason == "stop"
        if '"y' in begun:
            assert generation.text == 'es"}'
        with pytest.raises(ValueError, match="does not begin as the schema"):
            answer(script, thought=True, schema=SCHEMA, options={"begun": begun + "}}"})

    def test_a_call_that_has_begun_goes_on_in_its_grammar(self) -> None:
        begun = '<tool_call>\n{"name": "look_up", "arguments": {"word": "d'
        generation = answer(saying("Hm."), HERMES, thought=True, tools=TOOLS, options={"begun": begun})
        (call,) = generation.tool_calls
        assert call.name == "look_up" and call.arguments["word"] == "dog" and set(call.arguments) == {"word", "n"}

    def test_a_budget_ends_them(self) -> None:
        generation = answer(
            saying("<think>" + "so and " * 50), schema=SCHEMA, options={"reasoning_budget": 6, "max_tokens": 60}
        )
        assert generation.reasoning and json.loads(generation.text)
        assert TOKENIZER.decode(generation.tokens).count("</think>\n\n{") == 1
        assert generation.stats.forced_tokens > 0

    def test_marks_that_are_no_tokens(self) -> None:
        """Here they are cut into several, and what the last of them has beyond the mark is no JSON."""
        seed = find_format("<seed:think>")
        thought = "<seed:think>Hm.</seed:think"
        (merged,) = encode(">).")
        generation = answer(saying([*encode(thought), merged]), seed, schema=SCHEMA)
        assert generation.reasoning == "Hm." and json.loads(generation.text)

    def test_headers_say_where_the_answer_is(self) -> None:
        said = "<|channel|>analysis<|message|>Hm.<|end|>"
        for script in (said + "What?", "What?"):
            generation = answer(saying(script), HARMONY, schema=SCHEMA)
            text = TOKENIZER.decode(generation.tokens)
            assert text.startswith("<|channel|>analysis<|message|>")
            if script != "What?":
                assert text.startswith(said + FINAL + "{")
                assert (generation.reasoning, json.loads(generation.text)) == ("Hm.", {"answer": "yes"})

    def test_and_where_a_call_is(self) -> None:
        said = "<|channel|>analysis<|message|>Hm.<|end|>"
        generation = answer(saying(said + "No."), HARMONY, tools=TOOLS, tool_choice={"name": "look_up"})
        (call,) = generation.tool_calls
        assert call.name == "look_up" and call.arguments["word"] in ("cat", "dog")
        auto = "<|start|>assistant<|channel|>commentary to=functions.look_up <|constrain|>json<|message|>"
        generation = answer(saying(said + auto + '{"bird": 1}'), HARMONY, tools=TOOLS)
        assert generation.tool_calls[0].arguments["word"] in ("cat", "dog")
        options = {"reasoning_budget": 7, "max_tokens": 90}
        long = saying(said[:-7] + "so " * 20)
        generation = answer(long, HARMONY, tools=TOOLS, tool_choice="required", options=options)
        assert generation.reasoning and generation.tool_calls
        both = answer(saying(said + FINAL + "No."), HARMONY, tools=TOOLS, schema=SCHEMA)
        assert json.loads(both.text)["answer"] in ("yes", "no")


class TestCalls:
    def test_within_marks_arguments_are_what_the_function_takes(self) -> None:
        generation = answer(saying('I look.<tool_call>\n{"name": "look_up", "arguments": {"bird": 1.5}}'), HERMES,
                            tools=TOOLS)  # fmt: skip
        assert generation.text.strip() == "I look."
        (call,) = generation.tool_calls
        assert call.name == "look_up" and call.arguments["word"] in ("cat", "dog")
        assert isinstance(call.arguments["n"], int)

    def test_elsewhere_the_text_is_free(self) -> None:
        text = 'Hm {"name": 5} <tool> and </tool_call>.'
        generation = answer(saying(text), HERMES, tools=TOOLS)
        assert (generation.text, generation.tool_calls) == (text, [])
        free = answer(saying(text), HERMES)
        assert free.tokens == generation.tokens

    def test_a_token_that_runs_over_the_mark_is_cut(self) -> None:
        (merged,) = encode(">).")
        generation = answer(saying([*encode("<tool_call"), merged]), HERMES, tools=TOOLS)
        assert [call.name for call in generation.tool_calls] in (["look_up"], ["wait"])

    def test_none_is_no_call(self) -> None:
        text = '<tool_call>\n{"name": "wait", "arguments": {}}\n</tool_call>'
        generation = answer(saying(text), HERMES, tools=TOOLS, tool_choice="none")
        assert (generation.text, generation.tool_calls) == (text, [])

    def test_required_begins_at_once(self) -> None:
        generation = answer(saying("I would rather not."), HERMES, tools=TOOLS, tool_choice="required")
        assert generation.text == "" and generation.tool_calls

    def test_or_after_a_thought(self) -> None:
        said = saying("<think>No.</think>I would rather not.")
        generation = answer(said, HERMES, tools=TOOLS, tool_choice="required")
        assert (generation.reasoning, generation.text) == ("No.", "") and generation.tool_calls

    @pytest.mark.parametrize("choice", [{"name": "wait"}, {"type": "function", "function": {"name": "wait"}}])
    def test_a_function_can_be_named(self, choice: dict[str, Any]) -> None:
        generation = answer(saying("look_up"), HERMES, tools=TOOLS, tool_choice=choice)
        assert [call.name for call in generation.tool_calls] == ["wait"]

    def test_one_call_or_several(self) -> None:
        call = '<tool_call>\n{"name": "look_up", "arguments": {"word": "cat", "n": 1}}\n</tool_call>'
        for tool_choice in ("auto", "required"):
            several = answer(saying(f"{call}\n{call}"), HERMES, tools=TOOLS, tool_choice=tool_choice)
            one = answer(saying(f"{call}\n{call}"), HERMES, tools=TOOLS, tool_choice=tool_choice, several=False)
            assert (len(several.tool_calls), len(one.tool_calls)) == (2, 1)
            assert one.stop_reason == "stop"

    def test_a_call_or_the_answer(self) -> None:
        call = '<tool_call>\n{"name": "look_up", "arguments": {"word": "cat", "n": 1}}\n</tool_call>'
        called = answer(saying(call), HERMES, tools=TOOLS, schema=SCHEMA)
        assert [one.name for one in called.tool_calls] == ["look_up"] and called.text == ""
        answered = answer(saying('{"answer":"no"}'), HERMES, tools=TOOLS, schema=SCHEMA)
        assert (json.loads(answered.text), answered.tool_calls) == ({"answer": "no"}, [])
        neither = answer(saying("Neither."), HERMES, tools=TOOLS, schema=SCHEMA)
        assert neither.tool_calls or json.loads(neither.text)

    def test_what_cannot_be_is_refused(self) -> None:
        for asked, message in (
            ({"tool_choice": "required"}, "there are no tools"),
            ({"tools": TOOLS, "tool_choice": "maybe"}, 'must be "auto"'),
            ({"tools": TOOLS, "tool_choice": {"name": "fly"}}, "'fly' is none of the tools"),
            ({"tools": [{"function": {}}]}, r"tools\[0\]: None is no name"),
            ({"tools": TOOLS, "regex": "a"}, "do not go together"),
            ({"tools": TOOLS, "schema": {"type": "odd"}}, "schema: Invalid type"),
        ):
            with pytest.raises(ValueError, match=message):
                chat_rules(TOKENIZER, HERMES, **asked)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="knows no calls"):
            chat_rules(TOKENIZER, THINKING, tools=TOOLS, tool_choice="required")

    def test_a_schema_that_cannot_be_followed_is_refused_only_where_it_is_strict(self) -> None:
        odd = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=b)"}}, "required": ["a"]}
        for strict in (False, True):
            tools = [{"type": "function", "function": {"name": "f", "parameters": odd, "strict": strict}}]
            if strict:
                with pytest.raises(ValueError, match=r"the parameters of f: .*look-around"):
                    chat_rules(TOKENIZER, HERMES, tools=tools)
            else:
                assert chat_rules(TOKENIZER, HERMES, tools=tools)[1]
