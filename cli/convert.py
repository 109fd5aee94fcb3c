"""`qrun convert`: a model file to another type."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qrun.cli.console import notice
from qrun.cli.conversion import default_out, metadata_value, show_plan, show_result, tensor_type, write
from qrun.cli.convert_calibrated import Wishes, calibration_options, convert_calibrated
from qrun.cli.options import FilePath, LoraFile, ModelName, Size, threads_option

if TYPE_CHECKING:
    from qrun.engine.quantize.source import Source
    from qrun.formats import TensorType
    from qrun.models.adapter import Lora


@click.command()
@click.argument("source", type=ModelName())
@click.argument("out", type=FilePath(path_type=Path), required=False)
@click.option("--type", "type_name", metavar="TYPE",
              help="F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q5_K_S, Q5_1, Q5_0, Q4_K_M, Q4_K_S, Q4_1, Q4_0, IQ4_NL, "
                   "IQ4_XS, MXFP4 (of experts), NVFP4, Q3_K_L, Q3_K_M, Q3_K_S, IQ3_M, IQ3_S, IQ3_XS, Q2_K, Q2_0, "
                   "Q1_0, or COPY; for weights of -1, 0 and 1 TQ2_0 or TQ1_0; with an importance matrix IQ3_XXS, "
                   "Q2_K_S, IQ2_M, IQ2_S, IQ2_XS, IQ2_XXS, IQ1_M or IQ1_S; of an adapter F16 (the default), BF16 or "
                   "F32.")  # fmt: skip
@click.option("--pure", is_flag=True, help="One type for all: no tensor gets more bits than others.")
@click.option("--tensor-type", "overrides", multiple=True, metavar="PATTERN=TYPE",
              help="The type of all tensors in whose name the pattern (a regular expression) is found.")  # fmt: skip
@click.option("--output-type", metavar="TYPE", help="The type of the output tensor.")
@click.option("--embedding-type", metavar="TYPE", help="The type of the token embedding.")
@click.option("--imatrix", type=FilePath(path_type=Path), metavar="FILE",
              help="Importance of the inputs, from a calibration run (GGUF or .dat).")  # fmt: skip
@calibration_options
@click.option("--allow-requantize", is_flag=True, help="Also take tensors that are quantised already, at a loss.")
@click.option("--merge-lora", "merged", type=LoraFile(), multiple=True,
              help="Merge a LoRA adapter into the weights before they are quantised; SCALE says how strongly (1: as it "
                   "was trained). May be given several times.")  # fmt: skip
@click.option("--lora", is_flag=True,
              help="SOURCE is a LoRA adapter, a folder as PEFT saves it: make a GGUF file of it.")  # fmt: skip
@click.option("--base", type=ModelName(), metavar="MODEL",
              help="With --lora, the model that the adapter was trained for: a GGUF file, or a folder with its "
                   "config.json.", show_default="the folder that the adapter names")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show types and sizes; write nothing.")
@click.option("--split-max-size", type=Size(), help="Split the result into files with no more tensor data than this.")
@click.option("--override", "metadata", multiple=True, metavar="KEY=TYPE:VALUE",
              help="Set a metadata value; TYPE is int, float, bool or str.")  # fmt: skip
@threads_option()
def command(
    source: str, out: Path | None, type_name: str | None, pure: bool, overrides: tuple[str, ...],
    output_type: str | None, embedding_type: str | None, imatrix: Path | None, calibration: Wishes,
    allow_requantize: bool,
    merged: tuple[Lora, ...], lora: bool, base: str | None, dry_run: bool, split_max_size: int | None,
    metadata: tuple[str, ...], threads: int | None,
) -> None:  # fmt: skip
    """Convert a model to a GGUF file of another type: smaller and faster, and a little less exact.

    SOURCE is a GGUF file (of a split model the first), a folder with a checkpoint of Hugging Face (config.json and
    safetensors; PyTorch is not needed), a name from the catalog or the store, or hf:ORG/REPO, from where a GGUF file is
    fetched. OUT is by default named after it and the type, and lies where it does. Without --type a checkpoint in NVFP4
    or MXFP4 is taken over as it is, to the bit; with it, such weights are decoded first. At the end stands what was
    lost: the relative root mean square error of each tensor type, and with an importance matrix also that error with
    every weight counted by its importance, which is what is made as small as can be.

    With --calibrate the importance of inputs is found first, from texts like those that the model will meet; some of
    them are held out, and at the end stands what is lost on those. --bpw, --size and --fit choose the type of each
    tensor: how much its errors matter is measured, and the types are those that lose least in so many bytes. What was
    found lies in a folder beside OUT meanwhile, and a run that was broken off goes on from there.

    \b
    Examples:
      qrun convert model-f16.gguf --type q4_k_m
      qrun convert Qwen2.5-0.5B-Instruct --type q4_k_m
      qrun convert gpt-oss-20b
      qrun convert model-f16.gguf small.gguf --type iq2_m --imatrix imatrix.gguf
      qrun convert model-f16.gguf --type q4_k_m --calibrate texts.txt --calibrate chats.jsonl
      qrun convert model-f16.gguf --bpw 4.25 --calibrate texts.txt
      qrun convert model-f16.gguf --size 4.5GB --calibrate texts.txt --dry-run
      qrun convert model-f16.gguf --fit 8192 --calibrate texts.txt
      qrun convert model-f16.gguf --type q4_k_m --dry-run
      qrun convert model-f16.gguf --type q5_k_m --tensor-type "ffn_down=q6_k" --output-type q8_0
      qrun convert model-q8_0.gguf --type q4_k_m --allow-requantize
      qrun convert model.gguf --type copy --split-max-size 2G
      qrun convert model-f16.gguf --type q4_k_m --merge-lora adapter.gguf --merge-lora peft-folder=0.5
      qrun convert --lora peft-folder adapter.gguf --base model.gguf
    """
    from qrun.cli.convert_adapter import convert_adapter, merged_into
    from qrun.engine.quantize.convert import plan
    from qrun.engine.quantize.imatrix import read_imatrix
    from qrun.engine.quantize.mixes import COPY, Choice, file_type_name
    from qrun.engine.quantize.source import CheckpointSource, open_source
    from qrun.models.adapter import is_peft

    if lora or is_peft(Path(source)):
        for given, name in ((merged, "--merge-lora"), (imatrix, "--imatrix"), (overrides, "--tensor-type"),
                            (calibration.texts, "--calibrate"),
                            (output_type, "--output-type"), (embedding_type, "--embedding-type")):  # fmt: skip
            if given:
                raise click.UsageError(f"{name} is for models, and SOURCE is an adapter.")
        convert_adapter(Path(source), out, type_name or "F16", base, dry_run, threads, metadata)
        return
    if base:
        raise click.UsageError("--base needs --lora.")
    calibration.check(type_name, imatrix, split_max_size, (pure, overrides, output_type, embedding_type))
    choice = Choice(
        file_type_name(type_name or COPY), pure, tensor_type(output_type), tensor_type(embedding_type),
        [override(text) for text in overrides],
    )  # fmt: skip
    path = locate(source)
    keep = type_name is None and path.is_dir() and not calibration.texts
    if type_name is None and not keep and not calibration.sized:
        raise click.UsageError("Missing option '--type'.")
    importance = read_imatrix(imatrix) if imatrix else None
    with closing(open_source(path, keep=keep)) as original, merged_into(original, merged) as opened:
        if keep and not (isinstance(original, CheckpointSource) and original.keeps):
            raise click.UsageError("Missing option '--type'.")
        if keep and (merged or overrides or output_type or embedding_type or pure):
            raise click.UsageError("Weights that are kept as they are cannot be changed: give '--type' too.")
        for text in original.notices:
            notice(text)
        values = [metadata_value(text, opened) for text in metadata]
        beside = path if Path(source).exists() else Path(path.name)  # not in the store
        if calibration.texts:
            convert_calibrated(
                opened, path, out or beside, calibration, choice, values, allow_requantize=allow_requantize,
                dry_run=dry_run, threads=threads, named=out is not None, merged=merged,
            )  # fmt: skip
            return
        planned = plan(
            opened, choice, imatrix=importance, allow_requantize=allow_requantize, split_max_bytes=split_max_size
        )
        if dry_run:
            show_plan(planned)
        else:
            out = out or default_out(beside, kept_name(original) if keep else choice.file_type)
            show_result(planned, write(planned, out, threads, values))


def kept_name(source: Source) -> str:
    """The type that most of a checkpoint's weights are kept in."""
    from qrun.engine.quantize.source import KEPT_TYPES

    return next(type.name for type in KEPT_TYPES if any(tensor.type == type for tensor in source.tensors.values()))


def override(text: str) -> tuple[re.Pattern[str], TensorType]:
    """PATTERN=TYPE; the pattern may have a "=" of its own."""
    pattern, _, name = text.rpartition("=")
    if not pattern:
        raise ValueError(f"--tensor-type {text!r}: it is to be PATTERN=TYPE")
    type = tensor_type(name)
    assert type is not None
    try:
        return re.compile(pattern), type
    except re.error as error:
        raise ValueError(f"--tensor-type {text!r}: {error}") from None


def locate(source: str) -> Path:
    """The file or folder that SOURCE names. What lies elsewhere is fetched into the store, with a bar."""
    from qrun.cli.loading import pull_with_progress
    from qrun.engine.finding import is_checkpoint
    from qrun.models.catalog import resolve

    if source.startswith(("hf:", "https://", "http://")):
        return pull_with_progress(source, f"fetching {source}")
    return Path(source) if is_checkpoint(source) else resolve(source)
