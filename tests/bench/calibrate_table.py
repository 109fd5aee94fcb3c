"""The table of docs/quantising.md: what types, makers and mixes lose of a model, on text that none of them has seen.

    python tests/bench/calibrate_table.py MODEL --calibrate TEXT --judge TEXT [--types q4_k_m ...] [--peer FOLDER]

MODEL is a GGUF file in F16, BF16 or F32. Each type is made by qrun by each of --methods, plain being without any text;
and by llama-quantize with the same importance matrix (--peer: the folder with llama.cpp's programs; with llama-imatrix
there, also with its own). With --mixes come the mixes that `qrun convert --size` chooses for as many bytes as the
smallest of these files, of all types or of those named. All are judged by the same tokens: the mean KL divergence from
MODEL with its standard error, how often both hold the same token to be the likeliest, and the perplexity. The table is
Markdown; --plot draws bits a weight against KL. `make bench-quantise` makes all of it. With --rows what was measured is
kept in a file, a line for each row: a run that was broken off goes on there, and other types and methods can be added
to the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO

from quantize_table import run

from qrun.cli.against import score_against, write_logits
from qrun.cli.loading import RunOptions, load_tokenizer, text_chunks
from qrun.formats import GGUFReader
from qrun.formats.tensors import n_weights

METHODS = {"plain": "plain", "imatrix": "importance", "gptq": "column by column", "awq": "scales",
           "both": "scales, column by column"}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A file that was judged. group: who made it, how. kl: in nats, with its standard error. top: how often both hold
    the same token to be the likeliest."""

    group: str
    type: str
    n_bytes: int
    bits_per_weight: float
    kl: float
    kl_error: float
    top: float
    perplexity: float


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
        self._key = [options.model.name, options.calibrate.name, options.judge.name, options.samples, options.ctx,
                     options.chunks]  # fmt: skip
        self._kept: dict[tuple[str, str], Row] = {}
        if options.rows and options.rows.is_file():
            for entry in map(json.loads, options.rows.read_text("utf-8").splitlines()):
                if entry.pop("of") == self._key:
                    self._kept[entry["group"], entry["type"]] = Row(**entry)
        self._logits: IO[bytes] | None = None

    def add(self, group: str, type: str, make: Callable[[Path], None]) -> None:
        """Makes a file, judges it, and says what came of it; or says again what was kept."""
        row = self._kept.get((group, type))
        if row is None:
            row = self._measure(group, type, make)
            self._keep(row)
        self.rows.append(row)
        print(line(row), flush=True)

    def _measure(self, group: str, type: str, make: Callable[[Path], None]) -> Row:
        run_options = RunOptions(self.options.threads)
        if self._logits is None:
            self._logits = open(self.folder / "logits", "w+b")  # noqa: SIM115 - goes with the folder
            more_room = "set TMPDIR to another folder"
            score = write_logits(self.options.model, self.text, self._logits, run_options, more_room)
            self._keep(Row("source", "", self.options.model.stat().st_size, bits_per_weight(self.options.model), 0.0,
                           0.0, 1.0, score.perplexity.value))  # fmt: skip
        out = self.folder / "made.gguf"
        out.unlink(missing_ok=True)
        make(out)
        divergence = score_against(out, self.text, self._logits, type, run_options)
        kl = divergence.mean_kl
        return Row(group, type, out.stat().st_size, bits_per_weight(out), kl.value, kl.error,
                   divergence.agreement.value, divergence.model.perplexity.value)  # fmt: skip

    def _keep(self, row: Row) -> None:
        self._kept[row.group, row.type] = row
        if self.options.rows:
            with open(self.options.rows, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row) | {"of": self._key}) + "\n")

    @property
    def summary(self) -> str:
        """Of the source, and what all is judged by."""
        source = self._kept.get(("source", ""))
        score = f"perplexity {source.perplexity:.2f} " if source else ""
        return f"{self.options.model.name}: {score}on {len(self.text) * self.text.scored} tokens"

    def close(self) -> None:
        """Let the source's logits go."""
        if self._logits is not None:
            self._logits.close()


HEAD = "| | type | MB | bits/weight | KL divergence | same top token | perplexity |\n|---|---|--:|--:|--:|--:|--:|"


def line(row: Row) -> str:
    """Of the table."""
    return (
        f"| {row.group} | {row.type.upper()} | {row.n_bytes / 1e6:.1f} | {row.bits_per_weight:.3f} | "
        f"{row.kl:.5f} ± {row.kl_error:.5f} | {100 * row.top:.1f} % | {row.perplexity:.2f} |"
    )


def measure(options: argparse.Namespace, folder: Path) -> Bench:
    """All of it, in the order of the types."""
    bench = Bench(options, folder)
    print(HEAD, flush=True)

    @cache
    def imatrix() -> Path:
        found = folder / "imatrix.gguf"
        qrun("imatrix", options.model, options.calibrate, "-o", found, "--chunks", options.samples, "--ctx",
             options.ctx, "-t", options.threads)  # fmt: skip
        return found

    @cache
    def theirs() -> Path:
        found = folder / "theirs.gguf"
        run(options.peer / "llama-imatrix", "-m", options.model, "-f", options.calibrate, "-o", found, "--no-ppl",
            "-c", options.ctx, "--chunks", options.samples, "-t", options.threads)  # fmt: skip
        return found

    def plainly(type: str, weighed: bool, out: Path) -> None:
        importance = ("--imatrix", imatrix()) if weighed else ()
        convert(options, "--type", type, *importance, *requantize, out)

    requantize = ("--allow-requantize",) if options.allow_requantize else ()
    common = ("--calibrate", options.calibrate, "--samples", options.samples, "--length", options.ctx, "--measures",
              options.work, "--no-judge", *requantize)  # fmt: skip
    for type in options.types:
        before = len(bench.rows)
        if options.peer:
            if (options.peer / "llama-imatrix").is_file():
                bench.add("llama-quantize, llama-imatrix", type, partial(quantise, options, type, theirs))
            bench.add("llama-quantize, qrun imatrix", type, partial(quantise, options, type, imatrix))
        for method in options.methods:
            if method in ("plain", "imatrix"):
                make = partial(plainly, type, method == "imatrix")
            else:
                make = partial(convert, options, "--type", type, *common, "--method", method)
            bench.add(f"qrun, {METHODS[method]}", type, make)
        if options.mixes is not None and (type in options.mixes or not options.mixes):
            size = min(row.n_bytes for row in bench.rows[before:])
            words = ["--size", size, *common, *(["--candidates", options.candidates] if options.candidates else [])]
            for method in (method for method in options.methods if method != "plain"):
                make = partial(convert, options, *words, "--method", method)
                bench.add(f"qrun, mix, {METHODS[method]}", f"size of {type}", make)
    return bench


def convert(options: argparse.Namespace, *words: object) -> None:
    """The last word is the file to make."""
    *settings, out = words
    qrun("convert", options.model, out, *settings, "-t", options.threads)


def quantise(options: argparse.Namespace, type: str, imatrix: Callable[[], Path], out: Path) -> None:
    """By llama-quantize."""
    run(options.peer / "llama-quantize", "--imatrix", imatrix(), options.model, out, type.upper(), options.threads)


def draw(bench: Bench, path: str) -> None:
    """Bits a weight against KL, a line for each maker."""
    from qrun.cli.plot import new_figure, save

    figure, (axes,) = new_figure(7.2, 4.6)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    for group in dict.fromkeys(row.group for row in bench.rows):
        rows = sorted((row for row in bench.rows if row.group == group), key=lambda row: row.bits_per_weight)
        axes.errorbar(
            [row.bits_per_weight for row in rows], [row.kl for row in rows], [row.kl_error for row in rows],
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
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["plain", "imatrix", "gptq"])
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--mixes", nargs="*", metavar="TYPE")
    parser.add_argument("--candidates")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where what is measured for mixes is kept")
    parser.add_argument("--rows", type=Path, help="where rows of the table are kept")
    parser.add_argument("--allow-requantize", action="store_true")
    parser.add_argument("--plot")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qrun-calibrate-") as name:
        options.work = options.work or Path(name) / "measures"
        bench = measure(options, Path(name))
        print(f"\n{bench.summary}")
        bench.close()
    if options.plot:
        draw(bench, options.plot)


if __name__ == "__main__":
    main()
