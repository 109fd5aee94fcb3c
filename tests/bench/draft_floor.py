"""What guesses cost where they gain nothing: the speed of texts with a draft, or with lookup, against that without.

    python tests/bench/draft_floor.py MODEL [--threads 1] [--gen 96] [--rounds 5] [--cpu]

The hard cases: a draft of noise (the model's own first layers with their weights mixed up), one as large as the model
(the model itself, which is always right and costs as much as it saves), one that is both, and lookup in texts that
quote nothing. Each text is new to the session, and written with and without guesses in turns; the ratio is the median
of all rounds. With --cpu, time is the processor's and not the clock's, for the measurement and for what guesses are
decided by: the figure for a machine with nothing else to do, taken on one that is busy.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from qrun.engine import Model
from qrun.formats import GGUFReader, GGUFWriter
from qrun.formats.blocks import BLOCK_FORMATS

TEXTS = (
    "The history of the lighthouse begins with",
    "Write a list of twenty animals and their colours:\n1.",
    "def fibonacci(n):\n",
    "Once upon a time there was a tailor who",
    "Dear Sir or Madam, I am writing to complain about",
)
NOISE_LAYERS = 4


def mixed_up(source: Path, target: Path, n_layers: int | None) -> None:
    """The model with blocks of its weights in another order, and only its first layers: it says nothing of any text."""
    rng = np.random.default_rng(1)
    with GGUFReader(source) as reader, GGUFWriter(target) as writer:
        architecture = reader.metadata["general.architecture"]
        total = int(reader.metadata[f"{architecture}.block_count"])
        kept = total if n_layers is None else min(n_layers, total)
        for key, value in (dict(reader.metadata) | {f"{architecture}.block_count": kept}).items():
            writer.set_metadata(key, value, *reader.metadata_types[key])
        tensors = [
            tensor for name, tensor in reader.tensors.items()
            if not name.startswith("blk.") or int(name.split(".")[1]) < kept
        ]  # fmt: skip
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.type, tensor.shape)
        for tensor in tensors:
            raw = tensor.raw
            if len(tensor.shape) > 1:
                raw = rng.permutation(raw.reshape(-1, BLOCK_FORMATS[tensor.type].block_bytes)).reshape(-1)
            writer.write_tensor(tensor.name, raw)


def seconds_of(model: Model, prompt: list[int], gen: int, *, draft: bool, lookup: bool) -> tuple[float, int, str]:
    """How long a text takes after its prompt, how many guesses were made for it, and the text."""
    ends = dict.fromkeys(model.tokenizer.stop_ids if model.tokenizer else (), float("-inf"))
    with closing(model.session()) as session:
        generation = session.generate(
            prompt, temperature=0, max_tokens=gen, logit_bias=ends, draft=draft, lookup=lookup
        )
        pieces = iter(generation)
        text = str(next(pieces))
        start = time.perf_counter()
        text += "".join(pieces)
        return time.perf_counter() - start, generation.stats.guessed_tokens, text


def ratios(model: Model, gen: int, rounds: int, *, draft: bool, lookup: bool) -> Iterator[tuple[float, int]]:
    """Speed with guesses as a part of that without, for each text and round, and how many there were."""
    assert model.tokenizer is not None
    for text in TEXTS:
        prompt = model.tokenizer.encode(text)
        for number in range(rounds):
            found = {}
            for guessing in (False, True) if number % 2 else (True, False):
                found[guessing] = seconds_of(model, prompt, gen, draft=guessing and draft, lookup=guessing and lookup)
            assert found[True][2] == found[False][2], "guesses changed the text"
            yield found[False][0] / found[True][0], found[True][1]


def main() -> None:
    """A line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gen", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--cases", nargs="+", help="some of the cases, by their names")
    args = parser.parse_args()
    if args.cpu:
        time.perf_counter = time.process_time
    with tempfile.TemporaryDirectory() as folder:
        noise, large = Path(folder) / "noise.gguf", Path(folder) / "large-noise.gguf"
        mixed_up(args.model, noise, NOISE_LAYERS)
        mixed_up(args.model, large, None)
        cases: dict[str, Path | None] = {"noise": noise, "itself": args.model, "large noise": large, "lookup": None}
        for name in args.cases or cases:
            draft = cases[name]
            with Model.load(args.model, threads=args.threads, context=1024, draft=draft) as model:
                found = list(ratios(model, args.gen, args.rounds, draft=draft is not None, lookup=draft is None))
            speeds, guesses = zip(*found, strict=True)
            low, middle = np.quantile(speeds, [0.1, 0.5])
            print(f"{name}: {middle:.3f} of the speed without (a tenth below {low:.3f}), "
                  f"{np.mean(guesses):.1f} guesses in {args.gen} tokens", flush=True)


if __name__ == "__main__":
    main()
