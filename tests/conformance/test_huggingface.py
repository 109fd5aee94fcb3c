"""Checkpoints as Transformers saves them, of every architecture: converted, they give its logits and its token ids."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qrun.engine.program.runtime import Runtime
from qrun.engine.quantize.convert import convert, plan
from qrun.engine.quantize.mixes import Choice
from qrun.engine.quantize.source import CheckpointSource
from qrun.engine.text.tokenizer import Tokenizer
from qrun.formats import GGUFReader
from qrun.models import ARCHITECTURES, build_graph

DATA = Path(__file__).parent.parent / "data"
FOLDERS = sorted(path for path in (DATA / "huggingface").iterdir() if path.is_dir())
CONTEXT = 64

by_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def converted(folder: Path, out: Path) -> Path:
    source = CheckpointSource(folder)
    convert(plan(source, Choice("F32")), out, threads=1)
    source.close()
    return out


def logits(path: Path, tokens: np.ndarray, context: int) -> np.ndarray:
    with GGUFReader(path) as reader:
        runtime = Runtime(build_graph(reader, context), threads=2, context=context)
        result = runtime.evaluate(runtime.sequence(), tokens, "all")
        runtime.close()
    assert result is not None
    return result


def error(result: np.ndarray, expected: np.ndarray) -> float:
    """The mean squared error as a part of the mean square."""
    return float(np.mean((result - expected) ** 2) / np.mean(expected**2))


def test_all_are_of_known_architectures() -> None:
    names = set()
    for folder in FOLDERS:
        source = CheckpointSource(folder)
        names.add(source.metadata["general.architecture"])
        source.close()
    assert names <= set(ARCHITECTURES)


@by_folder
def test_logits_and_token_ids_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    path = converted(folder, tmp_path / "model.gguf")
    reference = np.load(folder / "reference.npz")
    assert error(logits(path, reference["tokens"], CONTEXT), reference["logits"]) <= 1e-6
    if "short_logits" in reference:  # in a context for which the other set of rope factors holds
        short = reference["short_logits"]
        assert error(logits(path, reference["tokens"][: len(short)], 16), short) <= 1e-6
    with GGUFReader(path) as reader:
        tokenizer = Tokenizer.load(reader)
        for expected in json.loads((folder / "texts.json").read_text()):
            assert tokenizer.encode(expected["text"], parse_special=True) == expected["ids"], expected["text"]


WINDOWS = np.load(DATA / "huggingface_windows.npz")


@pytest.mark.parametrize("case", [name for name in WINDOWS.files if not name.endswith(": changes")])
def test_windows_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    source = DATA / "huggingface" / case.split()[0]
    folder = shutil.copytree(source, tmp_path / source.name)
    config = json.loads((folder / "config.json").read_text()) | json.loads(str(WINDOWS[f"{case}: changes"]))
    (folder / "config.json").write_text(json.dumps(config))
    reference = np.load(source / "reference.npz")
    found = logits(converted(folder, tmp_path / "model.gguf"), reference["tokens"], CONTEXT)
    assert error(found, WINDOWS[case]) <= 1e-6
    beyond = config["sliding_window"]
    assert error(WINDOWS[case][beyond:], reference["logits"][beyond:]) > 1e-3  # the window matters


@pytest.mark.slow  # imports torch, and makes and runs all models anew
def test_the_same_of_fresh_random_weights(rng: np.random.Generator, tmp_path: Path) -> None:
    for package in ("torch", "transformers", "sentencepiece"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    seed = str(rng.integers(1 << 31))
    subprocess.run([sys.executable, DATA / "make_huggingface.py", tmp_path, seed], check=True, capture_output=True)
    for folder in sorted(tmp_path.iterdir()):
        reference = np.load(folder / "reference.npz")
        path = converted(folder, tmp_path / f"{folder.name}.gguf")
        assert error(logits(path, reference["tokens"], CONTEXT), reference["logits"]) <= 1e-6, folder.name
