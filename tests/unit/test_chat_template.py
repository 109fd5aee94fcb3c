"""Conversations as text: what templates may use, what a model without one gets, what is refused."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from qrun.engine.text.chat_template import ChatTemplate, ChatTemplateError
from qrun.formats import FormatError

HELLO = [{"role": "user", "content": "Hello"}]
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "<é>"}}]


class SmallTokenizer:
    """Token 1 is "<s>", 2 is "</s>"."""

    bos_id, eos_id = 1, 2

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def has_piece(self, piece: str) -> bool:
        return piece in self.pieces

    def decode(self, ids: list[int]) -> str:
        return "".join({1: "<s>", 2: "</s>"}[id] for id in ids)


def template(source: str | None, *pieces: str, **named: str) -> ChatTemplate:
    metadata: dict[str, Any] = {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
    if source is not None:
        metadata["tokenizer.chat_template"] = source
    reader: Any = SimpleNamespace(path="model.gguf", metadata=metadata)
    tokenizer: Any = SmallTokenizer(*pieces)
    return ChatTemplate.from_reader(reader, tokenizer)


def render(source: str, messages: list[dict[str, Any]] = HELLO, **options: Any) -> str:
    return template(source).render(messages, **options)


class TestWhatTemplatesUse:
    def test_messages_and_special_tokens(self) -> None:
        source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] }}{% endfor %}{{ eos_token }}"
        assert render(source) == "<s>[user] Hello</s>"

    def test_blocks_take_their_lines_with_them(self) -> None:
        assert (
            render("{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n")
            == "Hello\n"
        )

    def test_the_generation_prompt_is_an_option(self) -> None:
        source = "{% if add_generation_prompt %}>{% endif %}"
        assert (render(source), render(source, add_generation_prompt=False)) == (">", "")

    def test_further_variables(self) -> None:
        assert render("{{ enable_thinking }}", enable_thinking=False) == "False"
        assert render("{{ enable_thinking is defined }}") == "False"

    def test_tojson_escapes_nothing(self) -> None:
        assert render("{{ tools[0].function.description | tojson }}", tools=TOOLS) == '"<é>"'
        assert render("{{ {'a': [1]} | tojson(indent=1) }}") == '{\n "a": [\n  1\n ]\n}'

    def test_loop_controls_and_namespaces(self) -> None:
        source = (
            "{% set n = namespace(i=0) %}{% for x in range(9) %}{% if x == 3 %}{% break %}{% endif %}"
            "{% set n.i = x %}{% endfor %}{{ n.i }}"
        )
        assert render(source) == "2"

    def test_loops_know_where_they_are(self) -> None:
        source = "{% for x in 'abc' %}{{ loop.index0 }}{{ x }}{{ loop.previtem }}{{ ';' if not loop.last }}{% endfor %}"
        assert render(source) == "0a;1ba;2cb"

    def test_macros_and_string_methods(self) -> None:
        source = "{% macro f(x) %}{{ x.strip().split(',')[-1] ~ '!' }}{% endmacro %}{{ f(' a,b ') + f('c') }}"
        assert render(source) == "b!c!"

    def test_the_date(self) -> None:
        assert len(render("{{ strftime_now('%d %B %Y') }}").split()) == 3

    def test_the_generation_tag_is_transparent(self) -> None:
        assert render("a{% generation %}b{{ 1 }}{% endgeneration %}c") == "ab1c"


class TestWhichTemplate:
    def test_the_models_own(self) -> None:
        own = template("x")
        assert (own.source, own.is_fallback) == ("x", False)

    def test_another_one_for_tools(self) -> None:
        own = template("plain", tool_use="tools")
        assert (own.render(HELLO), own.render(HELLO, tools=TOOLS)) == ("plain", "tools")

    def test_chatml_where_the_vocabulary_has_its_marks(self) -> None:
        plain = template(None, "<|im_start|>")
        assert plain.is_fallback
        assert plain.render(HELLO) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"

    def test_gemma_style_where_the_vocabulary_has_its_marks(self) -> None:
        assert template(None, "<start_of_turn>").render(TALK) == (
            "<s><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\nYes?<end_of_turn>\n"
            "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
        )

    def test_names_of_roles_otherwise(self) -> None:
        assert template(None).render(TALK) == "System: Be kind.\nUser: Hi\nAssistant: Yes?\nUser: Bye\nAssistant:"

    def test_a_template_that_is_no_text_is_refused(self) -> None:
        with pytest.raises(FormatError, match=r"model\.gguf: tokenizer\.chat_template is not a string"):
            template(7)  # type: ignore[arg-type]


class TestSystemMessages:
    SOURCE = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.role }}:{{ m.content }};{% endfor %}"
    )

    def test_a_template_that_refuses_them_gets_them_in_the_first_question(self) -> None:
        assert render(self.SOURCE, TALK) == "user:Be kind.\n\nHi;assistant:Yes?;user:Bye;"

    def test_they_become_a_question_where_there_is_none(self) -> None:
        assert render(self.SOURCE, TALK[:1]) == "user:Be kind.;"

    def test_they_join_a_question_of_several_parts(self) -> None:
        question = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
        source = self.SOURCE.replace("m.content", "m.content | map(attribute='text') | join('+')")
        assert render(source, [TALK[0], question]) == "user:Be kind.+Hi;"

    def test_the_first_reason_is_the_one_that_is_reported(self) -> None:
        with pytest.raises(ChatTemplateError, match="role system"):
            render("{{ raise_exception('role ' ~ messages[0].role) }}", TALK)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for %}", "Expected an expression"),
        ("{{ raise_exception('one\ntwo') }}", "one two"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ none + 1 }}", "unsupported operand"),
        ("{% include 'x' %}", "no loader"),
        ("{{ messages[0].content | no_such_filter }}", "no_such_filter"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_errors_are_one_line(source: str, reason: str) -> None:
    with pytest.raises(ChatTemplateError, match=reason) as caught:
        render(source)
    assert "\n" not in str(caught.value)


def test_two_that_ask_at_first_at_the_same_time_do_not_wait_for_each_other() -> None:
    asked: Any = template("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    inside, switch = threading.Event(), asked._switch

    def slow_switch(fitting: Any) -> Any:
        inside.set()
        time.sleep(0.2)  # for the other one to come as far as it can
        return switch(fitting)

    def look() -> None:
        inside.wait()
        assert asked.format.thoughts is None

    asked._switch = slow_switch
    threads = [
        threading.Thread(target=work, daemon=True) for work in (lambda: asked.render(HELLO, think=False), look)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
