"""What Sentence Transformers writes beside a checkpoint: how its rows become one vector, and what that goes through."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qrun.formats import FormatError
from qrun.formats.gguf.cursor import quote
from qrun.formats.json_file import read_json, read_list
from qrun.models.huggingface.entries import Facts
from qrun.models.support import PoolingType

MODULES = "modules.json"
# Keys of a pooling's config.json, of which one is true; and the values of the one that newer files have.
_MODES = {
    "pooling_mode_mean_tokens": PoolingType.MEAN, "pooling_mode_cls_token": PoolingType.CLS,
    "pooling_mode_lasttoken": PoolingType.LAST,
}  # fmt: skip
_NAMES = {"mean": PoolingType.MEAN, "cls": PoolingType.CLS, "lasttoken": PoolingType.LAST}
_OTHER_MODES = ("pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens")
MAX_BYTES = 1 << 20


def pooling_entries(facts: Facts, folder: Path) -> None:
    """The key `pooling_type`. Raises FormatError for a pooling that GGUF has no number for."""
    for module in modules(folder, "Pooling"):
        path = module / "config.json"
        values = read_json(path)
        found = [number for key, number in _MODES.items() if values.get(key) is True]
        if isinstance(values.get("pooling_mode"), str) and values["pooling_mode"] in _NAMES:
            found = [_NAMES[values["pooling_mode"]]]
        if len(found) != 1 or any(values.get(key) is True for key in _OTHER_MODES):
            raise FormatError(path, "it asks for another pooling than one of mean, cls and last token")
        facts.count("pooling_type", found[0])


def dense_folders(folder: Path) -> list[Path]:
    """Where the layers lie that a vector goes through, in their order."""
    found = list(modules(folder, "Dense"))
    for path in found:
        activation = read_json(path / "config.json").get("activation_function", "torch.nn.modules.linear.Identity")
        if not str(activation).endswith("Identity"):
            problem = f"activation_function is {quote(str(activation))}, which is not supported"
            raise FormatError(path / "config.json", problem)
    return found


def modules(folder: Path, kind: str) -> Iterator[Path]:
    """The folders of the modules of a kind."""
    path = folder / MODULES
    if not path.is_file():
        return
    for module in read_list(path, "modules", MAX_BYTES):
        if isinstance(module, dict) and str(module.get("type", "")).rsplit(".", 1)[-1] == kind:
            name = module.get("path")
            if not isinstance(name, str) or not name.isprintable() or not name or not _is_inside(Path(name)):
                raise FormatError(path, "a module has no path within the folder")
            yield folder / name


def _is_inside(path: Path) -> bool:
    """Does it lead to a place within the folder that it counts from?"""
    return not path.is_absolute() and ".." not in path.parts
