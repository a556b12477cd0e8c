"""What operators see of the pool: one view for the control API, and the gauges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from broker.config import PoolAgentConfig
from broker.metrics import IDLE_SECONDS, POOL_BREAKER, POOL_CLAIMS, POOL_MEMORY, POOL_REFILLS, POOL_SIZE, POOL_TARGET
from broker.session.shelf import GUESS_BYTES, Shelf

STATES = ("making", "hot", "paused", "ending")
USER_STATES = ("hot", "paused")

Users = Sequence[tuple[str, str]]
"""Agent and state of each session that is warm without being asked for."""


@dataclass(frozen=True)
class Row:
    """One agent. ``target``: how many are wanted now."""

    shelf: Shelf
    settings: PoolAgentConfig
    target: int


@dataclass(frozen=True)
class Facts:
    """What is the same for all agents; bytes, monotonic seconds."""

    budget: int
    available: int
    reserve: int
    cost_per_hour: float
    image: str
    image_error: str
    yielding: bool
    now: float


def view(rows: Sequence[Row], users: Users, facts: Facts) -> dict[str, Any]:
    """JSON-safe; see ``control.schema.Pool``."""
    own = Counter(users)
    agents = sorted({row.shelf.agent for row in rows} | {agent for agent, _ in users})
    by_agent = {row.shelf.agent: row for row in rows}
    told = [_agent(name, by_agent.get(name), own, facts) for name in agents]
    return {
        "agents": told,
        "claims": _claims(),
        "memory": {
            "warm_bytes": sum(one["memory_bytes"] for one in told),
            "budget_bytes": facts.budget,
            "host_available_bytes": facts.available,
            "reserve_bytes": facts.reserve,
        },
        "cost": _cost(told, facts.cost_per_hour),
        "image": facts.image,
        "image_error": facts.image_error,
        "yielding": facts.yielding,
    }


def _agent(name: str, row: Row | None, own: Counter[tuple[str, str]], facts: Facts) -> dict[str, Any]:
    shelf = row.shelf if row else Shelf(name)
    settings = row.settings if row else PoolAgentConfig(minimum=0, target=0, maximum=0, hot=0)
    sizes, breaker = shelf.sizes(), shelf.breaker
    user = {state: own[name, state] for state in USER_STATES}
    there = sum(sizes.values()) + sum(user.values())
    claims = {result: shelf.claims[result] for result in ("hit", "empty", "stale")}
    return {
        "agent": name,
        "minimum": settings.minimum,
        "target": row.target if row else 0,
        "maximum": settings.maximum,
        "keep_hot": settings.hot,
        **sizes,
        "stuck": shelf.stuck,
        "short": shelf.short,
        "users": user,
        "claims": claims,
        "hit_rate": _rate(claims["hit"], sum(claims.values())),
        "recent_hit_rate": _rate(sum(shelf.recent), len(shelf.recent)),
        "breaker": breaker.state(facts.now),
        "failures": breaker.failures,
        "error": shelf.refused or breaker.error,
        "retry_in_s": round(max(0.0, breaker.until - facts.now), 1),
        "bytes_each": shelf.cost,
        "measured": shelf.known,
        "memory_bytes": there * (shelf.cost if row else GUESS_BYTES),
        "idle_hours": round(shelf.idle_s / 3600, 4),
    }


def _idle(agent: dict[str, Any]) -> int:
    """Sandboxes that stand ready for whoever comes."""
    return int(agent["hot"] + agent["paused"] + sum(agent["users"].values()))


def _cost(agents: Sequence[dict[str, Any]], cost_per_hour: float) -> dict[str, float] | None:
    """In the operator's money; None where he did not say what a sandbox costs."""
    if not cost_per_hour:
        return None
    idle = sum(_idle(agent) for agent in agents)
    hours = sum(agent["idle_hours"] for agent in agents) + _idle_seconds_of_users() / 3600
    return {
        "per_sandbox_hour": cost_per_hour,
        "idle_now_per_hour": round(idle * cost_per_hour, 4),
        "idle_since_start": round(hours * cost_per_hour, 4),
    }


def _idle_seconds_of_users() -> float:
    samples = [sample for metric in IDLE_SECONDS.collect() for sample in metric.samples]
    return float(sum(sample.value for sample in samples if sample.name.endswith("_total")))


def _claims() -> dict[str, dict[str, int]]:
    """Claims since the broker started, by kind and result."""
    found: dict[str, dict[str, int]] = {}
    for metric in POOL_CLAIMS.collect():
        for sample in metric.samples:
            if sample.name.endswith("_total"):
                found.setdefault(sample.labels["kind"], {})[sample.labels["result"]] = int(sample.value)
    return found


def _rate(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def publish(shelf: Shelf, now: float) -> None:
    """The gauges of one agent's generic sandboxes."""
    for state, count in shelf.sizes().items():
        POOL_SIZE.labels(shelf.agent, "generic", state).set(count)
    POOL_BREAKER.labels(shelf.agent).set(shelf.breaker.state(now) != "closed")


def publish_users(users: Iterable[tuple[str, str]], agents: Iterable[str]) -> set[str]:
    """The gauges of users' own; ``agents``: those that may have none now. Returns all that were told of."""
    own = Counter(users)
    told = {agent for agent, _ in own} | set(agents)
    for agent in told:
        for state in USER_STATES:
            POOL_SIZE.labels(agent, "user", state).set(own[agent, state])
    return told


def publish_memory(warm: int, budget: int, available: int, reserve: int) -> None:
    """The gauges of memory, in bytes."""
    for kind, size in (("warm", warm), ("budget", budget), ("available", available), ("reserve", reserve)):
        POOL_MEMORY.labels(kind).set(size)


def expect_refills(agent: str) -> None:
    """Counters that begin at 0, so that the first failure is seen as one more."""
    for result in ("made", "failed"):
        POOL_REFILLS.labels(agent, result)


def forget(agent: str) -> None:
    """Its pool is gone."""
    for kind, states in (("generic", STATES), ("user", USER_STATES)):
        for state in states:
            with suppress(KeyError):
                POOL_SIZE.remove(agent, kind, state)
    for gauge in (POOL_TARGET, POOL_BREAKER):
        with suppress(KeyError):
            gauge.remove(agent)
