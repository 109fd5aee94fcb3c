"""llama-server's own paths: `/completion`, `/infill`, `/tokenize`, `/detokenize`, `/apply-template`, `/props`; and
vLLM's `/tokenizer_info`."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from qrun.engine import __version__
from qrun.server import fields
from qrun.server.chat_requests import bias_option, openai_chat
from qrun.server.errors import APIError, not_supported
from qrun.server.exchange import Exchange, dumps
from qrun.server.openai_chat import comment, logprobs, sse_error
from qrun.server.prompts import infill_tokens, prompt_tokens, read_prompts
from qrun.server.running import Place, finish_reason
from qrun.server.state import State, prompt_progress, timings
from qrun.server.structure import structure

if TYPE_CHECKING:
    from qrun.engine import Generation, Model, Piece
    from qrun.server.hub import Entry


async def tokenize(state: State, exchange: Exchange) -> None:
    """Takes llama-server's `content`, and vLLM's `prompt` or `messages`."""
    body = exchange.body
    with_pieces = fields.field(body, "with_pieces return_token_strs", fields.truth, False)
    async with state.hub.use(body.get("model")) as entry:
        model = entry.loaded

        def ids_of_text() -> list[int]:
            if body.get("messages") is not None:
                return openai_chat(body).prompt_tokens(model)
            is_prompt = body.get("prompt") is not None
            text = fields.text("content", body.get("prompt" if is_prompt else "content", ""))
            add = fields.field(body, "add_special add_special_tokens", fields.truth, is_prompt)
            special = fields.field(body, "parse_special", fields.truth, True)
            return model.tokenize(text, add_special=add, parse_special=special)

        def told() -> dict[str, Any]:
            ids = ids_of_text()
            found: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": model.context}
            if with_pieces:
                assert model.tokenizer is not None
                pieces = [model.tokenizer.token_bytes(id) for id in ids]
                found["token_strs"] = [piece.decode("utf-8", "replace") for piece in pieces]
                if "with_pieces" in body:
                    found["tokens"] = [
                        {"id": id, "piece": _piece(piece)} for id, piece in zip(ids, pieces, strict=True)
                    ]
            return found

        await state.answer(exchange, told)


def _piece(data: bytes) -> str | list[int]:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


async def detokenize(state: State, exchange: Exchange) -> None:
    ids = fields.items(exchange.body, "tokens")
    if not all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
        raise APIError("tokens must be a list of token ids", param="tokens")
    async with state.hub.use(exchange.body.get("model")) as entry:
        text = await state.in_thread(entry.loaded.detokenize, ids)
        await exchange.json({"content": text, "prompt": text})


async def apply_template(state: State, exchange: Exchange) -> None:
    request = openai_chat(exchange.body)
    async with state.hub.use(exchange.body.get("model")) as entry:
        await exchange.json({"prompt": str(await state.in_thread(request.prompt, entry.loaded))})


async def props(state: State, exchange: Exchange) -> None:
    """What llama.cpp's clients ask of a server."""
    entry = await state.hub.find(exchange.request.query_params.get("model"), lenient=True)
    model = entry.model
    if model is None:
        raise APIError("Loading model", 503, "unavailable_error", headers={"Retry-After": "1"})
    template = await state.in_thread(lambda: model.chat_template)
    defaults = model.defaults.replace(**model.chat_sampling)
    await exchange.json({
        "default_generation_settings": {
            "n_ctx": model.context,
            "params": {
                "temperature": defaults.temperature, "top_k": defaults.top_k, "top_p": defaults.top_p,
                "min_p": defaults.min_p, "repeat_penalty": defaults.repetition_penalty,
                "n_predict": -1 if defaults.max_tokens is None else defaults.max_tokens,
            },
        },
        "total_slots": state.settings.parallel,
        "model_path": model.path.name,
        "model_alias": entry.id,
        "chat_template": template.source if template is not None else "",
        "bos_token": _spelling(model, "bos_id"),
        "eos_token": _spelling(model, "eos_id"),
        "modalities": {"vision": False, "audio": False},
        "build_info": f"qrun {__version__}",
        "is_sleeping": False,
    })  # fmt: skip


async def tokenizer_info(state: State, exchange: Exchange) -> None:
    """What vLLM says of a tokenizer: lm-evaluation-harness needs no other one then."""
    async with state.hub.use(exchange.request.query_params.get("model")) as entry:
        model = entry.loaded
        if model.tokenizer is None:
            raise APIError("the model has no tokenizer that can be used", 501, "not_supported_error")
        template = await state.in_thread(lambda: model.chat_template)
        has_own = template is not None and not template.is_fallback
        await exchange.json({
            "tokenizer_class": type(model.tokenizer).__name__,
            "bos_token": _spelling(model, "bos_id") or None,
            "eos_token": _spelling(model, "eos_id") or None,
            "model_max_length": model.context,
            "vocab_size": model.tokenizer.n_vocab,
            "chat_template": template.source if template is not None and has_own else None,
        })  # fmt: skip


def _spelling(model: Model, name: str) -> str:
    id = getattr(model.tokenizer, name, None)
    return "" if id is None else model.detokenize([id])


async def completion(state: State, exchange: Exchange) -> None:
    """llama-server's `/completion`."""
    body = exchange.body
    prompts = read_prompts(body.get("prompt", ""))
    if len(prompts) != 1:
        raise APIError("prompt must be one text or one list of token ids", param="prompt")
    options = _options(body)

    def start(model: Model, lora: dict[str, Any]) -> list[Generation]:
        return [model.generate(prompt_tokens(model, prompts[0]), **(lora | options), **bias_option(body, model))]

    async with state.begin(body.get("model"), start) as (entry, generations, place):
        await _answer(state, exchange, entry, generations, place)


async def infill(state: State, exchange: Exchange) -> None:
    """What stands between a prefix and a suffix."""
    body = exchange.body
    prefix = fields.field(body, "input_prefix", fields.text, "")
    suffix = fields.field(body, "input_suffix", fields.text, "")
    before = fields.field(body, "prompt", fields.text, "")
    extra = []
    for one in fields.items(body, "input_extra"):
        file = fields.mapping("input_extra", one)
        name = fields.field(file, "filename", fields.text, "tmp")
        extra.append((name, fields.field(file, "text", fields.text, "")))
    options = _options(body)

    def start(model: Model, lora: dict[str, Any]) -> list[Generation]:
        tokens = infill_tokens(model, prefix, suffix, before=before, extra=extra)
        return [model.generate(tokens, **(lora | options), **bias_option(body, model))]

    async with state.begin(body.get("model"), start) as (entry, generations, place):
        await _answer(state, exchange, entry, generations, place)


def _options(body: dict[str, Any]) -> dict[str, Any]:
    options = fields.sampling_options(body)
    other = body.get("n_probs") is None and not isinstance(body.get("logprobs"), bool)
    top = fields.top_count(body, "logprobs" if other else "n_probs")
    if top and fields.field(body, "post_sampling_probs", fields.truth, False):
        raise not_supported("post_sampling_probs is not supported: the probabilities of n_probs are those that the "
                            "model gives", "post_sampling_probs")  # fmt: skip
    return options | {"logprobs": top > 0, "top_logprobs": top} | structure(body)


async def _answer(
    state: State, exchange: Exchange, entry: Entry, generations: list[Generation], place: Place
) -> None:
    generation = generations[0]
    steps = state.steps(generations, place, exchange.arrived)
    waiting: list[Piece] = []  # whose probabilities have not been told

    def probabilities() -> dict[str, Any]:
        """Those of the tokens that have come since the last time, if they are wanted."""
        told = [piece for piece in waiting if piece.logprob is not None]
        waiting.clear()
        return {"completion_probabilities": logprobs(told, entry.loaded)} if told else {}

    if not fields.field(exchange.body, "stream", fields.truth, False):
        async with aclosing(steps) as found:  # type: ignore[type-var]
            async for _, pieces in found:
                waiting += pieces
        whole = {"content": generation.text, "tokens": generation.tokens}
        await state.answer(exchange, lambda: _end(generation, entry) | whole | probabilities())
        return

    def progress() -> bytes:
        told = {"index": 0, "content": "", "tokens": [], "stop": False}
        return f"data: {dumps(told | {'prompt_progress': prompt_progress(generation, exchange.arrived)})}\n\n".encode()

    ping = progress if fields.field(exchange.body, "return_progress", fields.truth, False) else comment
    exchange.error_frame = sse_error
    async with exchange.stream("text/event-stream", b"", ping, state.settings.ping_seconds):
        async with aclosing(steps) as found:  # type: ignore[type-var]
            async for _, pieces in found:
                waiting += pieces
                if text := "".join(pieces):
                    ids = [piece.token for piece in pieces if piece.token is not None]
                    frame = {"index": 0, "content": text, "tokens": ids, "stop": False} | probabilities()
                    await exchange.write(f"data: {dumps(frame)}\n\n".encode())
        await exchange.write(f"data: {dumps(_end(generation, entry) | probabilities())}\n\n".encode())


def _end(generation: Generation, entry: Entry) -> dict[str, Any]:
    stats = generation.stats
    limited = finish_reason(generation) == "length"
    return {
        "index": 0,
        "content": "",
        "tokens": [],
        "stop": True,
        "model": entry.id,
        "tokens_predicted": len(generation.tokens),
        "tokens_evaluated": stats.prompt_tokens,
        "tokens_cached": stats.prompt_tokens + len(generation.tokens),
        "stop_type": "limit" if limited else "word" if generation.stop_string is not None else "eos",
        "stopping_word": generation.stop_string or "",
        "truncated": False,
        "timings": timings(generation),
    }
