"""What a GGUF file says of the model in general: its name, its size, and how its makers would sample from it."""

import re
from collections.abc import Iterable
from pathlib import Path

from qrun.formats import FormatError
from qrun.formats.json_file import read_json
from qrun.formats.mapping import read_file
from qrun.formats.tensors import SourceTensor
from qrun.models.huggingface.entries import Entries

MAX_CARD_BYTES = 1 << 20

# Key of generation_config.json -> key under general.sampling.
_REALS = {
    "temperature": "temp", "top_p": "top_p", "min_p": "min_p", "repetition_penalty": "penalty_repeat"
}  # fmt: skip
_UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))


def general_entries(entries: Entries, folder: Path, architecture: str) -> None:
    """The keys under `general.`, but for those that depend on the tensors."""
    entries.text("general.architecture", architecture)
    entries.text("general.type", "model")
    sampling_entries(entries, folder)
    entries.text("general.name", model_name(folder))
    if licence := _licence(folder / "README.md"):
        entries.text("general.license", licence)


def model_name(folder: Path) -> str:
    """The last part of the model's name on Hugging Face, as far as the folder tells."""
    folder = folder.resolve()
    # Hugging Face's own cache: models--ORG--NAME/snapshots/COMMIT
    if folder.parent.name == "snapshots" and (match := re.match(r"models--.+?--(.+)", folder.parent.parent.name)):
        return match[1]
    return folder.name or "model"


def sampling_entries(entries: Entries, folder: Path) -> None:
    """The defaults of generation_config.json, if there is one. They are hints: what is no number is left out."""
    try:
        given = read_json(folder / "generation_config.json")
    except FormatError:
        return
    top_k = given.get("top_k")
    if type(top_k) is int and 0 <= top_k < 1 << 31:
        entries.integer("general.sampling.top_k", top_k)
    for key, name in _REALS.items():
        value = given.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30:
            entries.real(f"general.sampling.{name}", float(value))


def size_entry(entries: Entries, tensors: Iterable[SourceTensor], n_experts: int) -> None:
    """The number of weights in two digits: 1.2B. With experts, how many, and the weights of a model of one: 8x7B."""
    total = 0
    for tensor in tensors:
        shared = n_experts if len(tensor.shape) == 3 and n_experts else 1
        total += tensor.n_rows * tensor.row // shared
    unit, letter = next(((unit, letter) for unit, letter in _UNITS if total > unit), _UNITS[-1])
    scaled = total / unit
    digits = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    times = f"{n_experts}x" if n_experts else ""
    entries.text("general.size_label", f"{times}{scaled:.{digits}f}{letter}")


def _licence(card: Path) -> str | None:
    """The licence that the head of a model card names."""
    try:
        head = read_file(card, MAX_CARD_BYTES).decode("utf-8", "replace")
    except FormatError:
        return None
    front = re.match(r"---\s*\n(.*?)\n---\s*\n", head, re.DOTALL)
    match = re.search(r"^license:[ \t]*([\w.-]+)[ \t]*$", front[1], re.MULTILINE) if front else None
    return match[1] if match else None
