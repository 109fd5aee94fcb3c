"""Which type each tensor gets, when a whole file may have so many bytes: the choice that loses least.

Every tensor has options, each with bytes and a loss; losses of different tensors add up. That is a knapsack with one
choice for each tensor. For a price of a byte, every tensor by itself takes the option with the least loss plus price of
its bytes; the least price at which all fit is found by halving (Everett's Lagrange multipliers). What is then left of
the bytes goes, step by step, to the tensor that gains most for a byte. The result depends on nothing but the options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qrun.formats import TensorType

HALVINGS = 200


@dataclass(frozen=True)
class Option:
    """A type that a tensor can have, the bytes it takes so, and what is lost."""

    type: TensorType
    n_bytes: int
    loss: float


def undominated(options: Sequence[Option]) -> list[Option]:
    """Those that no other has fewer or as many bytes than, and less loss: by size, losses fall."""
    best: list[Option] = []
    for option in sorted(options, key=lambda each: (each.n_bytes, each.loss, each.type)):
        if not best or option.loss < best[-1].loss:
            best.append(option)
    return best


def least_bytes(tensors: Mapping[str, Sequence[Option]]) -> int:
    """Of the smallest choice."""
    return sum(min(option.n_bytes for option in choices) for choices in tensors.values())


def allocate(tensors: Mapping[str, Sequence[Option]], n_bytes: int) -> dict[str, Option]:
    """An option for each tensor, together no more than n_bytes. Raises ValueError if that cannot be."""
    if (least := least_bytes(tensors)) > n_bytes:
        raise ValueError(f"the smallest choice has {least} bytes")
    options = {name: undominated(choices) for name, choices in tensors.items()}
    chosen = {name: choices[0] for name, choices in options.items()}
    low, high = 0.0, _highest_price(options)
    if _total(free := _at_price(options, 0.0)) <= n_bytes:
        return free
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        tried = _at_price(options, middle)
        if _total(tried) <= n_bytes:
            high, chosen = middle, tried
        else:
            low = middle
    return _fill(options, chosen, n_bytes - _total(chosen))


def _total(chosen: Mapping[str, Option]) -> int:
    return sum(option.n_bytes for option in chosen.values())


def _at_price(options: Mapping[str, Sequence[Option]], price: float) -> dict[str, Option]:
    """Of equally good ones the smaller."""
    return {
        name: min(choices, key=lambda each: (each.loss + price * each.n_bytes, each.n_bytes))
        for name, choices in options.items()
    }


def _highest_price(options: Mapping[str, Sequence[Option]]) -> float:
    """Above it every tensor takes its smallest option."""
    steepest = 0.0
    for choices in options.values():
        for option in choices[1:]:
            steepest = max(steepest, (choices[0].loss - option.loss) / (option.n_bytes - choices[0].n_bytes))
    return 2 * steepest + 1e-300


def _fill(options: Mapping[str, Sequence[Option]], chosen: dict[str, Option], left: int) -> dict[str, Option]:
    """Spend the bytes that are left on what gains most for a byte, as long as something fits."""
    chosen = dict(chosen)
    while True:
        best: tuple[float, str, Option] | None = None
        for name, choices in options.items():
            now = chosen[name]
            for option in choices:
                more = option.n_bytes - now.n_bytes
                if 0 < more <= left:
                    gain = (now.loss - option.loss) / more
                    if best is None or gain > best[0]:
                        best = (gain, name, option)
        if best is None:
            return chosen
        _, name, option = best
        left -= option.n_bytes - chosen[name].n_bytes
        chosen[name] = option
