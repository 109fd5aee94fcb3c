"""The ASGI application."""

from __future__ import annotations

import functools
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from qrun.server import anthropic, completions, embeddings, models_api, native, ollama, openai_chat, responses
from qrun.server.errors import APIError, shape_of
from qrun.server.exchange import Endpoint, Exchange
from qrun.server.guard import Guard
from qrun.server.hub import Hub, Load, Source
from qrun.server.openapi import document
from qrun.server.settings import Settings
from qrun.server.state import State

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from qrun.engine import Model

Handler = Callable[[State, Exchange], Awaitable[None]]

# method, path, handler; each is also reached without /v1
_ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/v1/health", models_api.health),
    ("GET", "/ping", models_api.health),
    ("GET", "/metrics", models_api.metrics),
    ("GET", "/v1/models", models_api.list_models),
    ("GET", "/lora-adapters", models_api.lora_adapters),
    ("GET", "/v1/models/{name:path}", models_api.one_model),
    ("POST", "/v1/chat/completions", openai_chat.chat_completions),
    ("POST", "/v1/completions", completions.completions),
    ("POST", "/v1/messages", anthropic.messages),
    ("POST", "/v1/messages/count_tokens", anthropic.count_tokens),
    ("POST", "/v1/responses", responses.responses),
    ("POST", "/v1/responses/input_tokens", responses.input_tokens),
    ("GET", "/v1/responses/{name}", responses.one_response),
    ("DELETE", "/v1/responses/{name}", responses.delete_response),
    ("GET", "/v1/responses/{name}/input_items", responses.input_items),
    ("POST", "/v1/embeddings", embeddings.openai),
    ("POST", "/v1/rerank", embeddings.rerank),
    ("POST", "/v1/reranking", embeddings.rerank),
    ("GET", "/", models_api.root),
    ("GET", "/api/v0/models", models_api.list_for_lm_studio),
    ("POST", "/api/v0/chat/completions", openai_chat.chat_completions),
    ("POST", "/api/v0/completions", completions.completions),
    ("POST", "/api/chat", ollama.chat),
    ("POST", "/api/generate", ollama.generate),
    ("GET", "/api/tags", ollama.tags),
    ("GET", "/api/ps", ollama.running),
    ("POST", "/api/show", ollama.show),
    ("GET", "/api/version", ollama.version),
    ("POST", "/api/pull", ollama.pull),
    ("DELETE", "/api/delete", ollama.delete),
    ("POST", "/api/embed", embeddings.ollama),
    ("POST", "/api/embeddings", embeddings.ollama_old),
    ("POST", "/api/create", ollama.not_here),
    ("POST", "/api/copy", ollama.not_here),
    ("POST", "/api/push", ollama.not_here),
    ("POST", "/completion", native.completion),
    ("POST", "/infill", native.infill),
    ("POST", "/embedding", embeddings.llama_server),
    ("POST", "/v1/tokenize", native.tokenize),
    ("POST", "/v1/detokenize", native.detokenize),
    ("GET", "/tokenizer_info", native.tokenizer_info),
    ("POST", "/apply-template", native.apply_template),
    ("GET", "/props", native.props),
)


_ORIGIN = re.compile("https?://[^/]*", re.IGNORECASE)


class Application:
    """An ASGI application that serves models: made by `app`."""

    def __init__(self, state: State) -> None:
        self.state = state
        """What its requests share: models, settings, counts."""
        inner = Starlette(routes=_routes(state), exception_handlers=_HANDLERS)
        inner.router.redirect_slashes = False
        self._guarded = Guard(inner, state.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": _plain(scope["path"], scope.get("root_path", ""))}
        await self._guarded(scope, receive, send)

    def stop(self) -> None:
        """End all generations under way."""
        self.state.hub.stop()

    def close(self) -> None:
        """End them, and free the models that the application has loaded."""
        self.stop()
        self.state.hub.close()
        self.state.texts.shutdown(wait=False, cancel_futures=True)


def _plain(path: str, root: str) -> str:
    """A path without slashes too many, as clients make whose base URL ends in one, and without the origin that clients
    of proxies put before it. root: where the application is mounted in another one, whose own page is there with a
    slash."""
    path = _ORIGIN.sub("", path, count=1)
    plain = re.sub("/{2,}", "/", path).rstrip("/")
    return plain if plain and plain != root.rstrip("/") else f"{plain}/"


def app(
    models: Iterable[Source | Model] | Mapping[str, Source | Model] | Source | Model = (),
    *,
    load: Load | None = None,
    **settings: Any,
) -> Application:
    """An ASGI application that serves models, to be run by any ASGI server or mounted in another application.

    models: loaded ones, or paths or names as `Model.load` takes them, which are loaded when they are first asked for;
        with names of their own where they are a mapping. The first one is the default.
    load: loads a model, in place of `Model.load`.
    settings: those of `Settings`.

    As an application in others it has no lifespan of its own: `close` frees what it has loaded.
    """
    from qrun.engine import Model

    chosen = Settings(**settings)
    if isinstance(models, str | Path) or hasattr(models, "chat_prompt"):
        models = [models]  # type: ignore[list-item]
    texts = ThreadPoolExecutor(max_workers=4, thread_name_prefix="qrun server")
    hub = Hub(
        models,  # type: ignore[arg-type]
        load or Model.load,
        folder=chosen.models_dir,
        with_store=chosen.with_store,
        ttl=chosen.ttl,
        most_loaded=chosen.most_loaded,
    )
    return Application(State(hub, chosen, texts))


class _PageFiles(StaticFiles):
    """The page's files, with the headers that it has itself."""

    def file_response(self, *arguments: Any, **more: Any) -> Response:
        response = super().file_response(*arguments, **more)
        response.headers.update(models_api.PAGE_HEADERS)
        return response


def _routes(state: State) -> list[BaseRoute]:
    routes: list[BaseRoute] = []
    for method, path, handler in (*_ROUTES, ("GET", "/openapi.json", _describe)):
        endpoint = Endpoint(
            functools.partial(handler, state), state.settings.max_body, state.texts, with_body=method != "GET"
        )
        for one in dict.fromkeys((path, path.removeprefix("/v1"))):
            routes.append(Route(one, endpoint, methods=[method]))
    # Where the package is installed as links to its sources, these files are links too.
    routes.append(Mount("/static", _PageFiles(directory=models_api.STATIC, check_dir=False, follow_symlink=True)))
    return routes


async def _describe(state: State, exchange: Exchange) -> None:
    """This description."""
    await exchange.json(document(_ROUTES))


def _said(request: Request, error: APIError) -> Response:
    return JSONResponse(shape_of(request.scope)(error), error.status, headers=error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        told = APIError(f"there is no {request.url.path}", 404, "not_found_error", code="unknown_path")
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"Allow": f"{allowed}, OPTIONS"})
        message = f"{request.method} is not for {request.url.path}"
        told = APIError(message, 405, code="method_not_allowed", headers={"Allow": allowed})
    else:
        told = APIError(str(error.detail), error.status_code)
    return _said(request, told)


_HANDLERS: Mapping[Any, Any] = {HTTPException: _http_error}
