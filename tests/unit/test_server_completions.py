"""`/v1/completions` and llama-server's own paths."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asgi_client import Answer, call, request
from engine_fakes import ids_of
from server_fakes import make_model
from tiny_model import TEXT, write_tiny_model

from qrun.engine import Model
from qrun.engine.judging.scoring import Chunks, Score, negative_log_likelihoods, scored_logits
from qrun.server import app

PATH = "/v1/completions"


def ask(model: Any = None, path: str = PATH, **body: Any) -> Answer:
    return call(app(model or make_model()), "POST", path, body)


def choice(answer: Answer) -> dict[str, Any]:
    assert answer.status == 200, answer.text
    found: dict[str, Any] = answer.json()["choices"][0]
    return found


@pytest.mark.parametrize("prompt", ["say~", ["say~"], ids_of("say~"), [ids_of("say~")]])
def test_prompts_in_all_shapes(prompt: Any) -> None:
    answer = ask(prompt=prompt)
    told = choice(answer)
    assert (told["text"], told["finish_reason"], told["logprobs"]) == ("Hello there.", "stop", None)
    assert answer.json()["object"] == "text_completion"
    assert answer.json()["usage"]["prompt_tokens"] == len("say~")


def test_sixteen_tokens_where_nothing_is_said() -> None:
    told = choice(ask(make_model("x" * 99), prompt="~"))
    assert (told["text"], told["finish_reason"]) == ("x" * 16, "length")
    assert choice(ask(make_model("x" * 99), prompt="~", max_tokens=-1))["text"] == "x" * 99


def test_a_stream() -> None:
    answer = ask(prompt="~", stream=True, stream_options={"include_usage": True})
    assert answer.text.endswith("data: [DONE]\n\n")
    *events, last = answer.events
    assert "".join(event["choices"][0]["text"] for event in events) == "Hello there."
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert last["usage"]["completion_tokens"] == len("Hello there.")


def test_a_stream_counts_every_prompt_once() -> None:
    answer = ask(prompt=["a~", "bcd~"], n=2, stream=True, stream_options={"include_usage": True})
    figures = answer.events[-1]["usage"]
    assert figures["prompt_tokens"] == 6 and figures["completion_tokens"] == 4 * len("Hello there.")
    assert figures["total_tokens"] == 6 + figures["completion_tokens"]


def test_several_prompts_and_answers() -> None:
    model = make_model(lambda before: before.upper())
    told = ask(model, prompt=["a~", "b~"], n=2).json()
    assert [(one["index"], one["text"]) for one in told["choices"]] == [(0, "A"), (1, "A"), (2, "B"), (3, "B")]
    assert told["usage"]["prompt_tokens"] == 4


def test_the_best_of_some() -> None:
    answers = ask(prompt="~", n=1, best_of=4, temperature=9.0, max_tokens=3, logprobs=0, seed=3, top_k=20).json()
    each = ask(prompt="~", n=4, temperature=9.0, max_tokens=3, logprobs=0, seed=3, top_k=20).json()
    means = [np.mean(one["logprobs"]["token_logprobs"]) for one in each["choices"]]
    (only,) = answers["choices"]
    assert np.mean(only["logprobs"]["token_logprobs"]) == pytest.approx(max(means))


def test_log_probabilities_as_parallel_lists() -> None:
    told = choice(ask(prompt="~", logprobs=2, max_tokens=3))["logprobs"]
    assert told["tokens"] == ["H", "e", "l"] and told["text_offset"] == [0, 1, 2]
    assert all(value <= 0 for value in told["token_logprobs"])
    for token, value, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert len(top) == 2 and top[token] == pytest.approx(value)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Model.load(write_tiny_model(Path(tmp_path_factory.mktemp("tiny")) / "tiny.gguf"), threads=1) as model:
        yield model


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_prompts_are_scored_as_perplexity_is_measured(tiny: Model, max_tokens: int, stream: bool) -> None:
    tokens = tiny.tokenize("the bright cold day in April")
    expected = -negative_log_likelihoods(tiny.logits(tokens[:-1]), tokens[1:])
    likeliest = tiny.logits(tokens[:-1]).argmax(axis=1)
    body = {"prompt": [tokens], "echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0}
    answer = call(app(tiny), "POST", PATH, body | {"stream": stream})
    if stream:
        parts = [event["choices"][0]["logprobs"] for event in answer.events if event["choices"][0]["logprobs"]]
        told = {name: [one for part in parts for one in part[name]] for name in parts[0]}
        text = "".join(event["choices"][0]["text"] for event in answer.events)
    else:
        told, text = choice(answer)["logprobs"], choice(answer)["text"]
    n = len(tokens)
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    assert told["token_logprobs"][1:n] == pytest.approx(expected.tolist())
    assert len(told["tokens"]) == n + max_tokens
    assert text.startswith("the bright cold day in April")
    assert told["text_offset"][:n] == [len(tiny.detokenize(tokens[:i])) for i in range(n)]
    for i, top in enumerate(told["top_logprobs"][1:n]):
        ((token, value),) = top.items()
        assert token == tiny.detokenize([int(likeliest[i])]) and value >= told["token_logprobs"][i + 1]


def test_a_text_scored_over_http_has_the_perplexity_that_is_measured_here(tiny: Model) -> None:
    """As lm-evaluation-harness asks: ids, echo, no or one new token, greedy."""
    assert tiny.tokenizer is not None
    chunks = Chunks.of(TEXT, tiny.tokenizer, 64, 4)
    score = Score()
    for chunk in chunks:
        for logits, targets in scored_logits(tiny._runtime, chunk, chunks.bos):
            score.add(logits, targets)
    for max_tokens in (0, 1):
        prompts = [[chunks.bos, *chunk[1:]] if chunks.bos is not None else chunk for chunk in chunks]
        body = {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0, "seed": 1}
        told = call(app(tiny), "POST", PATH, body).json()["choices"]
        found = [value for one in told for value in one["logprobs"]["token_logprobs"][33:64]]
        assert len(found) == score.count == 4 * 31
        assert np.exp(-np.mean(found)) == pytest.approx(score.perplexity.value, rel=1e-12)


@pytest.mark.parametrize("path", [PATH, "/v1/chat/completions"])
def test_prompts_in_vllms_table(tiny: Model, path: str) -> None:
    tokens = tiny.tokenize("the bright cold day")
    if path != PATH:
        tokens = tiny.template_tokens(tiny.chat_prompt("the bright cold day"))
    logits = tiny.logits(tokens[:-1])
    expected = -negative_log_likelihoods(logits, tokens[1:])
    body = {"prompt": [tokens], "messages": [{"role": "user", "content": "the bright cold day"}], "prompt_logprobs": 2,
            "max_tokens": 2}  # fmt: skip
    told = call(app(tiny), "POST", path, body).json()
    first, *table = (told if path != PATH else told["choices"][0])["prompt_logprobs"]
    assert first is None and len(table) == len(tokens) - 1
    for place, id, value, row in zip(table, tokens[1:], expected, logits, strict=True):
        assert place[str(id)]["logprob"] == pytest.approx(value)
        assert place[str(id)]["rank"] == 1 + int((row > row[id]).sum())
        assert sorted(one["rank"] for one in place.values())[:2] == [1, 2] and len(place) in (2, 3)
        assert place[str(int(row.argmax()))]["rank"] == 1
    for wrong in ({"prompt_logprobs": 21}, {"prompt_logprobs": -1}, {"prompt_logprobs": 1, "stream": True}):
        assert call(app(tiny), "POST", path, body | wrong).status == 400


def test_errors_name_one_of_several_prompts(tiny: Model) -> None:
    long = [5] * (tiny.context + 1)
    told = call(app(tiny), "POST", PATH, {"prompt": [[5], long, [6]], "max_tokens": 1})
    assert told.status == 400 and f"and prompt 2 of 3 has {len(long)}: the request exceeds" in told.text
    told = call(app(tiny), "POST", PATH, {"prompt": [long], "max_tokens": 1})
    assert told.status == 400 and f"and the prompt has {len(long)}: the request exceeds" in told.text


def test_answers_that_may_not_end_too_early() -> None:
    model = make_model(lambda before: "ab")
    told = choice(ask(model, prompt="~", min_tokens=5, max_tokens=9))
    assert told["text"].startswith("ab") and told["finish_reason"] == "stop" and len(told["text"]) >= 5
    told = choice(ask(model, prompt="~", ignore_eos=True, max_tokens=9))
    assert len(told["text"].encode()) >= 9 and told["finish_reason"] == "length"
    told = choice(ask(make_model("xxxx"), prompt="~", min_tokens=3, stop=["x"]))
    assert (told["text"], told["finish_reason"]) == ("xx", "stop")
    assert ask(model, prompt="~", min_tokens=9, max_tokens=8).status == 400


@pytest.mark.parametrize(
    ("field", "value"),
    [("prompt", None), ("prompt", []), ("prompt", [[]]), ("prompt", 3), ("prompt", ["a", 3]), ("prompt", [1.5]),
     ("prompt", [99999]), ("prompt", [-1]), ("logprobs", 99), ("logprobs", "x"), ("best_of", 0), ("echo", "perhaps"),
     ("suffix", 3), ("dry_sequence_breakers", ["a"] * 65)],
)  # fmt: skip
def test_what_is_wrong(field: str, value: Any) -> None:
    answer = ask(**({"prompt": "~"} | {field: value}))
    assert answer.status == 400, answer.text
    assert answer.json()["error"]["message"]


def infilling() -> Any:
    marks = {"tokenizer.ggml.fim_pre_token_id": 258, "tokenizer.ggml.suffix_token_id": 259,
             "tokenizer.ggml.fim_mid_token_id": 260}  # fmt: skip
    model = make_model(lambda before: before, metadata=marks)
    return model


def test_gaps_are_filled_by_models_that_have_learnt_it() -> None:
    model = infilling()
    answer = ask(model, prompt="def f(", suffix="return x", max_tokens=3)
    assert answer.status == 200
    evaluated = [id for tokens in model._runtime.evaluated for id in tokens]  # type: ignore[attr-defined]
    assert evaluated[:17] == [258, *ids_of("def f("), 259, *ids_of("return x"), 260]
    for refused in (ask(prompt="a", suffix="b"), ask(path="/infill", input_prefix="a", input_suffix="b")):
        assert refused.status == 501 and "infilling" in refused.json()["error"]["message"]


def test_infill() -> None:
    model = infilling()
    body = {"input_prefix": "a", "input_suffix": "b", "prompt": "c", "n_predict": 2}
    extra = [{"filename": "x.py", "text": "y"}]
    answer = call(app(model), "POST", "/infill", body | {"input_extra": extra})
    assert answer.status == 200 and answer.json()["tokens_predicted"] <= 2
    evaluated = [id for tokens in model._runtime.evaluated for id in tokens]
    wanted = [*ids_of("--- x.py\ny\n"), 258, *ids_of("a"), 259, *ids_of("b"), 260, *ids_of("c")]
    assert evaluated[: len(wanted)] == wanted


def test_llama_servers_completion() -> None:
    told = ask(path="/completion", prompt="~", n_predict=5).json()
    assert (told["content"], told["stop"], told["stop_type"]) == ("Hello", True, "limit")
    told = ask(path="/completion", prompt="~", stop=["there"]).json()
    assert (told["content"], told["stop_type"], told["stopping_word"]) == ("Hello ", "word", "there")
    events = ask(path="/completion", prompt="~", stream=True).events
    assert "".join(event["content"] for event in events) == "Hello there."
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["n_probs", "logprobs"])
def test_llama_servers_probabilities(stream: bool, name: str) -> None:
    answer = ask(path="/completion", prompt="~", n_predict=5, stream=stream, **{name: 2})
    whole = answer.events if stream else [answer.json()]
    told = [one for event in whole for one in event.get("completion_probabilities", ())]
    assert "".join(one["token"] for one in told) == "Hello" and [one["id"] for one in told] == ids_of("Hello")
    for one in told:
        assert set(one) == {"id", "token", "bytes", "logprob", "top_logprobs"}
        assert len(one["top_logprobs"]) == 2 and one["top_logprobs"][0]["id"] == one["id"] and one["logprob"] <= 0


def test_no_probabilities_of_llama_servers() -> None:
    for more in ({}, {"n_probs": 0}, {"n_probs": None}, {"logprobs": False}):
        assert "completion_probabilities" not in ask(path="/completion", prompt="~", **more).json()
    answer = ask(path="/completion", prompt="~", n_probs=2, post_sampling_probs=True)
    assert answer.status == 400 and answer.json()["error"]["param"] == "post_sampling_probs"
    assert ask(path="/completion", prompt="~", n_probs=21).json()["error"]["param"] == "n_probs"
    legacy = ask(prompt="~", max_tokens=5, n_probs=2).json()["choices"][0]["logprobs"]
    assert legacy["tokens"] == list("Hello")


def test_tokens_and_texts() -> None:
    told = ask(path="/tokenize", content="Hé").json()
    assert told["tokens"] == ids_of("Hé") and told["count"] == 3
    told = ask(path="/tokenize", content="Hé", with_pieces=True).json()
    assert told["tokens"][0] == {"id": ids_of("H")[0], "piece": "H"} and told["tokens"][1]["piece"] == [0xC3]
    told = ask(path="/v1/tokenize", messages=[{"role": "user", "content": "Hi"}]).json()
    assert told["tokens"] == ids_of("(u)Hi~") and told["max_model_len"] == 400
    assert ask(path="/detokenize", tokens=ids_of("Hé")).json()["content"] == "Hé"
    for wrong in ({"tokens": "x"}, {"tokens": [True]}, {"tokens": [99999]}):
        assert ask(path="/detokenize", **wrong).status == 400


def test_what_a_template_makes() -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    assert ask(path="/apply-template", messages=messages).json() == {"prompt": "(s)S(u)Hi~"}


def test_properties_and_models() -> None:
    served = app(make_model())
    told = call(served, "GET", "/props").json()
    assert told["default_generation_settings"]["n_ctx"] == 400 and "<tool_call>" in told["chat_template"]
    (model,) = call(served, "GET", "/v1/models").json()["data"]
    assert model["id"] == "fake" and model["object"] == "model"
    for name in ("context_length", "max_model_len", "loaded_context_length"):
        assert model[name] == 400
    assert {"tools", "thinking", "chat"} <= set(model["capabilities"])
    assert call(served, "GET", "/v1/models/fake").json()["id"] == "fake"
    assert call(served, "GET", "/v1/models/other").status == 404
    assert call(served, "GET", "/health").json() == {"status": "ok"}


def test_metrics() -> None:
    served = app(make_model())
    call(served, "POST", PATH, {"prompt": "say~", "max_tokens": 5})
    call(served, "POST", PATH, {"prompt": "say~", "max_tokens": 5})
    lines = call(served, "GET", "/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values["qrun:prompt_tokens_total"]) == 8 and float(values["qrun:generation_tokens_total"]) == 10
    assert float(values["qrun:prefix_cache_hits_total"]) > 0
    assert values['qrun:request_success_total{finished_reason="length"}'] == "2"
    assert values["qrun:time_to_first_token_seconds_count"] == "2"
    assert values['qrun:time_to_first_token_seconds_bucket{le="+Inf"}'] == "2"
    assert values["qrun:num_requests_running"] == "0"
    assert json.dumps(values)


def test_a_seeded_answer_is_the_same_whoever_else_asks(tiny: Model) -> None:
    def body(i: int) -> dict[str, Any]:
        return {"prompt": f"the day {i % 3} in April", "max_tokens": 12, "temperature": 1.5, "seed": i, "logprobs": 1,
                "stream": i % 2 == 0, "ignore_eos": True}  # fmt: skip

    def said(answer: Answer) -> tuple[str, list[float]]:
        told = [event["choices"][0] for event in answer.events] or [answer.json()["choices"][0]]
        values = [value for one in told if one["logprobs"] for value in one["logprobs"]["token_logprobs"]]
        return "".join(one["text"] for one in told), values

    served = app(tiny, parallel=5)
    alone = [said(call(served, "POST", PATH, body(i))) for i in range(8)]

    async def together() -> list[Answer]:
        return await asyncio.gather(*(request(served, "POST", PATH, body(i)) for i in range(8)))

    assert [said(answer) for answer in asyncio.run(together())] == alone
    assert len({text for text, _ in alone}) > 4


def test_offsets_are_those_of_characters() -> None:
    """Of a character that several tokens spell, where it begins."""
    for prompt in ("é~", ids_of("é~")):
        for stream in (False, True):
            answer = ask(make_model("à b"), prompt=prompt, echo=True, logprobs=0, stream=stream)
            choices = [event["choices"][0] for event in (answer.events if stream else [answer.json()])]
            assert "".join(choice["text"] for choice in choices) == "é~à b"
            tables = [choice["logprobs"] for choice in choices if choice["logprobs"] is not None]
            assert [offset for table in tables for offset in table["text_offset"]] == [0, 0, 1, 2, 2, 3, 4]
    told = ask(make_model("à b"), prompt="~", logprobs=0).json()["choices"][0]["logprobs"]
    assert told["text_offset"] == [0, 0, 1, 2]
