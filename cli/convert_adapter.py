"""The parts of `qrun convert` that deal with LoRA adapters: one as a file of its own, or some merged into a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from errno import ENOTDIR
from pathlib import Path
from typing import TYPE_CHECKING

from qrun.cli.console import notice
from qrun.cli.conversion import default_out, metadata_value, show_plan, show_result, write

if TYPE_CHECKING:
    from qrun.engine.quantize.source import Source
    from qrun.models.adapter import Lora
    from qrun.models.huggingface.peft import Base


@contextmanager
def merged_into(base: Source, loras: Sequence[Lora]) -> Iterator[Source]:
    """The source with the adapters merged into it, if there are any."""
    from qrun.engine.quantize.merge import MergedSource, open_sources

    with open_sources(loras, base, notice) as adapters:
        yield MergedSource(base, adapters) if adapters else base


def convert_adapter(
    folder: Path, out: Path | None, type_name: str, base: str | None, dry_run: bool, threads: int | None,
    metadata: Sequence[str],
) -> None:  # fmt: skip
    """A GGUF file of a PEFT adapter."""
    from qrun.engine.quantize.convert import plan
    from qrun.engine.quantize.mixes import COPY, Choice
    from qrun.models.huggingface.peft import PeftSource, adapter_type, find_base

    type = adapter_type(type_name)
    if folder.is_file():
        raise NotADirectoryError(ENOTDIR, "is no folder: --lora takes an adapter as PEFT saves it", str(folder))
    with closing(PeftSource(folder, base_of(base) if base else find_base(folder), type)) as source:
        for text in source.notices:
            notice(text)
        values = [metadata_value(text, source) for text in metadata]
        planned = plan(source, Choice(COPY))
        if dry_run:
            show_plan(planned)
        else:
            out = out or default_out(folder, f"lora-{type.name}")
            show_result(planned, write(planned, out, threads, values, type.name))


def base_of(model: str) -> Base:
    """What has to be known of the model that an adapter changes: a folder with config.json, or a GGUF file."""
    from qrun.formats import GGUFReader
    from qrun.models.catalog import resolve
    from qrun.models.huggingface.peft import Base

    if Path(model).is_dir():
        return Base.of_folder(Path(model))
    with GGUFReader(resolve(model)) as reader:
        return Base.of_file(reader)
