"""A request for the next message of a conversation, whatever interface it came by."""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qrun.server import fields
from qrun.server.errors import APIError, not_supported
from qrun.server.structure import structure, tool_choice

if TYPE_CHECKING:
    from qrun.engine import Generation, Model
    from qrun.engine.text.tool_calls import ToolCall

_NO_EFFORT = ("none", "minimal", "off", "disabled")
# Fields of `chat_template_kwargs` that the server sees to itself.
_OWN_VARIABLES = ("messages", "tools", "add_generation_prompt", "special_tokens_in_messages")


@dataclass
class ChatRequest:
    """think: None leaves it to the model. variables: for the template. structure: more arguments of `Model.chat`."""

    messages: list[Any]
    tools: list[Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    think: bool | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    continue_last: bool = False
    one_call: bool = False
    """Whether at most one function may be called."""
    old_calls: bool = False
    """Whether a call is told as `function_call`, as before there were tools."""
    n: int = 1
    structure: dict[str, Any] = field(default_factory=dict)
    bias_body: Mapping[str, Any] = field(default_factory=dict)
    """Where `logit_bias` stands."""

    def start(self, model: Model, lora: dict[str, Any]) -> list[Generation]:
        """Begin as many generations as are wanted. Takes a while, as long prompts do; not for the event loop. lora: the
        option of this name, where the name of the model that was asked for is an adapter's."""
        if model.tokenizer is None:
            raise APIError("the model has no tokenizer that can be used, and so no chat", 501, "not_supported_error")
        options = self.options = lora | self.options | bias_option(self.bias_body, model)
        seed = options.get("seed")
        generations = []
        for number in range(self.n):
            if seed is not None:
                options["seed"] = seed + number
            generations.append(
                model.chat(self.messages, **self.arguments(model), **self.structure, **options)
            )
        return generations

    def prompt(self, model: Model) -> str:
        """What the model would go on from."""
        return model.chat_prompt(self.messages, **self.arguments(model))

    def prompt_tokens(self, model: Model) -> list[int]:
        """The tokens of that."""
        return model.template_tokens(self.prompt(model))

    def arguments(self, model: Model) -> dict[str, Any]:
        """The arguments of `Model.chat_prompt` but the messages."""
        think = self.think
        template = model.chat_template
        if think and template is not None and template.format.thoughts is None:
            think = None  # a model that does not think answers all the same
        return {
            "tools": self.tools or None,
            "template_variables": self.variables,
            "think": think,
            "continue_last": self.continue_last,
        }


def bias_option(body: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """The option `logit_bias`, if a request has anything of the kind."""
    if body.get("logit_bias") is None:
        return {}
    tokenizer = model.tokenizer
    assert tokenizer is not None

    def encode(text: str) -> list[int]:
        return model.tokenize(text, add_special=False)

    return {"logit_bias": fields.logit_bias(body, encode, tokenizer.n_vocab)}


def openai_chat(body: Mapping[str, Any]) -> ChatRequest:
    """The request in the body of `/v1/chat/completions`."""
    messages = fields.items(body, "messages")
    if not messages:
        raise APIError("messages must be a list of at least one message", param="messages")
    if any(kind != "text" for kind in fields.items(body, "modalities")):
        raise not_supported("modalities can be text alone: this model writes nothing else", "modalities")
    tools = functions(fields.items(body, "tools"))
    parallel = fields.field(body, "parallel_tool_calls", fields.truth, True)
    old = functions(fields.items(body, "functions"), "functions")
    if old and tools:
        raise APIError("functions and tools do not go together", param="functions")
    if old:
        tools, forced = tool_choice(old_choice(body), old, parallel=False, field="function_call")
        parallel = False
    else:
        tools, forced = tool_choice(body.get("tool_choice"), tools, parallel=parallel)
    options = fields.sampling_options(body)
    options |= logprob_options(body)
    request = ChatRequest(
        messages,
        tools,
        options,
        continue_last=continues(body, messages),
        one_call=not parallel,
        old_calls=bool(old),
        n=choices(body),
        structure=structure(body, body.get("response_format")) | forced,
        bias_body=body,
    )
    read_thinking(body, request)
    return request


def old_choice(body: Mapping[str, Any]) -> Any:
    """What `function_call` says, as `tool_choice` would."""
    choice = body.get("function_call")
    return {**choice, "type": "function"} if isinstance(choice, dict) else choice


def functions(tools: list[Any], field: str = "tools") -> list[Any]:
    """The descriptions of functions among tools; of other kinds there are none here. Those without the object around
    that this interface has (the Responses interface has none) get it. field: that they come from."""
    found = []
    for number, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type", "function") != "function":
            continue
        if not isinstance(tool.get("function"), dict):
            if not isinstance(tool.get("name"), str):
                raise APIError(f"{field}[{number}] has no function", param=field)
            tool = {"type": "function", "function": {key: tool[key] for key in tool if key not in ("type", "strict")}}
        found.append(tool)
    return found


def choices(body: Mapping[str, Any]) -> int:
    """How many answers are wanted."""
    n = fields.field(body, "n", fields.whole, 1)
    if not 1 <= n <= fields.MAX_CHOICES:
        raise fields.wrong("n", f"from 1 to {fields.MAX_CHOICES}", n)
    return n


def logprob_options(body: Mapping[str, Any]) -> dict[str, Any]:
    """Of the chat interface: `logprobs` says whether, `top_logprobs` how many more, and so whether, if nothing else
    does."""
    top = fields.top_count(body, "top_logprobs", fields.top_count(body, "n_probs"))  # the second is llama-server's
    wanted = fields.field(body, "logprobs", fields.truth, top > 0)
    return {"logprobs": wanted, "top_logprobs": top if wanted else 0}


def continues(body: Mapping[str, Any], messages: list[Any]) -> bool:
    """Is the last message the beginning of the answer?"""
    last = messages[-1]
    if not isinstance(last, dict) or last.get("role") != "assistant":
        return False
    if last.get("tool_calls") or last.get("function_call"):
        return False
    if body.get("continue_final_message") is not None:
        return fields.truth("continue_final_message", body["continue_final_message"])
    return body.get("add_generation_prompt") is not True and len(messages) > 1 and bool(last.get("content"))


def read_thinking(body: Mapping[str, Any], request: ChatRequest) -> None:
    """All the ways in which clients say whether a model is to think, and how much."""
    variables = dict(fields.members(body, "chat_template_kwargs"))
    for name in _OWN_VARIABLES:
        variables.pop(name, None)
    think: Any = None
    effort: Any = body.get("reasoning_effort")
    reasoning = body.get("reasoning")
    if isinstance(reasoning, dict):
        effort = reasoning.get("effort") if effort is None else effort
        if isinstance(reasoning.get("enabled"), bool):
            think = reasoning["enabled"]
        if reasoning.get("max_tokens") is not None:
            budget = fields.whole("reasoning.max_tokens", reasoning["max_tokens"])
            request.options.setdefault("reasoning_budget", max(budget, 0))
    if effort is not None:
        effort = fields.text("reasoning_effort", effort)
        think = effort not in _NO_EFFORT
        if think:
            variables.setdefault("reasoning_effort", effort)
    kind = body.get("thinking")
    if isinstance(kind, dict):
        if kind.get("type") in ("enabled", "adaptive"):
            think = True
        elif kind.get("type") == "disabled":
            think = False
        if kind.get("type") == "enabled" and kind.get("budget_tokens") is not None:
            budget = fields.whole("thinking.budget_tokens", kind["budget_tokens"])
            request.options.setdefault("reasoning_budget", max(budget, 0))
    for switch in (body.get("enable_thinking"), variables.pop("enable_thinking", None), body.get("think")):
        if isinstance(switch, str) and switch in ("low", "medium", "high"):
            think = True
            variables.setdefault("reasoning_effort", switch)
        elif switch is not None:
            think = fields.truth("think", switch)
    request.think = think
    request.variables = variables


def call_id(call: ToolCall, model: Model) -> str:
    """The id under which a call is told to a client. Templates of Mistral's want nine letters and digits."""
    if call.id:
        return call.id
    template = model.chat_template
    if template is not None and "length 9" in template.source:
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"
