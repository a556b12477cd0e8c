"""What models are used for: the gateway's records made durable, priced, held against budgets, and measured.

A report is answered (``seen``) when its records are stored; until then the gateway tells it again, and the
store counts each record by its id.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import structlog

from broker.config import Config
from broker.errors import CortexError
from broker.gateway.records import Record, from_wire
from broker.host.tasks import TaskOwner
from broker.metrics import USAGE_LOST
from broker.session.fastest import FASTEST, Speeds, resolved, with_models
from broker.session.model_names import MAX_KNOWN, ModelNames
from broker.session.prices import UNCHARGED, Budgets, cost_of, period, price_of
from broker.session.usage_metrics import UsageMetrics
from broker.store.usage import By, SpeedRow, UsageFilter, UsageStore, UsageSum, UsedCall

CALL_DAYS = 7
"""For so long a call is known by its id; a gateway that could not tell for longer tells it anew."""
DAY_S = 86_400
HOUR_S = 3600
MAX_REPORTS = 64
"""That wait to be stored; the gateway tells more of them again later."""
MAX_SPENT_BYTES = 200_000
"""Names of those who have spent their budgets, in one message to the gateway."""
MAX_ERASED = 1000
log = structlog.get_logger(__name__)


class Gateway(Protocol):
    """What of ``GatewayLink`` is needed here."""

    def usage_seen(self, boot: str, upto: int) -> None: ...
    def budgets_changed(self) -> None: ...


class Accounting:
    """``clock``: seconds since the epoch. ``open`` before the gateway is listened to, then ``start``."""

    def __init__(self, store: UsageStore, config: Callable[[], Config], clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._config = config
        self._clock = clock
        self._tasks = TaskOwner("usage")
        self._reports: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue(MAX_REPORTS)
        self._gateway: Gateway | None = None
        self._turn = asyncio.Lock()
        """What is stored is in the budgets too before these are read anew."""
        self._budgets = Budgets()
        self._told: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
        self._speeds = Speeds()
        self._names = ModelNames()
        self._metrics = UsageMetrics()
        self._erased: dict[str, float] = {}
        self._resolved: tuple[Config, Mapping[str, str], Config] | None = None

    async def open(self) -> None:
        """Reads what there is. Raises ``CortexError``."""
        self._speeds = Speeds(await self._store.speeds())
        self._names = ModelNames(await self._store.answered(MAX_KNOWN))
        await self._begin_period()

    def start(self, gateway: Gateway) -> None:
        """Begins to store what comes."""
        self._gateway = gateway
        self._tasks.start(self._run(), "store")
        self._tasks.start(self._care(), "care")

    async def close(self) -> None:
        """Stores what has come; the gateway tells the rest to the next broker."""
        await self._tasks.close()
        try:
            while not self._reports.empty():
                await self._take(self._reports.get_nowait())
        except CortexError as error:
            log.error("usage_not_stored", error=str(error), hint=error.hint)

    # -- what the gateway tells

    def heard(self, report: Mapping[str, Any]) -> None:
        """A report of kind usage. Does not wait; one too many is left to be told again."""
        try:
            self._reports.put_nowait(report)
        except asyncio.QueueFull:
            log.warning("usage_behind", reports=self._reports.qsize())

    def spent(self) -> dict[str, Any]:
        """Who has spent a budget, for the gateway, and for how long that holds."""
        users, teams = self._told
        left = MAX_SPENT_BYTES
        kept: list[list[str]] = [[], []]
        for names, into in ((sorted(teams), kept[1]), (sorted(users), kept[0])):
            for name in names:
                left -= len(name) + 3
                if left > 0:
                    into.append(name)
        if left <= 0:
            log.error("budgets_too_many", users=len(users), teams=len(teams))
        return {"users": kept[0], "teams": kept[1], "for_s": max(0.0, self._budgets.end - self._clock())}

    async def _run(self) -> None:
        while True:
            report = await self._reports.get()
            try:
                async with self._turn:
                    await self._take(report)
            except CortexError as error:
                # Not answered, so it comes again.
                log.error("usage_not_stored", error=str(error), hint=error.hint)

    async def _take(self, report: Mapping[str, Any]) -> None:
        settings = self._config().gateway
        calls = [call for call in map(_read, report.get("records", ())) if call is not None and self._counts(call)]
        costs = {call.id: cost_of(price_of(settings.prices, call.model), call) for call in calls}
        fresh = (
            await self._store.add([_row(call, self._names.of(call), costs[call.id]) for call in calls])
            if calls
            else frozenset()
        )
        await self._note([call for call in calls if call.id in fresh], costs)
        if self._gateway is not None:
            self._gateway.usage_seen(str(report.get("boot", "")), int(report.get("upto", 0)))

    async def _note(self, calls: Sequence[Record], costs: Mapping[str, float]) -> None:
        """Those that count now."""
        config = self._config()
        speeds: dict[tuple[str, str], SpeedRow] = {}
        for call in calls:
            self._metrics.observe(config.gateway, call, costs[call.id])
            self._budgets.add(call.at, call.user, call.team, costs[call.id])
            speed = self._speeds.add(config, call)
            if speed is not None:
                speeds[(speed.provider, speed.model)] = speed
        self._look_at_budgets()
        if speeds:
            await self._store.put_speeds(list(speeds.values()))

    def _counts(self, call: Record) -> bool:
        """False for what a user who was erased did before."""
        return call.at > self._erased.get(call.user, -1.0)

    # -- budgets

    def settings_changed(self) -> None:
        """config.toml is another one now."""
        self._look_at_budgets()
        self._tasks.start(self._again(), "period")

    async def _again(self) -> None:
        try:
            await self._begin_period()
        except CortexError as error:
            log.error("budgets_unknown", error=str(error), hint=error.hint)

    async def _begin_period(self) -> None:
        """Budgets of the period that is now, if it is another one."""
        async with self._turn:
            span = period(self._config().gateway.budgets.period, self._clock())
            if span != (self._budgets.begin, self._budgets.end):
                hour = int(span[0]) // HOUR_S
                self._budgets.load(span, await self._store.spent("user", hour), await self._store.spent("team", hour))
        self._look_at_budgets()

    def _look_at_budgets(self) -> None:
        over = self._budgets.over(self._config().gateway.budgets)
        if over != self._told:
            self._told = over
            if self._gateway is not None:
                self._gateway.budgets_changed()

    # -- what is asked of it

    async def sums(self, wanted: UsageFilter, by: By) -> list[UsageSum]:
        """See ``UsageStore.sums``."""
        return await self._store.sums(wanted, by)

    def forget(self, user: str) -> None:
        """Call before the store's part is erased: what the gateway still has to tell of the user is dropped."""
        self._erased[user] = self._clock()
        if len(self._erased) > MAX_ERASED:
            del self._erased[next(iter(self._erased))]
        self._budgets.forget(user)
        self._look_at_budgets()

    def resolved(self) -> Config:
        """The settings tree with the model of the moment for each agent whose model is ``fastest``."""
        config = self._config()
        if all(agent.model != FASTEST for agent in config.agents.values()):
            return config
        models = resolved(config, self._speeds, self._clock())
        if self._resolved is None or self._resolved[0] is not config or self._resolved[1] != models:
            self._resolved = config, models, with_models(config, models)
        return self._resolved[2]

    # -- time passes

    async def _care(self) -> None:
        """Once an hour, as a period begins with one: what is old is deleted, budgets are anew."""
        while True:
            now = self._clock()
            try:
                await self._begin_period()
                days = self._config().gateway.usage_days
                await self._store.prune(now - min(days, CALL_DAYS) * DAY_S, int(now - days * DAY_S) // HOUR_S)
            except CortexError as error:
                log.error("usage_not_pruned", error=str(error), hint=error.hint)
            await asyncio.sleep(HOUR_S - now % HOUR_S)


def _read(found: Any) -> Record | None:
    try:
        return from_wire(found)
    except (TypeError, ValueError) as error:
        USAGE_LOST.inc()
        log.error("usage_not_understood", error=str(error))
        return None


def _row(call: Record, model: str, cost: float) -> UsedCall:
    """As it is kept, under the name ``model``. An answer that no provider was asked for used no tokens."""
    charged = call.cached not in UNCHARGED
    return UsedCall(
        id=call.id,
        at=call.at,
        user=call.user,
        team=call.team,
        workspace=call.workspace,
        agent=call.agent,
        provider=call.provider,
        model=model,
        endpoint=call.endpoint,
        status=call.status,
        outcome=call.outcome,
        cached=call.cached,
        input=call.input if charged else None,
        output=call.output if charged else None,
        cache_read=call.cache_read if charged else None,
        cache_write=call.cache_write if charged else None,
        reasoning=call.reasoning if charged else None,
        cost_usd=cost,
        duration_s=call.duration_s,
        queue_s=call.queue_s,
        ttft_s=call.ttft_s if charged else None,
        estimated=call.estimated and charged,
    )
