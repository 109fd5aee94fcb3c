"""`/v1/chat/completions`: what clients send, and what they are told."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from typing import Any

import pytest
from asgi_client import Answer, call, request
from server_fakes import hold, make_model, runtime_of

from qrun.server import app

PATH = "/v1/chat/completions"
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


def ask(model: Any = None, headers: dict[str, str] | None = None, **body: Any) -> Answer:
    served = app(model or make_model())
    return call(served, "POST", PATH, {"messages": [{"role": "user", "content": "Hi"}], **body}, headers)


def deltas(answer: Answer, index: int = 0) -> list[dict[str, Any]]:
    return [
        choice["delta"] for event in answer.events for choice in event["choices"] if choice["index"] == index
    ]  # fmt: skip


def error(answer: Answer) -> dict[str, Any]:
    told = answer.json()["error"]
    assert {"message", "type", "param", "code"} <= set(told)
    return told


def test_an_answer() -> None:
    answer = ask()
    told = answer.json()
    assert answer.status == 200
    assert told["object"] == "chat.completion" and told["model"] == "fake"
    assert told["choices"][0]["message"] == {"role": "assistant", "content": "Hello there.", "refusal": None}
    assert told["choices"][0]["finish_reason"] == "stop"
    assert told["usage"]["prompt_tokens"] == len("(u)Hi~")
    assert told["usage"]["completion_tokens"] == len("Hello there.")
    assert told["timings"]["prompt_n"] == len("(u)Hi~")


def test_a_stream() -> None:
    answer = ask(stream=True)
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.text.endswith("data: [DONE]\n\n") and answer.ended
    first, *middle, last = deltas(answer)
    assert first == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in middle) == "Hello there."
    assert last == {}
    assert {event["id"] for event in answer.events} == {answer.events[0]["id"]}
    reasons = [event["choices"][0]["finish_reason"] for event in answer.events]
    assert reasons[-1] == "stop" and set(reasons[:-1]) == {None}
    assert not any("usage" in event for event in answer.events)


def test_usage_in_a_stream_comes_where_it_is_asked_for() -> None:
    last = ask(stream=True, stream_options={"include_usage": True}).events[-1]
    assert last["choices"] == [] and last["usage"]["total_tokens"] == len("(u)Hi~") + len("Hello there.")


def test_what_was_read_before_is_told() -> None:
    served = app(make_model())
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    call(served, "POST", PATH, body)
    usage = call(served, "POST", PATH, body).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "n_predict"])
def test_the_most_tokens(field: str) -> None:
    told = ask(**{field: 5.0}).json()["choices"][0]
    assert (told["message"]["content"], told["finish_reason"]) == ("Hello", "length")


def test_fields_that_are_null_unknown_or_say_nothing() -> None:
    answer = ask(
        temperature=None, stop="", top_k=-1, max_tokens=-1, seed=-1, tools=None, tool_choice=None, functions=None,
        response_format={"type": "text"}, metadata={"a": 1}, service_tier="auto", logit_bias=None, user="me", n=1.0,
        top_p=0, stream_options=None, logprobs=None, reasoning_effort=None, presence_penalty="0.5", grammar="",
    )  # fmt: skip
    assert answer.json()["choices"][0]["message"]["content"] == "Hello there."


@pytest.mark.parametrize("stop", ["there", ["xyz", "", "there"]])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(stop: Any, stream: bool) -> None:
    answer = ask(stop=stop, stream=stream)
    if stream:
        assert "".join(delta.get("content", "") for delta in deltas(answer)) == "Hello "
    else:
        assert answer.json()["choices"][0]["message"]["content"] == "Hello "


def test_a_bias() -> None:
    from engine_fakes import ids_of

    (h,) = ids_of("H")
    for bias in ({str(h): -100}, {"H": False}, [[h, -100.0]], [["H", False]]):
        content = ask(logit_bias=bias, max_tokens=1).json()["choices"][0]["message"]["content"]
        assert not content.startswith("H")
    for id in ("99999", "-1"):
        assert error(ask(logit_bias={id: 1}))["param"] == "logit_bias"


def test_probabilities_as_llama_servers_clients_ask_for_them() -> None:
    told = ask(n_probs=2, max_tokens=3).json()["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in told] == list("Hel") and {len(one["top_logprobs"]) for one in told} == {2}
    told = ask(top_logprobs=2, max_tokens=3).json()["choices"][0]["logprobs"]["content"]
    assert {len(one["top_logprobs"]) for one in told} == {2}
    assert ask(n_probs=2, logprobs=False).json()["choices"][0]["logprobs"] is None
    assert error(ask(n_probs=21))["param"] == "n_probs"


def test_an_answer_that_may_not_end() -> None:
    told = ask(make_model("Hi"), ignore_eos=True, max_tokens=9).json()
    assert told["usage"]["completion_tokens"] == 9


def test_several_answers() -> None:
    told = ask(n=3, seed=1).json()
    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in told["choices"]} == {"Hello there."}
    assert told["usage"]["completion_tokens"] == 3 * len("Hello there.")
    answer = ask(n=2, stream=True)
    for index in (0, 1):
        assert "".join(delta.get("content", "") for delta in deltas(answer, index)) == "Hello there."


def test_log_probabilities() -> None:
    told = ask(logprobs=True, top_logprobs=2, max_tokens=3).json()["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in told] == ["H", "e", "l"]
    for one in told:
        assert one["logprob"] <= 0 and bytes(one["bytes"]).decode() == one["token"]
        assert len(one["top_logprobs"]) == 2
        assert one["top_logprobs"][0]["logprob"] == pytest.approx(one["logprob"])
    answer = ask(logprobs=True, max_tokens=3, stream=True)
    streamed = [event["choices"][0]["logprobs"] for event in answer.events]
    assert [one["token"] for entry in streamed if entry for one in entry["content"]] == ["H", "e", "l"]


# Calls and thoughts


def test_calls() -> None:
    choice = ask(make_model(CALL), tools=[WEATHER, {"type": "web_search"}]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    (told,) = choice["message"]["tool_calls"]
    assert told["type"] == "function" and told["id"].startswith("call_")
    assert told["function"]["name"] == "weather"
    assert json.loads(told["function"]["arguments"]) == {"city": "Köln"}


def test_calls_in_a_stream() -> None:
    answer = ask(make_model(f"Well. {CALL}\n{CALL}"), tools=[WEATHER], stream=True)
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas(answer):
        for part in delta.get("tool_calls", ()):
            if part["index"] not in calls:
                assert part["id"] and part["type"] == "function" and part["function"]["arguments"] == ""
                calls[part["index"]] = {"id": part["id"], "name": part["function"]["name"], "arguments": ""}
            else:
                assert set(part) == {"index", "function"} and set(part["function"]) == {"arguments"}
                calls[part["index"]]["arguments"] += part["function"]["arguments"]
    assert sorted(calls) == [0, 1] and calls[0]["id"] != calls[1]["id"]
    assert all(json.loads(one["arguments"]) == {"city": "Köln"} for one in calls.values())
    assert "".join(delta.get("content", "") for delta in deltas(answer)).strip() == "Well."
    assert answer.events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_one_call_where_a_client_takes_no_more() -> None:
    choice = ask(make_model(CALL + CALL), tools=[WEATHER], parallel_tool_calls=False).json()["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1


def test_calls_that_are_none() -> None:
    # What the grammar of a call does not allow is not sampled: the call can only be cut off, and is text then.
    text = "<tool_call>\n{not json\n</tool_call>"
    choice = ask(make_model(text), tools=[WEATHER], max_tokens=12).json()["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["content"].startswith("<tool_call>")
    assert "not json" not in choice["message"]["content"] and not choice["message"].get("tool_calls")


def test_which_tools_a_model_is_told_of() -> None:
    model = make_model(lambda before: before)
    other = {"type": "function", "function": {"name": "other"}}
    assert ask(model, tools=[WEATHER, other], tool_choice="none").json()["choices"][0]["message"]["content"] == "(u)Hi"
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [other]}}
    told = ask(model, tools=[WEATHER, other], tool_choice=allowed).json()["choices"][0]["message"]["content"]
    assert told == "[other](u)Hi"


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts(stream: bool) -> None:
    answer = ask(make_model("<think>Hm.</think>Yes."), stream=stream)
    if stream:
        said = {
            name: "".join(delta.get(name) or "" for delta in deltas(answer))
            for name in ("content", "reasoning", "reasoning_content")
        }
    else:
        said = answer.json()["choices"][0]["message"]
        assert answer.json()["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    assert (said["content"], said["reasoning"], said["reasoning_content"]) == ("Yes.", "Hm.", "Hm.")


@pytest.mark.parametrize(
    "field",
    [
        {"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}, {"think": False},
        {"thinking": {"type": "disabled"}}, {"reasoning": {"effort": "none"}}, {"enable_thinking": False},
        {"reasoning_budget": 0},
    ],
)  # fmt: skip
def test_switching_thoughts_off(field: dict[str, Any]) -> None:
    model = make_model(lambda before: "off" if "</think>" in before else "on")
    assert ask(model, **field).json()["choices"][0]["message"]["content"] == "off"
    assert ask(model).json()["choices"][0]["message"]["content"] == "on"


def test_a_budget_for_thoughts() -> None:
    thinking = {"type": "enabled", "budget_tokens": 4}  # of which the end of the mark is one
    told = ask(make_model("<think>" + "x" * 50), thinking=thinking, max_tokens=40).json()
    assert told["choices"][0]["message"]["reasoning"] == "xxx"


# Functions, as they were before tools

FUNCTION = WEATHER["function"]


@pytest.mark.parametrize("choice", [None, "auto", {"name": "weather"}])
@pytest.mark.parametrize("stream", [False, True])
def test_functions_are_called_one_at_a_time(choice: Any, stream: bool) -> None:
    answer = ask(make_model(CALL + CALL), functions=[FUNCTION], function_call=choice, stream=stream)
    if stream:
        calls = [delta["function_call"] for delta in deltas(answer) if "function_call" in delta]
        assert [call.get("name") for call in calls] == ["weather", None]
        told, reason = "".join(call["arguments"] for call in calls), answer.events[-1]["choices"][0]["finish_reason"]
    else:
        choice = answer.json()["choices"][0]
        message, reason = choice["message"], choice["finish_reason"]
        assert message["content"] is None and "tool_calls" not in message
        assert message["function_call"]["name"] == "weather"
        told = message["function_call"]["arguments"]
    assert json.loads(told) == {"city": "Köln"} and reason == "function_call"


def test_the_model_is_told_of_functions() -> None:
    for more, told in (({}, "[weather](u)Hi"), ({"function_call": "none"}, "(u)Hi")):
        answer = ask(make_model(lambda before: before), functions=[FUNCTION], **more)
        assert answer.json()["choices"][0]["message"]["content"] == told


def test_calls_of_functions_in_a_conversation() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}},
        {"role": "function", "name": "weather", "content": "rain"},
        {"role": "assistant", "function_call": {"name": "weather", "arguments": '{"x": 1}'}},
    ]
    template = (
        "{% for m in messages %}{{ m.role }}:{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{{ c.function.arguments|tojson }}{% endfor %}{{ m.content or '' }};{% endfor %}~"
    )
    answer = ask(make_model(lambda before: before, template=template), messages=messages)
    told = answer.json()["choices"][0]["message"]["content"]
    assert told == 'user:a;assistant:weather{};tool:rain;assistant:weather{"x": 1};'


@pytest.mark.parametrize(
    ("field", "more"),
    [("functions", {"functions": [FUNCTION], "tools": [WEATHER]}), ("functions", {"functions": [{}]}),
     ("functions", {"functions": "x"}), ("function_call", {"functions": [FUNCTION], "function_call": {"name": "x"}}),
     ("function_call", {"functions": [FUNCTION], "function_call": 3})],
)  # fmt: skip
def test_functions_that_are_none(field: str, more: dict[str, Any]) -> None:
    answer = ask(**more)
    assert answer.status == 400 and error(answer)["param"] == field and field in error(answer)["message"]


# Messages


def test_messages_in_all_shapes() -> None:
    model = make_model(lambda before: before)
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
        {"role": "user", "content": "c", "name": None},
    ]  # fmt: skip
    told = ask(model, messages=messages).json()["choices"][0]["message"]["content"]
    assert told.startswith("(u)a") and told.endswith("(t)rain(u)c")


def test_an_answer_that_was_begun_goes_on() -> None:
    model = make_model("Hello there.")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert ask(model, messages=messages).json()["choices"][0]["message"]["content"] == " there."
    told = ask(model, messages=messages, continue_final_message=False).json()["choices"][0]["message"]["content"]
    assert told == "Hello there."


@pytest.mark.parametrize(
    "messages",
    [None, [], "Hi", [1], [{"content": "x"}], [{"role": 3, "content": "x"}], [{"role": "user", "content": 3}],
     [{"role": "user"}, {"role": "user", "content": {"a": 1}}], {"role": "user"},
     [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://example.org/a.png"}}]}]],
)  # fmt: skip
def test_messages_that_are_none(messages: Any) -> None:
    answer = ask(messages=messages)
    assert answer.status in (200, 400)
    if answer.status == 400:
        assert error(answer)["type"] == "invalid_request_error"


def test_pictures_are_refused_in_words() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    answer = ask(messages=[{"role": "user", "content": [part]}])
    assert answer.status == 400 and "text alone" in error(answer)["message"]


def test_nothing_but_text_is_written() -> None:
    assert ask(modalities=["text"]).status == 200
    answer = ask(modalities=["text", "audio"], audio={"voice": "a", "format": "wav"})
    assert answer.status == 400 and error(answer)["param"] == "modalities"


def test_a_template_that_refuses() -> None:
    template = "{% if messages|length > 1 %}{{ raise_exception('only one') }}{% endif %}{{ messages[0].content }}~"
    messages = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    answer = ask(make_model(template=template), messages=messages)
    assert answer.status == 400 and "only one" in error(answer)["message"]


def test_a_prompt_that_is_too_long() -> None:
    for stream in (False, True):
        answer = ask(messages=[{"role": "user", "content": "x" * 500}], stream=stream)
        told = error(answer)
        assert answer.status == 400 and told["type"] == "exceed_context_size_error"
        assert (told["n_prompt_tokens"], told["n_ctx"]) == (504, 400)
        assert "maximum context length" in told["message"] and "context size" in told["message"]


def test_an_answer_that_fills_the_context() -> None:
    told = ask(make_model("x" * 500)).json()
    assert told["choices"][0]["finish_reason"] == "length"
    assert told["usage"]["total_tokens"] > 390


# What is wrong


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", "hot"), ("temperature", [1]), ("max_tokens", 1.5), ("max_tokens", "many"), ("n", 0), ("n", 1000),
     ("stop", 3), ("stop", [3]), ("logit_bias", 3), ("logit_bias", [1]), ("stream", "perhaps"), ("top_p", 7),
     ("tools", "x"), ("tool_choice", 3), ("top_logprobs", 21), ("seed", {}), ("chat_template_kwargs", []),
     ("reasoning_effort", 3), ("mirostat", 1), ("min_p", -1), ("top_k", True), ("stream_options", 3),
     ("response_format", 3)],
)  # fmt: skip
def test_wrong_fields_are_named(field: str, value: Any) -> None:
    answer = ask(stream=True, **{field: value}) if field != "stream" else ask(stream=value)
    assert answer.status == 400
    assert field in error(answer)["message"]


NUMBER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("field", "expected"),
    [({"response_format": {"type": "json_schema", "json_schema": {"schema": NUMBER}}}, r'\{"a":-?\d+\}'),
     ({"json_schema": NUMBER}, r'\{"a":-?\d+\}'), ({"guided_json": NUMBER}, r'\{"a":-?\d+\}'),
     ({"grammar": 'root ::= "He" | "Ha"'}, "He"), ({"guided_regex": "[a-c]{3}"}, "[a-c]{3}"),
     ({"guided_choice": ["Hey", "Ho"]}, "Hey")],
)  # fmt: skip
def test_answers_take_the_form_that_is_asked_for(field: dict[str, Any], expected: str) -> None:
    choice = ask(temperature=0, max_tokens=60, **field).json()["choices"][0]
    assert re.fullmatch(expected, choice["message"]["content"]) and choice["finish_reason"] == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_calls_that_have_to_be(choice: Any) -> None:
    city = {"type": "object", "properties": {"city": {"enum": ["Köln", "Bonn"]}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": city | {"additionalProperties": False}}}
    told = ask(temperature=0, max_tokens=200, tools=[tool], tool_choice=choice).json()["choices"][0]
    (called,) = told["message"]["tool_calls"][:1]
    assert told["finish_reason"] == "tool_calls" and called["function"]["name"] == "weather"
    assert json.loads(called["function"]["arguments"])["city"] in ("Köln", "Bonn")


@pytest.mark.parametrize(
    "field",
    [{"grammar": "root ::= ("}, {"guided_regex": "("}, {"json_schema": {"type": "nothing"}},
     {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/none"}}}}],
)  # fmt: skip
def test_forms_that_are_wrong(field: dict[str, Any]) -> None:
    answer = ask(**field)
    assert answer.status == 400 and "\n" not in error(answer)["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"messages": NaN}', b'{"a":' * 30000, b'{"n": ' + b"9" * 6000 + b"}"],
)
def test_bodies_that_are_none(body: bytes) -> None:
    answer = call(app(make_model()), "POST", PATH, body)
    assert answer.status == 400 and error(answer)["message"]


def test_half_characters() -> None:
    body = b'{"messages": [{"role": "user", "content": "a\\ud83d b \\ud83d\\ude00"}]}'
    told = call(app(make_model(lambda before: before)), "POST", PATH, body).json()
    assert told["choices"][0]["message"]["content"] == "(u)a\ufffd b \U0001f600"


def test_what_goes_wrong_in_a_stream_is_said_there() -> None:
    model = make_model()

    def fail() -> None:
        raise MemoryError

    runtime_of(model).on_batch = fail
    answer = ask(model, stream=True)
    assert answer.status == 200 and answer.ended
    assert answer.events[-1]["error"]["type"] == "unavailable_error"
    assert ask(model).status == 503


# Waiting and leaving


def wait_until(what: Any) -> Any:
    async def wait() -> None:
        end = time.monotonic() + 60
        while not what():
            assert time.monotonic() < end
            await asyncio.sleep(0.005)

    return wait()


def test_a_stream_says_that_it_lives_while_the_prompt_is_read() -> None:
    model = make_model()
    event = hold(model)
    served = app(model, ping_seconds=0.01)

    def seen(answer: Answer) -> bool:
        if answer.text.count(":\n\n") >= 3:
            event.set()
        return False

    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    answer = asyncio.run(request(served, "POST", PATH, body, leave_when=seen))
    assert answer.text.index('"role":"assistant"') < answer.text.index("\n:\n\n") < answer.text.index('"content":"H"')


@pytest.mark.parametrize("path", [PATH, "/completion"])
def test_a_stream_says_how_far_the_prompt_has_been_read(path: str) -> None:
    model = make_model()
    event = hold(model)
    served = app(model, ping_seconds=0.01)

    def seen(answer: Answer) -> bool:
        if answer.text.count("prompt_progress") >= 3:
            event.set()
        return False

    body = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "stream": True, "return_progress": True}
    answer = asyncio.run(request(served, "POST", path, body, leave_when=seen))
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    told = [event["prompt_progress"] for event in events if "prompt_progress" in event]
    assert {one["total"] for one in told} == {told[0]["total"]} and all(one["processed"] >= 0 for one in told)
    times = [one["time_ms"] for one in told]
    assert times == sorted(times) and times[-1] > times[0] >= 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_the_prompt_is_read(stream: bool) -> None:
    model = make_model()
    event = hold(model)
    served = app(model)

    async def main() -> Answer:
        leave = asyncio.Event()
        body = {"messages": [{"role": "user", "content": "x" * 300}], "stream": stream}
        task = asyncio.create_task(request(served, "POST", PATH, body, leave=leave))
        await wait_until(lambda: runtime_of(model).evaluated)
        leave.set()
        answer = await asyncio.wait_for(task, 30)  # a model that is held goes on after 60
        event.set()
        await wait_until(lambda: model.activity.running + model.activity.waiting == 0)
        assert served.state.turns.running == 0
        return answer

    assert asyncio.run(main()).ended is False
    assert sum(map(len, runtime_of(model).evaluated)) < 300


def test_a_client_that_leaves_a_stream() -> None:
    model = make_model("x" * 300)
    runtime, left = runtime_of(model), threading.Event()
    # Or all is computed before the event loop comes round.
    runtime.on_batch = lambda: len(runtime.evaluated) < 100 or left.wait(60)
    served = app(model)
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}

    async def main() -> None:
        await request(served, "POST", PATH, body, leave_when=lambda answer: answer.text.count("data:") > 3)
        left.set()
        await wait_until(lambda: model.activity.running == 0)

    asyncio.run(main())
    assert len(runtime.evaluated) < 200
    assert served.state.metrics.finished["abort"] == 1


def test_a_queue_that_is_full() -> None:
    model = make_model()
    event = hold(model)
    served = app(model, parallel=1, max_queue=1)
    body = {"messages": [{"role": "user", "content": "Hi"}]}

    async def main() -> None:
        first = asyncio.create_task(request(served, "POST", PATH, body))
        await wait_until(lambda: served.state.turns.running == 1)
        leave = asyncio.Event()
        gone = asyncio.create_task(request(served, "POST", PATH, body, leave=leave))
        await wait_until(lambda: served.state.turns.waiting == 1)
        refused = await request(served, "POST", PATH, body)
        assert refused.status == 503 and refused.headers["retry-after"] == "2"
        leave.set()  # who leaves while he waits makes room for another
        await gone
        assert served.state.turns.waiting == 0
        second = asyncio.create_task(request(served, "POST", PATH, body | {"stream": True}))
        await wait_until(lambda: served.state.turns.waiting == 1)
        event.set()
        assert (await first).status == 200
        assert "there" in "".join(delta.get("content", "") for delta in deltas(await second)) + "there"
        assert served.state.turns.running == served.state.turns.waiting == 0

    asyncio.run(main())


def test_many_at_once_get_their_own_answers() -> None:
    served = app(make_model(lambda before: before.rpartition(")")[2].upper()), parallel=4)

    async def main() -> None:
        bodies = [{"messages": [{"role": "user", "content": f"abc{i}"}], "stream": i % 2 == 0} for i in range(20)]
        answers = await asyncio.gather(*(request(served, "POST", PATH, body) for body in bodies))
        for i, answer in enumerate(answers):
            if i % 2:
                said = answer.json()["choices"][0]["message"]["content"]
            else:
                said = "".join(delta.get("content", "") for delta in deltas(answer))
            assert said == f"ABC{i}"

    asyncio.run(main())


def test_a_model_that_is_stopped() -> None:
    model = make_model("x" * 300)
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    served = app(model)
    runtime, stopped = runtime_of(model), threading.Event()
    runtime.on_batch = lambda: len(runtime.evaluated) < 100 or stopped.wait(60)

    def stop(answer: Answer) -> bool:
        if answer.text.count("data:") > 3:
            model.stop()
            stopped.set()
        return False

    answer = asyncio.run(request(served, "POST", PATH, body, leave_when=stop))
    assert answer.ended and answer.events[-1]["error"]["type"] == "unavailable_error"


STRICT = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
    "{% if m.role == 'developer' %}{{ raise_exception('Unexpected message role.') }}{% endif %}"
    "{% if not loop.first and m.role == messages[loop.index0 - 1].role %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "({{ m.role[0] }}){{ m.content }}{% endfor %}~"
)


def test_conversations_that_templates_refuse_are_brought_into_form() -> None:
    model = make_model(lambda before: before, template=STRICT)
    messages = [
        {"role": "developer", "content": "D"}, {"role": "user", "content": "a"}, {"role": "user", "content": "b"},
        {"role": "system", "content": "S"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"},
    ]  # fmt: skip
    told = ask(model, messages=messages).json()["choices"][0]["message"]["content"]
    assert told == "(s)D\n\nS(u)a\n\nb(a)c(u)d"


def test_tools_without_the_object_around() -> None:
    flat = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}
    seen = ask(make_model(lambda before: before), tools=[flat]).json()["choices"][0]["message"]["content"]
    assert seen.startswith("[weather]")
    for wrong in ({"type": "function"}, {"type": "function", "function": 3}, {"name": 3}):
        told = error(ask(tools=[WEATHER, wrong]))
        assert (told["param"], told["message"]) == ("tools", "tools[1] has no function")


@pytest.mark.parametrize(
    ("field", "value"),
    [("top_p", 1.5), ("min_p", 9), ("messages", [{"role": "user", "content": 3}]), ("tools", [{"function": {}}]),
     ("logit_bias", {"99999": 1}), ("lora", "none")],
)  # fmt: skip
def test_fields_that_the_engine_finds_wrong_are_named(field: str, value: Any) -> None:
    assert error(ask(**{field: value}))["param"] == field


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("field", ["temperature", "presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_numbers_that_are_large(field: str) -> None:
    assert ask(**{field: 1e308}, max_tokens=3).status == 200
