"""Splits what a model writes into thoughts, answer and calls, as it comes.

Whatever a model writes, nothing is raised: marks that do not match, thoughts that never end and calls that are no JSON
are part of the answer, or of the thought in which they stand.
"""

import copy
import re
from typing import Self

from qrun.engine.text.response_formats import Calls, Channel, ResponseFormat, Thoughts
from qrun.engine.text.tool_calls import Texts, ToolCall, read_calls

Split = list[tuple[Channel, str]]

_MAX_HEADER = 200  # characters
_ADDRESS = re.compile(r"\bto=([^\s<]+)")
# Texts within arguments, as far as they have come: what stands in them is no mark.
_TEXT = r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)'
_TEXTS = {"json": _TEXT, "name-json": _TEXT, "json-by-name": _TEXT, "python": rf"{_TEXT}|'(?:[^'\\]|\\.)*(?:'|\\?\Z)"}


class ResponseParser:
    """One answer. How it was cut into pieces makes no difference to what comes out.

    White space around a thought is left out. So is what surrounds an answer after a thought, at its start.
    """

    def __init__(
        self,
        format: ResponseFormat,
        *,
        thinking: bool = False,
        thought: bool = False,
        with_calls: bool = False,
        texts: Texts = frozenset(),
        closing: str = "",
    ) -> None:
        """thinking: the prompt has begun a thought. thought: it has ended one. with_calls: calls of functions are
        looked for, and are not part of the answer. texts: see `text_arguments`. closing: what ends a thought, with what
        leads over to the answer.
        """
        self.channel: Channel = "reasoning" if thinking else "content"
        """What more text would be, so far as is known."""
        self.calls: list[ToolCall] = []
        """The calls that have been read."""
        self.closing = closing
        self._thoughts = format.thoughts
        self._calls = format.calls if with_calls else None
        self._texts = texts
        self._header = format.thoughts.header if format.thoughts else None
        self._heading = self._header is not None and not thinking and not thought
        """Whether what comes is the header of a message."""
        self._around: Channel = "content"  # what a call stands in
        self._name = ""  # of the function that a message is addressed to
        self._held = ""  # text that may be, or begin with, a mark
        self._begun = 0  # characters of that which the reader of the answer has
        self._literal = False  # a mark ends a call wherever it stands
        self._space = ""  # white space that is left out unless something follows it
        self._stripping = thinking or thought
        self._fresh = True
        """Whether a thought or a call may begin here as well as an answer."""
        self._after_thought = thought

    def copy(self) -> Self:
        """Another parser, which has read the same."""
        other = copy.copy(self)
        other.calls = list(self.calls)
        return other

    @property
    def opening(self) -> str:
        """What begins a thought, where one may begin; "" elsewhere."""
        if self._thoughts is None or self.channel != "content" or not self._fresh or self._after_thought:
            return ""
        return self._thoughts.open

    @property
    def close(self) -> str:
        """What ends a thought, in all formats."""
        return self._thoughts.close if self._thoughts else ""

    @property
    def heading(self) -> bool:
        """Whether what comes is the header of a message."""
        return self._heading

    @property
    def lead(self) -> str:
        """What stands between the mark that ends a thought and the answer."""
        return self.closing.partition(self._thoughts.close)[2] if self._thoughts else ""

    @property
    def addressee(self) -> str:
        """The function whose arguments come, where the marks of a call name it."""
        return self._name

    @property
    def kept_mark(self) -> str:
        """The mark of a call that is part of the call as well."""
        return "{" if self._calls is not None and self._calls.open == "{" else ""

    @property
    def marks(self) -> tuple[str, ...]:
        """All texts that the parser has to see, even if they are special tokens."""
        marks: list[str] = []
        if thoughts := self._thoughts:
            marks += [thoughts.open, thoughts.close, thoughts.after, *thoughts.dropped, *thoughts.around_answer]
        if self._header:
            marks += [*self._header.starts, self._header.end, "<|constrain|>"]
        if calls := self._calls:
            marks += [calls.open, calls.close, calls.quote]
            marks += re.findall(r"<[^<>\s]*>|\[[A-Z_]+\]", re.sub(r"\\", "", calls.pattern))
        return tuple(dict.fromkeys(mark for mark in marks if mark))

    def push(self, text: str) -> Split:
        """Takes more text; returns what is known now, in order."""
        self._held += text
        split: Split = []
        while self._step(split):
            pass
        return split

    def begin(self, text: str) -> None:
        """The answer begins with a text that its reader has."""
        self.push(text)
        self.calls.clear()
        self._begun = len(self._held) if self.channel != "tool_call" else 0
        self._space = ""
        if text and self.channel == "content":
            self._stripping = False

    def finish(self) -> Split:
        """What was held back, when no more will come. A call that has not been closed counts if it can be read."""
        split: Split = []
        if self.channel == "tool_call" and not self._readable(self._held):
            self._literal = True  # with a text that never ends, say
            while self._step(split):
                pass
        held, self._held = self._held, ""
        if self._heading:
            self._heading = False
            held = "" if self._is_header(held) else held
        if self.channel == "tool_call":
            self._end_call(held, "", split)
        else:
            self._emit(held, split)
            if self.channel == "content" and self._space and not self._stripping:
                split.append(("content", self._space))
        self._space = ""
        return split

    def _step(self, split: Split) -> bool:
        """Deals with the next mark in the text that is held; False where there is none, or it may be incomplete."""
        if self._heading:
            return self._read_header()
        marks = self._awaited()
        found = [(at, -len(mark), mark) for mark in marks if (at := self._place(mark)) >= 0]
        if not found:
            if self.channel != "tool_call":
                keep = self._may_begin(marks)
                text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
                self._emit(text, split)
            return False
        at, _, mark = min(found)
        before, self._held = self._held[:at], self._held[at + len(mark) :]
        if self.channel == "tool_call":
            self._end_call(before, mark, split)
        else:
            self._emit(before, split)
            self._pass(mark)
        return True

    def _awaited(self) -> list[str]:
        """The marks that mean something here."""
        thoughts, calls = self._thoughts, self._calls
        if self.channel == "tool_call":
            assert calls is not None
            close = [calls.close or calls.open]
            if self._header and thoughts is not None:
                close.append(thoughts.close)
            return [mark for mark in close if mark not in ("", "{")]
        marks: list[str] = []
        if thoughts is not None:
            marks += thoughts.dropped
            if self._header or self.channel == "reasoning":
                marks.append(thoughts.close)
            elif self._fresh:
                marks += [thoughts.open, thoughts.close]
            if self._after_thought and self.channel == "content":
                marks += thoughts.around_answer[0 if self._fresh else 1 :]
        if calls is not None and self._may_call(calls):
            marks.append(calls.open)
        return [mark for mark in marks if mark]

    def _may_call(self, calls: Calls) -> bool:
        if self.channel == "reasoning":
            return calls.ends_thought
        return calls.open != "{" or self._fresh

    def _place(self, mark: str) -> int:
        """Where a mark stands, -1 for nowhere; of those that count only at the start of something, there. Within the
        texts of a call's arguments it is none."""
        at = self._held.find(mark)
        if at >= 0 and self.channel == "tool_call" and not self._literal:
            return self._outside_texts(mark)
        return at if not self._only_at_start(mark) or not self._held[: max(at, 0)].strip() else -1

    def _outside_texts(self, mark: str) -> int:
        calls = self._calls
        assert calls is not None
        texts = _TEXTS.get(calls.body)
        if calls.quote:
            quote = re.escape(calls.quote)
            texts = f"{quote}.*?(?:{quote}|\\Z)"
        if texts is None:
            return self._held.find(mark)
        for found in re.finditer(f"(?P<mark>{re.escape(mark)})|{texts}", self._held, re.DOTALL):
            if found["mark"]:
                return found.start()
        return -1

    def _readable(self, body: str) -> bool:
        assert self._calls is not None
        return bool(read_calls(self._calls, body, self._name, self._texts))

    def _only_at_start(self, mark: str) -> bool:
        if self.channel != "content" or self._header is not None:
            return False
        thoughts, calls = self._thoughts, self._calls
        if thoughts is not None and mark in (thoughts.open, thoughts.close, thoughts.around_answer[0]):
            return True
        return calls is not None and mark == calls.open == "{"

    def _may_begin(self, marks: list[str]) -> int:
        """How many of the last characters may be the beginning of a mark."""
        held = self._held
        longest = max((len(mark) - 1 for mark in marks), default=0)
        for n in range(min(longest, len(held)), 0, -1):
            end = held[len(held) - n :]
            for mark in marks:
                if mark.startswith(end) and not (self._only_at_start(mark) and held[:-n].strip()):
                    return n
        return 0

    def _pass(self, mark: str) -> None:
        """Goes over a mark in a thought or an answer."""
        self._begun = 0
        thoughts, calls = self._thoughts, self._calls
        if calls is not None and mark == calls.open:
            self._around, self.channel = self.channel, "tool_call"
            if mark == "{":
                self._held = mark + self._held
        elif thoughts is not None and mark == thoughts.open and self.channel == "content":
            self.channel, self._stripping, self._space = "reasoning", True, ""
        elif thoughts is not None and mark == thoughts.close:
            self._begin_answer(thoughts)
        else:
            self._stripping = self._stripping or self._fresh

    def _begin_answer(self, thoughts: Thoughts) -> None:
        self.channel, self._stripping, self._space = "content", True, ""
        self._fresh = self._after_thought = True
        self._heading = thoughts.header is not None

    def _emit(self, text: str, split: Split) -> None:
        begun = min(self._begun, len(text))
        text, self._begun = text[begun:], self._begun - begun
        if self._stripping:
            text = text.lstrip()
            if not text:
                return
            self._stripping = False
        text = self._space + text
        kept = text.rstrip() if self.channel == "reasoning" or self._fresh else text
        self._space = text[len(kept) :]
        if kept:
            if self.channel == "content":
                self._fresh = False
                kept, self._space = kept + self._space, ""
            split.append((self.channel, kept))

    # Messages with headers

    def _read_header(self) -> bool:
        assert self._header is not None
        head, end, rest = self._held.partition(self._header.end)
        if end and (not head or self._is_header(head)):
            self._held, self._heading = rest, False
            self.channel, self._stripping, self._space = self._addressed(head), True, ""
            return True
        may_be_one = self._is_header(head) or any(
            mark.startswith(head) for mark in (*self._header.starts, self._header.end)
        )
        if not end and len(head) <= _MAX_HEADER and may_be_one:
            return False
        self._heading = False  # a model that has not learnt to write them
        return True

    def _is_header(self, head: str) -> bool:
        return self._header is not None and head.startswith(self._header.starts)

    def _addressed(self, head: str) -> Channel:
        assert self._header is not None
        words = re.findall(r"to=\S+?(?=<|\s|$)|\w+", head)
        named = next((self._header.channels[word] for word in words if word in self._header.channels), None)
        address = _ADDRESS.search(head)
        if address and self._header.channels.get(address[0]) is None and self._calls is not None:
            self._name = address[1].removeprefix("functions.")
            return "tool_call"
        return named or "content"

    # Calls

    def _end_call(self, body: str, mark: str, split: Split) -> None:
        calls = self._calls
        assert calls is not None
        read = read_calls(calls, body, self._name, self._texts)
        text = body
        again = bool(mark) and not calls.close  # the next call has begun
        if not self._name:
            text = ("" if calls.open == "{" else calls.open) + body + ("" if again else mark)
        self.channel = "content" if read else self._around
        if read:
            self._space = ""
            self.calls += read
            split.append(("tool_call", text))
            self._fresh = self._stripping = True
        else:
            self._stripping = False
            self._emit(text, split)
        self._name = ""
        self._heading = self._header is not None
        if again:
            self.channel = "tool_call"
