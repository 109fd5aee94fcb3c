"""Stand-ins for the parts below the library: a vocabulary of letters, and a runtime whose logits follow a rule."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from qrun.engine.errors import ContextOverflow, GenerationCancelled
from qrun.engine.generation.session import Host, Session
from qrun.engine.generation.token_cache import TokenCache
from qrun.engine.program.runtime import Part
from qrun.engine.sampling.options import SamplingOptions

BOS, EOS = 0, 1
# Pieces of one byte each, so that "é" takes two tokens, and some longer ones.
PIECES = [b"<s>", b"</s>", *(bytes([i]) for i in range(256)), b"the", b"END", b"N", b"xEN", b"D!"]


def ids_of(text: str) -> list[int]:
    return [2 + byte for byte in text.encode()]


class FakeDecoder:
    def __init__(self) -> None:
        self.rest = b""

    def push(self, id: int) -> str:
        self.rest += PIECES[id]
        for cut in range(len(self.rest), -1, -1):
            try:
                text = self.rest[:cut].decode()
            except UnicodeDecodeError:
                continue
            self.rest = self.rest[cut:]
            return text
        raise AssertionError

    def flush(self) -> str:
        text, self.rest = self.rest.decode("utf-8", "replace"), b""
        return text


class FakeTokenizer:
    n_vocab = len(PIECES)
    bos_id: int | None = BOS
    eos_id = EOS
    add_bos = False
    stop_ids = frozenset({EOS})
    end_id: int | None = None

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        start = [BOS] if add_special and self.add_bos else []
        if parse_special and text.startswith("<s>"):
            return [*start, BOS, *ids_of(text[3:])]
        return start + ids_of(text)

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        return b"".join(PIECES[id] for id in ids).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        return PIECES[id]

    control_ids = frozenset({BOS, EOS})

    def all_bytes(self) -> list[bytes]:
        return [self.token_bytes(id) for id in range(self.n_vocab)]

    def encode_further(self, text: str, parse_special: bool = False) -> list[int]:
        return self.encode(text, add_special=False, parse_special=parse_special)

    def stream(
        self, skip_special: bool = False, after: Sequence[int] = (), *, at_start: bool = False
    ) -> FakeDecoder:
        return FakeDecoder()


class FakeSequence:
    """Tokens stand for their keys and values. With a window, what was given back cannot be returned to."""

    keeps_state = has_windows = source_read = False
    adapters: tuple[tuple[int, float], ...] = ()
    source: tuple[int, ...] = ()
    n_source_read = 0

    def __init__(self, runtime: FakeRuntime, held: Sequence[int] = ()) -> None:
        self.runtime = runtime
        self.held = list(held)
        self.closed = False
        self.row = np.empty(runtime.n_vocab, np.float32)  # logits, which the next evaluation overwrites
        runtime.sequences.append(self)

    @property
    def n_past(self) -> int:
        return len(self.held)

    def returnable(self, after: int | None = None) -> int:
        return self.runtime.context - (self.n_past + 1 if after is None else after)

    def mark(self) -> None:
        pass

    def answer(self, source: tuple[int, ...]) -> None:
        assert not source

    def returns_to(self, n: int) -> int:
        if self.runtime.window is not None and n < len(self.held) - self.runtime.window:
            return 0
        return min(n, len(self.held))

    def truncate(self, n: int) -> int:
        assert not self.closed
        del self.held[self.returns_to(n) :]
        return len(self.held)

    def fork(self) -> FakeSequence:
        assert not self.closed
        return FakeSequence(self.runtime, self.held)

    def state(self) -> dict[str, np.ndarray]:
        keys = np.array(self.held, np.float16).reshape(-1, 1)
        return {"keys": keys, "n_past": np.array(len(self.held)), "columns": np.asfortranarray(np.ones((2, 3)))}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        if state["keys"].shape != (int(state["n_past"]), 1) or state["columns"].shape != (2, 3):
            raise ValueError("the arrays have other shapes")
        self.held = state["keys"][:, 0].astype(int).tolist()

    def close(self) -> None:
        self.closed = True


class FakeRuntime:
    """After any text, the likeliest token is what `rule` makes of all tokens so far; the others follow at random."""

    cache_bytes = context_bytes = 0
    cache_type = "f16"
    threads = 1
    causal = True
    start: int | None = None

    def __init__(
        self,
        rule: Callable[[list[int]], int] = lambda held: ids_of("the quick brown fox. ")[len(held) % 21],
        context: int = 200,
        batch: int = 8,
        n_vocab: int = len(PIECES) + 3,
        window: int | None = None,
    ) -> None:
        self.rule = rule
        self.context = context
        self.batch = batch
        self.n_vocab = n_vocab
        self.window = window
        self.evaluated: list[list[int]] = []  # the tokens of each call
        self.n_logits = 0  # rows of logits that were asked for
        self.sequences: list[FakeSequence] = []
        self.closed = False
        self.on_batch: Callable[[], Any] = lambda: None
        self.lock = threading.Lock()
        self.graph = SimpleNamespace(architecture="llama")

    def check_not_stepping(self) -> None:
        pass

    def sequence(self) -> FakeSequence:
        assert not self.closed
        return FakeSequence(self)

    def peaks_of(self, row: np.ndarray) -> None:
        return None

    def progress(self, sequence: FakeSequence) -> int:
        return sequence.n_past

    def logits_after(self, held: list[int]) -> np.ndarray:
        logits = np.random.default_rng(held[-3:]).standard_normal(self.n_vocab).astype(np.float32)
        logits[self.rule(held)] = 6
        return logits

    def evaluate(
        self,
        sequence: FakeSequence,
        tokens: Sequence[int],
        logits: str = "last",
        cancelled: Callable[[], bool] | None = None,
        *,
        counted: bool = True,
    ) -> np.ndarray:
        assert not self.closed and not sequence.closed and tokens
        if sequence.n_past + len(tokens) > self.context:
            raise ContextOverflow("too long")
        rows = []
        with self.lock:
            self.evaluated.append(list(tokens))
            self.n_logits += counted * {"none": 0, "last": 1, "all": len(tokens)}[logits]
        for start in range(0, len(tokens), self.batch):
            if cancelled and cancelled():
                raise GenerationCancelled
            for token in tokens[start : start + self.batch]:
                sequence.held.append(token)
                if logits == "all":
                    rows.append(self.logits_after(sequence.held))
            self.on_batch()
        if logits == "all":
            return np.array(rows)
        sequence.row[:] = self.logits_after(sequence.held)
        return sequence.row

    def bytes_of(self, n: int, source: int | None = None) -> int:
        return 0

    def step(self, parts: Sequence[Part], cancelled: Callable[[], bool] | None = None) -> list[np.ndarray]:
        results = []
        for part in parts:
            rows = np.atleast_2d(self.evaluate(part.sequence, part.tokens, "all", cancelled, counted=False))
            results.append(rows[{"all": 0, "last": len(rows) - 1, "none": len(rows)}[part.logits] :].copy())
            self.n_logits += len(results[-1])
        return results

    def close(self) -> None:
        assert all(sequence.closed for sequence in self.sequences)
        self.closed = True


def speaking(*script: int, then: int = EOS) -> Callable[[list[int]], int]:
    """A rule: the token of the script that follows as many as come after the last ">" of the text, then `then`."""
    start = ids_of(">")[0]

    def rule(held: list[int]) -> int:
        said = held[::-1].index(start) if start in held else 0
        return script[said] if said < len(script) else then

    return rule


def make_session(
    runtime: FakeRuntime | None = None, tokenizer: Any = None, fingerprint: str = "model", **defaults: Any
) -> Session:
    host = Host(
        runtime or FakeRuntime(),  # type: ignore[arg-type]
        FakeTokenizer() if tokenizer is None else tokenizer or None,
        SamplingOptions(**{"temperature": 0} | defaults),
        lambda: fingerprint,
    )
    return Session(host)


def cache_of(session: Session) -> TokenCache:
    return session._cache
