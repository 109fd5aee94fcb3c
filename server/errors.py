"""What goes wrong with a request, and how each of the interfaces says so."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from qrun.engine import ContextOverflow
from qrun.engine.errors import NotFinite
from qrun.formats import QrunError


class APIError(Exception):
    """An answer that is an error. kind: as OpenAI's interface names kinds. more: what else its object has."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers or {}
        self.more = more


# Of which field a message is that begins with its name.
_PARAMETER = re.compile(r"(?:messages|tools)(?=\[)|logit_bias(?= )|lora(?=: )|[a-z]+(?:_[a-z]+)*(?= must be )")


def from_exception(error: BaseException) -> APIError:
    """What a client is told of an error. What is not the client's fault is told without its words, which may have
    paths or texts in them."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, ContextOverflow):
        if error.n_tokens is None:
            return APIError(f"the maximum context length is exceeded: {error}", kind="exceed_context_size_error",
                            code="context_length_exceeded")  # fmt: skip
        return APIError(
            f"This model's maximum context length is {error.context} tokens, and {error.what} has {error.n_tokens}: "
            "the request exceeds the available context size. Shorten it, or start the server with more (--ctx)",
            kind="exceed_context_size_error",
            code="context_length_exceeded",
            n_prompt_tokens=error.n_tokens,
            n_ctx=error.context,
        )
    if isinstance(error, NotFinite):
        return APIError(str(error), 500, "server_error")
    # Of what Python itself raises, a TypeError is a fault of ours.
    if isinstance(error, ValueError) or (isinstance(error, TypeError) and isinstance(error, QrunError)):
        message = " ".join(str(error).split())
        found = _PARAMETER.match(message)
        return APIError(message, param=found[0] if found else None)
    if isinstance(error, MemoryError):
        return unavailable("there is not enough memory for this request now")
    return APIError("internal error", 500, "server_error")


def unavailable(message: str, seconds: int = 2) -> APIError:
    """The server cannot do it now, but may soon."""
    return APIError(message, 503, "unavailable_error", code="unavailable", headers={"Retry-After": str(seconds)})


def not_supported(message: str, param: str | None = None) -> APIError:
    """Something that was asked for and would otherwise be passed over in silence."""
    return APIError(message, 400, param=param, code="not_supported")


Shape = Callable[[APIError], dict[str, Any]]


def openai_shape(error: APIError) -> dict[str, Any]:
    return {
        "error": {
            "message": error.message, "type": error.kind, "param": error.param, "code": error.code, **error.more
        }
    }  # fmt: skip


_ANTHROPIC_KINDS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 500: "api_error", 503: "overloaded_error",
}  # fmt: skip


def anthropic_shape(error: APIError) -> dict[str, Any]:
    message = error.message
    if "n_prompt_tokens" in error.more:  # the words by which clients know that they should shorten the talk
        n_tokens, context = error.more["n_prompt_tokens"], error.more["n_ctx"]
        message = f"prompt is too long: {n_tokens} tokens > {context} maximum. {message}"
    kind = _ANTHROPIC_KINDS.get(error.status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def ollama_shape(error: APIError) -> dict[str, Any]:
    return {"error": error.message}


def path_of(scope: Mapping[str, Any]) -> str:
    """The path of a request within the application, which may be mounted in another."""
    path, root = scope["path"], scope.get("root_path", "")
    inner = path.removeprefix(root) if root and path.startswith(f"{root}/") else path
    return str(inner)


def shape_of(scope: Mapping[str, Any]) -> Shape:
    """How the interface that a request belongs to says errors."""
    path = path_of(scope)
    if path.startswith("/api/") and not path.startswith("/api/v0/"):
        return ollama_shape
    path = path.removeprefix("/v1")
    if path.startswith("/messages") or (path.startswith("/models") and is_anthropic(scope)):
        return anthropic_shape
    return openai_shape


def is_anthropic(scope: Mapping[str, Any]) -> bool:
    """Does the client speak Anthropic's interface, where a path alone does not say so?"""
    return any(name == b"anthropic-version" for name, _ in scope["headers"])
