"""The table of docs/quantising.md: what types, makers and mixes lose of a model, on text that none of them has seen.

    python tests/bench/calibrate_table.py MODEL --calibrate TEXT --judge TEXT [--types q4_k_m ...] [--peer FOLDER]

MODEL is a GGUF file in F16, BF16 or F32. Each type is made by qrun without importance, with the importance matrix of
the calibration text, and column by column; and by llama-quantize with the same matrix (--peer: the folder with
llama.cpp's programs; with llama-imatrix there, also with its own). With --mixes come the mixes that `qrun convert
--size` chooses for as many bytes as the smallest of these files. All are judged by the same tokens: the mean KL
divergence from MODEL with its standard error, how often both hold the same token to be the likeliest, and the
perplexity. The table is Markdown; --plot draws bits a weight against KL.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from quantize_table import run

from qrun.cli.compare import score_against, write_logits
from qrun.cli.loading import load_tokenizer, text_chunks
from qrun.cli.perplexity import plus_minus
from qrun.engine.judging.divergence import Divergence
from qrun.formats import GGUFReader
from qrun.formats.tensors import n_weights


@dataclass(frozen=True)
class Row:
    """A file that was judged. group: who made it, how."""

    group: str
    type: str
    n_bytes: int
    bits_per_weight: float
    divergence: Divergence


def qrun(*words: object) -> None:
    """A command of qrun, as a process of its own."""
    run(sys.executable, "-m", "qrun.cli.main", *words)


def bits_per_weight(path: Path) -> float:
    """Of the tensors of a file."""
    with GGUFReader(path) as reader:
        tensors = reader.tensors.values()
        return 8 * sum(tensor.n_bytes for tensor in tensors) / n_weights(tensors)


class Bench:
    """Makes files and judges them, one after the other."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.rows = options, folder, list[Row]()
        self.text = text_chunks(options.judge, load_tokenizer(options.model), options.ctx, options.chunks)
        self.logits = open(folder / "logits", "w+b")  # noqa: SIM115 - goes with the folder
        self.source = write_logits(options.model, self.text, self.logits, options.threads, "f16")

    def add(self, group: str, type: str, make: Callable[[Path], None]) -> Path:
        """Makes a file, judges it, and says what came of it. Returns the file."""
        out = self.folder / "made.gguf"
        out.unlink(missing_ok=True)
        make(out)
        divergence = score_against(out, self.text, self.logits, type, self.options.threads, "f16")
        self.rows.append(Row(group, type, out.stat().st_size, bits_per_weight(out), divergence))
        print(line(self.rows[-1]), flush=True)
        return out


HEAD = "| | type | MB | bits/weight | KL divergence | same top token | perplexity |\n|---|---|--:|--:|--:|--:|--:|"


def line(row: Row) -> str:
    """Of the table."""
    kl, top = row.divergence.mean_kl, row.divergence.agreement
    return (
        f"| {row.group} | {row.type.upper()} | {row.n_bytes / 1e6:.1f} | {row.bits_per_weight:.3f} | "
        f"{plus_minus(kl, 5)} | {100 * top.value:.1f} % | {row.divergence.model.perplexity.value:.2f} |"
    )


def measure(options: argparse.Namespace, folder: Path) -> Bench:
    """All of it, in the order of the types."""
    bench = Bench(options, folder)
    score = bench.source
    print(f"{options.model.name}: perplexity {score.perplexity.value:.2f} on {score.count} tokens\n", flush=True)
    print(HEAD, flush=True)
    cut = ("--ctx", options.ctx, "-t", options.threads)
    imatrix = folder / "imatrix.gguf"
    qrun("imatrix", options.model, options.calibrate, "-o", imatrix, "--chunks", options.samples, *cut)
    theirs: Path | None = None
    if options.peer and (options.peer / "llama-imatrix").is_file():
        theirs = folder / "theirs.gguf"
        run(options.peer / "llama-imatrix", "-m", options.model, "-f", options.calibrate, "-o", theirs, "--no-ppl",
            "-c", options.ctx, "--chunks", options.samples, "-t", options.threads)  # fmt: skip
    common = ["--calibrate", options.calibrate, "--samples", options.samples, "--length", options.ctx, "--measures",
              options.work, "--no-judge"]  # fmt: skip
    for type in options.types:
        before = len(bench.rows)
        if options.peer:
            if theirs:
                bench.add("llama-quantize, llama-imatrix", type, partial(quantise, options, type, theirs))
            bench.add("llama-quantize, qrun imatrix", type, partial(quantise, options, type, imatrix))
        bench.add("qrun, plain", type, partial(convert, options, "--type", type))
        bench.add("qrun, importance", type, partial(convert, options, "--type", type, "--imatrix", imatrix))
        bench.add("qrun, column by column", type, partial(convert, options, "--type", type, *common))
        if options.mixes:
            size = min(row.n_bytes for row in bench.rows[before:])
            words = ["--size", size, *common, *(["--candidates", options.candidates] if options.candidates else [])]
            for group, method in (("qrun, mix, importance", "imatrix"), ("qrun, mix, column by column", "gptq")):
                make = partial(convert, options, *words, "--method", method)
                bench.add(group, f"size of {type}", make)
    return bench


def convert(options: argparse.Namespace, *words: object) -> None:
    """The last word is the file to make."""
    *settings, out = words
    qrun("convert", options.model, out, *settings, "-t", options.threads)


def quantise(options: argparse.Namespace, type: str, imatrix: Path, out: Path) -> None:
    """By llama-quantize."""
    run(options.peer / "llama-quantize", "--imatrix", imatrix, options.model, out, type.upper(), options.threads)


def draw(bench: Bench, path: str) -> None:
    """Bits a weight against KL, a line for each maker."""
    from qrun.cli.plot import new_figure, save

    figure, (axes,) = new_figure(7.2, 4.6)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    for group in dict.fromkeys(row.group for row in bench.rows):
        rows = sorted((row for row in bench.rows if row.group == group), key=lambda row: row.bits_per_weight)
        losses = [row.divergence.mean_kl for row in rows]
        axes.errorbar(
            [row.bits_per_weight for row in rows], [loss.value for loss in losses], [loss.error for loss in losses],
            marker="o", markersize=4, linewidth=1.2, capsize=2, label=group,
        )  # fmt: skip
    axes.set_xlabel("bits per weight")
    axes.set_ylabel("KL divergence from the source, nats per token")
    axes.set_title(f"What {bench.options.model.name} loses", fontsize=12, loc="left")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(axis="y", which="major", color="#e6e6e6", linewidth=0.8)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=["q4_k_m", "q3_k_m"])
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--mixes", action="store_true")
    parser.add_argument("--candidates")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where what is measured for mixes is kept")
    parser.add_argument("--plot")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qrun-calibrate-") as name:
        options.work = options.work or Path(name) / "measures"
        bench = measure(options, Path(name))
        bench.logits.close()
    if options.plot:
        draw(bench, options.plot)


if __name__ == "__main__":
    main()
