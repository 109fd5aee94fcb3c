"""The former place of `qrun.engine.text.chat_template`, for programs that import from here."""

from qrun.engine.text.chat_template import ChatTemplate, ChatTemplateError

__all__ = ["ChatTemplate", "ChatTemplateError"]
