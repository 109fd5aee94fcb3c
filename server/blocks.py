"""What a generation brings, in order: thoughts, answer, calls. For interfaces whose answers are made of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from qrun.engine import Generation, Piece
    from qrun.engine.text.tool_calls import ToolCall
    from qrun.server.chat_requests import ChatRequest

Part = tuple[Literal["reasoning", "content"], str] | tuple[Literal["call"], "ToolCall"]


class Parts:
    """Of one generation. Texts of one kind that come together are one part."""

    def __init__(self, request: ChatRequest, generation: Generation) -> None:
        self._most = 1 if request.one_call else None
        self._generation = generation
        self._n_calls = 0
        self.tokens: list[Piece] = []
        """Those of the answer that carry a token, for who tells how likely they were, and takes them away."""

    def of(self, pieces: Iterable[Piece]) -> Iterator[Part]:
        """The parts of some pieces."""
        kind: Literal["reasoning", "content"] = "content"
        text = ""
        for piece in pieces:
            if piece.logprob is not None and piece.channel == "content":
                self.tokens.append(piece)
            if piece.channel == "tool_call":
                if text:
                    yield kind, text
                    text = ""
                yield from self.calls()
            elif piece:
                if piece.channel != kind and text:
                    yield kind, text
                    text = ""
                kind = piece.channel
                text += piece
        if text:
            yield kind, text

    @property
    def has_more(self) -> bool:
        """Are there calls that have not come yet?"""
        return len(self._generation.tool_calls[: self._most]) > self._n_calls

    def calls(self) -> Iterator[Part]:
        """The calls that have not come yet."""
        calls = self._generation.tool_calls[: self._most]
        for call in calls[self._n_calls :]:
            self._n_calls += 1
            yield "call", call
