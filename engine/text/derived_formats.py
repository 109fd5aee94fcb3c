"""The format of answers, from what a template writes: for families that the table of `response_formats` does not know.

A template shows past answers to the model as the model is to write them. So a conversation is rendered in which names
and values are words that can be looked for, and the marks are read off around them. What is found counts only if a
parser reads back from what was rendered the very calls that went in: a guess that is wrong would spoil answers, and a
format that is not known costs no more than that calls are part of the text.
"""

import re
from collections.abc import Iterator
from typing import Any

from qrun.engine.text.response_formats import Body, Calls, ResponseFormat, Thoughts
from qrun.engine.text.response_parser import ResponseParser
from qrun.engine.text.template_fitting import Fitting, Unanswered

_ONE: list[tuple[str, dict[str, Any]]] = [("qzfirstq", {"qzkeyq": "qztextq", "qzcountq": 17})]
_TWO = [*_ONE, ("qzsecondq", {"qzkeyq": "qzmoreq"})]

# Whole words in brackets: tokens of their own, in most vocabularies.
_MARK = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")
_BODIES: tuple[Body, ...] = ("function-tags", "invoke-tags", "key-value-tags", "python", "json-by-name")


def checked_format(found: ResponseFormat, plain: Fitting, with_tools: Fitting) -> ResponseFormat:
    """A format of the table, with what the table does not know; and where it does not read the calls that the template
    shows, as one that fits does. plain, with_tools: the template as it is asked without tools and with some."""
    thoughts, calls = found.thoughts, found.calls
    try:
        thoughts = thoughts or derive_thoughts(plain)
        if calls is None or (calls.open and not _fits(calls, with_tools)):
            calls = derive_calls(with_tools) or calls
    except Unanswered:
        pass
    return ResponseFormat(thoughts, calls)


def _fits(calls: Calls, fitting: Fitting) -> bool:
    """Whether calls of this format are read from what the template shows, if it shows any."""
    shown = fitting.shown_calls(_ONE)
    return shown is None or _reads(calls, shown, _ONE)


def derive_thoughts(fitting: Fitting) -> Thoughts | None:
    """The marks around a thought, if there is one on either side and nothing else."""
    around = fitting.around_thought
    if around is None:
        return None
    before = list(_MARK.finditer(around[0]))
    after = _MARK.match(around[1].lstrip())
    if not before or after is None or around[0][before[-1].end() :].strip():
        return None
    rest = around[1].lstrip()[after.end() :]
    inner = around[0][before[-1].end() :]
    if rest.strip():  # another mark begins the answer
        return None
    return Thoughts((), before[-1][0], after[0], inner=inner, after=rest)


def derive_calls(fitting: Fitting) -> Calls | None:
    """The marks around calls, and what stands between them."""
    one, two = fitting.shown_calls(_ONE), fitting.shown_calls(_TWO)
    if one is None:
        return None
    for calls in _candidates(one.strip()):
        if _reads(calls, one, _ONE) and (two is None or _reads(calls, two, _TWO)):
            return calls
    return None


def _candidates(shown: str) -> Iterator[Calls]:
    name = shown.find(_ONE[0][0])
    found = re.search(r"(?<![A-Z_])(\[\s*)?\{", shown)
    brace = found.start() if found else -1
    if 0 <= brace < name:  # JSON that names the function
        opening, closing = shown[:brace].strip(), shown[shown.rfind("}") + 1 :].lstrip("] \n")
        mark = _MARK.match(closing)
        marks = _MARK.findall(opening)
        if marks and opening.endswith(marks[-1]):  # before it may stand an empty thought
            opening = marks[-1]
        if opening:
            for end in dict.fromkeys((mark[0] if mark else "", closing, "")):
                yield Calls((), opening, end, "json")
                yield Calls((), opening, end, "json-by-name")
        elif shown.startswith("{"):
            yield Calls((), "{", "", "json")
    opening_mark = _MARK.search(shown[:name])
    if opening_mark is None:
        return
    after = [mark[0] for mark in _MARK.finditer(shown) if mark.start() > name]
    ends = dict.fromkeys([*reversed(after), ""])
    opening = opening_mark[0]
    if name < brace:  # the name, and then its arguments as JSON
        head = _pattern(shown[opening_mark.end() : name])
        between = _pattern(shown[name + len(_ONE[0][0]) : brace])
        if between:
            for end in ends:
                yield Calls((), opening, end, "name-json", rf"{head}\s*(?P<name>[\w.-]+)\s*{between}\s*")
    for end in ends:
        for body in _BODIES:
            yield Calls((), opening, end, body)


def _pattern(text: str) -> str:
    """Of what stands beside a name: numbers and ids are those of the call."""
    return re.sub(r"qzcall\d+|\d+", r"\\w*?", re.escape(text.strip()))


def _reads(calls: Calls, shown: str, wanted: list[tuple[str, dict[str, Any]]]) -> bool:
    """Does a parser read these calls from this text, and nothing else?"""
    parser = ResponseParser(ResponseFormat(None, calls), with_calls=True)
    rest = [text for channel, text in (*parser.push(shown), *parser.finish()) if channel != "tool_call"]
    # What the template ends the message with is a token at which the model has ended.
    rest = [_MARK.sub("", text).strip() for text in rest]
    return [(call.name, call.arguments) for call in parser.calls] == wanted and not any(rest)
