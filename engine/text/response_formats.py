"""How models mark what they think and what they call: one table, keyed by what stands in their chat templates.

No model file says how its model's answers are built. Its template does: it writes the same marks when it shows past
answers to the model. So a family is known by marks in the template's source, and never by a model's name, which people
change. A row is data, for whoever needs it: `response_parser` splits answers by it, `chat_template` begins and ends
thoughts with it, and `tool_calls` reads calls.

Rows were checked by rendering templates with an answer that has a thought and calls. For lack of a template that shows
them, these were not: the thoughts of Kimi VL; the calls of FunctionGemma, Phi 4 mini and Granite 3.
"""

from collections.abc import Callable, Mapping
from dataclasses import field
from types import MappingProxyType
from typing import Any, Literal

from qrun.formats.dataclass import dataclass

# A full-width bar and a lower block, as DeepSeek writes them.
_BAR, _BLANK = "\uff5c", "\u2581"

Channel = Literal["content", "reasoning", "tool_call"]


@dataclass(frozen=True)
class Thoughts:
    """Marks around what a model thinks before its answer.

    Thoughts begin at the start of an answer, or after another thought or a call, and nowhere else: an answer may speak
    of "<think>" too.
    """

    signs: tuple[str, ...]
    """What stands in the source of a template of this kind: all of it."""
    open: str
    close: str
    inner: str = "\n"
    """What stands between `open` and the thought, and between it and `close`, where the template shows none."""
    after: str = "\n\n"
    """What stands between `close` and the answer, where the template shows none."""
    dropped: tuple[str, ...] = ()
    """Marks that are neither thought nor answer, wherever they stand."""
    around_answer: tuple[str, str] = ("", "")
    """What stands around an answer after a thought, in characters that an answer may have elsewhere."""
    header: "Header | None" = None
    """For formats in which each message says in a header what it is."""


@dataclass(frozen=True)
class Header:
    """Messages that begin with a header: `<|channel|>analysis<|message|>...<|end|>`. The beginning of the first one
    stands in the prompt. `to=NAME` in a header addresses a function."""

    starts: tuple[str, ...]
    """With what a header goes on from the prompt, or begins after a message."""
    end: str
    channels: Mapping[str, Channel] = field(default_factory=dict)
    """A word of the header -> what the message is; an answer, where none is named."""


Body = Literal[
    "json",            # one JSON value after another, or lists of them: {"name": ..., "arguments": {...}}
    "json-by-name",    # the same with {NAME: {...}}
    "name-json",       # NAME {...}, between marks of the family
    "function-tags",   # <function=NAME><parameter=KEY>VALUE</parameter></function>
    "invoke-tags",     # <invoke name="NAME"><parameter name="KEY">VALUE</parameter></invoke>
    "key-value-tags",  # NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>
    "python",          # [NAME(KEY="VALUE", ...), ...]
    "bare-keys",       # call:NAME{KEY:VALUE, ...}, where a text stands between quotes of the family
    "indexed-tags",    # <|open|>call tool="NAME"<|sep|><|open|>argument key="KEY" type="string"<|sep|>VALUE...
]  # fmt: skip
"""How the text between the marks of a call names its function and the arguments."""


@dataclass(frozen=True)
class Calls:
    """Marks around calls of functions. `close` is "" where one goes on to the next `open`, or to the end of all."""

    signs: tuple[str, ...]
    open: str
    close: str
    body: Body
    pattern: str = ""
    """Of "name-json": a regular expression for what stands around each name and its arguments."""
    quote: str = ""
    """Of "bare-keys": what stands around a text."""
    dropped: str = ""
    """Marks of the family within a call that mean nothing: a regular expression."""

    @property
    def ends_thought(self) -> bool:
        """Whether `open` counts within a thought too, which some models leave open when they call. A model that thinks
        about calls may well write "<tool_call>" there, but hardly "<|tool_call_start|>", a token of its own."""
        return self.open.startswith(("<|", f"<{_BAR}", "[TOOL_CALLS]", "]<]"))


@dataclass(frozen=True)
class Switch:
    """A variable with which a template is told whether the model is to think."""

    name: str
    on: Any
    off: Any


@dataclass(frozen=True)
class ResponseFormat:
    """How one model's answers are built. thoughts, calls: None where the template knows none."""

    thoughts: Thoughts | None = None
    calls: Calls | None = None


_HARMONY = Header(
    starts=("<|channel|>", " to=", "<|start|>"),
    end="<|message|>",
    channels=MappingProxyType({"analysis": "reasoning", "commentary": "content", "final": "content"}),
)
_ATEM = Header(
    starts=(" to=", "<|start|>"),
    end="<|message|>",
    channels=MappingProxyType({"to=self": "reasoning", "to=user": "content"}),
)

# The first row all of whose signs are there counts: what is special stands before what is common.
THOUGHTS = (
    # gpt-oss, llm-jp
    Thoughts(("<|channel|>analysis",), "<|channel|>analysis<|message|>", "<|end|>", inner="",
             after="<|start|>assistant<|channel|>final<|message|>", header=_HARMONY),
    # Muse
    Thoughts(("to=self<|message|>",), " to=self<|message|>", "<|eom|>", inner="",
             after="<|start|>assistant to=user<|message|>", header=_ATEM),
    # Gemma 4
    Thoughts(("<|channel>", "<channel|>"), "<|channel>thought", "<channel|>", after=""),
    # Kimi K3
    Thoughts(("<|open|>", "<|close|>", "<|sep|>"), "<|open|>think<|sep|>", "<|close|>think<|sep|>", inner="",
             after="<|open|>response<|sep|>",
             dropped=("<|open|>response<|sep|>", "<|close|>response<|sep|>", "<|close|>message<|sep|>")),
    # Solar Open
    Thoughts(("<|think|>", "<|content|>"), "<|think|>", "<|end|>", inner="", after="<|begin|>assistant<|content|>",
             dropped=("<|begin|>assistant", "<|content|>")),
    # Command R7B, A; Cohere 2 MoE
    Thoughts(("<|START_THINKING|>", "<|START_TEXT|>"), "<|START_THINKING|>", "<|END_THINKING|>", inner="",
             after="<|START_TEXT|>", dropped=("<|START_TEXT|>", "<|END_TEXT|>")),
    Thoughts(("<|START_THINKING|>",), "<|START_THINKING|>", "<|END_THINKING|>", inner="", after="<|START_RESPONSE|>",
             dropped=("<|START_RESPONSE|>", "<|END_RESPONSE|>")),
    # Ministral 3, Magistral
    Thoughts(("[THINK]",), "[THINK]", "[/THINK]", inner="", after=""),
    # Seed-OSS
    Thoughts(("<seed:think>",), "<seed:think>", "</seed:think>", after="\n"),
    # MiniMax M3
    Thoughts(("<mm:think>",), "<mm:think>", "</mm:think>", inner="", after=""),
    # Hunyuan 3
    Thoughts(("<think{}>", ":opensource"), "<think:opensource>", "</think:opensource>", inner="", after=""),
    # Apriel
    Thoughts(("[BEGIN FINAL RESPONSE]",), "Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]", after="\n",
             dropped=("[END FINAL RESPONSE]",)),
    # Apertus
    Thoughts(("<|inner_prefix|>",), "<|inner_prefix|>", "<|inner_suffix|>", inner="", after=""),
    # Kimi VL
    Thoughts(("◁think▷",), "◁think▷", "◁/think▷"),
    # Granite 3.2, 3.3
    Thoughts(("<think>", "<response>"), "<think>", "</think>", inner="", after="\n",
             around_answer=("<response>", "</response>")),
    # Qwen 3 and 3.5, QwQ, DeepSeek, GLM, Kimi K2, MiniMax M1 and M2, Nemotron, SmolLM3, LFM 2.5, MiniCPM, Laguna, ...
    Thoughts(("</think>",), "<think>", "</think>"),
    Thoughts(("<think>",), "<think>", "</think>"),
)  # fmt: skip

# Models whose template says nothing of thoughts, and whose vocabulary has these pieces, are tunes that think.
THOUGHTS_BY_PIECES = (THOUGHTS[-1], Thoughts((), "[THINK]", "[/THINK]", inner="", after=""))

_DSML = f"{_BAR}DSML{_BAR}"
_TOOL_CALLS = f"<{_BAR}tool{_BLANK}calls{_BLANK}"
_TOOL_CALL = f"<{_BAR}tool{_BLANK}call{_BLANK}"
_TOOL_SEP = f"<{_BAR}tool{_BLANK}sep{_BAR}>"

CALLS = (
    # gpt-oss, llm-jp, Muse: the name stands in the header of a message
    Calls(("functions.", "<|channel|>commentary"), "", "<|call|>", "json"),
    Calls(("to=self<|message|>",), "", "<|eom|>", "invoke-tags", dropped="(?<=<)/?atem:(?=/?)"),
    # Kimi K3
    Calls(("<|open|>", "<|close|>", "<|sep|>"), "<|open|>tools<|sep|>", "<|close|>tools<|sep|>", "indexed-tags"),
    # Solar Open
    Calls(("<|tool_call:begin|>",), "<|tool_calls|>", "<|calls|>", "name-json",
          r"<\|tool_call:begin\|>(?P<id>.*?)<\|tool_call:name\|>(?P<name>.*?)<\|tool_call:args\|>"),
    # Gemma 4, FunctionGemma
    Calls(("<|tool_call>", "<tool_call|>"), "<|tool_call>", "<tool_call|>", "bare-keys", quote='<|"|>'),
    Calls(("<start_function_call>",), "<start_function_call>", "<end_function_call>", "bare-keys", quote="<escape>"),
    # DeepSeek V4, V3.2
    Calls((_DSML, "tool_calls>"), f"<{_DSML}tool_calls>", f"</{_DSML}tool_calls>", "invoke-tags", dropped=_DSML),
    Calls((_DSML,), f"<{_DSML}function_calls>", f"</{_DSML}function_calls>", "invoke-tags", dropped=_DSML),
    # DeepSeek R1, V3; V3.1
    Calls((_TOOL_CALLS, "```json"), f"{_TOOL_CALLS}begin{_BAR}>", f"{_TOOL_CALLS}end{_BAR}>", "name-json",
          rf"{_TOOL_CALL}begin{_BAR}>\s*function{_TOOL_SEP}(?P<name>[^\n]*)\n```json\s*"),
    Calls((_TOOL_CALLS,), f"{_TOOL_CALLS}begin{_BAR}>", f"{_TOOL_CALLS}end{_BAR}>", "name-json",
          rf"{_TOOL_CALL}begin{_BAR}>(?P<name>.*?){_TOOL_SEP}"),
    # Kimi K2
    Calls(("<|tool_calls_section_begin|>",), "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "name-json",
          r"<\|tool_call_begin\|>\s*(?P<id>(?:functions\.)?(?P<name>.*?)(?::\d+)?)\s*<\|tool_call_argument_begin\|>"),
    # MiniMax M3, M2
    Calls(("]<]minimax[>[",), "]<]minimax[>[<tool_call>", "]<]minimax[>[</tool_call>", "invoke-tags",
          dropped=r"\]<\]minimax\[>\["),
    Calls(("<minimax:tool_call>",), "<minimax:tool_call>", "</minimax:tool_call>", "invoke-tags"),
    # Hunyuan 3, Seed-OSS
    Calls(("<tool_calls{}>", ":opensource"), "<tool_calls:opensource>", "</tool_calls:opensource>", "key-value-tags",
          dropped=":opensource(?=>)"),
    Calls(("<seed:tool_call>",), "<seed:tool_call>", "</seed:tool_call>", "function-tags"),
    # Qwen3-Coder, Qwen 3.5, Nemotron 3, StepFun 3.5
    Calls(("<tool_call>", "<function="), "<tool_call>", "</tool_call>", "function-tags"),
    # GLM 4.5 and later, Ling 3, Laguna
    Calls(("<tool_call>", "<arg_key>"), "<tool_call>", "</tool_call>", "key-value-tags"),
    # Apriel, MiniMax M1
    Calls(("<tool_calls>",), "<tool_calls>", "</tool_calls>", "json"),
    # Hermes, Qwen 2.5 and 3, Granite 4, SmolLM3, and many tunes
    Calls(("<tool_call>",), "<tool_call>", "</tool_call>", "json"),
    # MiniCPM 5
    Calls(("<function name=",), "<function ", "</function>", "invoke-tags"),
    # LFM 2, 2.5
    Calls(("<|tool_call_start|>",), "<|tool_call_start|>", "<|tool_call_end|>", "python"),
    Calls(("<|tool_list_start|>",), "<|tool_call_start|>", "<|tool_call_end|>", "python"),
    Calls(("List of tools: [", "<|im_start|>"), "<|tool_call_start|>", "<|tool_call_end|>", "python"),
    # Mistral: Small 3.2; Ministral 3, Devstral; Nemo
    Calls(("[TOOL_CALLS]", "[CALL_ID]"), "[TOOL_CALLS]", "", "name-json",
          r"(?P<name>[^\[{]*?)(?:\[CALL_ID\](?P<id>[^\[{]*))?\[ARGS\]"),
    Calls(("[TOOL_CALLS]", "[ARGS]"), "[TOOL_CALLS]", "", "name-json", r"(?P<name>[^\[{]*?)\[ARGS\]"),
    Calls(("[TOOL_CALLS]",), "[TOOL_CALLS]", "", "json"),
    # Command R7B, A
    Calls(("<|START_ACTION|>",), "<|START_ACTION|>", "<|END_ACTION|>", "json"),
    # Apertus
    Calls(("<|tools_prefix|>",), "<|tools_prefix|>", "<|tools_suffix|>", "json-by-name"),
    # Nemotron 2
    Calls(("<TOOLCALL>",), "<TOOLCALL>", "</TOOLCALL>", "json"),
    # Phi 4 mini; Granite 3
    Calls(("<|/tool_call|>",), "<|tool_call|>", "<|/tool_call|>", "json"),
    Calls(("<|tool_call|>",), "<|tool_call|>", "", "json"),
    # GigaChat 3.1, 3
    Calls(("<|function_call|>",), "<|function_call|>", "", "json"),
    Calls(("function call", "<|role_sep|>", "<|message_sep|>"), "<|message_sep|>\n\nfunction call<|role_sep|>\n", "",
          "json"),
    # Firefunction 2
    Calls(("functools[",), "functools", "", "json"),
    # Functionary 3.1
    Calls(("<function=", "</function>"), "<function=", "</function>", "name-json", r"(?P<name>[^>{]*)>"),
    # Llama 3: the whole message is a call
    Calls(('"parameters": dictionary of argument name',), "{", "", "json"),
)  # fmt: skip

SWITCHES = (
    Switch("enable_thinking", True, False),
    Switch("thinking", True, False),
    Switch("thinking_mode", "enabled", "disabled"),
    Switch("reasoning_effort", "high", "none"),
    Switch("reasoning_effort", "high", "no_think"),
    Switch("thinking_budget", -1, 0),
)
"""What templates call it. One has it if its name, and a value that is a word, stand in the source, and both values make
a difference."""


def find_format(source: str, has_piece: Callable[[str], bool] = lambda piece: False) -> ResponseFormat:
    """The format that a template's source speaks of. has_piece: whether the vocabulary has a piece of this spelling."""
    thoughts = next((row for row in THOUGHTS if all(sign in source for sign in row.signs)), None)
    if thoughts is None:
        thoughts = next((row for row in THOUGHTS_BY_PIECES if has_piece(row.open) and has_piece(row.close)), None)
    calls = next((row for row in CALLS if all(sign in source for sign in row.signs)), None)
    return ResponseFormat(thoughts, calls)
