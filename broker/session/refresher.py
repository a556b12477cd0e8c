"""Renews users' token sets: before they expire, one request at a time for each, the new set durable before it is used.

Only those of users whose sessions run are looked after; another one is renewed when its user comes.
A provider may take a refresh token back when it has given the next: a broker that is killed between
that answer and its commit loses both, and the user signs in again. That moment is the residual.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections.abc import Awaitable, Callable, Mapping

import structlog

from broker.config import Config, OAuthConfig
from broker.errors import CortexError
from broker.host.tasks import TaskOwner
from broker.metrics import CREDENTIAL_REFRESHES
from broker.session.oauth import RefreshError, Schedule, TokenEndpoint, pause_s, renewed
from broker.store.vault import Entry, Facts, Secret, Vault

AT_ONCE = 8
"""Requests under way, over all users: a restart finds many token sets due."""
LOOK_S = 60.0
"""Longest time between looks, so that a clock that jumps is noticed."""
SPENT_S = 10.0
"""A token that lives no longer than this counts as expired: it would not outlive the call it is for."""
STORE_AGAIN_S = 2.0
FINISH_S = 5.0
log = structlog.get_logger(__name__)

Key = tuple[str, str]


class Refresher:
    """``changed`` has the sessions of a user take what is stored now; ``awake``: whether the user has one that runs;
    ``clock``: seconds since the epoch."""

    def __init__(
        self,
        vault: Vault,
        config: Callable[[], Config],
        *,
        changed: Callable[[str], Awaitable[object]],
        awake: Callable[[str], bool],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._vault = vault
        self._config = config
        self._changed = changed
        self._awake = awake
        self._clock = clock
        self._endpoint = TokenEndpoint()
        self._tasks = TaskOwner("refresher")
        self._flights: dict[Key, asyncio.Task[None]] = {}
        self._room = asyncio.Semaphore(AT_ONCE)
        self._queue: list[tuple[float, Key]] = []
        self._queued: dict[Key, float] = {}
        self._news = asyncio.Event()

    def start(self) -> None:
        """Begins to renew ahead of time."""
        self._tasks.start(self._run(), "look")

    async def current(self, entry: Entry) -> Entry:
        """The token set to use now in the place of ``entry``; never raises for a renewal that fails.

        One that has expired is renewed first, one that is due meanwhile.
        """
        facts = entry.facts
        if self._oauth(entry) is None:
            return entry
        self._look_after(facts)
        now = self._clock()
        if now < self._schedule.next_try(facts, now):
            return entry
        flight = self._flight(facts)
        if now >= facts.expires_at - SPENT_S:
            await asyncio.wait((flight,), timeout=self._config().vault.refresh_timeout_s)
            return await self._vault.get(facts.user, facts.provider) or entry
        return entry

    @property
    def _schedule(self) -> Schedule:
        return Schedule(self._config().vault.refresh_ahead_s)

    def _oauth(self, entry: Entry) -> OAuthConfig | None:
        """How its provider renews it; None where it cannot be renewed, or need not."""
        provider = self._config().gateway.providers.get(entry.facts.provider)
        value = entry.secret.value
        if provider is None or not provider.oauth.token_url or entry.secret.kind != "oauth":
            return None
        renewable = isinstance(value, Mapping) and value.get("refresh_token") and entry.secret.expires_at
        return provider.oauth if renewable else None

    # -- ahead of time -------------------------------------------------------------------------

    def _look_after(self, facts: Facts) -> None:
        """Has ``look`` come to it in time."""
        self._enqueue((facts.user, facts.provider), self._schedule.next_try(facts, self._clock()))

    def _enqueue(self, key: Key, at: float) -> None:
        if at < self._queued.get(key, float("inf")):
            self._queued[key] = at
            heapq.heappush(self._queue, (at, key))
            self._news.set()

    async def _run(self) -> None:
        while True:
            await self.look()
            wait = min(LOOK_S, max(0.0, self._queue[0][0] - self._clock())) if self._queue else LOOK_S
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), wait)
            except TimeoutError:
                continue

    async def look(self) -> None:
        """Begins to renew what is due now."""
        while self._queue and self._queue[0][0] <= self._clock():
            at, key = heapq.heappop(self._queue)
            if self._queued.get(key) != at:
                continue
            del self._queued[key]
            try:
                entry = await self._vault.get(*key) if self._awake(key[0]) else None
            except CortexError as error:
                self._broke_off(key, error)
                continue
            if entry is None or self._oauth(entry) is None:
                continue
            if self._schedule.next_try(entry.facts, self._clock()) > self._clock():
                self._look_after(entry.facts)
            else:
                self._flight(entry.facts)

    # -- renewing ------------------------------------------------------------------------------

    def _flight(self, facts: Facts) -> asyncio.Task[None]:
        """The renewal that is under way for it, or a new one."""
        key = (facts.user, facts.provider)
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = self._tasks.start(
                self._renew(*key), "renew", on_error=lambda error: self._broke_off(key, error)
            )
            flight.add_done_callback(lambda _: self._flights.pop(key, None))
        return flight

    async def _renew(self, user: str, provider: str) -> None:
        async with self._room:
            # It may have been renewed, or stored anew, since it was found due.
            entry = await self._vault.get(user, provider)
            oauth = self._oauth(entry) if entry is not None else None
            now = self._clock()
            if entry is None or oauth is None or self._schedule.next_try(entry.facts, now) > now:
                return
            assert isinstance(entry.secret.value, Mapping)
            timeout = self._config().vault.refresh_timeout_s
            try:
                answer = await self._endpoint.renew(oauth, entry.secret.value["refresh_token"], timeout)
                life = entry.facts.expires_at - entry.facts.updated_at
                fresh = renewed(entry.secret, answer, self._clock(), life)
            except RefreshError as error:
                await self._failed(entry.facts, error)
                return
        await self._keep(entry.facts, fresh)

    async def _keep(self, old: Facts, fresh: Secret) -> None:
        """Stores what the provider gave, whatever it takes: the token that it replaces may be good no more."""
        while True:
            try:
                stored = await self._vault.put(old.user, old.provider, fresh, expect=old.version)
                break
            except CortexError as error:
                log.error("credential_not_stored", user=old.user, provider=old.provider, error=str(error))
                # The pause between two attempts; nothing tells that the disk has room again.
                await asyncio.sleep(STORE_AGAIN_S)
        CREDENTIAL_REFRESHES.labels(old.provider, "renewed" if stored else "superseded").inc()
        log.info("credential_renewed", user=old.user, provider=old.provider, kept=stored is not None)
        if stored is not None:
            self._look_after(stored)
            self._tell(old.user)

    async def _failed(self, facts: Facts, error: RefreshError) -> None:
        CREDENTIAL_REFRESHES.labels(facts.provider, "refused" if error.final else "failed").inc()
        log.warning(
            "credential_not_renewed",
            user=facts.user,
            provider=facts.provider,
            error=str(error),
            hint="store it again: cortex user credential set" if error.final else "it is tried again",
        )
        retry_at = self._clock() + pause_s(facts.failures, error, random.random())
        await self._vault.note_failure(facts, str(error), retry_at)
        noted = await self._vault.facts(facts.user, facts.provider)
        if noted is not None:
            self._look_after(noted)
        if facts.problem != str(error):
            self._tell(facts.user)

    def _broke_off(self, key: Key, error: BaseException) -> None:
        """It is looked at again where that may help, though nobody may ask for it in the meantime."""
        log.error(
            "credential_not_renewed",
            user=key[0],
            provider=key[1],
            error=str(error),
            error_type=type(error).__name__,
        )
        if isinstance(error, CortexError) and error.code.retryable:
            self._enqueue(key, self._clock() + LOOK_S)

    def _tell(self, user: str) -> None:
        """On its own: whoever waits for the renewal may be the one who has to take it."""
        self._tasks.start(self._take(user), "tell")

    async def _take(self, user: str) -> None:
        await self._changed(user)

    async def close(self) -> None:
        """Breaks off what runs; who has asked a provider may take in its answer first."""
        if self._flights:
            await asyncio.wait(tuple(self._flights.values()), timeout=FINISH_S)
        await self._tasks.close()
        await self._endpoint.close()
