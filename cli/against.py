"""How far a model's predictions are from those of another, whose logits are kept in a file meanwhile."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from qrun.cli.loading import RunOptions
    from qrun.engine.judging.divergence import Divergence
    from qrun.engine.judging.scoring import Chunks, Score


def check_room(folder: Path, text: Chunks, n_vocab: int, more_room: str) -> None:
    """Raises OSError if the logits of a text do not fit into a folder. more_room: what to do then."""
    from qrun.cli.console import human_bytes

    needed, free = len(text) * text.scored * n_vocab * 4, shutil.disk_usage(folder).free
    if free < needed:
        sizes = f"{human_bytes(needed)} of logits, and {human_bytes(free)} are free"
        raise OSError(f"{folder}: {len(text)} chunks take {sizes} ({more_room})")


def write_logits(path: Path, text: Chunks, out: IO[bytes], options: RunOptions, more_room: str) -> Score:
    """Keeps the logits by which a text is scored, one float32 [n_vocab] after the other: a model is run once, however
    many are measured against it. Returns how well it predicts the text. more_room: what to do where there is none."""
    from qrun.cli.console import step_bar
    from qrun.cli.loading import open_runtime
    from qrun.cli.perplexity import so_far
    from qrun.engine.judging.scoring import Score, scored_logits

    score = Score()
    with ExitStack() as stack:
        runtime = stack.enter_context(open_runtime(path, options, text.size))
        check_room(Path(out.name).parent, text, runtime.n_vocab, more_room)
        progress = stack.enter_context(step_bar("source"))
        progress(0, len(text))
        for done, chunk in enumerate(text, 1):
            for logits, targets in scored_logits(runtime, chunk, text.bos):
                score.add(logits, targets)
                out.write(logits.data)
            progress(done, len(text), so_far(score))
    return score


def score_against(path: Path, text: Chunks, expected: IO[bytes], name: str, options: RunOptions) -> Divergence:
    """How far a model is from the one whose logits were kept, on the same text."""
    import numpy as np

    from qrun.cli.console import step_bar
    from qrun.cli.loading import open_runtime
    from qrun.engine.judging.divergence import Divergence
    from qrun.engine.judging.scoring import scored_logits

    divergence = Divergence()
    expected.seek(0)
    with open_runtime(path, options, text.size) as runtime, step_bar(name) as progress:
        progress(0, len(text))
        for done, chunk in enumerate(text, 1):
            for logits, targets in scored_logits(runtime, chunk, text.bos):
                reference = np.frombuffer(expected.read(logits.nbytes), np.float32).reshape(logits.shape)
                divergence.add(reference, logits, targets)
            progress(done, len(text), f"KL {divergence.mean_kl.value:.4g} so far")
    return divergence
