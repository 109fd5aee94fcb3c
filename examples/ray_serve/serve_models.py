"""qrun's server on Ray Serve: replicas on one machine or several behind one address.

    python serve_models.py model.gguf --replicas 1 4 --threads 8

Each replica is the ASGI application of `qrun serve`, on a model of its own. The front reads a request's body, for a
router cannot see it otherwise, and hands both to a replica (see prefix_router.py). What a client gets is what the
replica says, byte by byte.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import ray
from prefix_router import PrefixRouter
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

BLOCK = 128  # characters
MAX_BODY = 100 << 20  # bytes
TRIES = 5
Scope = dict[str, Any]


@serve.deployment(max_ongoing_requests=64, health_check_period_s=2, health_check_timeout_s=10)
class Replica:
    """One model. What is said to it is what an ASGI server says, and so is what it answers."""

    def __init__(self, model: str, threads: int, options: dict[str, Any]) -> None:
        from qrun.engine import Model
        from qrun.server import app

        self._model = Model.load(model, threads=threads, **options)
        self._app = app(self._model, public=True)

    async def answer(self, numbers: list[int], scope: Scope, body: bytes) -> AsyncIterator[list[Any]]:
        """The messages of an answer, as they come. numbers: `blocks` of the request, for the router."""
        queue: asyncio.Queue[Any] = asyncio.Queue()
        gone = asyncio.Event()
        asked = False

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        task = asyncio.ensure_future(self._app(scope, receive, queue.put))
        task.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            over = False
            while not over:
                messages = [await queue.get()]
                while not queue.empty():
                    messages.append(queue.get_nowait())
                over = None in messages
                yield [message for message in messages if message is not None]
        finally:  # also when the client has gone
            gone.set()
            with suppress(asyncio.CancelledError, Exception):
                await asyncio.wait_for(task, 5)


class Forward:
    """An ASGI application that hands requests to replicas, through a handle's method."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for _ in range(2):
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
            return
        body = await _body(receive)
        if body is None:
            await _refuse(send, 413, "the body is too large")
            return
        plain = ("type", "http_version", "method", "path", "raw_path", "query_string", "headers", "scheme", "client",
                 "server")  # fmt: skip
        told = {name: scope[name] for name in plain if name in scope} | {"asgi": {"version": "3.0"}, "root_path": ""}
        numbers = blocks(prompt_text(body))
        for left in reversed(range(TRIES)):
            begun = False
            answers = self._answer.remote(numbers, told, body)
            try:
                async for messages in answers:
                    for message in messages:
                        begun = True
                        await send(message)
                return
            except RayError:  # the replica is gone; nobody has seen anything of an answer that had not begun
                if begun:
                    raise
                if not left:
                    await _refuse(send, 503, "no replica answers now")
                    return
            finally:
                answers.cancel()
            await asyncio.sleep(0.2)


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
@serve.ingress()
class Front:
    """Where clients come to."""

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas

    def __serve_build_asgi_app__(self) -> Forward:
        return Forward(self._replicas.options(stream=True).answer)


async def _body(receive: Any) -> bytes | None:
    """The body of a request; None if it is too large."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return body
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            return None
        if not message.get("more_body"):
            return body


async def _refuse(send: Any, status: int, reason: str) -> None:
    body = json.dumps({"error": {"message": reason, "type": "unavailable_error", "param": None, "code": None}}).encode()
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"2")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def prompt_text(body: bytes) -> str:
    """What of a request becomes the beginning of the prompt, in the order in which it does."""
    try:
        given = json.loads(body)
        parts = [given.get(name) for name in ("tools", "system", "instructions", "messages", "input", "prompt")]
    except (ValueError, AttributeError, RecursionError):
        return ""
    # Without the end of the last list, so that a talk that goes on begins with itself.
    return "".join(json.dumps(part).rstrip("]") for part in parts if part is not None)


def blocks(text: str) -> list[int]:
    """A number for each beginning of a text, block by block: texts that begin alike have the first ones in common."""
    found: list[int] = []
    for start in range(0, len(text) - BLOCK + 1, BLOCK):
        digest = blake2b(text[start : start + BLOCK].encode(), key=b"%d" % (found[-1] if found else 0), digest_size=7)
        found.append(int.from_bytes(digest.digest()))
    return found


def application(
    model: str, least: int, most: int, threads: int, ongoing: float = 4, options: dict[str, Any] | None = None
) -> Any:
    """For `serve.run`. ongoing: requests a replica has when it is neither too few nor too many."""
    scaling = AutoscalingConfig(min_replicas=least, max_replicas=most, target_ongoing_requests=ongoing)
    replica = Replica.options(
        ray_actor_options={"num_cpus": threads},
        autoscaling_config=scaling,
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
    )
    return Front.bind(replica.bind(model, threads, options or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a file, which all machines have, or a name that qrun knows")
    parser.add_argument("--replicas", type=int, nargs=2, default=(1, 4), metavar=("LEAST", "MOST"))
    parser.add_argument("--threads", type=int, default=4, help="cores of each replica")
    parser.add_argument("--ctx", type=int, help="tokens that the context holds")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--address", help="of a cluster; by default one on this machine alone is started")
    args = parser.parse_args()
    model = str(Path(args.model).resolve()) if Path(args.model).is_file() else args.model
    ray.init(args.address, log_to_driver=False, include_dashboard=False)
    serve.start(http_options={"host": args.host, "port": args.port})
    options = {"context": args.ctx} if args.ctx else {}
    serve.run(application(model, *args.replicas, args.threads, options=options), route_prefix="/")
    print(f"serving {args.model} at http://{args.host}:{args.port} (Ctrl-C ends)", file=sys.stderr)
    with suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)
    serve.shutdown()


if __name__ == "__main__":
    main()
