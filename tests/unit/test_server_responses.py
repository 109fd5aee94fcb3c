"""OpenAI's `/v1/responses`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from asgi_client import Answer, call
from server_fakes import make_model, runtime_of

from qrun.server import app

TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


def ask(model: Any = None, path: str = "/v1/responses", **body: Any) -> Answer:
    return call(app(model or make_model()), "POST", path, {"model": "m", "input": "Hi"} | body)


def prompt(items: list[Any], **body: Any) -> str:
    answer = ask(make_model(lambda before: before), input=items, **body)
    assert answer.status == 200, answer.text
    text: str = answer.json()["output"][-1]["content"][0]["text"]
    return text


def test_an_answer() -> None:
    told = ask(instructions="S").json()
    assert told["object"] == "response" and told["status"] == "completed" and told["id"].startswith("resp_")
    (message,) = told["output"]
    assert message["type"] == "message" and message["role"] == "assistant" and message["status"] == "completed"
    assert message["content"][0]["text"] == "Hello there." and message["content"][0]["annotations"] == []
    assert told["usage"]["input_tokens"] == len("(s)S(u)Hi~")
    assert told["usage"]["output_tokens"] == len("Hello there.")


def test_an_answer_that_is_cut() -> None:
    told = ask(max_output_tokens=5).json()
    assert (told["status"], told["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert told["output"][-1]["status"] == "incomplete"
    assert ask(max_output_tokens=5, stream=True).event_names[-1] == "response.incomplete"


def test_the_events_of_a_stream() -> None:
    answer = ask(make_model(f"<think>Hm.</think>Well. {CALL}"), stream=True, tools=[TOOL])
    assert "[DONE]" not in answer.text
    events = answer.events
    assert [event["type"] for event in events] == answer.event_names
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert answer.event_names[:2] == ["response.created", "response.in_progress"]
    assert answer.event_names[-1] == "response.completed"
    kinds = list(dict.fromkeys(name.removeprefix("response.") for name in answer.event_names[2:-1]))
    assert kinds == [
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done",
        "output_item.done", "output_text.delta", "output_text.done", "function_call_arguments.delta",
        "function_call_arguments.done",
    ]  # fmt: skip
    done = [event for event in events if event["type"] == "response.output_item.done"]
    assert [event["output_index"] for event in done] == [0, 1, 2]
    final = events[-1]["response"]
    assert final["output"] == [event["item"] for event in done]
    reasoning, message, use = final["output"]
    assert reasoning["type"] == "reasoning" and reasoning["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert message["content"][0]["text"].strip() == "Well."
    assert use["type"] == "function_call" and json.loads(use["arguments"]) == {"city": "Köln"}
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == message["content"][0]["text"]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(stream: bool) -> None:
    answer = ask(include=["message.output_text.logprobs"], top_logprobs=2, stream=stream)
    told = answer.events[-1]["response"] if stream else answer.json()
    (part,) = told["output"][0]["content"]
    assert "".join(one["token"] for one in part["logprobs"]) == part["text"] == "Hello there."
    assert all(len(one["top_logprobs"]) == 2 and one["logprob"] <= 0 for one in part["logprobs"])
    if stream:
        deltas = [event for event in answer.events if event["type"] == "response.output_text.delta"]
        assert [one for event in deltas for one in event["logprobs"]] == part["logprobs"]
        (done,) = (event for event in answer.events if event["type"] == "response.output_text.done")
        assert done["logprobs"] == part["logprobs"]
    assert ask(top_logprobs=2).json()["output"][0]["content"][0]["logprobs"] == []


def test_tools_of_other_kinds_are_passed_over() -> None:
    tools = [{"type": kind} for kind in ("web_search", "local_shell", "image_generation", "tool_search", "namespace")]
    assert ask(tools=[*tools, TOOL], include=["reasoning.encrypted_content"], store=False).status == 200


def test_tools_that_take_a_text() -> None:
    text = '<tool_call>\n{"name": "apply_patch", "arguments": {"input": "*** Begin"}}\n</tool_call>'
    tool = {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}}
    (told,) = ask(make_model(text), tools=[tool]).json()["output"]
    assert (told["type"], told["name"], told["input"]) == ("custom_tool_call", "apply_patch", "*** Begin")
    names = ask(make_model(text), tools=[tool], stream=True).event_names
    assert "response.custom_tool_call_input.done" in names


def test_conversations_in_items() -> None:
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "D"}]},
        {"role": "user", "content": "a"},
        {"type": "reasoning", "summary": [], "content": None, "encrypted_content": "x"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        {"type": "function_call", "call_id": "1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "c"}]},
        {"type": "custom_tool_call", "call_id": "2", "name": "apply_patch", "input": "p"},
        {"type": "custom_tool_call_output", "call_id": "2", "output": "d"},
        {"type": "item_reference", "id": "x"}, {"type": "web_search_call", "id": "y"}, {"type": "what_comes_next"},
        {"role": "user", "content": "e"},
    ]  # fmt: skip
    one, two = (
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
        for name, arguments in (("weather", "{}"), ("apply_patch", '{"input": "p"}'))
    )
    assert prompt(items, instructions="S").endswith(f"D(u)a(a)b\n{one}(t)c(a){two}(t)d(u)e")


def test_counting() -> None:
    assert ask(path="/v1/responses/input_tokens").json()["input_tokens"] == len("(u)Hi~")


@pytest.mark.parametrize(
    "body",
    [
        {"input": None}, {"input": []}, {"input": 3}, {"input": [3]}, {"input": [{"role": "alien", "content": "x"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        {"input": [{"role": "user", "content": 3}]}, {"previous_response_id": "x"}, {"conversation": "x"},
        {"previous_response_id": 3}, {"prompt": {"id": "x"}},
        {"text": {"format": {"type": "json_schema", "schema": {"type": "nothing"}}}}, {"tools": [3]},
        {"instructions": 3}, {"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}},
        {"input": [{"type": "function_call", "arguments": "{}"}]},
    ],
)  # fmt: skip
def test_what_is_wrong(body: dict[str, Any]) -> None:
    answer = ask(**body)
    assert answer.status == 400 and answer.json()["error"]["message"]


def test_what_goes_wrong_in_a_stream() -> None:
    model = make_model()

    def fail() -> None:
        raise MemoryError

    runtime_of(model).on_batch = fail
    answer = ask(model, stream=True)
    assert answer.event_names[-1] == "response.failed" and answer.ended
    assert answer.events[-1]["response"]["error"]["message"]


# What is stored


def follow(served: Any, **body: Any) -> dict[str, Any]:
    answer = call(served, "POST", "/v1/responses", {"model": "m", **body})
    return answer.events[-1]["response"] if body.get("stream") else answer.json()


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_goes_on_from_an_answer(stream: bool) -> None:
    served = app(make_model(lambda before: before))
    first = follow(served, input="a", instructions="be brief", stream=stream)
    assert first["store"] is True and first["previous_response_id"] is None
    second = follow(served, input=[{"role": "user", "content": "b"}], previous_response_id=first["id"], stream=stream)
    assert second["output"][0]["content"][0]["text"] == "(u)a(a)(s)be brief(u)a(u)b"  # instructions are of one request
    assert second["previous_response_id"] == first["id"]
    third = follow(served, input="c", previous_response_id=second["id"])
    assert third["output"][0]["content"][0]["text"].startswith("(u)a(a)(s)be brief(u)a(u)b(a)(u)a")
    other = follow(served, input="d", previous_response_id=first["id"])  # from the same answer, elsewhere
    assert other["output"][0]["content"][0]["text"] == "(u)a(a)(s)be brief(u)a(u)d"
    count = call(served, "POST", "/v1/responses/input_tokens", {"input": "b", "previous_response_id": first["id"]})
    assert count.json()["input_tokens"] == len("(u)a(a)(s)be brief(u)a(u)b~")


def test_results_of_calls_go_on_from_an_answer() -> None:
    served = app(make_model(lambda before: CALL if "(t)" not in before else before))
    first = follow(served, input="a", tools=[TOOL])
    (made,) = (item for item in first["output"] if item["type"] == "function_call")
    result = {"type": "function_call_output", "call_id": made["call_id"], "output": "rain"}
    second = follow(served, input=[result], tools=[TOOL], previous_response_id=first["id"])
    assert second["output"][-1]["content"][0]["text"] == "(t)rain"


def test_stored_answers_can_be_read_and_deleted() -> None:
    served = app(make_model())
    told = follow(served, input="a", metadata={"x": "y"})
    path = f"/v1/responses/{told['id']}"
    assert call(served, "GET", path).json() == told
    given = call(served, "GET", f"{path}/input_items").json()
    (one,) = given["data"]
    assert (one["type"], one["role"]) == ("message", "user") and one["content"] == [{"type": "input_text", "text": "a"}]
    assert call(served, "DELETE", path).json() == {"id": told["id"], "object": "response", "deleted": True}
    for method, gone in (("GET", path), ("DELETE", path), ("GET", f"{path}/input_items")):
        answer = call(served, method, gone)
        assert answer.status == 404 and answer.json()["error"]["code"] == "response_not_found"
    answer = call(served, "POST", "/v1/responses", {"input": "b", "previous_response_id": told["id"]})
    assert answer.status == 400 and answer.json()["error"]["code"] == "previous_response_not_found"


def test_what_is_not_to_be_stored_is_not() -> None:
    served = app(make_model())
    told = follow(served, input="a", store=False)
    assert told["store"] is False and call(served, "GET", f"/v1/responses/{told['id']}").status == 404
    served = app(make_model(), stored_bytes=0)
    assert call(served, "GET", f"/v1/responses/{follow(served, input='a')['id']}").status == 404


def test_the_oldest_are_forgotten_when_memory_is_full() -> None:
    size = len(json.dumps(follow(app(make_model()), input="a")))
    served = app(make_model(), stored_bytes=int(2.5 * size))
    first, second = (follow(served, input="a")["id"] for _ in range(2))
    assert call(served, "GET", f"/v1/responses/{first}").status == 200  # which is asked for again
    third = follow(served, input="a")["id"]
    found = [call(served, "GET", f"/v1/responses/{id}").status for id in (first, second, third)]
    assert found == [200, 404, 200]
