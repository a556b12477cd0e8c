"""Whose call is next: users take turns, each user's calls go in the order they came. Pure.

What is in the way of one call is in the way of others too, as far as its ``Reach`` says. Calls of a user
whose sandbox or own credential is at its limit let that user's other ones by; nothing else is overtaken, so
a large call is not starved by small ones.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from heapq import heappop, heappush
from typing import Generic, NamedTuple, Protocol, TypeVar

from broker.gateway.limits import Gauge


class Reach(Enum):
    """Who else is held by what holds a call."""

    LINE = "line"
    """Calls of the same sandbox with the same credential."""
    USER = "user"
    POOL = "pool"
    """Calls that use the operator's keys."""
    ALL = "all"


class Block(NamedTuple):
    """In the way until ``at``, or (infinite) until a call ends. ``scope``: field of ``Limits``; ``gauge``: the limit,
    None: the provider has asked for a pause; ``lasting``: only time or the end of a call of that user helps."""

    at: float
    reach: Reach
    scope: str
    gauge: Gauge | None
    lasting: bool = False


class Waiter(Protocol):
    @property
    def user(self) -> str: ...
    @property
    def line(self) -> tuple[str, str]:
        """Sandbox and own credential."""

    @property
    def number(self) -> int:
        """Grows with each."""

    @property
    def pooled(self) -> bool:
        """Uses the operator's keys."""


W = TypeVar("W", bound=Waiter)


class Queue(Generic[W]):
    """The waiting calls of one user. ``parked_until``: none can go before; ``alarm``: when it is looked at again."""

    __slots__ = ("alarm", "count", "lines", "parked_until")

    def __init__(self) -> None:
        self.parked_until = -math.inf
        self.alarm = math.inf
        self.count = 0
        self.lines: dict[tuple[str, str], OrderedDict[W, None]] = {}

    def heads(self) -> list[W]:
        """The first of each line, in the order they came."""
        heads = [next(iter(line)) for line in self.lines.values()]
        if len(heads) > 1:
            heads.sort(key=lambda each: each.number)
        return heads

    def newest(self) -> W:
        """The last to come."""
        return max((next(reversed(line)) for line in self.lines.values()), key=lambda each: each.number)


class Turns(Generic[W]):
    """All waiting calls. Users none of whose calls can go are parked, so that they cost the others nothing."""

    def __init__(self) -> None:
        self._queues: dict[str, Queue[W]] = {}
        self._ready: OrderedDict[str, Queue[W]] = OrderedDict()
        self._alarms: list[tuple[float, str]] = []
        self.count = 0

    def add(self, waiter: W) -> int:
        """Goes to the end of its line; how many are ahead in it."""
        queue = self._queues.setdefault(waiter.user, Queue())
        line = queue.lines.setdefault(waiter.line, OrderedDict())
        line[waiter] = None
        queue.count += 1
        self.count += 1
        self._ready.setdefault(waiter.user, queue)
        return len(line) - 1

    def remove(self, waiter: W) -> None:
        """It goes, or waits no more."""
        queue = self._queues[waiter.user]
        line = queue.lines[waiter.line]
        del line[waiter]
        if not line:
            del queue.lines[waiter.line]
        queue.count -= 1
        self.count -= 1
        if queue.count:
            self._ready.setdefault(waiter.user, queue)
        else:
            del self._queues[waiter.user]
            self._ready.pop(waiter.user, None)
        if not self.count:
            self._alarms.clear()

    def ended(self, user: str) -> None:
        """A call of the user has ended, so what was in the way may be gone."""
        queue = self._queues.get(user)
        if queue is not None:
            self._ready.setdefault(user, queue)

    def look_again(self) -> None:
        """Nothing is known of what is in the way."""
        for user, queue in self._queues.items():
            self._ready.setdefault(user, queue)

    def serve(self, now: float, start: Callable[[W], Block | None]) -> float:
        """Starts the next call that can go: ``start`` says what is in the way, or None: it has started. Gives -inf when
        one has, else when to try again; infinite: when a call ends."""
        while self._alarms and self._alarms[0][0] <= now:
            at, user = heappop(self._alarms)
            queue = self._queues.get(user)
            if queue is not None and queue.alarm == at:
                queue.alarm = math.inf
                self._ready.setdefault(user, queue)
        parked: list[str] = []
        again = self._scan(start, parked)
        for user in parked:
            self._park(user)
        return min(again, self._alarms[0][0]) if self._alarms and again != -math.inf else again

    def _scan(self, start: Callable[[W], Block | None], parked: list[str]) -> float:
        again = math.inf
        pool_shut = False
        for user, queue in self._ready.items():
            own = math.inf
            lasting = True
            for waiter in queue.heads():
                if pool_shut and waiter.pooled:
                    lasting = False
                    continue
                block = start(waiter)
                if block is None:
                    self._ready.move_to_end(user)
                    self.remove(waiter)
                    return -math.inf
                own = min(own, block.at)
                lasting = lasting and block.lasting
                if block.reach is Reach.ALL:
                    return min(again, own)
                if block.reach is Reach.USER:
                    break
                pool_shut = pool_shut or block.reach is Reach.POOL
            if lasting:
                queue.parked_until = own
                parked.append(user)
            else:
                again = min(again, own)
        return again

    def _park(self, user: str) -> None:
        """Until its time has come or one of its own calls ends; then it takes its turn behind the others."""
        queue = self._ready.pop(user)
        if queue.parked_until < queue.alarm:
            queue.alarm = queue.parked_until
            heappush(self._alarms, (queue.alarm, user))

    def crowd(self) -> Queue[W]:
        """The user with the most waiting calls."""
        return max(self._queues.values(), key=lambda queue: queue.count)

    def waiting_of(self, user: str) -> int:
        """How many of that user's calls wait."""
        queue = self._queues.get(user)
        return queue.count if queue is not None else 0

    @property
    def users(self) -> int:
        """How many wait."""
        return len(self._queues)
