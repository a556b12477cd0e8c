"""What all connections of the gateway process share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from broker.gateway.dialer import Dialer
from broker.gateway.messages import Settings
from broker.gateway.plan import Plans
from broker.gateway.policy import CacheRule, CacheStore, Policy
from broker.gateway.resolve import Resolver
from broker.gateway.responses import Responses
from broker.gateway.routes import Route
from broker.gateway.stats import Stats
from broker.gateway.upstream import Pool
from broker.gateway.usage_log import UsageLog
from broker.host.tasks import TaskOwner

MAX_NOTES = 100
NOTES_S = 10.0
log = structlog.get_logger(__name__)


@dataclass
class Context:
    """``report`` tells the broker something by itself, or gives False when it is not there. ``emptied`` is set
    whenever the last connection of a sandbox has gone."""

    tasks: TaskOwner
    settings: Settings = field(default_factory=Settings)
    stats: Stats = field(default_factory=Stats)
    report: Callable[[dict[str, Any]], bool] = lambda _: False
    draining: bool = False

    def __post_init__(self) -> None:
        self.emptied = asyncio.Event()
        # The loop's own clock stands still while it works, and has whole milliseconds.
        self.clock = time.monotonic
        self.usage = UsageLog(
            lambda facts: self.report(facts), lambda delay, call: asyncio.get_running_loop().call_later(delay, call)
        )
        self._noted_until = 0.0
        self._noted = 0
        self._resolvers = [
            Resolver(self.tasks, lambda: self.settings.dns_timeout_s, serve_stale=operators)
            for operators in (True, False)
        ]
        self.dialer = Dialer(self._resolvers[0], lambda: self.settings.connect_timeout_s, self._resolvers[1])
        self.pool = Pool(self.dialer, self.stats, lambda: self.settings.max_head_bytes, self.tasks)
        self.plans = Plans(self.pool, self.tasks)
        self._cache = CacheStore()
        self.responses = Responses(self._cache, self.tasks)

    def speaks_websocket(self, route: Route) -> bool:
        """Whether calls on ``route`` may be WebSockets."""
        return self.plans.of(route).policy.websocket

    def treat(self, policies: Mapping[str, Policy], cache: CacheStore) -> None:
        """Makes calls by these policies from now on. Raises ``CortexError`` and changes nothing."""
        before = {name: plan.policy.cache for name in policies if (plan := self.plans.named(name)) is not None}
        self.plans.set(policies)
        if cache != self._cache:
            self._cache = cache
            self.tasks.start(self.responses.close(), "cache_close")
            self.responses = Responses(cache, self.tasks)
            before.clear()
        for name, policy in policies.items():
            if before.get(name, CacheRule()) != policy.cache:
                self.tasks.start(self.responses.prewarm(name, policy.cache), "cache_prewarm")

    def note(self, event: str, **facts: Any) -> None:
        """Logs what a request caused, so many lines in so many seconds at most: sandboxes must not fill a disk."""
        now = self.clock()
        if now > self._noted_until:
            if self._noted > MAX_NOTES:
                log.warning("notes_suppressed", count=self._noted - MAX_NOTES)
            self._noted_until, self._noted = now + NOTES_S, 0
        self._noted += 1
        if self._noted <= MAX_NOTES:
            log.info(event, **facts)

    def unread(self, provider: str) -> None:
        """Counts an answer that its provider compressed although it was asked not to."""
        self.stats.unread += 1
        self.note("usage_unread", provider=provider, hint="have the provider's server send it as accept-encoding says")

    async def close(self) -> None:
        self.usage.close()
        self.plans.close()
        await self.responses.close()
        self.pool.close()
        for resolver in self._resolvers:
            resolver.close()
