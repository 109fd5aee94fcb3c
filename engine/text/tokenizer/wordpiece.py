"""WordPiece, the tokenizer of BERT: words are cut greedily, longest piece first."""

import unicodedata
from collections.abc import Callable, Iterator

from qrun.engine.text.tokenizer.vocabulary import SPACE, Vocabulary

_MAX_WORD = 10_000  # characters: the search is quadratic in a word's length; longer ones are unknown

# CJK characters are words of their own. (The fifth range starts where BERT's own list has it.)
_IDEOGRAPHS = [
    range(0x4E00, 0xA000),
    range(0x3400, 0x4DC0),
    range(0x20000, 0x2A6E0),
    range(0x2A700, 0x2B740),
    range(0x2B740, 0x2B820),
    range(0x2B920, 0x2CEB0),
    range(0xF900, 0xFB00),
    range(0x2F800, 0x2FA20),
]


def word_piece_encoder(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    from tokenizers.models import WordPiece

    if vocabulary.unknown_id is None:
        raise vocabulary.error("a WordPiece vocabulary needs an unknown token")
    ids = {piece.decode(errors="replace"): id for id, piece in enumerate(vocabulary.pieces)}
    model = WordPiece(
        ids,
        unk_token=vocabulary.pieces[vocabulary.unknown_id].decode(errors="replace"),
        continuing_subword_prefix="",
        max_input_chars_per_word=_MAX_WORD,
    )
    lowercase = vocabulary.flag("normalizer.lowercase", True)
    strip_accents = vocabulary.flag("normalizer.strip_accents", lowercase)

    def encode(text: str) -> list[int]:
        # GGUF spells a piece that starts a word with the mark of a space, and one within a word without "##".
        words = _words(text, lowercase, strip_accents)
        return [token.id for word in words for token in model.tokenize(SPACE + word)]

    return encode


def _words(text: str, lowercase: bool, strip_accents: bool) -> Iterator[str]:
    """Words without white space and control characters; punctuation and ideographs stand alone."""
    if strip_accents:
        text = unicodedata.normalize("NFD", text)
    word = ""
    for character in text:
        category = unicodedata.category(character)
        if category[0] == "Z" or character in "\t\n\v\f\r\x85":
            yield from [word] if word else []
            word = ""
        elif character == "\ufffd" or category[0] == "C" or (strip_accents and category[0] == "M"):
            continue
        elif category[0] == "P" or (category[0] == "S" and character < "\x7f") or _is_ideograph(character):
            yield from [word, character] if word else [character]
            word = ""
        else:
            word += character.lower() if lowercase else character
    if word:
        yield word


def _is_ideograph(character: str) -> bool:
    return any(ord(character) in block for block in _IDEOGRAPHS)
