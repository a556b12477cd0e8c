"""How calls to a provider are made, ready to be used: its servers, keys, limits and cache, with their live state.

A plan lives as long as its policy stays the same, so that a change to one provider forgets nothing of another.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping
from typing import Any

import structlog

from broker.gateway.admission import Admission
from broker.gateway.balance import Balance
from broker.gateway.batch import Batcher
from broker.gateway.caller import Endpoint
from broker.gateway.coalesce import Flights
from broker.gateway.policy import Kind, Policy
from broker.gateway.preload import Preload
from broker.gateway.probes import Probes
from broker.gateway.responses import Responses
from broker.gateway.routes import Route, Spot, compile_spot, credential_line
from broker.gateway.upstream import Pool
from broker.host.tasks import TaskOwner

MAX_BARE = 256
"""Plans kept for servers that no policy names."""
NEVER = 2**31
log = structlog.get_logger(__name__)


class Plan:
    """``keys``: lines that hold the operator's credentials, as ``Ticket.key`` counts them."""

    def __init__(self, name: str, policy: Policy, spots: tuple[Spot, ...], tasks: TaskOwner) -> None:
        """Raises ``CortexError`` (``BAD_CONFIG``) for a key that cannot be sent."""
        loop = asyncio.get_running_loop()
        self.name = name
        self.policy = policy
        self.spots = spots
        self.keys = tuple(credential_line(name, policy.kind, key) for key in policy.keys)
        self.balance = Balance(len(spots), policy.max_fails, policy.fail_timeout_s)
        self.admission = Admission(name, policy.limits, len(self.keys), loop.call_at, time.monotonic)
        self.flights = Flights() if policy.coalesce else None
        self.batcher = Batcher(policy, None, tasks) if policy.batch_s else None
        self._workers: list[Probes | Preload] = []

    def credential(self, route: Route, key: int) -> bytes:
        """The line that authenticates a call; ``key``: of its ticket."""
        return route.credential if route.credential or key < 0 else self.keys[key]

    def gathers(self, endpoint: Endpoint, method: bytes, responses: Responses) -> bool:
        """The whole request has to be there before it is decided how it is answered."""
        if self.policy.cache.enabled and responses.wants(self.policy.cache, endpoint, method):
            return True
        if self.batcher is not None and endpoint is Endpoint.EMBED:
            return True
        return self.flights is not None and endpoint in (Endpoint.GENERATE, Endpoint.EMBED, Endpoint.COUNT)

    def start(self, pool: Pool, tasks: TaskOwner) -> None:
        """Opens connections ahead, looks whether the servers live, loads models."""
        policy = self.policy
        for spot in self.spots:
            pool.configure(
                spot.origin,
                keep_alive=policy.keep_alive,
                prewarm=policy.prewarm,
                max_connections=policy.max_connections,
            )
        places = [(spot.origin, spot.base_path) for spot in self.spots]
        key = self.keys[0] if self.keys else b""
        if policy.health_path:
            self._workers.append(
                Probes(self.balance, places, policy.health_path, policy.health_interval_s, pool, tasks, key)
            )
        if policy.preload:
            self._workers.append(Preload(places, policy.preload, policy.preload_keep_alive, pool, tasks, key))
        for worker in self._workers:
            worker.start()

    def close(self) -> None:
        """Ends what looks after the servers; calls go on."""
        for worker in self._workers:
            worker.close()
        if self.batcher is not None:
            self.batcher.close()

    def view(self, now: float) -> dict[str, Any]:
        """JSON-safe, for people and metrics."""
        coalesced = self.flights.followers if self.flights is not None else 0
        return {"servers": self.balance.view(now), "limits": self.admission.view(), "coalesced": coalesced}


class Plans:
    """All plans: by policy, and for servers that have none."""

    def __init__(self, pool: Pool, tasks: TaskOwner) -> None:
        self._pool = pool
        self._tasks = tasks
        self._named: dict[str, Plan] = {}
        self._bare: dict[tuple[str, Spot], Plan] = {}
        self._spent: tuple[Collection[str], Collection[str], float] | None = None

    def of(self, route: Route) -> Plan:
        """The plan by which a call on ``route`` is made."""
        plan = self._named.get(route.policy) if route.policy else None
        return plan or self._bare.get((route.name, route.spot)) or self.bare(route.name, route.kind, route.spot)

    def named(self, name: str) -> Plan | None:
        """The plan of an operator's provider."""
        return self._named.get(name)

    def bare(self, name: str, kind: Kind, spot: Spot) -> Plan:
        """A plan for one server, without limits; it is asked however often it fails."""
        if len(self._bare) >= MAX_BARE:
            self._bare.clear()
        plan = self._bare[name, spot] = Plan(
            name, Policy(kind=kind, upstreams=(), max_fails=NEVER), (spot,), self._tasks
        )
        return plan

    def set(self, policies: Mapping[str, Policy]) -> None:
        """Makes calls by ``policies`` from now on. Raises ``CortexError`` and changes nothing."""
        fresh = {
            name: Plan(name, policy, _spots(name, policy), self._tasks)
            for name, policy in policies.items()
            if (old := self._named.get(name)) is None or old.policy != policy
        }
        gone = [plan for name, plan in self._named.items() if name in fresh or name not in policies]
        self._named = {name: fresh.get(name) or self._named[name] for name in policies}
        kept = {spot.origin for plan in self._named.values() for spot in plan.spots}
        for plan in gone:
            plan.close()
            for origin in {spot.origin for spot in plan.spots} - kept:
                self._pool.unconfigure(origin)
        for plan in fresh.values():
            plan.start(self._pool, self._tasks)
            if self._spent is not None:
                plan.admission.spent(*self._spent)

    def spent(self, users: Collection[str], teams: Collection[str], until: float) -> None:
        """Budgets that are used up, until ``until`` (the loop's clock)."""
        self._spent = (users, teams, until)
        for plan in self._named.values():
            plan.admission.spent(users, teams, until)

    def view(self, now: float) -> dict[str, Any]:
        """By provider."""
        return {name: plan.view(now) for name, plan in self._named.items()}

    def close(self) -> None:
        for plan in self._named.values():
            plan.close()


def _spots(name: str, policy: Policy) -> tuple[Spot, ...]:
    return tuple(compile_spot(name, url, policy.ca) for url in policy.upstreams)
