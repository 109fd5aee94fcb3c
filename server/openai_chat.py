"""`/v1/chat/completions`."""

from __future__ import annotations

import json
import secrets
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from qrun.server import fields
from qrun.server.chat_requests import ChatRequest, call_id, openai_chat
from qrun.server.errors import APIError, openai_shape
from qrun.server.exchange import Exchange, dumps
from qrun.server.running import finish_reason
from qrun.server.state import FINGERPRINT, State, prompt_progress, timings, usage
from qrun.server.threads import in_daemon

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qrun.engine import Generation, Model, Piece
    from qrun.engine.figures import TokenLogprob
    from qrun.engine.text.tool_calls import ToolCall
    from qrun.server.hub import Entry

DONE = b"data: [DONE]\n\n"


def sse_error(error: APIError) -> bytes:
    """An error within a stream."""
    return f"data: {dumps(openai_shape(error))}\n\n".encode()


def comment() -> bytes:
    """What keeps a stream alive, and no client reads."""
    return b":\n\n"


async def chat_completions(state: State, exchange: Exchange) -> None:
    body = exchange.body
    request = openai_chat(body)
    stream = fields.field(body, "stream", fields.truth, False)
    top = fields.prompt_logprobs(body)
    if stream and top is not None:
        raise APIError("prompt_logprobs and stream do not go together", param="prompt_logprobs")
    async with state.begin(body.get("model"), request.start) as (entry, generations, place):
        if not stream:
            async with aclosing(state.steps(generations, place, exchange.arrived)) as found:  # type: ignore[type-var]
                pieces: list[list[Piece]] = [[] for _ in generations]
                async for number, some in found:
                    pieces[number] += some
            table: dict[str, Any] = {}
            if top is not None:
                tokens = await state.in_thread(request.prompt_tokens, entry.loaded)
                scored = await in_daemon(entry.loaded.prompt_logprobs, tokens, top, request.options.get("lora"))
                table["prompt_logprobs"] = await state.in_thread(prompt_table, scored, top, entry.loaded)
            await state.answer(exchange, lambda: completion(request, entry, generations, pieces) | table)
            return
        writer = ChatStream(request, body, state, entry, generations)
        exchange.error_frame = sse_error
        ping = writer.ping if writer.tells_progress else comment
        async with exchange.stream("text/event-stream", writer.begin(), ping, state.settings.ping_seconds):
            async with aclosing(state.steps(generations, place, exchange.arrived)) as found:  # type: ignore[type-var]
                async for number, some in found:
                    if frames := writer.frames(number, some):
                        await exchange.write(frames)
            await exchange.write(writer.end())


def completion(
    request: ChatRequest, entry: Entry, generations: list[Generation], pieces: list[list[Piece]]
) -> dict[str, Any]:
    """The whole answer."""
    model = entry.loaded
    answers = []
    for index, generation in enumerate(generations):
        content = [piece for piece in pieces[index] if piece.channel == "content" and piece.token is not None]
        answers.append({
            "index": index,
            "message": message(request, generation, model),
            "logprobs": {"content": logprobs(content, model), "refusal": None} if request.options["logprobs"] else None,
            "finish_reason": reason_of(request, generation),
        })  # fmt: skip
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": entry.id,
        "choices": answers,
        "usage": usage(generations),
        "system_fingerprint": FINGERPRINT,
        "timings": timings(generations[0]),
    }


def message(request: ChatRequest, generation: Generation, model: Model) -> dict[str, Any]:
    """The answer's message."""
    calls = allowed_calls(request, generation)
    told: dict[str, Any] = {"role": "assistant", "content": generation.text or (None if calls else ""), "refusal": None}
    if generation.reasoning:
        told["reasoning_content"] = told["reasoning"] = generation.reasoning
    functions = [
        {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)} for call in calls
    ]  # fmt: skip
    if functions and request.old_calls:
        told["function_call"] = functions[0]
    elif functions:
        told["tool_calls"] = [
            {"id": call_id(call, model), "type": "function", "function": function}
            for call, function in zip(calls, functions, strict=True)
        ]
    return told


def reason_of(request: ChatRequest, generation: Generation) -> str:
    """Why an answer has ended, to a client that knows tools or does not."""
    reason = finish_reason(generation)
    return "function_call" if reason == "tool_calls" and request.old_calls else reason


def allowed_calls(request: ChatRequest, generation: Generation) -> list[ToolCall]:
    """The calls that have been read, only the first where a client cannot take more."""
    return generation.tool_calls[:1] if request.one_call else generation.tool_calls


def logprobs(pieces: list[Piece], model: Model) -> list[dict[str, Any]]:
    """How likely the tokens of some pieces were."""
    told = []
    for piece in pieces:
        assert piece.token is not None
        top = [_token(id, logprob, model) for id, logprob in piece.top_logprobs or ()]
        told.append(_token(piece.token, piece.logprob or 0.0, model) | {"top_logprobs": top})
    return told


def _token(id: int, logprob: float, model: Model) -> dict[str, Any]:
    assert model.tokenizer is not None
    data = model.tokenizer.token_bytes(id)
    return {
        "token": data.decode("utf-8", "replace"),
        "logprob": max(logprob, -9999.0),
        "bytes": list(data),
        "id": id,
    }


def prompt_table(scored: Sequence[TokenLogprob | None], top: int, model: Model) -> list[dict[str, Any] | None]:
    """The tokens of a prompt as vLLM tells how likely they were: by their ids, each with the likeliest in its place."""

    def one(id: int, logprob: float, rank: int) -> dict[str, Any]:
        text = model.tokenizer.token_bytes(id).decode("utf-8", "replace") if model.tokenizer is not None else ""
        return {"logprob": max(logprob, -9999.0), "rank": rank, "decoded_token": text}

    table: list[dict[str, Any] | None] = []
    for place in scored:
        if place is None:
            table.append(None)
            continue
        told = {str(place.token): one(place.token, place.logprob, place.rank)}
        for rank, (id, logprob) in enumerate(place.top[:top], 1):
            told.setdefault(str(id), one(id, logprob, rank))
        table.append(told)
    return table


class ChatStream:
    """The frames of an answer that is streamed. They are put together by hand: they are most of what a token costs
    the server."""

    def __init__(
        self, request: ChatRequest, body: dict[str, Any], state: State, entry: Entry, generations: list[Generation]
    ) -> None:
        self._request = request
        self._model = entry.loaded
        self._generations = generations
        self._logprobs: list[list[dict[str, Any]]] | None = None
        if request.options["logprobs"]:
            self._logprobs = [[] for _ in generations]
        options = fields.members(body, "stream_options")
        self._with_usage = state.settings.always_usage or fields.field(options, "include_usage", fields.truth, False)
        self._with_timings = fields.field(body, "timings_per_token", fields.truth, False)
        self.tells_progress = fields.field(body, "return_progress", fields.truth, False)
        self._begun = time.perf_counter()
        head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": entry.id,
            "system_fingerprint": FINGERPRINT,
        }
        self._head = f"data: {dumps(head)[:-1]}"
        self._starts = [f'{self._head},"choices":[{{"index":{i},"delta":' for i in range(len(generations))]
        self._n_calls = [0] * len(generations)

    def begin(self) -> bytes:
        """The frames that say that an answer has begun."""
        return "".join(
            self._frame(i, '{"role":"assistant","content":""}', None) for i in range(len(self._generations))
        ).encode()

    def ping(self) -> bytes:
        """How far the prompt has been read."""
        told = prompt_progress(self._generations[0], self._begun)
        return f'{self._head},"choices":[],"prompt_progress":{dumps(told)}}}\n\n'.encode()

    def frames(self, number: int, pieces: list[Piece]) -> bytes:
        """What a step brings; nothing where all of it is held back."""
        texts = {"content": "", "reasoning": ""}
        for piece in pieces:
            if piece.channel != "tool_call":
                texts[piece.channel] += piece
        found = ""
        if texts["reasoning"]:
            text = dumps(texts["reasoning"])
            found += self._frame(number, f'{{"reasoning_content":{text},"reasoning":{text}}}', None)
        if self._logprobs is not None:
            content = [piece for piece in pieces if piece.channel == "content" and piece.token is not None]
            self._logprobs[number] += logprobs(content, self._model)
        if texts["content"]:
            found += self._frame(number, f'{{"content":{dumps(texts["content"])}}}', None)
        return (found + self._calls(number)).encode()

    def _calls(self, number: int) -> str:
        """The calls that have not been told yet."""
        calls = allowed_calls(self._request, self._generations[number])
        if len(calls) == self._n_calls[number]:
            return ""
        found = ""
        for index in range(self._n_calls[number], len(calls)):
            call = calls[index]
            name = {"name": call.name, "arguments": ""}
            arguments = {"arguments": json.dumps(call.arguments, ensure_ascii=False)}
            deltas: list[dict[str, Any]]
            if self._request.old_calls:
                deltas = [{"function_call": name}, {"function_call": arguments}]
            else:
                begin = {"index": index, "id": call_id(call, self._model), "type": "function", "function": name}
                deltas = [{"tool_calls": [begin]}, {"tool_calls": [{"index": index, "function": arguments}]}]
            found += "".join(self._frame(number, dumps(delta), None) for delta in deltas)
        self._n_calls[number] = len(calls)
        return found

    def _frame(self, number: int, delta: str, reason: str | None) -> str:
        told = "null"
        ended = "null" if reason is None else dumps(reason)
        if self._logprobs is not None and self._logprobs[number] and '"content"' in delta[:12]:
            told = dumps({"content": self._logprobs[number], "refusal": None})
            self._logprobs[number] = []
        end = f'{self._starts[number]}{delta},"logprobs":{told},"finish_reason":{ended}}}]'
        if self._with_timings or reason is not None:
            end += f',"timings":{dumps(timings(self._generations[number]))}'
        return end + "}\n\n"

    def end(self) -> bytes:
        """The frames that say why the answers have ended, and what they took."""
        found = ""
        for number, generation in enumerate(self._generations):
            found += self._calls(number)
            if self._logprobs is not None and self._logprobs[number]:
                found += self._frame(number, '{"content":""}', None)
            found += self._frame(number, "{}", reason_of(self._request, generation))
        if self._with_usage:
            found += f'{self._head},"choices":[],"usage":{dumps(usage(self._generations))}}}\n\n'
        return found.encode() + DONE
