"""How texts are cut into words, per family."""

import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import Sequence, Split

from qrun.engine.text.tokenizer.pretokenizers import PRE_TOKENIZERS, pre_tokenizer

TEXT = "It's 12345 été  ÉTÉs\n\n x=camelCase; 你好かな"


def cut(name: str, text: str) -> str:
    splits = [Split(Regex(pattern), "isolated") for pattern in pre_tokenizer(name).patterns]
    return "|".join(piece for piece, _ in Sequence(splits).pre_tokenize_str(text)).replace("\n", "⏎")


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_name_cuts_a_text_and_loses_nothing(name: str) -> None:
    text = "a1 \t b\r\n  é́ 한 ก 🦙 \u2028'll "
    assert cut(name, text).replace("|", "") == text.replace("\n", "⏎")


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", "It|'s| 12345| été| | ÉTÉs|⏎⏎| x|=|camelCase|;| 你好かな"),
        ("smollm", "It|'s| |1|2|3|4|5| été| | ÉTÉs|⏎⏎| x|=|camelCase|;| 你好かな"),
        ("llama-bpe", "It|'s| |123|45| été| | ÉTÉs|⏎⏎| x|=camelCase|;| 你好かな"),
        ("qwen2", "It|'s| |1|2|3|4|5| été| | ÉTÉs|⏎⏎| x|=camelCase|;| 你好かな"),
        ("gpt-4o", "It's| |123|45| été| | ÉTÉs|⏎⏎| x|=camel|Case|;| 你好かな"),
        ("tekken", "It|'s| |1|2|3|4|5| été| | ÉTÉs|⏎⏎| x|=camel|Case|;| 你好かな"),
        ("deepseek-v3", "It|'s| |123|45| été| | ÉTÉs|⏎⏎| x|=camelCase|;| |你好かな"),
        ("tiny_aya", "It's| |12|345| été| | ÉTÉs|⏎⏎| x|=camel|Case|;| 你好かな"),
        ("superbpe", "It's |12|345| été  ÉTÉs⏎⏎ x=camelCase; 你好かな"),
        ("kimi-k2", "It's| |123|45| été| | ÉTÉs|⏎⏎| x|=camel|Case|;| |你好|かな"),
        ("bloom", "It's| 12345| été| | ÉTÉs|⏎⏎| x=camelCase;| 你好かな"),
        ("gemma4", "It's 12345 été  ÉTÉs|⏎⏎| x=camelCase; 你好かな"),
        ("default", "It|'|s| |123|45| été| | ÉTÉs|⏎⏎| x|=|camelCase|;| 你好かな"),
    ],
)
def test_words(name: str, pieces: str) -> None:
    assert cut(name, TEXT) == pieces


def test_marks_stay_with_their_letters_where_the_model_wants_it() -> None:
    assert cut("qwen2", "हिन्दी") == "ह|िन|्द|ी"
    assert cut("qwen35", "हिन्दी") == "हिन्दी"


def test_white_space_before_a_word_leaves_it_one_space() -> None:
    assert cut("llama-bpe", "a   b") == "a|  | b"
    assert cut("jais-2", "a" + " " * 6 + "b") == "a|    | | b"
