"""A Hugging Face folder, seen as a GGUF file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qrun.formats import FormatError, TensorType, ValueType
from qrun.formats.checkpoints import decode_tensors
from qrun.formats.json_file import read_json
from qrun.formats.safetensors import SafetensorsFolder
from qrun.formats.tensors import SourceTensor
from qrun.models.huggingface.architectures import ARCHITECTURES
from qrun.models.huggingface.config import DEFAULTS, SYNONYMS, Config
from qrun.models.huggingface.config_keys import check_keys
from qrun.models.huggingface.entries import Entries, Facts
from qrun.models.huggingface.general import general_entries, size_entry
from qrun.models.huggingface.hyperparameters import hyperparameter_entries
from qrun.models.huggingface.layout import Architecture
from qrun.models.huggingface.other_classes import class_problem
from qrun.models.huggingface.pooling import dense_folders, pooling_entries
from qrun.models.huggingface.quantization import FILES as QUANTIZATION_FILES
from qrun.models.huggingface.quantization import read_quantization
from qrun.models.huggingface.rope import rope_factors
from qrun.models.huggingface.tensors import (
    TIED_OUTSIDE,
    ConstantTensor,
    count_drafts,
    dimensions,
    keep_scaled,
    map_tensors,
    scale_tensors,
    whole_tensor,
)
from qrun.models.huggingface.tokenizer import tokenizer_entries

CONFIG_NAME = "config.json"
DENSE_NAMES = ("dense_2", "dense_3")
# Other files that belong to a checkpoint, and must not be written over.
OTHER_FILES = (
    CONFIG_NAME, "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json", *QUANTIZATION_FILES,
)  # fmt: skip
# Where the configuration of a language model lies within that of a larger one.
TEXT_CONFIGS = ("text_config", "llm_config", "lm_config", "language_config", "lfm", "thinker_config")
FILE_TYPES = {TensorType.F32: 0, TensorType.F16: 1, TensorType.BF16: 32}  # general.file_type
KEPT_FILE_TYPES = {TensorType.NVFP4: 39, TensorType.MXFP4: 38}
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION


class CheckpointSource:
    """A folder with config.json, model.safetensors (or an index and several files) and a tokenizer.

    It is a `Source` of the converter: metadata and tensors are those of a GGUF file, the tensors in the type that the
    checkpoint has, norms and biases as F32. keeps: whether any are of a packed type. notices: lines about what of the
    folder is not used, or contradicts itself.
    Raises FormatError, one line, for an architecture that is not known, and for a file, a tensor or a value that is
    missing or wrong.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: bool = False) -> None:
        """keep: weights of four-bit floats are tensors of NVFP4 and MXFP4, with the same numbers."""
        self.path = Path(folder)
        self.architecture, config = read_config(self.path)
        sizes = dimensions(config, self.architecture)
        entries = Entries()
        general_entries(entries, self.path, self.architecture.name)
        self._checkpoint = SafetensorsFolder(self.path)
        self._dense: list[SafetensorsFolder] = []
        try:
            sizes["drafts"] = count_drafts(self._checkpoint.tensors, self.architecture, sizes, config)
            hyperparameter_entries(entries, self.architecture, config, sizes)
            pooling_entries(Facts(entries, self.architecture.name, config, sizes), self.path)
            notices: list[str] = []
            weights = decode_tensors(self._checkpoint.tensors, *read_quantization(config), notices.append, keep=keep)
            if self.architecture.sizes_of_weights:
                sizes.update(self.architecture.sizes_of_weights(weights))
            tensors = map_tensors(weights, self.architecture, sizes, config, notices.append)
            # Only now is it certain that there are embeddings for as many tokens as config.json says.
            tokenizer_entries(entries, self.path, config, sizes["vocab"])
            if self.architecture.of_weights:
                self.architecture.of_weights(Facts(entries, self.architecture.name, config, sizes), weights)
            notices[:0] = check_keys(config, self.architecture)
            for name, values in rope_factors(config, sizes).items():
                tensors[name] = ConstantTensor.of(name, values, config)
            tensors |= scale_tensors(tensors, config)
            if keep and self.architecture.eight_bits_kept:
                keep_scaled(tensors)
            if self.architecture.embeds:
                tensors |= self._dense_tensors(entries, sizes)
        except BaseException:
            self._close_files()
            raise
        size_entry(entries, tensors.values(), sizes["experts"])
        types = {tensor.type for tensor in tensors.values()}
        kept = next((number for type, number in KEPT_FILE_TYPES.items() if type in types), None)
        entries.count("general.file_type", kept or FILE_TYPES.get(tensors["token_embd.weight"].type, 1))
        if kept:
            entries.count("general.quantization_version", QUANTIZATION_VERSION)
        self.keeps = kept is not None
        self.tensors: Mapping[str, SourceTensor] = tensors
        self.metadata: Mapping[str, Any] = entries.values
        self.metadata_types: Mapping[str, tuple[ValueType, ValueType | None]] = entries.types
        self.writer = entries.writer
        self.notices: Sequence[str] = notices

    @property
    def files(self) -> Sequence[Path]:
        others = [self.path / name for name in OTHER_FILES]
        dense = [file for folder in self._dense for file in folder.files]
        return [*self._checkpoint.files, *dense, *(path for path in others if path.is_file())]

    def close(self) -> None:
        """Unmap the files. The tensors cannot be read any more."""
        self.tensors = {}
        self._close_files()

    def _close_files(self) -> None:
        for files in (self._checkpoint, *self._dense):
            files.close()

    def _dense_tensors(self, entries: Entries, sizes: Mapping[str, int]) -> dict[str, SourceTensor]:
        """The layers that a vector goes through, which lie in folders of their own."""
        found: dict[str, SourceTensor] = {}
        width, folders = sizes["embd"], dense_folders(self.path)
        if len(folders) > len(DENSE_NAMES):
            raise FormatError(self.path, f"vectors go through {len(folders)} layers: {len(DENSE_NAMES)} are supported")
        for folder, name in zip(folders, DENSE_NAMES, strict=False):
            self._dense.append(SafetensorsFolder(folder))
            weights = decode_tensors(self._dense[-1].tensors, None, folder)
            weight = weights.get("linear.weight")
            if weight is None or len(weight.shape) != 2 or weight.shape[1] != width:
                raise FormatError(folder, f"there is no matrix linear.weight with {width} columns")
            width = weight.shape[0]
            found[f"{name}.weight"] = whole_tensor(f"{name}.weight", weight)
            if "linear.bias" in weights:
                found[f"{name}.bias"] = whole_tensor(f"{name}.bias", weights["linear.bias"])
            entries.count(f"{self.architecture.name}.{name}_feat_in", weight.shape[1])
            entries.count(f"{self.architecture.name}.{name}_feat_out", width)
        return found


def read_config(folder: Path) -> tuple[Architecture, Config]:
    """The class that config.json names, and its values: of the language model, if there are others beside it."""
    path = folder / CONFIG_NAME
    values = read_json(path)
    classes = values.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else None
    if not isinstance(name, str):
        raise FormatError(path, '"architectures" is missing: this is not the configuration of a model')
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise FormatError(path, class_problem(name, ARCHITECTURES))
    for key in TEXT_CONFIGS:
        inner = values.get(key)
        if key == "thinker_config" and isinstance(inner, dict):
            inner = inner.get("text_config")
        if isinstance(inner, dict):
            values = {**values, **inner, TIED_OUTSIDE: values.get("tie_word_embeddings")}
    if architecture.settings:
        values = {**architecture.settings(values)}
    for usual, others in SYNONYMS.items():
        if values.get(usual) is None and (other := next((o for o in others if values.get(o) is not None), None)):
            values[usual] = values[other]
    if architecture.variant:
        architecture = architecture.variant(Config(path, values)) or architecture
    return architecture, Config(path, values, {**DEFAULTS, **architecture.defaults})
