"""Small random models of the architectures, each with tokens and the reference engine's logits beside it (.npz).

Some are in this repository. More are compared where QRUN_TEST_ARCHITECTURES names a folder of them.

    python -m tests.toys    prints how far the engine is from the reference, model by model
"""

import os
from pathlib import Path

import numpy as np

from qrun.formats import GGUFReader
from qrun.models import ARCHITECTURES

OWN = Path(__file__).parent / "data" / "arch"
MORE = os.environ.get("QRUN_TEST_ARCHITECTURES")

OWN_FILES = sorted(OWN.glob("*.gguf"))


def architecture(path: Path) -> str:
    """What the file says that it is."""
    with GGUFReader(path) as reader:
        return str(reader.metadata["general.architecture"])


def more_files() -> list[Path]:
    """Those of supported architectures that this repository does not have."""
    own = {path.name for path in OWN_FILES}
    found = sorted(Path(MORE).glob("*.gguf")) if MORE else []
    more = [path for path in found if path.name not in own]
    return [path for path in more if architecture(path) in ARCHITECTURES]


def tokens_and_logits(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """What was asked, and the logits after each token."""
    with np.load(path.with_suffix(".npz")) as arrays:
        return arrays["tokens"], arrays["logits"]


def context_for(tokens: np.ndarray) -> int:
    """The context with which a model is asked them."""
    return max(64, len(tokens))


def source_of(path: Path) -> tuple[int, ...]:
    """What the text answers, of a model with an encoder."""
    with np.load(path.with_suffix(".npz")) as arrays:
        return tuple(arrays["source"].tolist()) if "source" in arrays else ()


def error(result: np.ndarray, expected: np.ndarray) -> float:
    """The mean squared error as a part of the mean square."""
    return float(np.mean((result - expected) ** 2) / np.mean(expected**2))


def main() -> None:
    """A line for each model: its name, its architecture, and the error of the engine."""
    from qrun.engine.program.runtime import Runtime
    from qrun.models import build_graph

    for path in OWN_FILES + more_files():
        tokens, expected = tokens_and_logits(path)
        context = context_for(tokens)
        with GGUFReader(path) as reader:
            runtime = Runtime(build_graph(reader, context), threads=1, context=context)
            sequence = runtime.sequence()
            sequence.answer(source_of(path))
            result = runtime.evaluate(sequence, tokens, "all")
            runtime.close()
        assert result is not None
        print(f"{path.stem:28} {architecture(path):16} {error(result, expected):.1e}")


if __name__ == "__main__":
    main()
