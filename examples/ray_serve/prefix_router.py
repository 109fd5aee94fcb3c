"""Sends a request to the replica that has the longest beginning of its text in its cache.

Ray Serve asks a router for replicas, most wanted first. Where loads are alike, that is the one that has read most of
the request before; where they differ, or none has read a tenth, two are drawn, and Ray takes the one with fewer
requests.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

MOST = 200_000  # blocks that are remembered: some 25 million characters


class PrefixRouter(RequestRouter):
    """For a deployment whose methods take `blocks` of the request as their first argument: see serve_models.py."""

    def initialize_state(self, most_apart: int = 4, least_share: float = 0.1) -> None:
        """most_apart: by how many requests loads may differ and yet be alike. least_share: of a text, that has to be
        known for a replica to be preferred."""
        self._most_apart, self._least_share = most_apart, least_share
        self._readers: OrderedDict[int, ReplicaID] = OrderedDict()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        drawn = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        loads = [self.replica_queue_len_cache.get(one.replica_id) or 0 for one in candidate_replicas]
        if pending_request is None or not pending_request.args or max(loads) - min(loads) > self._most_apart:
            return [drawn]
        numbers = pending_request.args[0]
        by_id = {one.replica_id: one for one in candidate_replicas}
        for known in range(len(numbers), 0, -1):
            reader = self._readers.get(numbers[known - 1])
            if reader in by_id and known >= self._least_share * len(numbers):
                return [[by_id[reader]], drawn]
        return [drawn]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        for number in pending_request.args[0] if pending_request.args else ():
            self._readers.pop(number, None)
            self._readers[number] = replica_id
        while len(self._readers) > MOST:
            self._readers.popitem(last=False)
