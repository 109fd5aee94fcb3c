"""Byte-pair encoding through the `tokenizers` library."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from qrun.engine.tokenizer.vocabulary import SPACE, Vocabulary

if TYPE_CHECKING:
    import tokenizers


def byte_pair_encoder(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """Raises FormatError where the merges do not fit the pieces."""
    tokenizer = _build(vocabulary)
    metaspace = vocabulary.pre_tokenizer.alphabet == "metaspace"
    lowercase = vocabulary.kind == "whitespace" and vocabulary.flag("normalizer.lowercase", False)

    def encode(text: str) -> list[int]:
        if metaspace:
            text = text.replace(" ", SPACE)
        ids: list[int] = tokenizer.encode(text.lower() if lowercase else text, add_special_tokens=False).ids
        return ids

    return encode


def _build(vocabulary: Vocabulary) -> "tokenizers.Tokenizer":
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    pre = vocabulary.pre_tokenizer
    try:
        # A dict of the pieces and a list of the pairs is the library's quickest way in: twice as fast as JSON.
        ids = {piece.decode(): id for id, piece in enumerate(vocabulary.pieces)}
        # Of a merge that is listed twice, the first counts; the library would take the last.
        merges = [tuple(merge.decode().split(" ", 1)) for merge in dict.fromkeys(vocabulary.merges())]
        # Pieces of the byte alphabet never need <0xNN>, and some vocabularies have text pieces that look so.
        model = BPE(ids, merges, byte_fallback=pre.alphabet != "bytes", ignore_merges=pre.ignore_merges)
    except UnicodeDecodeError:
        raise vocabulary.error("a token or merge of the byte-pair tokenizer is not UTF-8") from None
    except Exception as error:  # the library raises no narrower class
        raise vocabulary.error(f"tokenizer.ggml.merges do not fit the tokens: {error}") from None

    tokenizer = Tokenizer(model)
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns
    ]
    if pre.alphabet == "bytes":
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre.prefix_words:
        tokenizer.normalizer = normalizers.Replace(Regex(rf"^(?=[^{SPACE}\n])"), SPACE)
    return tokenizer
