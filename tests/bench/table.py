"""The table of speeds in docs/speed.md: this engine, and others where they are given, on several models, as Markdown.

    python tests/bench/table.py MODEL... [--random q4_k_m ...] [--peer PEER ...] [--threads 1 2] [--depths 0 4096]

MODEL is a path or a name; --random writes a model of a billion random weights first (see random_model.py), unless it
is there: a llama in the mix that is named, or as in `nemotron_h:q4_k_m` another one. PEER is what
`qrun bench --compare` takes. `make bench` runs this.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import random_model

from qrun.cli.bench_compare import Peer, Task, compare
from qrun.models.catalog import resolve

Row = dict[str, Any]


def markdown(results: list[tuple[Task, list[Row]]]) -> str:
    """A line for each model, depth and figure; in it, for each number of threads, tokens per second and ratios."""
    rows = [row for _, rows in results for row in rows]
    threads = list(dict.fromkeys(row["threads"] for row in rows))
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    heads = ["model", "tokens/s"]
    for count in threads:
        heads += [f"qrun, {count} thread{'s' * (count > 1)}", *peers]
    lines = ["| " + " | ".join(heads) + " |", "|---" * 2 + "|--:" * (len(heads) - 2) + "|"]
    for task, found in results:
        for metric in task.metrics:
            after = f" after {task.depth}" if task.depth else ""
            cells = [Path(task.model).stem, metric + after]
            for row in (row for row in found if row["metric"] == metric):
                share = f" ({row['share']:.0%} of {row['memory']:.0f} GB/s)" if "share" in row else ""
                cells.append(f"{row['qrun']:.1f}{share}")
                for name in peers:
                    figure = row["peers"].get(name)
                    cells.append("" if figure is None else f"{figure:.1f} (**{row['ratios'][name]:.2f}x**)")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tasks(models: list[str], depths: list[int], args: argparse.Namespace) -> list[Task]:
    """Each model at each depth; sequences together are measured at the first alone, for they begin empty."""
    return [
        Task(model, args.prompt, args.gen, args.reps, depth, args.seqs if i == 0 else 1, args.cache_type)
        for model in models
        for i, depth in enumerate(depths)
    ]


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--random", nargs="*", default=[], metavar="[ARCHITECTURE:]MIX")
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="for the models of --random")
    parser.add_argument("--peer", action="append", default=[], help="may be given several times")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--depths", type=int, nargs="+", default=[0])
    parser.add_argument("--cache-type", default="f16")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    numbers = (("-p", "--prompt", 512), ("-n", "--gen", 64), ("-r", "--reps", 3), ("-s", "--seqs", 1))
    for short, name, default in numbers:
        parser.add_argument(short, name, type=int, default=default)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    args = parsed(arguments)
    models = [str(resolve(model)) for model in args.models]
    for name in args.random:
        args.folder.mkdir(parents=True, exist_ok=True)
        architecture, _, mix = name.rpartition(":")
        model = random_model.ARCHITECTURES[architecture or "llama"]()
        path = args.folder / f"{model.architecture}-{model.n_weights / 1e9:.1f}b-{mix.lower()}.gguf"
        if not path.exists():
            print(f"writing {path} ...", file=sys.stderr)
            random_model.write(path, mix.upper(), model)
        models.append(str(path))
    results = []
    for task in tasks(models, args.depths, args):
        print(f"{Path(task.model).name} after {task.depth} tokens ...", file=sys.stderr)
        results.append((task, compare(task, [Peer(peer) for peer in args.peer], args.threads)))
    if args.json:
        args.json.write_text(json.dumps([asdict(task) | {"results": rows} for task, rows in results], indent=1))
    print(markdown(results))


if __name__ == "__main__":
    main(sys.argv[1:])
