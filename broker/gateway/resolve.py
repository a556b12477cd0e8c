"""Names to addresses, in threads of its own: one look-up a name at a time, bounded, with a deadline, cached."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner

THREADS = 8
MAX_LOOKUPS = 64
MAX_CACHED = 1024
TTL_S = 30.0
STALE_S = 3600.0
"""How long past its time an answer will do, where there is no newer one to be had."""
RENEW_S = 1.0
"""Least time between two look-ups behind an answer that is past its time."""


class Answer(NamedTuple):
    """``renewing``: past its time, and a newer one is on its way."""

    addresses: list[str]
    renewing: bool = False


class _Entry:
    __slots__ = ("addresses", "renew_at", "until")

    def __init__(self, addresses: list[str], until: float) -> None:
        self.addresses = addresses
        self.until = until
        self.renew_at = until


class Resolver:
    """``timeout_s`` gives the deadline of a look-up (``gateway.dns_timeout_s``). ``serve_stale``: an answer past its
    time is given at once and renewed behind it (RFC 8767), for names that operators chose."""

    def __init__(self, tasks: TaskOwner, timeout_s: Callable[[], float], *, serve_stale: bool = False) -> None:
        self._tasks = tasks
        self._timeout_s = timeout_s
        self._serve_stale = serve_stale
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="dns")
        self._pending: dict[str, asyncio.Task[list[str]]] = {}
        self._cache: dict[str, _Entry] = {}

    async def addresses(self, host: str) -> list[str]:
        """The addresses of a name or a literal, best first. Raises ``UPSTREAM_UNREACHABLE``."""
        return (await self.answer(host)).addresses

    async def answer(self, host: str) -> Answer:
        """The same, and whether a newer answer is worth asking for."""
        now = asyncio.get_running_loop().time()
        known = self._cache.get(host)
        if known is None or known.until + STALE_S <= now:
            return Answer(await self.renewed(host))
        if known.until > now:
            return Answer(known.addresses)
        if self._serve_stale:
            self._renew_behind(host, known, now)
            return Answer(known.addresses, True)
        try:
            return Answer(await self.renewed(host))
        except CortexError:
            return Answer(known.addresses)

    def _renew_behind(self, host: str, known: _Entry, now: float) -> None:
        if known.renew_at <= now and host not in self._pending and len(self._pending) < MAX_LOOKUPS:
            known.renew_at = now + RENEW_S
            self._start(host)

    async def renewed(self, host: str) -> list[str]:
        """Looked up now, whatever is known. Raises ``UPSTREAM_UNREACHABLE``."""
        task = self._pending.get(host)
        if task is None:
            if len(self._pending) >= MAX_LOOKUPS:
                raise _failed(host, "too many look-ups at once")
            task = self._start(host)
        try:
            return await asyncio.wait_for(asyncio.shield(task), self._timeout_s())
        except TimeoutError as error:
            raise _failed(host, "the look-up took too long") from error
        except OSError as error:
            raise _failed(host, "the name was not found") from error

    def _start(self, host: str) -> asyncio.Task[list[str]]:
        task = self._tasks.start(self._look_up(host), "resolve", on_error=_ignore)
        self._pending[host] = task
        task.add_done_callback(lambda _: self._pending.pop(host, None))
        return task

    async def _look_up(self, host: str) -> list[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._threads, _getaddrinfo, host)
        if len(self._cache) >= MAX_CACHED:
            self._cache.clear()
        self._cache[host] = _Entry(found, loop.time() + TTL_S)
        return found

    def close(self) -> None:
        """Lets the threads go; a look-up that hangs is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _getaddrinfo(host: str) -> list[str]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _failed(host: str, cause: str) -> CortexError:
    return CortexError(
        Code.UPSTREAM_UNREACHABLE,
        f"{host} could not be resolved",
        cause=cause,
        hint="check the name, and the DNS of the host that runs the gateway",
    )


def _ignore(error: BaseException) -> None:
    """Each waiter hears of it."""
