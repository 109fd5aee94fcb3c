"""Text to token ids and back, as a model's file describes it."""

from qrun.engine.text.tokenizer.tokenizer import StreamDecoder, Tokenizer

__all__ = ["StreamDecoder", "Tokenizer"]
