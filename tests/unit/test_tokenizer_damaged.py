"""Tokenizers whose metadata is wrong: one FormatError that names the file, and never anything else."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrun.engine.text.tokenizer import Tokenizer
from qrun.engine.text.tokenizer.vocabulary import KINDS, Vocabulary
from qrun.formats import FormatError
from qrun.formats.gguf.strings import Strings

TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "ab", "▁", "<0x41>"]
GOOD: dict[str, Any] = {
    "model": "llama",
    "tokens": TOKENS,
    "token_type": np.array([2, 3, 3, 1, 1, 1, 1, 6], np.int32),
    "scores": np.zeros(8, np.float32),
    "merges": ["a b"],
    "pre": "gpt-2",
    "bos_token_id": 1,
}


NESTED = '{"type": "Sequence", "normalizers": [' * 20 + "]}" * 20


def use(**changes: Any) -> list[int]:
    """Load a tokenizer, encode with it and decode. A change to None removes the key; one with a dot is a whole name."""
    values = {
        key if key.startswith("qrun.") else f"tokenizer.ggml.{key}": value
        for key, value in (GOOD | changes).items() if value is not None
    }  # fmt: skip

    def strings(key: str) -> Strings:
        if not isinstance(values[key], list):
            raise FormatError("bad.gguf", f"{key} is not an array of strings")
        return Strings.of([text if isinstance(text, bytes) else text.encode() for text in values[key]])

    reader: Any = SimpleNamespace(path="bad.gguf", metadata=values, strings=strings)
    tokenizer = Tokenizer(Vocabulary(reader))
    ids = tokenizer.encode("ab é <s>", parse_special=True)
    tokenizer.decode(ids)
    return ids


def test_the_good_one_works() -> None:
    assert use() and use(model="gpt2") and use(model="t5") and use(model="bert", unknown_token_id=0)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("no tokenizer", {"model": None}),
        ("no tokenizer", {"model": "none"}),
        ("kind 'plamo2' is not supported", {"model": "plamo2"}),
        ("model is not of type str", {"model": 7}),
        ("tokens is missing", {"tokens": None}),
        ("tokens is empty", {"tokens": []}),
        ("tokens is not an array of strings", {"tokens": np.arange(8)}),
        ("token_type has 7 values for 8 tokens", {"token_type": np.ones(7, np.int32)}),
        ("token_type is not an array of numbers", {"token_type": ["1"] * 8}),
        ("scores has 9 values for 8 tokens", {"scores": np.zeros(9, np.float32)}),
        ("not finite", {"scores": np.full(8, np.nan, np.float32)}),
        ("not finite", {"scores": np.full(8, np.inf, np.float32)}),
        ("eos_token_id is 'x'", {"eos_token_id": "x"}),
        ("eos_token_id is True", {"eos_token_id": True}),
        ("eos_token_ids is not an array of token ids", {"eos_token_ids": "x"}),
        ("eog_token_ids is not an array of token ids", {"eog_token_ids": np.zeros(2, np.float32)}),
        ("add_bos_token is not of type bool", {"add_bos_token": "yes"}),
        ("token 3 is of type byte, but spelt b'a'", {"token_type": np.array([2, 3, 3, 6, 1, 1, 1, 6])}),
        ("merges is missing", {"model": "gpt2", "merges": None}),
        ("merges do not fit", {"model": "gpt2", "merges": ["a zz"]}),
        ("merges do not fit", {"model": "gpt2", "merges": ["b a"]}),
        ("merges do not fit", {"model": "gpt2", "merges": [" ".join(2 * [max(TOKENS, key=len)])]}),
        ("not two pieces", {"model": "gpt2", "merges": ["ab"]}),
        ("not UTF-8", {"model": "gpt2", "merges": [b"a \xff"]}),
        ("unknown token", {"model": "bert"}),
        ("charsmap is damaged", {"model": "t5", "precompiled_charsmap": np.ones(5, np.uint8)}),
        ("charsmap is not an array of bytes", {"model": "t5", "precompiled_charsmap": "x"}),
        ("not described in JSON", {"qrun.tokenizer.normalizer": "NFC"}),
        ("the normalizer 'Odd' is not supported", {"qrun.tokenizer.normalizer": '{"type": "Odd"}'}),
        ("too many in each other", {"qrun.tokenizer.normalizer": NESTED}),
        ("normalizer is not of type str", {"qrun.tokenizer.normalizer": 1}),
        ("space_prefix is 'x'", {"qrun.tokenizer.space_prefix": "x"}),
        ("rstrip_token_ids is not an array", {"qrun.tokenizer.rstrip_token_ids": [1]}),
        ("unknown_token_id is no token", {"model": "gpt2", "qrun.tokenizer.unknown_token_id": 99}),
    ],
)  # fmt: skip
def test_it_is_refused(reason: str, changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError) as caught:
        use(**changes)
    assert reason in str(caught.value)
    assert str(caught.value).startswith("bad.gguf: ")
    assert "\n" not in str(caught.value)


def test_a_table_that_points_outside_itself_is_refused() -> None:
    units = np.zeros(256, np.uint32)
    units[ord("a")] = 1 << 20 << 10 | ord("a")  # an offset far beyond the 256 units
    table = np.frombuffer((1024).to_bytes(4, "little") + units.tobytes() + b"x\0", np.uint8)
    with pytest.raises(FormatError, match="points outside itself"):
        use(model="t5", precompiled_charsmap=table)


VALUES = st.one_of(
    st.none(),
    st.integers(-2, 10),
    st.booleans(),
    st.text(max_size=3),
    st.lists(st.text(max_size=3), max_size=9),
    st.lists(st.binary(max_size=3), min_size=8, max_size=8),
    st.lists(st.integers(-1, 9), min_size=8, max_size=8).map(np.array),
    st.lists(st.floats(width=32), min_size=8, max_size=8).map(lambda values: np.array(values, np.float32)),
    st.binary(max_size=40).map(lambda data: np.frombuffer(data, np.uint8)),
)
KEYS = [*GOOD, "precompiled_charsmap", "unknown_token_id", "eos_token_id", "add_space_prefix", "normalizer.lowercase",
        "eos_token_ids", "qrun.tokenizer.normalizer", "qrun.tokenizer.space_prefix", "qrun.tokenizer.ignore_merges",
        "qrun.tokenizer.unknown_token_id", "qrun.tokenizer.lstrip_token_ids",
        "qrun.tokenizer.normalized_token_ids"]  # fmt: skip


@given(st.sampled_from(sorted(KINDS)), st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3))
def test_nothing_but_format_error_comes_of_it(kind: str, changes: dict[str, Any]) -> None:
    try:
        ids = use(**{"model": kind} | changes)
    except FormatError:
        return
    assert all(isinstance(id, int) for id in ids)
