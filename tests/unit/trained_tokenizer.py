"""A vocabulary as models have them: byte pairs merged by how often they come in texts, JSON among them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from qrun.engine.text.tokenizer import Tokenizer
from qrun.engine.text.tokenizer.vocabulary import PieceType, Vocabulary
from qrun.formats.gguf.strings import Strings

SPECIAL = [
    "<|endoftext|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>",
    "<think>", "</think>",
]  # fmt: skip
END = 0


@cache
def trained_tokenizer() -> Tokenizer:
    """2,000 tokens; the first are control tokens, and the first of all ends a text."""
    texts = [(Path(__file__).parents[2] / "LICENSE").read_text("utf-8")]  # which does not change
    texts.append(json.dumps([{"name": f"n{i}", "kind": "a", "tags": ["x", "y"], "size": i} for i in range(200)]))
    texts.append(texts[-1].replace(" ", ""))
    texts.append("a tag>). " * 200)  # so that there is a token with more than the end of a tag
    trained = HuggingFaceTokenizer(BPE())
    trained.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=2000, special_tokens=SPECIAL, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    types = [PieceType.CONTROL] * len(SPECIAL) + [PieceType.NORMAL] * (len(tokens) - len(SPECIAL))
    values: dict[str, Any] = {
        "general.name": "trained",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": END,
    }
    reader: Any = SimpleNamespace(
        path="trained.gguf", metadata=values, strings=lambda key: Strings.of([text.encode() for text in values[key]])
    )
    return Tokenizer(Vocabulary(reader))
