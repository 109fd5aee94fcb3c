"""The fields of requests, by a table: other names, null is absent, what is not known is passed over."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from qrun.engine.sampling.options import ORDERS
from qrun.server.errors import APIError

Body = Mapping[str, Any]
T = TypeVar("T")

MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_DRY_BREAKERS = 64
_LARGEST = 1e30  # of numbers that are not counts: what is computed from it is still a float32


def wrong(name: str, wanted: str, value: Any) -> APIError:
    """A field is of a wrong type or out of range."""
    shown = repr(value)
    return APIError(f"{name} must be {wanted}, not {shown if len(shown) < 80 else type(value).__name__}", param=name)


def real(name: str, value: Any) -> float:
    """A number; texts of numbers are taken too."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise wrong(name, "a number", value) from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(name, "a number", value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise wrong(name, "a finite number", value)
    return max(min(number, _LARGEST), -_LARGEST)


def whole(name: str, value: Any) -> int:
    """A whole number; 40.0 is one."""
    if isinstance(value, int) and not isinstance(value, bool):
        return max(min(value, 1 << 62), -(1 << 62))
    number = real(name, value)
    if not number.is_integer():
        raise wrong(name, "a whole number", value)
    return int(number)


def truth(name: str, value: Any) -> bool:
    """True or false; "true", "false", 1 and 0 are taken too."""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise wrong(name, "true or false", value)


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(name, "a text", value)
    return value


def mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(name, "an object", value)
    return value


def sequence(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise wrong(name, "a list", value)
    return value


def field(body: Body, names: str, read: Callable[[str, Any], T], default: T) -> T:
    """The first of some fields (names between spaces) that is there and not null."""
    for name in names.split():
        if body.get(name) is not None:
            return read(name, body[name])
    return default


def optional(body: Body, names: str, read: Callable[[str, Any], T]) -> T | None:
    """The same, or None."""
    return field(body, names, read, None)


def items(body: Body, names: str) -> list[Any]:
    """A field that is a list; an empty one where it is absent."""
    empty: list[Any] = []
    return field(body, names, sequence, empty)


def members(body: Body, names: str) -> dict[str, Any]:
    """A field that is an object; an empty one where it is absent."""
    empty: dict[str, Any] = {}
    return field(body, names, mapping, empty)


def at_least_zero(name: str, value: Any) -> float:
    return max(real(name, value), 0.0)


def count(name: str, value: Any) -> int:
    return max(whole(name, value), 0)


def whole_or_none(name: str, value: Any) -> int | None:
    """A limit or a seed; a negative one stands for none."""
    number = whole(name, value)
    return number if number >= 0 else None


def mirostat(name: str, value: Any) -> int:
    number = whole(name, value)
    if number not in (0, 2):
        raise wrong(name, "0 or 2", value)
    return number


def stop_strings(name: str, value: Any) -> tuple[str, ...]:
    """A text, or a list of texts; empty ones mean none."""
    if not isinstance(value, str | list):
        raise wrong(name, "a text or a list of texts", value)
    values = [value] if isinstance(value, str) else value
    return tuple(one for one in (text(name, one) for one in values) if one)


def dry_breakers(name: str, value: Any) -> tuple[str, ...]:
    """The same, of which there are not too many: the whole vocabulary is searched for each."""
    texts = stop_strings(name, value)
    if len(texts) > MAX_DRY_BREAKERS:
        raise APIError(f"{name} has {len(texts)} texts: a request can have {MAX_DRY_BREAKERS}", param=name)
    return texts


def order(name: str, value: Any) -> str:
    """In which masks are settled."""
    if value not in ORDERS:
        raise wrong(name, f"one of {', '.join(ORDERS)}", value)
    return str(value)


def adapters(name: str, value: Any) -> Any:
    """llama-server's list of objects with the number of an adapter and a scale; or names: one, a list, or an object
    with their scales, as `Model.generate` takes them."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return {one: real(f"{name}.{one}", scale) for one, scale in value.items()}
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return value
    chosen: dict[str | int, float] = {}
    for one in sequence(name, value):
        if not isinstance(one, dict) or ("id" not in one and "name" not in one):
            raise wrong(name, 'a list of objects such as {"id": 0, "scale": 1.0}', value)
        which = text(f"{name}.name", one["name"]) if "name" in one else whole(f"{name}.id", one["id"])
        chosen[which] = 1.0 if one.get("scale") is None else real(f"{name}.scale", one["scale"])
    return chosen


@dataclass(frozen=True)
class Option:
    """An option of sampling, and the fields that mean it, of which the first that is there counts."""

    option: str
    names: str
    read: Callable[[str, Any], Any]


SAMPLING = (
    Option("temperature", "temperature temp", at_least_zero),
    Option("top_k", "top_k", count),
    Option("top_p", "top_p", real),
    Option("min_p", "min_p", real),
    Option("typical_p", "typical_p typ_p", real),
    Option("repetition_penalty", "repetition_penalty repeat_penalty", real),
    Option("repetition_window", "repetition_window repeat_last_n", whole),
    Option("presence_penalty", "presence_penalty", real),
    Option("frequency_penalty", "frequency_penalty", real),
    Option("dry_multiplier", "dry_multiplier", real),
    Option("dry_base", "dry_base", real),
    Option("dry_allowed_length", "dry_allowed_length", whole),
    Option("dry_range", "dry_range dry_penalty_last_n", whole),
    Option("dry_breakers", "dry_breakers dry_sequence_breakers", dry_breakers),
    Option("xtc_probability", "xtc_probability", real),
    Option("xtc_threshold", "xtc_threshold", real),
    Option("mirostat", "mirostat", mirostat),
    Option("mirostat_tau", "mirostat_tau", real),
    Option("mirostat_eta", "mirostat_eta", real),
    Option("seed", "seed", whole_or_none),
    Option("max_tokens", "max_completion_tokens max_tokens n_predict num_predict max_output_tokens", whole_or_none),
    Option("min_tokens", "min_tokens", count),
    Option("ignore_eos", "ignore_eos", truth),
    Option("stop", "stop stop_sequences", stop_strings),
    Option("lookup", "lookup", truth),
    Option("diffusion_steps", "diffusion_steps", whole),
    Option("diffusion_block", "diffusion_block", whole),
    Option("diffusion_order", "diffusion_order", order),
    Option("lora", "lora", adapters),
    Option("reasoning_budget", "reasoning_budget thinking_budget_tokens reasoning_budget_tokens", whole_or_none),
)


def top_count(body: Body, name: str, default: int = 0) -> int:
    """How many of the likeliest tokens are told, as a field of this name says."""
    top = field(body, name, whole, default)
    if not 0 <= top <= MAX_TOP_LOGPROBS:
        raise wrong(name, f"from 0 to {MAX_TOP_LOGPROBS}", top)
    return top


def prompt_logprobs(body: Body) -> int | None:
    """vLLM's field of this name: how many are told for each place of the prompt; None for no such table."""
    return None if body.get("prompt_logprobs") is None else top_count(body, "prompt_logprobs")


def sampling_options(body: Body) -> dict[str, Any]:
    """What a request says of sampling and the end, as options of `Model.generate`, `logit_bias` and log probabilities
    apart."""
    options: dict[str, Any] = {}
    for one in SAMPLING:
        value = field(body, one.names, one.read, None)
        if value is not None:
            options[one.option] = value
    if options.get("top_p") == 0:  # which some send for greedy
        options |= {"top_p": 1.0, "temperature": 0.0}
    return options


def logit_bias(body: Body, encode: Callable[[str], list[int]], n_vocab: int) -> dict[int, float]:
    """The field of this name: an object of ids (as texts, as JSON has it) or texts, or a list of pairs; false bans."""
    given = body.get("logit_bias")
    pairs: list[Any] = []
    if isinstance(given, dict):
        pairs = list(given.items())
    elif given is not None:
        pairs = sequence("logit_bias", given)
    biases: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise wrong("logit_bias", "an object of token ids and numbers", given)
        key, value = pair
        bias = -math.inf if value is False else max(min(real("logit_bias", value), 100.0), -100.0)
        if bias <= -100:
            bias = -math.inf
        for id in _ids(key, encode):
            if not 0 <= id < n_vocab:
                raise APIError(f"logit_bias: token {id} is not in the vocabulary of {n_vocab}", param="logit_bias")
            biases[id] = bias
    return biases


def _ids(key: Any, encode: Callable[[str], list[int]]) -> list[int]:
    if isinstance(key, int) and not isinstance(key, bool):
        return [key]
    if isinstance(key, str):
        is_id = key.strip().removeprefix("-").isdecimal() and len(key) < 12
        return [int(key)] if is_id else encode(key)
    raise wrong("logit_bias", "an object of token ids and numbers", key)
