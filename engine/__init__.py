"""Runs GGUF models: load one, talk to it, or ask it for logits.

    from qrun.engine import Model

    with Model.load("model.gguf") as model:
        for piece in model.chat([{"role": "user", "content": "Hi"}]):
            print(piece, end="")
"""

from typing import TYPE_CHECKING

from qrun.formats.on_demand import on_demand

if TYPE_CHECKING:
    from qrun.engine.conversation import Conversation
    from qrun.engine.errors import (
        CacheWarning,
        Closed,
        ContextOverflow,
        GenerationCancelled,
        NotEnoughMemory,
        NotFinite,
    )
    from qrun.engine.figures import MemoryUse
    from qrun.engine.generation.generation import Generation, GenerationStats
    from qrun.engine.generation.options import GenerationArguments, keep_newest
    from qrun.engine.generation.piece import Piece
    from qrun.engine.generation.session import Session
    from qrun.engine.model import Model
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
    "NotEnoughMemory",
    "NotFinite",
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
    "CacheWarning": "qrun.engine.errors",
    "ChatTemplate": "qrun.engine.text.chat_template",
    "ChatTemplateError": "qrun.engine.text.chat_template",
    "Closed": "qrun.engine.errors",
    "CompileError": "qrun.engine.native.codegen",
    "ContextOverflow": "qrun.engine.errors",
    "Conversation": "qrun.engine.conversation",
    "FormatError": "qrun.formats",
    "Generation": "qrun.engine.generation.generation",
    "GenerationArguments": "qrun.engine.generation.options",
    "GenerationCancelled": "qrun.engine.errors",
    "GenerationStats": "qrun.engine.generation.generation",
    "MemoryUse": "qrun.engine.figures",
    "Model": "qrun.engine.model",
    "NotEnoughMemory": "qrun.engine.errors",
    "NotFinite": "qrun.engine.errors",
    "NotPulled": "qrun.models.store",
    "PackError": "qrun.engine.native.packs",
    "Piece": "qrun.engine.generation.piece",
    "PullError": "qrun.models.store",
    "QrunError": "qrun.formats",
    "SamplingOptions": "qrun.engine.sampling.options",
    "Session": "qrun.engine.generation.session",
    "StoredModel": "qrun.models.store",
    "Tokenizer": "qrun.engine.text.tokenizer",
    "ToolCall": "qrun.engine.text.tool_calls",
    "keep_newest": "qrun.engine.generation.options",
    "known_models": "qrun.models.catalog",
    "pull": "qrun.models.download",
    "stored_models": "qrun.models.store",
}

__getattr__, __dir__ = on_demand(__name__, _MODULES)
