"""The texts that a model is calibrated by: cut into samples of equal length, some of them held out for judging.

A file is plain text, one document as a whole; or JSON lines, each an object with "text", or with "messages", which go
through the model's chat template. Documents follow each other, cut where a sample ends. Samples that are there twice
count once. Which are taken, and which held out, depends on the texts and the seed alone.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qrun.engine.judging.scoring import Chunks
from qrun.engine.text.chat_template import ChatTemplate
from qrun.engine.text.prompt import encode_prompt
from qrun.engine.text.tokenizer import Tokenizer
from qrun.formats.json_file import JSON_LINES, json_lines
from qrun.formats.mapping import read_text

# One sample of so many is held out, but never less than the second number.
HELD_OUT, LEAST_HELD_OUT = 8, 2
LEAST = 4


@dataclass(frozen=True)
class Samples:
    """taken: to calibrate by. held_out: to judge by; none of them is in `taken`.

    repeated: how many were left out since they were there already. names: of the files.
    """

    taken: Chunks
    held_out: Chunks
    repeated: int
    names: list[str]

    @property
    def digest(self) -> str:
        """Of all that is calibrated and judged by."""
        content = repr((self.taken.size, self.taken.tokens, self.held_out.tokens))
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def read_samples(
    paths: Sequence[Path], tokenizer: Tokenizer, template: ChatTemplate, *, length: int, limit: int, seed: int = 1
) -> Samples:
    """The samples of some files: `limit` to calibrate by at most, and an eighth as many to judge by.

    Raises ValueError, naming the file, for text that cannot be read, or all of them if they have too little.
    """
    first = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    room = length - len(first)
    found: dict[tuple[int, ...], None] = {}
    repeated = n_tokens = 0
    for path in paths:
        tokens: list[int] = []
        for document in _documents(path, tokenizer, template):
            tokens += document
        n_tokens += len(tokens)
        for start in range(0, len(tokens) - room + 1, room):
            sample = tuple(first + tokens[start : start + room])
            repeated += sample in found
            found[sample] = None
    samples = [list(sample) for sample in found]
    if len(samples) < LEAST:
        names = ", ".join(map(str, paths))
        more = f", and {repeated} that repeat them" if repeated else ""
        raise ValueError(
            f"{names}: {n_tokens} tokens, which is {len(samples)} different "
            f"sample{'s' * (len(samples) != 1)} of {length}{more}; "
            f"{LEAST} are needed, and some hundred are better"
        )
    random.Random(seed).shuffle(samples)
    held = max(LEAST_HELD_OUT, min(len(samples), limit + limit // HELD_OUT) // (HELD_OUT + 1))
    bos = first[0] if first else None

    def chunks(some: list[list[int]]) -> Chunks:
        return Chunks([token for sample in some for token in sample], length, len(some), bos)

    taken, held_out = chunks(samples[held : held + limit]), chunks(samples[:held])
    return Samples(taken, held_out, repeated, [path.name for path in paths])


def _documents(path: Path, tokenizer: Tokenizer, template: ChatTemplate) -> Iterator[list[int]]:
    if path.suffix.lower() not in JSON_LINES:
        yield tokenizer.encode(read_text(path), add_special=False)
        return
    for where, entry in json_lines(path):
        if isinstance(entry, dict) and isinstance(entry.get("text"), str):
            yield tokenizer.encode(entry["text"], add_special=False)
        elif isinstance(entry, dict) and "messages" in entry:
            _check_messages(where, entry["messages"])
            try:
                yield encode_prompt(tokenizer, template.render(entry["messages"], add_generation_prompt=False))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: {error}") from None
        else:
            raise ValueError(f'{where}: it has neither a "text" nor "messages"')


def _check_messages(where: str, messages: object) -> None:
    """Raises ValueError for what would be rendered as nothing, or as one message that is none."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{where}: "messages" is no list of messages')
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or (message.get("content") is None and not message.get("tool_calls")):
            raise ValueError(f"{where}: messages[{number}] has no content")
