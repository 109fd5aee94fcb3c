"""Tokenizers of checkpoints as metadata of a GGUF file."""

from __future__ import annotations

import json
import lzma
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_tokenizers import (
    LLAMA3,
    STEPS,
    byte_level,
    sequence,
    split,
    tokenizer_of,
    write_byte_pair,
    write_merging,
)

from qrun.engine.text.chat_template import ChatTemplate
from qrun.engine.text.tokenizer.pretokenizers import PRE_TOKENIZERS
from qrun.formats import FormatError, GGUFReader
from qrun.models.huggingface import digests, pretokenizers
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import Entries
from qrun.models.huggingface.text_rules import BYTE_NAMES
from qrun.models.huggingface.tokenizer import tokenizer_entries

DATA = Path(__file__).parent.parent / "data"
PUBLISHED = DATA / "tokenizer"
BYTE_PAIR = {"gpt-2": "gpt-2", "starcoder": "smollm", "llama-bpe": "llama-bpe", "qwen2": "qwen2"}


def published(name: str, folder: Path) -> GGUFReader:
    path = folder / f"{name}.gguf"
    path.write_bytes(lzma.decompress((PUBLISHED / f"{name}.gguf.xz").read_bytes()))
    return GGUFReader(path)


def entries_of(folder: Path, n_vocab: int, config: dict[str, Any] | None = None) -> Entries:
    entries = Entries()
    tokenizer_entries(entries, folder, Config(folder / "config.json", config or {}), n_vocab)
    return entries


def tiny(folder: Path, **changes: Any) -> Path:
    """A folder with a tokenizer.json of two letters and their pair."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    tokenizer = {"model": model, "pre_tokenizer": byte_level(True), "added_tokens": []} | changes
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


# Published vocabularies


@pytest.mark.parametrize("name", BYTE_PAIR)
def test_a_published_byte_pair_tokenizer_is_what_it_was(name: str, tmp_path: Path) -> None:
    with published(name, tmp_path) as reader:
        write_byte_pair(tmp_path / "tokenizer.json", reader, name)
        expected = reader.metadata
        entries = entries_of(tmp_path, len(expected["tokenizer.ggml.tokens"]))
        assert entries.values["tokenizer.ggml.model"] == "gpt2"
        assert entries.values["tokenizer.ggml.pre"] == BYTE_PAIR[name]
        assert entries.values["tokenizer.ggml.merges"] == expected["tokenizer.ggml.merges"]
        tokens, types = expected["tokenizer.ggml.tokens"], expected["tokenizer.ggml.token_type"]
        for id, (token, type) in enumerate(zip(tokens, types, strict=True)):
            assert entries.values["tokenizer.ggml.tokens"][id] == token
            unused = token.startswith("[PAD")  # which the published file calls user-defined
            assert entries.values["tokenizer.ggml.token_type"][id] == (5 if unused else type)
    assert entries.values["tokenizer.ggml.add_bos_token"] == (name == "llama-bpe")


@pytest.mark.parametrize(("name", "digest_name"), [("llama-bpe", "llama-bpe"), ("starcoder", "starcoder")])
def test_rules_that_are_not_known_are_known_by_their_ids(name: str, digest_name: str, tmp_path: Path) -> None:
    with published(name, tmp_path) as reader:
        write_byte_pair(tmp_path / "tokenizer.json", reader, name)
    assert digests.PRE_TOKENIZER_OF[pretokenizers._digest(tmp_path / "tokenizer.json")] == digest_name


def test_scores_follow_from_merges(tmp_path: Path) -> None:
    with published("llama-spm", tmp_path) as reader:
        write_merging(tmp_path / "tokenizer.json", reader)
        scores = reader.metadata["tokenizer.ggml.scores"]
        types = reader.metadata["tokenizer.ggml.token_type"]
        entries = entries_of(tmp_path, len(scores))
    assert entries.values["tokenizer.ggml.add_space_prefix"] is True
    found = np.array(entries.values["tokenizer.ggml.scores"])
    # Runs of spaces share one score in the published file.
    merged = (found > found.min()) & (types == 1) & (scores > -1e8)
    assert merged.sum() > 25000
    order = np.flatnonzero(merged)
    np.testing.assert_array_equal(np.argsort(-found[order], kind="stable"), np.argsort(-scores[order], kind="stable"))
    tokenizer = tokenizer_of(entries, tmp_path / "made.gguf")
    texts = (PUBLISHED / "llama-spm.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (PUBLISHED / "llama-spm.out").read_text().splitlines()
    for text, line in zip(texts, lines, strict=False):
        assert tokenizer.encode(text, add_special=False) == [int(id) for id in line.split()], text


# Pre-tokenizers


def test_every_name_is_one_that_the_engine_knows() -> None:
    assert set(digests.PRE_TOKENIZER_OF.values()) <= PRE_TOKENIZERS.keys()
    names = {name for names in pretokenizers._FAMILIES.values() for name in names.values()}
    assert names <= PRE_TOKENIZERS.keys()


@pytest.mark.parametrize("name", [*STEPS, "smaug-bpe", "gpt-4o", "tekken"])
def test_rules_cut_as_those_of_their_name(name: str) -> None:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import PreTokenizer, Sequence, Split

    wanted = BYTE_PAIR.get(name, name)
    patterns = next(key for key, names in pretokenizers._FAMILIES.items() if wanted in names.values())
    steps: list[PreTokenizer] = [Split(Regex(pattern), "isolated") for pattern in patterns]
    ours: list[PreTokenizer] = [Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name].patterns]
    texts = (PUBLISHED / "llama-bpe.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    for text in [*texts, digests.TEXT, "camelCase It'S 1234567 naïve/x\r\n\r\n  'tis We'Ve"]:
        cuts = [Sequence(rules).pre_tokenize_str(text) for rules in (steps, ours)]
        assert [span for _, span in cuts[0]] == [span for _, span in cuts[1]], text


@pytest.mark.parametrize(
    "pattern",
    [
        LLAMA3.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)"),
        LLAMA3.replace("]?", "]?+").replace(" ?[^\\s\\p{L}\\p{N}]+", " ?[^\\s\\p{L}\\p{N}]++"),
    ],
)
def test_other_spellings_of_a_rule(pattern: str, tmp_path: Path) -> None:
    tokenizer = {"model": {"ignore_merges": True}, "pre_tokenizer": sequence(split(pattern), byte_level(False))}
    assert pretokenizers.pre_tokenizer(tmp_path, tokenizer) == pretokenizers.Cutting("llama-bpe")


# Special tokens and templates


def special(id: int, content: str) -> dict[str, Any]:
    return {"id": id, "content": content, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False}  # fmt: skip


def test_special_tokens_come_from_wherever_they_are_named(tmp_path: Path) -> None:
    names = ["<s>", "</s>", "<pad>", "<|eot_id|>", "<|eom_id|>"]
    tiny(tmp_path, added_tokens=[special(3 + i, name) for i, name in enumerate(names)])
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": {"content": "<s>"}, "add_bos_token": True})
    write_json(tmp_path / "special_tokens_map.json", {"eos_token": "</s>"})
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [4, 6, 7, 99]})
    values = entries_of(tmp_path, 9, {"pad_token_id": 5, "eos_token_id": 3}).values
    ids = {key: value for key, value in values.items() if key.endswith("_id")}
    assert ids == {
        "tokenizer.ggml.bos_token_id": 3, "tokenizer.ggml.eos_token_id": 4, "tokenizer.ggml.padding_token_id": 5,
        "tokenizer.ggml.eot_token_id": 6, "tokenizer.ggml.eom_token_id": 7,
    }  # fmt: skip
    assert values["tokenizer.ggml.add_bos_token"] is True
    assert values["tokenizer.ggml.token_type"] == [1, 1, 1, 3, 3, 3, 3, 3, 5]
    assert values["tokenizer.ggml.tokens"][8] == "[PAD8]"


def test_an_end_that_only_generation_config_knows(tmp_path: Path) -> None:
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [2, 1]})
    values = entries_of(tiny(tmp_path), 3).values
    assert values["tokenizer.ggml.eos_token_id"] == 2 and values["tokenizer.ggml.eot_token_id"] == 1


def test_every_end_that_is_listed_ends_an_answer(tmp_path: Path) -> None:
    names = ["<s>", "<x>", "<y>", "<z>", "<|eom_id|>"]
    tiny(tmp_path, added_tokens=[special(3 + i, name) for i, name in enumerate(names)])
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<x>"})
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [5, 4, 6, -1, 99]})
    entries = entries_of(tmp_path, 9, {"eos_token_id": [6, 7, 2]})
    ids = {key: value for key, value in entries.values.items() if key.startswith("tokenizer.ggml.e")}
    # Engines that read no list stop at three of them.
    assert ids == {
        "tokenizer.ggml.eos_token_id": 4, "tokenizer.ggml.eom_token_id": 7, "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.eos_token_ids": [4, 5, 6, 7, 2],
    }  # fmt: skip
    assert tokenizer_of(entries, tmp_path / "made.gguf").stop_ids == {4, 5, 6, 7, 2}


def test_three_ends_of_no_name(tmp_path: Path) -> None:
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [2, 1, 0]})
    values = entries_of(tiny(tmp_path), 3).values
    assert [values[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [2, 1, 0]
    assert "tokenizer.ggml.eos_token_ids" not in values


# vocab.json and merges.txt


def slow(folder: Path, tokenizer_class: str | None, **files: Any) -> Path:
    """A folder as the slow tokenizers of Transformers save it."""
    alphabet = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144))]
    merges = ["a b", "Ġ a", "1 2", "Ã ©"]
    tokens = [*alphabet, *(merge.replace(" ", "") for merge in merges)]
    write_json(folder / "vocab.json", {token: id for id, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("\r\n".join(["#version: 0.2", *merges, ""]))
    write_json(folder / "added_tokens.json", {"<b>": 261, "<a>": 260})
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": tokenizer_class, "eos_token": "<a>"})
    for name, value in files.items():
        write_json(folder / f"{name}.json", value)
    return folder


@pytest.mark.parametrize(
    ("tokenizer_class", "model_type", "pre"),
    [("Qwen2Tokenizer", "llama", "qwen2"), ("Qwen2TokenizerFast", None, "qwen2"), (None, "qwen3", "qwen2"),
     ("GPT2Tokenizer", "llama", "gpt-2"), ("GPT2TokenizerFast", "qwen2", "gpt-2")],
)  # fmt: skip
def test_a_vocabulary_with_merges_is_read_by_its_class(
    tokenizer_class: str | None, model_type: str | None, pre: str, tmp_path: Path
) -> None:
    entries = entries_of(slow(tmp_path, tokenizer_class), 280, {"model_type": model_type})
    assert entries.values["tokenizer.ggml.pre"] == pre
    assert entries.values["tokenizer.ggml.eos_token_id"] == 260
    assert entries.values["tokenizer.ggml.token_type"][260:262] == [3, 4]  # the end is no text, the other one may be
    tokenizer = tokenizer_of(entries, tmp_path / "made.gguf")
    pieces = [tokenizer.token_bytes(id) for id in tokenizer.encode("ab a12<a>e\u0301<b>", parse_special=True)]
    digits = [b"1", b"2"] if pre == "qwen2" else [b"12"]
    accent = ["é".encode()] if pre == "qwen2" else [b"e", b"\xcc", b"\x81"]
    assert pieces == [b"ab", b" a", *digits, b"<a>", *accent, b"<b>"]


def test_a_space_before_every_text_of_the_old_files(tmp_path: Path) -> None:
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    tokenizer = tokenizer_of(entries_of(slow(tmp_path, None, tokenizer_config=config), 280), tmp_path / "made.gguf")
    for text in ("a", " a"):
        assert [tokenizer.token_bytes(id) for id in tokenizer.encode(text)] == [b" a"]


def test_special_tokens_that_the_class_has_by_itself(tmp_path: Path) -> None:
    entries = entries_of(slow(tmp_path, None, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"}), 280)
    end = entries.values["tokenizer.ggml.eos_token_id"]
    assert entries.values["tokenizer.ggml.tokens"][end] == "<|endoftext|>" and end == 262


@pytest.mark.parametrize(
    ("tokenizer_class", "model_type", "message"),
    [
        ("LlamaTokenizer", "llama", "the class 'LlamaTokenizer' reads them"),
        ("PreTrainedTokenizerFast", "qwen2", "the class 'PreTrainedTokenizerFast' reads them"),
        (None, "llama", "no class that is known reads them"),
    ],
)
def test_a_class_that_is_not_known(tokenizer_class: str | None, model_type: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        entries_of(slow(tmp_path, tokenizer_class), 280, {"model_type": model_type})
    assert message in str(caught.value) and str(caught.value).startswith(str(tmp_path / "vocab.json"))


# Vocabularies of tiktoken


def write_ranks(path: Path, tokens: list[bytes]) -> None:
    path.write_bytes(b"".join(b"%s %d\n" % (b64encode(token), rank) for rank, token in enumerate(tokens)))


def test_the_merges_of_a_published_vocabulary_follow_from_the_ranks_of_its_tokens(tmp_path: Path) -> None:
    n_tokens = 12_000
    with published("qwen2", tmp_path) as expected:
        spelt = expected.metadata["tokenizer.ggml.tokens"][:n_tokens]
        merges = expected.metadata["tokenizer.ggml.merges"][: n_tokens - 256]
    byte_of = {character: byte for byte, character in enumerate(BYTE_NAMES)}
    write_ranks(tmp_path / "qwen.tiktoken", [bytes(byte_of[character] for character in token) for token in spelt])
    values = entries_of(tmp_path, n_tokens + 209).values
    assert values["tokenizer.ggml.merges"] == merges
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert tokens[:n_tokens] == spelt and set(types[:n_tokens]) == {1}
    end = n_tokens
    assert tokens[end : end + 5] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_1|>"]
    assert tokens[-2:] == ["<|extra_204|>", f"[PAD{n_tokens + 208}]"] and types[end:] == [3] * 208 + [5]
    assert (values["tokenizer.ggml.pre"], values["tokenizer.ggml.eos_token_id"]) == ("qwen2", end)


# Each of the 256 bytes, and what they merge into: "abc" is a token that no two others make.
RANKS = [*(bytes([byte]) for byte in range(256)), b" a", b"b1", b"1" * 2, b"abc", "é".encode(), b"\n\n"]


@pytest.mark.parametrize(
    ("name", "tokenizer_class", "pre", "special", "digits", "accent"),
    [
        ("qwen.tiktoken", None, "qwen2", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], 1, ["é".encode()]),
        ("hy.tiktoken", None, "hunyuan", ["<|endoftext|>", "<|startoftext|>", "<|bos|>"], 1, ["é".encode()]),
        ("tiktoken.model", None, "kimi-k2", ["<|reserved_token_262|>", "[EOS]", "<|reserved_token_264|>"], 2,
         [b"e", b"\xcc", b"\x81"]),
        ("tokenizer.model", "ChatGLM4Tokenizer", "chatglm-bpe", ["[PAD262]", "[EOS]", "[PAD264]"], 2,
         [b"e", b"\xcc", b"\x81"]),
    ],
)  # fmt: skip
def test_a_vocabulary_of_tiktoken(
    name: str, tokenizer_class: str | None, pre: str, special: list[str], digits: int, accent: list[bytes],
    tmp_path: Path,
) -> None:  # fmt: skip
    write_ranks(tmp_path / name, RANKS)
    config: dict[str, Any] = {"tokenizer_class": tokenizer_class}
    if "[EOS]" in special:
        config |= {"eos_token": "[EOS]", "added_tokens_decoder": {"263": {"content": "[EOS]", "special": True}}}
    if pre == "chatglm-bpe":
        config["added_tokens_decoder"] = {"262": {"content": "[PAD262]", "special": True}} | config[
            "added_tokens_decoder"]  # fmt: skip
    write_json(tmp_path / "tokenizer_config.json", config)
    entries = entries_of(tmp_path, 700)
    assert entries.values["tokenizer.ggml.pre"] == pre
    assert entries.values["tokenizer.ggml.tokens"][262:265] == special
    assert entries.values["tokenizer.ggml.merges"] == ["Ġ a", "b 1", "1 1", "Ã ©", "Ċ Ċ"]
    end = special.index("[EOS]") if "[EOS]" in special else 0
    assert entries.values["tokenizer.ggml.eos_token_id"] == 262 + end
    tokenizer = tokenizer_of(entries, tmp_path / "made.gguf")
    pieces = [tokenizer.token_bytes(id) for id in tokenizer.encode("abc a11\n\ne\u0301")]
    assert pieces == [b"abc", b" a", *([b"11"] if digits == 2 else [b"1", b"1"]), b"\n\n", *accent]


def test_a_file_whose_lines_are_counted(tmp_path: Path) -> None:
    """Some of Hunyuan's tokens stand there twice, and their ranks are not those of the model."""
    lines = [b"%s %d\n" % (b64encode(token), 7) for token in (*RANKS[:257], RANKS[0], *RANKS[257:])]
    (tmp_path / "hy.tiktoken").write_bytes(b"".join(lines))
    values = entries_of(tmp_path, 300).values
    assert values["tokenizer.ggml.tokens"][256:258] == ["Ġa", "b1"]
    assert values["tokenizer.ggml.tokens"][262] == "<|endoftext|>"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "it is a Git LFS pointer"),
        (b"", "there are no tokens in it"),
        (b"IQ== 0\nIQ 1\n", "line 2 is not a token in base 64 and its rank"),
        (b"IQ== 0\nIg==\n", "line 2 is not a token in base 64 and its rank"),
        (b"IQ== -1\n", "line 1 is not a token in base 64 and its rank"),
        (b"IQ== 99999999999\n", "line 1 is not a token in base 64 and its rank"),
        (b64encode(b"a" * 2000) + b" 0\n", "line 1 is not a token in base 64 and its rank"),
        (b"IQ== 0\nIg== 0\n", "two tokens have the same rank"),
        (b"IQ== 0\nIg== 1\n", "there is no token for the byte 0"),
    ],
)
def test_a_damaged_vocabulary_of_tiktoken(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tiktoken.model").write_bytes(content)
    with pytest.raises(FormatError) as caught:
        entries_of(tmp_path, 3)
    assert str(caught.value).startswith(f"{tmp_path / 'tiktoken.model'}: ") and message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("merges.txt", "#version: 0.2\na b c\n", "'a b c' is not one of two"),
        ("merges.txt", "version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("vocab.json", "version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("vocab.json", "[]", "not an object"),
        ("vocab.json", '{"a": "b"}', "not an object of tokens and ids"),
    ],
)
def test_damaged_old_files(name: str, content: str, message: str, tmp_path: Path) -> None:
    (slow(tmp_path, "Qwen2Tokenizer") / name).write_text(content)
    with pytest.raises(FormatError) as caught:
        entries_of(tmp_path, 280)
    assert message in str(caught.value) and str(caught.value).startswith(str(tmp_path))


# Files that are something else


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
             "tokenizer.model", "generation_config.json", "chat_template.jinja", "chat_template.json"]
)  # fmt: skip
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "it is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html></html>", "it is a web page"),
        (b"PK\x03\x04\x14\0", "it is a zip archive"),
        (b"\x1f\x8b\x08\0", "it is a gzip archive"),
    ],
)
def test_a_file_that_is_something_else_is_called_that(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    if name == "tokenizer.model":
        content = content.lstrip()
    else:
        tiny(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError) as caught:
        entries_of(tmp_path, 3)
    assert str(caught.value).startswith(f"{tmp_path / name}: ") and message in str(caught.value)


def test_a_vocabulary_of_tiktoken_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(FormatError, match="a vocabulary of tiktoken"):
        entries_of(tmp_path, 3)


def test_a_template_may_begin_with_a_tag(tmp_path: Path) -> None:
    (tiny(tmp_path) / "chat_template.jinja").write_text("<|im_start|>{{ messages }}")
    assert entries_of(tmp_path, 3).values["tokenizer.chat_template"].startswith("<|im_start|>")


@pytest.mark.parametrize("content", ["", "  \n", '{"model": {"type": "BPE", "vo'])
def test_a_file_that_was_cut_short(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(FormatError, match="this is not JSON"):
        entries_of(tmp_path, 3)


# Chat templates


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"chat_template": "a"}}, {"": "a"}),
        ({"tokenizer_config.json": {"chat_template": "a"}, "chat_template.jinja": "b"}, {"": "b"}),
        ({"chat_template.json": {"chat_template": "c"}}, {"": "c"}),
        (
            {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "a"},
                                                         {"name": "tool use", "template": "t"}, "x", {"name": "n"}]}},
            {"": "a", ".tool_use": "t"},
        ),
        ({"tokenizer_config.json": {"chat_template": 3}}, {}),
        ({"tokenizer_config.json": {"chat_template": "a\ud83d"}}, {"": "a?"}),
    ],
)  # fmt: skip
def test_chat_templates(files: dict[str, Any], expected: dict[str, str], tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    values = entries_of(tiny(tmp_path), 3).values
    key = "tokenizer.chat_template"
    assert {name.removeprefix(key): value for name, value in values.items() if name.startswith(key)} == expected


# What is wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_tokenizer": split("x+")}, "how this tokenizer cuts text into words"),
        ({"model": {"type": "Unigram", "vocab": []}}, "the vocabulary is not a list of tokens and scores"),
        ({"model": {"type": "BPE", "vocab": [1], "merges": []}}, "not an object of tokens and ids"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "not an object of tokens and ids"),
        ({"model": {"type": "BPE", "vocab": {"a": 7}, "merges": []}}, "'a' has the id 7, and there are 3 embeddings"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}}, "the merge 'a' is not one of two"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", 1]]}}, "is not one of two"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}, "the merge 'a b' is of or makes"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}, "have the same id"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 2}, "merges": []},
          "added_tokens": [{"id": 1, "content": "x"}]}, "ids are missing before 2, which 'x' gets"),
        ({"model": {"type": "BPE", "vocab": {"\ud800": 0}, "merges": []}}, "half of a surrogate pair"),
        ({"model": {"type": "BPE", "vocab": {"a": 1 << 23}, "merges": [], "byte_fallback": True},
          "pre_tokenizer": None}, "with ids up to"),
        ({"added_tokens": [{"id": "x", "content": "a"}]}, "an added token has the id 'x'"),
        ({"added_tokens": [{"id": 1}]}, "has no content"),
        ({"post_processor": {"type": "TemplateProcessing"}}, "no template of a single text"),
    ],
)
def test_what_is_wrong_takes_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        entries_of(tiny(tmp_path, **changes), 3)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "tokenizer.json"))


def test_rwkv_lists_its_tokens_in_a_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "rwkv_vocab_v20230424.txt"
    tokens = ["User", ": ", "h", "i", "\n\n", "é", b"\xff", "hi"]
    lines = [f"{id} {token!r} {len(token if type(token) is bytes else token.encode())}\n"
             for id, token in enumerate(tokens, 1)]  # fmt: skip
    path.write_text("".join(lines))
    entries = entries_of(tmp_path, 12)
    assert [entries.values[f"tokenizer.ggml.{part}_token_id"] for part in ("bos", "eos", "eot")] == [0, 0, 5]
    ours = tokenizer_of(entries, tmp_path / "made.gguf")
    assert ours.encode("User: hi\n\né", add_special=False) == [1, 2, 8, 5, 6]
    assert [ours.token_bytes(id) for id in (5, 6, 7)] == [b"\n\n", "é".encode(), b"\xff"]
    template = ChatTemplate(entries.values["tokenizer.chat_template"], ours)
    assert template.render([{"role": "user", "content": " hi "}]) == "User: hi\n\nAssistant:"
    for wrong in (
        "2 'a' 2", "2 a 1", "99 'a' 1", "2 ('a',) 1", "2 'a", "\n3 'a' 1", "2 [[] 1", "2 '' 0", "2 'a' 'b' 2"
    ):  # fmt: skip
        path.write_text(lines[0] + wrong + "\n")
        with pytest.raises(FormatError, match="line 2 is no token"):
            entries_of(tmp_path, 12)
    path.write_text(lines[0] + "2 'a' 1\n1 'b' 1\n")
    with pytest.raises(FormatError, match="line 3 has the id 1, as another one before it"):
        entries_of(tmp_path, 12)
    path.write_bytes(b"")
    with pytest.raises(FormatError, match="line 1 is no token"):
        entries_of(tmp_path, 12)


@pytest.mark.parametrize("code", [0x0B, 0x0C, 0x1C, 0x85, 0x2028, 0x2029])
def test_tokens_of_rwkv_may_hold_what_ends_lines_elsewhere(code: int, tmp_path: Path) -> None:
    token = f"a{chr(code)}"
    path = tmp_path / "rwkv_vocab_v20230424.txt"
    path.write_bytes(f"1 '{token}' {len(token.encode())}\r\n2 \"b'\\\"\" 3\r\n\r\n".encode())
    ours = tokenizer_of(entries_of(tmp_path, 3), tmp_path / "made.gguf")
    assert [ours.token_bytes(id) for id in (1, 2)] == [token.encode(), b"b'\""]


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        entries_of(tmp_path, 3)


def test_a_damaged_sentencepiece_model_never_gets_through_unnoticed(rng: np.random.Generator, tmp_path: Path) -> None:
    whole = (DATA / "huggingface" / "mistral" / "tokenizer.model").read_bytes()
    path = tmp_path / "tokenizer.model"
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        at = rng.integers(len(data))
        if rng.random() < 0.3:
            del data[at:]
        else:
            data[at] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        try:
            entries_of(tmp_path, 500)
        except FormatError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refused += 1
    assert refused > 30
