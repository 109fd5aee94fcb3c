"""Byte-pair encoding through the `tokenizers` library."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qrun.engine.text.tokenizer.merging import StagedEncoder, first_byte_pairs
from qrun.engine.text.tokenizer.slices import in_slices, library_ids, safe_cuts
from qrun.engine.text.tokenizer.vocabulary import SPACE, Vocabulary
from qrun.formats.gguf.cursor import quote

if TYPE_CHECKING:
    from tokenizers.models import BPE
    from tokenizers.normalizers import Normalizer
    from tokenizers.pre_tokenizers import PreTokenizer

_UNSPELT = ""  # no piece of any vocabulary is empty


def byte_pair_encoder(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """Raises FormatError where the merges do not fit the pieces."""
    _ = vocabulary.byte_pair_unknown, vocabulary.fuse_unknown  # which may be refused
    first = first_byte_pairs(vocabulary, _words(vocabulary))
    n_strings = len(vocabulary) + len(vocabulary.merges())
    encode = StagedEncoder(first, lambda: _library_encoder(vocabulary), n_strings)
    space = SPACE if vocabulary.pre_tokenizer.alphabet == "metaspace" else " "
    return in_slices(
        lambda text: encode(text.replace(" ", space)), lambda: safe_cuts(_pre_tokenizer(vocabulary), space)
    )


def _library_encoder(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer(_model(vocabulary))
    tokenizer.pre_tokenizer = _pre_tokenizer(vocabulary)
    if (normalizer := _normalizer(vocabulary)) is not None:
        tokenizer.normalizer = normalizer
    unspelt = len(vocabulary)

    def encode(text: str) -> list[int]:
        ids = library_ids(tokenizer, text)
        return [id for id in ids if id != unspelt] if unspelt in ids else ids

    return encode


def _words(vocabulary: Vocabulary) -> Callable[[str], list[str]]:
    """What the library looks up merges in."""
    cut, normalizer = _pre_tokenizer(vocabulary), _normalizer(vocabulary)

    def words(text: str) -> list[str]:
        if normalizer is not None:
            text = normalizer.normalize_str(text)
        return [word for word, _ in cut.pre_tokenize_str(text)]

    return words


def _pre_tokenizer(vocabulary: Vocabulary) -> "PreTokenizer":
    from tokenizers import Regex, pre_tokenizers

    pre = vocabulary.pre_tokenizer
    steps: list[PreTokenizer] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    if pre.alphabet == "bytes":
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return pre_tokenizers.Sequence(steps)


def _normalizer(vocabulary: Vocabulary) -> "Normalizer | None":
    from tokenizers import Regex, normalizers

    if not vocabulary.pre_tokenizer.prefix_words:
        return None
    return normalizers.Replace(Regex(rf"^(?=[^{SPACE}\n])"), SPACE)


def _model(vocabulary: Vocabulary) -> "BPE":
    """A dict of pieces and a list of pairs is the library's quickest way in: JSON and files take twice the time."""
    from tokenizers.models import BPE

    pre = vocabulary.pre_tokenizer
    merges = vocabulary.merges()
    unknown = vocabulary.byte_pair_unknown
    if merges.lengths.max(initial=0) - 1 > vocabulary.pieces.lengths.max():  # the library panics
        longest = merges[int(merges.lengths.argmax())].decode(errors="replace")
        raise vocabulary.error(f"tokenizer.ggml.merges do not fit the tokens: none is as long as {quote(longest)}")
    try:
        with _garbage_collection_paused():
            ids = {piece.decode(): id for id, piece in enumerate(vocabulary.pieces)}
            # Of a merge that is listed twice the first counts; the library would take the last.
            pairs: list[Any] = [tuple(merge.decode().split(" ", 1)) for merge in dict.fromkeys(merges)]
            # A character without a piece is left out in the end, but until then it keeps its neighbours apart.
            if unknown is None:
                ids[_UNSPELT] = len(vocabulary)
            # Every byte has a piece in the byte alphabet; the others spell what has none as <0xNN>.
            return BPE(
                ids,
                pairs,
                unk_token=_UNSPELT if unknown is None else unknown,
                fuse_unk=vocabulary.fuse_unknown,
                byte_fallback=pre.alphabet != "bytes",
                ignore_merges=pre.ignore_merges,
            )
    except UnicodeDecodeError:
        raise vocabulary.error("a token or merge of the byte-pair tokenizer is not UTF-8") from None
    except TypeError:
        raise vocabulary.error("tokenizer.ggml.merges has one that is not two pieces") from None
    except Exception as error:  # the library raises no narrower class
        raise vocabulary.error(f"tokenizer.ggml.merges do not fit the tokens: {error}") from None


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """It would look through hundreds of thousands of new tuples again and again: an eighth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
