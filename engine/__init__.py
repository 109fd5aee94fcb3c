"""Runs GGUF models: load one, talk to it, or ask it for logits.

    from qrun.engine import Model

    with Model.load("model.gguf") as model:
        for piece in model.chat([{"role": "user", "content": "Hi"}]):
            print(piece, end="")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qrun.engine.errors import CacheWarning, ContextOverflow, GenerationCancelled
    from qrun.engine.generation.generation import Generation, GenerationStats, Piece
    from qrun.engine.generation.session import Session
    from qrun.engine.model import Model
    from qrun.engine.sampling.options import SamplingOptions
    from qrun.engine.text.chat_template import ChatTemplate, ChatTemplateError
    from qrun.engine.text.tokenizer import Tokenizer
    from qrun.engine.text.tool_calls import ToolCall

__version__ = "0.1.0"  # and in setup.cfg

__all__ = [
    "CacheWarning",
    "ChatTemplate",
    "ChatTemplateError",
    "ContextOverflow",
    "Generation",
    "GenerationCancelled",
    "GenerationStats",
    "Model",
    "Piece",
    "SamplingOptions",
    "Session",
    "Tokenizer",
    "ToolCall",
]

# Imported when first asked for, so that nobody waits for what they do not use.
_MODULES = {
    "CacheWarning": "errors",
    "ChatTemplate": "text.chat_template",
    "ChatTemplateError": "text.chat_template",
    "ContextOverflow": "errors",
    "Generation": "generation.generation",
    "GenerationCancelled": "errors",
    "GenerationStats": "generation.generation",
    "Model": "model",
    "Piece": "generation.generation",
    "SamplingOptions": "sampling.options",
    "Session": "generation.session",
    "Tokenizer": "text.tokenizer",
    "ToolCall": "text.tool_calls",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
