"""From the messages of a conversation to the text that a model continues."""

import json
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import cached_property
from itertools import chain
from time import thread_time
from typing import TYPE_CHECKING, Any, Self

from qrun.engine.native.locks import ForkAwareLock
from qrun.engine.text.derived_formats import checked_format
from qrun.engine.text.generic_calls import GENERIC, with_calls_as_text, with_tools_told
from qrun.engine.text.messages import REASONING, ChatTemplateError, Message, read_messages, read_tools
from qrun.engine.text.prompt import Spellings, texts_in, unused_mark, with_mark
from qrun.engine.text.response_formats import SWITCHES, Calls, ResponseFormat, Switch, find_format
from qrun.engine.text.response_parser import ResponseParser
from qrun.engine.text.template_fitting import PROBE_TOOLS, Fitting, Unanswered
from qrun.engine.text.tokenizer import Tokenizer
from qrun.engine.text.tool_calls import text_arguments
from qrun.formats import FormatError, GGUFReader

if TYPE_CHECKING:
    from qrun.engine.text.template_sandbox import Limited

__all__ = ["ChatTemplate", "ChatTemplateError"]

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

BARE = """{{ messages | map(attribute="content") | join("\n") }}"""
"""Of models with an encoder: they know tasks, and no roles."""


# Tokens around what a model thinks. They begin and end no message, and system prompts speak of them as tokens.
_ABOUT_THOUGHTS = re.compile("think|reason", re.IGNORECASE)
_WRITTEN_BY_MODEL = ("assistant", "model")

_MAX_FITTINGS = 16  # variables with which a template was asked what it reads
_PROBE_SECONDS = 5.0  # for all that a template is asked before one prompt


class ChatTemplate:
    """source: the template, in Jinja's language. is_fallback: the model has none, and this one is only a guess."""

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        *,
        tool_source: str | None = None,
        is_fallback: bool = False,
        special_spellings: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset()),
    ) -> None:
        """tool_source: the template for conversations with tools, where that is another. special_spellings: those of
        the tokenizer, which a message may spell without meaning them; none by default."""
        self.source = source
        self.is_fallback = is_fallback
        self._tool_source = tool_source or source
        self._tokenizer = tokenizer
        self._special_spellings = special_spellings
        self._environment: Limited | None = None
        self._fittings: dict[tuple[str, int], Fitting] = {}
        self._guards: dict[str, tuple[Spellings, Spellings]] = {}
        self._switches: dict[str, Switch | None] = {}
        self._names: dict[str, set[str]] = {}
        self._probe_seconds = 0.0
        self._lock = ForkAwareLock()

    @classmethod
    def from_reader(
        cls,
        reader: GGUFReader,
        tokenizer: Tokenizer,
        special_spellings: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset()),
    ) -> Self:
        """The model's own template, or a plain one in the style that its vocabulary suggests.

        reader: its file. tokenizer: its own. special_spellings: those of the tokenizer, which a message may spell
        without meaning them; none by default. Raises FormatError for a template that is no text.
        """
        source, tool_source = reader.metadata.get(KEY), reader.metadata.get(f"{KEY}.tool_use")
        for value in (source, tool_source):
            if not isinstance(value, str | None):
                raise FormatError(reader.path, f"{KEY} is not a string")
        if source := source or tool_source:
            return cls(source, tokenizer, tool_source=tool_source, special_spellings=special_spellings)
        styles = {"<|im_start|>": CHATML, "<start_of_turn>": GEMMA}
        plain = BARE if reader.metadata.get("general.architecture") == "t5" else PLAIN
        fallback = next((style for mark, style in styles.items() if tokenizer.has_piece(mark)), plain)
        return cls(fallback, tokenizer, is_fallback=True, special_spellings=special_spellings)

    def render(
        self,
        messages: Any,
        tools: Iterable[Any] | None = None,
        add_generation_prompt: bool = True,
        *,
        special_tokens_in_messages: bool = False,
        think: bool | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as text, with its control tokens spelt out: for `Model.template_tokens`.

        messages: dictionaries as OpenAI's interface has them, {"role": ..., "content": ...}, and what else the
        template knows. What the template cannot read as it is given, it gets in another form: parts as a text, the
        arguments of calls as mappings or as JSON, a developer's message as the system's, late or several system
        messages at the start, or in the first question where the template has no place for them.
        tools: JSON schemas of functions. add_generation_prompt: end with what introduces the model's answer.
        think: whether the model is to think before it answers; None leaves that to the template. The template is told
            by whatever variable it has for that. Where it has none, False ends the prompt with an empty thought, as
            other templates do, and True begins a thought.
        variables: more of what the template knows (`enable_thinking=False`).

        special_tokens_in_messages: a text that spells a special token means the token. Otherwise it stays text, when
        `Model.template_tokens` encodes what is returned (a Prompt): in messages of the system, the user and tools, in
        names, descriptions of tools and variables, though not in what the model said, and not in variables that are
        named as tokens ("bos_token"). The tokens that only surround results of tools stay text in such results, and
        those around thoughts count if a text's ordinary encoding finds them.

        Raises TypeError for messages of a wrong type, ChatTemplateError if the template refuses, or is to have a model
        think and knows no thoughts.
        """
        # Before the lock is taken: `format` takes it too, and whoever computes it holds one more (Python 3.11).
        thoughts = None if think is None else self.format.thoughts
        if think and thoughts is None:
            raise ChatTemplateError("the model does not think: its chat template knows no thoughts")
        read = read_messages(messages)
        tools = read_tools(tools)
        tells = bool(tools) or any(message.get("tool_calls") or message["role"] == "tool" for message in read)
        calls = self.format.calls if tells else None
        with self._lock:
            self._probe_seconds = _PROBE_SECONDS
            if tells:
                read, tools = self._with_calls_told(read, tools, calls)
            fitting, tools = self._fitting(tools, variables)
            switch = None
            if think is not None:
                switch = self._switch(fitting)
                if switch is not None:
                    variables = {switch.name: switch.on if think else switch.off} | variables
                    fitting, tools = self._fitting(tools, variables)
            try:
                messages = fitting.fit(read_messages(read))
                hidden = fitting.hidden_thoughts(messages)
            except Unanswered:
                messages, hidden = read, []
            mark = ""
            if not special_tokens_in_messages:
                messages, tools, variables, mark = self._guarded(fitting, messages, tools, variables)
            variables |= {"tools": tools, "add_generation_prompt": add_generation_prompt}
            try:
                text = self._render(messages, variables)
                for i in reversed(hidden):
                    text = self._with_thought(text, messages[: i + 1], variables)
            except Exception as error:  # a template can fail in every way in which Python code can
                raise ChatTemplateError(f"chat template: {error or type(error).__name__}") from None
            more = "" if think is None else self._begun(text, think, switch, self._around_thought(fitting))
        return (with_mark(text, mark) if mark else text) + more

    @cached_property
    def format(self) -> ResponseFormat:
        """How the model's answers are built: by the marks in its template, or by what the template shows."""
        sources = dict.fromkeys((self.source, self._tool_source))
        found = find_format("\n".join(sources), self._tokenizer.has_piece)
        if self.is_fallback:
            return ResponseFormat(found.thoughts, found.calls or GENERIC)
        with self._lock:
            self._probe_seconds = _PROBE_SECONDS
            format = checked_format(found, self._fitting(None, {})[0], self._asking(PROBE_TOOLS, {}))
            if format.calls is None and not self._shows[0]:
                format = ResponseFormat(format.thoughts, GENERIC)
        return format

    @property
    def knows_tools(self) -> bool:
        """Whether the template itself has a place for descriptions of functions, or for calls."""
        calls = self.format.calls
        return "tools" in self.source or (calls is not None and calls is not GENERIC)

    @cached_property
    def _shows(self) -> tuple[bool, bool, bool]:
        """Whether the template tells of tools, shows calls, and takes results of calls that it does not show. With the
        lock held."""
        fitting = self._asking(PROBE_TOOLS, {})
        try:
            if fitting.renders:
                return fitting.shows_tools, fitting.shows_calls, fitting.takes_results
        except Unanswered:
            pass
        return True, True, True

    def _with_calls_told(
        self, messages: list[Message], tools: list[Any] | None, calls: Calls | None
    ) -> tuple[list[Message], list[Any] | None]:
        """With what the template leaves out: descriptions of functions, and calls."""
        shows_tools, shows_calls, takes_results = self._shows
        if not shows_calls:
            messages = with_calls_as_text(messages, calls, takes_results=takes_results)
        if tools and not shows_tools and calls is not None:
            messages = with_tools_told(messages, tools, calls)
            tools = None if calls is GENERIC else tools
        return messages, tools

    def response(self, prompt: str, tools: Iterable[Any] | None = None) -> ResponseParser | None:
        """What splits the answer to this prompt into thoughts and answer, and calls of functions if there are tools;
        None where the template knows nothing of the kind. For one generation."""
        tools = read_tools(tools)
        thoughts, calls = self.format.thoughts, self.format.calls if tools else None
        texts = text_arguments(tools or ())
        if thoughts is None:
            return ResponseParser(self.format, with_calls=True, texts=texts) if calls else None
        with self._lock:
            self._probe_seconds = _PROBE_SECONDS
            _, closing = self._around_thought(self._fitting(None, {})[0])
        end = prompt.rstrip()
        thinking = end.endswith(thoughts.open.rstrip())
        ends = {thoughts.close.rstrip(), thoughts.after.rstrip(), closing.rstrip()} - {""}
        return ResponseParser(
            self.format,
            thinking=thinking,
            thought=not thinking and end.endswith(tuple(ends)),
            with_calls=bool(tools),
            texts=texts,
            closing=closing,
        )

    def _begun(self, prompt: str, think: bool, switch: Switch | None, around: tuple[str, str]) -> str:
        """What ends the prompt, so that the model thinks, or does not."""
        thoughts = self.format.thoughts
        if thoughts is None:
            return ""
        inner, closing = around
        end = prompt.rstrip()
        if end.endswith(thoughts.open.rstrip()):
            return "" if think else closing
        if switch is not None or end.endswith(thoughts.close.rstrip()):
            return ""
        if think:  # a message with a header is always begun by the model
            return "" if thoughts.header else thoughts.open + inner
        return thoughts.open + inner + closing

    def _around_thought(self, fitting: Fitting) -> tuple[str, str]:
        """What stands between the mark that begins a thought and the thought, and between the thought and the answer:
        as the template shows it, or else as such models write it."""
        thoughts = self.format.thoughts
        if thoughts is None:
            return "", ""
        try:
            around = fitting.around_thought
        except Unanswered:
            around = None
        if around is not None:
            _, begun, inner = around[0].rpartition(thoughts.open)
            if begun and not inner.strip() and thoughts.close in around[1]:
                return inner, around[1]
        return thoughts.inner, thoughts.inner + thoughts.close + thoughts.after

    def _switch(self, fitting: Fitting) -> Switch | None:
        """The variable that tells the template whether the model is to think; None if it has none."""
        source = fitting.source
        if source not in self._switches:
            self._switches[source] = next((one for one in SWITCHES if self._has_switch(fitting, one)), None)
        return self._switches[source]

    def _has_switch(self, fitting: Fitting, switch: Switch) -> bool:
        words = [value for value in (switch.on, switch.off) if isinstance(value, str)]
        is_named = re.search(rf"\b{switch.name}\b", fitting.source)
        if not is_named or not all(re.search(rf"""["']{word}["']""", fitting.source) for word in words[-1:]):
            return False
        try:
            on, off = (
                self._prober({"tools": None, switch.name: value})([fitting.question], True)
                for value in (switch.on, switch.off)
            )
        except Unanswered:
            return False
        return on is not None and off is not None and on != off

    def _render(self, messages: list[Message], variables: dict[str, Any], seconds: float | None = None) -> str:
        from qrun.engine.text.template_sandbox import Limited

        special = {
            "bos_token": self._spelling(self._tokenizer.bos_id),
            "eos_token": self._spelling(self._tokenizer.eos_id),
        }
        source = self._tool_source if variables["tools"] else self.source
        self._environment = self._environment or Limited()
        given = {**special, **self._unusual(source, variables["tools"]), "messages": messages, **variables}
        return self._environment.render(source, given, seconds)

    def _unusual(self, source: str, tools: Any) -> dict[str, Any]:
        """What few templates read: functions as a text where others have tools, and the time."""
        if "functions" not in source and "datetime" not in source:
            return {}
        if source not in self._names:
            assert self._environment is not None
            self._names[source] = self._environment.names(source)
        names = self._names[source]
        found: dict[str, Any] = {}
        if "functions" in names and "tools" not in names:
            found["functions"] = json.dumps([tool.get("function", tool) for tool in tools or ()], ensure_ascii=False)
        if "datetime" in names:
            found["datetime"] = datetime.now().strftime("%B %d %Y %H:%M:%S")
        return found

    def _with_thought(self, text: str, messages: list[Message], variables: dict[str, Any]) -> str:
        """A prompt that goes on after these messages, with the last one's thought as the template writes it there."""
        *before, last = messages
        silent = {name: value for name, value in last.items() if name not in REASONING}
        ended = variables | {"add_generation_prompt": False}
        without, thinking = (self._render([*before, message], ended) for message in (silent, last))
        pairs = enumerate(zip(without, thinking, strict=False))
        start = next((i for i, (one, other) in pairs if one != other), len(without))
        if not text.startswith(without[:start]):
            return text
        return text[:start] + thinking[start : start + len(thinking) - len(without)] + text[start:]

    def _fitting(self, tools: list[Any] | None, variables: dict[str, Any]) -> tuple[Fitting, list[Any] | None]:
        """What is known of the template, with such variables; and the tools, of which some want an empty list."""
        if tools:
            return self._asking(PROBE_TOOLS, variables), tools
        without = self._asking(None, variables)
        if not without.renders:
            empty = self._asking([], variables)
            if empty.renders:
                return empty, []
        return without, None

    def _asking(self, tools: list[Any] | None, variables: dict[str, Any]) -> Fitting:
        key = repr(tools), hash(repr(sorted(variables.items())))
        if key not in self._fittings:
            if len(self._fittings) >= _MAX_FITTINGS:
                del self._fittings[next(iter(self._fittings))]
            source = self._tool_source if tools else self.source
            self._fittings[key] = Fitting(source, self._prober(variables | {"tools": tools}))
        return self._fittings[key]

    def _prober(self, variables: dict[str, Any]) -> Callable[[list[Message], bool], str | None]:
        """How a template is asked: it gives a text, or fails, or takes too long."""
        from qrun.engine.text.template_sandbox import TooSlow

        is_slow = False

        def render(messages: list[Message], add_generation_prompt: bool) -> str | None:
            nonlocal is_slow
            if is_slow:
                raise Unanswered
            start = thread_time()
            given = variables | {"add_generation_prompt": add_generation_prompt}
            try:
                return self._render(messages, given, max(self._probe_seconds, 0))
            except TooSlow:
                is_slow = True
                raise Unanswered from None
            except Exception:
                return None
            finally:
                self._probe_seconds -= thread_time() - start

        return render

    def _guarded(
        self, fitting: Fitting, messages: list[Message], tools: list[Any] | None, variables: dict[str, Any]
    ) -> tuple[list[Message], list[Any] | None, dict[str, Any], str]:
        """The arguments with a mark in what spells a special token; and the mark, empty where there is none."""
        ordinary, in_results = self._spellings(fitting)
        kept = {name: value for name, value in variables.items() if name.endswith("_token")}
        others = {name: value for name, value in variables.items() if name not in kept}
        guarded: list[tuple[Any, Spellings]] = [(tools, in_results), (others, ordinary)]
        for message in messages:
            if message["role"] in _WRITTEN_BY_MODEL:
                guarded.append((message.get("name"), ordinary))
            else:
                guarded.append((message, in_results if message["role"] not in ("system", "user") else ordinary))
        if not any(spellings.are_in(texts_in(value)) for value, spellings in guarded):
            return messages, tools, variables, ""
        mark = unused_mark(chain(texts_in([messages, tools, variables]), (self.source, self._tool_source)))
        tools, others, *rest = (spellings.broken(value, mark) for value, spellings in guarded)
        messages = [
            (message | {"name": value} if "name" in message else message) if isinstance(value, str | None) else value
            for message, value in zip(messages, rest, strict=True)
        ]
        return messages, tools, others | kept, mark

    def _spellings(self, fitting: Fitting) -> tuple[Spellings, Spellings]:
        """What messages may not spell: that of the system and the user, and what tools say.

        Control tokens, and of those that are found in any text the ones that the template writes around messages (or
        in what tools say, anywhere): they begin or end them.
        """
        source = fitting.source
        if source not in self._guards:
            control, others = self._special_spellings
            try:
                example = fitting.example
            except Unanswered:
                example = source
            written = {
                spelling
                for spelling in others
                if len(spelling) > 1 and spelling[0] in "<[" and spelling[-1] in ">]" and spelling in source + example
                if not _ABOUT_THOUGHTS.search(spelling)
            }
            around = {spelling for spelling in written if spelling in example}
            self._guards[source] = Spellings(control | around), Spellings(control | written)
        return self._guards[source]

    def _spelling(self, id: int | None) -> str:
        return "" if id is None else self._tokenizer.decode([id])
