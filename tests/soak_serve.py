"""Clients of all manners at one server for a while: it has to answer, and to be as light at the end as at the start.

    python -m tests.soak_serve MODEL [--minutes 20] [--clients 16] [--seed 0]

They ask and read to the end, hang up in the queue, in the prompt and in the answer, close one half of a connection,
send rubbish and bodies that are too large, write a byte at a time and read as slowly. At the end: no answer was an
error of the server's own, memory has not grown after the first tenth, no connection or thread is left, and every page
of the cache has been given back. `make soak-serve` runs this; it reads /proc, and so runs on Linux alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qrun.models.catalog import DEFAULT_MODEL, resolve
from tests.bench.http_streams import Connection

MAX_BODY = 1 << 20
CACHE = 96 << 20  # bytes: little enough that beginnings are forgotten all the time
SLACK = 1.05  # of memory
PATIENCE = 600  # seconds of the server's threads: an answer without a limit goes on until its context is full
WORDS = "time year people way day man thing woman life child world school state family group country".split()  # noqa: SIM905
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}, "b": {"type": "string", "maxLength": 9}},
          "required": ["a", "b"]}  # fmt: skip


def serve(path: str) -> None:
    """The server, in a process of its own: says what it holds for each line of standard input."""
    from qrun.engine import Model
    from qrun.server import Server

    with (
        Model.load(path, cache_bytes=CACHE, context=1024) as model,
        Server(model, max_body=MAX_BODY, max_queue=8, parallel=12) as server,
    ):
        print(json.dumps({"url": server.url}), flush=True)
        for line in sys.stdin:
            if line.strip() == "clear":
                model._host.prefixes.clear()
            held = model.activity
            told = {"running": held.running, "waiting": held.waiting, "cache": held.cache_bytes}
            print(json.dumps(told), flush=True)


@dataclass
class Sample:
    rss: float
    """Megabytes."""
    threads: int
    files: int


@dataclass
class Soak:
    port: int
    pid: int
    random: random.Random
    done: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def sample(self) -> Sample:
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if ":" in line
        )
        rss = int(status["VmRSS"].split()[0]) / 1024
        return Sample(rss, int(status["Threads"]), len(os.listdir(f"/proc/{self.pid}/fd")))

    def text(self, n_words: int) -> str:
        return " ".join(self.random.choice(WORDS) for _ in range(n_words))

    def request(self) -> tuple[str, dict[str, Any]]:
        """A path and a body that are right."""
        prefix = self.random.choice(("", "", "You are a clerk. " * 30, "You are a poet. " * 60))
        text = prefix + self.text(self.random.choice((3, 20, 120, 400)))
        messages = [{"role": "user", "content": text}]
        body: dict[str, Any] = {"max_tokens": self.random.choice((1, 8, 40)), "stream": self.random.random() < 0.7}
        kind = self.random.randrange(8)
        if kind == 0:
            return "/v1/completions", body | {"prompt": text, "n": self.random.choice((1, 3))}
        if kind == 1:
            return "/v1/messages", body | {"messages": messages}
        if kind == 2:
            return "/api/chat", {"messages": messages, "options": {"num_predict": 8}, "stream": body["stream"]}
        if kind == 3:
            return "/v1/responses", {"input": text, "max_output_tokens": 8, "stream": body["stream"]}
        if kind == 4:
            form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
            return "/v1/chat/completions", body | {"messages": messages, "response_format": form}
        if kind == 5:
            return "/completion", {"prompt": text, "n_predict": 8, "stream": body["stream"], "n_probs": 2}
        return "/v1/chat/completions", body | {"messages": messages, "logprobs": kind == 6}

    async def opened(self) -> Connection:
        path, body = self.request()
        connection = Connection(self.port)
        await connection.open("POST", path, body)
        self.statuses[connection.status] += 1
        if connection.status in (0, 500):
            self.faults.append(f"{path}: {connection.status} {(await connection.body())[:200]!r} for {str(body)[:200]}")
        return connection

    # What a client may do

    async def to_the_end(self) -> None:
        connection = await self.opened()
        try:
            text = await connection.body()
            if b'"error":{' in text.replace(b" ", b"") and connection.status == 200:
                self.faults.append(f"an error in a stream: {text[-300:]!r}")
        finally:
            connection.close()

    async def hangs_up(self) -> None:
        """After some parts of the answer."""
        connection = await self.opened()
        try:
            left = self.random.randrange(5)
            async for _ in connection.parts():
                left -= 1
                if left <= 0:
                    break
        finally:
            connection.close()

    async def does_not_wait(self) -> None:
        """Sends its request and goes, at once or soon."""
        path, body = self.request()
        raw = json.dumps(body).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw)
        await asyncio.sleep(self.random.choice((0, 0.01, 0.2)))
        if self.random.random() < 0.5:
            writer.transport.abort()  # a reset, rather than an end
        else:
            writer.close()

    async def closes_half(self) -> None:
        """Writes no more, and reads on."""
        path, body = self.request()
        raw = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
            writer.write(head.encode() + raw)
            writer.write_eof()
            answer = await reader.read()
            status = next((n for n in (200, 503) if b"HTTP/1.1 %d" % n in answer), 0)  # others may say that one comes
            self.statuses[status] += 1
            if not status:
                self.faults.append(f"{path}, half closed: {answer[:200]!r}")
        finally:
            writer.close()

    async def sends_rubbish(self) -> None:
        rubbish = self.random.choice((
            self.random.randbytes(300),
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\n{",
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
        ))  # fmt: skip
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(rubbish)
            writer.write_eof()
            line = await reader.readline()
            if line.startswith(b"HTTP/1.1 500"):
                self.faults.append(f"500 for {rubbish[:60]!r}")
            await reader.read()
        finally:
            writer.close()

    async def sends_wrong_json(self) -> None:
        path, body = self.request()
        wrong = dict(body)
        name = self.random.choice(list(wrong))
        wrong[name] = self.random.choice((None, -1, "x", [[]], {"a": {}}, 1e300, True))
        connection = Connection(self.port)
        try:
            await connection.open("POST", path, self.random.choice((wrong, [], "text", {"messages": [{}]})))
            self.statuses[connection.status] += 1
            text = await connection.body()
            if connection.status in (0, 500):
                self.faults.append(f"{path}: {connection.status} {text[:200]!r} for {str(wrong)[:200]}")
        finally:
            connection.close()

    async def sends_too_much(self) -> None:
        """A body beyond the limit, with its length said or in chunks."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            if self.random.random() < 0.5:
                writer.write(head + b"Content-Length: %d\r\n\r\n" % (4 * MAX_BODY) + b"a" * 10_000)
            else:
                writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n")
                for _ in range(24):
                    writer.write(b"10000\r\n" + b"a" * 65536 + b"\r\n")
                    await writer.drain()
            line = await reader.readline()
            self.statuses[int(line.split()[1]) if line else 0] += 1
            if line and b" 413 " not in line:
                self.faults.append(f"a body of {4 * MAX_BODY}: {line!r}")
        finally:
            writer.close()

    async def reads_slowly(self) -> None:
        connection = await self.opened()
        try:
            for _ in range(20):
                await asyncio.sleep(0.05)
                if not await connection.take(40):
                    break
        finally:
            connection.close()

    async def writes_slowly(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for byte in b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"[: self.random.choice((5, 30, 99))]:
                writer.write(bytes((byte,)))
                await asyncio.sleep(0.01)
            if writer.can_write_eof():
                writer.write_eof()
            await reader.read()
        finally:
            writer.close()

    async def asks_around(self) -> None:
        connection = Connection(self.port)
        try:
            path = self.random.choice(("/", "/health", "/metrics", "/v1/models", "/props", "/openapi.json", "/nothing"))
            await connection.open("GET", path)
            await connection.body()
            if connection.status not in (200, 404):
                self.faults.append(f"{path}: {connection.status}")
        finally:
            connection.close()

    def cpu_seconds(self) -> float:
        """What the server has computed for."""
        user, system = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    async def to_an_end(self, one: Awaitable[None]) -> None:
        """TimeoutError where it has none: by the server's own clock, which stands still while others have the cores."""
        task, begin = asyncio.ensure_future(one), self.cpu_seconds()
        while not (await asyncio.wait({task}, timeout=10))[0]:
            if self.cpu_seconds() - begin > PATIENCE:
                task.cancel()
                raise TimeoutError
        task.result()

    async def client(self, end: float) -> None:
        manners: list[Callable[[], Awaitable[None]]] = [
            self.to_the_end, self.to_the_end, self.to_the_end, self.hangs_up, self.hangs_up, self.does_not_wait,
            self.closes_half, self.sends_rubbish, self.sends_wrong_json, self.sends_too_much, self.reads_slowly,
            self.writes_slowly, self.asks_around,
        ]  # fmt: skip
        while time.monotonic() < end:
            one = self.random.choice(manners)
            name = getattr(one, "__name__", "")
            try:
                await self.to_an_end(one())
                self.done[name] += 1
            except TimeoutError:
                self.faults.append(f"{name}: no end though the server has computed for {PATIENCE} seconds")
            except (OSError, ValueError, asyncio.IncompleteReadError):  # the server hung up, as it may on these
                self.done[f"{name}, cut"] += 1

    async def watch(self, end: float) -> None:
        while time.monotonic() < end:
            self.samples.append(self.sample())
            await asyncio.sleep(1)

    async def fill(self, held: Callable[[], int]) -> None:
        """Have the cache full, so that memory has no reason to grow from then on."""
        for _ in range(100):
            if held() > 0.9 * CACHE:
                return
            connection = Connection(self.port)
            await connection.open("POST", "/v1/completions", {"prompt": self.text(800), "max_tokens": 1})
            await connection.body()
            connection.close()
        raise RuntimeError(f"the cache has {held()} bytes after a hundred prompts, and should have {CACHE}")

    async def run(self, minutes: float, clients: int) -> None:
        end = time.monotonic() + 60 * minutes
        await asyncio.gather(self.watch(end), *(self.client(end) for _ in range(clients)))


def judge(soak: Soak, before: Sample, after: Sample, held: dict[str, int]) -> list[str]:
    """What is wrong with the server after all that."""
    wrong = [f"{len(soak.faults)} faults: {fault}" for fault in soak.faults[:10]]
    n = max(len(soak.samples) // 10, 1)
    early = statistics.median(one.rss for one in soak.samples[n : 3 * n] or soak.samples)
    late = statistics.median(one.rss for one in soak.samples[-2 * n :])
    tenths = [statistics.median(one.rss for one in soak.samples[i : i + n]) for i in range(0, len(soak.samples), n)]
    print(f"memory in MB, by tenths: {', '.join(f'{rss:.0f}' for rss in tenths)}; {after.rss:.0f} at the end")
    print(f"threads {before.threads} before, {after.threads} after; files {before.files} before, {after.files} after")
    print(f"held at the end: {held}")
    if late > early * SLACK:
        wrong.append(f"memory has grown from {early:.0f} to {late:.0f} MB")
    most = max(one.threads for one in soak.samples)
    if after.threads > max(before.threads + 6, max(one.threads for one in soak.samples[: 2 * n])):
        wrong.append(f"{after.threads} threads at the end, {before.threads} before, {most} at most")
    if after.files > before.files + 4:
        wrong.append(f"{after.files} open files at the end, {before.files} before")
    if any(held.values()):
        wrong.append(f"not all was given back: {held}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    path = str(resolve(args.model))
    if args.serve:
        serve(path)
        return
    command = [sys.executable, "-m", "tests.soak_serve", path, "--serve"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    said: list[str] = []
    stderr = process.stderr
    threading.Thread(target=lambda: said.extend(stderr), daemon=True).start()

    def ask(what: str) -> dict[str, int]:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(what + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())  # type: ignore[no-any-return]

    try:
        port = int(json.loads(process.stdout.readline())["url"].rpartition(":")[2])
        soak = Soak(port, process.pid, random.Random(args.seed))
        asyncio.run(soak.fill(lambda: ask("held")["cache"]))
        before = soak.sample()
        asyncio.run(soak.run(args.minutes, args.clients))
        for _ in range(60):  # what was cancelled ends within a step
            held = ask("clear")
            if not any(held.values()):
                break
            time.sleep(0.5)
        time.sleep(2)
        wrong = judge(soak, before, soak.sample(), held)
    finally:
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
    print("done:", ", ".join(f"{name} {n}" for name, n in sorted(soak.done.items())))
    print("answers:", ", ".join(f"{n} times {status}" for status, n in sorted(soak.statuses.items())))
    if process.returncode != 0:
        wrong.append(f"the server ended with {process.returncode}")
    if any("Traceback" in line for line in said):
        wrong.append("on standard error: " + "".join(said)[-3000:])
    for line in wrong:
        print("wrong:", line)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
