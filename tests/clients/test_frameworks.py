"""Libraries that other programs are built with, against the default model: `make test-clients`.

A model of this size seldom says what one hopes for. What it says is held to a schema where that is what is tested.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import pytest

MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


class TestLiteLLM:
    @pytest.fixture
    def options(self, url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks GitHub
        pytest.importorskip("litellm")
        return {"model": "openai/m", "api_base": f"{url}/v1", "api_key": "none", "messages": MESSAGES}

    def test_answers(self, options: Any) -> None:
        import litellm

        answer: Any = litellm.completion(**options, max_tokens=30)
        assert "Paris" in answer.choices[0].message.content and answer.usage.completion_tokens > 0
        parts = list(litellm.completion(**options, stream=True, stream_options={"include_usage": True}))
        assert "Paris" in "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        again: Any = asyncio.run(litellm.acompletion(**options, max_tokens=30))  # type: ignore[arg-type]
        assert "Paris" in again.choices[0].message.content

    def test_calls(self, options: Any) -> None:
        import litellm

        choice = {"type": "function", "function": {"name": "weather"}}
        for stream in (False, True):
            answer: Any = litellm.completion(**options, tools=[WEATHER], tool_choice=choice, stream=stream)
            if stream:
                answer = litellm.stream_chunk_builder(list(answer))
            (call,) = answer.choices[0].message.tool_calls
            assert call.function.name == "weather" and set(json.loads(call.function.arguments)) == {"city", "days"}
            assert answer.choices[0].finish_reason == "tool_calls"

    def test_other_interfaces(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        litellm = pytest.importorskip("litellm")
        bases = {"anthropic/claude": url, "ollama_chat/m": url, "text-completion-openai/m": f"{url}/v1"}
        for model, base in bases.items():
            talk = [{"role": "user", "content": "The capital of France is"}] if "text" in model else MESSAGES
            answer = litellm.completion(model, talk, api_base=base, api_key="none", max_tokens=30, temperature=0)
            assert "Paris" in answer.choices[0].message.content
            assert answer.usage.completion_tokens > 0

    def test_errors(self, options: Any) -> None:
        import litellm

        options["messages"] = [{"role": "user", "content": "x " * 9000}]
        with pytest.raises(litellm.exceptions.ContextWindowExceededError):
            litellm.completion(**options)


class TestLangChain:
    @pytest.fixture
    def chat(self, url: str) -> Any:
        langchain = pytest.importorskip("langchain_openai")
        return langchain.ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="m", max_tokens=120, temperature=0)

    def test_answers(self, chat: Any) -> None:
        answer = chat.invoke("What is the capital of France?")
        assert "Paris" in answer.content and answer.usage_metadata["output_tokens"] > 0
        assert "Paris" in "".join(part.content for part in chat.stream("What is the capital of France?"))
        assert all(one.content for one in chat.batch(["Say hello.", "What is your name?"]))

    def test_calls(self, chat: Any) -> None:
        answer = chat.bind_tools([WEATHER], tool_choice="weather").invoke("Rain in Oslo in the next 3 days?")
        (call,) = answer.tool_calls
        assert call["name"] == "weather" and isinstance(call["args"]["days"], int)
        from langchain_core.messages import HumanMessage, ToolMessage

        talk = [HumanMessage("Rain?"), answer, ToolMessage("No rain.", tool_call_id=call["id"])]
        assert chat.bind_tools([WEATHER]).invoke(talk).content

    @pytest.mark.parametrize("method", ["function_calling", "json_schema"])
    def test_structured_output(self, chat: Any, method: str) -> None:
        pydantic = pytest.importorskip("pydantic")
        fields = {"name": (str, pydantic.Field(max_length=20)), "size": (Literal["small", "large"], ...)}
        kind = pydantic.create_model("City", **fields)
        found = chat.with_structured_output(kind, method=method).invoke("Describe Paris.")
        assert isinstance(found, kind)


def test_llm(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    pytest.importorskip("llm")
    import llm
    from llm.default_plugins.openai_models import Chat

    chat = Chat("qrun", model_name="m", api_base=f"{url}/v1", supports_schema=True, supports_tools=True)
    chat.key = "none"
    answer = chat.prompt("What is the capital of France?", temperature=0, max_tokens=30)
    assert "Paris" in answer.text() and answer.usage().output > 0
    assert "Paris" in chat.prompt("What is the capital of France?", stream=False, temperature=0).text()
    schema: Any = {"type": "object", "properties": {"age": {"enum": [1, 2, 3]}}, "required": ["age"]}
    schema["additionalProperties"] = False
    assert set(json.loads(chat.prompt("A dog.", schema=schema, max_tokens=60).text())) == {"age"}
    talk = llm.Conversation(chat)
    talk.prompt("My name is Ada.", max_tokens=20).text()
    assert talk.prompt("What is my name?", max_tokens=20).text()


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA", "JSON"])
def test_instructor(url: str, mode: str) -> None:
    instructor = pytest.importorskip("instructor")
    openai = pytest.importorskip("openai")
    import pydantic

    fields: Any = {"name": (str, pydantic.Field(max_length=20)), "age": (int, pydantic.Field(ge=0, le=120))}
    kind = pydantic.create_model("Person", **fields)
    client = instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="none"), mode=instructor.Mode[mode])
    talk: Any = [{"role": "user", "content": "Ada is 36 years old."}]
    if mode == "JSON":  # which tells the model of the schema, and asks the server for any JSON
        talk = [{"role": "user", "content": 'Repeat: {"name": "Ada", "age": 36}'}]
    found = client.chat.completions.create(model="m", response_model=kind, messages=talk, max_tokens=100, temperature=0,
                                           max_retries=3)  # fmt: skip
    assert isinstance(found, kind)
