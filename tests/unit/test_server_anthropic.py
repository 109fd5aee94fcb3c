"""Anthropic's interface."""

from __future__ import annotations

import json
from typing import Any

import pytest
from asgi_client import Answer, call
from server_fakes import make_model

from qrun.server import app

TOOL = {"name": "weather", "description": "d", "input_schema": {"type": "object"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


def ask(model: Any = None, path: str = "/v1/messages", **body: Any) -> Answer:
    given = {"model": "claude-x", "max_tokens": 300, "messages": [{"role": "user", "content": "Hi"}]}
    return call(app(model or make_model()), "POST", path, given | body, {"anthropic-version": "2023-06-01"})


def prompt(**body: Any) -> str:
    """What the model is asked."""
    return "".join(block["text"] for block in ask(make_model(lambda before: before), **body).json()["content"])


def test_an_answer() -> None:
    told = ask().json()
    assert told["type"] == "message" and told["role"] == "assistant" and told["id"].startswith("msg_")
    assert told["content"] == [{"type": "text", "text": "Hello there."}]
    assert (told["stop_reason"], told["stop_sequence"]) == ("end_turn", None)
    assert told["usage"]["input_tokens"] == len("(u)Hi~") and told["usage"]["output_tokens"] == len("Hello there.")


def test_why_an_answer_ends() -> None:
    told = ask(max_tokens=5).json()
    assert (told["content"][0]["text"], told["stop_reason"]) == ("Hello", "max_tokens")
    told = ask(stop_sequences=["there"]).json()
    assert (told["stop_reason"], told["stop_sequence"]) == ("stop_sequence", "there")


def test_the_events_of_a_stream() -> None:
    answer = ask(make_model(f"<think>Hm.</think>Well. {CALL}"), stream=True, tools=[TOOL])
    assert answer.headers["content-type"] == "text/event-stream" and "[DONE]" not in answer.text
    assert [event["type"] for event in answer.events] == answer.event_names
    names = [name for name in answer.event_names if name != "ping"]
    assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"]
    blocks: list[dict[str, Any]] = []
    open_block = None
    for event in answer.events:
        if event["type"] == "content_block_start":
            assert open_block is None and event["index"] == len(blocks)
            open_block = event["index"]
            blocks.append(dict(event["content_block"]))
        elif event["type"] == "content_block_delta":
            assert event["index"] == open_block
            for name, value in event["delta"].items():
                if name != "type":
                    name = "input" if name == "partial_json" else name
                    blocks[-1][name] = (blocks[-1].get(name) or "") + value
        elif event["type"] == "content_block_stop":
            assert event["index"] == open_block
            open_block = None
    thought, text, use = blocks
    assert thought == {"type": "thinking", "thinking": "Hm.", "signature": ""}
    assert text["text"].strip() == "Well."
    assert use["name"] == "weather" and json.loads(use["input"]) == {"city": "Köln"} and use["id"].startswith("toolu_")
    delta = next(event for event in answer.events if event["type"] == "message_delta")
    assert delta["delta"]["stop_reason"] == "tool_use" and delta["usage"]["output_tokens"] > 0


def test_thoughts_and_calls_are_blocks() -> None:
    tools = [TOOL, {"type": "web_search_1", "name": "w"}]
    told = ask(make_model(f"<think>Hm.</think>{CALL}{CALL}"), tools=tools).json()
    assert [block["type"] for block in told["content"]] == ["thinking", "tool_use", "tool_use"]
    assert told["content"][1]["input"] == {"city": "Köln"} and told["stop_reason"] == "tool_use"
    told = ask(
        make_model(CALL + CALL), tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True}
    ).json()
    assert len(told["content"]) == 1


def test_conversations_in_blocks() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "b"}, {"type": "tool_use", "id": "1", "name": "weather", "input": {"x": 1}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "1", "is_error": True, "content": [{"type": "text", "text": "c"}]},
            {"type": "text", "text": "d"}, {"type": "tool_reference", "tool_name": "x"}]},
    ]  # fmt: skip
    call = '<tool_call>\n{"name": "weather", "arguments": {"x": 1}}\n</tool_call>'
    text = prompt(messages=messages, system=[{"type": "text", "text": "S"}])
    assert text == f"(s)S(u)a(a)b\n{call}(t)Error: c(u)d"


def test_what_changes_in_each_request_is_left_out_of_the_prompt() -> None:
    line = "x-anthropic-billing-header: cc_version=2.1; cch=a1b2c;"
    with_it = prompt(system=[{"type": "text", "text": line}, {"type": "text", "text": "S"}])
    assert with_it == prompt(system="S") == prompt(system=f"{line}\nS") == "(s)S(u)Hi"


def test_an_answer_that_was_begun_goes_on() -> None:
    begun = [{"type": "text", "text": "Hello"}]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": begun}]
    assert ask(messages=messages).json()["content"][0]["text"] == " there."


def test_counting() -> None:
    answer = ask(path="/v1/messages/count_tokens?beta=true", system="S")
    assert answer.json() == {"input_tokens": len("(s)S(u)Hi~")}


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []}, {"messages": [{"role": "tool", "content": "x"}]}, {"messages": [{"role": "user"}]},
        {"messages": [3]}, {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"system": 3}, {"tools": [3]}, {"max_tokens": "x"},
        {"tool_choice": {"type": "tool", "name": "other"}, "tools": [TOOL]},
        {"output_config": {"format": {"type": "json_schema"}}},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [{"type": "image"}]}]}]},
    ],
)  # fmt: skip
def test_errors_have_their_shape(body: dict[str, Any]) -> None:
    answer = ask(**body)
    told = answer.json()
    assert answer.status == 400 and told["type"] == "error"
    assert told["error"]["type"] == "invalid_request_error" and told["error"]["message"]


def test_a_prompt_that_is_too_long() -> None:
    message = ask(messages=[{"role": "user", "content": "x" * 500}]).json()["error"]["message"]
    assert message.startswith("prompt is too long: 504 tokens > 400 maximum")


def test_documents_are_read() -> None:
    blocks = [
        {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "abc"}},
        {"type": "document", "context": "C", "source": {"type": "content", "content": [{"type": "text", "text": "d"}]}},
        {"type": "document", "source": {"type": "content", "content": "e"}},
        {"type": "search_result", "source": "s", "title": "t", "content": [{"type": "text", "text": "f"}]},
        {"type": "text", "text": "Which?"},
    ]
    told = prompt(messages=[{"role": "user", "content": blocks}])
    assert told == "(u)T\nabc\n\nC\nd\n\ne\n\nt\ns\nf\n\nWhich?"
    result = {"type": "tool_result", "tool_use_id": "1", "content": [blocks[0], {"type": "text", "text": "x"}]}
    use = {"type": "tool_use", "id": "1", "name": "weather", "input": {}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [use]},
                {"role": "user", "content": [result]}]  # fmt: skip
    assert prompt(messages=messages).endswith("(t)T\nabc\nx")


@pytest.mark.parametrize(
    "block",
    [{"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AA"}},
     {"type": "document", "source": {"type": "url", "url": "http://example.org"}}, {"type": "document"},
     {"type": "document", "source": {"type": "text"}}, {"type": "search_result", "content": [{"type": "image"}]},
     {"type": "document", "source": {"type": "content", "content": [{"type": "image", "source": {}}]}}],
)  # fmt: skip
def test_documents_that_are_no_text(block: dict[str, Any]) -> None:
    answer = ask(messages=[{"role": "user", "content": [block]}])
    assert answer.status == 400 and "messages.0.content.0" in answer.json()["error"]["message"]


def test_models_as_these_clients_read_them() -> None:
    served = app(make_model())
    headers = {"anthropic-version": "2023-06-01"}
    told = call(served, "GET", "/v1/models?limit=1000", headers=headers).json()
    assert (told["has_more"], told["first_id"], told["last_id"]) == (False, "fake", "fake")
    (one,) = told["data"]
    assert (one["id"], one["type"], one["display_name"]) == ("fake", "model", "fake") and one["created_at"][-1] == "Z"
    assert (one["max_input_tokens"], one["max_tokens"], one["capabilities"]) == (400, 400, None)
    assert call(served, "GET", "/v1/models/fake", headers=headers).json() == one
    error = call(served, "GET", "/v1/models/other", headers=headers).json()
    assert error["type"] == "error" and error["error"]["type"] == "not_found_error"
    others = call(served, "GET", "/v1/models").json()
    assert set(others) == {"object", "data"} and "type" not in others["data"][0]
