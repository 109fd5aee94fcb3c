"""Messages as clients send them reach the prompt, whatever form the template reads; what is none is refused."""

import copy
import json
from enum import StrEnum
from typing import Any

import pytest

from qrun.engine.text.chat_template import ChatTemplate, ChatTemplateError
from qrun.engine.text.messages import read_messages, read_tools
from qrun.engine.text.template_sandbox import MAX_SECONDS


class SmallTokenizer:
    bos_id = eos_id = None

    def has_piece(self, piece: str) -> bool:
        return False


def template(source: str) -> ChatTemplate:
    tokenizer: Any = SmallTokenizer()
    return ChatTemplate(source, tokenizer)


def render(source: str, messages: Any, **options: Any) -> str:
    given = copy.deepcopy(messages)
    text = template(source).render(messages, **{"add_generation_prompt": False} | options)
    assert messages == given, "the caller's messages are the caller's"
    return text


def each(body: str) -> str:
    return "{% for m in messages %}" + body + "{% endfor %}"


def said(*turns: str) -> list[dict[str, Any]]:
    """From "user: Hello" and the like."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def calling(arguments: Any, **more: Any) -> list[dict[str, Any]]:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "clock", "arguments": arguments}}
    message = {"role": "assistant", "tool_calls": [call], **more}
    return [*said("user: Time?"), message, {"role": "tool", "tool_call_id": "abcdefghi", "content": "noon"}]


ADDED = each("{{ m.role + ':' + m.content + ';' }}")
WALKED = each("{{ m.role }}:{% for p in m.content %}{{ p.text }}+{% endfor %};")
BOTH = each("{{ m.role }}:{{ m.content if m.content is string else m.content | map(attribute='text') | join('+') }};")
SHOWN = each("{{ m.role }}:{{ m.content }};")


class TestContents:
    @pytest.mark.parametrize("source", [ADDED, SHOWN, each("{{ m.role }}:{{ m.content | trim }};")])
    def test_parts_become_text_where_the_template_wants_text(self, source: str) -> None:
        assert render(source, [{"role": "user", "content": parts("a", "b")}]) == "user:a\nb;"

    def test_text_becomes_a_part_where_the_template_wants_parts(self) -> None:
        assert render(WALKED, said("user: a")) == "user:a+;"

    def test_what_the_template_reads_stays_as_it_is(self) -> None:
        assert render(BOTH, [{"role": "user", "content": parts("a", "b")}]) == "user:a+b;"
        assert render(BOTH, said("user: a")) == "user:a;"

    def test_a_template_that_reads_the_first_part_alone_gets_one(self) -> None:
        source = each("{{ m.content if m.content is string else m.content[0].text }}")
        assert render(source, [{"role": "user", "content": parts("a", "b")}]) == "a\nb"

    def test_each_role_has_its_own_form(self) -> None:
        source = each(
            "{% if m.role == 'user' %}{{ m.content[0].text }}{% else %}{{ '<' + m.content + '>' }}{% endif %}"
        )
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": parts("b")}, *said("user: c")]
        assert render(source, talk) == "a<b>c"

    @pytest.mark.parametrize("part", ["a", {"type": "input_text", "text": "a"}, {"type": "output_text", "text": "a"},
                                      {"type": "refusal", "refusal": "a"}, {"text": "a"}])  # fmt: skip
    def test_parts_have_several_names(self, part: Any) -> None:
        assert render(ADDED, [{"role": "user", "content": [part]}]) == "user:a;"

    def test_a_thought_among_the_parts_is_no_text(self) -> None:
        content = [{"type": "thinking", "thinking": parts("hm")}, *parts("a")]
        source = each("{{ m.content + '(' ~ m.reasoning_content ~ ')' }}")
        assert render(source, [*said("user: q"), {"role": "assistant", "content": content}]) == "q()a(hm)"

    @pytest.mark.parametrize("message", [{"content": None}, {}, {"content": []}, {"content": ""}])
    def test_nothing_said_is_an_empty_text(self, message: dict[str, Any]) -> None:
        assert render(ADDED, [*said("user: a"), {"role": "assistant", **message}]) == "user:a;assistant:;"

    @pytest.mark.parametrize("kind", ["image_url", "input_image", "input_audio", "video", "file"])
    def test_other_media_are_refused(self, kind: str) -> None:
        with pytest.raises(ChatTemplateError, match=rf"messages\[0\]: content\[1\] is of type {kind}.*text alone"):
            render(BOTH, [{"role": "user", "content": [*parts("a"), {"type": kind, kind: {"url": "x"}}]}])

    def test_a_result_may_be_a_mapping(self) -> None:
        results = [*calling({})[:2], {"role": "tool", "content": {"a": [1, "é"]}}]
        as_json = each("{{ m.content | tojson if m.content is mapping else m.content }}")
        call = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'  # which this template does not show
        assert render(as_json, results) == f'Time?{call}{{"a": [1, "é"]}}'
        assert render(ADDED, results) == f'user:Time?;assistant:{call};tool:{{"a": [1, "é"]}};'


CALLS = "{% for c in m.tool_calls %}[{{ c.function.name }}{{ ARGUMENTS }}]{% endfor %}"


def with_calls(arguments: str, content: str = "{{ m.content }}") -> str:
    return each(content + CALLS.replace("ARGUMENTS", arguments))


class TestArguments:
    OBJECT, TEXT = {"zone": "UTC", "n": 3}, '{"zone": "UTC", "n": 3}'

    @pytest.mark.parametrize(
        "source",
        [
            with_calls("c.function.arguments | tojson"),
            with_calls("c.function.arguments.items() | list | tojson"),
            with_calls(
                "'' ~ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson"
            ),
            with_calls("c.function | tojson"),
            with_calls("'' + c.function.arguments"),
            with_calls("c.function.arguments"),
        ],
    )
    def test_an_object_and_its_json_are_the_same(self, source: str) -> None:
        texts = {render(source, calling(arguments, content="")) for arguments in (self.OBJECT, self.TEXT)}
        assert len(texts) == 1
        text = texts.pop()
        assert "'zone'" not in text and '\\"zone' not in text
        assert "zone" in text and "UTC" in text

    @pytest.mark.parametrize("arguments", ["", "{}", "null", None])
    def test_none_at_all(self, arguments: Any) -> None:
        assert (
            render(with_calls("c.function.arguments | tojson"), calling(arguments, content="")) == "Time?[clock{}]noon"
        )

    def test_what_a_model_wrote_wrongly_is_shown_where_it_can_be(self) -> None:
        wrong = calling('{"zone": ', content="")
        assert '{\\"zone' in render(with_calls("c.function.arguments | tojson"), wrong)
        with pytest.raises(
            ChatTemplateError, match=r"messages\[1\]: tool_calls\[0\]: arguments is not the JSON of an object"
        ):
            render(with_calls("c.function.arguments.items() | list | tojson"), wrong)

    @pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
    @pytest.mark.parametrize("seen_if", ["m.content is none", "m.content is not defined", "m.content == ''", "true"])
    def test_calls_without_a_text_are_shown(self, content: dict[str, Any], seen_if: str) -> None:
        source = each("{% if m.role != 'assistant' or SEEN %}" + CALLS + "{% endif %}").replace("SEEN", seen_if)
        source = source.replace("ARGUMENTS", "c.function.arguments | tojson")
        assert render(source, calling({"a": 1}, **content)) == '[clock{"a": 1}]'

    def test_calls_that_a_text_hides_follow_it(self) -> None:
        source = each("{% if m.content %}({{ m.content }}){% else %}" + CALLS + "{% endif %}")
        source = source.replace("ARGUMENTS", "c.function.arguments | tojson")
        assert render(source, calling({}, content="I look.")) == "(Time?)(I look.)[clock{}](noon)"

    def test_a_call_may_be_flat(self) -> None:
        talk = [
            *said("user: q"),
            {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "{}"}]},
        ]
        flat = each(
            "{% for c in m.tool_calls %}{% set f = c.function or c %}{{ f.name }}{{ f.arguments | tojson }}{% endfor %}"
        )
        assert render(flat, talk) == "f{}"
        framed = with_calls("c.type ~ (c.function.arguments | tojson)", "")
        assert render(framed, talk) == "[ffunction{}]"


class TestReasoning:
    @pytest.mark.parametrize("read", ["reasoning_content", "thinking", "reasoning"])
    @pytest.mark.parametrize("given", ["reasoning_content", "thinking", "reasoning"])
    def test_it_is_read_under_any_name(self, given: str, read: str) -> None:
        source = each("{% if m.READ is defined %}({{ m.READ }}){% endif %}{{ m.content }}").replace("READ", read)
        talk = [*said("user: q"), {"role": "assistant", "content": "a", given: "hm"}, *said("user: r")]
        assert render(source, talk) == "q(hm)ar"

    def test_it_is_read_before_calls(self) -> None:
        source = with_calls("c.function.arguments | tojson", "{% if m.tool_calls %}{{ m.thinking }}{% endif %}")
        assert render(source, calling({}, content="", reasoning_content="hm")) == "hm[clock{}]"

    def test_a_text_joins_it_where_the_template_takes_one_of_them(self) -> None:
        refusing = (
            "{% if m.content and m.thinking %}{{ raise_exception('both') }}{% endif %}{{ m.thinking }}{{ m.content }}"
        )
        source = with_calls("c.function.arguments | tojson", refusing)
        assert (
            render(source, calling({}, content="I look.", reasoning_content="hm")) == "Time?hm\n\nI look.[clock{}]noon"
        )

    def test_a_thought_before_a_call_under_way_is_kept(self) -> None:
        """By a template that writes it only while the call is the last message."""
        source = each(
            "{% if m.thinking and loop.last and not add_generation_prompt %}<{{ m.thinking }}>{% endif %}"
            "<{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ m.content }}>"
        )
        first = calling({"a": 1}, content="", reasoning_content="hm")
        talk = [*first, *calling({"b": 2}, content="", reasoning="aha")[1:]]
        text = render(source, talk, add_generation_prompt=True)
        assert text == (
            '<Time?><hm><{"name": "clock", "arguments": {"a": 1}}><noon>'
            '<aha><{"name": "clock", "arguments": {"b": 2}}><noon>'
        )
        assert "hm" not in render(source, [*first, *said("user: q")], add_generation_prompt=True)

    def test_both_names_are_written_once(self) -> None:
        source = each("{{ m.reasoning_content }}{{ m.thinking }}{{ m.content }}")
        talk = [*said("user: q"), {"role": "assistant", "content": "a", "reasoning_content": "hm", "reasoning": "hm"}]
        assert render(source, talk) == "qhma"


NO_SYSTEM = "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
FIRST_SYSTEM = "{% if m.role == 'system' and not loop.first %}{{ raise_exception('late system') }}{% endif %}"
ALTERNATING = (
    "{% set talk = messages | rejectattr('role', 'equalto', 'system') | list %}{% for m in talk %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% endfor %}"
)


class TestOrder:
    TALK = said("system: A", "system: B", "user: q", "assistant: a", "system: C", "user: r")

    def test_a_template_that_takes_system_messages_anywhere_gets_them_there(self) -> None:
        assert render(ADDED, self.TALK) == "system:A;system:B;user:q;assistant:a;system:C;user:r;"

    @pytest.mark.parametrize("source", [
        each(FIRST_SYSTEM + "{{ m.role + ':' + m.content + ';' }}"),
        each("{% if m.role != 'system' or loop.first %}{{ m.role + ':' + m.content + ';' }}{% endif %}"),
    ])  # fmt: skip
    def test_one_that_takes_a_first_one_alone_gets_all_in_it(self, source: str) -> None:
        assert render(source, self.TALK) == "system:A\n\nB\n\nC;user:q;assistant:a;user:r;"
        assert render(source, said("user: q", "system: A", "user: r")) == "system:A;user:q;user:r;"

    @pytest.mark.parametrize("source", [
        each(NO_SYSTEM + "{{ m.role + ':' + m.content + ';' }}"),
        each("{% if m.role != 'system' %}{{ m.role + ':' + m.content + ';' }}{% endif %}"),
    ])  # fmt: skip
    def test_one_that_takes_none_gets_them_in_the_question(self, source: str) -> None:
        assert render(source, self.TALK) == "user:A\n\nB\n\nC\n\nq;assistant:a;user:r;"
        assert render(source, said("system: A")) == "user:A;"

    def test_they_join_a_question_of_several_parts(self) -> None:
        source = each(
            NO_SYSTEM + "{{ m.content if m.content is string else m.content | map(attribute='text') | join('+') }}"
        )
        assert render(source, [*said("system: A"), {"role": "user", "content": parts("q", "r")}]) == "A+q+r"

    def test_between_calls_too(self) -> None:
        talk = [*said("system: A"), *calling({"a": 1}, content=""), *said("system: B", "user: r")]
        source = "{{ m.role }}:{{ m.content }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %};"
        late = "system:B;user:r;"
        assert render(each(source), talk).endswith(late)
        text = render(each(FIRST_SYSTEM + source), talk)
        assert text.startswith("system:A\n\nB;") and text.endswith("tool:noon;user:r;")

    def test_neighbours_become_one_where_roles_must_alternate(self) -> None:
        source = ALTERNATING + ADDED
        talk = said("system: A", "user: p", "user: q", "assistant: a", "assistant: b", "user: r")
        assert render(source, talk) == "system:A;user:p\n\nq;assistant:a\n\nb;user:r;"
        assert render(ADDED, talk).count("user:") == 3

    def test_another_error_is_not_hidden_by_a_second_try(self) -> None:
        source = each("{% if m.content == 'q' %}{{ raise_exception('not this') }}{% endif %}{{ m.content }}")
        with pytest.raises(ChatTemplateError, match="not this"):
            render(source, said("system: A", "user: q"))

    def test_a_refusal_of_the_first_role_is_reported(self) -> None:
        with pytest.raises(ChatTemplateError, match="roles must alternate"):
            render(ALTERNATING + ADDED, said("assistant: a", "user: q"))


class TestRoles:
    def test_a_developer_is_the_system(self) -> None:
        assert render(ADDED, said("developer: A", "user: q")) == "system:A;user:q;"
        dropping = each("{% if m.role in ('system', 'user') %}{{ m.role + ':' + m.content + ';' }}{% endif %}")
        assert render(dropping, said("developer: A", "user: q")) == "system:A;user:q;"

    def test_unless_the_template_knows_him(self) -> None:
        source = each("{{ {'developer': 'D', 'system': 'S', 'user': 'U'}[m.role] + ':' + m.content + ';' }}")
        assert render(source, said("developer: A", "user: q")) == "D:A;U:q;"

    def test_a_function_is_a_tool(self) -> None:
        assert render(ADDED, said("user: q", "function: 1")) == "user:q;tool:1;"

    @pytest.mark.parametrize(("given", "role"), [("ipython", "tool"), ("model", "assistant"), ("human", "user")])
    def test_other_names(self, given: str, role: str) -> None:
        assert render(ADDED, [*said("user: q", f"{given}: a")]) == f"user:q;{role}:a;"
        own = each("{% if m.role == 'ROLE' %}~{% endif %}{{ m.content }}").replace("ROLE", given)
        assert render(own, [*said("user: q", f"{given}: a")]) == "q~a"

    def test_roles_of_the_template_s_own(self) -> None:
        source = each("{% if m.role == 'narrator' %}~{% endif %}{{ m.content }}")
        assert render(source, said("narrator: a", "user: q")) == "~aq"

    @pytest.mark.parametrize("role", ["", "\n", "user:"])
    def test_a_role_is_a_word(self, role: str) -> None:
        with pytest.raises(ChatTemplateError, match="is not known"):
            render("{{ '' ~ 'user:' }}" + ADDED, [{"role": role, "content": "a"}])

    def test_an_unknown_role_is_refused(self) -> None:
        with pytest.raises(ChatTemplateError, match=r"messages\[1\]: the role 'asistant' is not known.*assistant"):
            render(ADDED, said("user: q", "asistant: a"))


class Role(StrEnum):
    USER = "user"


class Described:
    """As OpenAI's library has messages."""

    def model_dump(self) -> dict[str, Any]:
        return {"role": Role.USER, "content": "a", "name": None, "tool_calls": None}


class TestWhatIsNoMessage:
    def test_a_text_is_a_question(self) -> None:
        assert render(ADDED, "Hello") == "user:Hello;"

    def test_objects_that_describe_themselves(self) -> None:
        assert template(each("{{ m | tojson }}")).render((Described(),)) == '{"role": "user", "content": "a"}'

    @pytest.mark.parametrize(
        ("messages", "reason"),
        [
            (None, "messages is None: a list"),
            (7, "messages is of type int: a list"),
            (b"Hello", "messages is of type bytes: a list"),
            ({"role": "user", "content": "a"}, "messages is of type dict: a list"),
            (["a"], r"messages\[0\] is of type str: a dictionary"),
            ([None], r"messages\[0\] is None: a dictionary"),
            ([{"role": 3, "content": "a"}], r"messages\[0\]: role is of type int: a text"),
            ([{"role": "user", "content": 3}], r"messages\[0\]: content is of type int: a text or a list of parts"),
            ([{"role": "user", "content": {"a": 1}}], r"messages\[0\]: content is of type dict"),
            ([{"role": "user", "content": [3]}], r"messages\[0\]: content\[0\] is of type int: a part"),
            ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]: text is None: a text"),
            ([{"role": "assistant", "reasoning": {}}], r"messages\[0\]: reasoning is of type dict"),
            ([{"role": "assistant", "tool_calls": {}}], r"messages\[0\]: tool_calls is of type dict: a list"),
            ([{"role": "assistant", "tool_calls": ["f"]}], r"tool_calls\[0\] is of type str: a dictionary"),
            ([{"role": "assistant", "tool_calls": [{"function": "f"}]}], r"tool_calls\[0\]: function is of type str"),
            ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}], "arguments is of type list"),
            ([{"role": "user", "content": "a", "more": json.loads("[" * 500 + "]" * 500)}], r"messages\[0\] holds"),
        ],
    )
    def test_wrong_types(self, messages: Any, reason: str) -> None:
        with pytest.raises(TypeError, match=reason):
            read_messages(messages)

    @pytest.mark.parametrize(
        ("message", "reason"),
        [
            ({"content": "a"}, r"messages\[0\] has no role"),
            ({"role": "user", "content": [{"type": "riddle"}]}, r"content\[0\] is of type riddle: a part of type text"),
            ({"role": "assistant", "tool_calls": [{"id": "1"}]}, r"tool_calls\[0\] has no name of a function"),
        ],
    )
    def test_wrong_values(self, message: dict[str, Any], reason: str) -> None:
        with pytest.raises(ChatTemplateError, match=reason):
            read_messages([message])

    @pytest.mark.parametrize("tools", ["f", {"type": "function"}, [len], 3])
    def test_wrong_tools(self, tools: Any) -> None:
        with pytest.raises(TypeError, match=r"tools.*describe"):
            read_tools(tools)

    def test_no_tools(self) -> None:
        assert (read_tools(None), read_tools([])) == (None, None)


class TestIds:
    def test_ids_are_shortened_where_the_template_wants_it(self) -> None:
        checked = (
            "{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('length 9') }}{% endif %}"
            "{{ c.function | tojson }}{{ c.id }}{% endfor %}{{ m.content }}{{ m.tool_call_id }};"
        )
        talk = calling({}, content="")
        for id in ("call_0123456789abcdef", None):
            talk[1]["tool_calls"][0]["id"] = talk[2]["tool_call_id"] = id
            call, result = render(each(checked), talk).split(";")[1:3]
            assert len(call.rpartition("}")[2]) == 9
            assert result == "noon" + call.rpartition("}")[2]

    def test_a_result_without_one_belongs_to_the_first_call_that_waits(self) -> None:
        talk = calling({}, content="")
        talk[1]["tool_calls"].append({**talk[1]["tool_calls"][0], "id": "second"})
        talk[2:] = [{"role": "tool", "content": "one"}, {"role": "function", "content": "two"}]
        shown = "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ m.content }}#{{ m.tool_call_id }};"
        assert render(each(shown), talk).split(";")[-3:-1] == ["one#abcdefghi", "two#second"]

    def test_and_kept_where_it_does_not(self) -> None:
        shown = "{% for c in m.tool_calls %}{{ c.function | tojson }}{{ c.id }}{% endfor %};"
        talk = calling({}, content="")
        talk[1]["tool_calls"][0]["id"] = "call_0123456789abcdef"
        assert "call_0123456789abcdef" in render(each(shown), talk)


def test_a_template_that_needs_a_list_of_tools_gets_an_empty_one() -> None:
    source = "{% for tool in tools %}{{ tool.name }}{% endfor %}{% if tools is none %}none{% endif %}" + ADDED
    assert render(source, said("user: q")) == "user:q;"
    assert render(source, said("user: q"), tools=[]) == "user:q;"
    assert render("{% if tools is none %}none {% endif %}" + ADDED, said("user: q"), tools=[]) == "none user:q;"


def test_no_messages_are_for_the_template_to_refuse() -> None:
    assert render(ADDED + "!", []) == "!"
    with pytest.raises(ChatTemplateError, match="no element 0"):
        render("{{ messages[0].role.x + ADDED }}", [])


def test_a_template_that_takes_its_time_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_SECONDS > 1
    monkeypatch.setattr("qrun.engine.text.template_sandbox.MAX_SECONDS", 0.1)
    monkeypatch.setattr("qrun.engine.text.chat_template._PROBE_SECONDS", 0.1)
    own = template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    asked = []
    real = own._render
    monkeypatch.setattr(own, "_render", lambda *args, **kwargs: (asked.append(1), real(*args, **kwargs))[1])
    with pytest.raises(ChatTemplateError, match="seconds"):
        own.render(said("system: A", "system: B", "user: q"))
    assert len(asked) == 2
    with pytest.raises(ChatTemplateError, match="seconds"):
        own.render(said("system: A", "system: B", "user: q"))
    assert len(asked) == 3
