"""Which replica gets a request: the one that got its prompt before, unless that is much busier than the others."""

from __future__ import annotations

import hashlib
import math
import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from .forwarded import Forwarded

__all__ = ["PromptRouter", "order_of_preference"]

# A replica takes this many times the mean number of requests before others get those of its prompts.
_IMBALANCE = 1.25
# Fewer requests than this never make a replica too busy: requests of one prompt are cheaper together.
_FEW = 4


class PromptRouter(RequestRouter):
    """Consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018), by the key of a prompt.

    Replicas are ranked for a key by rendezvous hashing (Thaler and Ravishankar, 1998): a replica that comes or goes
    moves no other replica's prompts.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas, to be tried in this order."""
        key = _key(pending_request)
        if not candidate_replicas:
            return []
        if not key:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        ids = [replica.replica_id.unique_id for replica in candidate_replicas]
        waiting = [self.replica_queue_len_cache.get(replica.replica_id) or 0 for replica in candidate_replicas]
        # A group of two would go to the less busy one of them.
        return [[candidate_replicas[i]] for i in order_of_preference(key, ids, waiting)]


def order_of_preference(key: bytes, ids: list[str], waiting: list[int]) -> list[int]:
    """The positions of replicas, the one first that should get a request.

    Args:
        key: of its prompt.
        ids: names of the replicas.
        waiting: number of requests that each of them has.
    """

    def weight(i: int) -> bytes:
        return hashlib.blake2b(ids[i].encode(), key=key, digest_size=8).digest()

    most = max(_FEW, math.ceil(_IMBALANCE * (sum(waiting) + 1) / len(ids)))
    ranked = sorted(range(len(ids)), key=weight, reverse=True)
    # The sort is stable: within both halves the preference stays.
    return sorted(ranked, key=lambda i: waiting[i] >= most)


def _key(pending: PendingRequest | None) -> bytes:
    request = pending.args[0] if pending is not None and pending.args else None
    return request.key if isinstance(request, Forwarded) else b""
