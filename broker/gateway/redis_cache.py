"""Answers kept in Redis, for several gateways. It may be gone, slow or wrong: then there is no answer in it.

A Redis that failed is left alone for ``PAUSE_S`` and then asked by a ping that no call waits for.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable
from typing import Any

import msgspec
import structlog
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from broker.gateway.cache import Recorded, kept
from broker.gateway.policy import CacheStore
from broker.host.tasks import TaskOwner

PAUSE_S = 1.0
PING_TIMEOUT_S = 2.0
MAX_CONNECTIONS = 32
MAX_WRITES = 32
"""Answers on their way to Redis; one more is not kept."""
PREFIX = b"cortex:answer:1:"
_ODD = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
log = structlog.get_logger(__name__)


class _Entry(msgspec.Struct, array_like=True):
    """``key``: what was asked for, so that a reply to another question is not taken for an answer; ``at``: epoch."""

    key: bytes
    at: float
    status: int
    reason: bytes
    headers: list[tuple[bytes, bytes]]
    pieces: list[bytes]
    chunked: bool
    length: int | None


def pack(key: bytes, answer: Recorded, at: float) -> bytes:
    """What Redis keeps."""
    return msgspec.msgpack.encode(
        _Entry(key, at, answer.status, answer.reason, answer.headers, answer.pieces, answer.chunked, answer.length)
    )


def unpack(key: bytes, value: bytes) -> tuple[Recorded, float] | None:
    """The answer and when it was kept; None where it is none to ``key``."""
    try:
        found = msgspec.msgpack.decode(value, type=_Entry)
    except ValueError:
        return None
    if found.key != key or not _sound(found):
        return None
    answer = Recorded(found.status, found.reason, found.headers, found.pieces, found.chunked, found.length)
    return answer, found.at


def _sound(found: _Entry) -> bool:
    """What somebody else wrote there must not become another response, or a second one, on a sandbox's connection."""
    known = [name.lower() for name, _ in found.headers] == [name.lower() for name, _ in kept(found.headers)]
    plain = _ODD.search(b"\t".join([found.reason, *(value for _, value in found.headers)])) is None
    whole = found.chunked == (found.length is None) and found.length in (None, sum(map(len, found.pieces)))
    return found.status == 200 and known and plain and whole


class RedisCache:
    """``get`` and ``put`` never raise."""

    def __init__(self, store: CacheStore, tasks: TaskOwner) -> None:
        self._timeout_s = store.redis_timeout_s
        self._tasks = tasks
        self._clock = asyncio.get_running_loop().time
        # One try, within our own deadline; no word about ourselves ahead, which would cost two round trips.
        self._pool = BlockingConnectionPool.from_url(
            store.redis_url,
            max_connections=MAX_CONNECTIONS,
            timeout=self._timeout_s,
            socket_timeout=PING_TIMEOUT_S,
            socket_connect_timeout=PING_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            driver_info=None,
            protocol=2,
            **({"password": store.redis_password} if store.redis_password else {}),
        )
        self._redis = Redis.from_pool(self._pool)
        self._up = True
        self._again_at = 0.0
        self._writes = 0
        self._trouble = ""
        self.errors = 0

    async def get(self, key: bytes) -> tuple[Recorded, float] | None:
        """The answer and its age by the wall clock."""
        if not self._usable():
            return None
        value = await self._ask(self._redis.get(PREFIX + key.hex().encode()), self._timeout_s)
        found = unpack(key, value) if isinstance(value, bytes) else None
        return None if found is None else (found[0], max(0.0, time.time() - found[1]))

    def put(self, key: bytes, answer: Recorded, ttl: float) -> bool:
        """Sends it without waiting; False: not now."""
        if self._writes >= MAX_WRITES or not self._usable():
            return False
        self._writes += 1
        self._tasks.start(self._put(key, answer, ttl), "cache_put")
        return True

    async def _put(self, key: bytes, answer: Recorded, ttl: float) -> None:
        try:
            value = pack(key, answer, time.time())
            name = PREFIX + key.hex().encode()
            await self._ask(self._redis.set(name, value, px=max(1, int(ttl * 1000))), self._timeout_s)
        finally:
            self._writes -= 1

    # -- its health

    def _usable(self) -> bool:
        if not self._up and self._clock() >= self._again_at:
            self._again_at = self._clock() + PAUSE_S + PING_TIMEOUT_S
            self._tasks.start(self._ping(), "cache_ping")
        return self._up

    async def _ping(self) -> None:
        if await self._ask(self._redis.ping(), PING_TIMEOUT_S):
            self._up = True
            self._trouble = ""
            log.info("redis_back")

    async def _ask(self, command: Awaitable[Any], timeout_s: float) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await command
        except ResponseError as error:
            # It lives, and does not want this: out of memory, no permission.
            self._say("redis_refuses", error)
        except (RedisError, OSError) as error:
            self._up = False
            self._again_at = self._clock() + PAUSE_S
            self._say("redis_gone", error)
        return None

    def _say(self, event: str, error: Exception) -> None:
        """Once for each kind of trouble."""
        self.errors += 1
        trouble = f"{type(error).__name__}: {error}"[:200]
        if event not in self._trouble:
            log.warning(event, error=trouble, hint="answers are not kept meanwhile; see gateway.cache")
        self._trouble = f"{event}: {trouble}"

    def view(self) -> dict[str, Any]:
        """Whether it is there."""
        return {"redis": "up" if self._up else "down", "redis_errors": self.errors, "redis_trouble": self._trouble}

    async def close(self) -> None:
        await self._redis.aclose()
        await self._pool.aclose()
