"""How each family of byte-pair models cuts a text into words, before any merge.

A model is trained on words cut by its own regular expressions, so the same expressions must cut its prompts. Each is
applied to the pieces that the one before it left; what an expression does not match stays as a piece of its own. The
syntax is Oniguruma's, which the `tokenizers` library uses.

The names are the values of `tokenizer.ggml.pre`. Where llama.cpp (src/llama-vocab.cpp) runs a simpler expression than
the one the model was published with, the published one stands here.
"""

import warnings
from contextlib import suppress
from dataclasses import replace

from qrun.formats.dataclass import dataclass
from qrun.formats.gguf.cursor import quote

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGIT_GROUPS = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"  # threes, counted from the right: 1|234|567
_ASCII_PUNCTUATION = r"[!-/:-@\[-`{-~]"
_CHINESE_AND_KANA = r"[\u4e00-\u9fa5\u3040-\u30ff]+"
_NEWLINES_APART = r"[^\n]+|\n+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _words(digits: str, contractions: str = _CONTRACTIONS + "|", letter: str = r"\p{L}") -> str:
    """The expression of GPT-4 and its many descendants: a word takes one leading sign, a newline ends a piece."""
    return (
        rf"{contractions}[^\r\n\p{{L}}\p{{N}}]?[{letter}]+|{digits}| ?[^\s{letter}\p{{N}}]+[\r\n]*|{_SPACES}"
    )  # fmt: skip


def _cased_words(digits: str, suffix: str = _CONTRACTIONS + "?") -> str:
    """The expression of GPT-4o: as `_words`, and a capital begins a new word ("camelCase" -> "camel", "Case")."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{lead}{upper}*{lower}+{suffix}|{lead}{upper}+{lower}*{suffix}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


def _punctuated_words(spaces: str = r"[\r\n]*|" + _SPACES) -> str:
    """The expression of DeepSeek V3: marks belong to letters, and punctuation sticks to the word that follows."""
    return rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+{spaces}"


# The letters with case that Unicode had when DeepSeek's expression was expanded, without the mathematical ones.
_DEEPSEEK_LETTERS = (
    r"\s?[\p{Lu}\p{Ll}\p{Lt}&&[^\u0560-\u0588\u10c7-\u10ff\u1c80-\u1c8f\u2d00-\u2d2d\ua790-\ua7ff\uab30-\uab68"
    r"\x{10570}-\x{105bc}\x{10d50}-\x{10d85}\x{16e40}-\x{16e7f}\x{1d400}-\x{1df2a}]]+"
)
_BLOOM = r" ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"


@dataclass(frozen=True)
class PreTokenizer:
    """patterns: cut the text, one after the other.
    alphabet: what pieces are spelt in. "bytes": one printable character per byte (GPT-2's table); "metaspace": plain
    text in which a space is U+2581, other bytes as <0xNN>; "text": plain text.
    ignore_merges: a word which is a token as a whole is that token, whatever the merges say.
    add_bos: the default, where `tokenizer.ggml.add_bos_token` is absent.
    prefix_words: every line starts with a space, as every word does.
    normalizer: what the published tokenizers of the family do to a text first, where a file does not say."""

    patterns: tuple[str, ...]
    alphabet: str = "bytes"
    ignore_merges: bool = False
    add_bos: bool = False
    prefix_words: bool = False
    normalizer: str | None = None


_DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))
_GPT2_WORDS = PreTokenizer((_GPT2,))
_GPT2_DIGITS_APART = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA3 = PreTokenizer((_words(r"\p{N}{1,3}"),))
_WORDS_AND_DIGITS = PreTokenizer((_words(r"\p{N}"),))
_GPT4O = PreTokenizer((_cased_words(r"\p{N}{1,3}"),))
_DEEPSEEK3 = PreTokenizer((r"\p{N}{1,3}", _CHINESE_AND_KANA, _punctuated_words()))
_LINES = PreTokenizer((_NEWLINES_APART,), alphabet="metaspace")

_FAMILIES: list[tuple[str, PreTokenizer]] = [
    ("default", _DEFAULT),
    (
        "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe gigachat a.x-4.0 mellum "
        "exaone4 jais trillion granite-docling",
        _GPT2_WORDS,
    ),
    ("mpt olmo modern-bert", replace(_GPT2_WORDS, normalizer="NFC")),  # all three with the tokens of GPT-NeoX
    ("starcoder refact smollm codeshell exaone minerva-7b mellum2", _GPT2_DIGITS_APART),
    ("command-r", replace(_GPT2_DIGITS_APART, normalizer="NFC")),
    (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        replace(_LLAMA3, ignore_merges=True, add_bos=True),
    ),
    ("dbrx smaug-bpe chatglm-bpe", _LLAMA3),
    ("glm4 glm5", replace(_LLAMA3, ignore_merges=True)),
    ("kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", _WORDS_AND_DIGITS),
    ("qwen2 deepseek-r1-qwen", replace(_WORDS_AND_DIGITS, normalizer="NFC")),
    ("qwen35", PreTokenizer((_words(r"\p{N}", letter=r"\p{L}\p{M}"),), normalizer="NFC")),
    ("ufakzeka", PreTokenizer((_words(r"\p{N}", contractions=""),))),
    ("laguna", PreTokenizer((_NEWLINES_APART, _words(r"\p{N}")))),
    ("minicpm5", PreTokenizer((r"\p{N}{1,3}", _words(r"\p{N}+")), ignore_merges=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", _GPT4O),
    ("granite-embed-multi-97m", replace(_GPT4O, ignore_merges=True)),
    ("tiny_aya cohere2moe", PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _cased_words(r"\p{N}{1,3}")))),
    ("tekken", PreTokenizer((_cased_words(r"\p{N}", suffix=""),), ignore_merges=True, add_bos=True)),
    (
        "youtu",
        PreTokenizer(
            (
                r"[\uac00-\ud7a3\u3131-\u318e]+"
                r"|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
                r"|[\u3105-\u312f]+|" + _CHINESE_AND_KANA,
                _cased_words(r"\p{N}"),
            ),
            ignore_merges=True,
        ),
    ),
    (
        "kimi-k2",
        PreTokenizer(
            (
                r"\p{Han}+|[^\r\n\p{L}\p{N}]?(?:"
                r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
                r"|[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
                rf"){_CONTRACTIONS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
            )
        ),
    ),
    (
        "jais-2",
        PreTokenizer(
            (
                _words(r"\p{N}{1,3}").removesuffix(r"\s+(?!\S)|\s+")
                + "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))
                + r"|\s{1,2}(?!\S)|\s",
            )
        ),
    ),
    (
        "bailingmoe bailingmoe2 llada-moe",
        PreTokenizer(
            (
                r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
    ),
    (
        "seed-coder",
        PreTokenizer(
            (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)
        ),
    ),
    (
        "exaone-moe",
        PreTokenizer(
            (
                rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
    ),
    ("falcon", PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"))),
    ("bloom poro-chat gpt3-finnish", PreTokenizer((_BLOOM,))),
    ("viking", PreTokenizer((_BLOOM, r"\p{N}"))),
    ("superbpe", PreTokenizer((r"\p{N}+", r"[0-9]{1,3}(?=(?:[0-9]{3})*(?![0-9]))"))),
    (
        "chameleon",
        PreTokenizer(
            (
                r"<sentinel:[0-9]+>",
                r"IMGIMG[A-I]{1,4}Z",
                r"[\t\n]|    |  ",
                r"\p{N}",
                rf"[\p{{P}}{_ASCII_PUNCTUATION[1:]}",
                _GPT2,
            ),
            add_bos=True,
        ),
    ),
    (
        "deepseek-llm",
        PreTokenizer(
            (
                r"[\r\n]",
                _DEEPSEEK_LETTERS,
                r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
                r"\s+$",
                r"[\u0800-\u9fa5\uac00-\ud7ff]+",
                r"\p{N}+",
            )
        ),
    ),
    (
        "deepseek-coder",
        PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[\u0800-\u9fa5\uac00-\ud7ff]+", r"\p{N}")),
    ),
    ("deepseek-v3 hunyuan-dense hy_v4 joyai-llm", _DEEPSEEK3),
    (
        "spark2_5",
        PreTokenizer(
            (r"\p{N}{1,3}", _CHINESE_AND_KANA, _punctuated_words(r"|[\r\n]|\s+(?!\S)|\s+"), r"\p{N}"),
        ),
    ),
    (
        "afmoe",
        PreTokenizer(
            (
                _DIGIT_GROUPS,
                r"[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0eff"
                r"\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+",
                _punctuated_words(),
            )
        ),
    ),
    ("gemma4 granite-embed-multi-311m", replace(_LINES, add_bos=True)),
    ("sarvam-moe", _LINES),
    (
        "mmbert",
        PreTokenizer((_NEWLINES_APART, r"\u2581[^\u2581\n]*"), alphabet="metaspace", prefix_words=True),
    ),
    ("whitespace", PreTokenizer((r"\s+",), alphabet="text")),
]

PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: pre for names, pre in _FAMILIES for name in names.split()}


def pre_tokenizer(name: str | None) -> PreTokenizer:
    """The pre-tokenizer of that name; the default, with a warning, for a name that is not known."""
    found = PRE_TOKENIZERS.get(name or "default")
    if found is None:
        with suppress(ValueError):  # an app has closed its standard error
            text = f"unknown pre-tokenizer {quote(name or '')}: its text is cut by the default rules"
            warnings.warn(text, stacklevel=2)
        return _DEFAULT
    return found
