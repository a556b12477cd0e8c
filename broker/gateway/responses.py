"""Answers given before, for equal requests: kept in memory or in Redis, recorded from what passes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from broker.gateway import cache
from broker.gateway.cache import Lru, Recorded
from broker.gateway.caller import Endpoint
from broker.gateway.complete import complete
from broker.gateway.heads import Headers, ResponseHead
from broker.gateway.policy import CacheRule, CacheStore
from broker.host.tasks import TaskOwner


class Responses:
    """One of a gateway process. ``hit`` costs no waiting; where ``asynchronous``, ask ``get`` when it finds none."""

    def __init__(self, store: CacheStore, tasks: TaskOwner, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock or asyncio.get_running_loop().time
        self._tasks = tasks
        self._memory = Lru(store.max_bytes)
        self.asynchronous = False
        self.hits = self.misses = self.stored = 0

    # -- looking up

    def wants(self, rule: CacheRule, endpoint: Endpoint, method: bytes) -> bool:
        """The request may be one to answer from here; its body tells."""
        return cache.wants(rule, endpoint, method)

    def key(
        self, rule: CacheRule, provider: str, scope: str, endpoint: Endpoint, method: bytes, target: bytes,
        headers: Headers, body: bytes,
    ) -> bytes | None:  # fmt: skip
        """None: not to be shared. ``target``: behind the provider's name; ``scope``: names the credential."""
        return cache.request_key(rule, provider, scope, endpoint, method, target, headers, body)

    def hit(self, key: bytes) -> Recorded | None:
        """The answer, if it is here; with ``x-cortex-cache`` and ``age``."""
        found = self._memory.get(key, self._clock())
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        return found[0].marked(b"hit", found[1])

    async def get(self, key: bytes) -> Recorded | None:
        """As ``hit``, wherever answers are kept. Never raises."""
        return self.hit(key)

    # -- recording

    def recorder(self, rule: CacheRule, endpoint: Endpoint, key: bytes) -> Recorder:
        """For the answer to the request of that key."""
        ttl = cache.ttl_s(rule, endpoint)
        return Recorder(lambda answer: self._keep(key, answer, ttl), rule.max_entry_bytes)

    def _keep(self, key: bytes, answer: Recorded, ttl: float) -> None:
        if self._memory.put(key, answer, self._clock(), ttl):
            self.stored += 1

    def view(self) -> dict[str, Any]:
        """What there is and how it went."""
        return {
            "backend": "memory",
            "hits": self.hits,
            "misses": self.misses,
            "stored": self.stored,
            "entries": len(self._memory),
            "bytes": self._memory.size,
        }

    async def close(self) -> None:
        """Nothing is kept any more."""


class Recorder:
    """Takes an answer down as it passes; only one that is whole and no failure is kept."""

    __slots__ = ("_answer", "_keep", "_left")

    def __init__(self, keep: Callable[[Recorded], None], max_bytes: int) -> None:
        self._keep = keep
        self._left = max_bytes
        self._answer: Recorded | None = None

    def head(self, head: ResponseHead) -> None:
        """The final head."""
        if head.status == 200 and (head.length is None or head.length <= self._left):
            self._answer = cache.recorded(head)

    def body(self, pieces: list[bytes]) -> None:
        if self._answer is None:
            return
        self._left -= sum(map(len, pieces))
        if self._left < 0:
            self._answer = None
        else:
            self._answer.pieces += pieces

    def end(self) -> None:
        """The body came to its end."""
        answer, self._answer = self._answer, None
        if answer is None or not complete(answer):
            return
        if not answer.chunked:
            answer.pieces = [b"".join(answer.pieces)]
            answer.length = len(answer.pieces[0])
        self._keep(answer)

    def spoil(self) -> None:
        """It did not."""
        self._answer = None
