"""Answers given before, for equal requests: kept in memory or in Redis, recorded from what passes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from broker.gateway import cache
from broker.gateway.cache import Lru, Recorded
from broker.gateway.caller import Endpoint
from broker.gateway.complete import complete
from broker.gateway.heads import Headers, ResponseHead
from broker.gateway.policy import CacheRule, CacheStore
from broker.gateway.prewarm import Loaded, load, warm_key
from broker.host.tasks import TaskOwner

if TYPE_CHECKING:
    from broker.gateway.redis_cache import RedisCache

MAX_NAMED = 20
"""Bad lines of a file that are named in the log."""
log = structlog.get_logger(__name__)


class Responses:
    """One of a gateway process. ``hit`` costs no waiting; where ``asynchronous``, ask ``get`` when it finds none."""

    def __init__(self, store: CacheStore, tasks: TaskOwner, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock or asyncio.get_running_loop().time
        self._memory = Lru(store.max_bytes)
        self._redis: RedisCache | None = None
        if store.backend == "redis":
            # 10 MB and 0.2 s that only those pay who use it.
            from broker.gateway.redis_cache import RedisCache

            try:
                self._redis = RedisCache(store, tasks)
            except ValueError:
                # Its words could hold the URL, and the URL a password.
                log.error("redis_url_malformed", hint="answers are kept in memory; correct gateway.cache.redis_url")
        self.asynchronous = self._redis is not None
        self._written: dict[str, tuple[float, dict[bytes, Recorded]]] = {}
        self.hits = self.misses = self.stored = 0

    # -- looking up

    def wants(self, rule: CacheRule, endpoint: Endpoint, method: bytes) -> bool:
        """The request may be one to answer from here; its body tells."""
        return cache.wants(rule, endpoint, method)

    def key(
        self, rule: CacheRule, provider: str, scope: str, endpoint: Endpoint, method: bytes, target: bytes,
        headers: Headers, body: bytes,
    ) -> bytes | None:  # fmt: skip
        """None: not to be shared. ``target``: behind the provider's name; ``scope``: names the credential that the
        call is made with, whoever brings it; ``headers``: of the client's, those that go on."""
        question = cache.asked(rule, endpoint, method, target, body)
        said = cache.said(headers)
        if question is None or said is None:
            return None
        if provider in self._written:
            key = warm_key(provider, question)
            if key in self._written[provider][1]:
                return key
        return cache.digest(provider.encode(), scope.encode(), question, *said)

    def hit(self, key: bytes) -> Recorded | None:
        """The answer, if it is here; with ``x-cortex-cache`` and ``age``."""
        now = self._clock()
        found = self._memory.get(key, now)
        if found is None:
            found = next(((each[key], now - since) for since, each in self._written.values() if key in each), None)
        if found is None:
            self.misses += not self.asynchronous
            return None
        self.hits += 1
        return found[0].marked(b"hit", found[1])

    async def get(self, key: bytes) -> Recorded | None:
        """As ``hit``, wherever answers are kept. Never raises."""
        here = self.hit(key)
        if here is not None or self._redis is None:
            return here
        found = await self._redis.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        return found[0].marked(b"hit", found[1])

    async def prewarm(self, provider: str, rule: CacheRule) -> Loaded:
        """Reads the rule's file, if it has one; its answers stay, and replace those read for ``provider`` before."""
        loaded = Loaded()
        if rule.enabled and rule.prewarm_file:
            try:
                loaded = await asyncio.to_thread(load, Path(rule.prewarm_file), provider, rule, self._memory.max_bytes)
            except OSError as error:
                loaded.bad.append(error.strerror or str(error))
        if loaded.bad:
            log.warning(
                "prewarm_skipped", provider=provider, file=rule.prewarm_file, lines=loaded.bad[:MAX_NAMED],
                skipped=len(loaded.bad),
            )  # fmt: skip
        self._written.pop(provider, None)
        if loaded.answers:
            self._written[provider] = (self._clock(), loaded.answers)
        return loaded

    # -- recording

    def recorder(self, rule: CacheRule, endpoint: Endpoint, key: bytes) -> Recorder:
        """For the answer to the request of that key."""
        ttl = cache.ttl_s(rule, endpoint)
        return Recorder(lambda answer: self._keep(key, answer, ttl), rule.max_entry_bytes)

    def _keep(self, key: bytes, answer: Recorded, ttl: float) -> None:
        if self._redis is not None:
            self.stored += self._redis.put(key, answer, ttl)
        else:
            self.stored += self._memory.put(key, answer, self._clock(), ttl)

    def view(self) -> dict[str, Any]:
        """What there is and how it went."""
        return {
            "backend": "memory" if self._redis is None else "redis",
            "hits": self.hits,
            "misses": self.misses,
            "stored": self.stored,
            "entries": len(self._memory),
            "bytes": self._memory.size,
            "written": sum(len(answers) for _, answers in self._written.values()),
        } | ({} if self._redis is None else self._redis.view())

    async def close(self) -> None:
        """Lets go of Redis."""
        if self._redis is not None:
            await self._redis.close()


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
