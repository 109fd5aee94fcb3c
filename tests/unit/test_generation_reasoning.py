"""Thoughts in a generation: told from the answer, and ended where they become too long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engine_fakes import EOS, PIECES, FakeRuntime, FakeTokenizer, ids_of, make_session

from qrun.engine import Generation, Model
from qrun.engine.text.response_formats import find_format
from qrun.engine.text.response_parser import ResponseParser

START = "~"  # ends the prompt
OPEN, CLOSE = len(PIECES) - 1, len(PIECES) - 2  # read as "D!" and "xEN" elsewhere
CLOSING = "\n</think>\n\n"


def speaking(*script: int) -> Callable[[list[int]], int]:
    """A rule: what follows the prompt is the script."""

    def rule(held: list[int]) -> int:
        said = len(held) - held.index(ids_of(START)[0]) - 1
        return script[said] if said < len(script) else EOS

    return rule


class SpecialTokenizer(FakeTokenizer):
    """With tokens for the marks, which are control tokens: a decoder leaves them out."""

    spelt = {OPEN: b"<think>", CLOSE: b"</think>"}  # noqa: RUF012 - read alone

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        for id, spelling in self.spelt.items():
            before, mark, after = text.partition(spelling.decode())
            if mark and parse_special:
                return [*self.encode(before, False, True), id, *self.encode(after, False, True)]
        return ids_of(text)

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        return b"".join(b"" if skip_special and id in self.spelt else self.token_bytes(id) for id in ids).decode()

    def token_bytes(self, id: int) -> bytes:
        return self.spelt.get(id, PIECES[id])

    def stream(self, skip_special: bool = False, after: Any = ()) -> Any:
        decoder = super().stream()
        plain = decoder.push
        decoder.push = lambda id: "" if id in self.spelt else plain(id)
        return decoder


def generate(*script: int, tokenizer: Any = None, thinking: bool = False, **options: Any) -> Generation:
    response = ResponseParser(find_format("<think></think>"), thinking=thinking, closing=CLOSING)
    session = make_session(FakeRuntime(speaking(*script)), tokenizer)
    return session.generate(ids_of(START), response=response, **options)


def pieces(generation: Generation) -> list[tuple[str, str]]:
    return [(piece.channel, str(piece)) for piece in generation if piece]


def test_pieces_say_what_they_are() -> None:
    generation = generate(*ids_of("<think>ab</think>"), *ids_of("Yes"))
    assert pieces(generation) == [
        ("reasoning", "a"), ("reasoning", "b"), ("content", "Y"), ("content", "e"), ("content", "s")
    ]  # fmt: skip
    assert (generation.reasoning, generation.text, generation.stop_reason) == ("ab", "Yes", "stop")
    assert generation.tokens == ids_of("<think>ab</think>Yes")
    assert generation.stats.reasoning_tokens == len("<think>ab</think>") - len("<think") - 1


def test_marks_that_are_special_tokens_are_seen() -> None:
    generation = generate(OPEN, *ids_of("ab"), CLOSE, *ids_of("Yes"), tokenizer=SpecialTokenizer())
    assert pieces(generation)[2] == ("content", "Y")
    assert (generation.reasoning, generation.text) == ("ab", "Yes")


def test_without_a_response_all_is_text() -> None:
    session = make_session(FakeRuntime(speaking(*ids_of("<think>a</think>b"))))
    generation = session.generate(ids_of(START))
    assert {channel for channel, _ in pieces(generation)} == {"content"}
    assert (generation.text, generation.reasoning, generation.tool_calls) == ("<think>a</think>b", "", [])


def test_every_token_has_one_piece() -> None:
    """One that ends a thought and begins the answer has two, of which the first carries it."""
    PIECES_BEFORE = PIECES[OPEN]
    PIECES[OPEN] = b"b</think>c"
    try:
        generation = generate(*ids_of("a"), OPEN, *ids_of("d"), thinking=True)
        found = [(str(piece), piece.token, piece.channel) for piece in generation]
    finally:
        PIECES[OPEN] = PIECES_BEFORE
    (a,), (d,) = ids_of("a"), ids_of("d")
    assert found == [
        ("a", a, "reasoning"), ("b", OPEN, "reasoning"), ("c", None, "content"), ("d", d, "content")
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["<think>abc", "<think>", "<thi", "<think>a</thin"])
def test_a_text_that_ends_within_a_thought_or_a_mark(text: str) -> None:
    for options in ({}, {"max_tokens": len(text)}):
        generation = generate(*ids_of(text), **options)
        assert {channel for channel, _ in pieces(generation)} <= {"content" if text == "<thi" else "reasoning"}
        whole = generation.reasoning + generation.text
        assert whole == text.removeprefix("<think>")
        assert generation.text == ("<thi" if text == "<thi" else "")
        assert generation.stop_reason == ("length" if options else "stop")


def test_stop_strings_are_looked_for_in_the_answer_alone() -> None:
    generation = generate(*ids_of("aXXb</think>cXXd"), thinking=True, stop=("XX", "think"))
    pieces(generation)
    assert (generation.reasoning, generation.text, generation.stop_reason) == ("aXXb", "c", "stop")


# Budget


def test_a_thought_that_is_too_long_is_ended_for_the_model() -> None:
    def rule(held: list[int]) -> int:
        text = "".join(chr(id - 2) for id in held)
        thinking = "</think>" not in text
        said = text.partition("</think>\n\n")[2]
        return ids_of("x" if thinking else "Yes."[len(said) : len(said) + 1])[0] if said != "Yes." else EOS

    for budget in (1, 2, 10):
        response = ResponseParser(find_format("<think>"), thinking=True, closing=CLOSING)
        session = make_session(FakeRuntime(rule))
        generation = session.generate(ids_of("<think>\n"), response=response, reasoning_budget=budget)
        found = list(generation)
        assert (generation.reasoning, generation.text) == ("x" * budget, "Yes.")
        assert generation.tokens == ids_of("x" * budget + CLOSING + "Yes.")
        assert [piece.logprob is None for piece in found if piece.token is not None] == (
            [False] * budget + [True] * len(CLOSING) + [False] * 4
        )
        assert session.tokens == ids_of("<think>\n") + generation.tokens


def test_a_thought_that_ends_in_time_is_left_alone() -> None:
    generation = generate(*ids_of("ab</think>Yes"), thinking=True, reasoning_budget=20)
    pieces(generation)
    assert (generation.reasoning, generation.text) == ("ab", "Yes")
    assert generation.tokens == ids_of("ab</think>Yes")


def test_a_budget_and_max_tokens() -> None:
    generation = generate(*ids_of("x" * 50), thinking=True, reasoning_budget=5, max_tokens=8)
    pieces(generation)
    assert (len(generation.tokens), generation.stop_reason) == (8, "length")
    assert generation.text == ""


@pytest.mark.parametrize("lookup", [False, True])
def test_a_budget_holds_with_guesses(lookup: bool) -> None:
    """The text is the same, though several tokens are sampled at once."""

    def rule(held: list[int]) -> int:
        return ids_of("abcdefgh"[len(held) % 8])[0]

    response = ResponseParser(find_format("<think>"), thinking=True, closing=CLOSING)
    session = make_session(FakeRuntime(rule))
    prompt = ids_of("abcdefgh" * 4)
    generation = session.generate(prompt, response=response, reasoning_budget=11, max_tokens=40, lookup=lookup)
    list(generation)
    assert generation.reasoning == "abcdefghabc"
    assert generation.tokens[11 : 11 + len(CLOSING)] == ids_of(CLOSING)
    assert len(generation.tokens) == 40


# Model.chat

SOURCE = (
    "{% for m in messages %}({{ m.role[0] }}){{ m.content }}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}~"
)


def make_model(answer: str, source: str = SOURCE) -> Model:
    import test_model

    from qrun.engine import ChatTemplate

    tokenizer = test_model.FakeTokenizer()
    tokenizer.has_piece = lambda piece: False  # type: ignore[attr-defined]
    model = test_model.make_model(FakeRuntime(speaking(*ids_of(answer))), tokenizer)
    model.chat_template = ChatTemplate(source, tokenizer)
    return model


def test_chat_tells_thoughts_from_the_answer() -> None:
    generation = make_model("<think>Hm.</think>Yes.").chat("Is it?")
    assert "".join(piece for piece in generation if piece.channel == "content") == "Yes."
    assert (generation.reasoning, generation.text) == ("Hm.", "Yes.")


@pytest.mark.parametrize("options", [{"think": False}, {"reasoning_budget": 0}])
def test_chat_without_thoughts(options: dict[str, Any]) -> None:
    model = make_model("Yes.")
    generation = model.chat("Is it?", **options)
    assert "".join(generation) == "Yes."
    assert model._runtime.evaluated[0] == ids_of("(u)Is it?<think>\n\n</think>\n\n~")  # type: ignore[attr-defined]


def test_chat_with_a_model_that_does_not_think() -> None:
    model = make_model("<think>Yes.", "{{ messages[0].content }}~")
    with pytest.raises(ValueError, match="does not think"):
        model.chat("Is it?", think=True)
    assert "".join(model.chat("Is it?", think=False, reasoning_budget=5)) == "<think>Yes."


def test_chat_reads_calls_where_there_are_tools() -> None:
    call = '<tool_call>{"name": "f", "arguments": {"k": "v"}}</tool_call>'
    source = SOURCE + "{# <tool_call> #}"
    tools = [{"type": "function", "function": {"name": "f"}}]
    generation = make_model(f"Wait.{call}", source).chat("Is it?", tools=tools)
    assert [(piece.channel, str(piece)) for piece in generation if piece][-1] == ("tool_call", call)
    assert generation.text == "Wait."
    assert [(one.name, one.arguments) for one in generation.tool_calls] == [("f", {"k": "v"})]
    assert "".join(make_model(f"Wait.{call}", source).chat("Is it?")) == f"Wait.{call}"


@pytest.mark.parametrize("value", [-1, 1.5, "x", True])
def test_a_budget_is_a_number_of_tokens(value: object) -> None:
    with pytest.raises(ValueError, match="reasoning_budget"):
        make_model("Yes.").chat("Is it?", reasoning_budget=value)
