"""A model over fakes that says what it is told to, for tests of the server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from engine_fakes import EOS, FakeRuntime, FakeTokenizer, ids_of

from qrun.engine import ChatTemplate, Model
from qrun.models import Graph
from qrun.models.graph import Value

TEMPLATE = (
    "{% if tools %}[{% for t in tools %}{{ t.function.name }}{% endfor %}]{% endif %}"
    "{% for m in messages %}({{ m.role[0] }}){{ m.content }}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% if add_generation_prompt %}~{% endif %}"
    '{# <think></think> <tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call> #}'
)
"""Of a model that thinks and calls functions. The answer follows the "~"."""


class LetterTokenizer(FakeTokenizer):
    special_spellings: tuple[frozenset[str], frozenset[str]] = (frozenset({"<s>", "</s>"}), frozenset())
    notices: tuple[str, ...] = ()

    def encode(
        self, text: str, add_special: bool = True, parse_special: bool = False, *, mark: str = ""
    ) -> list[int]:
        text.encode()  # of half a character there are no bytes
        return ids_of(text.replace(mark, "") if mark else text)

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        if any(not 0 <= id < self.n_vocab for id in ids):
            raise ValueError("a token is not in the vocabulary")
        return super().decode(ids, skip_special)

    def has_piece(self, piece: str) -> bool:
        return False


def saying(answer: str | Callable[[str], str]) -> Callable[[list[int]], int]:
    """A rule: what follows the last "~" of the text is the answer, which may depend on what stands before that."""

    def rule(held: list[int]) -> int:
        before, _, said = bytes(min(max(id - 2, 0), 255) for id in held).rpartition(b"~")
        wanted = ids_of(answer(before.decode("utf-8", "replace")) if callable(answer) else answer)
        n_said = len(said)
        return wanted[n_said] if n_said < len(wanted) else EOS

    return rule


def make_model(
    answer: str | Callable[[str], str] = "Hello there.",
    *,
    context: int = 400,
    template: str = TEMPLATE,
    name: str = "fake.gguf",
    metadata: dict[str, Any] | None = None,
) -> Model:
    runtime = FakeRuntime(rule=saying(answer), context=context, batch=64)
    reader = SimpleNamespace(
        metadata={"general.sampling.temp": 0.0, "tokenizer.chat_template": template, **(metadata or {})},
        tensors={}, files=(), close=lambda: None, path=Path(name),
    )  # fmt: skip
    graph = Graph("fake", [], Value(0, runtime.n_vocab), [], runtime.n_vocab, 1, context)
    tokenizer: Any = LetterTokenizer()
    model = Model(Path(name), reader, graph, runtime, tokenizer)  # type: ignore[arg-type]
    model.chat_template = ChatTemplate(template, tokenizer)
    return model


def runtime_of(model: Model) -> Any:
    return model._runtime


def hold(model: Model) -> threading.Event:
    """Have the model compute nothing until the event is set, or for a minute."""
    event = threading.Event()
    runtime_of(model).on_batch = lambda: event.wait(60)
    return event
