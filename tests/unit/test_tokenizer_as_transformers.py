"""Tokenizers of checkpoints, converted, against the library that Transformers runs: the same ids of any text."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_tokenizers import LLAMA3, byte_level, sequence, split, tokenizer_of
from tokenizers import Tokenizer as Reference

from qrun.formats import FormatError
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import Entries
from qrun.models.huggingface.tokenizer import tokenizer_entries

ALPHABET = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144))]
MERGES = [
    "h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "c a", "f Ã", "Ã ©", "ca f", "caf Ã©",
    "Ġ Ġ", "ï ¬", "ï¬ ģ", "a b", "Ġ a", "Ġ <", "A B", "Ġ |",
]  # fmt: skip
QWEN2 = sequence(split(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")), byte_level(False))
# Of letters with and without accents, of signs that normal forms change, of white space and special tokens.
PARTS = [
    "hello", " world", "café", "cafe\u0301", "\ufb01", "Å", "\u212b", "\u1e9b\u0323", "각", "\u1100\u1161\u11a8", "①",
    "A", "AB", "ab", "Ab", " a", "  ", "\t", "\n", "\u3000", "\xa0", "x", "\u0338", "_", "1", "é", "\u2028", "\x1c",
    "<|a|>", "<|b|>", "<|c|>", "<|d|>", "<|É|>", "<|e\u0301|>", "word", "WORD", "|>", "<|a", "\U0001f600", "\u200d",
    "▁", "`",
]  # fmt: skip


def added(content: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    return {"id": -1, "content": content, "special": special} | {
        name: flags.get(name, False) for name in ("single_word", "lstrip", "rstrip", "normalized")
    }


def byte_pair(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json of all bytes and a few merges. Changes to "model" are changes of its keys."""
    tokens = [*ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {token: id for id, token in enumerate(dict.fromkeys(tokens))}, "merges": MERGES,
    } | changes.pop("model", {})  # fmt: skip
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
                 "pre_tokenizer": QWEN2, "post_processor": None, "decoder": None, "model": model} | changes  # fmt: skip
    number(tokenizer)
    return tokenizer


def number(tokenizer: dict[str, Any]) -> None:
    """Give added tokens the ids after the vocabulary, or those that they have there."""
    vocab = tokenizer["model"]["vocab"]
    ids = {token["content"] for token in tokenizer["added_tokens"]} - vocab.keys()
    order = [token for token in tokenizer["added_tokens"] if token["content"] in ids]
    for token in tokenizer["added_tokens"]:
        if token["id"] == -1:
            at = vocab.get(token["content"])
            token["id"] = len(vocab) + order.index(token) if at is None else at


def convert(folder: Path, tokenizer: dict[str, Any], n_vocab: int = 400, **files: Any) -> Entries:
    """The entries of a folder with these files: tokenizer_config=..., added_tokens=..."""
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    entries = Entries()
    tokenizer_entries(entries, folder, Config(folder / "config.json", {}), n_vocab)
    return entries


def texts(rng: np.random.Generator, count: int, parts: list[str] = PARTS) -> list[str]:
    return ["", " ", *("".join(rng.choice(parts, rng.integers(1, 9))) for _ in range(count))]


def compare(
    folder: Path, tokenizer: dict[str, Any], rng: np.random.Generator, count: int = 300, **files: Any
) -> Entries:
    """Encode texts with both. What Transformers gives, it gives with special tokens read as such."""
    entries = convert(folder, tokenizer, **files)
    ours, reference = tokenizer_of(entries, folder / "made.gguf"), Reference.from_str(json.dumps(tokenizer))
    for text in texts(rng, count):
        expected = reference.encode(text).ids
        assert ours.encode(text, parse_special=True) == expected, (text, reference.encode(text).tokens)
    return entries


NORMALIZERS: dict[str, Any] = {
    "none": None,
    "NFC": {"type": "NFC"},
    "NFD": {"type": "NFD"},
    "NFKC": {"type": "NFKC"},
    "NFKD": {"type": "NFKD"},
    "lowercase": {"type": "Lowercase"},
    "strip": {"type": "Strip", "strip_left": True, "strip_right": True},
    "strip left": {"type": "Strip", "strip_left": True, "strip_right": False},
    "prepend": {"type": "Prepend", "prepend": "▁"},
    "replace": {"type": "Replace", "pattern": {"String": "ab"}, "content": "hello "},
    "replace by pattern": {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
    "accents": {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}, {"type": "Lowercase"}]},
    "bert": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
             "lowercase": True},
    "nothing": {"type": "Sequence", "normalizers": []},
    "nested": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [{"type": "NFKC"}]},
                                                   {"type": "Nmt"}]},
}  # fmt: skip


@pytest.mark.parametrize("name", NORMALIZERS)
def test_a_text_is_normalised_first(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    tokens = [added("<|a|>"), added("<|É|>", special=False, normalized=True), added("word", normalized=True),
              added("<|c|>", special=False, normalized=True, rstrip=True, lstrip=True)]  # fmt: skip
    compare(tmp_path, byte_pair(normalizer=NORMALIZERS[name], added_tokens=tokens), rng)


def test_special_tokens_strip_and_stand_alone_as_they_are_told(rng: np.random.Generator, tmp_path: Path) -> None:
    for _ in range(12):
        contents = ["<|a|>", "<|b|>", "<|c|>", "<|d|>", "word", "ab", "<|É|>", "|><|", "<|a|><|b|>"]
        flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
        tokens = [
            added(content, **{flag: bool(rng.random() < 0.4) for flag in flags})
            for content in rng.permutation(contents)
        ]  # fmt: skip
        normalizer = NORMALIZERS[rng.choice(["none", "NFC", "lowercase", "replace by pattern"])]
        compare(tmp_path, byte_pair(added_tokens=tokens, normalizer=normalizer), rng, 80)


def test_of_two_special_tokens_that_overlap_the_first_in_the_text_is_found(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    tokens = [added("ab"), added("b  hello"), added("hello world")]
    entries = convert(tmp_path, byte_pair(added_tokens=tokens))
    ours = tokenizer_of(entries, tmp_path / "made.gguf")
    ids = [token["id"] for token in byte_pair(added_tokens=tokens)["added_tokens"]]
    assert ours.encode("ab  hello world", parse_special=True)[0] == ids[0]
    compare(tmp_path, byte_pair(added_tokens=tokens), rng)


def test_ids_of_added_tokens_are_those_that_transformers_gives_out(rng: np.random.Generator, tmp_path: Path) -> None:
    """It closes holes, counts a spelling once, and knows the model's own tokens again."""
    n = len(byte_pair()["model"]["vocab"])
    tokens = [added("<|a|>"), added("<|b|>"), added("<|a|>", rstrip=True), added("hello"), added("<|c|>")]
    for token, id in zip(tokens, (n + 3, n + 1, n + 7, n + 2, n + 20), strict=True):
        token["id"] = id
    entries = compare(tmp_path, byte_pair(added_tokens=tokens), rng)
    assert entries.values["tokenizer.ggml.tokens"][n : n + 4] == ["<|a|>", "<|b|>", "<|c|>", f"[PAD{n + 3}]"]


def test_tokenizer_config_has_the_last_word_on_added_tokens(tmp_path: Path) -> None:
    tokens = [added("<|a|>", rstrip=True), added("<|b|>")]
    tokenizer = byte_pair(added_tokens=tokens)
    first, second = (token["id"] for token in tokens)
    decoder = {str(first): tokens[0] | {"rstrip": False}, str(second): tokens[1] | {"lstrip": True}}
    config = {"added_tokens_decoder": decoder, "pad_token": "<|pad|>"}
    entries = convert(tmp_path, tokenizer, tokenizer_config=config)
    assert "qrun.tokenizer.rstrip_token_ids" not in entries.values
    assert entries.values["qrun.tokenizer.lstrip_token_ids"] == [second]
    # A special token that no other file has is added behind all others.
    assert entries.values["tokenizer.ggml.padding_token_id"] == second + 1
    assert entries.values["tokenizer.ggml.tokens"][second + 1] == "<|pad|>"


@pytest.mark.parametrize("pre", [QWEN2, byte_level(True), sequence(split(LLAMA3), byte_level(False))])
@pytest.mark.parametrize("ignore_merges", [False, True])
def test_words_that_are_tokens_are_left_whole_or_not(
    pre: dict[str, Any], ignore_merges: bool, rng: np.random.Generator, tmp_path: Path
) -> None:
    tokenizer = byte_pair(pre_tokenizer=pre)
    model = tokenizer["model"]
    model["vocab"] |= {"cafe": 300, "Ġworld": model["vocab"]["Ġworld"], "word": 301}
    model["ignore_merges"] = ignore_merges
    compare(tmp_path, tokenizer, rng)


def test_a_space_before_every_text(rng: np.random.Generator, tmp_path: Path) -> None:
    compare(tmp_path, byte_pair(pre_tokenizer=byte_level(True) | {"add_prefix_space": True},
                                added_tokens=[added("<|a|>"), added("<|b|>", rstrip=True)]), rng)  # fmt: skip


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("unknown", [None, "?"])
def test_bytes_without_a_token(fuse: bool, unknown: str | None, rng: np.random.Generator, tmp_path: Path) -> None:
    vocab = {token: id for id, token in enumerate(["?", *"abcdehlorw<>|Ġ", "he"])}
    model = {"vocab": vocab, "merges": ["h e"], "unk_token": unknown, "fuse_unk": fuse}
    compare(tmp_path, byte_pair(model=model), rng)


def test_merges_are_pairs_or_texts(rng: np.random.Generator, tmp_path: Path) -> None:
    one = compare(tmp_path, byte_pair(), rng, 50)
    other = compare(tmp_path, byte_pair(model={"merges": [merge.split(" ") for merge in MERGES]}), rng, 50)
    assert one.values == other.values


def template(*parts: str) -> dict[str, Any]:
    """A post-processor; "$" is the text."""
    n = len(byte_pair()["model"]["vocab"])
    pieces = [{"Sequence": {"id": "A", "type_id": 0}} if part == "$" else {"SpecialToken": {"id": part, "type_id": 0}}
              for part in parts]  # fmt: skip
    special = {part: {"id": part, "ids": [n + "ab".index(part[2])], "tokens": [part]} for part in parts if part != "$"}
    return {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special}


@pytest.mark.parametrize("around", ["$", "<|a|> $", "$ <|b|>", "<|a|> $ <|b|>", "<|b|> $ <|b|>"])
def test_tokens_around_a_text(around: str, rng: np.random.Generator, tmp_path: Path) -> None:
    tokens = [added("<|a|>"), added("<|b|>")]
    processor = {"type": "Sequence", "processors": [byte_level(True), template(*around.split())]}
    tokenizer = byte_pair(added_tokens=tokens, post_processor=processor)
    config = {"bos_token": "<|a|>", "eos_token": "<|a|>"}
    entries = compare(tmp_path, tokenizer, rng, 50, tokenizer_config=config)
    # What the configuration calls the end goes on ending an answer.
    assert tokens[0]["id"] in tokenizer_of(entries, tmp_path / "made.gguf").stop_ids


@pytest.mark.parametrize("kind", ["RobertaProcessing", "BertProcessing"])
def test_tokens_around_a_text_as_encoders_have_them(kind: str, rng: np.random.Generator, tmp_path: Path) -> None:
    tokens = [added("<|a|>"), added("<|b|>")]
    tokenizer = byte_pair(added_tokens=tokens)
    tokenizer["post_processor"] = {
        "type": kind, "cls": ["<|a|>", tokens[0]["id"]], "sep": ["<|b|>", tokens[1]["id"]], "trim_offsets": True,
        "add_prefix_space": False,
    }  # fmt: skip
    compare(tmp_path, tokenizer, rng, 50)


# Spaces spelt as U+2581

WORDS = ["▁", "▁w", "or", "ld", "▁wor", "▁world", "he", "ll", "hell", "hello", "▁a", "▁▁", "ab"]
PAIRS = ["▁ w", "o r", "▁w or", "l d", "▁wor ld", "h e", "l l", "he ll", "hell o", "▁ a", "a b"]


def metaspace(normalizer: Any, pre_tokenizer: Any, merges: list[str] = PAIRS, **changes: Any) -> dict[str, Any]:
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ<|>É"
    made = [merge.replace(" ", "") for merge in merges]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *made]
    vocab = {token: id for id, token in enumerate(dict.fromkeys(tokens))}
    model = {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>", "vocab": vocab, "merges": merges}
    return byte_pair(normalizer=normalizer, pre_tokenizer=pre_tokenizer, model=model, **changes)


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}
GEMMA = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
SPACES: dict[str, tuple[Any, Any]] = {
    "llama": ({"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, None),
    "gemma": (REPLACE, GEMMA),
    "NFKC first": ({"type": "Sequence", "normalizers": [{"type": "NFKC"}, PREPEND, REPLACE]}, None),
    "lowercase": ({"type": "Sequence", "normalizers": [{"type": "Lowercase"}, REPLACE]}, None),
    "strip": ({"type": "Sequence", "normalizers": [NORMALIZERS["strip"], REPLACE, PREPEND]}, None),
    **{scheme: (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False})
       for scheme in ("always", "first", "never")},
    "words": ({"type": "NFC"}, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", SPACES)
def test_spaces_that_are_spelt(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    tokens = [added("<unk>"), added("<s>"), added("</s>"), added("<|a|>", rstrip=True), added("<|b|>", normalized=True),
              added("<|c|>", special=False, normalized=True, lstrip=True), added("word", single_word=True)]  # fmt: skip
    # This class adds nothing to a text but what the file says.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": bool(rng.random() < 0.5)}
    compare(tmp_path, metaspace(*SPACES[name], added_tokens=tokens), rng, tokenizer_config=config)


def test_the_class_of_llama_can_be_told_to_put_no_space_in_front(tmp_path: Path) -> None:
    config = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}
    entries = convert(tmp_path, metaspace(*SPACES["llama"]), tokenizer_config=config)
    assert entries.values["tokenizer.ggml.add_space_prefix"] is False
    ours = tokenizer_of(entries, tmp_path / "made.gguf")
    assert [ours.token_bytes(id) for id in ours.encode("hello world", add_special=False)] == [b"hello", b" world"]


# tokenizer.model alone


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"normalization_rule_name": "nfkc_cf", "add_dummy_prefix": False},
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    ],
    ids=lambda options: str(options["normalization_rule_name"]),
)
def test_a_sentencepiece_model_normalises_as_the_library_does(
    options: dict[str, Any], rng: np.random.Generator, tmp_path: Path
) -> None:
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    words = ["hello", "world", "café", "\ufb01ne", "①", "the", "x²", "\u3000", "日本語", "Å"]
    lines = iter([" ".join(rng.choice(words, 8)) for _ in range(300)])
    model = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=330, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=5, **options,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "tokenizer_class": "LlamaTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": 335}))
    entries = Entries()
    tokenizer_entries(entries, tmp_path, Config(tmp_path / "config.json", {}), 340)
    parts = [entries.values[f"tokenizer.ggml.{part}_token_id"] for part in ("bos", "eos", "padding")]
    assert parts == [1, 2, 336] and entries.values["tokenizer.ggml.tokens"][335:337] == ["<tool>", "<pad>"]
    ours = tokenizer_of(entries, tmp_path / "made.gguf")
    reference = SentencePieceProcessor(model_proto=model.getvalue())
    for text in texts(rng, 300, [*words, "  ", " ", "\n", "e\u0301", "ＡＢ"]):  # noqa: RUF001
        assert ours.encode(text, add_special=False) == reference.encode(text), text


def test_a_unigram_model_takes_the_pieces_that_the_library_takes(rng: np.random.Generator, tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    words = ["hello", "world", "café", "\ufb01ne", "①", "the", "x²", "\u3000", "日本語", "Å"]
    lines = iter([" ".join(rng.choice(words, 8)) for _ in range(300)])
    model = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, model_type="unigram", vocab_size=60, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=5,
    )  # fmt: skip
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    config = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "tokenizer_class": "T5Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    entries = Entries()
    tokenizer_entries(entries, tmp_path, Config(tmp_path / "config.json", {}), 70)
    assert entries.values["tokenizer.ggml.model"] == "t5"
    assert list(entries.values["tokenizer.ggml.token_type"][:3]) == [3, 3, 2]
    assert entries.values["tokenizer.ggml.tokens"][69] == "[PAD69]"
    ours = tokenizer_of(entries, tmp_path / "made.gguf")
    reference = SentencePieceProcessor(model_proto=model.getvalue())
    for text in texts(rng, 300, [*words, "  ", " ", "\n", "e\u0301", "ＡＢ"]):  # noqa: RUF001
        assert ours.encode(text, add_special=False) == reference.encode(text), text
    assert ours.encode("hello")[-1] == 1 and ours.decode(reference.encode("hello world")) == "hello world"


# Word pieces


@pytest.mark.parametrize(
    "changes",
    [{}, {"lowercase": False}, {"strip_accents": False}, {"lowercase": False, "strip_accents": True}],
    ids=lambda changes: " ".join(changes) or "usual",
)
@pytest.mark.parametrize("longest", [100, 3])
def test_words_are_cut_into_pieces(
    changes: dict[str, bool], longest: int, rng: np.random.Generator, tmp_path: Path
) -> None:
    signs = "abcdehlorwABÉé#①ﬁि日क"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *signs, *(f"##{sign}" for sign in signs), "hello", "##ll"]
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
             "max_input_chars_per_word": longest, "vocab": {token: id for id, token in enumerate(tokens)}}  # fmt: skip
    normalizer = NORMALIZERS["bert"] | changes
    tokenizer = byte_pair(normalizer=normalizer, pre_tokenizer={"type": "BertPreTokenizer"},
                          added_tokens=[added("[CLS]"), added("[SEP]"), added("[UNK]")])  # fmt: skip
    tokenizer["model"] = model
    for token in tokenizer["added_tokens"]:
        token["id"] = model["vocab"][token["content"]]
    # Vowel signs of Indic scripts, control characters, white space of all kinds, what Unicode did not have in 2015.
    parts = [*PARTS, *signs, "कि", "\v", "\x85", "\u200b", "\xad", "\ufffd", "\u061d", "\U0001fae0", "\u0378", "$",
             "[SEP]", "a" * 99, "d" * 10]  # fmt: skip
    entries = convert(tmp_path, tokenizer, tokenizer_config={"unk_token": "[UNK]", "cls_token": "[CLS]"})
    ours, reference = tokenizer_of(entries, tmp_path / "made.gguf"), Reference.from_str(json.dumps(tokenizer))
    for text in texts(rng, 200, parts):
        expected = reference.encode(text)
        assert ours.encode(text, add_special=False, parse_special=True) == expected.ids, (text, expected.tokens)


# What no GGUF file could say


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (byte_pair(normalizer={"type": "Precompiled"}), "'Precompiled' is not supported"),
        (byte_pair(normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": ""}), "Replace is not one"),
        (byte_pair(normalizer={"type": "Strip"}), "Strip has no strip_left"),
        (byte_pair(normalizer=["NFC"]), "the normalizer has no type"),
        (byte_pair(normalizer={"type": "ByteLevel"}), "'ByteLevel' is not supported"),
        (byte_pair(model={"dropout": 0.1}), "left out by chance (dropout '0.1')"),
        (byte_pair(model={"end_of_word_suffix": "</w>"}), "end_of_word_suffix ('</w>') is not supported"),
        (byte_pair(model={"continuing_subword_prefix": "##"}), "continuing_subword_prefix"),
        (byte_pair(model={"type": "WordLevel"}), "kind 'WordLevel' is not supported"),
        (byte_pair(pre_tokenizer=sequence(byte_level(False), QWEN2["pretokenizers"][0])), "how this tokenizer cuts"),
        (byte_pair(pre_tokenizer=QWEN2["pretokenizers"][0]), "how this tokenizer cuts"),
        (byte_pair(post_processor=template("<|a|>", "<|b|>", "$")), "several tokens at one end"),
        (byte_pair(post_processor=template("<|a|>")), "does not have that text once"),
        (byte_pair(post_processor={"type": "BertProcessing", "cls": ["a", 900], "sep": ["b", 1]}), "adds token 900"),
        (byte_pair(post_processor={"type": "RobertaProcessing"}), "does not name the tokens"),
        (byte_pair(post_processor=template("<|a|>", "$") | {"special_tokens": {}}), "of which it has no ids"),
        (byte_pair(post_processor={"type": "Odd"}), "post_processor 'Odd' is not supported"),
        (byte_pair(added_tokens=[added("x") | {"rstrip": "yes"}]), "rstrip of the added token 'x' is 'yes'"),
        (metaspace(PREPEND, None), "neither its normalizer nor its pre_tokenizer spells spaces"),
        (metaspace(None, None), "neither its normalizer nor its pre_tokenizer spells spaces"),
        (metaspace(REPLACE, {"type": "Digits", "individual_digits": True}), "how this tokenizer cuts"),
        (metaspace(None, {"type": "Metaspace", "replacement": "▁"}, [*PAIRS, "▁ ▁"]), "cuts text at spaces"),
        (metaspace({"type": "Sequence", "normalizers": [REPLACE, {"type": "NFC"}]}, None), "neither its normalizer"),
    ],
)  # fmt: skip
def test_what_would_change_ids_is_refused(tokenizer: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        convert(tmp_path, tokenizer)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "tokenizer.json"))
