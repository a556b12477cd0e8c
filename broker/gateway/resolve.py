"""Names to addresses, in threads of its own: one look-up a name at a time, bounded, with a deadline, cached.

A look-up cannot be broken off: a name whose server is slow takes up a thread for seconds. So of each sandbox few
are under way, and fewer in threads.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from broker.errors import Code, CortexError
from broker.gateway.answers import too_many_names
from broker.gateway.lines import Job, Lines
from broker.host.tasks import TaskOwner

THREADS = 8
SHARE = 2
"""Threads that look up names of one sandbox at once."""
MAX_LOOKUPS = 64
MAX_OF_ONE = 8
"""Of them for one sandbox, those included that wait for a thread."""
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


class _Pending(NamedTuple):
    """A look-up under way. ``whose``: the sandbox that came first."""

    task: asyncio.Task[list[str]]
    job: Job
    whose: str


class Resolver:
    """``timeout_s`` gives the deadline of a look-up (``gateway.dns_timeout_s``). ``serve_stale``: an answer past its
    time is given at once and renewed behind it (RFC 8767), for names that operators chose."""

    def __init__(self, tasks: TaskOwner, timeout_s: Callable[[], float], *, serve_stale: bool = False) -> None:
        self._tasks = tasks
        self._timeout_s = timeout_s
        self._serve_stale = serve_stale
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="dns")
        self._lines = Lines(THREADS, SHARE)
        self._pending: dict[str, _Pending] = {}
        self._cache: dict[str, _Entry] = {}

    async def addresses(self, host: str, whose: str = "") -> list[str]:
        """The addresses of a name or a literal, best first; ``whose``: the sandbox that asks, "": none does. Raises
        ``UPSTREAM_UNREACHABLE``, or ``EGRESS_LIMIT`` where the sandbox has asked for too many."""
        return (await self.answer(host, whose)).addresses

    async def answer(self, host: str, whose: str = "") -> Answer:
        """The same, and whether a newer answer is worth asking for."""
        now = asyncio.get_running_loop().time()
        known = self._cache.get(host)
        if known is None or known.until + STALE_S <= now:
            return Answer(await self.renewed(host, whose))
        if known.until > now:
            return Answer(known.addresses)
        if self._serve_stale:
            self._renew_behind(host, known, now)
            return Answer(known.addresses, True)
        try:
            return Answer(await self.renewed(host, whose))
        except CortexError:
            return Answer(known.addresses)

    def _renew_behind(self, host: str, known: _Entry, now: float) -> None:
        if known.renew_at <= now and host not in self._pending and len(self._pending) < MAX_LOOKUPS:
            known.renew_at = now + RENEW_S
            self._start(host, "")

    async def renewed(self, host: str, whose: str = "") -> list[str]:
        """Looked up now, whatever is known. Raises as ``addresses``."""
        pending = self._pending.get(host)
        if pending is None:
            if whose and sum(each.whose == whose for each in self._pending.values()) >= MAX_OF_ONE:
                raise too_many_names(MAX_OF_ONE)
            if len(self._pending) >= MAX_LOOKUPS:
                raise _failed(host, "too many look-ups at once")
            pending = self._start(host, whose)
        else:
            # It does not wait for the turn of whoever asked first.
            self._lines.enter(pending.job, whose)
        try:
            return await asyncio.wait_for(asyncio.shield(pending.task), self._timeout_s())
        except TimeoutError as error:
            raise _failed(host, "the look-up took too long") from error
        except OSError as error:
            raise _failed(host, "the name was not found") from error

    def _start(self, host: str, whose: str) -> _Pending:
        job = Job()
        task = self._tasks.start(self._look_up(host, job), "resolve", on_error=_ignore)
        pending = self._pending[host] = _Pending(task, job, whose)
        task.add_done_callback(lambda _: self._forget(host, job))
        self._lines.enter(job, whose)
        return pending

    def _forget(self, host: str, job: Job) -> None:
        self._pending.pop(host, None)
        self._lines.leave(job)

    async def _look_up(self, host: str, job: Job) -> list[str]:
        loop = asyncio.get_running_loop()
        await job.place
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
