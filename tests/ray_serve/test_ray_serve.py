"""examples/ray_serve with two replicas on this machine: `make test-ray`.

Slow: Ray starts a dozen processes, and each replica loads and compiles for itself.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qrun.engine import Model
from qrun.models.catalog import CATALOG, DEFAULT_MODEL
from qrun.models.download import pull_entry
from qrun.models.store import PullError
from qrun.server import Server

pytest.importorskip("ray.serve")

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_serve"
WORDS = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "group",
    "country",
    "home",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def open_stream(url: str, path: str, body: Any, timeout: float = 180) -> Any:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=timeout)


def ask(url: str, body: Any, path: str = "/v1/chat/completions") -> Any:
    with open_stream(url, path, body) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def path() -> Path:
    try:
        return pull_entry(CATALOG[DEFAULT_MODEL])
    except PullError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def one(path: Path) -> Iterator[str]:
    """A server without Ray."""
    with Model.load(path, threads=1) as model, Server(model) as server:
        yield server.url


@pytest.fixture(scope="module")
def two(path: Path) -> Iterator[str]:
    """The example's one command."""
    port = free_port()
    command = [sys.executable, "serve_models.py", str(path), "--replicas", "2", "2", "--threads", "1",
               "--port", str(port)]  # fmt: skip
    environment = os.environ | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "180",
        "RAY_worker_niceness": "0",
    }
    process = subprocess.Popen(command, cwd=EXAMPLE, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said: list[str] = []
    try:
        for line in process.stderr:
            said.append(line)
            if line.startswith("serving"):
                break
        else:
            pytest.fail("".join(said)[-3000:])
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(2)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def without_chance(answer: Any) -> Any:
    """What does not differ from one request to the next."""
    for name in ("id", "created", "timings"):
        answer.pop(name, None)
    answer.get("usage", {}).pop("prompt_tokens_details", None)
    return answer


def test_the_same_bytes_as_from_one_server(one: str, two: str) -> None:
    bodies: list[Any] = []
    for seed in range(8):
        talk = [{"role": "user", "content": f"Tell me about the number {seed}."}]
        bodies.append({"messages": talk, "seed": seed, "temperature": 0.8, "max_tokens": 24, "logprobs": True})
    with ThreadPoolExecutor(8) as pool:
        wanted, found = (list(pool.map(lambda body, url=url: ask(url, body), bodies)) for url in (one, two))
    assert [without_chance(answer) for answer in found] == [without_chance(answer) for answer in wanted]

    def texts(url: str) -> list[str]:
        with open_stream(url, "/v1/chat/completions", bodies[0] | {"stream": True}) as answer:
            lines = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: {")]
        return [choice["delta"].get("content", "") for line in lines for choice in json.loads(line)["choices"]]

    assert texts(two) == texts(one)


def hits(url: str, n_talks: int = 32, n_turns: int = 3) -> int:
    """Tokens that talks find in the cache, eight of them at a time."""

    def talk(number: int) -> int:
        chance = random.Random(number)
        system = " ".join(chance.choice(WORDS) for _ in range(80))
        messages: list[Any] = [{"role": "system", "content": system}]
        found = 0
        for turn in range(n_turns):
            messages.append({"role": "user", "content": f"Question {turn}: " + " ".join(chance.choices(WORDS, k=12))})
            answer = ask(url, {"messages": messages, "temperature": 0, "max_tokens": 4})
            messages.append(answer["choices"][0]["message"] | {"content": answer["choices"][0]["message"]["content"]})
            found += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(talk, range(n_talks)))


def test_talks_come_back_to_where_they_were_read(one: str, two: str) -> None:
    assert hits(two) >= 0.9 * hits(one) > 0


def test_a_replica_that_dies_costs_only_what_it_had_begun(two: str) -> None:
    import ray

    ray.init("auto", log_to_driver=False, namespace="serve")
    replicas = [name for name in ray.util.list_named_actors() if "#Replica#" in name]
    assert len(replicas) == 2
    begun = open_stream(two, "/v1/chat/completions", {
        "messages": [{"role": "user", "content": "Count from one to a thousand."}], "stream": True, "ignore_eos": True,
        "max_tokens": 1500,
    })  # fmt: skip
    assert begun.readline().startswith(b"data: {")
    bodies = [{"messages": [{"role": "user", "content": f"Hello {n}. " * 30}], "max_tokens": 8} for n in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(ask, two, body) for body in bodies]
        time.sleep(0.3)
        ray.kill(ray.get_actor(replicas[0]))
        done = [answer.result() for answer in answers]  # whole answers begin when they end: none is lost
    assert all(answer["choices"][0]["finish_reason"] in ("stop", "length") for answer in done)
    begun.close()
    for _ in range(120):  # and another replica takes its place
        named = [name for name in ray.util.list_named_actors() if "#Replica#" in name]
        if len(named) == 2 and replicas[0] not in named:
            break
        time.sleep(1)
    else:
        pytest.fail("no replica has taken its place")
    assert ask(two, bodies[0])["choices"]
    ray.shutdown()
