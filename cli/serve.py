"""`qrun serve`: models over HTTP."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qrun.cli.console import echo
from qrun.cli.options import FilePath, ModelName, loading_options

if TYPE_CHECKING:
    from qrun.engine import Model
    from qrun.server import Application
    from qrun.server.hub import Source

_PATIENCE = 2.0
"""Seconds in which the process ends once standard input has."""
_FILES = 8192
"""That may be open, connections among them."""
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_SWITCH_SECONDS = 5e-4
"""So long a thread that wants the interpreter waits for one that has it: Python's 5 ms are half a step of a small
model."""


@click.command()
@click.argument("models", type=ModelName(), nargs=-1)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True,
              help="The port to listen on; 0 takes one that is free.")  # fmt: skip
@click.option("--unix-socket", type=FilePath(path_type=Path), metavar="PATH",
              help="Listen on a socket in the file system instead.")  # fmt: skip
@click.option("--api-key", "api_keys", multiple=True, metavar="KEY", envvar="QRUN_API_KEY",
              help="A key that requests have to show; may be given several times.")  # fmt: skip
@click.option("--api-key-file", type=FilePath(path_type=Path), metavar="FILE", help="A file with a key on each line.")
@click.option("--allow-origin", "allow_origins", multiple=True, metavar="ORIGIN",
              help="An origin whose pages may call the server, such as https://example.org or chrome-extension://*; * "
                   "for any. Pages of this machine may always.")  # fmt: skip
@click.option("--allow-host", "allow_hosts", multiple=True, metavar="NAME",
              help="A host name by which the server may be called, besides localhost; * for any.")  # fmt: skip
@click.option("--tls-cert", type=FilePath(path_type=Path), metavar="FILE", help="A certificate (PEM): serve HTTPS.")
@click.option("--tls-key", type=FilePath(path_type=Path), metavar="FILE", help="Its key (PEM).")
@click.option("--models-dir", type=FilePath(path_type=Path), metavar="FOLDER",
              help="Serve all models of a folder too, loaded when they are first asked for.")  # fmt: skip
@click.option("--store", "with_store", is_flag=True,
              help="Serve all models of the store too, and let clients of Ollama's interface fetch and delete "
                   "some.")  # fmt: skip
@click.option("--ttl", type=click.FloatRange(min=0), metavar="SECONDS",
              help="Unload a model that nobody has used for so long.", show_default="never")  # fmt: skip
@click.option("--max-models", "most_loaded", type=click.IntRange(min=1), metavar="N",
              help="The most models that are loaded at a time.")  # fmt: skip
@click.option("--parallel", type=click.IntRange(min=1), default=32, show_default=True, metavar="N",
              help="The most requests that are computed at a time.")  # fmt: skip
@click.option("--max-queue", type=click.IntRange(min=0), default=256, show_default=True, metavar="N",
              help="The most requests that wait; more are answered with 503.")  # fmt: skip
@click.option("--max-body", type=click.IntRange(min=1), default=100, show_default=True, metavar="MB",
              help="The most megabytes of a request.")  # fmt: skip
@click.option("--usage", "always_usage", is_flag=True, help="End every stream with usage, asked for or not.")
@click.option("--ready-json", is_flag=True,
              help="Print one line of JSON with the address once the first model is loaded.")  # fmt: skip
@click.option("--exit-with-stdin", is_flag=True, help="End when standard input ends, as when the parent process goes.")
@click.option("--quiet", is_flag=True, help="Write no line about each request.")
@partial(loading_options, named_loras=True)
def command(
    models: tuple[str, ...], host: str, port: int, unix_socket: Path | None, api_keys: tuple[str, ...],
    api_key_file: Path | None, tls_cert: Path | None, tls_key: Path | None, ready_json: bool, exit_with_stdin: bool,
    quiet: bool, max_body: int, loading: dict[str, Any], **settings: Any,
) -> None:  # fmt: skip
    """Serve models to the clients of OpenAI's, Anthropic's and Ollama's interfaces.

    The first MODEL is loaded at once (without any, the default model), others when they are first asked for. Requests
    that come together are computed together.

    Only this machine is served unless --host says otherwise; then --api-key should be given. What is in requests and
    answers is not logged, and nothing that they name is fetched.

    \b
    Examples:
      qrun serve
      qrun serve model.gguf --port 8000 --ctx 8192 --cache-disk ~/.cache/qrun-prefixes
      qrun serve model.gguf --lora poet=poet.gguf --lora clerk=clerk.gguf
      qrun serve model.gguf --host 0.0.0.0 --api-key "$KEY"
      qrun serve --models-dir ~/models --ttl 600
      qrun serve model.gguf --port 0 --ready-json --exit-with-stdin
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise ImportError("serving needs the extra qrun-gguf[server]: pip install 'qrun-gguf[server]'") from None
    from qrun.cli.console import notice
    from qrun.cli.loading import default_model

    if (tls_key is None) != (tls_cert is None):
        raise click.UsageError("--tls-cert and --tls-key go together.")
    keys = [*api_keys, *(_keys_in(api_key_file) if api_key_file else [])]
    folder = settings["models_dir"]
    if folder is not None and not folder.is_dir():
        raise NotADirectoryError(20, "is not a folder", str(folder))
    if loading["cache_disk"] is not None:  # models that are loaded later want it, too
        from qrun.engine.generation.disk_prefixes import prepare_folder

        prepare_folder(loading["cache_disk"])
    if not models and folder is None and not settings["with_store"]:
        models = (default_model(),)
    public = unix_socket is not None or host not in _LOOPBACK
    if public and unix_socket is None and not keys:
        notice(f"{host} can be reached from other machines, and anybody there may use this server: see --api-key")

    named = {lora.name: lora for lora in loading["loras"] if lora.name}
    if len(named) < sum(bool(lora.name) for lora in loading["loras"]):
        raise click.UsageError("Two adapters of --lora have one name.")
    loading["loras"] = tuple(lora for lora in loading["loras"] if not lora.name)
    if named and not models:
        raise click.UsageError("--lora NAME=FILE wants the MODEL that the adapter is for.")

    def load(source: Source) -> Model:
        from qrun.cli.loading import load_model

        is_first = bool(models) and str(source) == models[0]
        model = load_model(str(source), loading | ({"adapters": named} if is_first else {}))
        if gc.isenabled():  # not the first: those before it may have gone
            gc.unfreeze()
            gc.collect()
            gc.freeze()
        return model

    _allow_files()
    with _even_steps():
        from qrun.server import app

        application = app(
            models, load=load, api_keys=tuple(keys), public=public, max_body=max_body << 20,
            log=None if quiet else lambda line: echo(line, err=True), **settings,
        )  # fmt: skip
        try:
            _serve(application, host, port, unix_socket, tls_cert, tls_key, ready_json, exit_with_stdin)
        finally:
            application.close()


@contextmanager
def _even_steps() -> Iterator[None]:
    """Settings of the interpreter that keep steps alike. What is there once the first model is stays: to look for
    garbage among it takes as long as a step, and before that there is none; see `ready`."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()
        sys.setswitchinterval(before)


def _allow_files() -> None:
    """Let this process have as many connections as the system would let it: many shells say 256 or 1,024 files."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # macOS has one more limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _keys_in(path: Path) -> list[str]:
    from qrun.formats.mapping import read_text

    keys = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not keys:
        raise ValueError(f"{path}: there is no key in it")
    return keys


def _serve(
    application: Application, host: str, port: int, unix_socket: Path | None, tls_cert: Path | None,
    tls_key: Path | None, ready_json: bool, exit_with_stdin: bool,
) -> None:  # fmt: skip
    """Listen, load the first model meanwhile, and serve until a signal comes or standard input ends."""
    import asyncio
    import json
    import threading
    import time

    from qrun.cli.console import notice
    from qrun.server.listening import bind, serve

    sock, url = bind(host, port, unix_socket, secure=tls_cert is not None)
    certificate = (tls_cert, tls_key) if tls_cert and tls_key else None

    def ready() -> None:
        gc.freeze()
        gc.enable()
        first = application.state.hub.default
        if ready_json:
            echo(json.dumps({"url": url, "model": first.id if first else None}))
        else:
            notice(f"serving {first.id if first else 'no model yet'} at {url} (Ctrl-C ends)")

    async def main() -> int | None:
        end = asyncio.Event()
        if exit_with_stdin:
            loop, standard_input = asyncio.get_running_loop(), sys.stdin.fileno()

            def watch() -> None:
                # Not by sys.stdin, whose lock this thread would hold when the process ends: Python aborts for that.
                while os.read(standard_input, 4096):
                    pass
                with suppress(RuntimeError):  # it has ended by itself
                    loop.call_soon_threadsafe(end.set)
                time.sleep(_PATIENCE)
                os._exit(0)  # a model is being loaded or compiled for, which nobody waits for any more

            threading.Thread(target=watch, name="qrun parent", daemon=True).start()
        return await serve(application, sock, certificate=certificate, end=end, on_ready=ready)

    try:
        if (number := asyncio.run(main())) is not None:
            click.get_current_context().exit(128 + number)
    finally:
        if unix_socket is not None:
            unix_socket.unlink(missing_ok=True)
