"""What a tokenizer does, on vocabularies small enough to read."""

import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qrun.engine.text.tokenizer import Tokenizer, merging, slices
from qrun.engine.text.tokenizer.vocabulary import PieceType, Vocabulary
from qrun.formats.gguf.strings import Strings

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = PieceType.NORMAL, PieceType.UNKNOWN, PieceType.CONTROL, PieceType.USER_DEFINED
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.fixture(autouse=True, params=["first texts", "later texts"])
def _either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first texts of a process are encoded without the libraries that encode all others."""
    if request.param == "later texts":
        monkeypatch.setattr(merging, "first_characters", lambda n_strings: 0)


def tokenizer(
    kind: str,
    tokens: list[str],
    types: list[int],
    name: str = "small",
    other: dict[str, Any] | None = None,
    **metadata: Any,
) -> Tokenizer:
    """A tokenizer of these tokens; metadata: the rest of `tokenizer.ggml.`; other: with whole names."""
    metadata |= {"model": kind, "tokens": tokens, "token_type": np.array(types, np.int32)}
    values = {"general.name": name} | {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    values |= other or {}

    def strings(key: str) -> Strings:
        return Strings.of([text.encode() for text in values[key]])

    reader: Any = SimpleNamespace(path="small.gguf", metadata=values, strings=strings)
    return Tokenizer(Vocabulary(reader))


def sentencepiece(words: list[str], special: list[str] | None = None, **metadata: Any) -> Tokenizer:
    """Tokens: unknown, <s>, </s>, 256 bytes, the words (better ones first), user-defined tokens."""
    special = special or []
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *words, *special]
    types = [UNKNOWN, CONTROL, CONTROL] + [PieceType.BYTE] * 256 + [NORMAL] * len(words) + [USER_DEFINED] * len(special)
    scores = -np.arange(len(tokens), dtype=np.float32)
    return tokenizer("llama", tokens, types, scores=scores, **metadata)


def byte_pair(merges: list[str], special: dict[str, int] | None = None, **metadata: Any) -> Tokenizer:
    """Tokens: the printable ASCII characters and a few more, what the merges make, special tokens with their types."""
    letters = [*map(chr, range(0x21, 0x7F)), *"ĠĊÃ©ðŁĺĢ"]
    tokens = [*letters, *(merge.replace(" ", "") for merge in merges), *(special or {})]
    types = [NORMAL] * (len(letters) + len(merges)) + list((special or {}).values())
    return tokenizer("gpt2", tokens, types, merges=merges, **{"pre": "gpt-2", **metadata})


def spelt(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.token_bytes(id).decode(errors="replace") for id in ids]


class TestSentencePiece:
    def test_the_best_scored_pair_is_merged_first(self) -> None:
        one = sentencepiece(["bc", "ab", "a", "b", "c"], add_space_prefix=False)
        other = sentencepiece(["ab", "bc", "a", "b", "c"], add_space_prefix=False)
        assert spelt(one, one.encode("abc", add_special=False)) == ["a", "bc"]
        assert spelt(other, other.encode("abc", add_special=False)) == ["ab", "c"]

    def test_a_text_starts_with_bos_and_a_space(self) -> None:
        small = sentencepiece(["▁a", "▁", "a"])
        assert small.encode("a") == [1, small.encode("a", add_special=False)[0]]
        assert spelt(small, small.encode("a a", add_special=False)) == [" a", " a"]

    def test_what_has_no_piece_is_spelt_in_bytes(self) -> None:
        small = sentencepiece(["a"], add_space_prefix=False)
        assert small.encode("aé", add_special=False) == [259, 3 + 0xC3, 3 + 0xA9]
        assert small.decode([259, 3 + 0xC3, 3 + 0xA9]) == "aé"

    def test_without_byte_pieces_it_is_unknown(self) -> None:
        small = tokenizer("llama", ["<unk>", "a"], [UNKNOWN, NORMAL], add_space_prefix=False)
        assert small.encode("aé", add_special=False) == [1, 0]

    def test_bytes_are_known_by_their_spelling_where_a_file_has_no_types(self) -> None:
        reader: Any = sentencepiece(["a"], add_space_prefix=False)._vocabulary._reader
        del reader.metadata["tokenizer.ggml.token_type"]
        small = Tokenizer(Vocabulary(reader))
        assert small.decode(small.encode("aé", add_special=False)) == "aé"

    def test_a_piece_may_be_listed_twice(self) -> None:
        small = sentencepiece(["a", "a"], add_space_prefix=False)
        assert small.encode("a", add_special=False) == [260]

    def test_decoding_takes_away_the_space_that_encoding_put_there(self) -> None:
        small = sentencepiece(["▁a", "▁", "a"])
        assert small.decode(small.encode(" a", add_special=False)) == " a"
        assert small.decode(small.encode("a a"), skip_special=True) == "a a"
        assert small.decode(small.encode("a</s>a", parse_special=True)) == "<s>a</s>a"


class TestBytePair:
    def test_the_first_merge_comes_first(self) -> None:
        small = byte_pair(["b c", "a b"])
        assert spelt(small, small.encode("abc")) == ["a", "bc"]

    def test_spaces_and_newlines_belong_to_words(self) -> None:
        small = byte_pair(["Ġ a", "Ċ Ċ"])
        assert spelt(small, small.encode("a a\n\n")) == ["a", " a", "\n\n"]

    def test_of_a_merge_that_is_listed_twice_the_first_counts(self) -> None:
        small = byte_pair(["a b", "b c", "a b"])
        assert spelt(small, small.encode("abc")) == ["ab", "c"]

    def test_a_character_without_a_piece_is_left_out_and_keeps_its_neighbours_apart(self) -> None:
        small = byte_pair(["a b"])
        assert spelt(small, small.encode("a\x00b")) == ["a", "b"]

    def test_a_whole_word_may_win_over_the_merges(self) -> None:
        gpt2, llama3 = (byte_pair(["a b"], {"abc": NORMAL}, pre=pre) for pre in ("gpt-2", "llama-bpe"))
        assert spelt(gpt2, gpt2.encode("abc")) == ["ab", "c"]
        assert spelt(llama3, llama3.encode("abc")) == ["abc"]

    def test_an_unknown_pre_tokenizer_is_reported_once_and_replaced(self) -> None:
        with pytest.warns(UserWarning, match="of-tomorrow") as caught:
            small = byte_pair(["a b"], pre="of-tomorrow")
            assert spelt(small, small.encode("ab 12")) == ["ab", " ", "1", "2"]
        assert len(caught) == 1


class TestSpecialTokens:
    def test_control_tokens_are_text_unless_asked_for(self) -> None:
        small = byte_pair([], {"<|im_start|>": CONTROL})
        id = small.n_vocab - 1
        assert id not in small.encode("<|im_start|>a")
        assert small.encode("<|im_start|>a", parse_special=True) == [id, *small.encode("a")]

    def test_user_defined_tokens_are_always_found(self) -> None:
        small = sentencepiece(["a"], ["  "], add_space_prefix=False)
        assert spelt(small, small.encode("a  a", add_special=False)) == ["a", "  ", "a"]

    def test_the_longest_is_found_first(self) -> None:
        small = byte_pair([], {"<a>": USER_DEFINED, "<a><b>": USER_DEFINED})
        assert spelt(small, small.encode("<a><b><a>")) == ["<a><b>", "<a>"]

    def test_spellings_that_end_an_answer_are_control_tokens_and_stops(self) -> None:
        small = byte_pair([], {"<|im_end|>": NORMAL, "<end_of_turn>": USER_DEFINED}, eos_token_id=5)
        assert small.stop_ids == {5, small.n_vocab - 2, small.n_vocab - 1}
        assert small.decode([small.n_vocab - 2], skip_special=True) == ""

    def test_the_end_of_a_message_is_no_stop_where_an_answer_has_several(self) -> None:
        marks = ["<|end|>", "<|return|>", "<|call|>"]
        small = byte_pair([], dict.fromkeys(marks, CONTROL))
        assert set(spelt(small, sorted(small.stop_ids))) == {"<|return|>", "<|call|>"}

    def test_eos_is_added_where_the_model_wants_it(self) -> None:
        small = byte_pair([], bos_token_id=1, eos_token_id=2, add_bos_token=True, add_eos_token=True)
        assert small.encode("a") == [1, *small.encode("a", add_special=False), 2]

    def test_phi_3_takes_the_white_space_after_a_special_token(self) -> None:
        small = byte_pair([], {"<|end|>": CONTROL}, name="Phi-3 mini")
        assert spelt(small, small.encode("<|end|>\n\na", parse_special=True)) == ["<|end|>", "a"]


    def test_of_pieces_that_overlap_the_first_in_the_text_is_found(self) -> None:
        small = byte_pair([], {"<a>": USER_DEFINED, "a><bcd>": USER_DEFINED})
        assert spelt(small, small.encode("<a><bcd>")) == ["<a>", *"<bcd>"]

    def test_white_space_goes_with_the_pieces_that_the_file_names(self) -> None:
        small = byte_pair([], {"<l>": CONTROL, "<r>": USER_DEFINED, "<w>": USER_DEFINED})
        left, right, word = range(small.n_vocab - 3, small.n_vocab)
        sets = {"lstrip": [left], "rstrip": [right], "single_word": [word]}
        more = {f"qrun.tokenizer.{name}_token_ids": np.array(ids, np.int32) for name, ids in sets.items()}
        pieces = {"<l>": CONTROL, "<r>": USER_DEFINED, "<w>": USER_DEFINED}
        small = byte_pair([], pieces, name="Phi-3", other={"qrun.tokenizer.normalizer": "null"} | more)
        ids = small.encode("a <l> <r> \u3000\na<w> <w>", parse_special=True)
        assert spelt(small, ids) == ["a", "<l>", " ", "<r>", "a", *"<w>", " ", "<w>"]

    def test_all_ends_stop(self) -> None:
        lists = {"eos_token_ids": np.array([3, 4], np.int32), "eog_token_ids": np.array([9], np.uint32)}
        assert byte_pair([], eos_token_id=5, eot_token_id=6, **lists).stop_ids == {3, 4, 5, 6, 9}


class TestNormalizer:
    @pytest.mark.parametrize("pre", ["qwen2", "qwen35", "deepseek-r1-qwen", "command-r", "olmo"])
    def test_those_that_were_published_so_compose_characters(self, pre: str) -> None:
        small = byte_pair(["Ã ©"], pre=pre)
        assert spelt(small, small.encode("e\u0301")) == ["é"]

    def test_others_take_a_text_as_it_is(self) -> None:
        gpt2 = byte_pair(["Ã ©"])
        assert spelt(gpt2, gpt2.encode("é")) == ["é"]
        assert spelt(gpt2, gpt2.encode("e\u0301"))[0] == "e"

    def test_a_file_may_say_otherwise(self) -> None:
        other = {"qrun.tokenizer.normalizer": "null"}
        assert spelt(small := byte_pair([], other=other, pre="qwen2"), small.encode("e\u0301"))[0] == "e"
        other = {"qrun.tokenizer.normalizer": '{"type": "Lowercase"}'}
        assert spelt(small := byte_pair([], other=other), small.encode("AÉ"))[0] == "a"

    def test_the_key_of_gguf_counts_for_byte_pairs_too(self) -> None:
        small = byte_pair([], **{"normalizer.lowercase": True})
        assert spelt(small, small.encode("AbC")) == ["a", "b", "c"]

    @pytest.mark.parametrize("text", ["a\ud83db", "\udc00", "e\ud800\u0301"])
    def test_halves_of_characters_do_no_harm(self, text: str) -> None:
        small = byte_pair([], pre="qwen2")
        assert "\ud83d" not in small.decode(small.encode(text))
        assert small.encode_further(text) == small.encode(text, add_special=False)


    def test_the_first_space_of_a_merge_separates_its_pieces(self) -> None:
        """A word of white space has spaces of its own: "\\t" and " \\n" merge, and "\\t " and "\\n" do not."""
        tokens = ["\t", " ", "\n", "\t ", " \n", "\t \n"]
        small = tokenizer("whitespace", tokens, [NORMAL] * 6, merges=["\t  ", "\t  \n"])
        assert small.encode("\t \n") == [3, 2]


class TestNotices:
    @pytest.mark.parametrize("id", [-1, 4294967295, 1 << 20])
    def test_an_id_that_cannot_be_is_passed_over(self, id: int) -> None:
        small = byte_pair(["a b"], bos_token_id=id, eos_token_id=id, eot_token_id=7, add_bos_token=True)
        assert (small.bos_id, small.eos_id, small.stop_ids) == (None, None, {7})
        assert spelt(small, small.encode("ab")) == ["ab"]
        assert [text.split(": ")[1] for text in small.notices] == [
            f"tokenizer.ggml.{name}_token_id is {id}, and the vocabulary has {small.n_vocab} tokens"
            for name in ("bos", "eos")
        ]  # fmt: skip

    def test_the_usual_id_takes_its_place(self) -> None:
        small = sentencepiece(["a"], eos_token_id=4294967295, eos_token_ids=np.array([-1, 7], np.int32))
        assert small.eos_id == 2 and small.stop_ids == {2, 7}
        assert len(small.notices) == 2

    def test_most_files_give_no_cause(self) -> None:
        assert byte_pair([], eos_token_id=1).notices == ()


class TestStream:
    def test_no_character_is_split(self) -> None:
        small = byte_pair([])
        ids = small.encode("é😀a")
        stream = small.stream()
        assert [stream.push(id) for id in ids] == ["", "é", "", "", "", "😀", "a"]
        assert stream.flush() == ""

    def test_what_never_becomes_a_character_is_replaced(self) -> None:
        small = byte_pair([])
        emoji = small.encode("😀")
        stream = small.stream()
        assert [stream.push(id) for id in [*emoji[:2], *small.encode("a")]] == ["", "", "\ufffda"]
        assert stream.push(emoji[0]) + stream.flush() == "\ufffd"
        assert small.decode(emoji[:3]) == "\ufffd"

    def test_a_space_at_the_start_stays_in_the_middle_of_a_text(self) -> None:
        small = sentencepiece(["▁a"])
        assert small.stream().push(259) == " a"
        assert small.stream(after=[259]).push(259) == " a"

    def test_a_space_at_the_start_goes_after_a_special_token(self) -> None:
        small = sentencepiece(["▁a"])
        assert small.stream(after=[2]).push(259) == "a"

    def test_control_tokens_are_shown_or_not(self) -> None:
        small = sentencepiece(["a"])
        assert small.stream().push(2) == "</s>"
        assert small.stream(skip_special=True).push(2) == ""


def test_an_id_outside_the_vocabulary_is_an_error() -> None:
    small = byte_pair([])
    for id in (-1, small.n_vocab):
        with pytest.raises(ValueError, match=f"token {id} is not in the vocabulary"):
            small.token_bytes(id)


def test_rwkv_takes_the_longest_piece_from_the_left() -> None:
    """Of bytes, which need not be whole characters."""
    pieces = ["a", "ab", "abcd", "b", "c", "\\n", "\\n\\n", "\\t", "\\\\", "\\'", "\\xc3", "\\xa9", "\\xe4\\xbd"]
    tokens = ["<s>", *pieces, "[PAD14]"]
    types = [CONTROL] + [NORMAL] * len(pieces) + [PieceType.UNUSED]
    small = tokenizer("rwkv", tokens, types, bos_token_id=0, eot_token_id=7)
    assert small.encode("abcab") == [2, 5, 2] and small.encode("abcdab") == [3, 2]
    assert small.encode("a\n\n\nb\t\\'") == [1, 7, 6, 4, 8, 9, 10]
    assert small.encode("é") == [11, 12] and small.decode([11, 12]) == "é"
    assert small.decode([1, 7, 8, 9, 10, 2]) == "a\n\n\t\\'ab"
    assert small.token_bytes(13) == b"\xe4\xbd"
    assert small.all_bytes() == [small.token_bytes(id) for id in range(small.n_vocab)]
    assert small.stop_ids == {7} and not small.add_bos
    # What is no piece is left out; a control piece is found only where it is asked for.
    assert small.encode("azb") == [1, 4]
    assert small.encode("<s>a", parse_special=True) == [0, 1] and small.encode("<s>a") == [1]
    assert small.encode("[PAD14]") == []


def test_bert_cuts_words_greedily(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = ["[UNK]", "[CLS]", "[SEP]", "▁un", "▁u", "able", "▁!"]
    small = tokenizer(
        "bert",
        tokens,
        [CONTROL] * 3 + [NORMAL] * 4,
        unknown_token_id=0,
        bos_token_id=1,
        seperator_token_id=2,
    )
    assert small.encode("Ünable! xyz") == [1, 3, 5, 6, 0, 2]
    monkeypatch.setattr(slices, "SLICE", 2)
    assert small.encode("Ünable able! unable xyz\nUnable") == [1, 3, 5, 0, 6, 3, 5, 0, 3, 5, 2]


def test_t5_takes_the_likeliest_pieces() -> None:
    tokens = ["<pad>", "</s>", "<unk>", "▁a", "b", "▁ab", "c"]
    scores = np.array([0, 0, 0, -1, -1, -5, -1], np.float32)
    small = tokenizer("t5", tokens, [CONTROL, CONTROL, UNKNOWN] + [NORMAL] * 4, scores=scores, add_space_prefix=True)
    assert small.encode("ab") == [3, 4, 1]


def test_bytes_of_all_tokens_at_once_are_those_of_each() -> None:
    for one in (byte_pair(["h e", "l l"], special={"<|end|>": 3}), sentencepiece(["\u2581a", "b"])):
        assert one.all_bytes() == [one.token_bytes(id) for id in range(one.n_vocab)]


@pytest.mark.parametrize("word", ["ab" * 100_000, "7" * 50_000, "\u00e9" * 50_000])
def test_others_go_on_while_a_word_without_an_end_is_encoded(word: str) -> None:
    """Nor does it take the longer for each character, the more there are."""
    small = byte_pair(["a b"])
    ticks, over = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not over.wait(0.001):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.thread_time()
    try:
        ids = small.encode(word)
    finally:
        over.set()
        thread.join()
    assert small.decode(ids) == word
    assert ticks >= 10 or time.thread_time() - begin < 0.3


@pytest.mark.parametrize("text", ["ab", "ab " * 9000])
def test_a_package_that_was_left_out_of_an_app_is_named_with_the_first_text(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only once a text is so long that it is needed."""
    words = sentencepiece(["\u2581a", "b"])
    letters, cased = byte_pair(["a b"]), byte_pair(["a b"], **{"normalizer.lowercase": True})
    assert (words.packages, letters.packages, cased.packages) == (["sentencepiece"], ["tokenizers"], ["tokenizers"])
    assert tokenizer("rwkv", ["<s>", "a"], [CONTROL, NORMAL]).packages == []
    for small in (words, letters):
        (name,) = small.packages
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=f"^the package {name} cuts this model's texts .*: install it, or"):
            small.encode(text)
