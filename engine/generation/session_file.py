"""Saved sessions: an npz archive, uncompressed, of which everything is checked and nothing unpickled.

    magic        uint8   the bytes of _MAGIC
    fingerprint  uint8   which model it belongs to: see `model_fingerprint`
    cache_type   uint8   "f16", "q8_0", ...
    adapters     uint8   JSON of names of adapters and their scales; absent where there were none
    tokens       int32   the tokens that the cache was computed from
    kv_<name>            the arrays of KVSequence.state()
"""

import hashlib
import json
import math
import os
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from qrun.formats import FormatError
from qrun.formats.samples import samples
from qrun.formats.whole_file import whole_file

_FORMAT = "qrun session "
_MAGIC = _FORMAT + "3"
_STATE_PREFIX = "kv_"


@dataclass(frozen=True)
class SavedSession:
    """What a file of a saved session holds."""

    fingerprint: str
    cache_type: str
    tokens: list[int]
    state: Mapping[str, Any]
    """Of an array that is to be written, its rows may be given as a list: then they need not be put together."""
    adapters: Mapping[str, float] = field(default_factory=dict)
    """Names of adapters that changed the model, and their scales."""


def model_fingerprint(files: Sequence[Path], description: str) -> str:
    """A digest that tells models apart: a description of what they are, the sizes of the files, samples of their bytes.

    The same for the same file in another place. Raises OSError if a file cannot be read any more.
    """
    digest = hashlib.sha256(description.encode())
    for path in files:
        for sample in samples(path):
            digest.update(sample)
    return digest.hexdigest()


def write(path: str | os.PathLike[str], saved: SavedSession) -> None:
    """Write a file that `read` reads; it appears whole or, on OSError, not at all. Only its owner may read it."""
    arrays: dict[str, np.ndarray | list[np.ndarray]] = {
        "magic": _text_array(_MAGIC),
        "fingerprint": _text_array(saved.fingerprint),
        "cache_type": _text_array(saved.cache_type),
        "tokens": np.array(saved.tokens, np.int32),
    }
    if saved.adapters:
        arrays["adapters"] = _text_array(json.dumps(dict(saved.adapters)))
    arrays |= {_STATE_PREFIX + name: values for name, values in saved.state.items()}
    with whole_file(path, private=True) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, values in arrays.items():
            with archive.open(name + ".npy", "w", force_zip64=True) as member:
                _write_array(member, values)


def _write_array(file: IO[bytes], values: np.ndarray | list[np.ndarray]) -> None:
    if not isinstance(values, list) or not values:
        whole = np.asarray(values, np.uint8 if isinstance(values, list) else None, order="C")
        np.lib.format.write_array(file, whole, version=(1, 0), allow_pickle=False)
        return
    first = values[0]
    header = np.lib.format.header_data_from_array_1_0(first) | {"shape": (len(values), *first.shape)}
    np.lib.format.write_array_header_1_0(file, header)
    for row in values:
        file.write(np.ascontiguousarray(row).data.cast("B"))


def read(path: str | os.PathLike[str]) -> SavedSession:
    """Read what `write` wrote. Raises FormatError if the file is missing, damaged, or something else.

    Takes no more memory than the file is long, whatever its headers claim.
    """
    return _read(path, with_state=True)


def read_tokens(path: str | os.PathLike[str]) -> SavedSession:
    """The same without the state, which may be damaged, as long as the file has its full length."""
    return _read(path, with_state=False)


def _read(path: str | os.PathLike[str], with_state: bool) -> SavedSession:
    try:
        arrays = _read_arrays(path, with_state)
        magic = _text(arrays.pop("magic"))
        if magic.startswith(_FORMAT) and magic != _MAGIC:
            raise FormatError(path, "saved by another version of qrun")
        if magic != _MAGIC:
            raise ValueError("not its format")
        tokens = arrays.pop("tokens")
        if tokens.dtype != np.int32 or tokens.ndim != 1:
            raise ValueError("its tokens are no list of int32")
        adapters = json.loads(_text(arrays.pop("adapters"))) if "adapters" in arrays else {}
        if not isinstance(adapters, dict):
            raise ValueError("its adapters are none")
        return SavedSession(
            _text(arrays.pop("fingerprint")),
            _text(arrays.pop("cache_type")),
            tokens.tolist(),
            {name.removeprefix(_STATE_PREFIX): values for name, values in arrays.items()},
            adapters,
        )
    except FormatError:
        raise
    except OSError as error:
        raise FormatError(path, error.strerror or "cannot be read") from error
    except KeyError as error:
        raise FormatError(path, f"no saved session: it has no {error}") from error
    # What zipfile and this module raise on damaged input.
    except (zipfile.BadZipFile, struct.error, EOFError, ValueError, RuntimeError) as error:
        raise FormatError(path, f"no saved session, or a damaged one: {str(error).partition(chr(10))[0]}") from error


def _read_arrays(path: str | os.PathLike[str], with_state: bool) -> dict[str, np.ndarray]:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        length = os.path.getsize(path)
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > length:
                raise ValueError(f"{member.filename} is compressed")
            length -= member.file_size
            if not with_state and member.filename.startswith(_STATE_PREFIX):
                continue
            with archive.open(member) as file:
                arrays[member.filename.removesuffix(".npy")] = _read_array(file)
    return arrays


def _read_array(file: IO[bytes]) -> np.ndarray:
    """One .npy file. np.load would allocate what the header claims before it reads."""
    try:
        version = np.lib.format.read_magic(file)
        shape, column_major, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # the header is Python text, which can be wrong in more ways than can be listed
        raise ValueError("an array with a damaged header") from error
    if version != (1, 0) or dtype.hasobject or column_major or min(shape, default=0) < 0:
        raise ValueError("an array of a kind that sessions do not have")
    data = file.read()  # to the end, where the archive's checksum is compared
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError("an array of another length than its header says")
    return np.frombuffer(data, dtype).reshape(shape)


def _text_array(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def _text(array: np.ndarray) -> str:
    return array.tobytes().decode()
