"""The file of a model that is named as `Model.load` takes it."""

import os
from collections.abc import Callable
from pathlib import Path


def find_model(
    source: str | os.PathLike[str],
    type: str | None = None,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    compiling: Callable[[int, int], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> Path:
    """The GGUF file of a model that is named as `Model.load` takes it; a folder is converted if it was not before.

    progress, compiling: see `Model.load`, where they are called `converting` and `progress`. notice: see there.
    """
    from qrun.models.catalog import resolve

    if is_checkpoint(source):
        from qrun.engine.quantize.on_load import converted

        return converted(Path(source), type, threads=threads, progress=progress, compiling=compiling, notice=notice)
    if type is not None:
        raise ValueError(f"{os.fspath(source)}: a type is for folders with a checkpoint (for others: qrun convert)")
    return resolve(source)


def is_checkpoint(source: str | os.PathLike[str]) -> bool:
    """Is this a folder as Hugging Face has them?"""
    return Path(source, "config.json").is_file()
