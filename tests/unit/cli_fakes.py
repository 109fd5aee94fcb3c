"""A model for tests of the command line: the real library over a runtime that answers each turn in capitals.

A conversation is written `(s)system</s>(u)text</s>(a)answer</s>(u)...(a)`; the model goes on after `(a)` with the last
turn's text in capitals, then ends. After any other text it goes on with "abc...".
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from engine_fakes import BOS, EOS, FakeRuntime, FakeTokenizer, ids_of

from qrun.engine import ChatTemplate, Model
from qrun.engine.text.response_formats import ResponseFormat
from qrun.models.graph import Graph, Value


class ChatTokenizer(FakeTokenizer):
    """Bytes, and `</s>` as one token."""

    kind = "gpt2"
    notices = ()

    def has_piece(self, piece: str) -> bool:
        return False

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False, *, mark: str = "") -> list[int]:
        ids = [BOS] if add_special and self.add_bos else []
        for i, part in enumerate(text.split("</s>") if parse_special else [text]):
            ids += [EOS] * (i > 0) + ids_of(part.replace(mark, "") if mark else part)
        return ids


class Template:
    """The chat template; one that reports a fault where a message says "fault"."""

    is_fallback = False
    format = ResponseFormat()

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True, **variables: Any) -> str:
        if any(message["content"] == "fault" for message in messages):
            raise ValueError("the template does not like this")
        turns = "".join(f"({message['role'][0]}){message['content']}</s>" for message in messages)
        return turns + "(a)" * add_generation_prompt

    def response(self, prompt: str, tools: Any = None) -> None:
        return None


def text_of(held: list[int]) -> str:
    return ChatTokenizer().decode(held)


def capitals(held: list[int]) -> int:
    """The rule of the runtime."""
    text = text_of(held)
    if "(a)" not in text:
        return ids_of("abcdefghijklmnopqrstuvwxyz")[len(text) % 26]
    question = text.rpartition("(a)")[0]
    wanted = ids_of(question.removesuffix("</s>").rpartition("(u)")[2].upper() + "!")
    mark = ids_of("(a)")
    n_said = next(n for n in range(len(held)) if held[len(held) - n - len(mark) : len(held) - n] == mark)
    return wanted[n_said] if n_said < len(wanted) else EOS


def make_model(context: int = 200, **metadata: Any) -> Model:
    """A real Model, over fakes."""
    runtime = FakeRuntime(rule=capitals, context=context)
    # greedy, where the file wishes nothing else
    reader = SimpleNamespace(
        metadata={"general.sampling.temp": 0.0, **metadata}, tensors={}, files=(), close=lambda: None
    )
    graph = Graph("fake", [], Value(0, runtime.n_vocab), [], runtime.n_vocab, 1, context)
    model = Model(Path("fake.gguf"), reader, graph, runtime, ChatTokenizer())  # type: ignore[arg-type]
    model.chat_template = Template()  # type: ignore[assignment]
    return model


THINKING = (
    "{% for m in messages %}({{ m.role[0] }})"
    "{% if m.reasoning_content and KEPT %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}(a){% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
"""A template of a model that thinks. It tells the model the thoughts of earlier turns if KEPT is there a condition that
holds."""


def thinking(held: list[int]) -> int:
    """The rule of a model that repeats the question in its thoughts, unless its prompt has an empty thought."""
    question, _, said = text_of(held).rpartition("(a)")
    asked = question.removesuffix("</s>").rpartition("(u)")[2]
    thought = "" if said.startswith("<think>\n\n") else f"<think>\n{asked}?\n</think>\n\n"
    text = thought + asked.upper() + "!"
    said = said.removeprefix("<think>\n\n</think>\n\n")
    if thought and "</think>" in said and not text.startswith(said):  # the thought was ended for it
        said, text = said.partition("</think>\n\n")[2], asked.upper() + "!"
    return ids_of(text[len(said)])[0] if len(said) < len(text) else EOS


def make_thinking_model(kept: str = "false", context: int = 400) -> Model:
    """A model with that template and that rule."""
    model = make_model(context)
    runtime_of(model).rule = thinking
    source = THINKING.replace("KEPT", kept)
    model.chat_template = ChatTemplate(source, model.tokenizer)  # type: ignore[arg-type]
    return model


def runtime_of(model: Model) -> FakeRuntime:
    return model._runtime  # type: ignore[return-value]
