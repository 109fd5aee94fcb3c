"""Answers of `/v1/responses` that are kept in memory for a while, so that a later request can go on from them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from qrun.server.errors import APIError
from qrun.server.exchange import dumps

Item = dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """items: the whole conversation before the answer; response: the answer."""

    items: list[Any]
    response: dict[str, Any]
    n_bytes: int

    @property
    def conversation(self) -> list[Any]:
        """The items with those of the answer."""
        return [*self.items, *self.response["output"]]


class StoredResponses:
    """most: bytes of all of them as JSON, each with its whole conversation. Those that nobody has asked for longest go
    first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._found: OrderedDict[str, Stored] = OrderedDict()
        self._n_bytes = 0

    def keep(self, items: list[Any], response: dict[str, Any], n_bytes: int) -> None:
        """n_bytes: of the items."""
        n_bytes += len(dumps(response))
        self._found[response["id"]] = Stored(items, response, n_bytes)
        self._n_bytes += n_bytes
        while self._n_bytes > self._most:
            self._n_bytes -= self._found.popitem(last=False)[1].n_bytes

    def find(self, id: Any) -> Stored | None:
        found = self._found.get(id) if isinstance(id, str) else None
        if found is not None:
            self._found.move_to_end(id)
        return found

    def get(self, id: str) -> Stored:
        """APIError where there is none of this name."""
        found = self.find(id)
        if found is None:
            raise APIError(f"there is no response {id!r} here: it was not stored, or not so lately", 404,
                           "not_found_error", code="response_not_found")  # fmt: skip
        return found

    def delete(self, id: str) -> None:
        self._n_bytes -= self.get(id).n_bytes
        del self._found[id]
