"""The table of converting in docs/speed.md: what each type loses, and how long it takes, here and in llama-quantize.

    python tests/bench/quantize_table.py MODEL [--imatrix FILE] [--quantize llama-quantize] [--types q4_k_m ...]

MODEL is a GGUF file in F16, BF16 or F32. Both convert the same file in the same run, in turns, each as a process of
its own; of several repetitions the best time counts. What is lost is found alike for both: every tensor that changed is
decoded from the result, and the error is the root mean square over all these weights, relative to theirs; with
--imatrix also the same with every weight counted by its importance. The table is Markdown. `make bench-convert` runs
this.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from qrun.engine.native.cpu_count import available_cores
from qrun.engine.quantize.encoder import Encoder
from qrun.engine.quantize.imatrix import Imatrix, read_imatrix
from qrun.engine.quantize.mixes import FILE_TYPES, FLOATS, NEED_IMPORTANCE
from qrun.engine.quantize.source import GGUFSource, SourceTensor
from qrun.formats import GGUFReader

QRUN = "qrun"
# Types that only experts get, or that llama-quantize does not make.
OTHERS = ("MXFP4", "NVFP4")
# Weights that are decoded at a time.
CHUNK = 1 << 22


@dataclass(frozen=True)
class Made:
    """A type made by one of the two. rmse, weighted: relative errors; weighted is NaN without importance."""

    type: str
    maker: str
    importance: bool
    n_bytes: int
    rmse: float
    weighted: float
    seconds: float


def command_of_qrun(source: Path, out: Path, name: str, imatrix: Path | None, threads: int) -> list[str]:
    importance = ["--imatrix", str(imatrix)] if imatrix else []
    words = [sys.executable, "-m", "qrun.cli.main", "convert", str(source), str(out), "--type", name, *importance]
    return [*words, "--threads", str(threads)]


def command_of_peer(
    quantize: str, source: Path, out: Path, name: str, imatrix: Path | None, threads: int
) -> list[str]:
    importance = ["--imatrix", str(imatrix)] if imatrix else []
    return [quantize, *importance, str(source), str(out), name, str(threads)]


def run(*command: object) -> float:
    """Its seconds. Raises RuntimeError, with its last words, if it fails."""
    start = time.perf_counter()
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, errors="replace")
    seconds = time.perf_counter() - start
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise RuntimeError(f"{' '.join(map(str, command[:4]))} failed: {' '.join(last)}")
    return seconds


def errors(source: Path, out: Path, imatrix: Imatrix | None) -> tuple[float, float]:
    """The relative root mean square error over all weights that changed their type, plain and by importance."""
    sums = np.zeros(4)
    with closing(GGUFSource(GGUFReader(source))) as before, closing(GGUFSource(GGUFReader(out))) as after:
        for name, tensor in after.tensors.items():
            if tensor.type == before.tensors[name].type:
                continue
            importance = imatrix.importance(name, tensor.shape) if imatrix else None
            for x, y, weights in row_parts(before.tensors[name], tensor, importance):
                miss, energy = np.square(x - y), np.square(x)
                sums += [part.sum(dtype=np.float64) for part in (miss, energy, miss * weights, energy * weights)]
    weighted = math.sqrt(sums[2] / sums[3]) if imatrix and sums[3] else math.nan
    return math.sqrt(sums[0] / sums[1]) if sums[1] else 0.0, weighted


def row_parts(
    before: SourceTensor, after: SourceTensor, importance: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Some rows of both at a time, all of one expert, with the importance of its columns."""
    weights = np.ones((1, before.row), np.float32) if importance is None else importance
    expert_rows = before.n_rows // len(weights)
    step = max(1, CHUNK // before.row)
    for expert, columns in enumerate(weights):
        last = (expert + 1) * expert_rows
        for start in range(expert * expert_rows, last, step):
            end = min(start + step, last)
            yield before.rows(start, end), after.rows(start, end), columns


def measure(args: argparse.Namespace, name: str, imatrix: Path | None, folder: Path) -> list[Made]:
    """Both on one type, in turns."""
    importance = read_imatrix(imatrix) if imatrix else None
    outs = {maker: folder / f"{maker}.gguf" for maker in [QRUN, *([Path(args.quantize).name] if args.quantize else [])]}
    commands = {
        maker: command_of_qrun(args.model, out, name, imatrix, args.threads)
        if maker == QRUN
        else command_of_peer(args.quantize, args.model, out, name, imatrix, args.threads)
        for maker, out in outs.items()
    }
    seconds = dict.fromkeys(outs, math.inf)
    for _ in range(args.reps):
        for maker, command in commands.items():
            seconds[maker] = min(seconds[maker], run(*command))
    results = []
    for maker, out in outs.items():
        rmse, weighted = errors(args.model, out, importance)
        results.append(Made(name, maker, imatrix is not None, out.stat().st_size, rmse, weighted, seconds[maker]))
        out.unlink()
    return results


def markdown(results: list[Made]) -> str:
    """A line for each type, without importance and then with it: size, errors and seconds of each maker."""
    makers = list(dict.fromkeys(made.maker for made in results))
    has_importance = any(made.importance for made in results)
    columns = ["RMSE", *(["by importance"] if has_importance else []), "seconds"]
    heads = ["type", "imatrix", "MB", *(f"{column}, {maker}" for column in columns for maker in makers)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * 2 + "|--:" * (len(heads) - 2) + "|"]
    for key in dict.fromkeys((made.type, made.importance) for made in results):
        found = {made.maker: made for made in results if (made.type, made.importance) == key}
        sizes = list(dict.fromkeys(f"{made.n_bytes / 1e6:.1f}" for made in found.values()))
        cells = [key[0], "yes" if key[1] else "no", " / ".join(sizes)]
        cells += best_bold([found[maker].rmse if maker in found else math.nan for maker in makers], 5)
        if has_importance:
            cells += best_bold([found[maker].weighted if maker in found else math.nan for maker in makers], 5)
        cells += best_bold([found[maker].seconds if maker in found else math.nan for maker in makers], 2)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def best_bold(values: list[float], digits: int) -> list[str]:
    """The values as text, the least of several in bold; nothing where there is none."""
    texts = ["" if math.isnan(value) else f"{value:.{digits}f}" for value in values]
    present = [value for value in values if not math.isnan(value)]
    if len(present) < 2:
        return texts
    least = f"{min(present):.{digits}f}"
    return [f"**{text}**" if text == least else text for text in texts]


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--imatrix", type=Path, help="also measure with this importance matrix")
    parser.add_argument("--quantize", metavar="PROGRAM", help="llama-quantize, to compare with")
    parser.add_argument("--types", nargs="+", type=str.upper, default=[], metavar="TYPE")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("-r", "--reps", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    args = parsed(arguments)
    quantised = [name for name, (type_, _) in FILE_TYPES.items() if type_ not in FLOATS]
    names = args.types or [name for name in quantised if name not in OTHERS]
    Encoder(type_ for type_, _ in FILE_TYPES.values())  # kernels are compiled before the clock runs
    results: list[Made] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            for imatrix in [None, *([args.imatrix] if args.imatrix else [])]:
                if imatrix is None and (name == "Q2_K_S" or FILE_TYPES[name][0] in NEED_IMPORTANCE):  # both refuse
                    continue
                print(f"{name}{' with an importance matrix' if imatrix else ''} ...", file=sys.stderr)
                results += measure(args, name, imatrix, Path(folder))
    if args.json:
        args.json.write_text(json.dumps([asdict(made) for made in results], indent=1))
    print(markdown(results))


if __name__ == "__main__":
    main(sys.argv[1:])
