"""Texts of models that fill in masks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asgi_client import call
from click.testing import CliRunner
from test_adapter import random_adapter
from test_adapters_by_name import dense
from tiny_embedder import write_embedder

from qrun.cli.main import cli
from qrun.engine import Model
from qrun.server import app

MASK = 125
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
GREEDY: dict[str, Any] = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def load(folder: Path, name: str, context: int | None = None, **metadata: Any) -> Model:
    told = {"tokenizer.ggml.mask_token_id": MASK, "tokenizer.chat_template": TEMPLATE, **metadata}
    return Model.load(write_embedder(folder / f"{name}.gguf", name, told), threads=1, context=context)


@pytest.fixture(scope="module")
def llada(folder: Path) -> Iterator[Model]:
    with load(folder, "llada-dense", **{"diffusion.shift_logits": False}) as model:
        yield model


@pytest.fixture(scope="module")
def dream(folder: Path) -> Iterator[Model]:
    with load(folder, "dream-dense") as model:
        yield model


def filled(model: Model, prompt: list[int], length: int, block: int, steps: int, shifted: bool) -> list[int]:
    """The definition, for the likeliest tokens in the order of their probability."""
    ids = prompt + [MASK] * length
    for start in range(len(prompt), len(ids), block):
        end = min(start + block, len(ids))
        left = min(max(round(steps * (end - start) / length), 1), end - start)
        while masked := [i for i in range(start, end) if ids[i] == MASK]:
            logits = model.logits(ids)
            rows = logits[[max(i - 1, 0) if shifted else i for i in masked]]
            rows[:, MASK] = -np.inf
            chances = np.exp(rows - rows.max(1, keepdims=True))
            chances /= chances.sum(1, keepdims=True)
            best = np.argsort(-chances.max(1), kind="stable")
            for index in best[: -(-len(masked) // left)]:
                ids[masked[index]] = int(chances[index].argmax())
            left -= 1
    return ids[len(prompt) :]


@pytest.mark.parametrize(("length", "block", "steps"), [(12, 4, 12), (10, 4, 5), (9, 9, 3), (7, 3, 100)])
def test_masks_are_filled_in_as_the_definition_says(
    llada: Model, dream: Model, length: int, block: int, steps: int
) -> None:
    for model, shifted in ((llada, False), (dream, True)):
        prompt = model.tokenize("the cat")
        assert model.tokenizer is not None
        stops = model.tokenizer.stop_ids
        generation = model.generate(
            prompt, max_tokens=length, diffusion_steps=steps, diffusion_block=block, **GREEDY
        )
        pieces = list(generation)
        expected = filled(model, prompt, length, block, steps, shifted)
        assert stops.isdisjoint(expected)
        assert generation.tokens == expected and generation.stop_reason == "length"
        assert "".join(pieces) == generation.text
        assert all(piece.logprob is not None and piece.logprob <= 0 for piece in pieces if piece.token is not None)


def test_what_a_model_was_trained_for_is_the_default(llada: Model, dream: Model) -> None:
    for model, block in ((llada, 32), (dream, 0)):
        plain = model.complete("the cat", max_tokens=40, **GREEDY)
        assert plain == model.complete("the cat", max_tokens=40, diffusion_block=block, diffusion_steps=40, **GREEDY)
        other = 0 if block else 8
        assert plain != model.complete("the cat", max_tokens=40, diffusion_block=other, **GREEDY)


def test_a_seed_gives_a_text_again_in_every_order(llada: Model) -> None:
    texts = set()
    for order in ("confidence", "margin", "entropy", "random"):
        options = {"max_tokens": 16, "temperature": 1.0, "seed": 5, "diffusion_order": order, "diffusion_block": 0}
        text = llada.complete("the cat", **options)  # type: ignore[arg-type]
        assert text == llada.complete("the cat", **options)  # type: ignore[arg-type]
        texts.add(text)
    assert len(texts) > 1


def test_a_text_ends_where_the_context_or_a_stop_string_or_the_caller_ends_it(folder: Path, llada: Model) -> None:
    with load(folder, "llada-dense", 30) as model:
        generation = model.generate("the cat", **GREEDY)
        list(generation)
        assert generation.stop_reason == "context"
        assert len(generation.tokens) == 30 - len(model.tokenize("the cat"))
        full = model.generate([5] * 30, **GREEDY)
        assert "".join(full) == "" and full.stop_reason == "context"
    whole = llada.complete("the cat", max_tokens=20, **GREEDY)
    stop = whole[6:9]
    ended = llada.generate("the cat", max_tokens=20, stop=stop, **GREEDY)
    list(ended)
    assert ended.stop_reason == "stop" and ended.text == whole[: whole.index(stop)]
    cancelled = llada.generate("the cat", **GREEDY)
    next(cancelled)
    cancelled.cancel()
    assert "".join(cancelled) == "" and cancelled.stop_reason == "cancelled"
    assert llada.complete("the cat", max_tokens=0) == ""


def test_what_ends_a_text_ends_its_computation(folder: Path, llada: Model) -> None:
    first = llada.generate("the cat", max_tokens=12, diffusion_block=4, **GREEDY)
    list(first)
    end = next(token for token in first.tokens[2:] if first.tokens.index(token) >= 2)
    metadata = {"diffusion.shift_logits": False, "tokenizer.ggml.eos_token_id": int(end)}
    with load(folder, "llada-dense", **metadata) as model:
        generation = model.generate("the cat", max_tokens=12, diffusion_block=4, **GREEDY)
        list(generation)
        assert generation.stop_reason == "stop"
        assert generation.tokens == first.tokens[: first.tokens.index(end)]


def test_conversations_and_the_command_line(folder: Path, llada: Model) -> None:
    generation = llada.chat("the cat", max_tokens=6, **GREEDY)
    list(generation)
    assert len(generation.tokens) == 6 and generation.prompt_progress == (6, 6)
    path = llada.path
    flags = ["--max-tokens", "6", "--temperature", "0", "--diffusion-steps", "3", "--diffusion-block", "6"]
    done = CliRunner().invoke(cli, ["run", str(path), "the cat", "--json", *flags])
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    expected = llada.generate("the cat", max_tokens=6, diffusion_steps=3, diffusion_block=6, temperature=0)
    list(expected)
    assert told["tokens"] == expected.tokens
    info = CliRunner().invoke(cli, ["info", str(path)])
    assert "text by diffusion" in info.stdout
    text = folder / "text.txt"
    text.write_text("the cat sat on the mat " * 30)
    done = CliRunner().invoke(cli, ["perplexity", str(path), str(text), "--ctx", "32"])
    assert done.exit_code != 0 and "no perplexity" in str(done.exception)
    bad = CliRunner().invoke(cli, ["run", str(path), "a", "--diffusion-order", "last"])
    assert bad.exit_code == 2 and "confidence" in bad.stderr


def test_the_server_answers(llada: Model) -> None:
    body = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 6, "temperature": 0}
    served = app({"llada": llada})
    told = call(served, "POST", "/v1/chat/completions", body | {"diffusion_steps": 2}).json()
    assert told["usage"]["completion_tokens"] == 6
    streamed = call(served, "POST", "/v1/chat/completions", body | {"stream": True, "diffusion_steps": 2}).events
    text = "".join(one["choices"][0]["delta"].get("content") or "" for one in streamed if one["choices"])
    assert text == told["choices"][0]["message"]["content"]


def test_what_such_a_model_cannot_is_said(folder: Path, llada: Model) -> None:
    with pytest.raises(ValueError, match="diffusion_order must be one of"):
        llada.generate("a", diffusion_order="last")
    for wrong in ({"diffusion_steps": 0}, {"diffusion_block": -1}):
        with pytest.raises(ValueError, match="must be at least"):
            llada.generate("a", **wrong)  # type: ignore[arg-type]
    with load(folder, "dream-dense", **{"tokenizer.ggml.mask_token_id": 500}) as model:
        with pytest.raises(ValueError, match="names no mask"):
            model.complete("a")
        assert model.logits([1, 2, 3]).shape == (3, model.graph.n_vocab)
    with pytest.raises(ValueError, match="a draft is for models that write one token after the other"):
        Model.load(llada.path, draft="mtp")
    assert llada.embed("the cat").shape == (1, llada.graph.n_embd)


def test_adapters_change_what_is_filled_in(rng: np.random.Generator, folder: Path, tmp_path: Path) -> None:
    told = {"tokenizer.ggml.mask_token_id": MASK, "diffusion.shift_logits": False}
    path = write_embedder(tmp_path / "model.gguf", "llada-dense", told)
    adapter = random_adapter(rng, path, tmp_path / "a.gguf", names=dense(path))
    with (
        Model.load(path, threads=1, adapters={"a": adapter}) as model,
        Model.load(path, threads=1, loras=[adapter]) as same,
    ):
        for chosen, expected in (({"lora": "a"}, same), ({}, model)):
            generation = model.generate([5, 6, 7], max_tokens=8, diffusion_block=4, **GREEDY, **chosen)
            list(generation)
            tokens = filled(expected, [5, 6, 7], 8, 4, 8, shifted=False)
            stops = model.tokenizer.stop_ids if model.tokenizer else frozenset()
            end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
            assert generation.tokens == tokens[:end]
