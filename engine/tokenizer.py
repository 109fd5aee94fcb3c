"""The former place of `qrun.engine.text.tokenizer`, for programs that import from here."""

from qrun.engine.text.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
