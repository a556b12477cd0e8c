"""How many warm sandboxes to make, end, pause and resume, given counts and limits. Pure.

What is being made and what is being ended counts, so that there are never more than wanted: a sandbox
whose end is under way has its memory still. One whose end failed is *stuck*; it counts against the
maximum and the memory, no longer against the target, or one that the engine never lets go of would
keep the pool short for ever.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Short = Literal["", "making", "ending", "busy", "rate", "memory", "breaker", "maximum"]
"""Why an agent has fewer than wanted: they are being made; others have to be ended first; others are made first, or
users' starts; too many in a short time; no memory; failures; too many that cannot be ended."""


@dataclass(frozen=True)
class Stock:
    """The warm sandboxes of one agent. ``awake``: of ``ready`` those that are not paused, nor about to be;
    ``still``: those of them that may be paused; ``asleep``: those that may be resumed; ``cost``: bytes each takes.
    ``tries``: how many may be under way, None without a bound (``session.breaker``)."""

    agent: str
    wanted: int
    maximum: int
    hot: int = 0
    making: int = 0
    ready: int = 0
    awake: int = 0
    still: int = 0
    asleep: int = 0
    ending: int = 0
    stuck: int = 0
    cost: int = 0
    tries: int | None = None

    @property
    def lacking(self) -> int:
        """How many more there should be."""
        there = self.making + self.ready + self.ending
        return max(0, min(self.wanted - there, self.maximum - there - self.stuck))

    @property
    def excess(self) -> bool:
        """There are more than there should be when all that is under way is done."""
        there = self.making + self.ready + self.ending
        return there > self.wanted or there + self.stuck > self.maximum

    @property
    def held(self) -> int:
        """Bytes that are taken, or soon will be."""
        return self.cost * (self.making + self.ready + self.ending + self.stuck)


@dataclass(frozen=True)
class Limits:
    """For all agents together. ``concurrency``: made at once; ``tokens``: to be begun now; ``budget``: bytes for warm
    sandboxes; ``others``: bytes of it that users' own warm sandboxes take; ``available``: bytes of the host that are
    free; ``reserve``: of them to be left."""

    concurrency: int
    tokens: int
    budget: int
    others: int
    available: int
    reserve: int


@dataclass
class Plan:
    """Agents by name. ``make`` has an agent as often as one is to be made for it."""

    make: list[str] = field(default_factory=list)
    end: dict[str, int] = field(default_factory=dict)
    pause: dict[str, int] = field(default_factory=dict)
    resume: dict[str, int] = field(default_factory=dict)
    short: dict[str, Short] = field(default_factory=dict)
    held: set[Short] = field(default_factory=set)
    """Everything that kept more from being made."""


def wanted(minimum: int, target: int, maximum: int) -> int:
    """``target`` between the other two."""
    return max(minimum, min(target, maximum))


def plan(stocks: Sequence[Stock], limits: Limits) -> Plan:
    """What to do now. Every agent has a place in ``short``; "" where nothing is missing."""
    made = Plan(end=_to_end(stocks, limits))
    _to_make(stocks, limits, made)
    for stock in stocks:
        if made.end.get(stock.agent):
            continue  # which are left is known when they are gone
        awake = min(stock.hot, stock.ready) - stock.awake
        if awake > 0 and stock.asleep:
            made.resume[stock.agent] = min(awake, stock.asleep)
        elif awake < 0 and stock.still:
            made.pause[stock.agent] = min(-awake, stock.still)
    return made


def _to_end(stocks: Sequence[Stock], limits: Limits) -> dict[str, int]:
    """Those above what is wanted; then, while memory is short, those of the agent that has the largest share.

    The host's memory is taken for short at half of the reserve: none are made below the reserve, so that what is
    ended here is not made again at once.
    """
    end = {stock.agent: max(0, stock.ready - stock.wanted) for stock in stocks}
    over = sum(stock.held for stock in stocks) + limits.others - limits.budget
    dying = sum(stock.cost * (stock.ending + stock.stuck) for stock in stocks)
    missing = max(over, limits.reserve // 2 - limits.available) - dying
    missing -= sum(stock.cost * end[stock.agent] for stock in stocks)
    while missing > 0:
        left = [stock for stock in stocks if stock.ready > end[stock.agent] and stock.cost > 0]
        if not left:
            break
        most = max(left, key=lambda stock: (_share(stock, -end[stock.agent]), stock.agent))
        end[most.agent] += 1
        missing -= most.cost
    return {agent: count for agent, count in end.items() if count}


def _to_make(stocks: Sequence[Stock], limits: Limits, made: Plan) -> None:
    """One after the other for the agent that lacks most; who lacks and gets none is told why in ``made.short``."""
    count = {stock.agent: 0 for stock in stocks}
    under_way = sum(stock.making for stock in stocks)
    room = limits.budget - limits.others - sum(stock.held for stock in stocks)
    spare = limits.available - limits.reserve - sum(stock.cost * stock.making for stock in stocks)
    made.short |= {stock.agent: _state(stock) for stock in stocks}
    if made.end:
        return
    lacking = [stock for stock in stocks if stock.lacking]
    while lacking:
        stock = min(lacking, key=lambda stock: (_share(stock, count[stock.agent]), stock.agent))
        why = _refused(stock, count[stock.agent])
        if not why and stock.cost > min(room, spare):
            why = "memory"
        if not why and under_way >= limits.concurrency:
            why = "busy"
        if not why and len(made.make) >= limits.tokens:
            why = "rate"
        if why:
            lacking.remove(stock)
            made.held.add(why)
            if not (stock.making or count[stock.agent]):
                made.short[stock.agent] = why
            continue
        made.make.append(stock.agent)
        made.short[stock.agent] = "making"
        count[stock.agent] += 1
        under_way += 1
        room -= stock.cost
        spare -= stock.cost
        if count[stock.agent] == stock.lacking:
            lacking.remove(stock)


def _refused(stock: Stock, begun: int) -> Short:
    tries = math.inf if stock.tries is None else stock.tries
    return "breaker" if stock.making + begun >= tries else ""


def _state(stock: Stock) -> Short:
    """Before anything is begun."""
    if stock.ready >= stock.wanted:
        return ""
    if stock.making:
        return "making"
    return "ending" if stock.ending or stock.lacking else "maximum"


def _share(stock: Stock, more: int) -> float:
    """How much of what is wanted there is."""
    return (stock.making + stock.ready + more) / max(stock.wanted, 1)
