"""What converting a model and converting an adapter share: metadata, the name of the result, bars and tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrun.cli.console import echo

if TYPE_CHECKING:
    from qrun.engine.quantize.convert import Plan, Result
    from qrun.engine.quantize.source import Source
    from qrun.formats import TensorType, ValueType


def write(
    plan: Plan, out: Path, threads: int | None, values: Sequence[tuple[str, Any, ValueType]] = (),
    type_name: str | None = None,
) -> Result:  # fmt: skip
    """Converts, with a bar for the bytes."""
    from qrun.cli.console import CompileProgress, DownloadBar
    from qrun.engine.quantize.convert import convert

    with DownloadBar(f"converting {plan.source.path} to {type_name or plan.choice.file_type}") as bar:
        return convert(plan, out, threads=threads, metadata=values, progress=bar.update, compiling=CompileProgress())


def metadata_value(text: str, source: Source) -> tuple[str, Any, ValueType]:
    """KEY=TYPE:VALUE. An integer gets the type that the key has already, if that is one of integers."""
    from qrun.formats import ValueType

    key, equals, typed = text.partition("=")
    kind, colon, value = typed.partition(":")
    if not key or not equals or not colon:
        raise ValueError(f"--override {text!r}: it is to be KEY=TYPE:VALUE")
    try:
        if kind == "str":
            return key, value, ValueType.STRING
        if kind == "float":
            return key, float(value), ValueType.FLOAT32
        if kind == "bool":
            return key, {"true": True, "false": False}[value.lower()], ValueType.BOOL
        if kind == "int":
            number = int(value)
            type, _ = source.metadata_types.get(key, (None, None))
            whole = {t for t in ValueType if t.name.startswith(("INT", "UINT"))}
            return key, number, type if type in whole else ValueType.UINT32 if number >= 0 else ValueType.INT32
    except (KeyError, ValueError):
        raise ValueError(f"--override {text!r}: {value!r} is no {kind}") from None
    raise ValueError(f"--override {text!r}: {kind!r} is no type: it can be int, float, bool or str")


def tensor_type(name: str | None) -> TensorType | None:
    """A type of tensors by its name in any case. Raises ValueError if it cannot be written."""
    from qrun.engine.quantize.mixes import perhaps
    from qrun.formats import TensorType
    from qrun.formats.blocks import BLOCK_FORMATS

    if name is None:
        return None
    found = TensorType.__members__.get(name.upper())
    if found is None or found not in BLOCK_FORMATS or BLOCK_FORMATS[found].quantize is None:
        known = [type.name for type in sorted(BLOCK_FORMATS) if BLOCK_FORMATS[type].quantize]
        raise ValueError(f"{name!r} is no type of a tensor{perhaps(name, known)}: it can be {', '.join(known)}")
    return found


def default_out(source: Path, type_name: str) -> Path:
    """model-f16.gguf -> model-Q4_K_M.gguf, in the same folder; model -> model/model-Q4_K_M.gguf."""
    if source.is_dir():
        from qrun.models.huggingface.general import model_name

        return source / f"{model_name(source)}-{type_name}.gguf"
    stem = re.sub(r"-00001-of-\d{5}$", "", source.name.removesuffix(".gguf"))
    stem = re.sub(r"[-.](f32|f16|bf16|[it]?q\d\w*|mxfp4\w*|nvfp4)$", "", stem, flags=re.IGNORECASE)
    return source.with_name(f"{stem}-{type_name}.gguf")


def show_plan(plan: Plan) -> None:
    """The type and size of each tensor, then of all."""
    from qrun.cli.console import human_bytes

    width = max((len(tensor.source.name) for tensor in plan.tensors), default=0)
    for tensor in plan.tensors:
        shape = " x ".join(map(str, tensor.source.shape))
        change = f"{tensor.source.type.name} -> {tensor.type.name}" if tensor.changes else tensor.type.name
        size = human_bytes(tensor.n_bytes)
        echo(f"{tensor.source.name:{width}}  {shape:>20}  {change:16}  {size:>8}")
    echo(sizes(plan) + (f", in {len(plan.parts)} files" if len(plan.parts) > 1 else ""))


def sizes(plan: Plan) -> str:
    """Both sizes, and the bits of a weight."""
    from qrun.cli.console import human_bytes

    return (
        f"{human_bytes(plan.source_bytes)} ({plan.bits_per_weight(plan.source_bytes):.2f} bits per weight) -> "
        f"{human_bytes(plan.n_bytes)} ({plan.bits_per_weight(plan.n_bytes):.2f})"
    )


def show_result(plan: Plan, result: Result) -> None:
    """What was lost, and where it went."""
    from qrun.cli.console import human_bytes

    if result.losses:
        weighted = plan.imatrix is not None
        echo("type      tensors      size  relative RMSE" + ("  by importance" if weighted else ""))
        for type, loss in sorted(result.losses.items(), key=lambda item: -item[1].n_bytes):
            line = f"{type.name:8}  {loss.tensors:7}  {human_bytes(loss.n_bytes):>8}  {loss.relative_rmse:13.5f}"
            echo(line + (f"  {loss.weighted_rmse:13.5f}" if weighted else ""))
    echo(sizes(plan))
    for path in result.paths:
        echo(path)
