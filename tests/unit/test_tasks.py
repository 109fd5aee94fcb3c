"""Questions with right and wrong answers: files, scores, and `qrun perplexity --tasks`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import TEXT, write_tiny_model

from qrun.cli import main
from qrun.cli.loading import RunOptions, open_runtime
from qrun.engine import Model, Tokenizer
from qrun.engine.judging.tasks import Answers, Task, answer, context_needed, read_tasks, scores
from qrun.engine.program.runtime import Runtime


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tiny_model(folder / "model.gguf")
    (folder / "text.txt").write_text(TEXT)
    return folder


def test_an_answer_is_scored_by_the_log_probability_of_its_tokens_for_each_byte(folder: Path) -> None:
    task = Task("The clocks were ", ("striking", "loud"), ("thirteen", "in April", "x"))
    with Model.load(folder / "model.gguf", context=64, threads=1) as model:
        assert model.tokenizer is not None
        scores = []
        for each in task.answers:
            tokens = model.tokenize(task.question + each)
            logits = model.logits(tokens).astype(np.float64)
            chances = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            first = len(model.tokenize(task.question))
            found = sum(chances[i - 1, tokens[i]] for i in range(first, len(tokens)))
            scores.append(found / len(each.encode()))
        best = int(np.argmax(scores))
        with open_runtime(folder / "model.gguf", RunOptions(1), 64) as runtime:
            result = answer(runtime, model.tokenizer, [task])
        assert result.chosen == [best] and result.answered == [best < 2]
        assert context_needed(model.tokenizer, [task]) == max(
            len(model.tokenize(task.question + each)) for each in task.answers
        )


@pytest.mark.parametrize("architecture", ["llama-dense", "gemma3-dense", "qwen3moe-moe"])
def test_a_question_is_read_once_and_every_score_is_that_of_its_answer_alone(
    architecture: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = TEXT[:120]  # longer than the windows of attention
    task = Task(question, ("striking", "t"), ("thirteen", " in April it was", "x" * 30))
    path = write_tiny_model(tmp_path / "model.gguf", architecture=architecture)
    read: list[int] = []
    evaluate = Runtime.evaluate

    def counted(runtime: Runtime, sequence: Any, tokens: Any, *more: Any, **options: Any) -> Any:
        read.append(len(tokens))
        return evaluate(runtime, sequence, tokens, *more, **options)

    tokenizer = Tokenizer.load(path)
    with open_runtime(path, RunOptions(2), 256) as runtime:
        alone = [scores(runtime, tokenizer, Task(question, (each,), ())) for each in task.answers]
        monkeypatch.setattr(Runtime, "evaluate", counted)
        assert [[score] for score in scores(runtime, tokenizer, task)] == alone
    n_question = len(tokenizer.encode(question, add_special=True))
    n_answers = sum(len(tokenizer.encode(question + each, add_special=True)) - n_question for each in task.answers)
    assert sum(read) <= n_question + n_answers + 2 * len(task.answers)


def test_a_right_answer_that_is_no_better_than_a_wrong_one_is_no_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.load(folder / "model.gguf")
    with open_runtime(folder / "model.gguf", RunOptions(1), 64) as runtime:
        assert answer(runtime, tokenizer, [Task("clock ", ("x",), ("x",))]).answered == [False]
        likely, unlikely = sorted(
            ("x", "thirteen"), key=lambda each: -scores(runtime, tokenizer, Task("clock ", (each,), ()))[0]
        )
        assert answer(runtime, tokenizer, [Task("clock ", (unlikely, likely), (unlikely,))]).answered == [True]
        assert answer(runtime, tokenizer, [Task("clock ", (unlikely,), (likely, unlikely))]).answered == [False]


def test_what_two_models_agree_on() -> None:
    one, other = Answers([0, 1, 2, 0], [True, True, False, True]), Answers([0, 2, 2, 1], [True, False, False, True])
    assert one.accuracy.value == 0.75
    assert one.agreement(other).value == 0.5


def test_tasks_are_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"question": "a", "right": "b", "wrong": ["c", "d"]}\n\n'
                    '{"question": "e", "right": ["f"], "wrong": "g"}\n')  # fmt: skip
    assert read_tasks(path) == [Task("a", ("b",), ("c", "d")), Task("e", ("f",), ("g",))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has no questions"),
        (b"{", "line 1: it is no JSON"),
        (b"[]", "line 1: it has no"),
        (b'{"question": "", "right": "a", "wrong": "b"}', "line 1: it has no"),
        (b'{"question": "q", "right": "a", "wrong": []}', 'line 1: "wrong" is to be'),
        (b'{"question": "q", "right": "a", "wrong": [""]}', 'line 1: "wrong" is to be'),
        (b'{"question": "q", "wrong": "a"}', 'line 1: "right" is to be'),
        (b'{"question": "q", "right": "a", "wrong": ["c", "a"]}', "line 1: 'a' is a right answer and a wrong one"),
        (b'{"question": "q", "right": "a", "wrong": "\\udc00"}', "line 1: half of a surrogate pair"),
        (b"\xff", "no UTF-8 text"),
    ],
)
def test_files_that_hold_no_tasks_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_tasks(path)
    assert str(path) in str(caught.value)


def test_a_model_that_is_compared_with_itself_gives_the_same_answers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = tmp_path / "tasks.jsonl"
    lines = [{"question": f"clock {i} ", "right": "strikes", "wrong": ["is", f"falls {i}"]} for i in range(6)]
    tasks.write_text("\n".join(map(json.dumps, lines)))
    model = folder / "model.gguf"
    words = ["perplexity", model, folder / "text.txt", "--ctx", 64, "--chunks", 1, "--tasks", tasks]
    assert main.main([str(word) for word in [*words, "--against", model]]) == 0
    text = capsys.readouterr().out
    assert "of 6 questions answered, by the reference" in text and "the same answer to 100.0%" in text
    assert main.main([str(word) for word in [*words, "--json"]]) == 0
    found = json.loads(capsys.readouterr().out)["tasks"]
    assert found["count"] == 6 and 0 <= found["answered"] <= 1
