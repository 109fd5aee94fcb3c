"""From texts to vectors: the tokens that a model wants of a text or a pair, and the embedder that computes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qrun.engine.errors import Closed, GenerationCancelled
from qrun.engine.native.locks import ForkAwareLock

if TYPE_CHECKING:
    from qrun.engine.embedding.embedder import Embedder, Vector
    from qrun.engine.program.runtime import Runtime
    from qrun.engine.text.tokenizer import Tokenizer
    from qrun.formats import GGUFReader
    from qrun.models import Graph
    from qrun.models.pooling import PoolingKind


class TextEmbedder:
    """What a model's `embed` and `rerank` work with. For any number of threads.

    The embedder is made when it is first needed: beside the runtime that generates, or, of a model that makes nothing
    else, with it. Methods raise Closed once this is closed, which comes before the runtime is.
    """

    def __init__(self, path: Path, reader: GGUFReader, graph: Graph, runtime: Runtime) -> None:
        self._reader, self._graph, self._runtime = reader, graph, runtime
        self._name, self._context = path.name, runtime.context
        self._lock = ForkAwareLock()  # guards what follows; held while kernels are compiled
        self._made: Embedder | None = None
        self._closed = False

    @property
    def embedder(self) -> Embedder:
        """It itself. ValueError for a model of which there are no vectors."""
        with self._lock:
            if self._closed:
                raise Closed(f"{self._name}: the model is closed")
            if self._made is None:
                self._made = self._make()
            return self._made

    @property
    def own_runtime(self) -> Runtime | None:
        """What it has beside the model's, if it has been made."""
        made = self._made
        return made.runtime if made is not None and made.runtime is not self._runtime else None

    def check_pooling(self, kind: str) -> None:
        """Raises ValueError for a kind that there is not, or not of this model."""
        from qrun.models.pooling import POOLINGS

        if not isinstance(kind, str) or kind not in POOLINGS:
            raise ValueError(f"pooling is {kind!r}, expected one of {', '.join(POOLINGS)}")
        pooling = self.embedder.pooling
        if kind == "rank" and not pooling.rank_steps and pooling.kind != "rank":
            raise ValueError(f"{self._name}: the model compares no texts: it has no classifier")

    def vectors(self, tokens: Sequence[Sequence[int]], kind: PoolingKind, names: Sequence[str]) -> list[Vector]:
        """As `Embedder.vectors`, which ends when this is closed."""
        try:
            return self.embedder.vectors(tokens, kind, lambda: self._closed, names)
        except GenerationCancelled:
            raise Closed(f"{self._name}: the model is closed") from None

    def pair_tokens(self, tokenizer: Tokenizer, query: str, document: str, *, truncate: bool) -> list[int]:
        """The tokens of a query and a document, by the model's template for such, if it has one."""
        template = self._reader.metadata.get("tokenizer.chat_template.rerank")
        if not isinstance(template, str):
            tokens = tokenizer.encode_pair(query, document)
            return self.shortened(tokenizer, tokens) if truncate else tokens
        from qrun.engine.embedding.pairs import fill_pair

        return fill_pair(tokenizer, template, query, document, self._context if truncate else None)

    def shortened(self, tokenizer: Tokenizer | None, tokens: list[int]) -> list[int]:
        """No more tokens than fit, with the one that ends a text."""
        if len(tokens) <= self._context:
            return tokens
        end = tokenizer.end_id if tokenizer is not None else None
        kept = 1 if end is not None and tokens[-1] == end and self._context > 1 else 0
        return [*tokens[: self._context - kept], *tokens[len(tokens) - kept :]]

    def close(self) -> None:
        """Let go of memory; from any thread."""
        self._closed = True
        with self._lock:  # one that is being made has been made then
            if self._made is not None:
                self._made.close()
            del self._graph  # its operations keep the weights mapped

    def _make(self) -> Embedder:
        from qrun.engine.embedding.embedder import Embedder
        from qrun.engine.generation.draft_loading import beside
        from qrun.models.pooling import read_pooling, rows_graph

        pooling = read_pooling(self._reader)
        if self._graph.encoder is not None:
            raise ValueError(f"{self._name}: embeddings of models with an encoder and a decoder are not supported")
        if self._graph.embeds:
            return Embedder(self._runtime, pooling, owned=False)
        return Embedder(beside(self._runtime, rows_graph(self._graph, self._reader)), pooling, owned=True)
