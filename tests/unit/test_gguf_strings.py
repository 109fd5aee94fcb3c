"""Arrays of strings are found as if each had been stepped over."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrun.formats.gguf import strings as module
from qrun.formats.gguf.strings import Strings, find_strings

PIECES = st.lists(
    st.one_of(
        st.binary(max_size=9),
        st.lists(st.sampled_from([0, 0, 0, 1, 8]), max_size=30).map(bytes),  # what looks like lengths
        st.integers(250, 600).map(lambda n: b"x" * n),
    ),
    max_size=80,
)


def encoded(pieces: list[bytes]) -> bytes:
    return b"".join(struct.pack("<Q", len(piece)) + piece for piece in pieces)


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WINDOW", 100)
    monkeypatch.setattr(module, "_FEW", 3)


@given(PIECES, st.binary(max_size=5), st.binary(max_size=20))
def test_every_string_is_found(pieces: list[bytes], before: bytes, behind: bytes) -> None:
    data = before + encoded(pieces) + behind
    starts, end = find_strings(np.frombuffer(data, np.uint8), len(before), len(pieces))
    assert end == len(data) - len(behind)
    found = Strings(data, starts, np.array([len(piece) for piece in pieces], np.int64))
    assert list(found) == pieces == list(Strings.of(pieces))
    assert found[1:-1] == pieces[1:-1]
    assert all(found[i] == piece for i, piece in enumerate(pieces))


@given(PIECES, st.data())
def test_one_that_runs_past_the_end_is_refused(pieces: list[bytes], choice: st.DataObject) -> None:
    data = encoded([*pieces, b"last"])
    cut = choice.draw(st.integers(8 * len(pieces), len(data) - 1))
    with pytest.raises(ValueError):
        find_strings(np.frombuffer(data[:cut], np.uint8), 0, len(pieces) + 1)
    huge = encoded(pieces) + struct.pack("<Q", choice.draw(st.integers(1, (1 << 64) - 1)))
    with pytest.raises(ValueError):
        find_strings(np.frombuffer(huge, np.uint8), 0, len(pieces) + 1)
