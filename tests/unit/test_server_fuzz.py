"""Whatever a client sends, and whatever a model writes: an answer, or an error that names what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from asgi_client import call
from hypothesis import given, settings
from hypothesis import strategies as st
from server_fakes import make_model

from qrun.server import app

VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8) | st.sampled_from(["user", "assistant", "tool", "auto", "text", "function", "5m"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "type", "text", "name", "function", "arguments", "id", "tool_calls",
                         "input", "parameters", "enable_thinking", "format", "effort", "0", "tools"]),
        inner, max_size=4,
    ),
    max_leaves=8,
)  # fmt: skip
FIELDS = (
    "model", "messages", "prompt", "input", "content", "tokens", "stream", "stream_options", "max_tokens", "stop", "n",
    "temperature", "top_p", "top_k", "seed", "logit_bias", "logprobs", "top_logprobs", "tools", "tool_choice", "system",
    "response_format", "reasoning_effort", "reasoning", "thinking", "think", "chat_template_kwargs", "options", "echo",
    "keep_alive", "suffix", "best_of", "instructions", "text", "format", "parallel_tool_calls", "output_config",
    "continue_final_message", "input_prefix", "input_extra", "ignore_eos", "return_progress", "timings_per_token",
)  # fmt: skip
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": VALUES})
GOOD = {
    "messages": st.lists(MESSAGE, max_size=3) | st.just([{"role": "user", "content": "Hi"}]),
    "prompt": st.just("Hi"),
    "input": st.just("Hi"),
    "max_tokens": st.just(3),
}
PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
    "/api/chat", "/api/generate", "/api/show", "/tokenize", "/detokenize", "/apply-template", "/completion", "/infill",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=25)
@given(data=st.data())
def test_no_request_is_too_strange(path: str, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(FIELDS), max_size=4, unique=True))
    body = {name: data.draw(strategy) for name, strategy in GOOD.items()} | {name: data.draw(VALUES) for name in names}
    answer = call(app(make_model("<think>a</think>b<tool_call>\n{"), max_queue=4), "POST", path, body)
    assert answer.status in (200, 400, 404, 501), (body, answer.text)
    assert answer.ended
    if answer.status != 200:
        assert answer.json()["error"]
    assert "internal error" not in answer.text


MARKS = st.sampled_from([
    "<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "weather", "arguments": ', "{}", "}", "\n", "~",
    '"', "\\", "\ufffd", "é", "data: [DONE]", '{"name": 3}', "[]", "text", "\x00", "\u2028",
])  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


@settings(max_examples=60)
@given(said=st.lists(MARKS, max_size=8).map("".join), path=st.sampled_from(PATHS[:4:2]), limit=st.integers(0, 80))
def test_no_answer_is_too_strange(said: str, path: str, limit: int) -> None:
    """Streamed and whole answers tell the same."""
    served = app(make_model(said))
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "input": "Hi", "max_tokens": limit,
                            "max_output_tokens": limit, "tools": TOOLS}  # fmt: skip
    if path == "/v1/responses":
        body["tools"] = [TOOLS[0]["function"] | {"type": "function"}]  # type: ignore[operator]
    whole = call(served, "POST", path, body)
    streamed = call(served, "POST", path, body | {"stream": True})
    assert (whole.status, streamed.status) == (200, 200), whole.text
    assert "error" not in [next(iter(event)) for event in streamed.events]
    if path == "/v1/responses":
        one, other = whole.json()["output"], streamed.events[-1]["response"]["output"]
        assert [(item["type"], item.get("content"), item.get("arguments")) for item in one] == [
            (item["type"], item.get("content"), item.get("arguments")) for item in other
        ]
        return
    message = whole.json()["choices"][0]["message"]
    deltas = [choice["delta"] for event in streamed.events for choice in event["choices"]]
    for name in ("content", "reasoning"):
        assert "".join(delta.get(name) or "" for delta in deltas) == (message.get(name) or "")
    parts = [part for delta in deltas for part in delta.get("tool_calls", ())]
    calls = [json.loads(one["function"]["arguments"]) for one in message.get("tool_calls", ())]
    assert [json.loads(part["function"]["arguments"]) for part in parts if "id" not in part] == calls
