"""The published vocabularies: the ids of every published text, and text that comes back as it went in."""

import lzma
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrun.engine.text.tokenizer import Tokenizer, merging

DATA = Path(__file__).parent.parent / "data" / "tokenizer"
NAMES = sorted(path.name.removesuffix(".gguf.xz") for path in DATA.glob("*.gguf.xz"))
_loaded: dict[str, Tokenizer] = {}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vocabularies")


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokenizer(name: str, folder: Path) -> Tokenizer:
    if name not in _loaded:
        path = folder / f"{name}.gguf"
        path.write_bytes(lzma.decompress((DATA / f"{name}.gguf.xz").read_bytes()))
        _loaded[name] = Tokenizer.load(path)
    return _loaded[name]


def published(name: str, data: Path = DATA) -> list[tuple[str, list[int]]]:
    texts = (data / f"{name}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    if not texts[-1]:  # the file ends with a separator
        del texts[-1]
    ids = [[int(id) for id in line.split()] for line in (data / f"{name}.out").read_text().splitlines()]
    return list(zip(texts, ids, strict=True))


def test_all_vocabularies_are_here() -> None:
    assert NAMES == ["gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2", "starcoder"]


def test_every_published_text_gives_the_published_ids(name: str, tokenizer: Tokenizer) -> None:
    for text, ids in published(name):
        assert tokenizer.encode(text, add_special=False) == ids, text


@pytest.mark.usefixtures("tokenizer")
def test_the_first_texts_of_a_process_give_them_too(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those are encoded without a library: for as long as this is allowed, here."""
    monkeypatch.setattr(merging.StagedEncoder, "__call__", lambda self, text: self._first(text, 1 << 30)[0])
    tokenizer = Tokenizer.load(folder / f"{name}.gguf")
    for text, ids in published(name):
        assert tokenizer.encode(text, add_special=False) == ids, text
    whole = "".join(text for text, _ in published(name))
    found = tokenizer.encode(whole, add_special=False)
    monkeypatch.undo()
    monkeypatch.setattr(merging, "first_characters", lambda n_strings: 0)
    assert found == Tokenizer.load(folder / f"{name}.gguf").encode(whole, add_special=False)


def test_every_published_text_gives_the_published_word_pieces(tmp_path: Path) -> None:
    """Of BGE's vocabulary, from which texts do not come back as they went in."""
    path = tmp_path / "bert-bge.gguf"
    path.write_bytes(lzma.decompress((DATA / "words" / "bert-bge.gguf.xz").read_bytes()))
    tokenizer = Tokenizer.load(path)
    for text, ids in published("bert-bge", DATA / "words"):
        assert tokenizer.encode(text, add_special=False) == ids, text
        assert tokenizer.encode(text) == [101, *ids, 102]


def test_every_published_text_comes_back(name: str, tokenizer: Tokenizer) -> None:
    for text, ids in published(name):
        assert tokenizer.decode(ids) == text
        stream = tokenizer.stream()
        # Where a stream begins, a space is taken for the model's own.
        assert "".join(map(stream.push, ids)) + stream.flush() in (text, f" {text}")


# Qwen composes characters first. U+2581 is how SentencePiece spells a space, so it comes back as one. StarCoder cannot
# spell the planes from 4 on.
@given(st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs"], exclude_characters="▁"), max_size=40))
def test_any_text_comes_back(text: str) -> None:
    for tokenizer in _loaded.values():
        expected = unicodedata.normalize("NFC", text) if tokenizer.pre == "qwen2" else text
        assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == expected


def test_half_a_surrogate_pair_is_replaced(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud83db", add_special=False)) == "a\ufffdb"
