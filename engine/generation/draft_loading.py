"""Loading what guesses a model's next tokens: another model, or draft layers of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrun.engine.generation.draft import Draft, Drafter, ModelDrafter
from qrun.engine.generation.draft_layers import LayersDrafter
from qrun.engine.program.needs import bytes_per_token
from qrun.formats import FormatError, GGUFReader
from qrun.models import Graph, build_graph

if TYPE_CHECKING:
    from qrun.engine.native.compiler import Progress
    from qrun.engine.program.runtime import Runtime

UNUSED = 5
"""The type of tokens that only fill up a vocabulary, as files number it."""


DRAFT_LAYERS = "mtp"
"""What stands for draft layers in the model's own file (multi-token prediction), in place of another model's name."""


class LoadedDraft:
    """What the drafts of all sessions of a model share. drafter: makes a new one. share: of a step of the model, that a
    guess takes, as far as memory is what takes time. held: what to close in the end."""

    def __init__(
        self, drafter: Callable[[], Drafter], n_vocab: int, share: float, held: Sequence[Runtime | GGUFReader]
    ) -> None:
        self._drafter = drafter
        self._n_vocab = n_vocab
        self._share = share
        self._held = held

    def session_draft(self) -> Draft:
        """A draft for a new session."""
        return Draft(self._drafter(), self._n_vocab, self._share)

    @property
    def runtimes(self) -> list[Runtime]:
        """Those that compute drafts."""
        return [one for one in self._held if not isinstance(one, GGUFReader)]

    def close(self) -> None:
        """Let go of files and memory; before the model's own runtime does."""
        for one in self._held:
            one.close()


def load_draft_layers(graphs: Sequence[Graph], runtime: Runtime, progress: Progress | None = None) -> LoadedDraft:
    """Those of the model's own file, as `models.build_drafts` gives their graphs."""
    runtimes = [beside(runtime, graph, progress) for graph in graphs]
    return LoadedDraft(lambda: LayersDrafter(runtimes), runtime.n_vocab, share_of(runtimes[0], runtime), runtimes)


def load_draft(
    source: str | os.PathLike[str],
    reader: GGUFReader,
    runtime: Runtime,
    find: Callable[[str | os.PathLike[str]], Path],
    progress: Progress | None = None,
) -> LoadedDraft:
    """The draft for a model that is loaded. find: makes a path of the draft's name.

    Raises FormatError for a file that is damaged or not supported, or with another vocabulary.
    """
    draft_reader = GGUFReader(find(source))
    try:
        graph = build_graph(draft_reader, default_context=runtime.context)
        if graph.encoder is not None:
            raise FormatError(draft_reader.path, "a model with an encoder goes on from no text: it cannot be a draft")
        check_vocabulary(reader, draft_reader, runtime.n_vocab, graph.n_vocab)
        drafting = beside(runtime, graph, progress)
    except BaseException:
        draft_reader.close()
        raise
    n_vocab = min(graph.n_vocab, runtime.n_vocab)
    return LoadedDraft(
        lambda: ModelDrafter(drafting), n_vocab, share_of(drafting, runtime), [drafting, draft_reader]
    )


def share_of(drafting: Runtime, runtime: Runtime) -> float:
    """The bytes that are read for a token of the draft, as a part of those of the model."""
    of_draft, of_model = (bytes_per_token(one.graph, one.cache_type, 0) for one in (drafting, runtime))
    return of_draft / max(of_model, 1.0)


def beside(runtime: Runtime, graph: Graph, progress: Progress | None = None) -> Runtime:
    """A runtime for another graph, with the model's threads and settings."""
    from qrun.engine.program.runtime import Runtime

    return Runtime(
        graph, threads=runtime.threads, context=graph.context, cache_type=runtime.cache_type, batch=runtime.batch,
        progress=progress, beside=runtime,
    )  # fmt: skip


def check_vocabulary(reader: GGUFReader, draft: GGUFReader, n_vocab: int, draft_n_vocab: int) -> None:
    """Raises FormatError, naming the draft, unless both files have the same tokens under the same ids. One may have
    more of those that are only there to fill up a matrix."""
    tokens, draft_tokens = (_list(one, "tokenizer.ggml.tokens") for one in (reader, draft))
    if not tokens and not draft_tokens:
        if n_vocab != draft_n_vocab:
            raise FormatError(
                draft.path, f"a draft of {draft_n_vocab} tokens, and {reader.path.name} has {n_vocab}: not the same"
            )
        return
    shorter = min(len(tokens), len(draft_tokens))
    if tokens[:shorter] != draft_tokens[:shorter]:
        number = next(i for i in range(shorter) if tokens[i] != draft_tokens[i])
        raise FormatError(
            draft.path,
            f"no draft for {reader.path.name}, which has another vocabulary: token {number} is "
            f"{draft_tokens[number]!r} here, and {tokens[number]!r} there",
        )
    longer = reader if len(tokens) > shorter else draft
    types = _list(longer, "tokenizer.ggml.token_type")[shorter:]
    if len(tokens) != len(draft_tokens) and (not shorter or not types or any(kind != UNUSED for kind in types)):
        raise FormatError(
            draft.path,
            f"no draft for {reader.path.name}, which has another vocabulary: {len(draft_tokens)} tokens here, and "
            f"{len(tokens)} there",
        )


def _list(reader: GGUFReader, key: str) -> Sequence[Any]:
    value = reader.metadata.get(key)
    return list(value) if value is not None and not isinstance(value, str | int | float) else []
