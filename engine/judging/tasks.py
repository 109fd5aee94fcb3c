"""Questions with right and wrong answers: which of them a model holds to be likelier.

A file has a JSON object in each line: {"question": "...", "right": "...", "wrong": ["...", ...]}; "right" can be a list
too. Answers follow the question as they are, so that they begin with a space where the text is to have one. An answer
is scored by the sum of its tokens' log probabilities, and to compare answers of different lengths, by that sum for each
byte. A question counts as answered if the best right answer has a better score than all wrong ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qrun.engine.judging.scoring import Estimate, F64Array, negative_log_likelihoods, rows_at_a_time
from qrun.engine.program.kv_cache import KVSequence
from qrun.engine.program.runtime import Runtime
from qrun.engine.text.tokenizer import Tokenizer
from qrun.formats.gguf.cursor import quote
from qrun.formats.json_file import json_lines


@dataclass(frozen=True)
class Task:
    """A question, and answers to it."""

    question: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]

    @property
    def answers(self) -> tuple[str, ...]:
        """The right ones first."""
        return self.right + self.wrong


def read_tasks(path: Path) -> list[Task]:
    """Raises ValueError, naming file and line, for what is no task, or if there is none."""
    tasks = [_task(entry, where) for where, entry in json_lines(path)]
    if not tasks:
        raise ValueError(f"{path}: it has no questions")
    return tasks


def _task(entry: Any, where: str) -> Task:
    if not isinstance(entry, dict) or not isinstance(entry.get("question"), str) or not entry["question"]:
        raise ValueError(f'{where}: it has no "question"')
    found = {}
    for key in ("right", "wrong"):
        given = entry.get(key)
        answers = [given] if isinstance(given, str) else given
        if not isinstance(answers, list) or not answers or not all(isinstance(each, str) and each for each in answers):
            raise ValueError(f'{where}: "{key}" is to be an answer, or a list of answers, none of them empty')
        found[key] = tuple(answers)
    if both := set(found["right"]) & set(found["wrong"]):
        raise ValueError(f"{where}: {quote(min(both))} is a right answer and a wrong one")
    return Task(entry["question"], found["right"], found["wrong"])


@dataclass
class Answers:
    """Of each task the number of the answer that was chosen, and whether that is a right one."""

    chosen: list[int] = field(default_factory=list)
    answered: list[bool] = field(default_factory=list)

    @property
    def accuracy(self) -> Estimate:
        """The part of the questions that were answered."""
        return Estimate.of(np.array(self.answered, np.float64))

    def agreement(self, other: Answers) -> Estimate:
        """The part of the questions for which both chose the same answer."""
        return Estimate.of(np.array(self.chosen) == np.array(other.chosen))


def answer(
    runtime: Runtime, tokenizer: Tokenizer, tasks: Sequence[Task], progress: Callable[[int, int], None] | None = None
) -> Answers:
    """Let a model choose. Raises ValueError, with the question's beginning, if one does not fit into the context."""
    result = Answers()
    for done, task in enumerate(tasks, 1):
        found, n_right = scores(runtime, tokenizer, task), len(task.right)
        result.chosen.append(int(np.argmax(found)))
        result.answered.append(max(found[:n_right]) > max(found[n_right:]))
        if progress:
            progress(done, len(tasks))
    return result


def context_needed(tokenizer: Tokenizer, tasks: Sequence[Task]) -> int:
    """Tokens of the longest question with one of its answers."""
    return max(len(tokenizer.encode(task.question + each, add_special=True)) for task in tasks for each in task.answers)


def scores(runtime: Runtime, tokenizer: Tokenizer, task: Task) -> list[float]:
    """The log probability of each answer after the question, for each of its bytes. The question is read once."""
    question = tokenizer.encode(task.question, add_special=True)
    texts = [tokenizer.encode(task.question + each, add_special=True) for each in task.answers]
    firsts = [_common(text, question) for text in texts]
    found = []
    with closing(runtime.sequence()) as asked:
        if shared := min(firsts) - 1:
            runtime.evaluate(asked, question[:shared], logits="none")
        for text, first, given in zip(texts, firsts, task.answers, strict=True):
            with closing(asked.fork()) as sequence:
                losses = list(_losses(runtime, sequence, text, first))
            found.append(-float(np.concatenate(losses or [np.zeros(1)]).sum()) / len(given.encode()))
    return found


def _common(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens are the same at the beginning, at least one: the first cannot be predicted. A token that the end
    of the question and the beginning of the answer share belongs to the answer; so does the last token in any case."""
    count = 0
    while count < min(len(tokens), len(others)) and tokens[count] == others[count]:
        count += 1
    return max(1, min(count, len(tokens) - 1))


def _losses(runtime: Runtime, sequence: KVSequence, text: Sequence[int], first: int) -> Iterator[F64Array]:
    """What the tokens from `first` on lose, some at a time. sequence: has the beginning of the text."""
    rows = rows_at_a_time(runtime.n_vocab)
    if sequence.n_past < first - 1:
        runtime.evaluate(sequence, text[sequence.n_past : first - 1], logits="none")
    for start in range(first - 1, len(text) - 1, rows):
        end = min(start + rows, len(text) - 1)
        logits = runtime.evaluate(sequence, text[start:end], logits="all")
        assert logits is not None
        yield negative_log_likelihoods(logits, text[start + 1 : end + 1])
