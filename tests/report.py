"""What is claimed of models, measured: one command prints it all.

    python -m tests.report [--peer PEER] [--shapes qwen35 ...]

Small models against the reference engine's logits; the same bits in splits and on threads; block types against
their definition; names of the catalog against a stand-in for the hub; the pages that say what is supported. With --peer
(as `qrun bench --compare` takes it), random models of several shapes against another engine, too, which takes some
minutes. QRUN_TEST_ARCHITECTURES names a folder with more small models. The status is 1 where something is not as it is
claimed, and each such thing has a line of its own.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qrun.cli import docs
from qrun.formats import FormatError, GGUFReader
from qrun.formats.blocks import BLOCK_FORMATS
from qrun.models import ARCHITECTURES
from qrun.models.catalog import hub_catalog
from tests.toys import MORE, OWN_FILES, architecture, context_for, error, source_of, tokens_and_logits

LIMIT = 1e-6
SPLITS = ((1, 1, 14, 16), (16, 16), (31, 1), (5, 20, 7))
ROOT = Path(__file__).parents[1]


def toys() -> list[Path]:
    """All small models that are there, run or not."""
    own = {path.name for path in OWN_FILES}
    more = sorted(Path(MORE).glob("*.gguf")) if MORE else []
    return [*OWN_FILES, *(path for path in more if path.name not in own)]


def check(path: Path) -> tuple[float, bool]:
    """How far the engine is from the reference, and whether splits and threads change a bit."""
    from qrun.engine.program.runtime import Runtime
    from qrun.models import build_graph

    tokens, expected = tokens_and_logits(path)
    results = []
    with GGUFReader(path) as reader:
        context = context_for(tokens)
        for threads in (1, 2):
            graph = build_graph(reader, context)
            runtime = Runtime(graph, threads=threads, context=context)
            for split in ((len(tokens),), *(SPLITS if graph.causal else ())):
                sequence = runtime.sequence()
                sequence.answer(source_of(path))
                ends = np.minimum(np.cumsum(split), len(tokens))
                parts = np.split(np.asarray(tokens), ends)
                rows = [runtime.evaluate(sequence, part, "all") for part in parts if len(part)]
                results.append(np.concatenate([row for row in rows if row is not None]))
            runtime.close()
    return error(results[0], expected), all(np.array_equal(result, results[0]) for result in results)


def report_toys() -> bool:
    """A line for each model that is not as it should be, and the sums. Is all as it should be?"""
    n_matched = n_equal = n_run = 0
    worst = 0.0
    paths = toys()
    for path in paths:
        if architecture(path) not in ARCHITECTURES:
            say(f"  {path.stem}: {architecture(path)} is not supported")
            continue
        try:
            found, equal = check(path)
        except FormatError as problem:
            say(f"  {problem}")
            continue
        n_run += 1
        n_matched += found <= LIMIT
        n_equal += equal
        worst = max(worst, found)
        if found > LIMIT or not equal:
            say(f"  {path.stem}: error {found:.1e}, {'equal' if equal else 'OTHER'} bits")
    say(f"small models matched at {LIMIT:g}: {n_matched} of {len(paths)} (worst {worst:.1e})")
    say(f"equal bits in {1 + len(SPLITS)} splits, on one thread and two: {n_equal} of {n_run}")
    return n_matched == n_equal == len(paths)


def report_tests(what: str, file: str) -> bool:
    """How many tests of a file passed, and a line for each that did not. Did all?"""
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "-n", "0", str(ROOT / "tests" / "unit" / file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no result"]
    for line in lines:
        if line.startswith(("FAILED ", "ERROR ")):
            say(f"  {line}")
    found = re.search(r"\d+ (passed|failed|error).*", lines[-1])
    say(f"{what}: {found[0].strip(' =') if found else lines[-1]}")
    return done.returncode == 0


def report_support() -> bool:
    """Are the pages that are made of the code's tables as the code is now?"""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    current = docs.with_support(readme) == readme and docs.models_page() == page
    say(f"what README.md and docs/models.md say is supported: {'as made now' if current else 'OLD, run `make docs`'}")
    return current


def say(line: str) -> None:
    """A line that is seen at once."""
    print(line, flush=True)


def report_speed(peer: str, shapes: Sequence[str]) -> None:
    """The table of speeds of random models."""
    bench = Path(__file__).parent / "bench"
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{shape}.gguf" for shape in shapes]
        for shape, path in zip(shapes, paths, strict=True):
            command = [sys.executable, str(bench / "random_model.py"), "q4_k_m", str(path), "--architecture", shape]
            subprocess.run(command, check=True)
        table = [sys.executable, str(bench / "table.py"), *map(str, paths), "--peer", peer, "--threads", "2"]
        subprocess.run(table, check=True)


def main() -> None:
    """Print it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="another engine, as `qrun bench --compare` takes it")
    parser.add_argument("--shapes", nargs="+", default=["qwen35", "gpt-oss", "gemma4", "nemotron_h", "deepseek2"])
    args = parser.parse_args()
    say(f"architectures: {len(ARCHITECTURES)}")
    entries = hub_catalog()
    names = sum(len(entry.names) for entry in entries)
    good = [
        report_toys(),
        report_tests(f"{len(BLOCK_FORMATS)} types of tensors, equal to the bit", "test_blocks.py"),
        report_tests(
            f"{len(entries)} models of the catalog under {names} names, resolved and pulled", "test_catalog_names.py"
        ),
        report_support(),
    ]
    if args.peer:
        report_speed(args.peer, args.shapes)
    else:
        say("speed beside another engine: not measured, as none is named with --peer")
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
