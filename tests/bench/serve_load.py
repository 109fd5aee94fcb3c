"""The table of what `qrun serve` does under load, beside llama-server where it is given, as Markdown.

    python tests/bench/serve_load.py MODEL... [--peer path/of/llama-server] [--clients 8 32] [--answers 64 128]

The two take turns: for each model and each number of places, one server is started, asked something, loaded and ended,
and then the other, `--rounds` times; the best of each figure counts. Every request is of `/v1/completions`, greedy,
streamed, with a prompt of its own and an answer of a given length. Ratios are of the same run on the same machine; one
that is alone says little. `make bench-serve` runs this.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from http_streams import Stream, get, post, stream

from qrun.engine.native.cpu_count import available_cores
from qrun.models.catalog import resolve

# Each is one token, or two, of most vocabularies.
WORDS = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work government number night point home water room mother
area money story fact month lot right study book eye job word business issue side kind head house service friend
father power hour game line end member law car city community name president team minute idea body information
""".split()  # noqa: SIM905

# Names that are forced, numbers, words to choose from and short texts, three levels deep.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 20},
        "kind": {"enum": ["novel", "poem", "drama"]},
        "author": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 20},
                "address": {
                    "type": "object",
                    "properties": {"street": {"type": "string", "maxLength": 20}, "number": {"enum": [1, 2, 3]}},
                    "required": ["street", "number"],
                    "additionalProperties": False,
                },
            },
            "required": ["name", "address"],
            "additionalProperties": False,
        },
        "chapters": {
            "type": "array",
            "minItems": 3,
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {"heading": {"type": "string", "maxLength": 20}, "finished": {"type": "boolean"}},
                "required": ["heading", "finished"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["title", "kind", "author", "chapters"],
    "additionalProperties": False,
}

PREFIXES = {8: (8, 900), 32: (16, 2000)}  # places -> requests at once, and the tokens that they share


@dataclass
class Engine:
    """name: in the table. command: of a server, for a port, so many places, and the tokens that one of them has to
    hold, and all together."""

    name: str
    command: Callable[[int, int, int, int], list[str]]
    counts_hits: bool


@dataclass
class Figure:
    """best: of several rounds, the highest or the lowest. goal: of the ratio, for the table."""

    unit: str
    best: Callable[[list[float]], float]
    goal: str = ""
    values: dict[str, list[float]] = field(default_factory=dict)


class Table:
    """Figures by model and name, each of some engines."""

    def __init__(self) -> None:
        self.figures: dict[tuple[str, str], Figure] = {}
        self.model = ""

    def add(self, name: str, unit: str, engine: str, value: float, goal: str = "", *, high: bool = False) -> None:
        figure = self.figures.setdefault((self.model, name), Figure(unit, max if high else min, goal))
        figure.values.setdefault(engine, []).append(value)
        print(f"{self.model}: {name}: {engine}: {value:.4g} {unit}", file=sys.stderr)

    def markdown(self) -> str:
        engines = list(dict.fromkeys(name for figure in self.figures.values() for name in figure.values))
        heads = ["model", "what", *engines]
        heads += [f"of {peer}" for peer in engines[1:]] + ["goal"]
        lines = ["| " + " | ".join(heads) + " |", "|---|---" + "|--:" * (len(heads) - 3) + "|---|"]
        for (model, name), figure in self.figures.items():
            best = {engine: figure.best(values) for engine, values in figure.values.items()}
            cells = [model, f"{name}, {figure.unit}"]
            cells += [f"{best[engine]:.4g}" if engine in best else "" for engine in engines]
            for peer in engines[1:]:
                ratio = best[engines[0]] / best[peer] if peer in best and engines[0] in best and best[peer] else None
                cells.append("" if ratio is None else f"**{ratio:.2f}x**")
            lines.append("| " + " | ".join([*cells, figure.goal]) + " |")
        return "\n".join(lines)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Running:
    """A server that runs."""

    engine: Engine
    port: int
    process: subprocess.Popen[bytes]
    words: random.Random
    tokens_per_word: float = 1.0

    def prompt(self, n_tokens: int) -> str:
        """A text of about so many tokens that no other prompt begins as."""
        n_words = max(round(n_tokens / self.tokens_per_word), 1)
        return " ".join(self.words.choice(WORDS) for _ in range(n_words))

    async def measure_words(self) -> None:
        _, told = await post(self.port, "/tokenize", {"content": " ".join(WORDS * 4)})
        self.tokens_per_word = len(told["tokens"]) / (4 * len(WORDS))

    async def ask(self, prompt: str, n: int, **more: Any) -> Stream:
        until = more.pop("until", None)
        body = {"model": "m", "prompt": prompt, "max_tokens": n, "temperature": 0, "ignore_eos": True, **more}
        found = await stream(self.port, body, until=until)
        if found.status != 200 or found.error or not found.times:
            raise RuntimeError(f"{self.engine.name}: {found.status} {found.error or 'no text'}"[:500])
        return found

    def cpu_seconds(self) -> float:
        """What the event loop's thread, the first one of qrun's process, has taken; 0 where the system does not say."""
        try:
            text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/stat").read_text()
        except OSError:
            return 0.0
        user, system = text.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    async def hits(self) -> float:
        """Tokens of prompts that were found in the cache so far."""
        _, text = await get(self.port, "/metrics")
        line = next(line for line in text.decode().splitlines() if line.startswith("qrun:prefix_cache_hits_total "))
        return float(line.split()[-1])


@contextmanager
def started(engine: Engine, places: int, one: int, together: int, log: Path) -> Iterator[Running]:
    port = free_port()
    with log.open("ab") as file:
        process = subprocess.Popen(engine.command(port, places, one, together), stdout=file, stderr=file,
                                   stdin=subprocess.DEVNULL)  # fmt: skip
    try:
        yield Running(engine, port, process, random.Random(places))
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def ready(server: Running, seconds: float = 120) -> None:
    """Wait until the model has been loaded."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        if server.process.poll() is not None:
            raise RuntimeError(f"{server.engine.name} has ended with {server.process.returncode}")
        try:
            if (await get(server.port, "/health"))[0] == 200:
                return
        except (OSError, ValueError, asyncio.IncompleteReadError):
            pass
        await asyncio.sleep(0.02)  # each of these takes time from the loading of the model
    raise RuntimeError(f"{server.engine.name} does not answer")


async def timed(tasks: list[Awaitable[Stream]]) -> tuple[float, list[Stream]]:
    """Requests that are sent at once: the seconds from then to the last part of the last answer."""
    begin = time.perf_counter()
    streams = list(await asyncio.gather(*tasks))
    return max(one.end for one in streams) - begin, streams


def at(values: list[float], share: float) -> float:
    """The value that this share of all is below."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


# What is measured


async def throughput(server: Running, table: Table, clients: int, n: int, args: argparse.Namespace) -> None:
    before = server.cpu_seconds()
    seconds, streams = await timed([server.ask(server.prompt(args.prompt), n) for _ in range(clients)])
    spent = server.cpu_seconds() - before
    total = sum(one.n_tokens or n for one in streams)
    name, what = server.engine.name, f"{clients} clients, {args.prompt} in, {n} out"
    table.add(f"{what}: output", "tokens/s", name, total / seconds, "at least 4x", high=True)
    firsts = [one.first for one in streams]
    table.add(f"{what}: first token, p50", "s", name, statistics.median(firsts), "at most 0.3x")
    table.add(f"{what}: first token, p95", "s", name, at(firsts, 0.95), "at most 0.3x")
    if server.engine.counts_hits and spent:
        share = 100 * spent / seconds
        table.add(f"{what}: HTTP and JSON, of a token's time", "%", name, share, "at most 5 %")


async def longest_gap(server: Running, table: Table, args: argparse.Namespace) -> None:
    """Seven streams, and then a long prompt: they go on until it has been read."""
    arrived = False
    running: dict[int, Stream] = {}

    async def one(number: int) -> Stream:
        def until(found: Stream) -> bool:
            running[number] = found
            return arrived

        return await server.ask(server.prompt(args.prompt), args.context - args.prompt - 64, until=until)

    tasks = [asyncio.ensure_future(one(number)) for number in range(7)]
    while len(running) < 7 or any(len(found.times) < args.settle for found in running.values()):
        await asyncio.sleep(0.05)
        if any(task.done() for task in tasks):
            break
    begin = time.perf_counter()
    long = await server.ask(server.prompt(args.long), 2)
    arrived = True
    streams = await asyncio.gather(*tasks)
    begun = max(found.times[0] for found in streams)
    before = [gap for found in streams for gap in found.gaps(begun, begin)]
    during = [max(found.gaps(begin, long.times[0])) for found in streams]
    ordinary = statistics.median(before)
    name, what = server.engine.name, f"7 streams, a prompt of {args.long} arrives"
    table.add(f"{what}: an ordinary step", "ms", name, 1e3 * ordinary)
    table.add(f"{what}: longest gap", "ordinary steps", name, max(during) / ordinary, "at most 3 steps")
    table.add(f"{what}: longest gap", "ms", name, 1e3 * max(during))
    table.add(f"{what}: its first token", "s", name, long.first)


async def shared_prefix(server: Running, table: Table, clients: int, shared: int) -> None:
    prefix = server.prompt(shared)
    hits = await server.hits() if server.engine.counts_hits else 0.0
    seconds, streams = await timed([server.ask(f"{prefix} {server.prompt(20)}", 16) for _ in range(clients)])
    name, what = server.engine.name, f"{clients} at once that share {shared} tokens, 16 out"
    table.add(f"{what}: in all", "s", name, seconds, "at most 0.15x")
    if server.engine.counts_hits:
        n_prompt = streams[0].usage.get("prompt_tokens", shared)
        read = sum(one.usage.get("prompt_tokens", 0) for one in streams) - (await server.hits() - hits)
        table.add(f"{what}: tokens read", "prompts", name, read / n_prompt, "1 and the ends")


async def constrained(server: Running, table: Table, clients: int) -> None:
    """A nested schema against as many tokens of a free answer: tokens a second from the first to the last."""

    def speed(streams: list[Stream]) -> float:
        tokens = sum(one.n_tokens for one in streams) - len(streams)
        return tokens / (max(one.end for one in streams) - min(one.times[0] for one in streams))

    prompts = [f"{server.prompt(30)}\nA book as JSON:\n" for _ in range(clients)]
    body = {"json_schema": SCHEMA, "ignore_eos": False}
    # What is made once for a schema and a vocabulary; and neither the one nor the other is to read prompts.
    await timed([server.ask(prompt, 1, **body) for prompt in prompts])
    _, forms = await timed([server.ask(prompt, 250, **body) for prompt in prompts])
    what = f"a nested schema against free, {clients} client{'s' * (clients > 1)}"
    try:
        for one in forms:
            json.loads(one.text)
    except ValueError:
        print(f"{server.engine.name}: {what}: not what the schema says: {one.text[-200:]!r}", file=sys.stderr)
        return
    lengths = [one.n_tokens for one in forms]
    _, free = await timed([server.ask(prompt, n) for prompt, n in zip(prompts, lengths, strict=True)])
    table.add(what, "of its speed", server.engine.name, speed(forms) / speed(free), "at least 0.95", high=True)


async def one_load(engine: Engine, places: int, table: Table, args: argparse.Namespace, log: Path) -> None:
    """All that is measured with so many places."""
    n_shared, shared = PREFIXES.get(places, (places, 900))
    shared = min(shared, args.longest_prefix)
    answer = args.prompt + max(args.answers) + 64
    longest = args.context if places == min(args.clients) else 0
    one, together = max(answer, shared + 128, longest), max(8 * longest, places * answer, n_shared * (shared + 128))
    with started(engine, places, one, together, log) as server:
        begin = time.perf_counter()
        await ready(server)
        await server.ask("Hello, I am", 1)
        table.add("start to first answer", "s", engine.name, time.perf_counter() - begin, "1.2 s")
        await server.measure_words()
        await server.ask(server.prompt(args.prompt), 8)
        for n in args.answers:
            await throughput(server, table, places, n, args)
        await shared_prefix(server, table, n_shared, shared)
        if places == min(args.clients):
            if places > 7:
                await longest_gap(server, table, args)
            for clients in (1, places):
                await constrained(server, table, clients)


def engines(model: Path, args: argparse.Namespace) -> list[Engine]:
    threads = str(args.threads)

    def ours(port: int, places: int, one: int, together: int) -> list[str]:
        return [sys.executable, "-m", "qrun.cli.main", "serve", str(model), "--port", str(port), "--quiet",
                "--threads", threads, "--ctx", str(args.context)]  # fmt: skip

    def theirs(port: int, places: int, one: int, together: int) -> list[str]:
        one_cache = ["-kvu"] if places < 32 else []  # which is the faster way for few
        size = together if one_cache else places * -(-one // 256) * 256
        return [str(args.peer), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-np", str(places),
                "-c", str(size), "-t", threads, "-tb", threads, *one_cache]  # fmt: skip

    found = [Engine("qrun", ours, True)]
    if args.peer:
        found.append(Engine("llama-server", theirs, False))
    return found


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--peer", type=Path, help="llama-server")
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--answers", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--long", type=int, default=3900, help="tokens of the prompt that comes while others go on")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--longest-prefix", type=int, default=2000)
    parser.add_argument("--settle", type=int, default=40, help="tokens of each stream before it arrives")
    parser.add_argument("--rounds", type=int, default=1)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    args = parsed(arguments)
    table = Table()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for model in (Path(resolve(name)) for name in args.models):
            table.model = model.stem
            for number in range(args.rounds):
                for places in args.clients:
                    for engine in engines(model, args)[:: -1 if number % 2 else 1]:
                        log = Path(folder) / f"{engine.name}.log"
                        try:
                            asyncio.run(one_load(engine, places, table, args, log))
                        except Exception as error:  # what the others have given is worth a table all the same
                            failed += 1
                            said = log.read_text("utf-8", "replace")[-3000:] if log.exists() else ""
                            print(f"{said}\n{engine.name}, {places} places: {error!r}", file=sys.stderr)
    print(table.markdown())
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(sys.argv[1:])
