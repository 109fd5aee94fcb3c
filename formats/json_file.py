"""JSON files that come from strangers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qrun.formats.errors import FormatError
from qrun.formats.gguf.cursor import quote
from qrun.formats.mapping import lookalike, read_file, read_text

MAX_BYTES = 1 << 28  # far above the largest tokenizer.json
JSON_LINES = (".jsonl", ".ndjson")
"""How files are called, in any case, that have a value in each line."""
MAX_DEPTH = 64  # so that whoever walks over values need not fear for the stack


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a file. Raises FormatError if it is missing, too large, or holds anything else."""
    text = read_file(path, max_bytes)
    if not text.strip():
        raise FormatError(path, "this is not JSON: the file is empty")
    if kind := lookalike(text[:256].lstrip()):  # all that begins like JSON is none
        raise FormatError(path, f"this is not JSON; it is {kind}")
    return parse_json(path, text)


def read_list(path: Path, what: str, max_bytes: int = MAX_BYTES) -> list[Any]:
    """The list in a file, of what the message calls it. Raises FormatError likewise."""
    parsed = _parsed(path, read_file(path, max_bytes))
    if not isinstance(parsed, list):
        raise FormatError(path, f"this is not a list of {what}")
    return parsed


def parse_json(path: Path, text: bytes, *, offset: int | None = None, unique: bool = False) -> dict[str, Any]:
    """The object that bytes of a file spell. offset: where they begin, for messages. unique: refuse two equal keys."""
    parsed = _parsed(path, text, offset, unique)
    if not isinstance(parsed, dict):
        raise FormatError(path, "the JSON is not an object", offset)
    return parsed


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a file that has one in each line, each with where it stands ("FILE, line 3"). Lines that are empty
    have none.

    Lines end at newlines alone: texts may hold what else ends a line elsewhere. Raises ValueError, naming file and
    line, for what is no JSON or spells no text, and what `read_text` raises.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
            if "\\u" in line:  # only an escape spells half of a pair
                json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: half of a surrogate pair stands alone in it, which is no text") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: it is no JSON: {error.msg} (column {error.colno})") from None
        except (ValueError, RecursionError):  # a number of too many digits, too deep a nesting
            raise ValueError(f"{where}: it is no JSON that can be read") from None
        yield where, value


def depth(value: Any) -> int:
    """How many lists and objects lie within each other: 0 of a number, 1 of a list of numbers."""
    kinds = (dict, list, tuple)
    level, found = [value] if isinstance(value, kinds) else [], 0
    while level:
        found += 1
        level = [
            inner for one in level for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, kinds)
        ]  # fmt: skip
    return found


def _parsed(path: Path, text: bytes, offset: int | None = None, unique: bool = False) -> Any:
    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise FormatError(path, f"{quote(key)} is there twice", offset)
            values[key] = value
        return values

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=check if unique else None)
        if depth(parsed) > MAX_DEPTH:
            raise RecursionError
        return parsed
    except UnicodeDecodeError:
        raise FormatError(path, "this is not JSON: it is not UTF-8", offset) from None
    except RecursionError:
        raise FormatError(path, "the JSON is nested too deeply", offset) from None
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(path, f"this is not JSON: {error}", offset) from None

