"""From the messages of a conversation to the text that a model continues."""

from typing import TYPE_CHECKING, Any, Self

from qrun.engine.native.locks import ForkAwareLock
from qrun.engine.text.tokenizer import Tokenizer
from qrun.formats import FormatError, GGUFReader

if TYPE_CHECKING:
    from qrun.engine.text.template_sandbox import Limited

KEY = "tokenizer.chat_template"

CHATML = """\
{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

GEMMA = """\
{{ bos_token }}{% for message in messages %}
{% if message.role == "system" %}{{ raise_exception("Gemma has no system role") }}{% endif %}
<start_of_turn>{{ "model" if message.role == "assistant" else message.role }}
{{ message.content | trim }}<end_of_turn>
{% endfor %}
{% if add_generation_prompt %}
<start_of_turn>model
{% endif %}
"""

PLAIN = """\
{% for message in messages %}
{{ message.role | capitalize }}: {{ message.content | trim }}
{% endfor %}
{% if add_generation_prompt %}Assistant:{% endif %}
"""


class ChatTemplateError(ValueError):
    """A template that is wrong, or that refuses a conversation. `str()` is one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(" ".join(f"chat template: {reason}".split())[:500])


class ChatTemplate:
    """source: the template, in Jinja's language. is_fallback: the model has none, and this one is only a guess."""

    def __init__(
        self, source: str, tokenizer: Tokenizer, *, tool_source: str | None = None, is_fallback: bool = False
    ) -> None:
        """tool_source: the template for conversations with tools, where that is another."""
        self.source = source
        self.is_fallback = is_fallback
        self._tool_source = tool_source or source
        self._tokenizer = tokenizer
        self._environment: Limited | None = None
        self._lock = ForkAwareLock()

    @classmethod
    def from_reader(cls, reader: GGUFReader, tokenizer: Tokenizer) -> Self:
        """The model's own template, or a plain one in the style that its vocabulary suggests."""
        source, tool_source = reader.metadata.get(KEY), reader.metadata.get(f"{KEY}.tool_use")
        for value in (source, tool_source):
            if not isinstance(value, str | None):
                raise FormatError(reader.path, f"{KEY} is not a string")
        if source := source or tool_source:
            return cls(source, tokenizer, tool_source=tool_source)
        styles = {"<|im_start|>": CHATML, "<start_of_turn>": GEMMA}
        fallback = next((style for mark, style in styles.items() if tokenizer.has_piece(mark)), PLAIN)
        return cls(fallback, tokenizer, is_fallback=True)

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The conversation as text, with its control tokens spelt out: for `encode(text, parse_special=True)`.

        messages: {"role": ..., "content": ...}, and what else the template knows. tools: JSON schemas of functions.
        add_generation_prompt: end with what introduces the model's answer. variables: more of what the template knows
        (`enable_thinking=False`). A template that refuses a system message gets it as part of the first question.
        """
        variables |= {"tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            return self._render(messages, variables)
        except ChatTemplateError:
            if not messages or messages[0].get("role") != "system":
                raise
            try:
                return self._render(_without_system(messages), variables)
            except ChatTemplateError:
                pass
            raise

    def _render(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        from qrun.engine.text.template_sandbox import Limited

        special = {
            "bos_token": self._spelling(self._tokenizer.bos_id),
            "eos_token": self._spelling(self._tokenizer.eos_id),
        }
        source = self._tool_source if variables["tools"] else self.source
        with self._lock:
            self._environment = self._environment or Limited()
            try:
                return self._environment.render(source, {**special, "messages": messages, **variables})
            except Exception as error:  # a template can fail in every way in which Python code can
                raise ChatTemplateError(str(error) or type(error).__name__) from None

    def _spelling(self, id: int | None) -> str:
        return "" if id is None else self._tokenizer.decode([id])


def _without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with its system message at the head of the first question."""
    system, *others = messages
    if not others or others[0].get("role") != "user":
        return [{**system, "role": "user"}, *others]
    first, *others = others
    texts = system.get("content") or "", first.get("content") or ""
    if all(isinstance(text, str) for text in texts):
        return [{**first, "content": "\n\n".join(filter(None, texts))}, *others]
    parts = [[{"type": "text", "text": text}] if isinstance(text, str) else text for text in texts]
    return [{**first, "content": parts[0] + parts[1]}, *others]
