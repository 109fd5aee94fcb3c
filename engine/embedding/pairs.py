"""A query and a document in the form that a model wants which says how well they go together."""

from __future__ import annotations

import re

from qrun.engine.text.tokenizer import Tokenizer


def fill_pair(tokenizer: Tokenizer, template: str, query: str, document: str, most: int | None) -> list[int]:
    """The token ids of a template with {query} and {document} in it, whose special tokens count; not those that the
    texts spell. most: of a document that makes more tokens only the beginning is taken."""
    parts = re.split(r"(\{query\}|\{document\})", template)
    filled: list[tuple[str, list[int]]] = []
    for part in parts:
        text = {"{query}": query, "{document}": document}.get(part)
        ids = (
            tokenizer.encode(part, add_special=False, parse_special=True)
            if text is None
            else tokenizer.encode(text, add_special=False)
        )
        filled.append((part, ids))
    total = sum(len(ids) for _, ids in filled)
    if most is not None and total > most:
        filled = [(part, ids[: max(len(ids) - (total - most), 0)] if part == "{document}" else ids)
                  for part, ids in filled]  # fmt: skip
    return [id for _, ids in filled for id in ids]
