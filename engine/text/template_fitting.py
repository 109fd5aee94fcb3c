"""Messages in the form that a template reads.

Clients agree on the shape of OpenAI's interface; templates do not. One walks over the parts of a content and another
adds it to a text; one reads the arguments of a call as a mapping and another as JSON; some refuse a system message, or
a second one. What a template reads is found by rendering small conversations with it, in which each text is a word that
can be looked for in the result.
"""

import json
import re
from collections.abc import Callable
from functools import cache, cached_property, lru_cache
from hashlib import sha256
from typing import Any

from qrun.engine.text.messages import (
    OTHER_NAMES,
    REASONING,
    ROLES,
    THOUGHT_PARTS,
    ChatTemplateError,
    Message,
    message_text,
    with_one_system,
    without_neighbours,
    without_system,
)


class Unanswered(Exception):
    """A template took so long over its answers that it is asked no more."""


# Words that no template contains, and none cuts or changes.
_QUESTION, _ANSWER, _NEXT = "qzquestionq", "qzanswerq", "qznextq"
_THOUGHT, _RESULT = "qzthoughtq", "qzresultq"
_FUNCTION, _ARGUMENT, _VALUE = "qzfunctionq", "qzargumentq", "qzvalueq"
_ID = "qzcall123"  # nine letters and digits, as Mistral's templates want it

PROBE_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": _FUNCTION,
            "description": "A function.",
            "parameters": {"type": "object", "properties": {_ARGUMENT: {"type": "string", "description": "A text."}}},
        },
    }
]
"""The tools of a conversation that is rendered to see what a template does."""

_ABSENT: Any = object()
_NAME_OF_TEXT = re.compile(r"""["']text["']\s*:""")


class Fitting:
    """What a template reads, and messages changed so that it does. Each question is put to it once, when it matters."""

    def __init__(self, source: str, render: Callable[[list[Message], bool], str | None]) -> None:
        """render: the text of messages, with or without a generation prompt; None where the template fails.
        Unanswered, which it may raise, is raised by all methods."""
        self.source = source
        self._render = render
        self._carries = lru_cache(256)(self._find_out_shape)
        self._takes_text = cache(self._find_out_text)
        self._takes_parts = cache(self._find_out_parts)
        self._reasoning_name = cache(self._find_out_reasoning)

    @property
    def renders(self) -> bool:
        """Whether it can be asked at all: whether it renders a question."""
        try:
            return self._carries("U")
        except Unanswered:
            return True

    def fit(self, messages: list[Message]) -> list[Message]:
        """messages: those of `read_messages`, which are changed."""
        for i, message in enumerate(messages):
            message["role"] = self._role(message["role"], f"messages[{i}]")
            self._fit_calls(message, f"messages[{i}]")
        self._fit_ids(messages)
        fitted = []
        for message in self._arranged(messages):
            if message["role"] == "assistant":
                self._fit_reasoning(message)
                if message.get("tool_calls") and message.get("content") and self._text_hides_calls:
                    fitted.append(_said("assistant", message.pop("content")))
            fitted.append(message)
        for message in fitted:
            self._fit_content(message)
        return fitted

    # Roles

    def _role(self, role: str, where: str) -> str:
        if role == "developer":
            return role if self._knows_developer else "system"
        if role in ROLES or self._names(role):
            return role
        if role in OTHER_NAMES:
            return OTHER_NAMES[role]
        roles = ", ".join(ROLES)
        raise ChatTemplateError(f"{where}: the role {role!r} is not known to the model's template (roles: {roles})")

    def _names(self, role: str) -> bool:
        # "function" is also the type of a tool
        is_word = role != "function" and re.fullmatch(r"\w+", role)
        return bool(is_word and re.search(rf"""["']{role}["']""", self.source))

    @cached_property
    def _knows_developer(self) -> bool:
        """Whether a developer has a place of his own, rather than the name of his role in the place of another."""
        words = [_said("developer", _ANSWER), _said("user", _QUESTION)]
        own = self._render(words, True)
        if own is None or _ANSWER not in own:
            return False
        as_system = self._render([_said("system", _ANSWER), _said("user", _QUESTION)], True)
        return as_system is None or own.lower() != as_system.lower().replace("system", "developer")

    # The order of messages

    def _arranged(self, messages: list[Message]) -> list[Message]:
        """With system messages where the template takes them; neighbours of one role become one if it refuses them."""
        if not self._carries("U") or self._carries(self._shape(messages)):
            return messages
        one_system = with_one_system(messages)
        if one_system[0]["role"] == "system" and not (self._carries("SU") and "U" in self._shape(messages)):
            one_system = messages = without_system(one_system)
        for arranged in (one_system, without_neighbours(one_system)):
            if self._carries(self._shape(arranged)):
                return arranged
        return messages

    def _shape(self, messages: list[Message]) -> str:
        """The order of system (S), user (U) and assistant (A) messages, calls (C) and their results (T), with
        repetitions left out. Where the template shows no calls, they and their results are one A."""
        letters = ""
        for message in messages:
            letter = {"system": "S", "developer": "S", "user": "U", "assistant": "A"}.get(message["role"], "T")
            letters += "C" if letter == "A" and message.get("tool_calls") else letter
        if ("C" in letters or "T" in letters) and not self._calls[1]:
            letters = re.sub("(CT*)+A?", "A", letters).replace("T", "")
        return re.sub(r"(.{2,6}?)\1+", r"\1", letters)

    def _find_out_shape(self, shape: str) -> bool:
        """Whether all messages reach the prompt of a conversation of this shape."""
        roles = {"S": "system", "U": "user", "A": "assistant"}
        messages, words = [], []
        for i, letter in enumerate(shape):
            if letter == "C":
                messages.append(self._calling())
                words.append(_FUNCTION)
            elif letter == "T":
                messages.append({"role": "tool", "tool_call_id": _ID, "name": _FUNCTION, "content": _RESULT})
                words.append(_RESULT)
            else:
                words.append(f"qz{roles[letter]}{i}q")
                messages.append(self._said(roles[letter], words[-1]))
        text = self._render(messages, shape[-1:] not in ("A", "C"))
        return text is not None and all(word in text for word in words)

    # Contents

    @cached_property
    def example(self) -> str:
        """A short conversation as a prompt, for what the template writes around messages."""
        shape = next((shape for shape in ("SUAU", "UAU", "U") if self._carries(shape)), "U")
        words = [self._said({"S": "system", "U": "user", "A": "assistant"}[letter], "-") for letter in shape]
        return self._render(words, True) or ""

    def _said(self, role: str, text: str) -> Message:
        """A message in the form that the template takes."""
        return _said(role, text if self._takes_text(role) else [{"type": "text", "text": text}])

    def _around(self, role: str, content: Any) -> list[Message]:
        """A short conversation with a message of this role."""
        message = _said(role, content)
        if role == "user":
            return [message]
        question = self._said("user", _QUESTION)
        if role in ("system", "developer"):
            return [message, question]
        if role == "assistant":
            return [question, message, self._said("user", _NEXT)]
        return [question, self._calling(), message | {"tool_call_id": _ID, "name": _FUNCTION}]

    def _find_out_text(self, role: str) -> bool:
        for content in (_ANSWER, [{"type": "text", "text": _ANSWER}]):
            if _ANSWER in (self._render(self._around(role, content), True) or ""):
                return isinstance(content, str)
        return True

    def _find_out_parts(self, role: str) -> bool:
        """Whether it walks over parts, rather than show Python's or JSON's spelling of them."""
        text = self._render(self._around(role, [{"type": "text", "text": word} for word in (_ANSWER, _VALUE)]), True)
        if text is None or _ANSWER not in text or _VALUE not in text:
            return False
        plain = (self._render(self._around(role, _ANSWER), True) or "") if self._takes_text(role) else ""
        return len(_NAME_OF_TEXT.findall(text)) <= len(_NAME_OF_TEXT.findall(plain))

    @cached_property
    def _takes_mappings(self) -> bool:
        """Whether the result of a tool may be a mapping, which the template writes as JSON."""
        text = self._render(self._around("tool", {_ARGUMENT: _VALUE}), True) or ""
        return _VALUE in text and f"'{_ARGUMENT}'" not in text

    def _fit_content(self, message: Message) -> None:
        role, content = message["role"], message.get("content")
        if isinstance(content, dict):
            if not self._takes_mappings:
                message["content"] = message_text(content)
        elif isinstance(content, list):
            if not self._takes_parts(role):
                message["content"] = message_text(content)
        elif content:
            if not self._takes_text(role):
                message["content"] = [{"type": "text", "text": content}]
        elif message.get("tool_calls"):
            _set_content(message, self._empty_content(content))
        else:
            message["content"] = ""

    def _empty_content(self, given: Any) -> Any:
        """What stands where a message has calls and no text: as it was given, if the template shows the calls then."""
        forms = self._calls[1]
        return "" if not forms or (given == "" and "" in forms) else forms[0]

    # Calls of functions

    def _calling(self) -> Message:
        as_text, forms = self._calls
        return _call(json.dumps({_ARGUMENT: _VALUE}) if as_text else {_ARGUMENT: _VALUE}, forms[0] if forms else "")

    @cached_property
    def _calls(self) -> tuple[bool, list[Any]]:
        """Whether the arguments of a call are to be JSON text, and with which contents beside it the call is shown."""
        for as_text in (False, True):
            arguments = json.dumps({_ARGUMENT: _VALUE}) if as_text else {_ARGUMENT: _VALUE}
            forms = [form for form in (_ABSENT, "", None) if self._shows_call(_call(arguments, form))]
            if forms:
                return as_text, forms
        return False, []

    @cached_property
    def _text_hides_calls(self) -> bool:
        """Whether calls beside a text are left out, and shown where a message of its own has the text."""
        call = self._calling()
        text = self._said("assistant", _ANSWER)
        return bool(self._calls[1]) and not self._shows_call(call | text) and self._shows_call(call, text)

    def _shows_call(self, message: Message, *before: Message) -> bool:
        id = message["tool_calls"][0]["id"]
        result = {"role": "tool", "tool_call_id": id, "name": _FUNCTION, "content": _RESULT}
        text = self._render([self._said("user", _QUESTION), *before, message, result], True)
        if text is None or not all(word in text for word in (_FUNCTION, _ARGUMENT, _VALUE)):
            return False
        # Python's spelling of a mapping, and JSON that was quoted as a text
        return f"{{'{_ARGUMENT}'" not in text and f'\\"{_ARGUMENT}' not in text

    @cached_property
    def _survives_text_arguments(self) -> bool:
        """Whether arguments that a model wrote wrongly can be shown to it as they are."""
        forms = self._calls[1]
        call = [self._said("user", _QUESTION), _call(_VALUE, forms[0] if forms else "")]
        return _VALUE in (self._render([*call, _said("tool", _RESULT) | {"tool_call_id": _ID}], True) or "")

    def _fit_calls(self, message: Message, where: str) -> None:
        calls = message.get("tool_calls", ())
        for i, call in enumerate(calls):
            if "function" in call:
                call.setdefault("type", "function")
            elif self._calls[1]:  # without the frame that the template was seen to read
                id = {"id": call.pop("id")} if "id" in call else {}
                call = calls[i] = id | {"type": "function", "function": call}
            function = call.get("function", call)
            arguments = function.get("arguments")
            if self._calls[0]:
                if not isinstance(arguments, str):
                    function["arguments"] = json.dumps(arguments or {}, ensure_ascii=False)
            elif not isinstance(arguments, dict):
                mapping = _mapping(arguments)
                if mapping is not None:
                    function["arguments"] = mapping
                elif not self._survives_text_arguments:
                    where = f"{where}: tool_calls[{i}]: arguments"
                    raise ChatTemplateError(f"{where} is not the JSON of an object: {arguments}")

    def _fit_ids(self, messages: list[Message]) -> None:
        """A result without the id of its call gets that of the first that waits for one. Mistral's templates refuse
        ids that are not nine letters and digits."""
        waiting: list[str] = []
        n_calls = 0
        for message in messages:
            for call in message.get("tool_calls", ()):
                n_calls += 1
                if self._wants_short_ids:
                    call["id"] = _short_id(call.get("id") or f"call{n_calls:05d}")
                waiting += [call["id"]] if call.get("id") else []
            if message["role"] == "tool":
                if "tool_call_id" not in message and waiting:
                    message["tool_call_id"] = waiting[0]
                elif n_calls and self._wants_short_ids:
                    message["tool_call_id"] = _short_id(message.get("tool_call_id", _ID))
                waiting = [id for id in waiting if id != message.get("tool_call_id")]

    @cached_property
    def _wants_short_ids(self) -> bool:
        call = self._calling()
        long = json.loads(json.dumps(call).replace(_ID, f"call_{_ID * 2}"))
        return bool(self._calls[1]) and not self._shows_call(long) and self._shows_call(call)

    # What a model thought

    def _fit_reasoning(self, message: Message) -> None:
        content = message.get("content")
        thoughts = [part for part in content if "text" not in part] if isinstance(content, list) else []
        given = [name for name in REASONING if message.get(name)]
        if thoughts and not self._takes_parts("assistant"):
            if not given:
                message["reasoning_content"] = "\n".join(map(_thought, thoughts))
                given = ["reasoning_content"]
            message["content"] = [part for part in message["content"] if part not in thoughts]
        if not given:
            return
        has_calls = bool(message.get("tool_calls"))
        if not any(self._reasoning_name(name, has_calls) == name for name in given):
            name = self._reasoning_name(given[0], has_calls) or self._reasoning_name(given[0], False)
            if name is None:
                return
            message[name] = message[given[0]]
            given = [name]
        if has_calls and message.get("content") and self._reasoning_replaces_content:
            for name in given:
                message[name] += "\n\n" + message_text(message["content"])
            message["content"] = ""

    def _find_out_reasoning(self, given: str, with_calls: bool) -> str | None:
        """The name under which the template reads what a model thought: the given one if it can be."""
        names = [given, *(name for name in REASONING if name != given)]
        return next((name for name in names if self._reads(name, with_calls)), None)

    def _reads(self, name: str, with_calls: bool) -> bool:
        question, following = self._said("user", _QUESTION), self._said("user", _NEXT)
        if with_calls:
            result = {"role": "tool", "tool_call_id": _ID, "name": _FUNCTION, "content": _RESULT}
            conversations = [[question, self._calling() | {name: _THOUGHT}, result]]
        else:
            answer = self._said("assistant", _ANSWER) | {name: _THOUGHT}
            conversations = [[question, answer], [question, answer, following]]
        return any(_THOUGHT in (self._render(messages, len(messages) > 2) or "") for messages in conversations)

    @cached_property
    def question(self) -> Message:
        """A question, in the form that the template takes."""
        return self._said("user", _QUESTION)

    @cached_property
    def around_thought(self) -> tuple[str, str] | None:
        """What the template writes between a question and a thought, and between the thought and its answer; None if
        it shows no thoughts."""
        name = self._reasoning_name("reasoning_content", False)
        if name is None:
            return None
        text = self._render([self.question, self._said("assistant", _ANSWER) | {name: _THOUGHT}], False) or ""
        before, thought, rest = text.rpartition(_QUESTION)[2].partition(_THOUGHT)
        between, answer, _ = rest.partition(_ANSWER)
        return (before, between) if thought and answer else None

    @property
    def shows_calls(self) -> bool:
        """Whether the template writes calls of functions."""
        return bool(self._calls[1])

    @property
    def shows_tools(self) -> bool:
        """Whether the template, which has been given `PROBE_TOOLS`, tells the model of them."""
        return _FUNCTION in (self._render([self.question], True) or "")

    @property
    def takes_results(self) -> bool:
        """Whether the results of calls may follow an answer that is a text."""
        return self._carries("UAT")

    def shown_calls(self, calls: list[tuple[str, dict[str, Any]]]) -> str | None:
        """What the template writes for a message that makes these calls of functions (name, arguments), without what
        begins and ends any answer; None if it shows no calls."""
        as_text, forms = self._calls
        if not forms:
            return None
        message: Message = {"role": "assistant", "tool_calls": []}
        _set_content(message, forms[0])
        results: list[Message] = []
        for i, (name, arguments) in enumerate(calls):
            function = {"name": name, "arguments": json.dumps(arguments) if as_text else arguments}
            id = f"{_ID[:-1]}{i}"
            message["tool_calls"].append({"id": id, "type": "function", "function": function})
            results.append({"role": "tool", "tool_call_id": id, "name": name, "content": _RESULT})
        answer = self._said("assistant", _ANSWER)
        plain = self._render([self.question, answer], False)
        for more in ([], results):
            text = self._render([self.question, message, *more], False)
            if text is None or plain is None or not all(name in text for name, _ in calls):
                continue
            shown, said = (one.rpartition(_QUESTION)[2] for one in (text, plain))
            begin, end = _common(shown, said.partition(_ANSWER)[0]), said.partition(_ANSWER)[2]
            shown = shown[begin:].partition(_RESULT)[0]
            end, last = end.strip(), shown.rfind(calls[-1][0])
            return shown[: shown.find(end, last)] if end and end in shown[last:] else shown
        return None

    def hidden_thoughts(self, messages: list[Message]) -> list[int]:
        """Which messages call functions for the last question, after a thought that the template shows only while
        nothing follows the call: what the model goes by when it reads the results."""
        asked = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        return [
            i
            for i, message in enumerate(messages)
            if i > asked and message.get("tool_calls") and any(message.get(name) for name in REASONING)
            if self._hides_thoughts
        ]

    @cached_property
    def _hides_thoughts(self) -> bool:
        name = self._reasoning_name("reasoning_content", False)
        if name is None or self._reasoning_name(name, True) is not None:
            return False
        text = self._render([self._said("user", _QUESTION), self._calling() | {name: _THOUGHT}], False)
        return _THOUGHT in (text or "")

    @cached_property
    def _reasoning_replaces_content(self) -> bool:
        """Whether the template refuses a call with both a text and a thought (which it would write in one place)."""
        name = self._reasoning_name("reasoning_content", True) or self._reasoning_name("reasoning_content", False)
        if name is None:
            return False
        result = {"role": "tool", "tool_call_id": _ID, "name": _FUNCTION, "content": _RESULT}
        both = self._calling() | {name: _THOUGHT, "content": _ANSWER}
        return self._render([self._said("user", _QUESTION), both, result], True) is None


def _common(text: str, other: str) -> int:
    """How many characters both begin with, but for a mark that differs."""
    pairs = enumerate(zip(text, other, strict=False))
    at = next((i for i, (one, two) in pairs if one != two), min(len(text), len(other)))
    begun = re.search(r"(<[^<>\s]*|\[[^\[\]\s]*|\sto=)\Z", text[:at])
    return begun.start() if begun else at


def _short_id(id: Any) -> str:
    """The id, if it is nine letters and digits; else nine of its hash."""
    text = str(id)
    return text if re.fullmatch("[a-zA-Z0-9]{9}", text) else sha256(text.encode("utf-8", "replace")).hexdigest()[:9]


def _said(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def _call(arguments: Any, content: Any) -> Message:
    function = {"name": _FUNCTION, "arguments": arguments}
    message = {"role": "assistant", "tool_calls": [{"id": _ID, "type": "function", "function": function}]}
    _set_content(message, content)
    return message


def _set_content(message: Message, content: Any) -> None:
    if content is _ABSENT:
        message.pop("content", None)
    else:
        message["content"] = content


def _mapping(arguments: str | None) -> dict[str, Any] | None:
    """What JSON says; None if that is no object."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return None
    if value is None:
        return {}
    return value if isinstance(value, dict) else None


def _thought(part: dict[str, Any]) -> str:
    """The text of a part that holds what a model thought."""
    value = next((part[name] for name in THOUGHT_PARTS if name in part), "")
    return value if isinstance(value, str) else message_text([item for item in value if isinstance(item, dict)])
