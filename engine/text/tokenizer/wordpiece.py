"""WordPiece, the tokenizer of BERT: words are cut greedily, longest piece first.

What is done to a text and where its words end is what the `tokenizers` library does, as in the models' training.
"""

from collections.abc import Callable

from qrun.engine.text.tokenizer.slices import in_slices, library_ids, safe_cuts
from qrun.engine.text.tokenizer.vocabulary import SPACE, Vocabulary

_WITHIN = "##"  # before a piece that goes on within a word, where files do not leave it out
_MOST_CHARACTERS = 10_000  # of a word: the search is quadratic


def word_piece_encoder(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """Text to ids. A word that no pieces spell, or of more than `max_word_length` characters, is the unknown token."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordPiece

    if vocabulary.unknown_id is None:
        raise vocabulary.error("a WordPiece vocabulary needs an unknown token")
    pieces = [piece.decode(errors="replace") for piece in vocabulary.pieces]
    # Whatever begins with the mark of what goes on within a word begins none: "#" is a word by itself.
    ids = {_spelling(piece): id for begins in (True, False) for id, piece in enumerate(pieces)
           if piece.startswith(SPACE) == begins}  # fmt: skip
    lowercase = vocabulary.flag("normalizer.lowercase", True)
    tokenizer = Tokenizer(
        WordPiece(
            ids,
            unk_token=_spelling(pieces[vocabulary.unknown_id]),
            continuing_subword_prefix=_WITHIN,
            max_input_chars_per_word=min(vocabulary.max_word_length, _MOST_CHARACTERS),
        )
    )
    tokenizer.normalizer = normalizers.BertNormalizer(
        strip_accents=vocabulary.flag("normalizer.strip_accents", lowercase), lowercase=lowercase
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    cut = tokenizer.pre_tokenizer
    return in_slices(lambda text: library_ids(tokenizer, text), lambda: safe_cuts(cut))


def _spelling(piece: str) -> str:
    """As the library has it. In GGUF a piece that begins a word has the mark of a space before it, others nothing."""
    return piece[1:] if piece.startswith(SPACE) else _WITHIN + piece
