"""Texts by masked diffusion (LLaDA: arXiv:2502.09992; Dream: arXiv:2508.15487): behind the prompt stand masks, and the
model, which sees the whole text, says again and again what each of them hides. Those that it is surest of are settled.

With blocks, one is filled in after the other; else all of the text at once. A token comes as a piece as soon as it and
all before it are settled.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qrun.engine.errors import GenerationCancelled
from qrun.engine.generation.generation import Generation
from qrun.engine.generation.piece import Piece, Sampled
from qrun.engine.sampling.sampler import largest, probabilities

if TYPE_CHECKING:
    from qrun.engine.program.runtime import Runtime

LENGTH = 128
"""Tokens of a text, where the caller does not say."""
BLOCK = 32
"""Tokens of a block, of models that were trained for blocks."""


@dataclass(frozen=True)
class Diffusion:
    """What a file says of it. mask: the token that stands for what is not known. shifted: the model tells a token in
    the row of the one before it."""

    mask: int
    shifted: bool

    @property
    def block(self) -> int:
        """Tokens of a block; 0 for models that fill in all of a text at once."""
        return 0 if self.shifted else BLOCK


class DiffusionGeneration(Generation):
    """A generation whose tokens are settled in any order. `prompt_progress` counts the looks that the model takes."""

    fills_in = True

    def __init__(self, runtime: Runtime, diffusion: Diffusion, *arguments: Any) -> None:
        """arguments: those of `Generation`."""
        super().__init__(*arguments)
        self._runtime, self._diffusion = runtime, diffusion
        options = self._sampler.options
        room = runtime.context - len(self._prompt)
        wanted = LENGTH if options.max_tokens is None else options.max_tokens
        length = self._length = min(wanted, room)
        self._max_tokens = wanted
        block = diffusion.block if options.diffusion_block is None else options.diffusion_block
        self._block = min(block, length) or length
        steps = length if options.diffusion_steps is None else options.diffusion_steps
        # Blocks share the steps by their lengths; each has at least one, and no more than it has tokens.
        starts = range(0, length, self._block or 1)
        lengths = [min(self._block, length - start) for start in starts]
        self._steps = [min(max(round(steps * one / length), 1), one) for one in lengths]
        self._ids = np.array([*self._prompt, *[diffusion.mask] * length], np.int64)
        self._logprobs: dict[int, tuple[float | None, list[tuple[int, float]] | None]] = {}
        self._random = np.random.Generator(np.random.PCG64(self.seed))
        self._number = 0  # of the block
        self._taken = 0  # steps of the block
        self._looks = 0  # steps in all
        self._given = 0  # tokens that have come as pieces

    @property
    def prompt_progress(self) -> tuple[int, int]:
        """How often the model has looked at the text, and how often it will."""
        return self._looks, sum(self._steps)

    @property
    def _can_share(self) -> bool:
        return False

    def _next_piece(self) -> Piece | None:
        if self._length < 1 and self._max_tokens and not self.cancelled:
            return self._last_piece("context")  # there is no room behind the prompt
        return super()._next_piece()

    def _sample(self) -> None:
        """Take steps until there is a token that can come as a piece."""
        if self._length < 1:
            return
        start = time.perf_counter()
        with suppress(GenerationCancelled):
            while not self._sampled and not self.cancelled:
                self._step()
                if not self._started:
                    self._started = True
                    self._prompt_seconds = time.perf_counter() - start
                self._give()

    def _give(self) -> None:
        """Queue the tokens that are settled, as far as all before them are."""
        n_prompt = self._n_prompt
        while self._given < self._length and self._ids[n_prompt + self._given] != self._diffusion.mask:
            token = int(self._ids[n_prompt + self._given])
            n_free = self._runtime.context - n_prompt - self._given - 1
            logprob, top = self._logprobs.pop(self._given, (None, None))
            self._sampled.append(Sampled(token, logprob, top, n_free))
            self._given += 1

    def _step(self) -> None:
        """One look of the model, after which some masks are settled."""
        first = self._number * self._block
        masked = first + np.flatnonzero(
            self._ids[self._n_prompt + first :][: self._block] == self._diffusion.mask
        )  # counted from the end of the prompt
        places = self._n_prompt + masked
        rows = np.maximum(places - 1, 0) if self._diffusion.shifted else places
        logits = self._runtime.infill(self._ids, rows.tolist(), lambda: self._cancelled, self._adapters)
        logits = logits[:, : self._sampler.n_vocab]
        logits[:, self._diffusion.mask : self._diffusion.mask + 1] = -np.inf  # which settles nothing
        options = self._sampler.options
        left = self._steps[self._number] - self._taken
        n_settled = -(-len(masked) // left)  # the more first where it does not come out even
        tokens: list[int] = []
        sureness = np.empty(len(masked))
        told = []
        for index, row in enumerate(logits):
            token, logprob = self._sampler.sample(row)
            tokens.append(token)
            told.append((logprob, self._sampler.top))
            sureness[index] = self._sureness(row, token, options.diffusion_order)
        for index in np.argsort(-sureness, kind="stable")[:n_settled]:
            self._ids[places[index]] = tokens[index]
            self._logprobs[int(masked[index])] = told[index]
            self._sampler.accept(tokens[index])
        self._taken += 1
        self._looks += 1
        if n_settled >= len(masked):
            self._number += 1
            self._taken = 0

    def _sureness(self, row: np.ndarray, token: int, order: str) -> float:
        """How soon a mask is settled whose row this is."""
        if order == "random":
            return float(self._random.random())
        chances = probabilities(row)
        if order == "entropy":
            seen = chances[chances > 0]
            return float(np.sum(seen * np.log(seen)))
        if order == "margin":
            best = np.sort(chances[largest(row, 2)])
            return float(best[-1] - best[-2]) if len(best) > 1 else 1.0
        return float(chances[token])
