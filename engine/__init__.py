"""Runs GGUF models: load one, talk to it, or ask it for logits.

    from qrun.engine import Model

    with Model.load("model.gguf") as model:
        for piece in model.chat([{"role": "user", "content": "Hi"}]):
            print(piece, end="")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qrun.engine.conversation import Conversation
    from qrun.engine.errors import CacheWarning, Closed, ContextOverflow, GenerationCancelled
    from qrun.engine.generation.generation import Generation, GenerationStats
    from qrun.engine.generation.options import GenerationArguments, keep_newest
    from qrun.engine.generation.piece import Piece
    from qrun.engine.generation.session import Session
    from qrun.engine.model import MemoryUse, Model
    from qrun.engine.native.codegen import CompileError
    from qrun.engine.native.packs import PackError
    from qrun.engine.sampling.options import SamplingOptions
    from qrun.engine.text.chat_template import ChatTemplate, ChatTemplateError
    from qrun.engine.text.tokenizer import Tokenizer
    from qrun.engine.text.tool_calls import ToolCall
    from qrun.formats import FormatError, QrunError
    from qrun.models.catalog import known_models
    from qrun.models.download import pull
    from qrun.models.store import NotPulled, PullError, StoredModel, stored_models

__version__ = "0.1.0"  # and in setup.cfg

__all__ = [
    "CacheWarning",
    "ChatTemplate",
    "ChatTemplateError",
    "Closed",
    "CompileError",
    "ContextOverflow",
    "Conversation",
    "FormatError",
    "Generation",
    "GenerationArguments",
    "GenerationCancelled",
    "GenerationStats",
    "MemoryUse",
    "Model",
    "NotPulled",
    "PackError",
    "Piece",
    "PullError",
    "QrunError",
    "SamplingOptions",
    "Session",
    "StoredModel",
    "Tokenizer",
    "ToolCall",
    "keep_newest",
    "known_models",
    "pull",
    "stored_models",
]

# Imported when first asked for, so that nobody waits for what they do not use.
_MODULES = {
    "CacheWarning": "engine.errors",
    "ChatTemplate": "engine.text.chat_template",
    "ChatTemplateError": "engine.text.chat_template",
    "Closed": "engine.errors",
    "CompileError": "engine.native.codegen",
    "ContextOverflow": "engine.errors",
    "Conversation": "engine.conversation",
    "FormatError": "formats",
    "Generation": "engine.generation.generation",
    "GenerationArguments": "engine.generation.options",
    "GenerationCancelled": "engine.errors",
    "GenerationStats": "engine.generation.generation",
    "MemoryUse": "engine.model",
    "Model": "engine.model",
    "NotPulled": "models.store",
    "PackError": "engine.native.packs",
    "Piece": "engine.generation.piece",
    "PullError": "models.store",
    "QrunError": "formats",
    "SamplingOptions": "engine.sampling.options",
    "Session": "engine.generation.session",
    "StoredModel": "models.store",
    "Tokenizer": "engine.text.tokenizer",
    "ToolCall": "engine.text.tool_calls",
    "keep_newest": "engine.generation.options",
    "known_models": "models.catalog",
    "pull": "models.download",
    "stored_models": "models.store",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"qrun.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
