"""`/v1/completions`, with the log probabilities of prompts."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qrun.engine import ContextOverflow
from qrun.engine.embedding.embedder import names_of
from qrun.server import fields
from qrun.server.chat_requests import bias_option, choices
from qrun.server.errors import APIError
from qrun.server.exchange import Exchange, dumps, in_parts
from qrun.server.openai_chat import DONE, comment, prompt_table, sse_error
from qrun.server.prompts import Prompt, infill_tokens, prompt_tokens, read_prompts
from qrun.server.running import finish_reason
from qrun.server.state import FINGERPRINT, State, timings, usage
from qrun.server.structure import structure
from qrun.server.threads import in_daemon

if TYPE_CHECKING:
    from qrun.engine import Generation, Model, Piece
    from qrun.engine.figures import TokenLogprob
    from qrun.engine.text.tokenizer import StreamDecoder
    from qrun.server.hub import Entry

DEFAULT_MAX_TOKENS = 16  # as OpenAI's interface has it


@dataclass
class CompletionRequest:
    """prompts: one for each group of `n` answers. scored: what is known of the prompts' tokens, where it was asked
    for with `echo`."""

    prompts: list[Prompt]
    options: dict[str, Any]
    body: dict[str, Any]
    n: int = 1
    best_of: int = 1
    echo: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    suffix: str | None = None
    tokens: list[list[int]] = field(default_factory=list)
    scored: list[list[TokenLogprob | None]] = field(default_factory=list)

    def start(self, model: Model, lora: dict[str, Any]) -> list[Generation]:
        """Begin the generations, `best_of` for each prompt. lora: see `ChatRequest.start`."""
        if model.tokenizer is None and any(isinstance(prompt, str) for prompt in self.prompts):
            raise APIError("the model has no tokenizer that can be used: prompts must be token ids")
        options = self.options = lora | self.options
        options = options | (bias_option(self.body, model) if model.tokenizer is not None else {})
        for prompt in self.prompts:
            if self.suffix and isinstance(prompt, str):
                self.tokens.append(infill_tokens(model, prompt, self.suffix))
            else:
                self.tokens.append(prompt_tokens(model, prompt))
        if self.options["max_tokens"] == 0:
            self.best_of = self.n
        seed = options.get("seed")
        generations = []
        for tokens, name in zip(self.tokens, names_of(len(self.tokens), "prompt"), strict=True):
            for number in range(self.best_of):
                if seed is not None:
                    options["seed"] = seed + number
                try:
                    generations.append(model.generate(tokens, **options))
                except ContextOverflow as error:
                    error.what = name
                    raise
        return generations

    async def score(self, model: Model) -> None:
        """Find how likely the prompts' tokens were, if that is wanted."""
        wanted = [top for top in (self.logprobs if self.echo else None, self.prompt_logprobs) if top is not None]
        if wanted:
            for tokens in self.tokens:
                self.scored.append(
                    await in_daemon(model.prompt_logprobs, tokens, max(wanted), self.options.get("lora"))
                )


def read_request(body: dict[str, Any]) -> CompletionRequest:
    if body.get("prompt") is None:
        raise APIError("prompt is missing", param="prompt")
    prompts = read_prompts(body["prompt"])
    options = fields.sampling_options(body)
    if not any(body.get(name) is not None for name in ("max_tokens", "max_completion_tokens", "n_predict")):
        options["max_tokens"] = DEFAULT_MAX_TOKENS
    options.setdefault("max_tokens", None)
    wanted = body.get("logprobs")
    count: int | None = None
    if isinstance(wanted, bool):
        count = 1 if wanted else None
    elif wanted is not None:
        count = fields.whole("logprobs", wanted)
        if not 0 <= count <= fields.MAX_TOP_LOGPROBS:
            raise fields.wrong("logprobs", f"from 0 to {fields.MAX_TOP_LOGPROBS}", wanted)
    else:
        count = fields.top_count(body, "n_probs") or None  # llama-server's
    n = choices(body)
    best_of = fields.field(body, "best_of", fields.whole, n)
    if not n <= best_of <= fields.MAX_CHOICES:
        raise fields.wrong("best_of", f"from n ({n}) to {fields.MAX_CHOICES}", best_of)
    if len(prompts) * best_of > fields.MAX_CHOICES * 2:
        raise APIError(f"{len(prompts)} prompts with {best_of} answers each are too many for one request")
    options |= {"logprobs": count is not None or best_of > n, "top_logprobs": count or 0}
    options |= structure(body, body.get("response_format"))
    request = CompletionRequest(
        prompts, options, body, n, best_of,
        echo=fields.field(body, "echo", fields.truth, False),
        logprobs=count,
        prompt_logprobs=fields.prompt_logprobs(body),
        suffix=fields.optional(body, "suffix", fields.text),
    )  # fmt: skip
    if request.suffix and request.echo:
        raise APIError("echo and suffix do not go together", param="suffix")
    return request


async def completions(state: State, exchange: Exchange) -> None:
    body = exchange.body
    request = read_request(body)
    stream = fields.field(body, "stream", fields.truth, False)
    if stream and request.prompt_logprobs is not None:
        raise APIError("prompt_logprobs and stream do not go together", param="prompt_logprobs")
    if stream and request.best_of > request.n:
        raise APIError("best_of and stream do not go together", param="best_of")
    async with state.begin(body.get("model"), request.start) as (entry, generations, place):
        model = entry.loaded
        steps = state.steps(generations, place, exchange.arrived)
        head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": entry.id,
            "system_fingerprint": FINGERPRINT,
        }
        if not stream:
            pieces: list[list[Piece]] = [[] for _ in generations]
            async with aclosing(steps) as found:  # type: ignore[type-var]
                async for number, some in found:
                    pieces[number] += some
            await request.score(model)

            def told() -> dict[str, Any]:
                chosen = best(request, generations, pieces)
                choices = [choice(request, model, index, *one) for index, one in enumerate(chosen)]
                figures = usage_of_all(request, generations)
                return head | {"choices": choices, "usage": figures, "timings": timings(generations[0])}

            await state.answer(exchange, told)
            return
        exchange.error_frame = sse_error
        async with exchange.stream("text/event-stream", b":\n\n", comment, state.settings.ping_seconds):
            await place.turn()
            await request.score(model)
            writer = CompletionStream(request, state, entry, generations, head)
            if first := await state.in_thread(writer.begin):
                await exchange.write(first)
            async with aclosing(steps) as found:  # type: ignore[type-var]
                async for number, some in found:
                    if frames := writer.frames(number, some):
                        await exchange.write(frames)
            await exchange.write(writer.end())


def best(
    request: CompletionRequest, generations: Sequence[Generation], pieces: Sequence[list[Piece]]
) -> list[tuple[Generation, list[Piece], int]]:
    """Of the answers to each prompt, the `n` whose tokens the model finds likeliest, with the prompt's number."""
    chosen = []
    for number in range(len(request.prompts)):
        start = number * request.best_of
        group = list(zip(generations, pieces, strict=True))[start : start + request.best_of]
        if request.best_of > request.n:

            def likely(one: tuple[Generation, list[Piece]]) -> float:
                found = [piece.logprob for piece in one[1] if piece.logprob is not None]
                return sum(found) / max(len(found), 1)

            group.sort(key=likely, reverse=True)
        chosen += [(generation, some, number) for generation, some in group[: request.n]]
    return chosen


def choice(
    request: CompletionRequest, model: Model, index: int, generation: Generation, pieces: list[Piece], number: int
) -> dict[str, Any]:
    """One of the answers."""
    text = generation.text
    table = Legacy(model) if request.logprobs is not None else None
    if request.echo:
        if table is not None:
            of_text = isinstance(request.prompts[number], str)
            table.add_prompt(
                request.tokens[number], request.scored[number], request.logprobs or 0, of_text=of_text
            )
        text = echoed(request, model, number) + text
    if table is not None:
        table.add_pieces(pieces)
    told: dict[str, Any] = {
        "index": index,
        "text": text,
        "logprobs": table.told if table is not None else None,
        "finish_reason": finish_reason(generation),
    }
    if request.prompt_logprobs is not None:
        told["prompt_logprobs"] = prompt_table(request.scored[number], request.prompt_logprobs, model)
    return told


def echoed(request: CompletionRequest, model: Model, number: int) -> str:
    """The text of a prompt."""
    prompt = request.prompts[number]
    return prompt if isinstance(prompt, str) else model.detokenize(prompt) if model.tokenizer is not None else ""


class Legacy:
    """Log probabilities as this interface has them: parallel lists."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._offset = 0
        self._decoder: StreamDecoder | None = None
        self.told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def _add(self, id: int, logprob: float | None, top: Sequence[tuple[int, float]] | None) -> None:
        told, text = self.told, self._text(id)
        told["tokens"].append(text)
        told["token_logprobs"].append(logprob if logprob is None else max(logprob, -9999.0))
        told["top_logprobs"].append({self._text(one): max(value, -9999.0) for one, value in top} if top else None)
        told["text_offset"].append(self._offset)
        self._offset += len(self._decoder.push(id)) if self._decoder is not None else 0

    def add_prompt(
        self, tokens: Sequence[int], scored: Sequence[TokenLogprob | None], top: int, *, of_text: bool
    ) -> None:
        """of_text: the prompt was a text, and not its tokens."""
        tokenizer = self._model.tokenizer
        self._decoder = tokenizer.stream(at_start=True) if tokenizer is not None else None
        for number, (id, one) in enumerate(zip(tokens, scored, strict=True)):
            self._add(id, None if one is None else one.logprob, None if one is None else one.top[:top])
            if number == 0 and of_text and tokenizer is not None and tokenizer.add_bos and id == tokenizer.bos_id:
                self._offset = 0  # that is put before every text
        self._decoder = tokenizer.stream(skip_special=True, after=tokens[-1:]) if tokenizer is not None else None

    def add_pieces(self, pieces: Sequence[Piece]) -> None:
        if self._decoder is None and self._model.tokenizer is not None:
            self._decoder = self._model.tokenizer.stream(skip_special=True)
        for piece in pieces:
            if piece.token is not None:
                self._add(piece.token, piece.logprob, piece.top_logprobs)

    def take(self) -> dict[str, list[Any]]:
        """What has come since the last time."""
        told, self.told = self.told, {name: [] for name in self.told}
        return told

    def _text(self, id: int) -> str:
        tokenizer = self._model.tokenizer
        return tokenizer.token_bytes(id).decode("utf-8", "replace") if tokenizer is not None else f"token:{id}"


def usage_of_all(request: CompletionRequest, generations: Sequence[Generation]) -> dict[str, Any]:
    """The usage of several prompts, each of which counts once."""
    figures = usage(generations)
    figures["prompt_tokens"] = sum(one.stats.prompt_tokens for one in generations[:: request.best_of])
    figures["total_tokens"] = figures["prompt_tokens"] + figures["completion_tokens"]
    return figures


class CompletionStream:
    """The frames of an answer that is streamed."""

    def __init__(
        self,
        request: CompletionRequest,
        state: State,
        entry: Entry,
        generations: list[Generation],
        head: dict[str, Any],
    ) -> None:
        self._request = request
        self._model = entry.loaded
        self._generations = generations
        options = fields.members(request.body, "stream_options")
        self._with_usage = state.settings.always_usage or fields.field(options, "include_usage", fields.truth, False)
        self._head = f"data: {dumps(head)[:-1]}"
        self._tables = [Legacy(self._model) if request.logprobs is not None else None for _ in generations]

    def begin(self) -> bytes:
        """The prompts, where they are wanted too."""
        if not self._request.echo:
            return b""
        found = ""
        for index in range(len(self._generations)):
            number = index // self._request.best_of
            if (table := self._tables[index]) is not None:
                table.add_prompt(
                    self._request.tokens[number], self._request.scored[number], self._request.logprobs or 0,
                    of_text=isinstance(self._request.prompts[number], str),
                )  # fmt: skip
            found += self._frame(index, echoed(self._request, self._model, number), None)
        return found.encode()

    def frames(self, index: int, pieces: list[Piece]) -> bytes:
        if (table := self._tables[index]) is not None:
            table.add_pieces(pieces)
        text = "".join(pieces)
        return self._frame(index, text, None).encode() if text else b""

    def _frame(self, index: int, text: str, reason: str | None) -> str:
        table = self._tables[index]
        told = in_parts(table.take()) if table is not None and table.told["tokens"] else "null"
        return (
            f'{self._head},"choices":[{{"index":{index},"text":{dumps(text)},"logprobs":{told},'
            f'"finish_reason":{dumps(reason)}}}]}}\n\n'
        )

    def end(self) -> bytes:
        found = "".join(
            self._frame(index, "", finish_reason(generation)) for index, generation in enumerate(self._generations)
        )
        if self._with_usage:
            found += f'{self._head},"choices":[],"usage":{dumps(usage_of_all(self._request, self._generations))}}}\n\n'
        return found.encode() + DONE
