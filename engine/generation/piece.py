"""What a generation gives, token by token."""

from typing import NamedTuple, Self

from qrun.engine.text.response_formats import Channel


class Sampled(NamedTuple):
    """A token that has been chosen."""

    token: int
    logprob: float | None
    top_logprobs: list[tuple[int, float]] | None
    n_free: int
    """Positions that were left before it."""


class Piece(str):
    """Text of one generated token, as far as it can be shown yet.

    It is "" while the token only begins a character, or what may become a stop string or a mark of the model's format;
    the piece that completes it has it all. All pieces of the channel "content" joined are the text of the generation.
    """

    token: int | None
    """The token; None for more text of the same token, and for what was held back until the end and that no token is
    left for."""
    logprob: float | None
    """Natural logarithm of the token's probability, by the model's logits as they came; None with `logprobs` off, and
    for a token that the model did not choose, as where `reasoning_budget` ends a thought."""
    top_logprobs: list[tuple[int, float]] | None
    """The likeliest tokens in the token's place, each with its logarithm, if `top_logprobs` asks for some."""
    channel: Channel
    """What the text is: "content" (the answer), "reasoning" (what the model thinks before it), or "tool_call". Always
    "content" but in answers of `Model.chat`, and of sessions that are given a `response`."""

    def __new__(
        cls,
        text: str,
        token: int | None = None,
        logprob: float | None = None,
        channel: Channel = "content",
        top_logprobs: list[tuple[int, float]] | None = None,
    ) -> Self:
        piece = super().__new__(cls, text)
        piece.token = token
        piece.logprob = logprob
        piece.channel = channel
        piece.top_logprobs = top_logprobs
        return piece
