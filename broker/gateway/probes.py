"""Health probes: each server of a provider is asked for a path now and then, and its breaker told."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import structlog

from broker.errors import Code, CortexError
from broker.gateway.balance import Balance
from broker.gateway.fetch import fetch
from broker.gateway.routes import Origin
from broker.gateway.upstream import Pool
from broker.host.tasks import TaskOwner

TIMEOUT_S = 5.0
MAX_BYTES = 2**20
log = structlog.get_logger(__name__)


class Probes:
    """``spots``: origin and base path of the servers, in ``balance``'s order; ``headers``: ready lines, a credential's
    among them. Any answer below 500 is a sign of life."""

    def __init__(
        self, balance: Balance, spots: Sequence[tuple[Origin, bytes]], path: str, interval_s: float, pool: Pool,
        tasks: TaskOwner, headers: bytes = b"",
    ) -> None:  # fmt: skip
        self._balance = balance
        self._spots = spots
        self._path = path.encode()
        self._interval_s = interval_s
        self._pool = pool
        self._owner = tasks
        self._headers = headers
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        for index in range(len(self._spots)):
            self._tasks.append(self._owner.start(self._watch(index), "probe"))

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _watch(self, index: int) -> None:
        was = True
        # Spread out, so that servers and gateways are not asked all at once.
        await asyncio.sleep(min(1.0, self._interval_s) * random.random())
        while True:
            alive, why = await self._look(*self._spots[index])
            if alive is not None:
                self._balance.told(index, asyncio.get_running_loop().time(), alive)
                if alive != was:
                    level = log.info if alive else log.warning
                    level("server_alive" if alive else "server_unwell", server=self._spots[index][0].authority, why=why)
                was = alive
            await asyncio.sleep(self._interval_s * random.uniform(0.9, 1.1))

    async def _look(self, origin: Origin, base_path: bytes) -> tuple[bool | None, str]:
        """Whether it lives, None where that cannot be said, and why."""
        lines = b"host: %s\r\naccept: */*\r\n%s" % (origin.authority.encode(), self._headers)
        try:
            answer = await fetch(
                self._pool, origin, b"GET", base_path + self._path, lines, b"",
                timeout_s=min(TIMEOUT_S, self._interval_s), max_bytes=MAX_BYTES,
            )  # fmt: skip
        except CortexError as error:
            # All of its connections in use is no illness.
            return None if error.code is Code.UPSTREAM_BUSY else False, str(error)
        return answer.status < 500, f"HTTP {answer.status}"
