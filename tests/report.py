"""What is claimed of models, measured: one command prints it all.

    python -m tests.report [--peer PEER] [--shapes qwen35 ...]

Small models against the reference engine's logits; the same bits in splits and on threads; block types against
their definition; names of the catalog against a stand-in for the hub. With --peer (as `qrun bench --compare` takes it),
random models of several shapes against another engine, too, which takes some minutes. QRUN_TEST_ARCHITECTURES names a
folder with more small models.
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

from qrun.formats import FormatError, GGUFReader
from qrun.models import ARCHITECTURES
from tests.toys import MORE, OWN_FILES, architecture, context_for, error, source_of, tokens_and_logits

LIMIT = 1e-6
SPLITS = ((1, 1, 14, 16), (16, 16), (31, 1), (5, 20, 7))
TESTS = {
    "block types equal to the bit": ("test_blocks.py",),
    "names of the catalog, resolved and pulled": ("test_catalog_names.py",),
}


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


def report_toys() -> None:
    """A line for each model that is not as it should be, and the sums."""
    n_matched = n_equal = n_run = 0
    worst = 0.0
    paths = toys()
    for path in paths:
        if architecture(path) not in ARCHITECTURES:
            print(f"  {path.stem}: {architecture(path)} is not supported")
            continue
        try:
            found, equal = check(path)
        except FormatError as problem:
            print(f"  {problem}")
            continue
        n_run += 1
        n_matched += found <= LIMIT
        n_equal += equal
        worst = max(worst, found)
        if found > LIMIT or not equal:
            print(f"  {path.stem}: error {found:.1e}, {'equal' if equal else 'OTHER'} bits")
    print(f"small models matched at {LIMIT:g}: {n_matched} of {len(paths)} (worst {worst:.1e})")
    print(f"equal bits in {1 + len(SPLITS)} splits, on one thread and two: {n_equal} of {n_run}")


def report_tests() -> None:
    """How many tests of each kind passed."""
    folder = Path(__file__).parent / "unit"
    for what, files in TESTS.items():
        command = [sys.executable, "-m", "pytest", "-v", "-n", "0", *(str(folder / file) for file in files)]
        last = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().splitlines()[-1:]
        found = re.search(r"\d+ (passed|failed).*", "".join(last)) or re.search(r".*", "".join(last))
        print(f"{what}: {found[0].strip(' =') if found else 'no result'}")


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
    print(f"architectures: {len(ARCHITECTURES)}")
    report_toys()
    report_tests()
    if args.peer:
        report_speed(args.peer, args.shapes)


if __name__ == "__main__":
    main()
