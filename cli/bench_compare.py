"""`qrun bench --compare`: this engine and others on the same model, in turns, the best of each."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from qrun.cli.console import echo
from qrun.cli.plot import check_plot, new_figure, save
from qrun.formats import QrunError
from qrun.models.interpreter import interpreter

ROUNDS = 2
"""How often each engine has its turn: a neighbour that disturbs one turn does not decide the comparison."""

_PEER_SCRIPT = Path(__file__).with_name("peer_bench.py")
_ARGUMENTS = "{model} -t {threads} -p {prompt} -n {gen} -r {reps} --depth {depth} --seqs {seqs}"


class EngineFailed(QrunError):
    """A benchmark of an engine could not be run, failed, or printed no figures."""


@dataclass(frozen=True)
class Task:
    """What is measured; the names are those of the placeholders of a peer's command."""

    model: str
    prompt: int = 512
    gen: int = 64
    reps: int = 3
    depth: int = 0
    seqs: int = 1
    cache_type: str = "f16"

    @property
    def metrics(self) -> list[str]:
        """The figures that there can be: pp512, tg64, tg64x8."""
        names = [f"pp{self.prompt}"] * (self.prompt > 0) + [f"tg{self.gen}"] * (self.gen > 0)
        return names + [f"tg{self.gen}x{self.seqs}"] * (self.gen > 0 and self.seqs > 1)


class Peer:
    """Another engine: a Python in which its package is installed, or [NAME=]COMMAND with placeholders."""

    def __init__(self, text: str) -> None:
        self.name: str | None = None
        self.uses: list[str] = []  # instruction sets, where the peer tells them
        if "{model}" not in text:
            if not Path(text).is_file():
                raise click.UsageError(f"--compare: {text!r} is no file, and no command with {{model}} in it.")
            # Not run as a file: its folder, where modules have names of Python's own, would come before those.
            script = _PEER_SCRIPT.read_text(encoding="utf-8")
            self._words = [text, "-c", script, *shlex.split(_ARGUMENTS)]
            return
        name, equals, command = text.partition("=")
        if equals and name.replace("-", "").replace(".", "").replace("_", "").isalnum():
            self.name, text = name, command
        try:
            self._words = shlex.split(text)
        except ValueError as error:  # a quotation without an end
            raise click.UsageError(f"--compare: {text!r}: {error}.") from None
        self.name = self.name or Path(self._words[0]).name

    def command(self, task: Task, threads: int) -> list[str]:
        """The command's words, with what is measured in place of the placeholders."""
        values = {name: str(value) for name, value in asdict(task).items()} | {"threads": str(threads)}
        pattern = re.compile("{(" + "|".join(values) + ")}")
        return [pattern.sub(lambda match: values[match[1]], word) for word in self._words]

    def run(self, task: Task, threads: int) -> dict[str, float]:
        """Its figures. EngineFailed, with its last words, if it fails or prints none."""
        called = self.name or "the peer"
        answer = _last_json(_output(self.command(task, threads), called), called)
        try:
            found = {name: value for name, value in figures(answer).items() if name in task.metrics}
        except (TypeError, ValueError, LookupError, AttributeError):  # it is another program's
            raise EngineFailed(f"{called} printed JSON without figures as --json or llama-bench have them") from None
        if isinstance(answer, dict) and self.name is None:
            self.name = str(answer.get("peer", "peer"))
            self.uses = [str(name) for name in answer.get("uses", [])]
        return found


def figures(answer: Any) -> dict[str, float]:
    """Tokens per second by name, from what a benchmark printed: an object of them, or llama-bench's list of tests."""
    if isinstance(answer, list):
        found: dict[str, float] = {}
        for test in answer:
            n_prompt, n_gen = test.get("n_prompt", 0), test.get("n_gen", 0)
            if bool(n_prompt) != bool(n_gen):
                name = f"pp{n_prompt}" if n_prompt else f"tg{n_gen}"
                found[name] = max([found.get(name, 0.0), test["avg_ts"], *test.get("samples_ts", [])])
        return found
    return {name: float(value) for name, value in answer.items() if name.startswith(("pp", "tg"))}


def run_qrun(task: Task, threads: int) -> dict[str, Any]:
    """This engine's figures, from a process of its own."""
    words = shlex.split(f"-t {threads} -p {task.prompt} -n {task.gen} -r {task.reps} --depth {task.depth}")
    words += ["--seqs", str(task.seqs), "--cache-type", task.cache_type, "--json"]
    python = interpreter()
    if python is None:
        raise ValueError("a comparison needs a Python to start qrun with, and this program has none")
    command = [*python, "-m", "qrun.cli.main", "bench", task.model, *words]
    answer: dict[str, Any] = _last_json(_output(command, "qrun"), "qrun")
    return answer


def compare(task: Task, peers: list[Peer], threads: list[int], rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """A row for each number of threads and each figure: {"threads", "metric", "qrun", "peers": {name: figure},
    "ratios": {name: qrun's figure over the peer's}, "uses": {name: instruction sets, where they are known}}, and
    "share" of the memory's speed with tg, where it is known."""
    rows: list[dict[str, Any]] = []
    for count in threads:
        gigabytes = 0.0
        best: dict[str, float] = {}
        others: list[dict[str, float]] = [{} for _ in peers]
        for _ in range(rounds):
            found = run_qrun(task, count)
            _keep_best(best, found)
            gigabytes = _gigabytes_a_token(found, f"tg{task.gen}")
            for peer, figures_of_peer in zip(peers, others, strict=True):
                _keep_best(figures_of_peer, peer.run(task, count))
        for metric in filter(best.__contains__, task.metrics):  # a model that fills in masks generates nothing
            named = {
                peer.name or "peer": figures_of_peer[metric]
                for peer, figures_of_peer in zip(peers, others, strict=True)
                if figures_of_peer.get(metric)
            }
            row: dict[str, Any] = {"threads": count, "metric": metric, "qrun": best[metric], "peers": named}
            row["ratios"] = {name: round(best[metric] / figure, 3) for name, figure in named.items()}
            row["uses"] = {peer.name or "peer": " ".join(peer.uses) for peer in peers if peer.uses}
            if "simd" in found:
                row["uses"]["qrun"] = found["simd"]
            if metric == f"tg{task.gen}" and gigabytes:
                row |= {"memory": best["memory"], "share": round(gigabytes * best[metric] / best["memory"], 3)}
            rows.append(row)
    return rows


def _keep_best(best: dict[str, float], found: dict[str, Any]) -> None:
    for name, value in found.items():
        if name.startswith(("pp", "tg")) or name == "memory":
            best[name] = max(best.get(name, 0.0), value)


def _gigabytes_a_token(found: dict[str, Any], metric: str) -> float:
    """What generation reads for a token, from the share of the memory's speed that a run found for itself."""
    return found["share"] * found["memory"] / found[metric] if found.get("share") and found.get(metric) else 0.0


def report(task: Task, peers: list[Peer], threads: list[int], plot: str | None, as_json: bool) -> None:
    """Compares, and prints it: a table, or JSON; draws it as well if `plot` names a file."""
    if plot:
        check_plot(plot)
    rows = compare(task, peers, threads)
    if plot:
        draw(task, rows, plot)
    echo(json.dumps(asdict(task) | {"results": rows}) if as_json else table(task, rows))


def table(task: Task, rows: list[dict[str, Any]]) -> str:
    """The comparison as text: tokens per second, and in brackets how many times as fast qrun is."""
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    widths = [max(len(name), 18) for name in names]
    lines = [f"{Path(task.model).name}, after {task.depth} tokens, cache {task.cache_type}; tokens/s, best of each"]
    head = "".join(f"{name:>{width + 2}}" for name, width in zip(names, widths, strict=True))
    lines.append(f"{'threads':<9}{'':<8}{'qrun':>10}{head}")
    for row in rows:
        line = f"{row['threads']:<9}{row['metric']:<8}{row['qrun']:>10.2f}"
        for name, width in zip(names, widths, strict=True):
            figure = row["peers"].get(name)
            text = "-" if figure is None else f"{figure:.2f} ({row['ratios'][name]:.2f}x)"
            line += f"{text:>{width + 2}}"
        if "share" in row:
            line += f"  {row['share']:.0%} of {row['memory']:.1f} GB/s"
        lines.append(line)
    # A library that was built for less than the machine has is slower than it could be there.
    uses = rows[-1].get("uses", {}) if rows else {}
    return "\n".join([*lines, *(f"{name} uses {words}" for name, words in uses.items())])


def draw(task: Task, rows: list[dict[str, Any]], path: str) -> None:
    """Bars of tokens per second, a panel for each figure, a group for each number of threads."""
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    figure, panels = new_figure(1 + 3.2 * len(task.metrics), 3.4, len(task.metrics))
    for axes, metric in zip(panels, task.metrics, strict=True):
        chosen = [row for row in rows if row["metric"] == metric]
        width = 0.8 / (1 + len(names))
        for i, name in enumerate(["qrun", *names]):
            values = [row["qrun"] if i == 0 else row["peers"].get(name, 0.0) for row in chosen]
            places = [place + width * i for place in range(len(chosen))]
            axes.bar_label(axes.bar(places, values, width, label=name), fmt="%.0f", fontsize=8)
        axes.set_xticks([place + 0.4 - width / 2 for place in range(len(chosen))])
        axes.set_xticklabels([f"{row['threads']} thread{'s' * (row['threads'] > 1)}" for row in chosen])
        axes.set_title(metric)
    panels[0].set_ylabel("tokens per second")
    panels[-1].legend(frameon=False, fontsize=8, loc="best")
    figure.suptitle(f"{Path(task.model).name}, after {task.depth} tokens", fontsize=10)
    save(figure, path)


def _output(command: list[str], name: str) -> str:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise EngineFailed(f"{name}: {command[0]} cannot be run: {error.strerror}") from None
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no message"]
        raise EngineFailed(f"{name} failed ({done.returncode}): {words[-1]}")
    return done.stdout


def _last_json(text: str, name: str) -> Any:
    """The JSON that a program printed: all of its output, or the last line that is some."""
    for candidate in [text, *reversed(text.splitlines())]:
        try:
            answer = json.loads(candidate)
        except ValueError:
            continue
        if isinstance(answer, dict | list):
            return answer
    raise EngineFailed(f"{name} printed no JSON")
