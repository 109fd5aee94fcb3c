"""The official clients, against the default model over a real socket: `make test-clients`."""

from __future__ import annotations

import json
from typing import Any

import pytest

MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]
TOOLS: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


# OpenAI


@pytest.fixture(scope="module")
def openai_client(url: str) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none")


def test_openai_models(openai_client: Any) -> None:
    (model,) = openai_client.models.list().data
    assert openai_client.models.retrieve(model.id).id == model.id


def test_openai_chat(openai_client: Any) -> None:
    answer = openai_client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=30)
    assert "Paris" in answer.choices[0].message.content and answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_openai_streams(openai_client: Any) -> None:
    chunks = list(openai_client.chat.completions.create(
        model="m", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, n=2, logprobs=True,
        top_logprobs=2, max_completion_tokens=20, seed=1,
    ))  # fmt: skip
    for index in (0, 1):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "Paris" in "".join(choice.delta.content or "" for choice in choices)
        assert choices[-1].finish_reason == "stop"
        assert any(choice.logprobs and len(choice.logprobs.content[0].top_logprobs) == 2 for choice in choices)
    assert chunks[-1].usage.completion_tokens > 0


def test_openai_gathers_streams(openai_client: Any) -> None:
    with openai_client.chat.completions.stream(model="m", messages=MESSAGES, tools=TOOLS, max_tokens=20) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content


def test_openai_completions(openai_client: Any) -> None:
    answer = openai_client.completions.create(model="m", prompt="The capital of France is", max_tokens=5, logprobs=2,
                                              echo=True, temperature=0)  # fmt: skip
    choice = answer.choices[0]
    assert choice.text.startswith("The capital of France is")
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.token_logprobs[1] < 0
    text = "".join(chunk.choices[0].text for chunk in openai_client.completions.create(
        model="m", prompt="The capital of France is", max_tokens=5, stream=True, temperature=0))  # fmt: skip
    assert choice.text == "The capital of France is" + text


def test_openai_responses(openai_client: Any) -> None:
    answer = openai_client.responses.create(model="m", input="What is the capital of France?", max_output_tokens=30)
    assert "Paris" in answer.output_text and answer.status == "completed"
    with openai_client.responses.stream(model="m", input=MESSAGES, instructions="Answer briefly.") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text


def test_openai_errors(openai_client: Any) -> None:
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x " * 9000}])
    assert caught.value.code == "context_length_exceeded" and "maximum context length" in str(caught.value)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        openai_client.chat.completions.create(model="m", messages=MESSAGES, temperature="hot")


# Anthropic


@pytest.fixture(scope="module")
def anthropic_client(url: str) -> Any:
    anthropic = pytest.importorskip("anthropic")
    return anthropic.Anthropic(base_url=url, api_key="none")


def test_anthropic_messages(anthropic_client: Any) -> None:
    answer = anthropic_client.messages.create(model="claude", max_tokens=30, messages=MESSAGES)
    assert "Paris" in answer.content[0].text and answer.stop_reason == "end_turn"
    with anthropic_client.messages.stream(model="claude", max_tokens=30, messages=MESSAGES) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert "Paris" in text and final.content[0].text == text and final.usage.output_tokens > 0
    count = anthropic_client.messages.count_tokens(model="claude", messages=MESSAGES).input_tokens
    assert count == final.usage.input_tokens + final.usage.cache_read_input_tokens


def test_anthropic_errors(anthropic_client: Any) -> None:
    anthropic = pytest.importorskip("anthropic")
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        long = [{"role": "user", "content": "x " * 9000}]
        anthropic_client.messages.create(model="claude", max_tokens=5, messages=long)


# Ollama


@pytest.fixture(scope="module")
def ollama_client(url: str) -> Any:
    return pytest.importorskip("ollama").Client(host=url)


def test_ollama(ollama_client: Any) -> None:
    name = ollama_client.list().models[0].model
    shown = ollama_client.show(name)
    assert shown.modelinfo["llama.context_length"] == 4096 and "completion" in shown.capabilities
    assert ollama_client.ps().models[0].model == name
    answer = ollama_client.chat(name, messages=MESSAGES, options={"num_predict": 30})
    assert "Paris" in answer.message.content and answer.done_reason == "stop"
    parts = list(ollama_client.chat(name, messages=MESSAGES, stream=True))
    assert "Paris" in "".join(part.message.content for part in parts) and parts[-1].eval_count > 0
    assert ollama_client.generate(name, "Say hello", options={"num_predict": 5}).response
    parts = list(ollama_client.generate(name, "Say hello", stream=True, options={"num_predict": 5}))
    assert parts[-1].done_reason == "length"
    assert json.loads(parts[-1].model_dump_json())["done"]
