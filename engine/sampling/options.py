"""Options of sampling and of the end of a generation: their defaults, their checks, their names."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from qrun.engine.arguments import whole_number

SAMPLERS = ("penalties", "dry", "top_k", "typical_p", "top_p", "min_p", "xtc", "temperature")
"""Names and default order of the steps between the logits and the choice of a token."""

ORDERS = ("confidence", "margin", "entropy", "random")
"""In which masks are settled: see `diffusion_order`."""

# What a step may also be called, all in lower case without "-" and "_", as GGUF files and other engines spell it.
_SAMPLER_SPELLINGS = {name.replace("_", ""): name for name in SAMPLERS} | {
    "typp": "typical_p",
    "typ": "typical_p",
    "nucleus": "top_p",
    "temp": "temperature",
}

# GGUF metadata key (under "general.sampling.") -> field of SamplingOptions
_METADATA_FIELDS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold",
    "penalty_last_n": "repetition_window",
    "penalty_repeat": "repetition_penalty",
    "mirostat": "mirostat",
    "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
}


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a token is chosen from logits, and when a generation ends.

    The steps run in the order of `samplers`, each on what the one before it left over; `logit_bias`
    comes before all of them. Every value is checked: a wrong one is a ValueError of one line.
    """

    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token (after logit bias and penalties), whatever else is set."""
    top_k: int = 40
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the fewest likeliest tokens whose probabilities sum to at least this; 1 keeps all."""
    min_p: float = 0.05
    """Keep tokens at least this share as likely as the likeliest; 0 keeps all."""
    typical_p: float = 1.0
    """Locally typical sampling (arXiv:2202.00666): keep this much probability, those tokens first whose
    surprise is nearest the entropy; 1 keeps all."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens seen in the window, multiplies negative ones; 1 does nothing."""
    repetition_window: int = 64
    """Tokens back to which the three penalties look, the prompt's included; -1 for all, 0 for none."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of a token seen in the window."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token for each time that it was seen in the window."""
    dry_multiplier: float = 0.0
    """DRY: a token that would make a repeat of n tokens one longer loses
    dry_multiplier * dry_base ** (n - dry_allowed_length); 0 switches it off."""
    dry_base: float = 1.75
    """DRY: see `dry_multiplier`; at least 1."""
    dry_allowed_length: int = 2
    """DRY: repeats shorter than this cost nothing."""
    dry_range: int = -1
    """DRY: tokens back to which repeats are looked for; -1 for all, 0 for none."""
    dry_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    """DRY: texts across which nothing counts as a repeat."""
    xtc_probability: float = 0.0
    """XTC: the chance, at each token, that of all tokens above `xtc_threshold` only the least likely is kept."""
    xtc_threshold: float = 0.1
    """XTC: see `xtc_probability`; above 0.5 no two tokens can pass it, which switches XTC off."""
    mirostat: int = 0
    """2 puts Mirostat 2.0 (arXiv:2007.14966) in place of all truncating steps; 0 is off."""
    mirostat_tau: float = 5.0
    """Mirostat: the surprise to aim at, in bits."""
    mirostat_eta: float = 0.1
    """Mirostat: the learning rate."""
    samplers: tuple[str, ...] = SAMPLERS
    """The steps to run, in order (see `SAMPLERS`); a step that is not named does not run."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> what is added to its logit; -inf bans it."""
    logprobs: bool = True
    """Whether each token's log probability is computed (0.13 ms at 262,144 tokens, where a sample takes 0.08)."""
    top_logprobs: int = 0
    """How many of the likeliest tokens are told with each token, with their log probabilities."""
    seed: int | None = None
    """Same seed, same choices; None takes a new one from the system."""
    lookup: bool = False
    """Guess tokens from the text so far and check several at once: faster where the answer repeats parts of the
    prompt, and the same text."""
    draft: bool = True
    """Use the draft that the model was loaded with, if there is one; without it, the text is the same."""
    max_tokens: int | None = None
    """The most tokens to generate; None goes on until the model stops or the context is full."""
    min_tokens: int = 0
    """The fewest tokens to generate: before, neither what ends a turn nor a stop string ends the text. A grammar still
    does, where it allows nothing more."""
    ignore_eos: bool = False
    """Go on where the model would end its turn, until something else ends the text."""
    reasoning_budget: int | None = None
    """The most tokens to think with before the answer, in a chat with a model that thinks: then the thought is ended
    for it. 0 has it answer at once; None lets it think as long as it wants."""
    diffusion_steps: int | None = None
    """Of models that write by diffusion: how often the model looks at the text while it is filled in; None is once for
    each token. With fewer the text comes sooner, and is worse."""
    diffusion_block: int | None = None
    """Of these: so many tokens are filled in before those behind them; 0 fills in the whole text at once, None is as
    the model was trained."""
    diffusion_order: str = "confidence"
    """Of these: which tokens are settled first: those that are likeliest ("confidence"), those whose second choice is
    least likely ("margin"), those of the smallest entropy ("entropy"), or any ("random")."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation; they are not part of its text, not even their beginnings. In thoughts they end
    nothing."""

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            # Written back in the one type that the rest relies on: an int given as np.int64, a str as 1-tuple, ...
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}, and max_tokens {self.max_tokens}: no text can be both")

    def replace(self, **changes: Any) -> "SamplingOptions":
        """A copy with the given fields changed; a change to None leaves the field as it is.

        Raises TypeError for a name that is no option, with the nearest that is; ValueError for a wrong value.
        """
        for name in changes:
            if name not in _CHECKS:
                raise TypeError(_unknown_option(name))
        return dataclasses.replace(self, **{name: value for name, value in changes.items() if value is not None})

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "SamplingOptions":
        """The defaults that a GGUF file asks for with its `general.sampling.*` keys.

        They are hints of whoever made the file: what is malformed, out of range or not known here is passed over.
        Values that the format allows as "off" become the spelling used here (top_k -1 is 0, temp below 0 is 0).
        """
        options = cls()
        for key, name in _METADATA_FIELDS.items():
            value = metadata.get("general.sampling." + key)
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                if name in ("top_k", "temperature"):
                    value = max(value, 0)
                options = _with_hint(options, name, value)
        sequence = metadata.get("general.sampling.sequence")
        if isinstance(sequence, str):
            names = [_sampler_name(name) for name in sequence.split(";")]
            known = tuple(dict.fromkeys(name for name in names if name is not None))
            if known:
                options = _with_hint(options, "samplers", known)
        return options


class SamplingArguments(TypedDict, total=False):
    """The fields of SamplingOptions as they may be given by keyword, for editors and type checkers. None is as good as
    not given."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    repetition_window: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    dry_multiplier: float | None
    dry_base: float | None
    dry_allowed_length: int | None
    dry_range: int | None
    dry_breakers: str | Iterable[str] | None
    xtc_probability: float | None
    xtc_threshold: float | None
    mirostat: int | None
    mirostat_tau: float | None
    mirostat_eta: float | None
    samplers: str | Iterable[str] | None
    logit_bias: Mapping[int, float] | None
    logprobs: bool | None
    top_logprobs: int | None
    seed: int | None
    lookup: bool | None
    draft: bool | None
    max_tokens: int | None
    min_tokens: int | None
    ignore_eos: bool | None
    reasoning_budget: int | None
    diffusion_steps: int | None
    diffusion_block: int | None
    diffusion_order: str | None
    stop: str | Iterable[str] | None


def _with_hint(options: SamplingOptions, name: str, value: Any) -> SamplingOptions:
    try:
        return options.replace(**{name: value})
    except ValueError:
        return options


def _sampler_name(spelling: str) -> str | None:
    """The name in SAMPLERS for "top-k", "topk", "Top_K", ...; None if there is none."""
    return _SAMPLER_SPELLINGS.get(spelling.strip().lower().replace("-", "").replace("_", ""))


def _unknown_option(name: str) -> str:
    import difflib  # only on the way to an error

    near = difflib.get_close_matches(name, list(_CHECKS), n=1, cutoff=0.5)
    return f"unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _integer(minimum: int, values: tuple[int, ...] | None = None) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        # Metadata and JSON write 40.0 where 40 is meant.
        given = int(value) if isinstance(value, float) and value.is_integer() else value
        number = whole_number(name, given, minimum if values is None else None, None)
        if values is not None and number not in values:
            raise ValueError(f"{name} must be {' or '.join(map(str, values))}, not {number}")
        return number

    return check


def _optional(check_present: Callable[[str, Any], int]) -> Callable[[str, Any], int | None]:
    return lambda name, value: None if value is None else check_present(name, value)


def _real(minimum: float = -math.inf, maximum: float = math.inf, positive: bool = False) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        number = _finite(name, value)
        if positive and number <= 0:
            raise ValueError(f"{name} must be above 0, not {number:g}")
        if not minimum <= number <= maximum:
            bounds = f"between {minimum:g} and {maximum:g}" if maximum < math.inf else f"at least {minimum:g}"
            raise ValueError(f"{name} must be {bounds}, not {number:g}")
        return number

    return check


def _finite(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, not {value!r}")
    return number


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {value!r}")
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"{name} must be texts that are not empty, not {text!r}")
    return texts


def _samplers(name: str, value: Any) -> tuple[str, ...]:
    steps: list[str] = []
    for text in _texts(name, value):
        step = _sampler_name(text)
        if step is None:
            raise ValueError(f"{name}: {text!r} is none of {', '.join(SAMPLERS)}")
        if step in steps:
            raise ValueError(f"{name}: {step!r} is named twice")
        steps.append(step)
    return tuple(steps)


def _order(name: str, value: Any) -> str:
    if value not in ORDERS:
        raise ValueError(f"{name} must be one of {', '.join(ORDERS)}, not {value!r}")
    return str(value)


def _bias(name: str, value: Any) -> Mapping[int, float]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must map token ids to numbers, not {value!r}")
    check_id = _integer(0)
    biases = {}
    for token, bias in value.items():
        token = check_id(f"{name}: a token id", token)
        banned = isinstance(bias, float) and bias == -math.inf
        biases[token] = -math.inf if banned else _finite(f"{name} of token {token}", bias)
    return biases


_PROBABILITY = _real(0.0, 1.0)

_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "temperature": _real(0.0),
    "top_k": _integer(0),
    "top_p": _PROBABILITY,
    "min_p": _PROBABILITY,
    "typical_p": _PROBABILITY,
    "repetition_penalty": _real(positive=True),
    "repetition_window": _integer(-1),
    "presence_penalty": _real(),
    "frequency_penalty": _real(),
    "dry_multiplier": _real(0.0),
    "dry_base": _real(1.0),
    "dry_allowed_length": _integer(1),
    "dry_range": _integer(-1),
    "dry_breakers": _texts,
    "xtc_probability": _PROBABILITY,
    "xtc_threshold": _PROBABILITY,
    "mirostat": _integer(0, values=(0, 2)),
    "mirostat_tau": _real(0.0),
    "mirostat_eta": _real(0.0),
    "samplers": _samplers,
    "logit_bias": _bias,
    "logprobs": _boolean,
    "top_logprobs": _integer(0),
    "lookup": _boolean,
    "draft": _boolean,
    "seed": _optional(_integer(0)),
    "max_tokens": _optional(_integer(0)),
    "min_tokens": _integer(0),
    "ignore_eos": _boolean,
    "reasoning_budget": _optional(_integer(0)),
    "diffusion_steps": _optional(_integer(1)),
    "diffusion_block": _optional(_integer(0)),
    "diffusion_order": _order,
    "stop": _texts,
}
