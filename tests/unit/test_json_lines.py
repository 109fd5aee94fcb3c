"""Files with a JSON value in each line, and text files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qrun.formats import FormatError
from qrun.formats.json_file import json_lines
from qrun.formats.mapping import read_text


def test_each_line_has_a_value_and_says_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "a b.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n"b"\nnull')
    assert list(json_lines(path)) == [
        (f"{path}, line 1", {"a": 1}), (f"{path}, line 4", "b"), (f"{path}, line 5", None),
    ]  # fmt: skip


@pytest.mark.parametrize("code", [0x0B, 0x0C, 0x1C, 0x85, 0x2028, 0x2029])
def test_what_ends_lines_elsewhere_is_part_of_a_text(code: int, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    value = f"one{chr(code)}two"
    # Some of these JSON has as escapes alone.
    lines = [json.dumps(value, ensure_ascii=code < 0x20), '"three"']
    path.write_text("\n".join(lines), encoding="utf-8")
    assert list(json_lines(path)) == [(f"{path}, line 1", value), (f"{path}, line 2", "three")]


def test_pairs_of_surrogates_are_characters(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(r'{"\ud83d\ude00": "\u00e9"}')
    assert [value for _, value in json_lines(path)] == [{"\U0001f600": "é"}]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{'a': 1}", "it is no JSON: Expecting property name enclosed in double quotes (column 2)"),
        ('"a" 7', "it is no JSON: Extra data (column 5)"),
        ("[" * 100_000, "it is no JSON that can be read"),
        ("9" * 5000, "it is no JSON that can be read"),
        (r'["\ud83d\ude00", "a\udc00"]', "half of a surrogate pair stands alone in it, which is no text"),
        (r'{"\ud800": 1}', "half of a surrogate pair stands alone in it, which is no text"),
    ],
    ids=["quotes", "two", "deep", "large", "surrogate", "key"],
)
def test_a_line_that_is_none_is_named(line: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(f"1\n\n{line}\n")
    with pytest.raises(ValueError, match="line 3") as caught:
        list(json_lines(path))
    assert str(caught.value) == f"{path}, line 3: {problem}"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("Grüße".encode("latin-1"), "at byte 2: it is no UTF-8 text"),
        ("Grüße".encode("utf-16"), "it is no UTF-8 text: it is a text in UTF-16"),
        (b"\x1f\x8b\x08", "it is no UTF-8 text: it is a gzip archive: unpack it"),
    ],
)
def test_a_file_that_is_no_text_says_what_it_is(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    for read in (read_text, lambda file: list(json_lines(file))):
        with pytest.raises(FormatError) as caught:
            read(path)
        assert str(caught.value) == f"{path}: {problem}"


def test_single_bytes_can_be_passed_over_but_not_what_is_plainly_no_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfGr\xfc\xdfe")
    assert read_text(path, lenient=True) == "Gr\ufffd\ufffde"
    for content, problem in ((b"GGUF\x03\0\0\0", "it is a GGUF file"), ("a".encode("utf-16"), "a text in UTF-16")):
        path.write_bytes(content)
        with pytest.raises(FormatError, match=problem):
            read_text(path, lenient=True)
